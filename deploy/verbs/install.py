"""`edgereg install`: put a bundle into service, or the one before it."""

import argparse
import shlex
from pathlib import Path

from deploy.terminal import Progress, printable
from deploy.verbs.arguments import add_bundle_arguments, json_text, positive_float

__all__ = ["add_parser"]


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the parser of `edgereg install`."""
    install = subparsers.add_parser(
        "install",
        help="put a bundle into service: copy, check, build, compare, time, change over",
        description="Copy a bundle into a new release of a folder, check every byte, build its "
        "engines (--backend tensorrt), compare it with its reference, time it, and change the "
        "link DIR/current by one rename. What fails leaves the old release in service; the one "
        "before is kept for --rollback. A service runs DIR/current/bundle, with EDGEREG_CACHE set "
        "to DIR/current/engines.",
    )
    add_bundle_arguments(install, json_help="print one JSON document", is_optional=True)
    install.add_argument(
        "--to", type=Path, required=True, metavar="DIR", help="the folder of the service"
    )
    install.add_argument(
        "--rollback", action="store_true", help="go back to the release before; without a BUNDLE"
    )
    install.add_argument(
        "--max-p99-ms",
        type=positive_float,
        metavar="MS",
        help="fail if the 99th percentile of an image is higher, or not known (default: its time "
        "is not judged)",
    )
    install.add_argument(
        "--timed-seconds",
        type=positive_float,
        default=20.0,
        metavar="S",
        help="how long images are timed (default: %(default)g)",
    )
    install.add_argument(
        "--check",
        type=shlex.split,
        default=[],
        metavar="COMMAND",
        help="run this after the change, such as 'systemctl restart edgereg'; if it fails, the old "
        "release comes back, and it is run again",
    )
    install.set_defaults(handler=_install)


def _install(args: argparse.Namespace) -> int:
    from deploy.errors import BadInputError
    from deploy.service.install import Gates, install, roll_back

    if args.rollback == (args.bundle is not None):
        raise BadInputError(
            "a bundle is installed, or the last installation is taken back",
            found="both" if args.rollback else "no bundle",
            remedy="edgereg install BUNDLE --to DIR, or edgereg install --rollback --to DIR",
        )
    if args.rollback:
        made = roll_back(args.to, check=args.check)
    else:
        with Progress("install") as progress:
            made = install(
                args.bundle,
                args.to,
                backend=args.backend,
                precision=args.precision,
                threads=args.threads,
                gates=Gates(args.max_p99_ms, args.timed_seconds, tuple(args.check)),
                on_stage=progress,
            )
    if args.json:
        print(json_text(made.to_json()))
        return 0
    time = "its time was not judged" if made.p99_ms is None else f"p99 {made.p99_ms:.3f} ms"
    lines = [
        f"{made.bundle}: {made.precision} on {made.backend}; {time}",
        *made.not_checked,
        f"{args.to / 'current'} -> {made.release}",
        "the way back: "
        + ("none, it is the first" if made.previous is None else f"{made.previous} (--rollback)"),
    ]
    print("\n".join(map(printable, lines)))
    return 0
