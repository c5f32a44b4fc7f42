"""Which of two is faster? They run in turns, so that what the machine does besides strikes both.

On a shared machine one latency is noise, but the ratio of two that were taken at the same time is
not. In every second alternation the other one begins, for what runs second may run on a warmer
cache or a hotter chip.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.bundle.read import Bundle
from deploy.errors import BadInputError
from deploy.measure.monitor import Monitor, Validity, judge_states
from deploy.measure.pipeline import END_TO_END, OutputCheck, Pipeline
from deploy.measure.statistics import Ratio, median_ratio
from deploy.runtime.runner import Runner

__all__ = ["LEAST_ALTERNATIONS", "Contender", "Interleaved", "compare_speed"]

LEAST_ALTERNATIONS = 20
_BLOCK = 5  # images of one before the other's turn: the first finds the other's data in the cache


@dataclass(frozen=True)
class Contender:
    """One of the two.

    Attributes:
        bundle: Its name.
        backend: What ran it.
        precision: Which variant.
        blocks_ms: Its median end-to-end time of an image, alternation by alternation.
        check: Whether the outputs were right.
    """

    bundle: str
    backend: str
    precision: str
    blocks_ms: tuple[float, ...]
    check: OutputCheck

    @property
    def median_ms(self) -> float:
        """Of an image, end to end."""
        return statistics.median(self.blocks_ms)


@dataclass(frozen=True)
class Interleaved:
    """Two bundles, precisions or backends, timed in turns.

    Attributes:
        first: The one that is asked about.
        second: The one that it is compared with.
        ratios: The first's time over the second's, for "infer" and END_TO_END; below 1, the first
            is faster.
        validity: Whether the board kept its pace.
    """

    first: Contender
    second: Contender
    ratios: dict[str, Ratio]
    validity: Validity

    @property
    def alternations(self) -> int:
        """How often each had its turn."""
        return len(self.first.blocks_ms)

    @property
    def failures(self) -> tuple[str, ...]:
        """Why this is no result; empty if it is one."""
        wrong = (
            f"the outputs of {who.bundle} {who.precision} are wrong: {'; '.join(who.check.reasons)}"
            for who in (self.first, self.second)
            if not who.check.passed
        )
        return (*wrong, *(f"the run is invalid: {reason}" for reason in self.validity.reasons))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        both = {
            name: dataclasses.asdict(who) | {"check": who.check.to_json()}
            for name, who in (("first", self.first), ("second", self.second))
        }
        return {
            **both,
            "alternations": self.alternations,
            "ratios": {stage: dataclasses.asdict(ratio) for stage, ratio in self.ratios.items()},
            "validity": dataclasses.asdict(self.validity) | {"verdict": self.validity.verdict},
            "failures": list(self.failures),
        }


def compare_speed(
    first: tuple[Bundle, Runner],
    second: tuple[Bundle, Runner],
    *,
    duration_s: float = 60.0,
    alternations: int | None = None,
    warmup: int = 20,
    root: Path = Path("/"),
    on_progress: Callable[[str], None] | None = None,
) -> Interleaved:
    """Time two runners in turns, each on its own bundle's golden images.

    Args:
        first: A bundle and its runner.
        second: Another; the bundle or the runner may be the same.
        duration_s: Stop when this has passed, and LEAST_ALTERNATIONS are done.
        alternations: Stop after so many instead.
        warmup: So many images of each before, which are not counted.
        root: The tree of files in which the board is watched.
        on_progress: Told how far it is.

    Raises:
        BadInputError: Fewer than LEAST_ALTERNATIONS are asked for.
        CheckFailedError: An output is not finite.
    """
    if duration_s <= 0 or warmup < 0 or (alternations or LEAST_ALTERNATIONS) < LEAST_ALTERNATIONS:
        raise BadInputError(
            f"two are compared in {LEAST_ALTERNATIONS} alternations or more",
            found=f"{alternations} alternations, {duration_s} s, warm-up {warmup}",
            remedy="ask for more, or leave it out",
        )
    pipelines = Pipeline(*first), Pipeline(*second)
    for pipeline in pipelines:
        for _ in range(warmup):
            pipeline.run()
    blocks: tuple[list[tuple[float, float]], list[tuple[float, float]]] = ([], [])
    with Monitor(root) as monitor:
        started, done = time.perf_counter(), 0
        while done < (alternations or LEAST_ALTERNATIONS) or (
            alternations is None and time.perf_counter() - started < duration_s
        ):
            for turn in (0, 1) if done % 2 == 0 else (1, 0):
                blocks[turn].append(_block(pipelines[turn]))
            done += 1
            if on_progress is not None:
                on_progress(f"{done} alternations in {time.perf_counter() - started:.0f} s")
    infer, whole = (tuple([b[figure] for b in taken] for taken in blocks) for figure in (0, 1))
    return Interleaved(
        first=_contender(pipelines[0], whole[0]),
        second=_contender(pipelines[1], whole[1]),
        ratios={
            "infer": median_ratio(list(zip(*infer, strict=True))),
            END_TO_END: median_ratio(list(zip(*whole, strict=True))),
        },
        validity=judge_states(monitor.states),
    )


def _block(pipeline: Pipeline) -> tuple[float, float]:
    """The median ms of an image, in the model and end to end."""
    samples = [pipeline.timed() for _ in range(_BLOCK)]
    place = pipeline.stages.index("infer")
    infer = statistics.median(stages[place] for stages in samples)
    return infer, statistics.median(map(sum, samples))


def _contender(pipeline: Pipeline, blocks_ms: list[float]) -> Contender:
    runner = pipeline.runner
    return Contender(
        bundle=pipeline.bundle.path.name,
        backend=runner.name,
        precision=runner.precision,
        blocks_ms=tuple(blocks_ms),
        check=pipeline.check(),
    )
