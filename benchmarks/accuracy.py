"""Train on a full data set within a time, test once, and take the model down the road.

    python benchmarks/accuracy.py cifar10 --data DIR --out OUT     3 seeds, at most 20 minutes each
    python benchmarks/accuracy.py fashion-mnist --data DIR --out OUT       at most 60 minutes

DIR holds CIFAR-10 as train/CLASS/*.jpg and test/CLASS/*.jpg, or Fashion-MNIST's idx files. The
recipes are recipes/cifar10.yaml and recipes/fashion-mnist.yaml; they were chosen on a part of the
training set (--choose trains on nine tenths and measures the last tenth, and never opens the test
set). The full form trains on all of it, measures the test set once, single forward pass, exports,
verifies, and compares the bundle's answers with the checkpoint's. A finished seed is not trained
again, and one that was stopped goes on. The minutes are half of one processor's: other jobs do not
count, and on two idle cores with --threads 2 the clock shows as many.

Gates: mean test top-1 >= 92 % (CIFAR-10), error <= 5.0 % (Fashion-MNIST); training time; parity.
--quick (one seed, 2 % of the epochs' steps) only has to beat 30 %, and to be verified.
"""

import argparse
import dataclasses
import json
import math
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from setting import describe_setting

RECIPES = Path(__file__).parent.parent / "recipes"
PARTS = ("train", "test")
_CORES = 2


@dataclass(frozen=True)
class Task:
    """A data set, and what is wanted of it."""

    data: str
    seeds: int
    minutes: float  # of two cores
    wanted: float


TASKS = {
    "cifar10": Task("{root}/{part}", 3, 20.0, 0.92),
    "fashion-mnist": Task("idx:{root}:{part}", 1, 60.0, 0.95),
}


def main() -> int:
    """Train, test, export, verify, judge."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--choose", action="store_true", help="measure a part of the training set")
    parser.add_argument("--quick", action="store_true")
    args, flags = parser.parse_known_args()
    task = TASKS[args.task]
    seeds = 1 if args.quick else args.seeds or task.seeds
    results = [_run(args, flags, seed) for seed in range(seeds)]
    top1 = mean(result["top1"] for result in results)
    minutes = max(result["core_minutes"] for result in results) / _CORES
    passed = all(result["verified"] for result in results)
    if args.quick:
        passed = passed and top1 > 0.3
    elif not args.choose:
        passed = passed and top1 >= task.wanted and minutes <= task.minutes
        report = {**describe_setting(), "task": args.task, "results": results}
        (args.out / "results.json").write_text(json.dumps(report, indent=1) + "\n")
    print(
        f"{args.task}: top-1 {top1:.2%} over {seeds} seeds (wanted {task.wanted:.0%}), at most "
        f"{minutes:.1f} minutes of {_CORES} cores (wanted {task.minutes:.0f}), "
        f"n = {results[0]['count']}"
    )
    return 0 if passed else 1


def _run(args: argparse.Namespace, flags: list[str], seed: int) -> dict[str, Any]:
    import torch

    from edgereg.data.images import open_images, split_validation
    from edgereg.progress import progress
    from edgereg.recipe import load_recipe
    from edgereg.train.prepared import RunOptions
    from edgereg.train.run import eval_run, train_run

    torch.set_num_threads(args.threads)
    recipe = load_recipe(RECIPES / f"{args.task}.yaml", ["--seed", str(seed), *flags])
    if args.quick:
        recipe = dataclasses.replace(recipe, epochs=max(1, round(0.02 * recipe.epochs)))
    images, test = (
        open_images(TASKS[args.task].data.format(root=args.data, part=part)) for part in PARTS
    )
    if args.choose:
        images, test = split_validation(images, 0.1, seed=0)
    out = args.out / f"seed{seed}"
    run = train_run(
        images,
        out,
        recipe,
        bar=progress,
        val=test if args.choose else None,
        options=RunOptions(resume=True),
    )
    _, measured = eval_run(out, test, bar=progress)
    result = {
        "seed": seed,
        "top1": measured.top1,
        "count": measured.count,
        "train": run.checkpoint.metrics["train"]["top1"],
        **_minutes(args.out / f"seed{seed}.run" / "log.jsonl"),
    }
    result |= {"verified": True} if args.choose else _ship(out, test, args.out, seed)
    print(json.dumps(result), flush=True)
    return result


def _minutes(log: Path) -> dict[str, float]:
    """Return minutes and one processor's minutes of all epochs, over all sittings."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    starts = [i for i, line in enumerate(lines) if line["event"] in ("start", "resume")]
    spans = list(zip(starts, [*starts[1:], len(lines)], strict=True))
    return {
        name: sum(lines[end - 1][key] - lines[begin][key] for begin, end in spans) / 60
        for name, key in (("minutes", "time_s"), ("core_minutes", "cpu_s"))
    }


def _ship(checkpoint: Path, test: Any, out: Path, seed: int) -> dict[str, Any]:
    """Export for a Jetson, verify the bundle here, and measure its accuracy."""
    from deploy.commands import add_commands
    from edgereg.ship import ship

    bundle = out / f"seed{seed}.bundle"
    shipped = ship(checkpoint, test, bundle, target="jetpack6.2", force=True)
    parser = argparse.ArgumentParser()
    add_commands(parser.add_subparsers())
    verify = parser.parse_args(["verify", str(bundle)])
    with redirect_stdout(sys.stderr):
        verified = verify.handler(verify) == 0
    variant = shipped.variants["fp32"]
    verdict, paired = variant.conformance.verdict, variant.paired
    return {
        "verified": verified and verdict in ("accepted", "not judged"),
        "verdict": verdict,
        "bundle_top1": math.nan if paired is None else paired.top1,
        "bundle_count": 0 if paired is None else paired.count,
        "scaled_error": variant.comparison.max_scaled_error,
    }


if __name__ == "__main__":
    sys.exit(main())
