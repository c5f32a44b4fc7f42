"""A training step with the whole suite, beside torchvision's pipeline and timm's, in turns.

    python benchmarks/training.py --out OUT    our small ResNet at 32 px, ResNet-18 at 224 px
    python benchmarks/training.py --quick      our small ResNet, torchvision alone, fewer rounds

One thread. training_peers.py has the three steps: the same net, images, batch, augmentation, mixing
and average. Peers that are missing are installed into OUT, never as a dependency of the product;
one that fails is shown with its error. Rows:

    peer / ours       above 1 the peer's step takes longer
    suite / plain     what the suite adds to our step
    ours / lightly's  one step of simclr and vicreg (lightly_step.py)
    growth            what an image costs, by image size, batch and size of the data set

The full form fails (exit 1) where a peer's step takes less than 0.98 times ours, where the suite
adds more than 25 % at 32 px or 10 % at 224, or where a step of ours takes more than 1.02 times
lightly's; growth is reported, but an image of the largest data set may cost 1.1 times that of the
smallest; so does it where a peer fails. --quick fails where torchvision's step takes less than 0.7
times ours, or fails, or the suite adds more than 60 %.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from setting import describe_setting
from timing import Row, compare, in_turns
from training_peers import PEERS, ours, ours_plain

from edgereg.models.zoo import ModelConfig

CASES = {
    "small ResNet 32x32": (ModelConfig(), 128, 61, 1.25),
    "ResNet-18 224x224": (ModelConfig("torchvision:resnet18", image_size=224), 32, 11, 1.10),
}
FULL_PEER = 0.98  # as of latency.py: within 2 % is no slower
QUICK_PEER, QUICK_SUITE, QUICK_ROUNDS = 0.7, 1.6, 5
GROWTH_OF_DATA = 1.1
IMAGE_SIZES, BATCHES, DATA_SIZES = (32, 64, 96, 128), (16, 64, 128, 256), (1_000, 10_000, 50_000)


def compare_peers(name: str, *, folder: Path, quick: bool) -> tuple[list[Row], list[str]]:
    """Time our step against each peer's and against itself without the suite.

    Returns:
        The rows, and what failed.
    """
    config, batch, rounds, most = CASES[name]
    rounds = QUICK_ROUNDS if quick else rounds
    suite, plain = ours(config, batch), ours_plain(config, batch)
    _warm_up(suite, plain)
    limit = QUICK_SUITE if quick else most
    title = f"our step with the suite / without, {name}, batch {batch}"
    rows = [compare(title, plain, suite, rounds=rounds, wanted=limit, is_limit=True)]
    failed = []
    for peer in list(PEERS)[: 1 if quick else None]:
        try:
            theirs = PEERS[peer](config, batch, folder)
            _warm_up(theirs)
            title = f"{peer}'s step / ours, {name}, batch {batch}"
            wanted = QUICK_PEER if quick else FULL_PEER
            rows.append(compare(title, suite, theirs, rounds=rounds, wanted=wanted))
        except Exception as error:  # a peer's failure is a result
            failed.append(f"{peer}: failed: {type(error).__name__}: {error}")
            continue
        print(_speeds(rows[-1], batch), flush=True)
    return rows, failed


def grow(*, rounds: int) -> tuple[dict[str, dict[int, float]], Row]:
    """What an image costs in ms, by image size, batch and size of the data set, with the suite.

    Returns:
        The costs, and the largest data set's beside the smallest's.
    """
    steps = {
        "image size": {size: (ours(ModelConfig(image_size=size), 32), 32) for size in IMAGE_SIZES},
        "batch": {batch: (ours(ModelConfig(), batch), batch) for batch in BATCHES},
        "data set": {count: (ours(ModelConfig(), 128, count=count), 128) for count in DATA_SIZES},
    }
    costs: dict[str, dict[int, float]] = {}
    for name, by_value in steps.items():
        runs = [step for step, _ in by_value.values()]
        _warm_up(*runs)
        seconds = in_turns(runs, rounds)
        costs[name] = {
            value: 1e3 * statistics.median(times) / batch
            for (value, (_, batch)), times in zip(by_value.items(), seconds, strict=True)
        }
    least, most = (steps["data set"][size][0] for size in (DATA_SIZES[0], DATA_SIZES[-1]))
    title = f"a step on {DATA_SIZES[-1]:,} images / on {DATA_SIZES[0]:,}, batch 128"
    row = compare(title, least, most, rounds=rounds, wanted=GROWTH_OF_DATA, is_limit=True)
    return costs, row


def _warm_up(*steps: Callable[[], object]) -> None:
    for step in steps:
        step()


def _speeds(row: Row, batch: int) -> str:
    return (
        f"{row.name}: ours {batch / row.first_ms * 1e3:,.0f} images/s, "
        f"the peer {batch / row.second_ms * 1e3:,.0f}"
    )


def _growth_text(costs: dict[str, dict[int, float]]) -> list[str]:
    return [
        f"ms an image by {name}: " + ", ".join(f"{value:,}: {ms:.2f}" for value, ms in some.items())
        for name, some in costs.items()
    ]


def main() -> int:
    """Measure, print, and judge."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="for peers, training.json and training.png")
    parser.add_argument("--only", default=",".join(CASES), help="cases, by a comma")
    parser.add_argument("--quick", action="store_true", help="a minute; other limits")
    args = parser.parse_args()
    unknown = [name for name in args.only.split(",") if name not in CASES]
    if unknown:
        parser.error(f"--only takes some of {', '.join(CASES)}; found: '{unknown[0]}'")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(describe_setting())
    with tempfile.TemporaryDirectory() as folder:
        out = args.out or Path(folder)
        out.mkdir(parents=True, exist_ok=True)
        rows, failed, costs = _measure(out, args.only.split(","), quick=args.quick)
        for line in (*(row.to_text() for row in rows), *failed, *_growth_text(costs)):
            print(line)
        report = {
            **describe_setting(),
            "rows": [asdict(row) for row in rows],
            "failed": failed,
            "growth_ms": costs,
        }
        (out / "training.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        draw(rows, out / "training.png")
    missed = [row.name for row in rows if not row.passed]
    verdict = "MISSED" if missed else "NOT ALL MEASURED" if failed else "kept"
    beside = [f"{row.name.partition(',')[0]} {row.ratio:.2f}x" for row in rows]
    print(f"training: {'; '.join(beside)}: {verdict}")
    return int(bool(missed or failed))


def _measure(
    out: Path, names: Sequence[str], *, quick: bool
) -> tuple[list[Row], list[str], dict[str, dict[int, float]]]:
    rows: list[Row] = []
    failed: list[str] = []
    for name in names[: 1 if quick else None]:
        some, errors = compare_peers(name, folder=out / "peers", quick=quick)
        rows, failed = [*rows, *some], [*failed, *errors]
    if quick:
        return rows, failed, {}
    costs, row = grow(rounds=11)
    rows.append(row)
    try:
        from lightly_step import compare_with_lightly

        rows += compare_with_lightly(out / "lightly", rounds=61)
    except (Exception, SystemExit) as error:  # a peer's failure, or another loss, is a result
        failed.append(f"lightly: failed: {type(error).__name__}: {error}")
    return rows, failed, costs


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw each ratio with its interval."""
    from edgereg.report.figure import COLOURS, figure_of

    figure, axes = figure_of(height=0.6 + 0.4 * len(rows))
    places = range(len(rows))
    errors = np.array([[row.ratio - row.low, row.high - row.ratio] for row in rows]).T
    axes.errorbar([row.ratio for row in rows], places, xerr=errors, fmt="o", color=COLOURS[1])
    axes.axvline(1.0, color=COLOURS[0], linewidth=1)
    axes.set(yticks=places, yticklabels=[row.name for row in rows], xlabel="ratio of times")
    axes.invert_yaxis()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
