"""The verbs that run on the device: verify, bench, infer.

Only the parsers are made here at start; numpy and the backends are imported by the verb that runs.
"""

import argparse
import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy.publish import publish_text
from deploy.terminal import Progress, printable, table

if TYPE_CHECKING:
    from deploy.bundle.read import Bundle
    from deploy.measure.bench import BenchResult
    from deploy.measure.verify import VerifyReport
    from deploy.runtime.runner import Runner

__all__ = ["add_commands", "positive_int"]


def add_commands(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add a parser for each verb; its `handler` takes the arguments and returns the exit code."""
    verify = subparsers.add_parser(
        "verify",
        help="check that a bundle computes here what it computed at export",
        description="Check every byte of a bundle, then run its golden images through each stage "
        "and compare with the stored reference. Exit 1 if a check fails.",
    )
    _add_common(verify, json_help="print one JSON document")
    verify.set_defaults(handler=_verify)

    bench = subparsers.add_parser(
        "bench",
        help="time a bundle, stage by stage",
        description="Time the golden images one at a time and check a sample of the outputs. "
        "Exit 1 if one is wrong.",
    )
    _add_common(bench, json_help="print one JSON document, raw samples included")
    limit = bench.add_mutually_exclusive_group()
    limit.add_argument(
        "--duration",
        type=_positive_float,
        default=60.0,
        metavar="S",
        help="seconds to run (default: %(default)g)",
    )
    limit.add_argument("--count", type=positive_int, metavar="N", help="time N images instead")
    bench.add_argument(
        "--warmup",
        type=_natural,
        default=20,
        metavar="N",
        help="images before, not counted (default: %(default)s)",
    )
    bench.add_argument("--out", type=Path, metavar="FILE.json", help="write the JSON document here")
    bench.set_defaults(handler=_bench)

    infer = subparsers.add_parser(
        "infer",
        help="classify images with a bundle",
        description="Classify image files and folders. An unreadable image is reported and does "
        "not stop the others; the exit code is then 2.",
    )
    _add_common(infer, json_help="print one JSON object per line and image")
    infer.add_argument("paths", type=Path, nargs="+", metavar="PATH", help="an image or a folder")
    infer.add_argument(
        "--top-k",
        type=positive_int,
        default=3,
        metavar="K",
        help="classes to report for each image (default: %(default)s)",
    )
    infer.set_defaults(handler=_infer)


def _add_common(parser: argparse.ArgumentParser, *, json_help: str) -> None:
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="a directory made by export")
    parser.add_argument(
        "--backend",
        choices=("onnxruntime", "tensorrt"),
        default="onnxruntime",
        help="what runs the model (default: %(default)s)",
    )
    parser.add_argument(
        "--precision", default="fp32", help="the bundle's variant (default: %(default)s)"
    )
    parser.add_argument(
        "--threads", type=positive_int, metavar="N", help="CPU threads (default: 1)"
    )
    parser.add_argument("--json", action="store_true", help=json_help)


def _open(args: argparse.Namespace) -> "tuple[Bundle, Runner]":
    from deploy.bundle.read import open_bundle
    from deploy.runtime.runner import open_runner

    bundle = open_bundle(args.bundle)
    runner = open_runner(
        bundle, backend=args.backend, precision=args.precision, threads=args.threads
    )
    return bundle, runner


def _verify(args: argparse.Namespace) -> int:
    from deploy.measure.verify import verify

    bundle, runner = _open(args)
    with Progress("verify") as progress:
        report = verify(bundle, runner, on_progress=progress)
    print(_json(report.to_json()) if args.json else _verify_text(report))
    return 0 if report.passed else 1


def _verify_text(report: "VerifyReport") -> str:
    judged = ("scaled", "allowed", "top-1", "allowed")
    rows = [("stage", "compared", "n", "max |error|", "SQNR dB", *judged, "result")]
    notes = []
    for stage in report.stages:
        found, allowed = stage.comparison, stage.tolerance
        rows.append(
            (
                stage.name,
                stage.compared,
                str(found.count),
                f"{found.max_abs_error:.2e}",
                "equal" if found.sqnr_db == math.inf else f"{found.sqnr_db:.1f}",
                f"{found.max_scaled_error:.2e}",
                f"{allowed.max_scaled_error:.2e}",
                _share(found.top1_agreement),
                _share(None if found.top1_agreement is None else allowed.min_top1_agreement),
                "pass" if found.passed else "FAIL",
            )
        )
        notes.append(f"{stage.name}: {'; '.join(found.reasons) or 'allowed'}: {allowed.reason}")
    title = f"{report.bundle}: {report.precision} on {report.backend}"
    verdict = "verified" if report.passed else "NOT verified"
    return "\n".join((printable(title), table(rows, left=2), *map(printable, notes), verdict))


def _share(share: float | None) -> str:
    return "" if share is None else f"{share:.2%}"


def _bench(args: argparse.Namespace) -> int:
    from deploy.measure.bench import bench

    bundle, runner = _open(args)
    with Progress("bench") as progress:
        result = bench(
            bundle,
            runner,
            duration_s=args.duration,
            count=args.count,
            warmup=args.warmup,
            on_progress=progress,
        )
    document = _json(result.to_json())
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


def _infer(args: argparse.Namespace) -> int:
    from deploy.service.infer import Unreadable, classify

    bundle, runner = _open(args)
    width = max(len(printable(label)) for label in bundle.labels)
    count = unreadable = 0
    for result in classify(bundle, runner, args.paths, top_k_count=args.top_k):
        count += 1
        if isinstance(result, Unreadable):
            unreadable += 1
        if args.json:
            print(json.dumps(_infer_document(result)), flush=True)
        elif isinstance(result, Unreadable):
            print(f"edgereg: {printable(result.error)}", file=sys.stderr)
        else:
            guesses = (f"{printable(label):{width}} {p:6.1%}" for label, p in result.top)
            print(f"{printable(str(result.path))}  {'  '.join(guesses)}", flush=True)
    if unreadable:
        print(f"edgereg: {unreadable} of {count} could not be read", file=sys.stderr)
    return 2 if unreadable else 0


def _infer_document(result: Any) -> dict[str, Any]:
    document = dataclasses.asdict(result) | {"path": str(result.path)}
    if "top" in document:
        document["top"] = [{"label": label, "probability": p} for label, p in result.top]
    return document


def _json(document: dict[str, Any]) -> str:
    return json.dumps(document, indent=1, allow_nan=False)


def positive_int(text: str) -> int:
    """Read an argument that is 1 or more."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return number


def _natural(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} is not 0 or more")
    return number


def _positive_float(text: str) -> float:
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number
