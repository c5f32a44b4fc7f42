"""The demo's training runs and exports, two at a time in processes of one thread each.

A second thread gives a process less than a second process would: a step of our ResNet on 64 images
ran at 810 images/s with one thread and at 1,120 with two (10 steps each, 2 cores of an AMD EPYC).
"""

import dataclasses
import multiprocessing
import os
import queue
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from edgereg.progress import Report, many_bars

__all__ = ["ExportJob", "JobResult", "TrainJob", "run_jobs"]

RECIPES = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class TrainJob:
    """One run of `edgereg train` or `edgereg pretrain`.

    Args:
        name: Of its checkpoint.
        recipe: A file of recipes/, without its suffix.
        verb: Which of the two.
        data: What to train on.
        tests: Labelled data sets on which the result is measured.
        share: Share of the labels that it may use.
        init: The name of the job whose backbone it starts from; it runs after that one.
        quick_share: Share of the epochs that a quick demo runs.
    """

    name: str
    recipe: str
    verb: Literal["train", "pretrain"] = "train"
    data: str = "emoji-10:twitter:train"
    tests: tuple[str, ...] = ("emoji-10:twitter:test", "emoji-10:google:test")
    share: float = 1.0
    init: str | None = None
    quick_share: float = 0.1


@dataclass(frozen=True)
class ExportJob:
    """One run of `edgereg export`: the name of its bundle, of the checkpoint, and the target."""

    name: str
    checkpoint: str
    target: str
    data: str = "emoji-10:google:test"


@dataclass(frozen=True)
class JobResult:
    """What a job measured, and how long it took."""

    name: str
    figures: dict[str, Any]
    seconds: float


def run_jobs(
    jobs: Sequence[TrainJob | ExportJob], root: Path, *, quick: bool, title: str
) -> dict[str, JobResult]:
    """Run all jobs and return their results by name.

    Args:
        jobs: The longest first.
        root: Checkpoints are written to root/checkpoints, bundles to root/bundles.
        quick: Whether to run only each training's `quick_share` of its epochs.
        title: What all of it is.

    Raises:
        DeployError, EdgeregError: The first job's that failed; the others are stopped.
    """
    context = multiprocessing.get_context("spawn")
    workers = min(2, os.cpu_count() or 1)
    waiting, running = list(jobs), dict[str, Future[JobResult]]()
    results: dict[str, JobResult] = {}
    with (
        context.Manager() as manager,
        ProcessPoolExecutor(workers, mp_context=context) as pool,
        many_bars(title, len(jobs)) as bars,
    ):
        messages = manager.Queue()
        try:
            while waiting or running:
                for job in [job for job in waiting if _is_ready(job, results)]:
                    waiting.remove(job)
                    running[job.name] = pool.submit(_run, job, root, quick, messages)
                _show(messages, bars)
                for name in [name for name, future in running.items() if future.done()]:
                    results[name] = running.pop(name).result()
                    bars.finished(name, results[name].seconds)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise
    return results


def _is_ready(job: TrainJob | ExportJob, results: dict[str, JobResult]) -> bool:
    return not isinstance(job, TrainJob) or job.init is None or job.init in results


def _show(messages: Any, bars: Any) -> None:
    """Pass on what the processes reported, for a fifth of a second."""
    until = time.monotonic() + 0.2
    while (left := until - time.monotonic()) > 0:
        try:
            bars.update(*messages.get(timeout=left))
        except queue.Empty:
            return


def _run(job: TrainJob | ExportJob, root: Path, quick: bool, messages: Any) -> JobResult:
    """Run one job; this is a child process."""
    import torch

    torch.set_num_threads(1)
    started = time.perf_counter()
    if isinstance(job, TrainJob):
        figures = _train(job, root, quick, messages)
    else:
        figures = _export(job, root, messages)
    return JobResult(job.name, figures, time.perf_counter() - started)


def _train(job: TrainJob, root: Path, quick: bool, messages: Any) -> dict[str, Any]:
    from edgereg.data.images import FewLabels, open_images
    from edgereg.recipe import load_recipe
    from edgereg.train.pretrain_run import pretrain_run
    from edgereg.train.run import eval_run, train_run

    @contextmanager
    def bar(description: str, total: int) -> Iterator[Report]:
        last = 0.0

        def report(done: int, text: str) -> None:
            nonlocal last
            if time.monotonic() - last > 0.2 or done == total:
                last = time.monotonic()
                messages.put((job.name, description, done, total, text))

        yield report

    recipe = load_recipe(RECIPES / f"{job.recipe}.yaml")
    if quick:
        epochs = max(1, round(recipe.epochs * job.quick_share))
        recipe = dataclasses.replace(recipe, epochs=epochs)
    images, out = open_images(job.data), root / "checkpoints" / job.name
    if job.verb == "pretrain":
        return pretrain_run(images, out, recipe, bar=bar).to_json()
    if job.share < 1:
        images = FewLabels(images, job.share, seed=recipe.seed)
    init = None if job.init is None else root / "checkpoints" / job.init
    figures = train_run(images, out, recipe, bar=bar, init=init).to_json()
    tests = {}
    for name in job.tests:
        _, measured = eval_run(out, open_images(name), bar=bar)
        tests[name] = {"top1": measured.top1, "count": measured.count}
    return {**figures, "tests": tests}


def _export(job: ExportJob, root: Path, messages: Any) -> dict[str, Any]:
    from edgereg.data.images import open_images
    from edgereg.ship import ship

    stage = iter(range(1, 100))
    result = ship(
        root / "checkpoints" / job.checkpoint,
        open_images(job.data),
        root / "bundles" / f"{job.name}.bundle",
        target=job.target,
        on_stage=lambda text: messages.put((job.name, "export", next(stage), 10, text[:60])),
    )
    report, conformance = result.report, result.variants["fp32"].conformance
    return {
        "target": job.target,
        "checkpoint": job.checkpoint,
        "before": dataclasses.asdict(report.before),
        "after": dataclasses.asdict(report.after),
        "float64_error": report.model_error,
        "skipped": report.skipped,
        "verdict": conformance.verdict,
        "judge": conformance.judge,
        "detail": conformance.detail,
    }
