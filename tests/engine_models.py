"""One small network in three precisions, as an export would write it, and a bundle of them."""

import dataclasses

import numpy as np
from deploy_bundle import SIZE, bundle_parts, golden_pixels, npy
from onnx import TensorProto, helper, numpy_helper

from deploy.bundle.manifest import Conformance, TensorSpec, Variant
from deploy.bundle.read import open_bundle
from deploy.bundle.tolerance import Tolerance
from deploy.bundle.write import write_bundle
from deploy.runtime.preprocess import preprocess

CHANNELS = 16  # TensorRT's int8 kernels want some
_rng = np.random.default_rng(0)
KERNEL = _rng.normal(size=(CHANNELS, 3, 1, 1)).astype(np.float32)
HEAD = _rng.normal(size=(CHANNELS, 3)).astype(np.float32)
TOLERANCES = {
    "fp32": Tolerance(1e-5, 1.0, "float32 sums in another order"),
    "fp16": Tolerance(5e-3, 1.0, "ten roundings of fp16"),
    "int8": Tolerance(5e-2, 0.5, "a hundredth of the range for each step"),
}


def reference(images):
    """The network in float64. (N, 3, H, W) -> (N, 3)."""
    hidden = np.einsum("oc,nchw->nohw", KERNEL[:, :, 0, 0].astype(np.float64), images)
    return np.maximum(hidden, 0).mean(axis=(2, 3)) @ HEAD.astype(np.float64)


def fp32_onnx(*, batch="batch"):
    nodes = [
        _node("Conv", ["images", "kernel"], "h", "stem/Conv"),
        _node("Relu", ["h"], "r", "stem/Relu"),
        *_pool("r"),
        _node("MatMul", ["flat", "head"], "logits", "head/MatMul"),
    ]
    return _model(nodes, {"kernel": KERNEL, "head": HEAD}, batch)


def fp16_onnx(*, batch="batch"):
    """All in fp16 but the pooling, an island of fp32."""
    nodes = [
        _node("Cast", ["images"], "x16", "in/Cast", to=TensorProto.FLOAT16),
        _node("Conv", ["x16", "kernel"], "h", "stem/Conv"),
        _node("Relu", ["h"], "r16", "stem/Relu"),
        _node("Cast", ["r16"], "r", "up/Cast", to=TensorProto.FLOAT),
        *_pool("r"),
        _node("Cast", ["flat"], "flat16", "down/Cast", to=TensorProto.FLOAT16),
        _node("MatMul", ["flat16", "head"], "logits16", "head/MatMul"),
        _node("Cast", ["logits16"], "logits", "out/Cast", to=TensorProto.FLOAT),
    ]
    weights = {"kernel": KERNEL.astype(np.float16), "head": HEAD.astype(np.float16)}
    return _model(nodes, weights, batch)


def int8_onnx(*, batch="batch"):
    """The convolution in int8, by Q/DQ on its input and its weights; the rest in fp32."""
    scales = np.abs(KERNEL).max(axis=(1, 2, 3)) / 127
    nodes = [
        _node("QuantizeLinear", ["images", "scale", "zero"], "xq", "in/Quantize"),
        _node("DequantizeLinear", ["xq", "scale", "zero"], "x8", "in/Dequantize"),
        _node("QuantizeLinear", ["kernel", "scales", "zeros"], "kq", "kernel/Quantize", axis=0),
        _node("DequantizeLinear", ["kq", "scales", "zeros"], "k8", "kernel/Dequantize", axis=0),
        _node("Conv", ["x8", "k8"], "h", "stem/Conv"),
        _node("Relu", ["h"], "r", "stem/Relu"),
        *_pool("r"),
        _node("MatMul", ["flat", "head"], "logits", "head/MatMul"),
    ]
    weights = {
        "kernel": KERNEL,
        "head": HEAD,
        "scale": np.float32(4 / 127),
        "zero": np.int8(0),
        "scales": scales.astype(np.float32),
        "zeros": np.zeros(CHANNELS, np.int8),
    }
    return _model(nodes, weights, batch)


MODELS = {"fp32": fp32_onnx, "fp16": fp16_onnx, "int8": int8_onnx}


def write_engine_bundle(path, *, batch="batch", models=None, **changes):
    """Write a bundle of the three variants, with another model for some, and open it."""
    manifest, contents = bundle_parts()
    inputs = preprocess(golden_pixels(), manifest.preprocessing)
    files = {name: make(batch=batch) for name, make in MODELS.items()} | (models or {})
    judged = Conformance("none", "not judged", "a test")
    manifest = dataclasses.replace(
        manifest,
        max_batch=16 if batch == "batch" else 1,
        inputs=(TensorSpec("images", "float32", (batch, 3, SIZE, SIZE)),),
        outputs=(TensorSpec("logits", "float32", (batch, 3)),),
        variants={
            name: Variant(f"model.{name}.onnx", name, TOLERANCES[name], judged, None)
            for name in files
        },
    )
    contents |= {f"model.{name}.onnx": data for name, data in files.items()}
    contents["golden/outputs.npy"] = npy(reference(inputs).astype(np.float32))
    write_bundle(path, dataclasses.replace(manifest, **changes), contents)
    return open_bundle(path)


def _node(operator, inputs, output, name, **attributes):
    return helper.make_node(operator, inputs, [output], name, **attributes)


def _pool(name):
    return [
        _node("GlobalAveragePool", [name], "pooled", "pool/GlobalAveragePool"),
        _node("Flatten", ["pooled"], "flat", "pool/Flatten"),
    ]


def _model(nodes, weights, batch):
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "network",
        [value("images", TensorProto.FLOAT, [batch, 3, SIZE, SIZE])],
        [value("logits", TensorProto.FLOAT, [batch, 3])],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in weights.items()],
    )
    opsets = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()
