"""One model, one number of threads, one batch size: ours and every peer, in turns."""

import dataclasses
import os
import statistics
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from end_to_end import jpegs, ours_end_to_end, usual_end_to_end
from numpy.typing import NDArray
from peak import Peak, measure_peaks
from peers import PEERS, PLAIN, Case, Kind, Ready
from rounds import Interval, ratio_of, time_rounds
from subjects import Photos, Shipped, Subject, make_checkpoint, ship_best
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from deploy.bundle.read import open_bundle
from deploy.measure.paired import compare_answers
from deploy.runtime.preprocess import Preprocessing, preprocess
from deploy.runtime.runner import open_runner
from edgereg.checkpoint import load_classifier
from edgereg.data.images import Images, evenly, labels_of
from export.judge.accuracy import judge_accuracy
from export.precision.emulate_int8 import sqnr_db

__all__ = ["IMAGES", "OURS", "OURS_FP32", "Job", "Result", "Row", "count_gflop", "measure"]

OURS, OURS_FP32 = "edgereg", "edgereg fp32"
IMAGES = 64  # to calibrate on, and to compare answers on; a multiple of every batch size


@dataclass(frozen=True)
class Job:
    """What is measured in one sitting, and how much of it.

    Args:
        subject: The model.
        threads: For every peer.
        batch: Images at a time.
        budget_s: Time for the rounds of each of the two questions: network alone, end to end.
        peers: Names of PEERS.
        with_accuracy: Whether the top-1 loss is measured: once a model will do.
    """

    subject: Subject
    threads: int
    batch: int
    budget_s: float
    peers: Sequence[str] = tuple(PEERS)
    with_accuracy: bool = True

    @property
    def slug(self) -> str:
        """Return the name of the result's file."""
        return f"{self.subject.slug}-t{self.threads}-b{self.batch}"


@dataclass(frozen=True)
class Row:
    """One peer in one job; what was not measured is None.

    Args:
        peer: Its name.
        error: Why it failed; else nothing.
        computes: The type of most of its products.
        ms: Median time of a batch.
        speedup: How many times as fast as plain ONNX Runtime.
        beside_ours: Its time as a multiple of ours; below 1 it is faster.
        end_ms: Median time from JPEG files to answers.
        end_speedup: As `speedup`, from JPEG files to answers.
        share: Of the machine's peak for the type.
        sqnr_db: Of the logits, against torch's in float32; None where they are equal.
        accuracy: Top-1 against torch's, a `PairedAccuracy` as JSON; of trained models.
        gate: What int8's gate says of that.
        note: What else is to be said.
    """

    peer: str
    error: str = ""
    computes: Kind | None = None
    ms: float | None = None
    speedup: Interval | None = None
    beside_ours: Interval | None = None
    end_ms: float | None = None
    end_speedup: Interval | None = None
    share: float | None = None
    sqnr_db: float | None = None
    accuracy: dict[str, Any] | None = None
    gate: bool | None = None
    note: str = ""


@dataclass(frozen=True)
class Result:
    """What a job found.

    Args:
        model: The subject's name.
        is_trained: Whether its accuracy means anything.
        threads: Of every peer.
        batch: Images at a time.
        rounds: Of the network alone, and end to end.
        gflop: Operations for a batch, 2 for each product and sum, in 1e9.
        peaks: The machine's, measured in this job.
        load: The system's load average when the job ended; above the threads, others ran too.
        rows: One for each peer; ours first.
    """

    model: str
    is_trained: bool
    threads: int
    batch: int
    rounds: tuple[int, int]
    gflop: float
    peaks: dict[Kind, Peak]
    load: float
    rows: tuple[Row, ...]


def measure(job: Job, photos: Photos, out: Path, *, say: Callable[[str], None]) -> Result:
    """Build everything, check its answers, and time it.

    Args:
        job: What to measure.
        photos: The images.
        out: Keeps checkpoints and bundles for other jobs.
        say: Is told what comes next.
    """
    warnings.simplefilter("ignore")  # what torch says of its own code
    torch.set_num_threads(job.threads)
    say("checkpoint")
    checkpoint = make_checkpoint(job.subject, photos, out)
    say("export")
    shipped = ship_best(job.subject, checkpoint, photos, out, batch=job.batch)
    model, described = load_classifier(checkpoint)
    model.requires_grad_(False)
    spec = described.recipe.preprocessing()
    stream = _some(photos.test, IMAGES, spec)
    images = stream[: job.batch]
    with tempfile.TemporaryDirectory() as folder:
        calibration = _some(photos.train, IMAGES, spec)
        case = Case(model, images, calibration, job.threads, Path(folder))
        ready, rows = _prepare(job, case, shipped, say)
    say("answers")
    reference = np.concatenate([PEERS["torch eager"](case).run(x) for x in _batches(stream, job)])
    for name, each in ready.items():
        logits = np.concatenate([each.run(x) for x in _batches(stream, job)])
        decibels = sqnr_db(logits, reference)
        rows[name] = dataclasses.replace(
            rows[name], sqnr_db=decibels if np.isfinite(decibels) else None
        )
    if job.with_accuracy and job.subject.recipe:
        rows |= _accuracies(job, ready, rows, photos, spec)
    say("the network alone")
    peaks, gflop = measure_peaks(job.threads), count_gflop(model, images)
    alone = {name: lambda r=each.run: r(images) for name, each in ready.items()}
    seconds, alone_n = time_rounds(alone, job.budget_s, threads=job.threads)
    say("end to end")
    files = jpegs(photos.test, job.batch, spec)
    whole = {
        name: ours_end_to_end(shipped.path, each, files)
        if name in (OURS, OURS_FP32)
        else usual_end_to_end(each, files, spec)
        for name, each in ready.items()
    }
    end_seconds, end_n = time_rounds(whole, job.budget_s, threads=job.threads)
    for name, each in ready.items():
        ms = 1e3 * statistics.median(seconds[name])
        rows[name] = dataclasses.replace(
            rows[name],
            ms=ms,
            speedup=ratio_of(seconds[PLAIN], seconds[name]) if PLAIN in ready else None,
            beside_ours=ratio_of(seconds[name], seconds[OURS]),
            end_ms=1e3 * statistics.median(end_seconds[name]),
            end_speedup=ratio_of(end_seconds[PLAIN], end_seconds[name]) if PLAIN in ready else None,
            share=gflop / (ms / 1e3) / peaks[each.computes].gflops,
        )
    return Result(
        model=job.subject.name,
        is_trained=bool(job.subject.recipe),
        threads=job.threads,
        batch=job.batch,
        rounds=(alone_n, end_n),
        gflop=gflop,
        peaks=peaks,
        load=os.getloadavg()[0],
        rows=tuple(rows.values()),
    )


def _prepare(
    job: Job, case: Case, shipped: Shipped, say: Callable[[str], None]
) -> tuple[dict[str, Ready], dict[str, Row]]:
    """Load ours and every peer; one that fails is a row that says why."""
    note = f"int8 was refused: {shipped.refused}" if shipped.refused else ""
    ready = {OURS: _ours(shipped, shipped.precision, job.threads)}
    rows = {OURS: Row(OURS, computes=ready[OURS].computes, note=note)}
    if shipped.precision != "fp32":
        ready[OURS_FP32] = _ours(shipped, "fp32", job.threads)
        rows[OURS_FP32] = Row(OURS_FP32, computes="fp32")
    for name in job.peers:
        say(name)
        try:
            made = PEERS[name](case)
            answers = made.run(case.images)
            if not np.isfinite(answers).all():
                raise RuntimeError("its answers are not finite")
        except Exception as error:  # a peer's own, of whatever type
            words = " ".join(str(error).split())
            rows[name] = Row(name, error=f"{type(error).__name__}: {words}"[:300])
            continue
        ready[name] = made
        rows[name] = Row(name, computes=made.computes)
    return ready, rows


def _ours(shipped: Shipped, precision: str, threads: int) -> Ready:
    """Open a bundle as `edgereg infer` does."""
    bundle = open_bundle(shipped.path)
    runner = open_runner(bundle, backend="onnxruntime", precision=precision, threads=threads)
    return Ready(runner, "int8" if precision == "int8" else "fp32")


def _accuracies(
    job: Job,
    ready: Mapping[str, Ready],
    rows: Mapping[str, Row],
    photos: Photos,
    spec: Preprocessing,
) -> dict[str, Row]:
    """Compare everybody's top-1 answers to all test images with torch's."""
    labels = labels_of(photos.test)
    places = [*range(len(labels)), *([0] * (-len(labels) % job.batch))]  # whole batches
    logits: dict[str, list[NDArray[np.float32]]] = {name: [] for name in ready}
    for start in range(0, len(places), job.batch):
        decoded = [photos.test.load(place) for place in places[start : start + job.batch]]
        batch = preprocess(decoded, spec)
        for name, each in ready.items():
            logits[name].append(each.run(batch))
    answers = {name: np.concatenate(parts)[: len(labels)] for name, parts in logits.items()}
    if "torch eager" not in answers:
        raise RuntimeError(f"torch itself failed: {rows['torch eager'].error}")
    found = {}
    for name, answer in answers.items():
        paired = compare_answers(answer, answers["torch eager"], labels)
        verdict = judge_accuracy("int8", paired)
        found[name] = dataclasses.replace(
            rows[name], accuracy=paired.to_json(), gate=verdict.passed
        )
    return found


def _some(images: Images, count: int, spec: Preprocessing) -> NDArray[np.float32]:
    """Return (count, 3, H, W) of them, from each class in turn; where they are few, again."""
    chosen = np.resize(evenly(labels_of(images), count), count)
    return preprocess([images.load(int(place)) for place in chosen], spec)


def _batches(images: NDArray[np.float32], job: Job) -> list[NDArray[np.float32]]:
    return [images[i : i + job.batch] for i in range(0, len(images), job.batch)]


def count_gflop(model: nn.Module, images: NDArray[np.float32]) -> float:
    """Count a batch's operations; attention in its plain form: the CPU's own counts as nothing."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.from_numpy(images))
    return float(counter.get_total_flops()) / 1e9
