"""Static int8: pairs of QuantizeLinear and DequantizeLinear around the layers that have weights.

ONNX Runtime's quantizer writes them; which tensors, in what range, is decided here. A product of
two activations, as in attention, stays in float: it has no weights that could be stored in a
quarter of the space, and its range changes from image to image. So do sums, norms and softmax.
"""

import difflib
from collections import Counter
from collections.abc import Collection, Iterable
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime.quantization import (
    CalibrationMethod,
    QDQQuantizer,
    QuantType,
    TensorData,
    TensorsData,
)

from deploy.errors import BadInputError
from export.onnx_file.tensors import known_shapes
from export.precision.calibrate import collect_histograms
from export.precision.gemm_relu import part_relus
from export.precision.matmul_bias import part_biases
from export.precision.ranges import Method, find_ranges
from export.precision.silu import join_silus
from export.targets import Scheme

__all__ = ["SCHEMES", "layers_of", "observed_tensors", "quantize", "write_int8"]

_LAYERS = ("Conv", "Gemm", "MatMul")
_ACTIVATIONS = ("Relu", "Clip")  # are part of an asymmetric range that begins at zero
_ONNX_RUNTIME = {"OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"]}

# What QDQQuantizer is told.
# tensorrt: symmetric, biases in float, a pair of its own for each reader; its builder refuses zero
#   points and int32 biases. It takes the int8 kernel where Q/DQ stand before a layer; those behind
#   one would come between it and its ReLU.
# u8s8: unsigned activations, for which x86 has instructions. Weights have 7 bits: without VNNI
#   those add pairs of products in 16 bits, and 8-bit weights saturate them.
# s8s8: Arm's instructions take signed numbers and add in 32 bits.
# Both kinds of CPU need the result of a Conv in int8 to keep it in integers.
SCHEMES: dict[Scheme, dict[str, Any]] = {
    "tensorrt": {
        "activation_qType": QuantType.QInt8,
        "reduce_range": False,
        "op_types_to_quantize": _LAYERS,
        "extra_options": {
            "ActivationSymmetric": True,
            "WeightSymmetric": True,
            "QuantizeBias": False,
            "QDQDisableWeightAdjustForInt32Bias": True,
            "AddQDQPairToWeight": True,
            "DedicatedQDQPair": True,
            "OpTypesToExcludeOutputQuantization": [*_LAYERS],
        },
    },
    "u8s8": {
        "activation_qType": QuantType.QUInt8,
        "reduce_range": True,
        "op_types_to_quantize": (*_LAYERS, *_ACTIVATIONS),
        "extra_options": _ONNX_RUNTIME,
    },
    "s8s8": {
        "activation_qType": QuantType.QInt8,
        "reduce_range": False,
        "op_types_to_quantize": (*_LAYERS, *_ACTIVATIONS),
        "extra_options": _ONNX_RUNTIME,
    },
}


def quantize(
    model: bytes,
    batches: Iterable[NDArray[np.float32]],
    *,
    scheme: Scheme,
    method: Method,
    exclude: Collection[str] = (),
) -> bytes:
    """Return a model in int8; the same arguments give the same bytes.

    Args:
        model: A simplified float32 ONNX file, its nodes named MODULE/OPERATOR.
        batches: (N, 3, H, W) pre-processed calibration images; read once, one batch at a time.
        scheme: A key of SCHEMES.
        method: How ranges are chosen.
        exclude: Names of layers to be left in float.

    Raises:
        BadInputError: A name in `exclude` is no layer's, no layer is left, or the images cannot
            be used.
    """
    histograms = collect_histograms(model, batches, observed_tensors(model, scheme))
    return write_int8(model, find_ranges(histograms, method), scheme=scheme, exclude=exclude)


def layers_of(model: bytes) -> tuple[str, ...]:
    """Return the names of the nodes that can be quantized, in the order of the graph."""
    return tuple(node.name for node in _layers(onnx.load_model_from_string(model).graph))


def observed_tensors(model: bytes, scheme: Scheme) -> tuple[str, ...]:
    """Return the names of the activations whose range a scheme may need."""
    graph = onnx.load_model_from_string(model).graph
    followers = _followers(graph) if "Relu" in SCHEMES[scheme]["op_types_to_quantize"] else []
    nodes = [*_layers(graph), *followers]
    return tuple(dict.fromkeys(t for node in nodes for t in (node.input[0], node.output[0])))


def write_int8(
    model: bytes,
    ranges: dict[str, tuple[float, float]],
    *,
    scheme: Scheme,
    exclude: Collection[str] = (),
) -> bytes:
    """Return a model in int8, from the ranges of its `observed_tensors`.

    Raises:
        BadInputError: A name in `exclude` is no layer's, or no layer is left.
    """
    proto = onnx.load_model_from_string(model)
    chosen = _chosen(proto.graph, exclude)
    owners = _owners(proto.graph)
    made = {t for node in proto.graph.node if node.name in chosen for t in node.output}
    followers = {node.name for node in _followers(proto.graph) if node.input[0] in made}
    inferred = onnx.shape_inference.infer_shapes(proto)
    inferred.metadata_props.add(key="onnx.infer", value="onnxruntime.quant")  # or it does it again
    if scheme != "tensorrt":
        ranges = _pooled(proto.graph, ranges)
    quantizer = QDQQuantizer(
        inferred,
        per_channel=True,
        weight_qType=QuantType.QInt8,
        tensors_range=_tensors_data(ranges),
        nodes_to_quantize=[*chosen, *sorted(followers)],
        nodes_to_exclude=[],
        **_copied(SCHEMES[scheme]),
    )
    quantizer.quantize_model()
    written: onnx.ModelProto = quantizer.model.model
    if scheme == "tensorrt":
        _free_other_readers(written.graph, chosen)
    else:
        part_biases(written.graph, _ranks(inferred.graph), chosen)
        part_relus(written.graph, chosen)
        join_silus(written.graph, known_shapes(inferred.graph))
    _sort_nodes(written.graph)
    _name_nodes(written.graph, owners)
    _clean(written, proto)
    return bytes(written.SerializeToString(deterministic=True))


def _layers(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """Return the nodes with weights; a MatMul's are a matrix."""
    ranks = {
        tensor.name: len(tensor.dims)
        for tensor in graph.initializer
        if tensor.data_type == onnx.TensorProto.FLOAT
    }
    return [
        node
        for node in graph.node
        if node.op_type in _LAYERS
        and node.input[1] in ranks
        and (node.op_type == "Conv" or ranks[node.input[1]] == 2)
    ]


def _followers(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """Return the activations whose input a convolution gives."""
    made = {node.output[0] for node in graph.node if node.op_type == "Conv"}
    return [n for n in graph.node if n.op_type in _ACTIVATIONS and n.input[0] in made]


def _chosen(graph: onnx.GraphProto, exclude: Collection[str]) -> list[str]:
    names = [node.name for node in _layers(graph)]
    unknown = sorted(set(exclude) - set(names))
    if unknown:
        nearest = difflib.get_close_matches(unknown[0], names, n=1, cutoff=0.4)
        raise BadInputError(
            "what is left in float is named as a layer of the graph is",
            found=f"'{unknown[0]}'",
            remedy=f"did you mean {nearest[0]}?" if nearest else "see the names in `layers_of`",
        )
    chosen = [name for name in names if name not in exclude]
    if not chosen:
        raise BadInputError(
            "a model in int8 has at least one layer in int8",
            found=f"{len(names)} layers with weights, of which all are left in float",
            remedy="export it in fp32 or fp16",
        )
    return chosen


def _pooled(
    graph: onnx.GraphProto, ranges: dict[str, tuple[float, float]]
) -> dict[str, tuple[float, float]]:
    """Give what a MaxPool makes the range of what it reads: ONNX Runtime pools integers then."""
    same = dict(ranges)
    for node in graph.node:
        if node.op_type == "MaxPool" and same.keys() >= {node.input[0], node.output[0]}:
            same[node.output[0]] = same[node.input[0]]
    return same


def _tensors_data(ranges: dict[str, tuple[float, float]]) -> Any:
    """Return ranges as the quantizer takes them; the method is a label only."""
    data = {
        name: TensorData(lowest=np.array(low, np.float32), highest=np.array(high, np.float32))
        for name, (low, high) in ranges.items()
    }
    return TensorsData(CalibrationMethod.MinMax, data)


def _copied(settings: dict[str, Any]) -> dict[str, Any]:
    """The quantizer may write into its options."""
    return settings | {"extra_options": dict(settings["extra_options"])}


def _owners(graph: onnx.GraphProto) -> dict[str, str]:
    """Return the module of each tensor: that which makes it, or else the first that reads it."""
    owners = {value.name: value.name for value in graph.input}
    for node in graph.node:
        module = node.name.rpartition("/")[0]
        for tensor in node.input:
            owners.setdefault(tensor, module)
        owners.update(dict.fromkeys(node.output, module))
    return owners


def _free_other_readers(graph: onnx.GraphProto, chosen: Collection[str]) -> None:
    """Let whatever is not in int8 read the tensors themselves.

    The quantizer hands Q/DQ to every reader of a tensor where one alone is quantized: a residual
    sum, or a layer that is left in float, would be fed what was rounded for its neighbour.
    """
    given = {
        node.output[0]: node.input[0] for node in graph.node if node.op_type == "QuantizeLinear"
    }
    original = {
        node.output[0]: given[node.input[0]]
        for node in graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in given
    }
    for node in graph.node:
        if node.name not in chosen:
            for i, name in enumerate(node.input):
                node.input[i] = original.get(name, name)


def _ranks(graph: onnx.GraphProto) -> dict[str, int]:
    """Return how many dimensions each tensor has whose size shape inference tells."""
    shapes = {
        value.name: value.type.tensor_type.shape.dim for value in (*graph.value_info, *graph.output)
    }
    return {
        name: len(dims)
        for name, dims in shapes.items()
        if all(dim.HasField("dim_value") for dim in dims)
    }


def _sort_nodes(graph: onnx.GraphProto) -> None:
    """Put the new nodes, which stand at the end, each before the first that reads it."""
    makers = {tensor: node for node in graph.node for tensor in node.output}
    ordered: dict[str, onnx.NodeProto] = {}
    waiting = list(reversed(graph.node))
    while waiting:
        node = waiting[-1]
        missing = [t for t in node.input if t in makers and makers[t].output[0] not in ordered]
        if missing:
            waiting += [makers[tensor] for tensor in reversed(missing)]
        else:
            ordered.setdefault(node.output[0], node)
            waiting.pop()
    nodes = list(ordered.values())
    graph.ClearField("node")
    graph.node.extend(nodes)


def _name_nodes(graph: onnx.GraphProto, owners: dict[str, str]) -> None:
    """Name the new nodes MODULE/OPERATOR, after the module whose tensor they quantize."""
    seen: Counter[str] = Counter()
    for node in graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            scale = node.input[1]
            tensor = scale.removesuffix("_scale").removesuffix("_quantized")
            name = f"{owners[tensor]}/{node.op_type}"
            seen[name] += 1
            node.name = name if seen[name] == 1 else f"{name}_{seen[name]}"


def _clean(written: onnx.ModelProto, original: onnx.ModelProto) -> None:
    """Leave of the quantizer's traces none: opsets that no node uses, its name, inferred shapes."""
    used = {tensor for node in written.graph.node for tensor in node.input}
    kept = [tensor for tensor in written.graph.initializer if tensor.name in used]
    written.graph.ClearField("value_info")
    written.graph.ClearField("initializer")
    written.graph.initializer.extend(kept)
    for field in ("metadata_props", "opset_import", "doc_string"):
        written.ClearField(field)
    written.opset_import.extend(original.opset_import)
    written.producer_name, written.producer_version = "edgereg", ""
