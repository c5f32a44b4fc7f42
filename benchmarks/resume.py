"""Kill a training run at random moments, resume it, and compare with the run that nobody killed.

    python benchmarks/resume.py              50 kills
    python benchmarks/resume.py --quick      2 kills

Each run uses EMA, mixing, dropout, stochastic depth and augmentation, on the CPU with one thread,
and writes a state as often as it can. The killed runs alternate between 0 and 2 workers. After
its kills a run is resumed to the end; weights, averages and the validation metrics of every epoch
must be those of the uninterrupted run, bit for bit. Exits 1 where one differs.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from setting import describe_setting

RECIPE = """
epochs: 12
batch_size: 32
label_smoothing: 0.1
optim: {name: adamw, lr: 3.0e-3, clip: 1.0}
augment:
  - flip: {}
  - affine: {degrees: 10, scale: [0.9, 1.1]}
  - rgb_shift: {}
  - cutout: {}
mix: {mixup: 0.2, cutmix: 1.0, probability: 0.8}
regularize:
  - dropout: {rate: 0.2, where: head}
  - stochastic_depth: {rate: 0.2, where: residual}
ema: {decay: 0.95}
"""
_TIMES = ("images_per_second", "time_s", "cpu_s")
EDGEREG = "import sys; from edgereg.cli import main; sys.exit(main())"


def main() -> int:
    """Kill, resume, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    if args.quick:
        args.kills = 2
    moments = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        (root / "recipe.yaml").write_text(RECIPE)
        if _start(root, "whole", workers=0).wait() != 0:
            raise SystemExit("the uninterrupted run failed")
        seconds = _events(root, "whole")[-1]["time_s"]
        wanted, kills, identical, run = _outcome(root, "whole"), 0, 0, 0
        while kills < args.kills:
            workers, name = 2 * (run % 2), f"killed{run}"
            done = _kill_often(root, name, args.kills - kills, seconds, moments, workers)
            same = _outcome(root, name) == wanted
            kills, identical, run = kills + done, identical + same * done, run + 1
            print(f"{workers} workers: {done} kills, {'identical' if same else 'DIFFERENT'}")
    if args.json is not None:
        result = {**describe_setting(), "kills": kills, "identical": identical}
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{identical} of {kills} kills bit-identical after the resume")
    return int(identical < kills or kills < args.kills)


def _start(root: Path, out: str, *, workers: int) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-c", EDGEREG, "train", "--recipe", "recipe.yaml", "--out", out]
    command += ["--data", "emoji-10:google:test", "--val", "emoji-10:twitter:test", "--resume"]
    command += ["--device", "cpu", "--threads", "1", "--workers", str(workers)]
    command += ["--snapshot-minutes", "0"]
    return subprocess.Popen(command, cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _kill_often(
    root: Path, out: str, most: int, seconds: float, moments: random.Random, workers: int
) -> int:
    """Kill a run at random moments until it ends by itself, and return how many kills it took.

    A moment lies within a quarter of the time that training takes, counted from the first sign
    of it; one in five lies before that sign, while the interpreter starts and the data is read.
    """
    done = 0
    while True:
        process = _start(root, out, workers=workers)
        if done == most:
            if process.wait() != 0:
                raise SystemExit(f"{out}: the last resume failed")
            return done
        lines = len(_events(root, out))
        is_early = moments.random() < 0.2
        while not is_early and process.poll() is None and len(_events(root, out)) <= lines:
            time.sleep(0.01)
        try:
            process.wait(timeout=moments.uniform(0, 4 if is_early else seconds / 4))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            done += 1
            continue
        if process.returncode != 0:
            raise SystemExit(f"{out}: a resume failed")
        return done


def _events(root: Path, out: str) -> list[dict[str, Any]]:
    """Return the lines of a log; a kill may leave half a line, which a resume cuts off."""
    log = root / f"{out}.run" / "log.jsonl"
    whole = log.read_text().rpartition("\n")[0] if log.exists() else ""
    return [json.loads(line) for line in whole.splitlines()]


def _outcome(root: Path, out: str) -> tuple[bytes, Any, Any]:
    """Return the weights (EMA's), the metrics, and each epoch of the log without its times."""
    metrics = json.loads((root / out / "checkpoint.json").read_text())["metrics"]
    epochs = [
        {key: value for key, value in line.items() if key not in _TIMES}
        for line in _events(root, out)
        if line["event"] == "epoch"
    ]
    return (root / out / "model.safetensors").read_bytes(), metrics, epochs


if __name__ == "__main__":
    sys.exit(main())
