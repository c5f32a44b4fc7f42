"""How long one image takes, stage by stage, on this machine.

One image at a time, each stage timed on its own, raw samples kept. Warm-up is not counted. One of
every hundred outputs of the timed run is compared with the golden ones: a fast wrong answer is no
result.
"""

import dataclasses
import math
import platform
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploy.bundle.index import read_index
from deploy.bundle.read import Bundle
from deploy.errors import BadInputError
from deploy.measure.compare import Comparison, compare
from deploy.measure.statistics import Summary, summarize
from deploy.measure.verify import end_to_end_tolerance, golden_images
from deploy.runtime.decode import decode
from deploy.runtime.postprocess import top_k
from deploy.runtime.preprocess import preprocess
from deploy.runtime.runner import Runner

__all__ = ["END_TO_END", "STAGES", "BenchResult", "bench", "cpu_model"]

STAGES = ("decode", "preprocess", "infer", "postprocess")
END_TO_END = "end to end"
_CHECKED_SHARE = 0.01


@dataclass(frozen=True)
class BenchResult:
    """A timed run.

    Attributes:
        bundle: The bundle's name.
        backend: What ran it.
        precision: Which variant.
        threads: CPU threads that computed.
        cpu: The processor's name.
        warmup: Images before the timed ones.
        samples_ms: For each of STAGES and END_TO_END, every sample in order, in ms.
        check: The sampled outputs against the golden ones.
    """

    bundle: str
    backend: str
    precision: str
    threads: int
    cpu: str
    warmup: int
    samples_ms: dict[str, tuple[float, ...]]
    check: Comparison

    @property
    def count(self) -> int:
        """How many images were timed."""
        return len(self.samples_ms[END_TO_END])

    @property
    def images_per_second(self) -> float:
        """One after the other."""
        return 1e3 * self.count / math.fsum(self.samples_ms[END_TO_END])

    def summaries_ms(self) -> dict[str, Summary]:
        """Statistics of each stage."""
        return {stage: summarize(samples) for stage, samples in self.samples_ms.items()}

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, the raw samples among them."""
        return {
            **{field.name: getattr(self, field.name) for field in dataclasses.fields(self)},
            "batch": 1,
            "count": self.count,
            "images_per_second": self.images_per_second,
            "check": self.check.to_json(),
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
    on_progress: Callable[[str], None] | None = None,
) -> BenchResult:
    """Time the golden images, over and over, one at a time.

    Args:
        bundle: The opened bundle.
        runner: One of its variants, loaded.
        duration_s: Stop when this has passed.
        count: Stop after so many images instead.
        warmup: So many images before, which are not counted.
        on_progress: Told how far it is, between two images.

    Raises:
        BadInputError: Nothing would be timed.
        CheckFailedError: An output is not finite.
    """
    if duration_s <= 0 or warmup < 0 or (count is not None and count < 1):
        raise BadInputError(
            "a run must time an image or more",
            found=f"duration {duration_s} s, count {count}, warm-up {warmup}",
            remedy="use positive numbers",
        )
    encoded, reference = golden_images(bundle), bundle.array(bundle.manifest.golden.outputs)
    index = read_index(bundle)

    def answer(output: NDArray[np.float32]) -> None:
        if index is None:
            top_k(output, bundle.labels, k=5)
        else:
            index.nearest(output, k=5)

    for i in range(warmup):
        _time_image(bundle, runner, encoded[i % len(encoded)], answer)
    samples: dict[str, list[float]] = {stage: [] for stage in (*STAGES, END_TO_END)}
    checked, outputs = [], []
    draw = random.Random(0)  # which outputs are kept; a fixed stride could always meet one image
    done, elapsed, started = 0, 0.0, time.perf_counter()
    while done == 0 or (done < count if count is not None else elapsed < duration_s):
        i = done % len(encoded)
        times, output = _time_image(bundle, runner, encoded[i], answer)
        for stage, start, end in zip(STAGES, times[:-1], times[1:], strict=True):
            samples[stage].append((end - start) / 1e6)
        samples[END_TO_END].append((times[-1] - times[0]) / 1e6)
        if done == 0 or draw.random() < _CHECKED_SHARE:
            checked.append(i)
            outputs.append(output.copy())
        done, elapsed = done + 1, time.perf_counter() - started
        if on_progress is not None:
            limit = f"{count} images" if count is not None else f"{duration_s:g} s"
            on_progress(f"{done} images in {elapsed:.0f} s of {limit}")
    allowed = bundle.manifest.variants[runner.precision].tolerance
    return BenchResult(
        bundle=bundle.path.name,
        backend=runner.name,
        precision=runner.precision,
        threads=runner.threads,
        cpu=cpu_model(),
        warmup=warmup,
        samples_ms={stage: tuple(times) for stage, times in samples.items()},
        check=compare(
            np.concatenate(outputs),
            reference[checked],
            end_to_end_tolerance(allowed, encoded),
            index=None if index is None else index.embeddings,
        ),
    )


def _time_image(
    bundle: Bundle, runner: Runner, data: bytes, answer: Callable[[NDArray[np.float32]], None]
) -> tuple[list[int], NDArray[np.float32]]:
    """The times in ns before, between and after STAGES, and the model's output."""
    times = [time.perf_counter_ns()]
    image = decode(data, name="a golden image")
    times.append(time.perf_counter_ns())
    batch = preprocess([image], bundle.manifest.preprocessing)
    times.append(time.perf_counter_ns())
    output = runner(batch)
    times.append(time.perf_counter_ns())
    answer(output[0])
    times.append(time.perf_counter_ns())
    return times, output


def cpu_model(root: Path = Path("/")) -> str:
    """The processor's name from /proc/cpuinfo; its architecture where that has none, as on Arm."""
    try:
        lines = (root / "proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
