"""Put the normalisation into the graph, so that the model takes pixels as a decoder gives them.

    Given   images float32 (N, 3, H, W), normalised
    Result  images uint8 (N, H, W, 3);  transpose(float(images)) * s + b,
            with s = 1 / (255 std) and b = -mean / std for each channel

A quarter of the bytes cross to the GPU, and there is no float pre-processing on the device that
could drift from training's.
"""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from deploy.runtime.preprocess import Preprocessing

__all__ = ["read_pixels"]


def read_pixels(model: bytes, spec: Preprocessing) -> bytes:
    """Return the model with an input of pixels in place of its own, under the same name."""
    proto = onnx.load_model_from_string(model)
    graph = proto.graph
    (old,) = graph.input
    inner = f"{old.name}.normalized"
    for node in graph.node:
        for i, name in enumerate(node.input):
            if name == old.name:
                node.input[i] = inner
    batch = old.type.tensor_type.shape.dim[0]
    size = [batch.dim_param or batch.dim_value, spec.height, spec.width, 3]
    new = helper.make_tensor_value_info(old.name, TensorProto.UINT8, size)
    std = np.asarray(spec.std, np.float64).reshape(3, 1, 1)
    mean = np.asarray(spec.mean, np.float64).reshape(3, 1, 1)
    scale, shift = (1 / (255 * std)).astype(np.float32), (-mean / std).astype(np.float32)
    steps = [
        helper.make_node("Cast", [old.name], ["pixels.float"], "pixels/Cast", to=TensorProto.FLOAT),
        helper.make_node(
            "Transpose", ["pixels.float"], ["pixels.nchw"], "pixels/Transpose", perm=[0, 3, 1, 2]
        ),
        helper.make_node("Mul", ["pixels.nchw", "pixels.scale"], ["pixels.scaled"], "pixels/Mul"),
        helper.make_node("Add", ["pixels.scaled", "pixels.shift"], [inner], "pixels/Add"),
    ]
    nodes = [*steps, *graph.node]
    for kind in ("node", "input"):
        graph.ClearField(kind)
    graph.node.extend(nodes)
    graph.input.append(new)
    graph.initializer.extend(
        [
            numpy_helper.from_array(scale, "pixels.scale"),
            numpy_helper.from_array(shift, "pixels.shift"),
        ]
    )
    return bytes(proto.SerializeToString(deterministic=True))
