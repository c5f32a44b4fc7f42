"""Simplify a model: trace it, strip and fold, and prove in float64 that nothing changed.

The passes run on a float64 copy of the graph; their result is compared with the traced graph in
float64, and rounded to the model's own precision once, at the end. The model handed in is never
changed.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from deploy.errors import BadInputError
from export.dead_code import remove_dead_code
from export.float64 import evaluate
from export.fold_batchnorm import fold_batchnorm
from export.proof import assert_below_limit, largest_error, site_errors
from export.report import PassReport, SimplifyReport
from export.sites import count
from export.strip_dropout import strip_dropout
from export.trace import floating_dtype, frozen_copy, trace

__all__ = ["SIMPLIFY_PASSES", "Pass", "Simplified", "simplify"]


class Pass(Protocol):
    """A function that rewrites a traced module, possibly in place, and says what it did."""

    __name__: str

    def __call__(self, module: GraphModule, /) -> tuple[GraphModule, PassReport]:
        """Return the module and the report; `simplify` recompiles the module."""


# Dropout between a convolution and its BatchNorm is gone before the fold looks for the pair.
SIMPLIFY_PASSES: tuple[Pass, ...] = (strip_dropout, fold_batchnorm, remove_dead_code)

_RANDOM = 4  # samples, beside the examples, on which the proof runs


@dataclass(frozen=True)
class Simplified:
    """A simplified module, in evaluation mode, and what was done to it."""

    model: GraphModule
    report: SimplifyReport


def simplify(
    model: nn.Module,
    example_inputs: tuple[Tensor, ...],
    *,
    passes: tuple[Pass, ...] = SIMPLIFY_PASSES,
) -> Simplified:
    """Simplify a copy of a model, as it computes in evaluation mode.

    Args:
        model: Takes the inputs as positional arguments; its outputs are tensors.
        example_inputs: Batches of one size. The proof runs on them and on random ones like them.
        passes: What to apply, in this order.

    Raises:
        BadInputError: The model cannot be copied, traced or run in float64, or is not finite.
        CheckFailedError: The simplified graph does not compute what the model does.
    """
    frozen = frozen_copy(model)
    dtype = floating_dtype(frozen)
    traced = trace(frozen, tuple(x.cpu() for x in example_inputs))

    simplified = copy.deepcopy(traced).double()
    reports = {}
    for apply in passes:
        simplified, reports[apply.__name__] = apply(simplified)
        # Not left to the pass: a stale module would run, and be proved, as it was before.
        simplified.recompile()

    many = _proof_inputs(example_inputs)
    batches = (many, tuple(x[-1:] for x in many))
    expected = _model_outputs(frozen.double(), batches)
    as_traced = _outputs(traced.double(), batches)
    changes = [change for report in reports.values() for change in report.changed]
    report = SimplifyReport(
        passes=reports,
        site_errors=site_errors(simplified, traced, inputs=many, changes=changes),
        model_error=largest_error(_outputs(simplified, batches), as_traced),
        trace_error=largest_error(as_traced, expected),
        batch_sizes=tuple(len(batch[0]) for batch in batches),
        before=count(traced),
        after=count(simplified),
    )
    assert_below_limit(
        {
            "the traced outputs, against the model's": report.trace_error,
            **report.site_errors,
            "the simplified outputs": report.model_error,
        }
    )
    return Simplified(simplified.to(dtype), report)


def _outputs(module: nn.Module, batches: Iterable[tuple[Tensor, ...]]) -> list[Tensor]:
    return [output for batch in batches for output in evaluate(module, batch)]


def _model_outputs(model: nn.Module, batches: Iterable[tuple[Tensor, ...]]) -> list[Tensor]:
    """Return the outputs of the model itself, refusing what no comparison could judge."""
    try:
        outputs = _outputs(model, batches)
    except RuntimeError as error:
        raise BadInputError(
            "a model can be run in float64 and for a batch of one, for the proof",
            found=str(error).splitlines()[0],
            remedy="replace operators that only know float32",
        ) from error
    if not all(output.isfinite().all() for output in outputs):
        raise BadInputError(
            "a model answers with finite numbers",
            found="NaN or infinity, on the example inputs or on random ones like them, in float64",
            remedy="look for a negative running variance, a division by zero, a logarithm of zero",
        )
    return outputs


def _proof_inputs(example_inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return the examples, and behind them seeded random samples of like mean and spread."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for x in (x.detach().cpu() for x in example_inputs):
        if x.is_floating_point():
            examples = x.double()
            noise = torch.randn(_RANDOM, *x.shape[1:], generator=generator, dtype=torch.float64)
            spread, mean = torch.std_mean(examples, correction=0)
            batches.append(torch.cat([examples, noise * spread.clamp(min=1e-3) + mean]))
        else:  # token ids and the like: values of our own could be out of range
            batches.append(torch.cat([x, x[torch.arange(_RANDOM) % len(x)]]))
    return tuple(batches)
