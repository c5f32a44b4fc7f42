"""How long one image takes, stage by stage, on this machine.

Each stage is timed on its own, raw samples are kept, the warm-up is not counted, a sample of the
outputs is checked, and the board is watched.
"""

import dataclasses
import math
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.board.state import BoardState
from deploy.bundle.read import Bundle
from deploy.errors import BadInputError
from deploy.measure.energy import Energy, measure_energy
from deploy.measure.monitor import Monitor, Validity, judge_states, watch_idle
from deploy.measure.pipeline import END_TO_END, STAGES, OutputCheck, Pipeline
from deploy.measure.statistics import Summary, summarize
from deploy.runtime.runner import Runner

__all__ = ["END_TO_END", "STAGES", "BenchResult", "bench", "cpu_model"]


@dataclass(frozen=True)
class BenchResult:
    """A timed run.

    Attributes:
        bundle: The bundle's name.
        backend: What ran it.
        precision: Which variant.
        threads: CPU threads that computed.
        cpu: The processor's name.
        batch: How many images went through at a time.
        warmup: Images before the timed ones.
        samples_ms: For each of STAGES that was run, and END_TO_END, every sample in order, in ms:
            one a batch.
        check: Whether the outputs were right.
        states: What the board said before, during and after it.
        validity: What that means for the figures.
        energy: Of an image; None where no power is measured.
    """

    bundle: str
    backend: str
    precision: str
    threads: int
    cpu: str
    batch: int
    warmup: int
    samples_ms: dict[str, tuple[float, ...]]
    check: OutputCheck
    states: tuple[BoardState, ...]
    validity: Validity
    energy: Energy | None

    @property
    def count(self) -> int:
        """How many batches were timed."""
        return len(self.samples_ms[END_TO_END])

    @property
    def not_timed(self) -> tuple[str, ...]:
        """Those of STAGES that were left out."""
        return tuple(stage for stage in STAGES if stage not in self.samples_ms)

    @property
    def images_per_second(self) -> float:
        """One batch after the other."""
        return 1e3 * self.count * self.batch / math.fsum(self.samples_ms[END_TO_END])

    def summaries_ms(self) -> dict[str, Summary]:
        """Statistics of each stage."""
        return {stage: summarize(samples) for stage, samples in self.samples_ms.items()}

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, the raw samples among them."""
        return {
            **{field.name: getattr(self, field.name) for field in dataclasses.fields(self)},
            "count": self.count,
            "images_per_second": self.images_per_second,
            "check": self.check.to_json(),
            "states": [dataclasses.asdict(state) for state in self.states],
            "validity": dataclasses.asdict(self.validity) | {"verdict": self.validity.verdict},
            "energy": None if self.energy is None else dataclasses.asdict(self.energy),
            "summaries_ms": {
                stage: dataclasses.asdict(summary) for stage, summary in self.summaries_ms().items()
            },
        }


def bench(
    bundle: Bundle,
    runner: Runner,
    *,
    duration_s: float = 60.0,
    count: int | None = None,
    warmup: int = 20,
    batch: int = 1,
    idle_s: float = 0.0,
    root: Path = Path("/"),
    on_progress: Callable[[str], None] | None = None,
) -> BenchResult:
    """Time the golden images, over and over.

    Args:
        bundle: The opened bundle.
        runner: One of its variants, loaded.
        duration_s: Stop when this has passed.
        count: Stop after so many images instead.
        warmup: So many images before, which are not counted.
        batch: How many images go through at a time.
        idle_s: Where power is measured, measure it for so long before, while nothing runs.
        root: The tree of files in which the board is watched.
        on_progress: Told how far it is, between two batches.

    Raises:
        BadInputError: Nothing would be timed, or the model does not take such a batch.
        CheckFailedError: An output is not finite.
    """
    if duration_s <= 0 or warmup < 0 or (count is not None and count < 1):
        raise BadInputError(
            "a run must time an image or more",
            found=f"duration {duration_s} s, count {count}, warm-up {warmup}",
            remedy="use positive numbers",
        )
    pipeline = Pipeline(bundle, runner, batch=batch)
    idle = watch_idle(root, duration_s=idle_s)
    for _ in range(math.ceil(warmup / batch)):
        pipeline.run()
    samples: list[tuple[float, ...]] = []
    with Monitor(root) as monitor:
        elapsed, started = 0.0, time.perf_counter()
        while not samples or (
            len(samples) * batch < count if count is not None else elapsed < duration_s
        ):
            samples.append(pipeline.timed())
            elapsed = time.perf_counter() - started
            if on_progress is not None:
                limit = f"{count} images" if count is not None else f"{duration_s:g} s"
                on_progress(f"{len(samples) * batch} images in {elapsed:.0f} s of {limit}")
    stages = dict(zip(pipeline.stages, zip(*samples, strict=True), strict=True))
    return BenchResult(
        bundle=bundle.path.name,
        backend=runner.name,
        precision=runner.precision,
        threads=runner.threads,
        cpu=cpu_model(),
        batch=batch,
        warmup=math.ceil(warmup / batch) * batch,
        samples_ms={**stages, END_TO_END: tuple(map(math.fsum, samples))},
        check=pipeline.check(),
        states=monitor.states,
        validity=judge_states(monitor.states),
        energy=measure_energy(idle, monitor.states, images=len(samples) * batch),
    )


def cpu_model(root: Path = Path("/")) -> str:
    """The processor's name from /proc/cpuinfo; its architecture where that has none, as on Arm."""
    try:
        lines = (root / "proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
