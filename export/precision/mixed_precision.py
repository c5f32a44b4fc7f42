"""Choose which nodes of a graph compute in fp16, by what they do with real images.

    fp16 has 11 bits, ends at 65,504 and loses what is smaller than 6e-8

1. A node stays fp32 if what it reads, makes or sums comes near the end of fp16 on the images that
   were given. Other images reach further than these: "near" is a quarter of the range.
2. If an answer, emulated, is still not finite, something became zero in fp16 that is divided by:
   the node where this shows and what it reads stay, and a step further if that is not enough.
3. If the answers are still too far from fp32's, whole kinds of operators (softmax,
   normalisation, ...) are tried in fp32, and the one that helps most stays, then the next. Of a
   kind that helps, the fewest nodes stay that help almost as much.

To be quick, 3 looks at the few images where the error is largest. What helps them may be chance: on
any other roundings they fare better. So what was found stays only if it helps on all images.

Each island is in the report, with the error with and without it. The trials are counted, so that a
large model ends too: when they are used up, some islands may be more than it takes.

Sources: Micikevicius et al., "Mixed precision training", arXiv:1710.03740; NVIDIA's advice to keep
normalisation in fp32 (TensorRT's developer guide, "Reduced precision").
"""

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray
from onnx import TensorProto

from export.onnx_file.tensors import element_types, module_of
from export.precision.emulate_fp16 import locate_nonfinite
from export.precision.fp16_range import out_of_range
from export.precision.fp16_trials import Trials, fewest, refuse_nonfinite

__all__ = ["Island", "MixedPrecision", "to_fp16"]

_LIMIT = 5e-3  # scaled error: ten roundings of fp16, 2^-11 each, all in one direction
_HELPS = 0.8  # an island must bring the error down to this share
_ALMOST = 1.1  # of the error with a whole kind in fp32, that fewer nodes may have
_STEPS = 8  # upstream from where numbers stop to be finite: further, it is no island any more
_ONE_BY_ONE = 8  # islands that are tried without, each
# They move numbers and round none: fp32 is no gain.
_MOVES = {"Concat", "DepthToSpace", "Expand", "Flatten", "Gather", "Identity", "Reshape", "Slice"}
_MOVES |= {"SpaceToDepth", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze", "MaxPool", "Relu"}


@dataclass(frozen=True)
class Island:
    """A node that stays fp32.

    Attributes:
        node: Its name.
        module: The module that it belongs to.
        operator: Its ONNX operator.
        reason: Why.
        error_with: Scaled error of the answers, emulated, on the few images where it is largest,
            with this island (and all others).
        error_without: With this node, or with all that stay for the same reason, in fp16 instead;
            infinite if the answers are then not finite.
    """

    node: str
    module: str
    operator: str
    reason: str
    error_with: float
    error_without: float

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; an infinite error is None."""
        return {
            "node": self.node,
            "module": self.module,
            "operator": self.operator,
            "reason": self.reason,
            "error_with": _finite(self.error_with),
            "error_without": _finite(self.error_without),
        }


@dataclass(frozen=True)
class MixedPrecision:
    """A graph of fp16 and fp32 nodes.

    Attributes:
        model: The ONNX file; input and output are fp32.
        islands: The nodes that stay fp32 though they could compute in fp16.
        fp16_nodes: How many compute in fp16.
        fp32_nodes: How many nodes on floating-point numbers do not, casts apart.
        scaled_error: Of the answers on all images, emulated, to those of the fp32 graph.
    """

    model: bytes
    islands: tuple[Island, ...]
    fp16_nodes: int
    fp32_nodes: int
    scaled_error: float

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values, without the model."""
        return {
            "method": "fp16 emulated: outputs of fp16 nodes rounded; a GPU's sums not reproduced",
            "islands": [island.to_json() for island in self.islands],
            "fp16_nodes": self.fp16_nodes,
            "fp32_nodes": self.fp32_nodes,
            "scaled_error": self.scaled_error,
        }


def to_fp16(model: bytes, inputs: NDArray[Any], *, limit: float = _LIMIT) -> MixedPrecision:
    """Write a graph in fp16, but for the nodes that real images show to need fp32.

    Args:
        model: An fp32 ONNX file; its nodes are called MODULE/OPERATOR.
        inputs: (N, ...) real images, as the graph takes them: pre-processed, or pixels.
        limit: The scaled error of the answers above which precision is bought with fp32 nodes.

    Raises:
        BadInputError: The fp32 graph's answers are all the same number.
        CheckFailedError: Answers are not finite, in fp32 or whatever stays fp32; the node is named.
    """
    trials = Trials(model, inputs)
    islands = out_of_range(trials.proto, inputs, among=trials.candidates)
    islands = _keep_finite(trials, islands)
    images = trials.worst_images(frozenset(islands))
    islands = _buy_precision(trials, islands, images, limit=limit)
    chosen = frozenset(islands)
    nodes = {node.name: node for node in trials.proto.graph.node}
    types = element_types(trials.proto)
    floats = sum(types.get(node.output[0]) == TensorProto.FLOAT for node in nodes.values())
    half = len(trials.candidates) - len(chosen)
    return MixedPrecision(
        model=trials.write(chosen),
        islands=tuple(
            Island(
                node=name,
                module=module_of(nodes[name]),
                operator=nodes[name].op_type,
                reason=islands[name],
                error_with=trials.error(chosen, images),
                error_without=without,
            )
            for name, without in _errors_without(trials, islands, images).items()
        ),
        fp16_nodes=half,
        fp32_nodes=floats - half,
        scaled_error=trials.error(chosen),
    )


def _keep_finite(trials: Trials, islands: dict[str, str]) -> dict[str, str]:
    """Keep in fp32 what makes an answer not finite, and from there upstream as far as it takes."""
    reasons: dict[str, str] = {}
    must, guilty = frozenset(islands), ""
    for _ in range(_STEPS):
        chosen = frozenset({*must, *reasons})
        if math.isfinite(trials.error(chosen)):
            break
        guilty = locate_nonfinite(trials.write(chosen), trials.inputs) or ""
        new = _upstream(trials, guilty, chosen) - chosen
        if not new:
            refuse_nonfinite(guilty, "fp16")
        reasons |= dict.fromkeys(new, f"not finite: '{guilty}' would be infinite or no number")
    if not math.isfinite(trials.error(frozenset({*must, *reasons}))):
        refuse_nonfinite(guilty, "fp16")
    few = fewest(
        trials.in_order(reasons),
        lambda some: not trials.are_spent and math.isfinite(trials.error(must | some)),
    )
    return islands | {name: reasons[name] for name in few}


def _upstream(trials: Trials, name: str, chosen: Collection[str]) -> frozenset[str]:
    """Return a node and what it reads; of what is fp32 already, what that reads instead."""
    nodes = {node.name: node for node in trials.proto.graph.node}
    makers = {output: node.name for node in nodes.values() for output in node.output}
    found: set[str] = set()
    front = {name} & nodes.keys()
    while front:
        found |= front
        expanded = [n for n in front if n == name or n in chosen]
        read = {makers[each] for n in expanded for each in nodes[n].input if each in makers}
        front = read - found
    return frozenset(found & {*trials.candidates})


def _buy_precision(
    trials: Trials, islands: dict[str, str], images: list[int], *, limit: float
) -> dict[str, str]:
    """Keep kinds of operators in fp32, the most helpful first, until the error is small."""
    before = trials.error(frozenset(islands))
    if before <= limit:
        return islands
    more = dict(islands)
    while trials.error(chosen := frozenset(more), images) > limit and not trials.are_spent:
        found = _most_helpful(trials, chosen, images)
        if found is None:
            break
        kind, nodes = found
        enough = max(limit, _ALMOST * trials.error(chosen | nodes, images))
        few = fewest(
            trials.in_order(nodes),
            lambda some: (
                not trials.are_spent and trials.error(chosen | some, images) <= enough  # noqa: B023
            ),
        )
        more |= dict.fromkeys(few, f"precision: {kind} in fp32")
    return more if trials.error(frozenset(more)) <= _HELPS * before else islands


def _most_helpful(
    trials: Trials, chosen: frozenset[str], images: list[int]
) -> tuple[str, frozenset[str]] | None:
    """Return the kind of operators, and its nodes, whose fp32 helps most; None if none helps.

    A difference of two exact numbers is no use if it is rounded before. So where no operator helps
    by itself, each is tried together with what reads it.
    """
    free = [n for n in trials.proto.graph.node if n.name in {*trials.candidates} - chosen]
    readers: dict[str, set[str]] = {}
    for node in free:
        for name in node.input:
            readers.setdefault(name, set()).add(node.name)
    alone: dict[str, frozenset[str]] = {}
    read: dict[str, frozenset[str]] = {}
    for operator in sorted({node.op_type for node in free} - _MOVES):
        members = [node for node in free if node.op_type == operator]
        reading = (readers.get(name, set()) for node in members for name in node.output)
        alone[operator] = frozenset(node.name for node in members)
        read[f"{operator} and what reads it"] = alone[operator].union(*reading)
    for kinds in (alone, read):
        errors = {kind: trials.error(chosen | nodes, images) for kind, nodes in kinds.items()}
        best = min(errors, key=errors.__getitem__, default=None)
        if best is not None and errors[best] <= _HELPS * trials.error(chosen, images):
            return best, kinds[best]
    return None


def _errors_without(trials: Trials, islands: dict[str, str], images: list[int]) -> dict[str, float]:
    """Return the error without each island: one by one if they are few, else by their reasons."""
    chosen, kinds = frozenset(islands), {n: why.partition(":")[0] for n, why in islands.items()}

    def together(name: str) -> frozenset[str]:
        if len(chosen) <= _ONE_BY_ONE:
            return frozenset({name})
        return frozenset(other for other in chosen if kinds[other] == kinds[name])

    return {name: trials.error(chosen - together(name), images) for name in trials.in_order(chosen)}


def _finite(error: float) -> float | None:
    return error if math.isfinite(error) else None
