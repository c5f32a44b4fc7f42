"""Simplify a model: trace it, strip and fold, and prove in float64 that nothing changed.

The passes run on a float64 copy of the graph; their result is compared with the traced graph in
float64, and rounded to the model's own precision once, at the end. The model handed in is never
changed.
"""

import copy
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

from deploy.errors import BadInputError, CheckFailedError
from export.passes.class_token import pad_class_token
from export.passes.fold_attention_scale import fold_attention_scale
from export.passes.fold_batchnorm import fold_batchnorm, write_scale_and_shift
from export.passes.fold_constants import fold_constants
from export.passes.fold_scales import fold_scales
from export.passes.functional import make_functional
from export.passes.pack_attention import pack_attention
from export.passes.plain_attention import plain_attention
from export.passes.plain_shapes import plain_shapes
from export.passes.proof import (
    PROOF_LIMIT,
    assert_below_limit,
    largest_error,
    prove,
    run_simplified,
)
from export.passes.reparameterize import reparameterize
from export.passes.skip_unread import skip_unread
from export.passes.strip_dropout import strip_dropout
from export.traced.dead_code import remove_dead_code
from export.traced.float64 import evaluate
from export.traced.graph import is_stored, tensor
from export.traced.randomness import assert_deterministic
from export.traced.report import Change, PassReport, SimplifyReport
from export.traced.sites import count
from export.traced.trace import first_line, floating_dtype, frozen_copy, trace

__all__ = ["FINISHING_PASSES", "SIMPLIFY_PASSES", "Pass", "Simplified", "simplify"]


class Pass(Protocol):
    """A function that rewrites a traced module, possibly in place, and says what it did."""

    __name__: str

    def __call__(self, module: GraphModule, /) -> tuple[GraphModule, PassReport]:
        """Return the module and the report; `simplify` recompiles the module."""


# In the order in which one makes room for the next: dropout between a convolution and its BatchNorm
# is gone before the fold looks for the pair. What comes later may do so for an earlier one, too.
SIMPLIFY_PASSES: tuple[Pass, ...] = (
    strip_dropout,
    make_functional,
    fold_constants,
    fold_batchnorm,
    reparameterize,
    fold_scales,
    plain_attention,
    fold_attention_scale,
    pack_attention,
    plain_shapes,
    skip_unread,
    pad_class_token,
    remove_dead_code,
)
# Once, when nothing is left to fold.
FINISHING_PASSES: tuple[Pass, ...] = (write_scale_and_shift, remove_dead_code)

_ROUNDS = 20  # of the passes; a model of our zoo takes up to five


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
    finishing: tuple[Pass, ...] = FINISHING_PASSES,
) -> Simplified:
    """Simplify a copy of a model, as it computes in evaluation mode.

    Args:
        model: Takes the inputs as positional arguments; its outputs are tensors.
        example_inputs: Batches of one size. The proof runs on the first two samples; where there is
            only one, or where they are equal, on a random one like it beside it.
        passes: What to apply, in this order, until none finds anything.
        finishing: What to apply once after that.

    Raises:
        BadInputError: The model cannot be copied, traced or run in float64, or is not finite.
        CheckFailedError: The simplified graph does not compute what the model does, in float64 or,
            rounded to the model's precision, at all.
    """
    frozen = frozen_copy(model)
    dtype = floating_dtype(frozen)
    traced = trace(frozen, tuple(x.cpu() for x in example_inputs))

    simplified = copy.deepcopy(traced).double()
    simplified, reports, changes = _apply(simplified, passes, finishing)
    assert_deterministic(simplified)

    inputs = _proof_inputs(example_inputs)
    first, last = (tuple(x[i : i + 1] for x in inputs) for i in (0, 1))
    expected = _model_outputs(frozen.double(), first)
    as_traced, error, site_errors = prove(
        simplified, traced.double(), inputs=inputs, changes=changes
    )
    # Each also alone: a batch size that crept into the graph shows.
    trace_error = largest_error(_rows(as_traced, 0), expected)
    if not trace_error <= PROOF_LIMIT:  # unless the model mixes the images of a batch
        trace_error = largest_error(as_traced, _model_outputs(frozen, inputs))
    alone = run_simplified(simplified, last)
    alone_error = largest_error(alone, _rows(as_traced, 1))
    if not alone_error <= PROOF_LIMIT:
        alone_error = largest_error(alone, evaluate(traced, last))
    report = SimplifyReport(
        passes=reports,
        site_errors=site_errors,
        model_error=max(error, alone_error),
        trace_error=trace_error,
        batch_sizes=(len(inputs[0]), 1),
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
    _round(simplified, dtype)
    _check_rounded(simplified, inputs, dtype)
    return Simplified(simplified, report)


def _apply(
    module: GraphModule, passes: tuple[Pass, ...], finishing: tuple[Pass, ...]
) -> tuple[GraphModule, dict[str, PassReport], list[Change]]:
    """Apply the passes in turn, again and again, until none finds anything to change.

    What one pass did can be what another waited for: two merged convolutions are one that a
    BatchNorm folds into.

    Returns:
        The module, each pass' report over all rounds, and all changes in their order.
    """
    reports = {apply.__name__: PassReport() for apply in (*passes, *finishing)}
    changes: list[Change] = []

    def run(apply: Pass) -> None:
        nonlocal module
        module, report = apply(module)
        done = reports[apply.__name__].changed + report.changed
        reports[apply.__name__] = PassReport(done, report.skipped)
        changes.extend(report.promises)

    for _ in range(_ROUNDS):
        before = len(changes)
        for apply in passes:
            run(apply)
        if len(changes) == before:
            break
    else:
        raise RuntimeError(f"the passes still find something after {_ROUNDS} rounds: {changes[-1]}")
    for apply in finishing:
        run(apply)
    # Not left to the passes: a stale module would run, and be proved, as it was before.
    module.recompile()
    return module, reports, changes


def _round(module: GraphModule, dtype: torch.dtype) -> None:
    """Round what is stored to the type that it was traced with.

    That is the model's own, but for what its code computed in float32 beside half-precision weights
    and what was computed once of that.
    """
    for node in module.graph.nodes:
        if node.op != "get_attr":
            continue
        if not is_stored(node):  # a nested graph
            module.get_submodule(str(node.target)).to(dtype)
            continue
        value = tensor(module, node)
        if value.is_floating_point():
            value.data = value.data.to(node.meta["val"].dtype)


def _check_rounded(module: GraphModule, inputs: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    """Insist that the module runs as it will be used, and answers with finite numbers.

    The proof's float64 holds a 1e-40, or its inverse, where float32 does not.
    """
    rounded = (x[:1].to(dtype) if x.is_floating_point() else x[:1] for x in inputs)
    found = ""
    try:
        with torch.no_grad():
            outputs = [leaf for leaf in tree_leaves(module(*rounded)) if isinstance(leaf, Tensor)]
        if not all(bool(output.isfinite().all()) for output in outputs):
            found = "NaN or infinity"
    except Exception as error:  # whatever an operator raises
        found = f"{type(error).__name__}: {first_line(error)}"
    if found:
        raise CheckFailedError(
            f"a simplified model runs in {dtype} and answers with finite numbers",
            found=found,
            remedy="look for weights that are almost zero or huge; else report it with the model's "
            "code",
        )


def _rows(outputs: list[Tensor], index: int) -> list[Tensor]:
    """Return what a batch's outputs say of one image."""
    return [output[index : index + 1] if output.ndim else output for output in outputs]


def _model_outputs(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Return the outputs of the model itself, refusing what no comparison could judge."""
    try:
        outputs = evaluate(model, inputs)
    except Exception as error:  # whatever an operator raises
        raise BadInputError(
            "a model can be run in float64 and for a batch of one, for the proof",
            found=f"{type(error).__name__}: {first_line(error)}",
            remedy="replace operators that only know float32, and those that need several images",
        ) from error
    if not all(output.isfinite().all() for output in outputs):
        raise BadInputError(
            "a model answers with finite numbers",
            found="NaN or infinity, on an example input or on a random one like it, in float64",
            remedy="look for a negative running variance, a division by zero, a logarithm of zero",
        )
    return outputs


def _proof_inputs(example_inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return two different samples: the first two, or the first and a random one like it.

    Samples of the model's own data are the better ones: on white noise a deep model can be chaotic
    and blow rounding up until it looks like a fault.
    """
    examples = tuple(x[:2].detach().cpu() for x in example_inputs)
    if any(len(x) == 2 and not torch.equal(x[0], x[1]) for x in examples):
        return tuple(x.double() if x.is_floating_point() else x for x in examples)
    generator = torch.Generator().manual_seed(0)
    batches = []
    for x in (x[:1] for x in examples):
        if x.is_floating_point():
            example = x.double()
            noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
            spread, mean = torch.std_mean(example, correction=0)
            batches.append(torch.cat([example, noise * spread.clamp(min=1e-3) + mean]))
        else:  # token ids and the like: values of our own could be out of range
            batches.append(torch.cat([x, x]))
    return tuple(batches)
