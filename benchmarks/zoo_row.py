"""Measure one architecture: a row of the table, whatever happens."""

import re
import time
import traceback
import warnings
from collections import Counter
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from architectures import Architecture, build, smallest_image
from onnx_check import check_onnx
from plants import plant
from randomize import images, randomize
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from deploy.errors import BadInputError, CheckFailedError
from export.passes.simplify import Simplified, simplify

__all__ = ["NOT_RUN", "STATUSES", "Job", "measure"]

STATUSES = (
    "simplified",
    "refused",  # with a reason: BadInputError
    "wrong",  # the proof failed: CheckFailedError
    "crashed",
    "vacuous",  # the random model's output says nothing about its input: nothing is proved
    "out of memory",
    "timed out",
)
NOT_RUN = ("out of memory", "timed out")
_DEPENDENCE = 1e-3  # float32 rounding is 1e-6 of an output
_NUDGE = 1e-6  # of the input, relatively
_TREMBLE = 1e-2  # of the outputs at most, for a nudge: an amplification of 1e4
# Of the random parameters. With some, a deep model's answer hardly depends on the image; with
# others it is chaos: rounding alone, at the first layer, is 1e-8 of the output even in float64.
_SEEDS = 5


@dataclass(frozen=True)
class Job:
    """What to measure.

    Args:
        architecture: Of a library.
        plant: Whether to plant a wrong fold, too.
        onnx: Whether to export, too.
        size: Of the images; None for the smallest.
        repeats: Of the simplification; its time is their median.
    """

    architecture: Architecture
    plant: bool = False
    onnx: bool = False
    size: int | None = None
    repeats: int = 1

    @property
    def key(self) -> str:
        """Return the row's name."""
        return str(self.architecture) + (f" at {self.size} px" if self.size else "")


def measure(job: Job) -> dict[str, Any]:
    """Return the architecture's row, on one core."""
    torch.set_num_threads(1)
    row: dict[str, Any] = {"name": job.key, "family": job.architecture.group}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch and timm say of their own code
            _fill(row, job)
    except MemoryError as error:
        row |= {"status": "out of memory", "reason": _first_line(error)}
    except Exception as error:
        status = "out of memory" if "can't allocate memory" in str(error) else "crashed"
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{place.filename.rpartition('/')[2]}:{place.lineno}"
        row |= {"status": status, "reason": f"{_first_line(error)} ({where})"}
    return row


def _fill(row: dict[str, Any], job: Job) -> None:
    size = job.size or smallest_image(job.architecture)
    row["size"] = size
    x = images(2, size, seed=1)
    for row["seed"] in range(_SEEDS):
        model = build(job.architecture, size)
        # Fewer than eight, and the statistics fit these images alone: on others, values explode.
        randomize(model, images(8, size, seed=0), seed=row["seed"])
        row |= _signal(model, x, images(2, size, seed=2))
        if row["dependence"] > _DEPENDENCE and row["tremble"] < _TREMBLE:
            break
    else:
        row |= {"status": "vacuous", "reason": "the output says nothing of the input, or all noise"}
        return
    seconds = []
    try:
        for _ in range(job.repeats):
            begun = time.perf_counter()
            result = simplify(model, (x,))
            seconds.append(time.perf_counter() - begun)
    except BadInputError as error:
        row |= {"status": "refused", "reason": error.found}
        return
    except CheckFailedError as error:
        row |= {"status": "wrong", "reason": error.found}
        return
    row |= {"status": "simplified", "seconds": median(seconds), **_facts(result)}
    if job.plant:
        row["plant"] = asdict(plant(model, (x,)))
    if job.onnx:
        row["onnx"] = asdict(check_onnx(model, result, size=size))


def _signal(model: nn.Module, x: Tensor, other: Tensor) -> dict[str, float]:
    """Return the largest output, and how far another input and a nudge move it, relatively."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    inputs = (x, other, x + _NUDGE * x.abs().max() * noise)
    with torch.no_grad():
        first, second, nudged = (tree_leaves(model(each))[0] for each in inputs)
    scale = float(first.abs().max())
    moved, trembled = (float((first - each).abs().max()) for each in (second, nudged))
    return {
        "scale": scale,
        "dependence": moved / scale if scale else 0.0,
        "tremble": trembled / scale if scale else 0.0,
    }


def _facts(result: Simplified) -> dict[str, Any]:
    """Return what the table shows of a report."""
    report = result.report
    return {
        "before": asdict(report.before),
        "after": asdict(report.after),
        "changed": {name: len(made.changed) for name, made in report.passes.items()},
        "left": dict(Counter(_class(reason) for reason in report.skipped.values())),
        "error": max(report.model_error, *report.site_errors.values(), 0.0),
        "trace_error": report.trace_error,
    }


def _class(reason: str) -> str:
    """Return a reason without the numbers of nodes: the same reason at many sites is one."""
    return re.sub(r"(?<=[a-z0-9])_\d+\b", "", reason)


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
