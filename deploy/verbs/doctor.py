"""`edgereg doctor`: is this machine fit to run bundles?"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from deploy.terminal import Progress, printable
from deploy.verbs.arguments import json_text

if TYPE_CHECKING:
    from deploy.doctor.machine import Finding

__all__ = ["add_parser"]


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the parser of `edgereg doctor`."""
    doctor = subparsers.add_parser(
        "doctor",
        help="examine this machine: JetPack, TensorRT, providers, power, memory",
        description="Examine the machine: JetPack, Python, TensorRT, CUDA, the providers of ONNX "
        "Runtime (each runs a tiny graph), power mode, clocks, sensors, memory, disk, container. "
        "Nothing is changed. Exit 1 if there is an error.",
    )
    tree = doctor.add_mutually_exclusive_group()
    tree.add_argument(
        "--root",
        type=Path,
        default=Path("/"),
        metavar="PATH",
        help="examine a tree that was recorded on another machine",
    )
    tree.add_argument(
        "--record",
        type=Path,
        metavar="DIR",
        help="write such a tree too; it holds no serial number, but paths of this Python",
    )
    doctor.add_argument("--json", action="store_true", help="print one JSON document")
    doctor.set_defaults(handler=_doctor)


def _doctor(args: argparse.Namespace) -> int:
    from deploy.doctor.diagnose import diagnose, examine
    from deploy.doctor.record import record_tree

    with Progress("doctor") as progress:
        progress("trying each package and provider")
        machine = examine(args.root)
    findings = diagnose(machine)
    errors = sum(finding.status == "error" for finding in findings)
    warnings = sum(finding.status == "warning" for finding in findings)
    if args.record is not None and machine.probe is not None:
        record_tree(args.record, machine.probe)
    if args.json:
        listed = [finding.to_json() for finding in findings]
        print(json_text({"errors": errors, "warnings": warnings, "findings": listed}))
    else:
        print(_text(findings))
        print(f"{errors} errors, {warnings} warnings")
        if args.record is not None:
            print(f"wrote {printable(str(args.record))}")
    return 1 if errors else 0


def _text(findings: "tuple[Finding, ...]") -> str:
    """Three aligned columns; a remedy stands below its finding."""
    width = max(len(finding.check) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.status:7}  {finding.check:{width}}  {printable(finding.found)}")
        if finding.remedy:
            lines.append(f"{'':7}  {'':{width}}  remedy: {printable(finding.remedy)}")
    return "\n".join(lines)
