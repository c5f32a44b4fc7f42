"""One model, one number of threads, one batch size: ours and every peer, in turns."""

import dataclasses
import io
import itertools
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peak import Peak, measure_peaks
from peers import PEERS, PLAIN, Case, Kind, Ready
from PIL import Image
from subjects import Photos, Shipped, Subject, make_checkpoint, ship_best
from timing import in_turns
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

from deploy.bundle.read import open_bundle
from deploy.measure.paired import compare_answers
from deploy.measure.statistics import median_interval
from deploy.runtime.decode import decode
from deploy.runtime.postprocess import top_k
from deploy.runtime.preprocess import Preprocessing, preprocess
from deploy.runtime.runner import open_runner
from edgereg.checkpoint import load_classifier
from edgereg.data.images import Images, evenly, labels_of
from export.accuracy import judge_accuracy
from export.emulate_int8 import sqnr_db

__all__ = ["OURS", "Job", "Result", "Row", "measure"]

OURS, OURS_FP32 = "edgereg", "edgereg fp32"
_CALIBRATED_ON, _COMPARED_ON = 64, 64  # images; multiples of every batch size
_REST_S = 0.003  # in which a pool's threads, which spin for more work, fall asleep
_SAMPLE_S = 0.002  # a sample of a shorter run is the mean of several in a row
_WARM_UP = 3
_MOST = 101  # rounds
_LEAST = 11
_JPEG_SCALE = 2  # a photograph is larger than what the network takes


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


Interval = tuple[float, float, float]
"""A median with the ends of its 95 % interval."""


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
    stream = _some(photos.test, _COMPARED_ON, spec)
    images = stream[: job.batch]
    with tempfile.TemporaryDirectory() as folder:
        calibration = _some(photos.train, _CALIBRATED_ON, spec)
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
    peaks, gflop = measure_peaks(job.threads), _gflop(model, images)
    alone = {name: lambda r=each.run: r(images) for name, each in ready.items()}
    seconds, alone_n = _time(alone, job.budget_s)
    say("end to end")
    files = _jpegs(photos.test, job.batch, spec)
    whole = {
        name: _ours_end_to_end(shipped, each, files)
        if name in (OURS, OURS_FP32)
        else _usual_end_to_end(each, files, spec)
        for name, each in ready.items()
    }
    end_seconds, end_n = _time(whole, job.budget_s)
    for name, each in ready.items():
        ms = 1e3 * statistics.median(seconds[name])
        rows[name] = dataclasses.replace(
            rows[name],
            ms=ms,
            speedup=_ratio(seconds[PLAIN], seconds[name]) if PLAIN in ready else None,
            beside_ours=_ratio(seconds[name], seconds[OURS]),
            end_ms=1e3 * statistics.median(end_seconds[name]),
            end_speedup=_ratio(end_seconds[PLAIN], end_seconds[name]) if PLAIN in ready else None,
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


def _gflop(model: nn.Module, images: NDArray[np.float32]) -> float:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.from_numpy(images))
    return float(counter.get_total_flops()) / 1e9


def _jpegs(images: Images, count: int, spec: Preprocessing) -> list[bytes]:
    """Return JPEG files, twice as large on each side as the network's input."""
    size = (_JPEG_SCALE * spec.width, _JPEG_SCALE * spec.height)
    files = []
    for place in evenly(labels_of(images), count):
        buffer = io.BytesIO()
        picture = Image.fromarray(images.load(int(place)))
        picture.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    return files


def _ours_end_to_end(shipped: Shipped, ready: Ready, files: list[bytes]) -> Callable[[], object]:
    """From files to answers by what `edgereg infer` is made of."""
    bundle = open_bundle(shipped.path)
    spec, labels = bundle.manifest.preprocessing, bundle.labels

    def run() -> object:
        images = [decode(data, name="a photograph") for data in files]
        return [top_k(logits, labels, k=1) for logits in ready.run(preprocess(images, spec))]

    return run


def _usual_end_to_end(
    ready: Ready, files: list[bytes], spec: Preprocessing
) -> Callable[[], object]:
    """From files to answers as torchvision's examples do it."""
    resize = (
        [transforms.Resize((spec.height, spec.width))]
        if spec.resize == "stretch"
        else [
            transforms.Resize(round(spec.height / spec.crop_fraction)),
            transforms.CenterCrop((spec.height, spec.width)),
        ]
    )
    normalize = transforms.Normalize(spec.mean, spec.std)
    prepare = transforms.Compose([*resize, transforms.ToTensor(), normalize])

    def run() -> object:
        images = [prepare(Image.open(io.BytesIO(data)).convert("RGB")) for data in files]
        return ready.run(torch.stack(images).numpy()).argmax(axis=1)

    return run


def _time(
    runs: Mapping[str, Callable[[], object]], budget_s: float
) -> tuple[dict[str, list[float]], int]:
    """Return the seconds of a run in each round, and how many rounds the budget had.

    Before each sample its run goes once uncounted, after a rest: what the run before it left in
    the caches and on the other cores is its neighbour's doing.
    """
    single: dict[str, float] = {}
    for name, run in runs.items():
        times = []
        for _ in range(_WARM_UP):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        single[name] = min(times)
    counts = {name: max(1, round(_SAMPLE_S / seconds)) for name, seconds in single.items()}
    a_round = sum(single[name] * (1 + counts[name]) + _REST_S for name in runs)
    rounds = max(_LEAST, min(_MOST, int(budget_s / a_round)))
    steps: list[Callable[[], object]] = []
    for name, run in runs.items():
        steps += [_rest_then(run), _repeat(run, counts[name])]
    samples = in_turns(steps, rounds)[1::2]
    seconds = {
        name: [total / counts[name] for total in totals]
        for name, totals in zip(runs, samples, strict=True)
    }
    return seconds, rounds


def _rest_then(run: Callable[[], object]) -> Callable[[], object]:
    def step() -> object:
        time.sleep(_REST_S)
        return run()

    return step


def _repeat(run: Callable[[], object], count: int) -> Callable[[], None]:
    def step() -> None:
        for _ in itertools.repeat(None, count):
            run()

    return step


def _ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Interval:
    """Return the median of the rounds' ratios, with its interval."""
    ratios = sorted(a / b for a, b in zip(numerator, denominator, strict=True))
    low, high = median_interval(ratios, confidence=0.95) or (ratios[0], ratios[-1])
    return statistics.median(ratios), low, high
