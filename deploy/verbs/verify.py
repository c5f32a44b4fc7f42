"""`edgereg verify`: does a bundle compute here what it computed at export?"""

import argparse
import math
from typing import TYPE_CHECKING

from deploy.terminal import Progress, printable, table
from deploy.verbs.arguments import add_bundle_arguments, json_text, open_runner_of

if TYPE_CHECKING:
    from deploy.bundle.tolerance import AnyTolerance
    from deploy.measure.compare import Comparison
    from deploy.measure.holdout import HoldoutReport
    from deploy.measure.verify import VerifyReport

__all__ = ["add_parser"]


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the parser of `edgereg verify`."""
    verify = subparsers.add_parser(
        "verify",
        help="check that a bundle computes here what it computed at export",
        description="Check every byte of a bundle, then run its golden images through each stage "
        "and compare with the stored reference; measure the accuracy on the labelled sample, if it "
        "carries one. Without Pillow the stored tensors are the start. Exit 1 if a check fails.",
    )
    add_bundle_arguments(verify, json_help="print one JSON document")
    verify.set_defaults(handler=_verify)


def _verify(args: argparse.Namespace) -> int:
    from deploy.measure.verify import verify

    bundle, runner = open_runner_of(args)
    with Progress("verify") as progress:
        report = verify(bundle, runner, with_holdout=True, on_progress=progress)
    print(json_text(report.to_json()) if args.json else _verify_text(report))
    return 0 if report.passed else 1


def _verify_text(report: "VerifyReport") -> str:
    judged = [_judged(stage.comparison, stage.tolerance) for stage in report.stages]
    names = list(judged[-1])  # the first stage compares tensors, of which there are none
    headings = [heading for name in names for heading in (name, "allowed")]
    rows = [
        ("stage", "compared", "n", "max |error|", "SQNR dB", "scaled", "allowed", *headings),
    ]
    notes = []
    for stage, figures in zip(report.stages, judged, strict=True):
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
                *(cell for name in names for cell in figures.get(name, ("", ""))),
            )
        )
        notes.append(f"{stage.name}: {'; '.join(found.reasons) or 'allowed'}: {allowed.reason}")
    passed = [stage.comparison.passed for stage in report.stages]
    if report.holdout is not None:
        rows.append(_holdout_row(report.holdout, names))
        passed.append(report.holdout.passed)
        notes.append(f"hold-out: {report.holdout}")
    notes += report.not_checked
    results = ["result", *("pass" if each else "FAIL" for each in passed)]
    full = [(*row, result) for row, result in zip(rows, results, strict=True)]
    title = f"{report.bundle}: {report.precision} on {report.backend}"
    verdict = "verified" if report.passed else "NOT verified"
    verdict += " as far as it was checked" if report.not_checked else ""
    return "\n".join((printable(title), table(full, left=2), *map(printable, notes), verdict))


def _holdout_row(holdout: "HoldoutReport", names: list[str]) -> tuple[str, ...]:
    """Return the row of the labelled sample; beside its accuracy the least that passes."""
    paired = holdout.paired
    least = paired.reference_top1 - (holdout.allowed + paired.ties) / paired.count
    shares = {"top-1": (f"{paired.top1:.2%}", f"{least:.2%}")}
    judged = (cell for name in names for cell in shares.get(name, ("", "")))
    return "hold-out", "images -> their labels", str(paired.count), "", "", "", "", *judged


def _judged(found: "Comparison", allowed: "AnyTolerance") -> dict[str, tuple[str, str]]:
    """Return what is judged beside the error, and how it may be, by the heading of its column."""
    from deploy.bundle.tolerance import EmbeddingTolerance

    if isinstance(allowed, EmbeddingTolerance):
        return {
            "cosine": (f"{found.min_cosine:.6f}", f"{allowed.min_cosine:.6f}"),
            "neighbours": (
                f"{found.neighbour_agreement:.2%}",
                f"{allowed.min_neighbour_agreement:.2%}",
            ),
        }
    if found.top1_agreement is None:
        return {}
    return {"top-1": (f"{found.top1_agreement:.2%}", f"{allowed.min_top1_agreement:.2%}")}
