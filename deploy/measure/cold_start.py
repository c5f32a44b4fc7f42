"""From the start of a process to its first answer: what a device waits for after a restart."""

import dataclasses
import re
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from deploy.board.files import read_text
from deploy.bundle.read import open_bundle
from deploy.children import ask_child
from deploy.errors import CheckFailedError
from deploy.measure.pipeline import Pipeline
from deploy.runtime.runner import Backend, open_runner

__all__ = ["ColdStart", "measure_cold_start", "peak_memory_bytes"]

_STEPS = ("python", "bundle", "model", "answer")


@dataclass(frozen=True)
class ColdStart:
    """One start, in s.

    Attributes:
        total_s: From the start of the process to the first answer.
        steps_s: Of it: Python and its imports, checking the bundle's bytes, loading the model, the
            first image.
        peak_memory_bytes: The most that the process had in memory by then. Memory that only the GPU
            uses is not in it.
    """

    total_s: float
    steps_s: dict[str, float]
    peak_memory_bytes: int | None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        steps = ", ".join(f"{name} {seconds:.2f}" for name, seconds in self.steps_s.items())
        memory = self.peak_memory_bytes
        most = "" if memory is None else f"; at most {memory / 2**20:.0f} MiB of memory"
        return f"first answer after {self.total_s:.2f} s ({steps}){most}"


def measure_cold_start(
    bundle: Path, *, backend: Backend, precision: str, threads: int | None
) -> ColdStart:
    """Start a process that answers one golden image. The disk's cache is warm.

    Raises:
        CheckFailedError: The process gave no answer.
    """
    started_s = time.monotonic()  # the same clock in every process
    answer, problem = ask_child(
        __name__, "answer_once", str(bundle), backend, precision, threads, timeout_s=1800.0
    )
    if answer is None:
        raise CheckFailedError(
            "a process of its own must answer an image",
            found=problem,
            remedy="run `edgereg verify` and `edgereg doctor`",
        )
    moments = [started_s, *answer["moments_s"]]
    steps = [after - before for before, after in pairwise(moments)]
    return ColdStart(
        total_s=moments[-1] - moments[0],
        steps_s=dict(zip(_STEPS, steps, strict=True)),
        peak_memory_bytes=answer["peak_memory_bytes"],
    )


def answer_once(path: str, backend: Backend, precision: str, threads: int | None) -> dict[str, Any]:
    """Open a bundle and answer its first golden image: the moments after each step."""
    moments_s = [time.monotonic()]
    bundle = open_bundle(Path(path))
    moments_s.append(time.monotonic())
    runner = open_runner(bundle, backend=backend, precision=precision, threads=threads)
    moments_s.append(time.monotonic())
    Pipeline(bundle, runner).run()
    moments_s.append(time.monotonic())
    return {"moments_s": moments_s, "peak_memory_bytes": peak_memory_bytes()}


def peak_memory_bytes(root: Path = Path("/")) -> int | None:
    """The most memory that this process has had; None where the kernel does not say."""
    found = re.search(r"VmHWM:\s*(\d+) kB", read_text(root / "proc/self/status") or "")
    return int(found[1]) << 10 if found else None
