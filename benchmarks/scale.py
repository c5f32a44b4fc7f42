"""Export, verify, infer on 10 to 10,000 JPEGs: time linear, memory flat, infer as fast as a loop.

    python benchmarks/scale.py --out OUT [--images DIR]    10, 100, 1,000 and 10,000 images
    python benchmarks/scale.py --quick                     10, 100 and 500

Our CNN at 32 px. DIR holds CLASS/*.jpg to copy from; without it images are drawn from emoji-10.
*export* measures the accuracy on all images; it wants 64 at least, so that its first size is 64.
*verify* answers the golden images and the labelled sample, of at most 2,000 images: a bundle has
4,096 files at most. *infer* answers all. Each is a process of its own, started as a user would;
2 processes run at the same time: of infer each answers half of the images, else each does the whole
work, on twice the images together. Memory is the most that a process has had resident; "cpu" is the
processor's time of all, which other jobs disturb less.

*linear*: what an image costs between the two largest sizes / between the two before, in processor
time. *flat*: memory at the largest size / at the one before. *loop*: images per second of infer's
own functions in this process / those of a bare loop with the same decoder and pre-processing and
ONNX Runtime's own run, on pieces of 50 images in turns. The full form fails (exit 1) where a linear
is above 1.25, a flat above 1.10 or the loop below 0.95; --quick where they are above 3, above 1.5
or below 0.7.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnxruntime
from setting import describe_setting
from timing import Row, row_of

from deploy.bundle.read import open_bundle
from deploy.runtime.decode import decode
from deploy.runtime.ort_runner import OrtRunner
from deploy.runtime.preprocess import preprocess
from deploy.service.infer import answer
from deploy.service.sources import read_sources

EDGEREG = "import sys; from edgereg.cli import main; sys.exit(main())"
SIZES, QUICK_SIZES = (10, 100, 1_000, 10_000), (10, 100, 500)
LEAST_EXPORT, MOST_SAMPLE = 64, 2_000
PIECE = 50
COMMANDS = ("export", "verify", "infer")


@dataclass(frozen=True)
class Limits:
    """What is wanted."""

    linear: float
    flat: float
    loop: float


FULL, QUICK = Limits(1.25, 1.10, 0.95), Limits(3.0, 1.5, 0.7)


@dataclass(frozen=True)
class Point:
    """A command on so many images, split over some processes."""

    command: str
    images: int
    processes: int
    seconds: float
    cpu_s: float
    megabytes: float


def run(commands: Sequence[Sequence[str]]) -> tuple[float, float, float]:
    """Run processes at the same time: seconds, processor's seconds of all, MB of the largest.

    Raises:
        SystemExit: One of them failed.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    cpu_s, megabytes = 0.0, 0.0
    with tempfile.TemporaryFile() as said:
        began = time.perf_counter()
        children = [
            subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said, env=environment)
            for command in commands
        ]
        for child in children:
            _, status, usage = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
            cpu_s += usage.ru_utime + usage.ru_stime
            megabytes = max(megabytes, usage.ru_maxrss / 1024)
        seconds = time.perf_counter() - began
        for child, command in zip(children, commands, strict=True):
            if child.returncode:
                said.seek(0)
                shown = f"{' '.join(command)} ended with {child.returncode}"
                raise SystemExit(f"error: {shown}\n{said.read().decode(errors='replace')}")
    return seconds, cpu_s, megabytes


def assert_its_own(megabytes: float) -> None:
    """Stop where a process took no more memory than this one.

    Linux counts a process with at least the memory of what started it: all sizes would look flat.
    """
    here = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if megabytes <= here:
        raise SystemExit(f"error: {megabytes:.0f} MB is the memory of what measures: {here:.0f} MB")


def judge(points: Sequence[Point], limits: Limits) -> list[str]:
    """Return a line for each command and number of processes that is not linear, or not flat."""
    missed = []
    for command, processes in sorted({(point.command, point.processes) for point in points}):
        some = [p for p in points if (p.command, p.processes) == (command, processes)]
        name = f"{command} by {processes} process{'es' * (processes > 1)}"
        linear, flat = linearity(some), some[-1].megabytes / some[-2].megabytes
        if linear > limits.linear:
            missed.append(f"{name}: an image costs {linear:.2f} times as much in the largest set")
        if flat > limits.flat:
            missed.append(f"{name}: {flat:.2f} times the memory for the largest set")
    return missed


def linearity(points: Sequence[Point]) -> float:
    """What an image costs between the last two sizes / between the two before."""
    costs = [(b.cpu_s - a.cpu_s) / (b.images - a.images) for a, b in pairwise(points)]
    return costs[-1] / max(costs[-2], 1e-9)


def main() -> int:
    """Measure, print, and judge."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write scale.json and scale.png there")
    parser.add_argument("--images", type=Path, metavar="DIR", help="JPEGs to copy: CLASS/*.jpg")
    parser.add_argument("--quick", action="store_true", help="a minute; other limits")
    args = parser.parse_args()
    print(describe_setting())
    limits, sizes = (QUICK, QUICK_SIZES) if args.quick else (FULL, SIZES)
    with tempfile.TemporaryDirectory() as name:
        work = Work(Path(name), args.images, sizes)
        points = []
        for command in COMMANDS:
            for processes in (1, 2):
                if args.quick and command != "infer" and processes == 2:
                    continue
                for size in work.sizes(command):
                    points.append(work.measure(command, size, processes))
                    print(_line(points[-1]), flush=True)
        loop = compare_loop(work, rounds=8 if args.quick else 60, wanted=limits.loop)
    print(loop.to_text())
    missed = [*judge(points, limits), *([] if loop.passed else [loop.to_text()])]
    print("\n".join(missed) if missed else f"all within {limits}")
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        report = {**describe_setting(), "points": [asdict(p) for p in points], "loop": asdict(loop)}
        (args.out / "scale.json").write_text(json.dumps(report, indent=1) + "\n")
        draw(points, args.out / "scale.png")
    shown = (f"{c} {linearity(_of(points, c)):.2f} and {_flat(points, c):.2f}" for c in COMMANDS)
    print(
        f"scale, linear and flat: {', '.join(shown)}; infer {loop.ratio:.1%} of a bare loop: "
        f"{'MISSED' if missed else 'kept'}"
    )
    return int(bool(missed))


class Work:
    """Images, a checkpoint and bundles in a folder; what is needed twice is made once."""

    def __init__(self, folder: Path, images: Path | None, sizes: Sequence[int]) -> None:
        self.folder, self._sizes = folder, sizes
        made = {size for command in COMMANDS for size in self.sizes(command)}
        maker = [sys.executable, str(Path(__file__).with_name("scale_images.py")), str(folder)]
        source = [] if images is None else [str(images)]
        numbers = ",".join(str(size) for size in sorted(made))
        subprocess.run([*maker, numbers, *source], check=True)

    def sizes(self, command: str) -> list[int]:
        """The numbers of images that a command is run on."""
        if command == "infer":
            return list(self._sizes)
        most = MOST_SAMPLE if command == "verify" else self._sizes[-1]
        return sorted({min(max(size, LEAST_EXPORT), most) for size in self._sizes})

    def images(self, size: int) -> str:
        """The folder of so many images."""
        return str(self.folder / f"images-{size}")

    def measure(self, command: str, size: int, processes: int) -> Point:
        """Run a command, on so many images in all."""
        if command == "infer":
            commands = [self._infer(size, i, processes) for i in range(processes)]
        elif command == "verify":
            commands = [["verify", str(self.bundle(size))]] * processes
        else:
            outs = [self.folder / f"{size}-{i}.bundle" for i in range(processes)]
            commands = [self._export(size, out) for out in outs]
        found = run([[sys.executable, "-c", EDGEREG, *arguments] for arguments in commands])
        assert_its_own(found[2])
        return Point(command, size if command == "infer" else size * processes, processes, *found)

    def bundle(self, sample: int) -> Path:
        """A bundle whose labelled sample has so many images."""
        path = self.folder / f"{sample}-0.bundle"
        if not path.exists():
            run([[sys.executable, "-c", EDGEREG, *self._export(sample, path)]])
        return path

    def _export(self, size: int, out: Path) -> list[str]:
        checkpoint, sample = str(self.folder / "checkpoint"), str(min(size, MOST_SAMPLE))
        options = ["--target", "onnxruntime-x86", "--holdout", sample, "--force"]
        return ["export", checkpoint, "--data", self.images(size), "--out", str(out), *options]

    def _infer(self, size: int, part: int, parts: int) -> list[str]:
        folders = sorted(Path(self.images(size)).iterdir())[part::parts]  # one a class
        return ["infer", str(self.bundle(LEAST_EXPORT)), *map(str, folders), "--top-k", "1"]


def compare_loop(work: Work, *, rounds: int, wanted: float) -> Row:
    """Time infer's own functions, and a bare loop, on the same images in turns.

    The row's ratio is the loop's time / infer's: the share of the loop's speed that infer reaches.
    """
    bundle = open_bundle(work.bundle(LEAST_EXPORT))
    runner, spec = OrtRunner(bundle, "fp32", 1), bundle.manifest.preprocessing
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    model = bundle.read(bundle.manifest.variants["fp32"].file)
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    name = bundle.manifest.inputs[0].name
    paths = sorted(Path(work.images(work.sizes("infer")[-1])).rglob("*.jpg"))

    def ours(piece: Sequence[Path]) -> list[str]:
        frames = read_sources([str(path) for path in piece], spec)
        said = answer(bundle, runner, frames, top_k_count=1)
        return [result[1].top[0][0] for result in said]  # type: ignore[index,union-attr]

    def bare(piece: Sequence[Path]) -> list[str]:
        labels = []
        for path in piece:
            x = preprocess([decode(path.read_bytes(), name=path.name)], spec)
            labels.append(bundle.labels[int(np.argmax(session.run(None, {name: x})[0]))])
        return labels

    seconds: dict[str, list[float]] = {"ours": [], "bare": []}
    for place in range(rounds + 1):
        piece = [paths[(place * PIECE + i) % len(paths)] for i in range(PIECE)]
        answers = []
        for key, loop in (("ours", ours), ("bare", bare)):
            began = time.perf_counter()
            answers.append(loop(piece))
            if place:  # the first is a warm-up
                seconds[key].append(time.perf_counter() - began)
        if answers[0] != answers[1]:
            raise SystemExit("error: the two do not answer the same")
    title = f"infer's images/s / a bare loop's, our CNN, pieces of {PIECE}"
    return row_of(title, seconds["ours"], seconds["bare"], wanted=wanted)


def draw(points: Sequence[Point], path: Path) -> None:
    """Draw seconds and memory over the number of images."""
    from edgereg.report.figure import COLOURS, figure_of

    figure, axes = figure_of(height=3.6)
    memory = axes.twinx()
    for command, colour in zip(COMMANDS, COLOURS[1:], strict=True):
        some = _of(points, command)
        counts = [point.images for point in some]
        axes.loglog(counts, [p.cpu_s for p in some], "o-", color=colour, label=command)
        memory.plot(counts, [p.megabytes for p in some], "--", color=colour)
    axes.set(xlabel="images", ylabel="processor's seconds (lines)")
    memory.set(ylabel="MB at most (dashed)", ylim=(0, None))
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def _of(points: Sequence[Point], command: str) -> list[Point]:
    return [point for point in points if (point.command, point.processes) == (command, 1)]


def _flat(points: Sequence[Point], command: str) -> float:
    some = _of(points, command)
    return some[-1].megabytes / some[-2].megabytes


def _line(point: Point) -> str:
    return (
        f"{point.command:7} {point.images:6,} images, {point.processes} process"
        f"{'es' * (point.processes > 1)}: {point.seconds:.2f} s, cpu {point.cpu_s:.2f} s, "
        f"{point.megabytes:.0f} MB"
    )


if __name__ == "__main__":
    sys.exit(main())
