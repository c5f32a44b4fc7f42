"""The whole road on the embedded images: train, pre-train, export, verify, time, run, report."""

import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deploy.bundle.read import open_bundle
from deploy.measure.bench import BenchResult, bench, cpu_model
from deploy.measure.verify import VerifyReport, verify
from deploy.publish import publish_directory
from deploy.runtime.decode import decode
from deploy.runtime.runner import open_runner
from deploy.service.infer import Prediction, classify
from edgereg.data.emoji10 import Emoji10
from edgereg.demo.jobs import RECIPES, ExportJob, TrainJob, run_jobs
from edgereg.demo.page import render
from edgereg.demo.pictures import draw_pictures, png_uri
from edgereg.demo.result import DemoResult

__all__ = ["run_demo"]

MEMBERS = ("report.html", "bundles", "checkpoints")
BENCH_COUNT = 2000  # 662 are needed for a 99th percentile

# the longest first, so that two processes end at about the same time
TRAINING = (
    TrainJob("pirl", "pirl", verb="pretrain", data="emoji-10:both:train"),
    TrainJob("vit-regularized", "vit-regularized"),
    TrainJob("vit-plain", "vit-plain"),
    # augmentation pays only once the plain net knows its images by heart: a tenth of the epochs
    # would show the opposite
    TrainJob("cnn-regularized", "cnn-regularized", quick_share=0.45),
    TrainJob("cnn-plain", "cnn-plain", quick_share=0.45),
    TrainJob("few-pirl", "few-labels", share=0.1, init="pirl"),
    TrainJob("few-scratch", "few-labels", share=0.1),
)
EXPORTS = tuple(
    ExportJob(f"{kind}-{target}", f"{kind}-regularized", target)
    for kind in ("cnn", "vit")
    for target in ("jetpack6.2", "onnxruntime-x86")
)


def run_demo(out: Path, *, quick: bool, force: bool) -> DemoResult:
    """Go the whole road and write checkpoints, bundles and report.html to a directory.

    Args:
        out: The directory to appear.
        quick: Cut every training short: at most 100 s on 2 cores; machinery and direction only.
        force: Whether an earlier demo may be replaced.

    Raises:
        DeployError, EdgeregError: Nothing was written.
    """
    seconds: dict[str, float] = {}
    with publish_directory(out, members=MEMBERS, force=force) as staging:
        with _timed(seconds, "training"):
            training = run_jobs(TRAINING, staging, quick=quick, title="train")
        with _timed(seconds, "export and NVIDIA's builder"):
            exports = run_jobs(EXPORTS, staging, quick=quick, title="export")
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
        return bench(bundle, runner, count=BENCH_COUNT // 10 if quick else BENCH_COUNT)
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
