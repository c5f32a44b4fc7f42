"""Fold a BatchNorm into the layers before it, or into all those behind it.

    Given   y = conv(x; W, b),   z = (y - mean) / sqrt(var + eps) * gamma + beta
    Result  z = conv(x; W', b')  with s = gamma / sqrt(var + eps), t = beta - mean * s

Backwards it goes through whatever keeps the channels apart: pools, sums, concatenations. Where that
is not possible (the layer's output is wanted elsewhere, too), it goes forwards, if every reader is
a layer that takes it exactly. Before a convolution that pads with zeros the scale alone does, and
the shift, divided by it, stays as a sum.

Source: Ioffe and Szegedy, "Batch Normalization", arXiv:1502.03167, section 3.1, algorithm 2
(inference is a fixed affine map); Jacob et al., arXiv:1712.05877, section 3.2, equation 14 (that
map folded into the weights). The algebra of the weights stands in export/traced/layers.py.
"""

from collections.abc import Set

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from export.passes.absorb import MAX_SHIFT, ObstacleError
from export.passes.affine import Affine, batchnorm_affine, why_not_affine
from export.passes.into_consumers import into_consumers
from export.passes.into_producers import into_producers
from export.traced.aliases import changing
from export.traced.graph import arguments, insert, replace, shape, store
from export.traced.report import Change, PassReport
from export.traced.sites import is_batchnorm, site_names

__all__ = ["fold_batchnorm", "write_scale_and_shift"]


def fold_batchnorm(module: GraphModule) -> tuple[GraphModule, PassReport]:
    """Fold a traced module's BatchNorms, in place.

    One that cannot be folded exactly is skipped, with the reason.
    """
    changed, skipped, unstable = [], {}, changing(module)
    names = {node: name for node, name in site_names(module).items() if is_batchnorm(node)}
    for batchnorm, name in names.items():
        try:
            changed.append(_fold(module, batchnorm, name, unstable))
        except ObstacleError as reason:
            skipped[name] = str(reason)
    return module, PassReport(tuple(changed), skipped)


def write_scale_and_shift(module: GraphModule) -> tuple[GraphModule, PassReport]:
    """Write what could not be folded, a net's pre-activations, as one product and one sum.

    Given   z = batch_norm(y)
    Result  z = y * s + t
    """
    changed = []
    for batchnorm, name in site_names(module).items():
        if not is_batchnorm(batchnorm) or why_not_affine(batchnorm):
            continue
        affine, source = batchnorm_affine(module, batchnorm), arguments(batchnorm)["input"]
        prefix = str(arguments(batchnorm)["running_mean"].target).rpartition(".")[0]
        result = source
        if not affine.is_shift:
            result = _written(
                module, torch.ops.aten.mul.Tensor, result, batchnorm, f"{prefix}.scale", affine
            )
        if not affine.is_scale or result is source:
            result = _written(
                module, torch.ops.aten.add.Tensor, result, batchnorm, f"{prefix}.shift", affine
            )
        change = Change(name, "became one scale and shift", batchnorm.name, result.name)
        replace(batchnorm, result)
        changed.append(change)
    return module, PassReport(tuple(changed))


def _fold(module: GraphModule, batchnorm: Node, name: str, unstable: Set[Node]) -> Change:
    """Fold one, or raise ObstacleError with every way's reason."""
    reason = why_not_affine(batchnorm)
    if reason:
        raise ObstacleError(reason)
    source, affine = arguments(batchnorm)["input"], batchnorm_affine(module, batchnorm)
    try:
        plan = into_producers(module, source, affine)
    except ObstacleError as before:
        if not unstable.isdisjoint((source, batchnorm)):
            raise ObstacleError(f"{before}; forwards: its memory is changed in place") from before
        return _fold_forwards(module, batchnorm, name, affine, why_not_before=str(before))
    plan.apply()
    change = plan.backwards(name, f"folded into {plan.names}", batchnorm, source)
    replace(batchnorm, source)
    return change


def _fold_forwards(
    module: GraphModule, batchnorm: Node, name: str, affine: Affine, *, why_not_before: str
) -> Change:
    source = arguments(batchnorm)["input"]
    try:
        plan = into_consumers(module, batchnorm, affine)
        what, rest = f"folded forwards into {plan.names}", None
    except ObstacleError as behind:
        reason = f"{why_not_before}; forwards: {behind}"
        shift = affine.shift / affine.scale
        if not bool(shift.isfinite().all()) or float(shift.abs().max()) > MAX_SHIFT:
            raise ObstacleError(reason) from behind
        scale = Affine(affine.dim, affine.scale, torch.zeros_like(affine.shift))
        try:
            plan = into_consumers(module, batchnorm, scale)
        except ObstacleError:
            raise ObstacleError(reason) from behind
        what = f"scale folded forwards into {plan.names}, shift kept as a sum"
        rest = Affine(affine.dim, torch.ones_like(affine.scale), shift)
    plan.apply()
    change = plan.forwards(name, what)
    if rest is not None:
        prefix = str(arguments(batchnorm)["running_mean"].target).rpartition(".")[0]
        source = _written(
            module, torch.ops.aten.add.Tensor, source, batchnorm, f"{prefix}.shift", rest
        )
    replace(batchnorm, source)
    return change


def _written(
    module: GraphModule,
    target: torch._ops.OpOverload,
    source: Node,
    batchnorm: Node,
    name: str,
    affine: Affine,
) -> Node:
    """Insert a product or sum with a BatchNorm's scale or shift."""
    numbers: Tensor = affine.shift if target is torch.ops.aten.add.Tensor else affine.scale
    numbers = numbers.view(-1, *[1] * (len(shape(source)) - 2))
    stored = store(module, name, numbers, before=batchnorm)
    return insert(target, source, stored, before=batchnorm)
