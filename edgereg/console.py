"""What the commands of both sides share: options, and how they speak."""

import argparse
import json
import sys
from collections.abc import Mapping
from typing import Any

__all__ = [
    "CHECKPOINT_HELP",
    "DATA_HELP",
    "add_json",
    "add_output",
    "count_from_zero",
    "print_json",
    "say",
]

DATA_HELP = (
    "a folder of images with one sub-folder a class, emoji-10:VENDOR:SPLIT, idx:FOLDER:train|test, "
    "FILE.npz or shards:PATTERN"
)
CHECKPOINT_HELP = "a directory that `edgereg train` wrote"


def add_output(parser: argparse.ArgumentParser) -> None:
    """Add what every command that writes has."""
    parser.add_argument("--force", action="store_true", help="replace an earlier result")
    add_json(parser)


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add what every command has."""
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def count_from_zero(text: str) -> int:
    """Read an argument that is a whole number from 0 on."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"a whole number from 0 on, not '{text}'")
    return int(text)


def say(stage: str) -> None:
    """Say on stderr what comes next, for work that takes a while."""
    print(f"... {stage}", file=sys.stderr, flush=True)


def print_json(document: Mapping[str, Any]) -> None:
    """Print a document of finite numbers."""
    print(json.dumps(document, indent=1, allow_nan=False))
