"""Give a scale and a shift to the layers before a value, or to all those behind it.

    Given   y = x * s + t    with x the result of, or y the input of, what is linear
    Result  y = x            with other weights before it, or behind

The way leads through whatever keeps the channels apart: pools, flattening, concatenation, sums. It
is walked to its end before anything is changed; where it ends at something else, nothing is, and
the reason is told.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from export.affine import Affine, as_affine
from export.channels import REARRANGEMENTS, backwards, forwards
from export.graph import (
    arguments,
    is_stored,
    is_view,
    mutated,
    operator,
    replace_input,
    shape,
    store,
    tensor,
)
from export.layers import is_layer, scale_inputs, scale_outputs, why_not_inputs, why_not_outputs
from export.pools import passage

__all__ = ["ObstacleError", "Plan", "into_consumers", "into_producers", "is_mutated"]

_UNSHIFTED = {"aten.relu", "aten.leaky_relu", "aten.prelu"}  # f(x * s) = f(x) * s for s > 0
_GATES = {"aten.mul", "aten.matmul", "aten.bmm"}  # linear in either argument


class ObstacleError(Exception):
    """Why a scale and shift cannot go that way; never leaves the passes."""


@dataclass
class Plan:
    """A way to its end.

    Args:
        edits: What remains to be done, in this order.
        moved: The nodes whose values change by it.
        layers: The nodes that take the scale and shift over.
    """

    edits: list[Callable[[], None]] = field(default_factory=list)
    moved: list[Node] = field(default_factory=list)
    layers: list[Node] = field(default_factory=list)

    def apply(self) -> None:
        """Change the graph."""
        for edit in self.edits:
            edit()

    def add(self, layer: Node, edit: Callable[[], None]) -> None:
        """Let a node take over."""
        self.layers.append(layer)
        self.edits.append(edit)


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


def is_mutated(value: Node) -> bool:
    """Say whether an operator changes a value, or a view of it, in place."""
    return any(
        value in mutated(user) or (is_view(user) and is_mutated(user)) for user in value.users
    )


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
        _check(affine, through.needs_positive, through.needs_no_shift, value)
        changed = Affine(through.dim, affine.scale, affine.shift)
        _before(module, _source(value), changed, plan)
    elif name in REARRANGEMENTS:
        source, unmoved = _unmoved(value, affine, plan)
        _before(module, source, unmoved, plan)
    elif name in _UNSHIFTED:
        _check(affine, True, f"it follows {value.name}, which takes no shift", value)
        _before(module, _source(value), affine, plan)
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
    parts: list[Node] = given["tensors"]
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
            _scale_stored(module, value, side, Affine(affine.dim, affine.scale, sign * shift), plan)
        elif shape(side) != shape(value):
            raise ObstacleError(f"{value.name} adds values of different shapes")
        else:
            _before(module, side, Affine(affine.dim, affine.scale, sign * shift), plan)
        shift = torch.zeros_like(shift)


def _before_scale(module: GraphModule, value: Node, affine: Affine, plan: Plan) -> None:
    """A scale behind a scale is one scale; a shift must go on, divided by it."""
    found = as_affine(module, value)
    assert found is not None
    source, inner = found
    given = arguments(value)
    constant = given["other"] if source is given["self"] else given["self"]
    if affine.is_scale and is_stored(constant):
        scale = affine.scale if operator(value) == "aten.mul" else 1 / affine.scale
        if not bool(scale.isfinite().all()):
            raise ObstacleError(f"{value.name} would divide by zero")
        change = Affine(affine.dim, scale, torch.zeros_like(scale))
        _scale_stored(module, value, constant, change, plan)
        plan.layers.append(value)
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
    if [argument for argument in user.all_input_nodes if argument is value] != [value]:
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
        _check(affine, through.needs_positive, through.needs_no_shift, user)
        changed = Affine(through.dim, affine.scale, affine.shift)
        _behind(module, user, changed, plan)
    elif name in REARRANGEMENTS and user.args[0] is value:
        result, moved = _moved(user, affine, plan)
        _behind(module, result, moved, plan)
    elif name in _UNSHIFTED and user.args[0] is value:
        _check(affine, True, f"{user.name} takes no shift", user)
        _behind(module, user, affine, plan)
    elif name == "aten.batch_norm":
        _behind_batchnorm(module, value, user, affine, plan)
    elif name in {"aten.add", "aten.sub"} and arguments(user).get("alpha", 1) == 1:
        _behind_sum(module, value, user, affine, plan)
    elif name in {"aten.mul", "aten.div"}:
        _behind_scale(module, user, affine, plan)
    else:
        raise ObstacleError(f"{name or user.name} behind it takes no scale and shift")


def _behind_batchnorm(
    module: GraphModule, value: Node, user: Node, affine: Affine, plan: Plan
) -> None:
    """A BatchNorm moves the statistics that it expects."""
    found = as_affine(module, user)
    if found is None or found[0] is not value or affine.dim not in (None, 1):
        raise ObstacleError(f"{user.name} takes no scale and shift")
    outer = found[1]
    combined = Affine(1, outer.scale * affine.scale, outer.scale * affine.shift + outer.shift)
    plan.add(user, lambda: set_batchnorm(module, user, combined))


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
    change = Affine(affine.dim, 1 / affine.scale, sign * affine.shift / affine.scale)
    _scale_stored(module, user, other, change, plan)
    _behind(module, user, Affine(affine.dim, affine.scale, torch.zeros_like(affine.shift)), plan)


def _behind_scale(module: GraphModule, user: Node, affine: Affine, plan: Plan) -> None:
    """A scale takes a scale over; a shift goes on, scaled."""
    found = as_affine(module, user)
    if found is None:
        raise ObstacleError(f"{user.name} multiplies it by a computed value")
    source, outer = found
    given = arguments(user)
    constant = given["other"] if source is given["self"] else given["self"]
    if affine.is_scale and is_stored(constant):
        scale = affine.scale if operator(user) == "aten.mul" else 1 / affine.scale
        if not bool(scale.isfinite().all()):
            raise ObstacleError(f"{user.name} would divide by zero")
        _scale_stored(
            module, user, constant, Affine(affine.dim, scale, torch.zeros_like(scale)), plan
        )
        plan.layers.append(user)
        return
    if outer.dim not in (None, affine.dim):
        raise ObstacleError(f"{user.name} scales another dimension")
    _behind(module, user, Affine(affine.dim, affine.scale, affine.shift * outer.scale), plan)


def set_batchnorm(module: GraphModule, batchnorm: Node, affine: Affine) -> None:
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


def _scale_stored(
    module: GraphModule, user: Node, stored: Node, affine: Affine, plan: Plan
) -> None:
    """Plan that `user` reads stored * scale + shift, along a dimension of the user's value."""
    ndim = len(shape(user))

    def edit() -> None:
        numbers = tensor(module, stored)
        scale, shift = affine.scale.to(numbers.dtype), affine.shift.to(numbers.dtype)
        if affine.dim is not None:
            ones = [1] * (ndim - affine.dim - 1)
            scale, shift = scale.view(-1, *ones), shift.view(-1, *ones)
        changed = store(
            module, str(stored.target), numbers * scale + shift, before=user, instead_of=stored
        )
        replace_input(user, stored, changed)

    plan.edits.append(edit)


def _source(node: Node) -> Node:
    source = node.args[0]
    assert isinstance(source, Node)
    return source


def _check(affine: Affine, positive: bool, no_shift: str, node: Node) -> None:
    if positive and bool((affine.scale <= 0).any()):
        raise ObstacleError(f"it scales by what is not positive, across {node.name}")
    if no_shift and not affine.is_scale:
        raise ObstacleError(no_shift)


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


def _unmoved(last: Node, affine: Affine, plan: Plan) -> tuple[Node, Affine]:
    """Return what goes into an operator that moves values about, and the affine there."""
    if affine.dim is None:
        return _source(last), affine
    chain = [last]
    while (unmoved := _read_back(chain, affine)) is None:
        before = _source(chain[0])
        if len(before.users) > 1 or operator(before) not in REARRANGEMENTS:
            raise ObstacleError(f"{last.name} mixes the channels with another dimension")
        plan.moved.append(before)
        chain.insert(0, before)
    return _source(chain[0]), unmoved


def _read_back(chain: list[Node], affine: Affine) -> Affine | None:
    """Return an affine of a chain's result as one of what goes in; None if there is no such."""
    assert affine.dim is not None
    found = backwards(chain, affine.dim)
    if found is None:
        return None
    dim, labels = found
    size = shape(_source(chain[0]))[dim]
    numbers = []
    for given, unread in ((affine.scale, 1.0), (affine.shift, 0.0)):
        known = torch.full((size,), unread, dtype=given.dtype)
        known[labels] = given
        if bool((known[labels] != given).any()):  # one value is read twice, with different numbers
            return None
        numbers.append(known)
    return Affine(dim, numbers[0], numbers[1])
