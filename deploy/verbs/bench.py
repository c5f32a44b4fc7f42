"""`edgereg bench`: the time of a bundle, stage by stage, and whether the figures hold."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    from deploy.bundle.read import Bundle
    from deploy.measure.bench import BenchResult
    from deploy.measure.bench_report import BenchReport
    from deploy.measure.interleaved import Interleaved
    from deploy.runtime.runner import Runner

__all__ = ["add_parser"]

_IDLE_S = 5.0


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the parser of `edgereg bench`."""
    bench = subparsers.add_parser(
        "bench",
        help="time a bundle, stage by stage",
        description="Time the golden images, watch the board, and check a sample of the outputs. "
        "Exit 1 if an output is wrong, the run is invalid, or a limit is not kept.",
    )
    add_bundle_arguments(bench, json_help="print one JSON document, raw samples included")
    limit = bench.add_mutually_exclusive_group()
    limit.add_argument(
        "--duration",
        type=positive_float,
        default=60.0,
        metavar="S",
        help="seconds to run, for each batch size (default: %(default)g)",
    )
    limit.add_argument("--count", type=positive_int, metavar="N", help="time N images instead")
    bench.add_argument(
        "--warmup",
        type=natural,
        default=20,
        metavar="N",
        help="images before, not counted (default: %(default)s)",
    )
    bench.add_argument(
        "--batch",
        type=_batches,
        default=(1,),
        metavar="N,N,...",
        help="batch sizes, one run each (default: 1); more than 1 needs a bundle that takes it",
    )
    bench.add_argument(
        "--against",
        metavar="BUNDLE[:PRECISION[:BACKEND]]",
        help="time both in turns instead, and report the ratio of their times",
    )
    bench.add_argument(
        "--max-p99-ms",
        type=positive_float,
        metavar="MS",
        help="fail if the 99th percentile, end to end, of a run is higher, or not known",
    )
    bench.add_argument(
        "--min-throughput",
        type=positive_float,
        metavar="N",
        help="fail if a run has fewer images per second",
    )
    bench.add_argument(
        "--no-cold-start",
        action="store_true",
        help="do not start a process to time its first answer",
    )
    bench.add_argument("--out", type=Path, metavar="FILE.json", help="write the JSON document here")
    bench.add_argument(
        "--html", type=Path, metavar="FILE.html", help="write a page with plots here"
    )
    bench.set_defaults(handler=_bench)


def _bench(args: argparse.Namespace) -> int:
    from deploy.report.bench_page import bench_page, interleaved_page

    if args.against is not None:
        pair = _run_pair(args)
        return _publish(args, pair, _pair_text(pair), interleaved_page)
    report = _run_alone(args)
    return _publish(args, report, _report_text(report), bench_page)


def _publish(args: argparse.Namespace, result: Any, text: str, page: Any) -> int:
    """Print, write what was asked for, and turn failures into an exit code."""
    document = json_text(result.to_json())
    print(document if args.json else text)  # first: a minute's figures outlive a full disk
    for path, content in ((args.out, lambda: document + "\n"), (args.html, lambda: page(result))):
        if path is not None:
            publish_text(path, content())
            if not args.json:
                print(f"wrote {printable(str(path))}")
    if not args.json:
        for reason in result.failures:
            print(f"FAILED: {printable(reason)}")
    return 1 if result.failures else 0


def _run_alone(args: argparse.Namespace) -> "BenchReport":
    from deploy.measure.bench import bench
    from deploy.measure.bench_report import BenchReport, read_platform
    from deploy.measure.cold_start import measure_cold_start, peak_memory_bytes
    from deploy.measure.repeated_input import check_repeated_input

    bundle, runner = open_runner_of(args)
    cold_start = None
    if not args.no_cold_start:
        cold_start = measure_cold_start(
            args.bundle, backend=args.backend, precision=runner.precision, threads=args.threads
        )
    with Progress("bench") as progress:
        runs = tuple(
            bench(
                bundle,
                runner,
                duration_s=args.duration,
                count=args.count,
                warmup=args.warmup,
                batch=batch,
                idle_s=_IDLE_S,
                on_progress=progress,
            )
            for batch in args.batch
        )
    return BenchReport(
        platform=read_platform(),
        runs=runs,
        repeated=check_repeated_input(bundle, runner),
        cold_start=cold_start,
        peak_memory_bytes=peak_memory_bytes(),
        max_p99_ms=args.max_p99_ms,
        min_throughput=args.min_throughput,
    )


def _run_pair(args: argparse.Namespace) -> "Interleaved":
    from deploy.errors import BadInputError
    from deploy.measure.interleaved import compare_speed

    alone = {"--batch": args.batch != (1,), "--count": args.count is not None}
    alone |= {"--max-p99-ms": args.max_p99_ms, "--min-throughput": args.min_throughput}
    chosen = [flag for flag, is_chosen in alone.items() if is_chosen]
    if chosen:
        raise BadInputError(
            "--against compares images one at a time for a --duration, and has no limits",
            found=", ".join(chosen),
            remedy="leave it out, or bench each bundle alone",
        )
    first, second = open_runner_of(args), _open_other(args)
    with Progress("bench") as progress:
        return compare_speed(
            first,
            second,
            duration_s=args.duration,
            warmup=args.warmup,
            on_progress=progress,
        )


def _open_other(args: argparse.Namespace) -> "tuple[Bundle, Runner]":
    """Open what --against names; what it leaves out is as in the bundle beside it."""
    from deploy.errors import BadInputError
    from deploy.runtime.runner import BACKENDS

    path, _, rest = args.against.partition(":")
    precision, _, backend = rest.partition(":")
    if backend and backend not in BACKENDS:
        raise BadInputError(
            "--against is BUNDLE, BUNDLE:PRECISION or BUNDLE:PRECISION:BACKEND",
            found=f"the backend '{backend}'",
            remedy=f"use one of {', '.join(BACKENDS)}",
        )
    named: dict[str, Any] = {"bundle": Path(path)}
    named |= {"precision": precision} if precision else {}
    named |= {"backend": backend} if backend else {}
    return open_runner_of(argparse.Namespace(**(vars(args) | named)))


def _report_text(report: "BenchReport") -> str:
    first = report.runs[0]
    lines = [
        printable(f"{first.bundle}: {first.precision} on {first.backend}"),
        printable(f"{first.cpu}, threads {first.threads}; {report.platform}"),
    ]
    for run in report.runs:
        lines += _run_lines(run)
    lines.append(str(report.repeated))
    if report.cold_start is not None:
        lines.append(str(report.cold_start))
    if report.peak_memory_bytes is not None:
        memory = report.peak_memory_bytes / 2**20
        lines.append(f"at most {memory:.0f} MiB of memory in this process, with all its samples")
    return "\n".join(lines)


def _run_lines(run: "BenchResult") -> list[str]:
    summaries = run.summaries_ms()
    percentiles = tuple(summaries["end to end"].percentiles)
    unit = "ms per image" if run.batch == 1 else f"ms per {run.batch} images"
    rows = [(unit, *percentiles, "mean")]
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
    check = run.check
    outcome = "match the golden ones" if check.passed else "are WRONG: " + "; ".join(check.reasons)
    not_timed = " and ".join(run.not_timed)
    return [
        table(rows),
        *([f"{not_timed} are not timed: no Pillow here"] if not_timed else []),
        f"n = {run.count}, after {run.warmup} images of warm-up; {median}",
        f"{run.images_per_second:.1f} images/s, one batch of {run.batch} after the other",
        f"{check.count} of {run.count * run.batch} timed outputs were checked and {outcome}",
        f"the run is {run.validity}",
        *([str(run.energy)] if run.energy is not None else []),
    ]


def _pair_text(pair: "Interleaved") -> str:
    rows = [("", "ms per image", "outputs checked")]
    for name, who in (("first", pair.first), ("second", pair.second)):
        label = f"{name}: {who.bundle}, {who.precision} on {who.backend}"
        outcome = f"{who.check.count}, {'match' if who.check.passed else 'WRONG'}"
        rows.append((label, f"{who.median_ms:.3f}", outcome))
    ratios = (
        f"{stage}: the first takes {ratio} times the second's time (median, 95 % interval)"
        for stage, ratio in pair.ratios.items()
    )
    return "\n".join(
        (
            table(rows),
            *ratios,
            f"{pair.alternations} alternations of 5 images each",
            f"the run is {pair.validity}",
        )
    )


def _batches(text: str) -> tuple[int, ...]:
    return tuple(positive_int(part) for part in text.split(","))
