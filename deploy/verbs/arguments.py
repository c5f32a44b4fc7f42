"""What the verbs on a bundle share: its arguments, opening it, and the form of a JSON document."""

import argparse
import contextlib
import gc
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deploy.bundle.read import Bundle
    from deploy.runtime.runner import Runner

__all__ = [
    "add_bundle_arguments",
    "json_text",
    "natural",
    "open_runner_of",
    "positive_float",
    "positive_int",
    "rare_collections",
]


def add_bundle_arguments(
    parser: argparse.ArgumentParser, *, json_help: str, is_optional: bool = False
) -> None:
    """Add the bundle, what runs it, and --json."""
    parser.add_argument(
        "bundle",
        type=Path,
        metavar="BUNDLE",
        nargs="?" if is_optional else None,
        help="a directory made by export",
    )
    parser.add_argument(
        "--backend",
        choices=("onnxruntime", "tensorrt"),
        default="onnxruntime",
        help="what runs the model (default: %(default)s)",
    )
    parser.add_argument(
        "--precision",
        help="the bundle's variant (default: fp32; with --backend tensorrt the fastest of "
        "`edgereg build`)",
    )
    parser.add_argument(
        "--threads", type=positive_int, metavar="N", help="CPU threads (default: 1)"
    )
    parser.add_argument("--json", action="store_true", help=json_help)


def open_runner_of(args: argparse.Namespace) -> "tuple[Bundle, Runner]":
    """Open the bundle that the arguments name, and the runner that they ask for.

    Call this before anything else that needs numpy: a start is mostly imports.
    """
    with rare_collections():
        from deploy.bundle.read import open_bundle
        from deploy.runtime.runner import open_runner

        keep = (args.precision or "fp32") if args.backend == "onnxruntime" else None
        bundle = open_bundle(args.bundle, keep=keep)
        runner = open_runner(
            bundle, backend=args.backend, precision=args.precision, threads=args.threads
        )
    return bundle, runner


@contextlib.contextmanager
def rare_collections() -> Iterator[None]:
    """Look for garbage less often: what is imported stays, and the search takes a tenth of it."""
    thresholds = gc.get_threshold()
    gc.set_threshold(100_000, *thresholds[1:])
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)


def json_text(document: dict[str, Any]) -> str:
    """Write a JSON document; no NaN or infinity passes."""
    return json.dumps(document, indent=1, allow_nan=False)


def positive_int(text: str) -> int:
    """Read an argument that is 1 or more."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return number


def natural(text: str) -> int:
    """Read an argument that is 0 or more."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} is not 0 or more")
    return number


def positive_float(text: str) -> float:
    """Read an argument that is finite and above 0."""
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number
