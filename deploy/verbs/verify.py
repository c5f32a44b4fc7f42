"""`edgereg verify`: does a bundle compute here what it computed at export?"""

import argparse
import math
from typing import TYPE_CHECKING

from deploy.terminal import Progress, printable, table
from deploy.verbs.arguments import add_bundle_arguments, json_text, open_runner_of

if TYPE_CHECKING:
    from deploy.measure.verify import VerifyReport

__all__ = ["add_parser"]


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the parser of `edgereg verify`."""
    verify = subparsers.add_parser(
        "verify",
        help="check that a bundle computes here what it computed at export",
        description="Check every byte of a bundle, then run its golden images through each stage "
        "and compare with the stored reference. Exit 1 if a check fails.",
    )
    add_bundle_arguments(verify, json_help="print one JSON document")
    verify.set_defaults(handler=_verify)


def _verify(args: argparse.Namespace) -> int:
    from deploy.measure.verify import verify

    bundle, runner = open_runner_of(args)
    with Progress("verify") as progress:
        report = verify(bundle, runner, on_progress=progress)
    print(json_text(report.to_json()) if args.json else _verify_text(report))
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
