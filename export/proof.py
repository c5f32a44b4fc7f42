"""Prove in float64 that a simplified graph computes what the traced one did, site by site.

In float32 a wrong fold can hide: rounding alone moves a logit by 1e-6, and so does a forgotten eps
behind a large variance. In float64 a right fold errs by 1e-15.
"""

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor
from torch.fx import GraphModule

from deploy.errors import CheckFailedError
from export.float64 import node_values
from export.report import Change

__all__ = ["PROOF_LIMIT", "assert_below_limit", "largest_error", "relative_error", "site_errors"]

# A right fold rounds a few times per weight, 2e-16 each, and stays below 1e-13 over a hundred
# layers; one that forgets eps errs by eps / 2 = 5e-6 at unit variance.
PROOF_LIMIT = 1e-9


def relative_error(actual: Tensor, reference: Tensor) -> float:
    """Return max|actual - reference| / max|reference|; infinite if the shapes differ."""
    if actual.shape != reference.shape:
        return float("inf")
    error = float((actual - reference).abs().max())
    if error == 0:
        return 0.0
    scale = float(reference.abs().max())
    return error / scale if scale else float("inf")


def largest_error(actual: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    """Return the largest relative error over the outputs of two modules."""
    return max(relative_error(*pair) for pair in zip(actual, reference, strict=True))


def site_errors(
    simplified: GraphModule,
    traced: GraphModule,
    *,
    inputs: tuple[Tensor, ...],
    changes: Iterable[Change],
) -> dict[str, float]:
    """Return the relative error at each rewritten site, from one run of either graph."""
    pairs = _pairs(tuple(changes))
    before = node_values(traced, inputs, names={name for name, _ in pairs.values()})
    after = node_values(simplified, inputs, names={name for _, name in pairs.values()})
    return {site: relative_error(after[new], before[old]) for site, (old, new) in pairs.items()}


def _pairs(changes: tuple[Change, ...]) -> dict[str, tuple[str, str]]:
    """Return, by site, the nodes of the traced and of the simplified graph that must agree.

    A later pass may remove the node that a change left, or give it another value: the
    dropout in conv -> dropout -> BatchNorm left the convolution, which then took over the
    BatchNorm. The change is judged where it ended up.
    """
    pairs = {}
    for position, change in enumerate(changes):
        before, after = change.before, change.after
        for later in changes[position + 1 :]:
            if later.before == after:
                after = later.after
            elif later.after == after:
                before = later.before
        pairs[change.site] = before, after
    return pairs


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
