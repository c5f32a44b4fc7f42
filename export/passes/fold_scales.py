"""Fold what else scales and shifts: LayerScale, norms' affine parts, pixels' normalisation.

    Given   y = linear(x) * s                    LayerScale (Touvron et al., arXiv:2103.17239)
    Result  y = linear'(x)

    Given   y = linear(normalize(x) * s + t)     LayerNorm, GroupNorm, RMSNorm with an affine part
    Result  y = linear'(normalize(x))            if all that reads it is linear

    Given   y = conv((x - mean) / std)
    Result  y = conv'(x - mean)                  and no mean either where nothing is padded

Back-to-back scales become one. Each is exact; what stands in the way is told for those that act on
channels, and is nothing worth telling for a single factor (`x / 6`).
"""

from collections.abc import Set

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from export.passes.absorb import ObstacleError
from export.passes.affine import Affine, as_affine
from export.passes.into_consumers import into_consumers
from export.passes.into_producers import into_producers
from export.traced.aliases import changing
from export.traced.graph import arguments, is_stored, module_path, operator, replace, shape, tensor
from export.traced.report import Change, PassReport

__all__ = ["fold_scales"]

_NORMS = {
    "aten.layer_norm": -1,  # the dimension of the affine part
    "aten.rms_norm": -1,
    "aten.group_norm": 1,
}


def fold_scales(module: GraphModule) -> tuple[GraphModule, PassReport]:
    """Fold a traced module's scales and shifts, other than BatchNorms, in place."""
    changed, skipped, unstable = [], {}, changing(module)
    for node in list(module.graph.nodes):
        is_norm = operator(node) in _NORMS
        if operator(node) == "aten.batch_norm" or node in unstable:
            continue
        path = module_path(node)
        site = f"{path}.{node.name}".lstrip(".")
        try:
            change = (
                _fold_norm(module, node, site) if is_norm else _fold(module, node, site, unstable)
            )
        except ObstacleError as reason:
            skipped[site] = str(reason)
            continue
        if change is not None:
            changed.append(change)
    return module, PassReport(tuple(changed), skipped)


def _fold(module: GraphModule, node: Node, site: str, unstable: Set[Node]) -> Change | None:
    """Fold a product or sum; None where there is none, or nothing worth telling."""
    found = as_affine(module, node)
    if found is None:
        return None
    source, affine = found
    if source in unstable:
        raise ObstacleError("its memory is changed in place")
    if affine.is_scale and affine.is_shift:
        change = Change(site, "does nothing", node.name, source.name)
        replace(node, source)
        return change
    try:
        plan = into_producers(module, source, affine)
        change = plan.backwards(site, f"folded into {plan.names}", node, source)
    except ObstacleError as before:
        try:
            plan = into_consumers(module, node, affine)
        except ObstacleError as behind:
            if affine.dim is None:
                return None
            raise ObstacleError(f"{before}; forwards: {behind}") from behind
        change = plan.forwards(site, f"folded into {plan.names}")
    plan.apply()
    replace(node, source)
    return change


def _fold_norm(module: GraphModule, norm: Node, site: str) -> Change | None:
    """Fold a norm's affine part into all that reads it."""
    given = arguments(norm)
    parts = {name: given.get(name) for name in ("weight", "bias")}
    if all(part is None for part in parts.values()):
        return None
    if any(part is not None and not is_stored(part) for part in parts.values()):
        raise ObstacleError("its affine part is computed in the graph")
    if len(given.get("normalized_shape", [1])) > 1:
        raise ObstacleError("it normalises several dimensions")
    numbers = {name: tensor(module, part) for name, part in parts.items() if part is not None}
    length = next(iter(numbers.values())).numel()
    scale: Tensor = numbers.get("weight", torch.ones(length, dtype=torch.float64))
    shift: Tensor = numbers.get("bias", torch.zeros(length, dtype=torch.float64))
    dim = _NORMS[operator(norm)] % len(shape(norm))
    plan = into_consumers(module, norm, Affine(dim, scale.double(), shift.double()))
    plan.apply()
    names = [argument.name for argument in norm.target._schema.arguments]  # type: ignore[union-attr]
    norm.args = tuple(
        None if name in parts else argument
        for name, argument in zip(names, norm.args, strict=False)
    )
    norm.kwargs = {name: value for name, value in norm.kwargs.items() if name not in parts}
    return plan.forwards(site, f"affine part folded into {plan.names}")
