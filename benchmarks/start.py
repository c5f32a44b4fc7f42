"""From the start of a process to its first answer: `edgereg infer` beside ten lines of Python.

    python benchmarks/start.py            our CNN at 32 px, ResNet-18 at 224 px; 31 rounds
    python benchmarks/start.py --quick    our CNN, 7 rounds

The bundle has been run on this machine before. Both sides answer the same JPEG with the same model
on one thread, in new processes that take turns; the disk's cache is warm, and so are the byte codes
of both. *Time* is from the start of the process to the first line that it prints, a ratio per
round; *memory* is the most that the process, or a child of it, has had resident. *cpu* is the
processor's time of the whole process, which other jobs disturb less. The very first start, which
loads the model in a child before, is timed apart.

The full form fails (exit 1) where the median ratio is above 1.15 or the memory above the script's
by more than 15 MB; --quick where it is above 2.0, or by more than 40 MB.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from setting import describe_setting
from timing import Row, row_of

from deploy.bundle.read import open_bundle

BARE = """\
import sys
import numpy as np, onnxruntime as ort
from PIL import Image
options = ort.SessionOptions()
options.intra_op_num_threads = options.inter_op_num_threads = 1
session = ort.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
size = session.get_inputs()[0].shape[2:]
image = np.asarray(Image.open(sys.argv[2]).convert("RGB").resize(size, Image.BILINEAR), np.float32)
mean, std = (np.array(eval(text), np.float32) for text in sys.argv[3:5])
x = np.ascontiguousarray(((image / 255 - mean) / std).transpose(2, 0, 1)[None])
answer = session.run(None, {session.get_inputs()[0].name: x})[0]
print(sys.argv[5].split(",")[answer.argmax()], flush=True)
"""
EDGEREG = "import sys; from edgereg.cli import main; sys.exit(main())"
MODELS = {"our CNN": ("convnet", 32), "ResNet-18": ("torchvision:resnet18", 224)}
WANTED, QUICK = (1.15, 15.0), (2.0, 40.0)


@dataclass(frozen=True)
class Start:
    """One process: what it answered, when, and what it took."""

    answer: str
    seconds: float
    cpu_s: float
    megabytes: float


@dataclass(frozen=True)
class Case:
    """A model's starts: times as a row, the medians of the memory, what else was found."""

    row: Row
    cpu_ratio: float
    bare_megabytes: float
    megabytes: float
    most_megabytes: float
    first_s: float
    first_megabytes: float

    @property
    def passed(self) -> bool:
        """Whether time and memory are as wanted."""
        return self.row.passed and self.added_megabytes <= self.most_megabytes

    @property
    def added_megabytes(self) -> float:
        """By how much the memory is above the script's."""
        return self.megabytes - self.bare_megabytes

    def to_text(self) -> str:
        """Return the case as lines."""
        return (
            f"{self.row.to_text()}\n  cpu {self.cpu_ratio:.2f}x; {self.bare_megabytes:.0f} MB and "
            f"{self.megabytes:.0f} MB, {self.added_megabytes:+.1f}; wanted <= "
            f"{self.most_megabytes:+g}\n  the very first start: {self.first_s:.2f} s, "
            f"{self.first_megabytes:.0f} MB"
        )


def start(command: Sequence[str], environment: dict[str, str]) -> Start:
    """Start a process and wait for its first line, and then for its end."""
    began = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)
    assert child.stdout is not None
    line = child.stdout.readline()
    seconds = time.perf_counter() - began
    child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)  # or Popen would wait for it again
    child.stdout.close()
    if child.returncode or not line:
        raise SystemExit(f"error: {command[1]} ended with {child.returncode}, and said {line!r}")
    cpu_s = usage.ru_utime + usage.ru_stime
    return Start(line.decode().strip(), seconds, cpu_s, usage.ru_maxrss / 1024)


def measure(
    name: str,
    commands: tuple[Sequence[str], Sequence[str]],
    environment: dict[str, str],
    *,
    rounds: int,
    wanted: tuple[float, float],
) -> Case:
    """Start the script and edgereg in turns, after one start each that is not counted."""
    bare, ours = commands
    first = start(ours, environment)
    start(ours, environment)  # the byte codes of what the first one did not need
    label = start(bare, environment).answer
    ones, others = [], []
    for _ in range(rounds):
        ones.append(start(bare, environment))
        others.append(start(ours, environment))
    wrong = [other.answer for other in others if f"  {label} " not in f"{other.answer} "]
    if wrong:
        raise SystemExit(f"error: {name}: the script says {label}, edgereg {wrong[0]}")
    row = row_of(
        f"{name}: start of edgereg infer / of a script",
        [one.seconds for one in ones],
        [other.seconds for other in others],
        wanted=wanted[0],
        is_limit=True,
    )
    return Case(
        row,
        statistics.median(b.cpu_s / a.cpu_s for a, b in zip(ones, others, strict=True)),
        statistics.median(one.megabytes for one in ones),
        statistics.median(other.megabytes for other in others),
        wanted[1],
        first.seconds,
        first.megabytes,
    )


def main() -> int:
    """Measure, print, and judge."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--quick", action="store_true", help="a minute; our CNN, other limits")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    args = parser.parse_args()
    print(describe_setting())
    cases = []
    for name in list(MODELS)[: 1 if args.quick else None]:
        with tempfile.TemporaryDirectory() as folder:
            rounds = 7 if args.quick else args.rounds
            wanted = QUICK if args.quick else WANTED
            cases.append(_case(name, Path(folder), rounds=rounds, wanted=wanted))
        print(cases[-1].to_text(), flush=True)
    if args.json:
        report = {**describe_setting(), "cases": [asdict(case) for case in cases]}
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    figures = (f"{case.row.ratio:.2f}x, {case.added_megabytes:+.1f} MB" for case in cases)
    shown = "; ".join(f"{name} {text}" for name, text in zip(MODELS, figures, strict=False))
    passed = all(case.passed for case in cases)
    print(f"start against a script on ONNX Runtime: {shown}: {'kept' if passed else 'MISSED'}")
    return 0 if passed else 1


def _case(name: str, folder: Path, *, rounds: int, wanted: tuple[float, float]) -> Case:
    model, size = MODELS[name]
    # in a child: a process that is started here is counted with at least the memory of this one
    maker = [sys.executable, str(Path(__file__).with_name("untrained.py"))]
    subprocess.run([*maker, str(folder / "net"), model, str(size), "100"], check=True)
    bundle = open_bundle(folder / "net/b.bundle")
    (folder / "bare.py").write_text(BARE)
    image = str(next((folder / "net/images").rglob("*.jpg")))
    spec = bundle.manifest.preprocessing
    file = str(bundle.path / bundle.manifest.variants["fp32"].file)
    texts = [str(list(spec.mean)), str(list(spec.std)), ",".join(bundle.labels)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    environment |= {"PYTHONPYCACHEPREFIX": str(folder / "pyc"), "EDGEREG_CACHE": str(folder / "c")}
    return measure(
        name,
        (
            [sys.executable, str(folder / "bare.py"), file, image, *texts],
            [sys.executable, "-c", EDGEREG, "infer", str(bundle.path), image],
        ),
        environment,
        rounds=rounds,
        wanted=wanted,
    )


if __name__ == "__main__":
    sys.exit(main())
