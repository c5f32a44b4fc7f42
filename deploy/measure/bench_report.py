"""All that `edgereg bench` finds out, and whether it may be believed and is good enough."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.board.identity import board_model, l4t_version, power_mode
from deploy.measure.bench import END_TO_END, BenchResult
from deploy.measure.cold_start import ColdStart
from deploy.measure.repeated_input import RepeatedInput
from deploy.measure.statistics import minimum_samples

__all__ = ["BenchReport", "Platform", "read_platform"]


@dataclass(frozen=True)
class Platform:
    """What a figure is worth nothing without; None where the machine does not say.

    Attributes:
        board: Its name.
        l4t: NVIDIA's Linux on it.
        power_mode: nvpmodel's.
    """

    board: str | None
    l4t: str | None
    power_mode: str | None

    def __str__(self) -> str:
        if self.board is None and self.l4t is None:
            return "no Jetson"
        mode = f"power mode {self.power_mode or 'not told'}"
        return f"{self.board or 'a Jetson'}, L4T {self.l4t or 'not told'}, {mode}"


@dataclass(frozen=True)
class BenchReport:
    """The runs, one a batch size, and what was asked besides.

    Attributes:
        platform: Where.
        runs: In the order of the batch sizes that were asked for.
        repeated: Whether a cache was measured.
        cold_start: None if it was not asked for.
        peak_memory_bytes: Of this process, which kept every sample.
        max_p99_ms: The limit for END_TO_END of each run; None if there is none.
        min_throughput: In images/s, for each run.
    """

    platform: Platform
    runs: tuple[BenchResult, ...]
    repeated: RepeatedInput
    cold_start: ColdStart | None
    peak_memory_bytes: int | None
    max_p99_ms: float | None
    min_throughput: float | None

    @property
    def failures(self) -> tuple[str, ...]:
        """Why the figures may not be believed, or are not good enough; empty if all is well."""
        repeated = () if self.repeated.passed else (str(self.repeated),)
        return (*(reason for run in self.runs for reason in self._failures_of(run)), *repeated)

    def _failures_of(self, run: BenchResult) -> Iterator[str]:
        where = f"batch {run.batch}: "
        for reason in run.check.reasons:
            yield f"{where}outputs are wrong: {reason}"
        for reason in run.validity.reasons:
            yield f"{where}the run is invalid: {reason}"
        p99 = run.summaries_ms()[END_TO_END].percentiles["p99"]
        if self.max_p99_ms is not None and p99 is None:
            needed = minimum_samples(99)
            yield f"{where}p99 is not known from {run.count} samples; it takes {needed}"
        elif self.max_p99_ms is not None and p99 is not None and p99 > self.max_p99_ms:
            yield f"{where}p99 is {p99:.3f} ms; at most {self.max_p99_ms:g} ms are allowed"
        if self.min_throughput is not None and run.images_per_second < self.min_throughput:
            yield (
                f"{where}{run.images_per_second:.1f} images/s; "
                f"at least {self.min_throughput:g} are asked for"
            )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, raw samples among them."""
        return {
            "platform": dataclasses.asdict(self.platform),
            "runs": [run.to_json() for run in self.runs],
            "repeated_input": dataclasses.asdict(self.repeated.ratio)
            | {"passed": self.repeated.passed},
            "cold_start": None if self.cold_start is None else self.cold_start.to_json(),
            "peak_memory_bytes": self.peak_memory_bytes,
            "gates": {"max_p99_ms": self.max_p99_ms, "min_throughput": self.min_throughput},
            "failures": list(self.failures),
        }


def read_platform(root: Path = Path("/")) -> Platform:
    """Read the board's name, L4T and power mode."""
    mode = power_mode(root)
    return Platform(board_model(root), l4t_version(root), None if mode is None else str(mode))
