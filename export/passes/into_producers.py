"""Let the layers before a value take over a scale and a shift of it.

    Given   y = linear(x) * s + t
    Result  y = linear'(x)

The way leads through whatever keeps the channels apart: pools, flattening, concatenation, sums. It
is walked to its end before anything is changed; where it ends at something else, nothing is, and
the reason is told.
"""

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from export.passes.absorb import ObstacleError, Plan, first_argument, scaled_constant
from export.passes.affine import Affine, as_affine
from export.passes.pools import passage
from export.traced.channels import REARRANGEMENTS, backwards
from export.traced.graph import arguments, is_stored, operator, shape
from export.traced.layers import is_layer, scale_outputs, why_not_outputs

__all__ = ["UNSHIFTED", "into_producers"]

UNSHIFTED = {"aten.relu", "aten.leaky_relu", "aten.prelu"}  # f(x * s) = f(x) * s for s > 0
_GATES = {"aten.mul", "aten.matmul", "aten.bmm"}  # linear in either argument


def into_producers(module: GraphModule, value: Node, affine: Affine) -> Plan:
    """Plan that `value` becomes value * scale + shift.

    Args:
        module: The traced module.
        value: Has one user, which is to go.
        affine: Along a dimension of `value`.

    Raises:
        ObstacleError: It is not exact, or not possible.
    """
    plan = Plan()
    _before(module, value, affine, plan)
    return plan


def _before(module: GraphModule, value: Node, affine: Affine, plan: Plan) -> None:
    """Walk from a value to what makes it."""
    if not isinstance(value, Node) or value.op != "call_function":
        raise ObstacleError("it follows the input, not a convolution or linear layer")
    if len(value.users) > 1:
        raise ObstacleError(f"the output of {value.name} has {len(value.users)} consumers")
    if value in plan.moved:
        raise ObstacleError(f"{value.name} is added to itself")
    plan.moved.append(value)
    name, dim = operator(value), affine.dim
    if is_layer(value):
        reason = why_not_outputs(module, value, dim)
        if reason:
            raise ObstacleError(reason)
        plan.add(value, lambda: scale_outputs(module, value, affine.scale, affine.shift))
        return
    through = passage(value, dim, is_backwards=True)
    if through is not None:
        plan.check(affine, value, positive=through.needs_positive, no_shift=through.needs_no_shift)
        changed = Affine(through.dim, affine.scale, affine.shift)
        _before(module, first_argument(value), changed, plan)
    elif name in REARRANGEMENTS:
        source, unmoved = _unmoved(value, affine, plan)
        _before(module, source, unmoved, plan)
    elif name in UNSHIFTED:
        no_shift = f"it follows {value.name}, which takes no shift"
        plan.check(affine, value, positive=True, no_shift=no_shift)
        _before(module, first_argument(value), affine, plan)
    elif name == "aten.cat":
        _before_cat(module, value, affine, plan)
    elif name in {"aten.add", "aten.sub"} and arguments(value).get("alpha", 1) == 1:
        _before_sum(module, value, affine, plan)
    elif name in {"aten.mul", "aten.div"} and as_affine(module, value) is not None:
        _before_scale(module, value, affine, plan)
    elif name in _GATES:
        _before_gate(module, value, affine, plan)
    else:
        follows = name or value.name
        raise ObstacleError(f"it follows {follows}, not a convolution or linear layer")


def _before_cat(module: GraphModule, value: Node, affine: Affine, plan: Plan) -> None:
    """Each part takes its channels' share."""
    given = arguments(value)
    # torch lets an empty part of any rank into a concatenation.
    parts: list[Node] = [part for part in given["tensors"] if shape(part) != (0,)]
    if affine.dim is None or affine.dim != given["dim"] % len(shape(value)):
        for part in parts:
            _before(module, part, affine, plan)
        return
    start = 0
    for part in parts:
        end = start + shape(part)[affine.dim]
        share = Affine(affine.dim, affine.scale[start:end], affine.shift[start:end])
        _before(module, part, share, plan)
        start = end


def _before_sum(module: GraphModule, value: Node, affine: Affine, plan: Plan) -> None:
    """Both sides take the scale, and one the shift: a stored one if there is one."""
    given = arguments(value)
    sides = [given["self"], given["other"]]
    if not all(isinstance(side, Node) for side in sides):
        raise ObstacleError(f"it follows {operator(value)} of a number")
    is_difference = operator(value) == "aten.sub"
    shift: Tensor = affine.shift
    for index, side in sorted(enumerate(sides), key=lambda pair: not is_stored(pair[1])):
        sign = -1 if is_difference and index == 1 else 1
        if is_stored(side):
            plan.change_stored(module, value, side, Affine(affine.dim, affine.scale, sign * shift))
        elif shape(side) != shape(value):
            raise ObstacleError(f"{value.name} adds values of different shapes")
        else:
            _before(module, side, Affine(affine.dim, affine.scale, sign * shift), plan)
        shift = torch.zeros_like(shift)


def _before_scale(module: GraphModule, value: Node, affine: Affine, plan: Plan) -> None:
    """A scale behind a scale is one scale; a shift must go on, divided by it."""
    found = scaled_constant(module, value)
    assert found is not None
    source, constant, inner = found
    if affine.is_scale and is_stored(constant):
        plan.scale_product(module, value, constant, affine)
        return
    if inner.dim not in (None, affine.dim) or bool((inner.scale == 0).any()):
        raise ObstacleError(f"{value.name} scales another dimension, or by zero")
    _before(module, source, Affine(affine.dim, affine.scale, affine.shift / inner.scale), plan)


def _before_gate(module: GraphModule, value: Node, affine: Affine, plan: Plan) -> None:
    """A product takes a scale on either side."""
    if not affine.is_scale:
        raise ObstacleError(f"{value.name} multiplies two computed values, which takes no shift")
    if operator(value) != "aten.mul" and affine.dim is not None:
        raise ObstacleError(f"{value.name} mixes the channels")
    if value.args[0] is value.args[1]:
        raise ObstacleError(f"{value.name} multiplies a value by itself")
    reasons = []
    first = len(plan.moved), len(plan.edits), len(plan.layers)
    for side in value.args[:2]:
        try:
            if (
                not isinstance(side, Node)
                or is_stored(side)
                or len(shape(side)) != len(shape(value))
            ):
                raise ObstacleError(f"{value.name} multiplies by a constant of another shape")
            if affine.dim is not None and shape(side)[affine.dim] != shape(value)[affine.dim]:
                raise ObstacleError(f"{value.name} multiplies values of different shapes")
            _before(module, side, affine, plan)
            return
        except ObstacleError as obstacle:
            reasons.append(str(obstacle))
            del plan.moved[first[0] :], plan.edits[first[1] :], plan.layers[first[2] :]
    raise ObstacleError(reasons[0])


def _unmoved(last: Node, affine: Affine, plan: Plan) -> tuple[Node, Affine]:
    """Return what goes into an operator that moves values about, and the affine there."""
    if affine.dim is None:
        return first_argument(last), affine
    chain = [last]
    while (unmoved := _read_back(chain, affine)) is None:
        before = first_argument(chain[0])
        if len(before.users) > 1 or operator(before) not in REARRANGEMENTS:
            raise ObstacleError(f"{last.name} mixes the channels with another dimension")
        plan.moved.append(before)
        chain.insert(0, before)
    return first_argument(chain[0]), unmoved


def _read_back(chain: list[Node], affine: Affine) -> Affine | None:
    """Return an affine of a chain's result as one of what goes in; None if there is no such."""
    assert affine.dim is not None
    found = backwards(chain, affine.dim)
    if found is None:
        return None
    dim, labels = found
    size = shape(first_argument(chain[0]))[dim]
    numbers = []
    for given, unread in ((affine.scale, 1.0), (affine.shift, 0.0)):
        known = torch.full((size,), unread, dtype=given.dtype)
        known[labels] = given
        if bool((known[labels] != given).any()):  # one value is read twice, with different numbers
            return None
        numbers.append(known)
    return Affine(dim, numbers[0], numbers[1])
