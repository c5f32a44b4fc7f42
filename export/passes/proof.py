"""Prove in float64 that a simplified graph computes what the traced one did, site by site.

In float32 a wrong fold can hide: rounding alone moves a logit by 1e-6, and so does a forgotten eps
behind a large variance. In float64 a right fold errs by 1e-15.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Set

import torch
from torch import Tensor
from torch.fx import GraphModule

from deploy.errors import CheckFailedError
from export.traced.float64 import evaluate
from export.traced.report import Change
from export.traced.trace import first_line

__all__ = [
    "PROOF_LIMIT",
    "assert_below_limit",
    "largest_error",
    "prove",
    "relative_error",
    "run_simplified",
]

# A right fold rounds a few times per weight, 2e-16 each, and stays below 1e-13 over a hundred
# layers; one that forgets eps errs by eps / 2 = 5e-6 at unit variance.
PROOF_LIMIT = 1e-9


def relative_error(actual: Tensor, reference: Tensor) -> float:
    """Return max|actual - reference| / max|reference|; infinite if the shapes differ.

    Equal infinities, of an attention mask, and NaN where NaN was differ by nothing; the scale is
    that of what is finite. One tensor has one scale: an error in a channel that is a billion times
    smaller than the largest is not seen.
    """
    if actual.shape != reference.shape:
        return math.inf
    if not (actual.is_floating_point() or actual.is_complex()):
        actual, reference = actual.double(), reference.double()
    if not actual.numel():
        return 0.0
    is_same = (actual == reference) | (actual.isnan() & reference.isnan())
    error = float(torch.where(is_same, 0.0, actual - reference).abs().max())
    if error == 0:
        return 0.0
    if math.isnan(error):
        return math.inf  # a maximum with NaN would depend on the order
    finite = reference[reference.isfinite()]
    scale = float(finite.abs().max()) if finite.numel() else 0.0
    return error / scale if scale else math.inf


def largest_error(actual: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    """Return the largest relative error over the outputs of two modules."""
    return max(relative_error(*pair) for pair in zip(actual, reference, strict=True))


def prove(
    simplified: GraphModule,
    traced: GraphModule,
    *,
    inputs: tuple[Tensor, ...],
    changes: Iterable[Change],
) -> tuple[list[Tensor], float, dict[str, float]]:
    """Run both graphs once and compare them.

    Returns:
        The traced graph's outputs, the relative error of the simplified ones', and the largest
        relative error at each rewritten site. A site of whose value no node is left is judged by
        the outputs.

    Raises:
        CheckFailedError: The simplified graph cannot be run.
    """
    promised = _promises(changes, {node.name for node in traced.graph.nodes})
    wanted = {pair[0] for pairs in promised.values() for pair in pairs}
    before: dict[str, Tensor] = {}

    def keep(name: str, value: Tensor) -> None:
        if name in wanted:
            before[name] = value.clone()  # an in-place operator may follow

    expected = evaluate(traced, inputs, on_value=keep)
    counterparts: dict[str, list[tuple[str, str]]] = {}
    for site, pairs in promised.items():
        for old, new in pairs:
            counterparts.setdefault(new, []).append((site, old))
    errors: dict[str, float] = {}

    def judge(name: str, value: Tensor) -> None:
        for site, old in counterparts.get(name, ()):
            errors[site] = max(errors.get(site, 0.0), relative_error(value, before[old]))

    outputs = run_simplified(simplified, inputs, on_value=judge)
    error = largest_error(outputs, expected)
    return expected, error, {site: errors.get(site, error) for site in promised}


def run_simplified(
    simplified: GraphModule,
    inputs: tuple[Tensor, ...],
    *,
    on_value: Callable[[str, Tensor], None] | None = None,
) -> list[Tensor]:
    """Evaluate a simplified graph in float64.

    Raises:
        CheckFailedError: It cannot be run, where the model could.
    """
    try:
        return evaluate(simplified, inputs, on_value=on_value)
    except Exception as error:  # whatever an operator raises
        raise CheckFailedError(
            "a simplified graph runs where the model does",
            found=f"{type(error).__name__}: {first_line(error)}",
            remedy="report it together with the model's code; nothing was exported",
        ) from error


def _promises(changes: Iterable[Change], traced: Set[str]) -> dict[str, list[tuple[str, str]]]:
    """Return, by site, the nodes of the traced and of the simplified graph that must agree.

    The changes are gone through in their order, keeping book of which traced value each node has.
    Where a later change takes a site's value away (a convolution that took over a BatchNorm also
    takes over the scale behind it), the site is judged by the value that came in its place; by
    none where no node has such a value, and only the outputs can tell.
    """
    origin: dict[str, str | None] = {name: name for name in traced}  # node -> traced value
    successor: dict[str, str | None] = {}  # traced value -> the one that took its place
    sites: dict[str, list[str | None]] = {}
    for change in changes:
        value = origin.get(change.before)
        if value is None and not change.site:
            continue
        for name in {change.before, change.after, *change.moved}:
            lost = origin.get(name)
            if lost is not None and lost != value:
                successor[lost] = value
            origin[name] = None
        origin[change.after] = value
        if value is not None:
            successor.pop(value, None)
        if change.site:
            kept = [value, *(origin.get(name) for name in change.also)]
            sites.setdefault(change.site, []).extend(kept)
    holders = {value: name for name, value in origin.items() if value is not None}
    where = {
        site: [_where(value, holders, successor) for value in values]
        for site, values in sites.items()
    }
    return {site: [pair for pair in pairs if pair] for site, pairs in where.items()}


def _where(
    value: str | None, holders: Mapping[str, str], successor: Mapping[str, str | None]
) -> tuple[str, str] | None:
    """Return a traced value, or the last that came in its place, and the node that has it now."""
    while value is not None and value in successor:
        value = successor[value]
    return None if value is None or value not in holders else (value, holders[value])


def assert_below_limit(errors: Mapping[str, float]) -> None:
    """Insist that every error, by the name of what was compared, is within PROOF_LIMIT.

    Raises:
        CheckFailedError: One is not, or is NaN; the first is named.
    """
    wrong = {name: error for name, error in errors.items() if not error <= PROOF_LIMIT}
    if wrong:
        name, error = next(iter(wrong.items()))
        more = f", and at {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise CheckFailedError(
            f"simplification moves no value by more than {PROOF_LIMIT:g}, relatively, in float64",
            found=f"{error:.3g} at {name}{more}",
            remedy="report it together with the model's code; nothing was exported",
        )
