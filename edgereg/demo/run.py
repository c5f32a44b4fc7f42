"""The whole road on the embedded images: train, pre-train, export, verify, time, run, report."""

import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deploy.bundle.read import open_bundle
from deploy.measure.bench import BenchResult, bench, cpu_model
from deploy.measure.verify import VerifyReport, verify
from deploy.publish import publish_directory
from deploy.runtime.decode import decode
from deploy.runtime.runner import open_runner
from deploy.service.infer import Prediction, classify
from edgereg.data.emoji10 import Emoji10
from edgereg.demo.jobs import RECIPES, ExportJob, JobResult, TrainJob, run_jobs
from edgereg.demo.pictures import draw_pictures, png_uri
from edgereg.progress import progress

__all__ = ["DemoResult", "run_demo"]

SAME, OTHER = "emoji-10:twitter:test", "emoji-10:google:test"
QUICK_SHARE = 0.1
BENCH_COUNT = 2000  # 662 are needed for a 99th percentile

# the longest first, so that two processes end at about the same time
TRAINING = (
    TrainJob("pirl", "pirl", verb="pretrain", data="emoji-10:both:train"),
    TrainJob("vit-regularized", "vit-regularized"),
    TrainJob("vit-plain", "vit-plain"),
    TrainJob("cnn-regularized", "cnn-regularized"),
    TrainJob("cnn-plain", "cnn-plain"),
    TrainJob("few-pirl", "few-labels", share=0.1, init="pirl"),
    TrainJob("few-scratch", "few-labels", share=0.1),
)
EXPORTS = tuple(
    ExportJob(f"{kind}-{target}", f"{kind}-regularized", target)
    for kind in ("cnn", "vit")
    for target in ("jetpack6.2", "onnxruntime-x86")
)


@dataclass(frozen=True)
class DemoResult:
    """Everything that the report shows.

    Args:
        out: Where it was written.
        quick: Whether the runs were cut short: then the accuracies mean nothing.
        training: The training jobs' results by name.
        exports: The export jobs' results by bundle name.
        verified: Each bundle's verification.
        benched: The timings of the bundles for this kind of machine.
        predictions: A few images and what the CNN's bundle said, as (data URI, true class, answer).
        machine: Processor, cores and versions.
        seconds: How long each stage took.
    """

    out: Path
    quick: bool
    training: dict[str, JobResult]
    exports: dict[str, JobResult]
    verified: dict[str, VerifyReport]
    benched: dict[str, BenchResult]
    predictions: tuple[tuple[str, str, str], ...]
    machine: dict[str, str]
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether every bundle answers as its model does, in the timed runs too."""
        return all(report.passed for report in self.verified.values()) and all(
            result.check.passed for result in self.benched.values()
        )

    def top1(self, job: str, data: str) -> float:
        """Return a trained model's accuracy on a data set, in [0, 1]."""
        value: float = self.training[job].figures["tests"][data]["top1"]
        return value

    def to_json(self) -> dict[str, Any]:
        """Return the figures as JSON values."""
        return {
            "report": str(self.out / "report.html"),
            "passed": self.passed,
            "quick": self.quick,
            "training": {n: _without_history(r.figures) for n, r in self.training.items()},
            "exports": {name: result.figures for name, result in self.exports.items()},
            "verified": {name: report.passed for name, report in self.verified.items()},
            "median_ms": {
                name: result.summaries_ms()["end to end"].percentiles["p50"]
                for name, result in self.benched.items()
            },
            "machine": self.machine,
            "seconds": self.seconds,
        }

    def to_text(self) -> str:
        """Return the figures that a person looks for first."""
        lines = [f"{'':18} {'same vendor':>12} {'other vendor':>13}   (top-1 on held-out glyphs)"]
        lines += [
            f"{name:18} {self.top1(name, SAME):>12.1%} {self.top1(name, OTHER):>13.1%}"
            for name, result in sorted(self.training.items())
            if "tests" in result.figures
        ]
        gain = self.top1("cnn-regularized", OTHER) - self.top1("cnn-plain", OTHER)
        lines.append(f"regularization: {100 * gain:+.1f} points on the other vendor's drawings")
        lines += [
            f"{name:22} {'verified' if report.passed else 'NOT VERIFIED'}; "
            f"parser and builder: {self.exports[name].figures['verdict']}"
            for name, report in self.verified.items()
        ]
        lines.append(f"{sum(self.seconds.values()):.0f} s in all; open {self.out / 'report.html'}")
        return "\n".join(lines)


def run_demo(out: Path, *, quick: bool, force: bool) -> DemoResult:
    """Go the whole road and write checkpoints, bundles and report.html to a directory.

    Args:
        out: The directory to appear.
        quick: Cut every training short: at most 100 s on 2 cores; machinery and direction only.
        force: Whether an earlier demo may be replaced.

    Raises:
        DeployError, EdgeregError: Nothing was written.
    """
    from edgereg.demo.page import render  # matplotlib takes a second to import

    seconds: dict[str, float] = {}
    with publish_directory(out, marker="report.html", force=force) as staging:
        with _timed(seconds, "training"):
            share = QUICK_SHARE if quick else 1.0
            training = run_jobs(TRAINING, staging, epochs_share=share, title="train")
        with _timed(seconds, "export and NVIDIA's builder"):
            exports = run_jobs(EXPORTS, staging, epochs_share=1.0, title="export")
        with _timed(seconds, "verification"):
            verified = {job.name: _verify(staging, job.name) for job in EXPORTS}
        with _timed(seconds, "timing"):
            here = [job.name for job in EXPORTS if job.target == "onnxruntime-x86"]
            benched = {name: _bench(staging, name, quick=quick) for name in here}
        with _timed(seconds, "inference and pictures"):
            predictions = _predict(staging, "cnn-onnxruntime-x86")
            pictures = draw_pictures(
                Emoji10(vendor="twitter", split="train"),
                Emoji10(vendor="google", split="train"),
                RECIPES / "cnn-regularized.yaml",
                RECIPES / "pirl.yaml",
            )
        result = DemoResult(
            out, quick, training, exports, verified, benched, predictions, _machine(), seconds
        )
        (staging / "report.html").write_text(render(result, pictures), encoding="utf-8")
    return result


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - started


def _verify(root: Path, name: str) -> VerifyReport:
    bundle = open_bundle(root / "bundles" / f"{name}.bundle")
    runner = open_runner(bundle, backend="onnxruntime", precision="fp32", threads=1)
    try:
        return verify(bundle, runner)
    finally:
        runner.close()


def _bench(root: Path, name: str, *, quick: bool) -> BenchResult:
    bundle = open_bundle(root / "bundles" / f"{name}.bundle")
    runner = open_runner(bundle, backend="onnxruntime", precision="fp32", threads=1)
    try:
        with progress(f"bench {name}", 1) as report:
            return bench(
                bundle,
                runner,
                count=BENCH_COUNT // 10 if quick else BENCH_COUNT,
                on_progress=lambda text: report(0, text),
            )
    finally:
        runner.close()


def _predict(root: Path, name: str) -> tuple[tuple[str, str, str], ...]:
    """Run the golden images as files, as `edgereg infer` would, and take one of each class."""
    bundle = open_bundle(root / "bundles" / f"{name}.bundle")
    labels = bundle.array(bundle.manifest.golden.labels or "")
    firsts = [int((labels == label).argmax()) for label in range(len(bundle.labels))]
    paths = [bundle.path / bundle.manifest.golden.images[index] for index in firsts]
    runner = open_runner(bundle, backend="onnxruntime", precision="fp32", threads=1)
    try:
        shown = []
        for result, label in zip(
            classify(bundle, runner, paths, top_k_count=1), bundle.labels, strict=True
        ):
            assert isinstance(result, Prediction), result  # the bundle's own images, just verified
            image = decode(result.path.read_bytes(), name=result.path.name)
            (answer, probability), *_ = result.top
            shown.append((png_uri(image), label, f"{answer} {probability:.0%}"))
        return tuple(shown)
    finally:
        runner.close()


def _machine() -> dict[str, str]:
    import onnxruntime
    import torch

    return {
        "processor": f"{cpu_model()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
    }


def _without_history(figures: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in figures.items() if key not in ("history", "checkpoint")}
