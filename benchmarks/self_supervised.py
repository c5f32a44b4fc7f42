"""What pre-training without labels is worth: kNN, few labels, another vendor's drawings.

    python benchmarks/self_supervised.py --cifar DIR --out OUT
    python benchmarks/self_supervised.py --out /tmp/quick --quick

DIR holds CIFAR-10 as train/CLASS/*.jpg and test/CLASS/*.jpg. The parts, which --only picks from:

    methods   every method on our ResNet, three on our transformer; kNN on all test images, by all
              training images, beside the same net with random weights
    labels    a tenth of CIFAR-10's labels: the net from scratch, and from the best method, which
              was given three times the epochs; 3 seeds of the labels and of the fine-tuning
    emoji     pre-trained on both vendors' training glyphs, then a tenth of one vendor's labels;
              the other vendor's held-out glyphs; 3 seeds, both directions
    lightly   one step of simclr and vicreg against lightly's losses, interleaved; lightly is put
              into --out without its dependencies

A run that is finished is not run again, so that the figures may be collected over several sittings.
Two runs at a time, one thread each. "minutes" is the processor's time of a pre-training, all that
it needs included; a teacher's is added to its student's.

Gates of the full form: kNN over random weights, pirl, simclr, vicreg, lejepa >= 10 points,
colorization >= 5, distill >= 12, each within 40 minutes of one processor, which are 20 of two; a
tenth of the labels, each start at its best rate, >= 3 points; emoji > 0; lightly: the interval of
the ratio reaches 1.0, the point is within 2 %. --quick (emoji alone, two methods, a few epochs)
exits 1 where simclr's neighbours are not better than random weights'.
"""

import argparse
import json
import math
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from pretrained import Job, run
from setting import describe_setting

METHODS = ("pirl", "simclr", "vicreg", "lejepa", "colorization", "distill")
FINE_TUNED = ("vicreg",)  # the best by its neighbours
ON_VIT = ("pirl", "simclr", "lejepa")
WANTED = dict.fromkeys(METHODS, 10.0) | {"colorization": 5.0, "distill": 12.0}
MINUTES, LABELS = 40.0, 3.0
PARTS = ("methods", "labels", "emoji", "lightly")
TUNING = {"labels": "each at its best rate", "recipe": "as recipes/train.yaml has it"}


def main() -> int:
    """Run what is missing, write the table, and judge it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cifar", type=Path, help="folder of CIFAR-10's images")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, such as methods,emoji")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=1e9, help="start no run after so long")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    parts = ("quick",) if args.quick else tuple(args.only.split(","))
    if args.cifar is None:
        parts = tuple(part for part in parts if part not in ("methods", "labels"))
    until = time.monotonic() + 60 * args.minutes
    for wave in _waves(parts, args):
        _run_all(wave, args, until)
    results = [json.loads(path.read_text()) for path in sorted(args.out.glob("run-*.json"))]
    lines, passed = _judge(results, parts)
    if "lightly" in parts:
        import torch
        from lightly_step import compare_with_lightly

        torch.set_num_threads(1)
        rows = compare_with_lightly(args.out / "lightly", rounds=101)
        lines += [row.to_text() for row in rows]
        passed = passed and all(row.low <= 1.0 and row.ratio <= 1.02 for row in rows)
    report = {**describe_setting(), "results": results, "text": lines}
    (args.out / "results.json").write_text(json.dumps(report, indent=1) + "\n")
    print("\n".join(lines))
    return 0 if passed else 1


def _waves(parts: tuple[str, ...], args: argparse.Namespace) -> list[list[Job]]:
    """Return the runs; those of a wave need only those of the waves before."""
    cifar = str(args.cifar)
    jobs: list[list[Job]] = [[], [], []]
    if "quick" in parts:
        jobs[0] += [Job("quick", "resnet", method, 0) for method in ("random", "simclr")]
    if "methods" in parts:
        jobs[0] += [Job("teacher", "resnet", "simclr", 0, cifar)]
        jobs[0] += [Job("methods", "resnet", m, 0, cifar) for m in METHODS if m != "distill"]
        jobs[0] += [Job("methods", "vit", m, 0, cifar) for m in ON_VIT]
        jobs[0] += [Job("methods", net, "random", 0, cifar) for net in ("resnet", "vit")]
        jobs[1] += [Job("methods", "resnet", "distill", 0, cifar)]
    if "labels" in parts:
        jobs[0] += [Job("longer", "resnet", m, 0, cifar) for m in FINE_TUNED]
        jobs[0] += [Job("methods", "resnet", "random", 0, cifar)]
        jobs[2] += [
            Job(part, "resnet", m, seed, cifar)
            for part in TUNING
            for seed in range(3)
            for m in (*FINE_TUNED, "random")
        ]
    if "emoji" in parts:
        jobs[0] += [Job("emoji", "resnet", "simclr", seed) for seed in range(3)]
    return jobs


def _run_all(jobs: list[Job], args: argparse.Namespace, until: float) -> None:
    missing = [job for job in dict.fromkeys(jobs) if not job.result(args.out).exists()]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.jobs, mp_context=context) as pool:
        arguments = [(job, args.out, until) for job in missing]
        for number, line in enumerate(pool.map(run, arguments), start=1):
            print(f"{number}/{len(missing)} {line}", file=sys.stderr, flush=True)


def _judge(results: list[dict[str, Any]], parts: tuple[str, ...]) -> tuple[list[str], bool]:
    """Return the tables, and whether the gates of what was to be run are passed."""
    by_part = {
        part: [r for r in results if r["part"] == part]
        for part in (*PARTS, *TUNING, "longer", "quick")
    }
    lines: list[str] = []
    passed = True
    if "methods" in parts:
        lines += [
            "| net | method | kNN top-1 | over random | wanted | minutes | linear probe | n |"
        ]
        lines += ["|---|---|---|---|---|---|---|---|"]
        for r in by_part["methods"]:
            gain = 100 * (r["knn"] - _random(by_part["methods"], r)["knn"])
            is_gated = r["net"] == "resnet" and r["method"] in WANTED
            if is_gated:
                passed &= gain >= WANTED[r["method"]] and r["minutes"] <= MINUTES
            wanted = f"+{WANTED[r['method']]:g}" if is_gated else "-"
            lines.append(
                f"| {r['net']} | {r['method']} | {r['knn']:.1%} | {gain:+.1f} | {wanted} | "
                f"{r['minutes']:.1f} | {r['linear']:.1%} | {r['count']:,} |"
            )
        found = {r["method"] for r in by_part["methods"] if r["net"] == "resnet"}
        passed &= found >= set(METHODS)
    if "labels" in parts:
        gains = {}
        for part, words in TUNING.items():
            tuned = {
                m: [r["top1"] for r in by_part[part] if r["method"] == m]
                for m in (*FINE_TUNED, "random")
            }
            scratch = tuned.pop("random")
            best = max(tuned, key=lambda method: _mean(tuned[method]))
            gains[part] = 100 * (_mean(tuned[best]) - _mean(scratch))
            lines.append(
                f"a tenth of the labels, {words}: from scratch {_shown(scratch)}, from {best} "
                f"{_shown(tuned[best])}: {gains[part]:+.1f} points"
                + (f" (wanted +{LABELS:g})" if part == "labels" else "")
            )
        minutes = max((r["minutes"] for r in by_part["longer"]), default=math.inf)
        lines.append(f"pre-training took at most {minutes:.1f} minutes (wanted {MINUTES:g})")
        passed &= gains["labels"] >= LABELS and minutes <= MINUTES
    if "emoji" in parts:
        gains = [100 * (r["from_encoder"] - r["from_scratch"]) for r in by_part["emoji"]]
        for r in by_part["emoji"]:
            lines.append(
                f"emoji-10, seed {r['seed']}, the other vendor, both directions: "
                f"{r['from_scratch']:.1%} from scratch, {r['from_encoder']:.1%} from {r['method']}"
            )
        lines.append(
            f"mean gain {mean(gains):+.1f} points over {len(gains)} seeds (wanted above 0)"
        )
        passed &= len(gains) == 3 and mean(gains) > 0
    if "quick" in parts:
        knn = {r["method"]: r["knn"] for r in by_part["quick"]}
        lines.append(f"emoji-10, kNN: random {knn['random']:.1%}, simclr {knn['simclr']:.1%}")
        passed &= knn["simclr"] > knn["random"]
    return lines, bool(passed)


def _random(results: list[dict[str, Any]], like: dict[str, Any]) -> dict[str, Any]:
    return next(r for r in results if r["net"] == like["net"] and r["method"] == "random")


def _mean(values: list[float]) -> float:
    """Return the mean; NaN, which passes no gate, where nothing was run yet."""
    return mean(values) if values else math.nan


def _shown(values: list[float]) -> str:
    spread = f" +- {100 * stdev(values):.1f}" if len(values) > 1 else ""
    return f"{_mean(values):.1%}{spread}, {len(values)} seeds"


if __name__ == "__main__":
    sys.exit(main())
