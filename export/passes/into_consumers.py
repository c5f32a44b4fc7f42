"""Let all layers that read a value take over its scale and shift.

    Given   y = x * s + t,  z = linear(y)
    Result  z = linear'(x)

The way leads through whatever keeps the channels apart, and every reader must take its part. It is
walked to its ends before anything is changed; where one ends at something else, nothing is, and
the reason is told. That no memory of x changes between x and its readers is the caller's to know.
"""

import torch
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from export.passes.absorb import MAX_SHIFT, ObstacleError, Plan, scaled_constant
from export.passes.affine import Affine, as_affine
from export.passes.into_producers import UNSHIFTED
from export.passes.pools import passage
from export.traced.channels import REARRANGEMENTS, forwards
from export.traced.graph import arguments, is_stored, operator, shape, store, tensor
from export.traced.layers import is_layer, scale_inputs, why_not_inputs

__all__ = ["into_consumers"]


def into_consumers(module: GraphModule, value: Node, affine: Affine) -> Plan:
    """Plan that all users of `value` do to x what they did to value = x * scale + shift.

    Args:
        module: The traced module.
        value: Is to go; its users will be given x.
        affine: Along a dimension of `value`.

    Raises:
        ObstacleError: It is not exact, or not possible.
    """
    plan = Plan()
    _behind(module, value, affine, plan)
    return plan


def _behind(module: GraphModule, value: Node, affine: Affine, plan: Plan) -> None:
    """Walk from a value to all that read it."""
    plan.moved.append(value)
    for user in value.users:
        if user in plan.moved or user in plan.layers:
            raise ObstacleError(f"{user.name} reads it twice")
        _behind_one(module, value, user, affine, plan)
    if not value.users:
        raise ObstacleError("nothing reads it")


def _behind_one(module: GraphModule, value: Node, user: Node, affine: Affine, plan: Plan) -> None:
    name = operator(user)
    if user.op == "output":
        raise ObstacleError("it is an output")
    if sum(argument is value for argument in tree_leaves((user.args, user.kwargs))) > 1:
        raise ObstacleError(f"{user.name} reads it twice")
    if is_layer(user):
        if arguments(user)["input"] is not value:
            raise ObstacleError(f"it is a weight of {user.name}")
        reason = why_not_inputs(module, user, affine.dim, shifts=not affine.is_scale)
        if reason:
            raise ObstacleError(reason)
        plan.add(user, lambda: scale_inputs(module, user, affine.scale, affine.shift))
        return
    through = passage(user, affine.dim, is_backwards=False)
    if through is not None:
        plan.check(affine, user, positive=through.needs_positive, no_shift=through.needs_no_shift)
        changed = Affine(through.dim, affine.scale, affine.shift)
        _behind(module, user, changed, plan)
    elif name in REARRANGEMENTS and user.args[0] is value:
        result, moved = _moved(user, affine, plan)
        _behind(module, result, moved, plan)
    elif name in UNSHIFTED and user.args[0] is value:
        plan.check(affine, user, positive=True, no_shift=f"{user.name} takes no shift")
        _behind(module, user, affine, plan)
    elif name == "aten.batch_norm":
        _behind_batchnorm(module, value, user, affine, plan)
    elif name in {"aten.add", "aten.sub"} and arguments(user).get("alpha", 1) == 1:
        _behind_sum(module, value, user, affine, plan)
    elif name in {"aten.mul", "aten.div"}:
        _behind_scale(module, user, affine, plan)
    else:
        raise ObstacleError(f"{name or user.name} behind it takes no scale and shift")


def _moved(first: Node, affine: Affine, plan: Plan) -> tuple[Node, Affine]:
    """Return the result of an operator that moves values about, and the affine there.

    Where one alone mixes channels with another dimension (they are cut in groups), the next ones
    may put them right again.
    """
    if affine.dim is None:
        return first, affine
    chain = [first]
    while True:
        found = forwards(chain, affine.dim)
        if found is not None:
            plan.moved.extend(chain[:-1])
            dim, labels = found
            return chain[-1], Affine(dim, affine.scale[labels], affine.shift[labels])
        (following, *others) = [*chain[-1].users, None]
        if others != [None] or operator(following) not in REARRANGEMENTS:
            raise ObstacleError(f"{first.name} mixes the channels with another dimension")
        assert following is not None
        chain.append(following)


def _behind_batchnorm(
    module: GraphModule, value: Node, user: Node, affine: Affine, plan: Plan
) -> None:
    """A BatchNorm moves the statistics that it expects."""
    found = as_affine(module, user)
    if found is None or found[0] is not value or affine.dim not in (None, 1):
        raise ObstacleError(f"{user.name} takes no scale and shift")
    outer = found[1]
    combined = Affine(1, outer.scale * affine.scale, outer.scale * affine.shift + outer.shift)
    plan.add(user, lambda: _set_batchnorm(module, user, combined))


def _set_batchnorm(module: GraphModule, batchnorm: Node, affine: Affine) -> None:
    """Make a BatchNorm at rest another scale and shift."""
    given = arguments(batchnorm)
    mean = tensor(module, given["running_mean"])
    prefix = str(given["running_mean"].target).rpartition(".")[0]
    numbers = {
        "weight": affine.scale.to(mean.dtype).expand_as(mean),
        "bias": affine.shift.to(mean.dtype).expand_as(mean),
        "running_mean": torch.zeros_like(mean),
        "running_var": torch.ones_like(mean),
    }
    stored = [
        store(module, f"{prefix}.{leaf}", number, before=batchnorm, instead_of=given[leaf])
        for leaf, number in numbers.items()
    ]
    batchnorm.args = (given["input"], *stored, False, given["momentum"], 0.0, False)
    batchnorm.kwargs = {}


def _behind_sum(module: GraphModule, value: Node, user: Node, affine: Affine, plan: Plan) -> None:
    """Where something stored is added, it is added first: x * s + t + c = (x + (t + c) / s) * s."""
    given = arguments(user)
    other = given["other"] if given["self"] is value else given["self"]
    if not is_stored(other):
        raise ObstacleError(f"{user.name} adds another value to it")
    if bool((affine.scale == 0).any()):
        raise ObstacleError("it scales by zero")
    if shape(user) != shape(value):
        raise ObstacleError(f"{user.name} widens it")
    sign = 1.0
    if operator(user) == "aten.sub":
        if given["self"] is not value:
            raise ObstacleError(f"{user.name} subtracts it")
        sign = -1.0
    largest = tensor(module, other).abs().max() + affine.shift.abs().max()
    if not float(largest / affine.scale.abs().min()) <= MAX_SHIFT:
        raise ObstacleError(f"what {user.name} adds would become larger than {MAX_SHIFT:g}")
    change = Affine(affine.dim, 1 / affine.scale, sign * affine.shift / affine.scale)
    plan.change_stored(module, user, other, change)
    if affine.is_shift:
        plan.layers.append(user)
        return
    _behind(module, user, Affine(affine.dim, affine.scale, torch.zeros_like(affine.shift)), plan)


def _behind_scale(module: GraphModule, user: Node, affine: Affine, plan: Plan) -> None:
    """A scale takes a scale over; a shift goes on, scaled."""
    found = scaled_constant(module, user)
    if found is None:
        raise ObstacleError(f"{user.name} multiplies it by a computed value")
    _, constant, outer = found
    if affine.is_scale and is_stored(constant):
        plan.scale_product(module, user, constant, affine)
        return
    if outer.dim not in (None, affine.dim):
        raise ObstacleError(f"{user.name} scales another dimension")
    _behind(module, user, Affine(affine.dim, affine.scale, affine.shift * outer.scale), plan)
