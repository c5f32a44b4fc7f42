"""What each technique is worth, alone and together, on emoji-10 and Fashion-MNIST.

    python benchmarks/regularization.py --out results/regularization --fashion DIR
    python benchmarks/regularization.py --out /tmp/quick --quick

DIR holds Fashion-MNIST's idx files (Debian's package dataset-fashion-mnist has them). Each run is
one file in --out and is not run again, so that the table may be collected over several sittings.
Two runs at a time, one thread each. Train accuracy stands beside the test accuracy: where a run
without regularization has not learnt its training set by heart (97 %), no gain is to be expected.

Gates of the full form: emoji-10's other vendor, best >= none + 15 points (mean of both
directions); Fashion-MNIST, best >= none + 2.5 points. --quick (one direction, one seed, 45 % of
the epochs) exits 1 where the best combination does not beat none at all.
"""

import argparse
import json
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from setting import describe_setting

# The worth of a technique depends on its strength; these were not tuned one by one.
TECHNIQUES: dict[str, dict[str, Any]] = {
    "none": {},
    "weight decay": {"optim": {"weight_decay": 0.05}},
    "l2 penalty": {"optim": {"weight_decay": 5.0e-4, "decay": "l2"}},
    "dropout": {"regularize": [{"dropout": {"rate": 0.3, "where": "head"}}]},
    "spatial dropout": {"regularize": [{"spatial_dropout": {"rate": 0.1, "where": "stages"}}]},
    "DropBlock": {"regularize": [{"drop_block": {"rate": 0.1, "block": 3, "where": "stages"}}]},
    "stochastic depth": {"regularize": [{"stochastic_depth": {"rate": 0.2, "where": "residual"}}]},
    "label smoothing": {"label_smoothing": 0.1},
    "EMA of weights": {"ema": {"decay": 0.99}},
    "SAM": {"sam": {"rho": 0.05}},
    "flip": {"augment": [{"flip": {}}]},
    "geometric": {
        "augment": [
            {"flip": {}},
            {"affine": {"degrees": 10, "scale": [0.9, 1.15], "translate": 0.08, "shear": 5}},
        ]
    },
    "RGB shift": {"augment": [{"rgb_shift": {"shift": 0.3, "gain": 0.5}}]},
    "colour jitter": {
        "augment": [{"colour_jitter": {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4}}]
    },
    "random erasing": {"augment": [{"random_erasing": {"probability": 0.5}}]},
    "Cutout": {"augment": [{"cutout": {"size": 12}}]},
    "RandAugment": {"augment": [{"rand_augment": {}}]},
    "TrivialAugment": {"augment": [{"trivial_augment": {}}]},
    "Mixup": {"mix": {"mixup": 0.2}},
    "CutMix": {"mix": {"cutmix": 1.0, "probability": 0.5}},
}
GEOMETRIC = TECHNIQUES["geometric"]["augment"]
BEST = {
    "emoji": {
        "label_smoothing": 0.05,
        "optim": {"weight_decay": 0.05},
        "regularize": [{"dropout": {"rate": 0.1, "where": "head"}}],
        "augment": [
            *GEOMETRIC,
            {"rgb_shift": {"shift": 0.3, "gain": 0.5}},
            {"colour_jitter": {"brightness": 0.2, "contrast": 0.3, "saturation": 0.5}},
            {"cutout": {"size": 8, "probability": 0.25}},
        ],
        "mix": {"mixup": 0.2, "cutmix": 1.0, "probability": 0.2},
    },
    "fashion": {
        "optim": {"weight_decay": 0.05},
        "augment": [{"flip": {}}, {"rand_augment": {}}, {"random_erasing": {"probability": 0.25}}],
    },
}
# epochs: enough for a net without regularization to learn its training set by heart
TASKS: dict[str, dict[str, Any]] = {
    "emoji twitter": {"kind": "emoji", "epochs": 40, "batch_size": 64, "optim": {"lr": 6e-3}},
    "emoji google": {"kind": "emoji", "epochs": 40, "batch_size": 64, "optim": {"lr": 6e-3}},
    "fashion 1000": {"kind": "fashion", "epochs": 90, "batch_size": 128, "optim": {"lr": 6e-3}},
}
WANTED = {"emoji": 15.0, "fashion": 2.5}


def main() -> int:
    """Run what is missing, write the table, and judge it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--fashion", type=Path, help="folder of Fashion-MNIST's idx files")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=1e9, help="start no run after so long")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.quick:
        jobs = [("emoji twitter", name, 0, 0.45) for name in ("none", "best")]
    else:
        tasks = [t for t in TASKS if args.fashion is not None or t != "fashion 1000"]
        jobs = [
            (task, name, seed, 1.0)
            for seed in range(args.seeds)
            for name in ("none", "best", *[n for n in TECHNIQUES if n != "none"])
            for task in tasks
        ]
    _run_all(jobs, args)
    rows = _rows(args.out)
    (args.out / "results.json").write_text(
        json.dumps({**describe_setting(), "rows": rows}, indent=1) + "\n"
    )
    (args.out / "results.md").write_text(_table(rows))
    print(_table(rows))
    if not args.quick:
        _plot(rows, args.out / "results.png")
    return _judge(rows, quick=args.quick)


def _run_all(jobs: list[tuple[str, str, int, float]], args: argparse.Namespace) -> None:
    until = time.monotonic() + 60 * args.minutes
    missing = [job for job in jobs if not _result_path(args.out, *job[:3]).exists()]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.jobs, mp_context=context) as pool:
        arguments = [(*job, args.out, args.fashion, until) for job in missing]
        for number, line in enumerate(pool.map(_run, arguments), start=1):
            print(f"{number}/{len(missing)} {line}", file=sys.stderr, flush=True)


def _run(job: tuple[str, str, int, float, Path, Path | None, float]) -> str:
    """Train once and write the result; this is a child process."""
    task, name, seed, share, out, fashion, until = job
    if time.monotonic() > until:
        return f"{task} {name} {seed}: left for the next sitting"
    import torch

    from edgereg.data.images import FewLabels, open_images
    from edgereg.recipe import recipe_from_json
    from edgereg.train.prepared import RunOptions
    from edgereg.train.run import eval_run, train_run

    torch.set_num_threads(1)
    setting = TASKS[task]
    kind = setting["kind"]
    technique = BEST[kind] if name == "best" else TECHNIQUES[name]
    base = {
        "seed": seed,
        "epochs": max(1, round(setting["epochs"] * share)),
        "batch_size": setting["batch_size"],
        "compute": {"precision": "bf16"},
        "model": {"name": "resnet", "image_size": 28 if kind == "fashion" else 32},
    }
    # AdamW's own default of the recipe is a technique: "none" has none of it
    optim = {**setting["optim"], "weight_decay": 0.0, **technique.get("optim", {})}
    recipe = recipe_from_json({**base, **technique, "optim": optim})
    if kind == "emoji":
        vendor = task.partition(" ")[2]
        other = {"twitter": "google", "google": "twitter"}[vendor]
        images = open_images(f"emoji-10:{vendor}:train")
        tests = {"other": f"emoji-10:{other}:test", "same": f"emoji-10:{vendor}:test"}
    else:
        full = open_images(f"idx:{fashion}:train")
        images = FewLabels(full, 1000 / len(full), seed=seed)
        tests = {"other": f"idx:{fashion}:test"}
    checkpoint = out / "checkpoints" / f"{task} {name} {seed}".replace(" ", "-")
    started = time.perf_counter()
    run = train_run(images, checkpoint, recipe, bar=_no_bar, options=RunOptions(resume=True))
    seconds = time.perf_counter() - started
    result = {
        "task": task,
        "technique": name,
        "seed": seed,
        "train": run.checkpoint.metrics["train"]["top1"],
        "seconds": seconds,
    }
    for key, data in tests.items():
        _, measured = eval_run(checkpoint, open_images(data), bar=_no_bar)
        result[key], result[f"{key}_count"] = measured.top1, measured.count
    path = _result_path(out, task, name, seed)
    path.with_suffix(".part").write_text(json.dumps(result))
    path.with_suffix(".part").rename(path)
    return f"{task} {name} {seed}: {result['other']:.1%} in {seconds:.0f} s"


def _result_path(out: Path, task: str, name: str, seed: int) -> Path:
    return out / f"run {task} {name} {seed}.json".replace(" ", "-")


def _rows(out: Path) -> list[dict[str, Any]]:
    """Return mean and spread of each technique on each task."""
    runs = [json.loads(path.read_text()) for path in sorted(out.glob("run-*.json"))]
    rows = []
    for task in TASKS:
        for name in (*TECHNIQUES, "best"):
            found = [r for r in runs if r["task"] == task and r["technique"] == name]
            if not found:
                continue
            other = [100 * r["other"] for r in found]
            rows.append(
                {
                    "task": task,
                    "technique": name,
                    "seeds": len(found),
                    "test": mean(other),
                    "spread": stdev(other) if len(other) > 1 else None,
                    "same": 100 * mean(r["same"] for r in found) if "same" in found[0] else None,
                    "train": 100 * mean(r["train"] for r in found),
                    "n": found[0]["other_count"],
                    "seconds": mean(r["seconds"] for r in found),
                }
            )
    return rows


def _table(rows: list[dict[str, Any]]) -> str:
    lines = []
    for task in TASKS:
        chosen = [row for row in rows if row["task"] == task]
        if not chosen:
            continue
        none = next(row["test"] for row in chosen if row["technique"] == "none")
        lines += [
            f"### {task}",
            "",
            "| technique | test | gain | spread | same vendor | train | seeds | n |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in sorted(chosen, key=lambda row: -row["test"]):
            spread = "-" if row["spread"] is None else f"{row['spread']:.1f}"
            same = "-" if row["same"] is None else f"{row['same']:.1f}"
            lines.append(
                f"| {row['technique']} | {row['test']:.1f} | {row['test'] - none:+.1f} | {spread} "
                f"| {same} | {row['train']:.1f} | {row['seeds']} | {row['n']} |"
            )
        lines.append("")
    return "\n".join(lines)


def _judge(rows: list[dict[str, Any]], *, quick: bool) -> int:
    """Print the gains of the best combination, and return 1 where one falls short."""
    gains: dict[str, list[float]] = {"emoji": [], "fashion": []}
    for task, setting in TASKS.items():
        by_name = {row["technique"]: row["test"] for row in rows if row["task"] == task}
        if {"none", "best"} <= by_name.keys():
            gains[setting["kind"]].append(by_name["best"] - by_name["none"])
    short, said = False, []
    for kind, values in gains.items():
        if values:
            wanted = 0.0 if quick else WANTED[kind]
            short |= mean(values) < wanted
            said.append(f"{kind}: best - none = {mean(values):+.1f} points (wanted {wanted:+.1f})")
    print("; ".join(said))
    return int(short)


def _plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tasks = [task for task in TASKS if any(row["task"] == task for row in rows)]
    figure, axes = pyplot.subplots(1, len(tasks), figsize=(5 * len(tasks), 7), squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=True):
        chosen = sorted((r for r in rows if r["task"] == task), key=lambda row: row["test"])
        none = next(row["test"] for row in chosen if row["technique"] == "none")
        colours = ["#888" if r["technique"] == "none" else "#2b6cb0" for r in chosen]
        names = [row["technique"] for row in chosen]
        spread = [row["spread"] or 0 for row in chosen]
        axis.barh(names, [r["test"] - none for r in chosen], xerr=spread, color=colours)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_title(f"{task}: none = {none:.1f} %")
        axis.set_xlabel("gain in top-1, points (bar: standard deviation)")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


@contextmanager
def _no_bar(description: str, total: int) -> Any:
    yield lambda done, text: None


if __name__ == "__main__":
    sys.exit(main())
