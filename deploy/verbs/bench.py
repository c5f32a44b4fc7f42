"""`edgereg bench`: the time of a bundle, stage by stage."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from deploy.publish import publish_text
from deploy.terminal import Progress, printable, table
from deploy.verbs.arguments import (
    add_bundle_arguments,
    json_text,
    natural,
    open_runner_of,
    positive_float,
    positive_int,
)

if TYPE_CHECKING:
    from deploy.measure.bench import BenchResult

__all__ = ["add_parser"]


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the parser of `edgereg bench`."""
    bench = subparsers.add_parser(
        "bench",
        help="time a bundle, stage by stage",
        description="Time the golden images one at a time and check a sample of the outputs. "
        "Exit 1 if one is wrong.",
    )
    add_bundle_arguments(bench, json_help="print one JSON document, raw samples included")
    limit = bench.add_mutually_exclusive_group()
    limit.add_argument(
        "--duration",
        type=positive_float,
        default=60.0,
        metavar="S",
        help="seconds to run (default: %(default)g)",
    )
    limit.add_argument("--count", type=positive_int, metavar="N", help="time N images instead")
    bench.add_argument(
        "--warmup",
        type=natural,
        default=20,
        metavar="N",
        help="images before, not counted (default: %(default)s)",
    )
    bench.add_argument("--out", type=Path, metavar="FILE.json", help="write the JSON document here")
    bench.set_defaults(handler=_bench)


def _bench(args: argparse.Namespace) -> int:
    from deploy.measure.bench import bench

    bundle, runner = open_runner_of(args)
    with Progress("bench") as progress:
        result = bench(
            bundle,
            runner,
            duration_s=args.duration,
            count=args.count,
            warmup=args.warmup,
            on_progress=progress,
        )
    document = json_text(result.to_json())
    if args.out is not None:
        publish_text(args.out, document + "\n")
    print(document if args.json else _bench_text(result))
    if args.out is not None and not args.json:
        print(f"wrote {printable(str(args.out))}")
    return 0 if result.check.passed else 1


def _bench_text(result: "BenchResult") -> str:
    summaries = result.summaries_ms()
    percentiles = tuple(summaries["end to end"].percentiles)
    rows = [("ms per image", *percentiles, "mean")]
    for stage, summary in summaries.items():
        values = (summary.percentiles[name] for name in percentiles)
        shown = ("n too small" if value is None else f"{value:.3f}" for value in values)
        rows.append((stage, *shown, f"{summary.mean:.3f}"))
    interval = summaries["end to end"].median_interval
    median = (
        "n too small for an interval of the median"
        if interval is None
        else f"median {interval[0]:.3f} to {interval[1]:.3f} ms at 99 % confidence"
    )
    check = result.check
    outcome = "match the golden ones" if check.passed else "are WRONG: " + "; ".join(check.reasons)
    return "\n".join(
        (
            printable(f"{result.bundle}: {result.precision} on {result.backend}"),
            printable(f"{result.cpu}, threads {result.threads}, batch 1"),
            table(rows),
            f"n = {result.count}, after {result.warmup} of warm-up; {median}",
            f"{result.images_per_second:.1f} images/s, one after the other",
            f"{check.count} of {result.count} timed outputs were checked and {outcome}",
        )
    )
