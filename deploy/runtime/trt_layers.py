"""Which type each layer is to compute in, and which type it was built in.

What is wanted is read from the parsed network: types start at inputs, constants, casts and scales
and flow from a layer's first floating input, constants last, to its outputs. Only a strongly typed
network is sure to say them itself. What was built is read from the engine's layer information, in
which a layer carries the names of all that was fused into it.

A fused layer whose parts want one type must show this type in a tensor or in its weights; one that
holds a cast or parts of several types proves nothing and is not judged.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deploy.errors import CheckFailedError

__all__ = ["BuiltLayer", "BuiltTypes", "constrain", "judge_types", "read_layers", "wanted_types"]

_FLOATS = {"FLOAT": "fp32", "HALF": "fp16"}  # of DataType
_SHOWN = (  # in the layer information; the first that matches
    (re.compile(r"bf16|bfloat", re.IGNORECASE), "bf16"),
    (re.compile(r"half|fp16", re.IGNORECASE), "fp16"),
    (re.compile(r"fp8", re.IGNORECASE), "fp8"),
    (re.compile(r"float|fp32", re.IGNORECASE), "fp32"),
    (re.compile(r"\bint8", re.IGNORECASE), "int8"),
)
_PART = re.compile(r"\[ONNX Layer: (.*?)\]")
_SEPARATOR = re.compile(r" \+ |, |\(|\)|\{|\}|\.\.\.")
_STATES_ITS_TYPE = ("CONSTANT", "CAST", "QUANTIZE", "DEQUANTIZE")
_WEIGHTED = ("CONVOLUTION", "DECONVOLUTION", "MATRIX_MULTIPLY")


@dataclass(frozen=True)
class BuiltLayer:
    """A layer of an engine.

    Attributes:
        name: As the engine has it.
        parts: The names of the network's layers that it may hold.
        types: Those of its inputs, outputs and weights, of "fp32", "fp16", "bf16", "int8", "fp8".
    """

    name: str
    parts: frozenset[str]
    types: frozenset[str]


@dataclass(frozen=True)
class BuiltTypes:
    """The types that an engine was built in.

    Attributes:
        layers: How many layers show each type; one that shows two counts twice.
        problems: Why this is not the precision that was asked for; empty if it is.
        notes: Layers that could have been int8 and are not, which is the builder's right.
    """

    layers: dict[str, int]
    problems: tuple[str, ...]
    notes: tuple[str, ...]


def wanted_types(trt: Any, network: Any) -> dict[str, str]:
    """Return the type of each layer of a parsed network by its name: what the ONNX file says.

    Returns:
        "fp32" or "fp16" for layers that compute; "int8" for products of dequantized numbers; "own"
        for constants, casts and Q/DQ, which say themselves what they are; no entry for what handles
        integers or truth values.
    """
    own = {getattr(trt.LayerType, name) for name in _STATES_ITS_TYPE}
    weighted = {getattr(trt.LayerType, name) for name in _WEIGHTED}
    names = {getattr(trt.DataType, name): kind for name, kind in _FLOATS.items()}
    constants: set[str] = set()
    types, dequantized, wanted = {}, set(), {}
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        types[tensor.name] = names.get(tensor.dtype)
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        inputs = [layer.get_input(j) for j in range(layer.num_inputs)]
        read = [tensor.name for tensor in inputs if tensor is not None]
        outputs = [layer.get_output(j) for j in range(layer.num_outputs)]
        if layer.type == trt.LayerType.CAST:
            cast = layer
            cast.__class__ = trt.ICastLayer  # the bindings hand out the base class
            kind = names.get(cast.to_type)
        elif layer.type == trt.LayerType.DEQUANTIZE:
            kind = types.get(read[1])  # the scale's
            dequantized |= {tensor.name for tensor in outputs}
        else:
            # A constant's own type may be in doubt, and is that of what it is combined with.
            ordered = sorted(read, key=constants.__contains__)
            kind = next((types[name] for name in ordered if types.get(name)), None)
        for tensor in outputs:
            reported = names.get(tensor.dtype)
            is_source = layer.type == trt.LayerType.CONSTANT or kind is None
            types[tensor.name] = reported if is_source or reported is None else kind
        if layer.type == trt.LayerType.CONSTANT:
            constants |= {tensor.name for tensor in outputs}
        if layer.type in own:
            wanted[layer.name] = "own"
        elif layer.type in weighted and read[0] in dequantized:
            wanted[layer.name] = "int8"
        elif kinds := {types[tensor.name] for tensor in outputs} - {None}:
            wanted[layer.name] = str(kinds.pop())
    return wanted


def constrain(trt: Any, network: Any, wanted: Mapping[str, str]) -> None:
    """Fix the type of each floating layer, for a builder that would choose it by speed."""
    kinds = {kind: getattr(trt.DataType, name) for name, kind in _FLOATS.items()}
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        kind = kinds.get(wanted.get(layer.name, ""))
        if kind is not None and hasattr(layer, "precision") and hasattr(layer, "set_output_type"):
            layer.precision = kind
            for j in range(layer.num_outputs):
                tensor = layer.get_output(j)
                if tensor.dtype in kinds.values():
                    layer.set_output_type(j, kind)


def read_layers(information: str) -> tuple[BuiltLayer, ...]:
    """Read an engine's layer information, as the inspector gives it in JSON.

    Raises:
        CheckFailedError: It is in another form, or holds no more than names.
    """
    try:
        entries = json.loads(information)["Layers"]
        return tuple(_read_layer(entry) for entry in entries)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckFailedError(
            "an engine's layer information lists its layers with their types",
            found=f"{type(error).__name__}: {error}; {information[:80]!r}",
            remedy="report it with TensorRT's version",
        ) from error


def _read_layer(entry: Mapping[str, Any]) -> BuiltLayer:
    tensors = [*entry.get("Inputs", ()), *entry.get("Outputs", ())]
    shown = [str(tensor["Format/Datatype"]) for tensor in tensors]
    weights = entry.get("Weights")
    shown += [str(weights["Type"])] if isinstance(weights, dict) and "Type" in weights else []
    kinds = (next((kind for form, kind in _SHOWN if form.search(text)), None) for text in shown)
    named = {part.strip() for part in _SEPARATOR.split(entry["Name"])}
    metadata = {name.strip() for name in _PART.findall(str(entry.get("Metadata", "")))}
    return BuiltLayer(
        entry["Name"],
        frozenset((named | metadata) - {""}),
        frozenset(kind for kind in kinds if kind is not None),
    )


def judge_types(
    precision: str,
    wanted: Mapping[str, str],
    layers: Sequence[BuiltLayer],
    *,
    is_constrained: bool = True,
) -> BuiltTypes:
    """Compare what was built with what was asked for.

    Args:
        precision: The variant: "fp32", "fp16" or "int8".
        wanted: From `wanted_types`.
        layers: Of the engine.
        is_constrained: Whether each floating layer must have the type that it wants; not so on a
            DLA, which has no fp32.
    """
    counts = Counter(kind for built in layers for kind in built.types)
    allowed = {"fp32": {"fp32"}, "fp16": {"fp32", "fp16"}, "int8": {"fp32", "int8"}}[precision]
    allowed |= set() if is_constrained else {"fp16"}
    problems, notes = [], []
    if not counts[precision]:
        problems.append(f"no layer of {len(layers)} shows {precision}")
    for built in layers:
        if strange := built.types - allowed:
            problems.append(f"'{built.name}' computes in {' and '.join(sorted(strange))}")
        kinds = {wanted[part] for part in built.parts if part in wanted}
        if len(kinds) != 1 or not built.types or kinds & built.types or kinds == {"own"}:
            continue
        kind, shown = kinds.pop(), " and ".join(sorted(built.types))
        if kind == "int8":
            notes.append(f"'{built.name}' could be int8 and is {shown}")
        elif is_constrained and not strange:
            problems.append(f"'{built.name}' is to be {kind} and is {shown}")
    return BuiltTypes(dict(sorted(counts.items())), tuple(problems), tuple(notes))
