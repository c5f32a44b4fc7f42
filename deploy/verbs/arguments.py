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
    "opening_bundle_of",
    "positive_float",
    "positive_int",
    "runner_of",
    "starting",
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
    with starting(), opening_bundle_of(args) as bundle:
        runner = runner_of(args, bundle)
    return bundle, runner


def opening_bundle_of(args: argparse.Namespace) -> "contextlib.AbstractContextManager[Bundle]":
    """Open the bundle that the arguments name, and import what runs it meanwhile."""
    from deploy.bundle.read import opening_bundle

    keep = (args.precision or "fp32") if args.backend == "onnxruntime" else None
    return opening_bundle(args.bundle, keep=keep, meanwhile=lambda: _import_backend(args.backend))


def runner_of(args: argparse.Namespace, bundle: "Bundle") -> "Runner":
    """Open the runner that the arguments ask for."""
    from deploy.runtime.runner import open_runner

    return open_runner(bundle, backend=args.backend, precision=args.precision, threads=args.threads)


def _import_backend(backend: str) -> None:
    from deploy.runtime.ort_runner import runtime_name

    if backend == "onnxruntime":
        runtime_name()


@contextlib.contextmanager
def starting() -> Iterator[None]:
    """Put off until the end what no answer waits for.

    What is imported stays, and a search for garbage in it takes a tenth of a start. What loading a
    model leaves free goes back to the system.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
        from deploy.runtime.heap import return_free_memory

        return_free_memory()


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
