"""Do many jobs in a few long-lived processes, so that one job's failure stops nothing.

A process is ended when its job takes too long or too much memory, and a new one takes its place;
the operating system may end one, too. Whatever happens, each job has an outcome.
"""

import gc
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import connection
from pathlib import Path
from typing import Any, Literal

__all__ = ["GIB", "Limits", "Outcome", "run"]

GIB = 2**30
_POLL_S = 0.25
_JOBS = 25  # a process is replaced after so many: torch and timm cache what they compile and build
_LARGE = 3 * GIB  # or when a job left it this large
_SPARE = GIB  # what the machine must keep free

Kind = Literal["done", "crashed", "timed out", "out of memory"]


@dataclass(frozen=True)
class Limits:
    """What a job may take.

    Args:
        seconds: For one job.
        bytes: Of resident memory, for the jobs under way together, by their estimates, and for one
            job, as measured.
    """

    seconds: float
    bytes: float


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Args:
        kind: "done" if it returned.
        value: What it returned; None unless done.
        detail: What is known about another end.
        seconds: It took.
        peak_bytes: The largest resident memory seen while it ran.
    """

    kind: Kind
    value: Any
    detail: str
    seconds: float
    peak_bytes: int


@dataclass
class _Worker:
    process: Any
    pipe: Any
    jobs: int = 0
    job: Any = None
    needs: float = 0.0
    begun: float = 0.0
    peak: int = field(default=0)


def run(
    jobs: Sequence[Any],
    work: Callable[[Any], Any],
    *,
    workers: int,
    limits: Limits,
    estimate: Callable[[Any], float] = lambda job: 0.0,
) -> Iterator[tuple[Any, Outcome]]:
    """Yield each job with its outcome, as they end.

    Args:
        jobs: Anything that can be pickled. They are begun in this order.
        work: A function of a module; what it returns can be pickled.
        workers: Processes.
        limits: What a job may take.
        estimate: The bytes that a job will need; one that does not fit beside others waits.
    """
    waiting = list(reversed(jobs))
    pool: list[_Worker] = []
    try:
        while waiting or any(worker.job is not None for worker in pool):
            _fill(pool, waiting, work, workers=workers, limits=limits, estimate=estimate)
            busy = [worker for worker in pool if worker.job is not None]
            connection.wait([worker.pipe for worker in busy], timeout=_POLL_S)
            for worker in busy:
                outcome = _look(worker, limits)
                if outcome is None:
                    continue
                job, worker.job = worker.job, None
                if outcome.kind != "done" or worker.jobs >= _JOBS or _resident(worker) > _LARGE:
                    _end(worker)
                    pool.remove(worker)
                yield job, outcome
    finally:
        for worker in pool:
            _end(worker)


def _fill(
    pool: list[_Worker],
    waiting: list[Any],
    work: Callable[[Any], Any],
    *,
    workers: int,
    limits: Limits,
    estimate: Callable[[Any], float],
) -> None:
    """Give the next jobs to idle workers, as far as memory allows; one alone is always tried."""
    while waiting:
        busy = [worker for worker in pool if worker.job is not None]
        needs = estimate(waiting[-1])
        fits = sum(worker.needs for worker in busy) + needs <= limits.bytes
        if len(busy) == workers or (busy and not fits):
            return
        for idle in [worker for worker in pool if worker.job is None]:
            if not idle.process.is_alive():  # memory may be taken from one that does nothing, too
                pool.remove(idle)
        worker = next((worker for worker in pool if worker.job is None), None)
        if worker is None:
            worker = _start(work)
            pool.append(worker)
        worker.job, worker.needs = waiting.pop(), needs
        worker.jobs += 1
        worker.begun, worker.peak = time.monotonic(), 0
        worker.pipe.send(worker.job)


def _look(worker: _Worker, limits: Limits) -> Outcome | None:
    """Return how the worker's job ended, ending it if it must; None while it may go on."""
    seconds = time.monotonic() - worker.begun
    worker.peak = max(worker.peak, _resident(worker))

    def ended(kind: Kind, detail: str = "", value: Any = None) -> Outcome:
        return Outcome(kind, value, detail, seconds, worker.peak)

    if worker.pipe.poll():
        try:
            is_done, answer = worker.pipe.recv()
        except (EOFError, OSError):
            worker.process.join()
            code = worker.process.exitcode
            # The kernel's own way to find memory is SIGKILL.
            return ended("out of memory" if code == -9 else "crashed", f"exit code {code}")
        return ended("done", value=answer) if is_done else ended("crashed", answer)
    if seconds > limits.seconds:
        return ended("timed out", f"more than {limits.seconds:g} s")
    if worker.peak > limits.bytes:
        return ended("out of memory", f"more than {limits.bytes / GIB:.1f} GiB")
    if worker.peak > _SPARE and _available() < _SPARE:
        return ended("out of memory", f"{worker.peak / GIB:.1f} GiB, and the machine had no more")
    return None


def _start(work: Callable[[Any], Any]) -> _Worker:
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(work, theirs), daemon=True)
    process.start()
    theirs.close()  # so that its death is the end of the pipe
    return _Worker(process, ours)


def _end(worker: _Worker) -> None:
    worker.process.kill()
    worker.process.join()
    worker.pipe.close()


def _serve(work: Callable[[Any], Any], pipe: Any) -> None:
    """Answer jobs until the pipe closes: (True, result) or (False, what was raised)."""
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        try:
            answer = True, work(job)
        except Exception as error:
            answer = False, f"{type(error).__name__}: {error}"
        pipe.send(answer)
        gc.collect()


def _resident(worker: _Worker) -> int:
    """Return a process' resident bytes; 0 if it is gone."""
    try:
        pages = int(Path(f"/proc/{worker.process.pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0
    return pages * 4096


def _available() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) * 1024
    return _SPARE
