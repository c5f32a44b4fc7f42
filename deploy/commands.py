"""The verbs that run on the device, in the order in which data travels.

Each has a module in deploy/verbs, which is imported when its parser is made; numpy and the backends
are imported by the verb that runs.
"""

import argparse
from collections.abc import Iterable
from importlib import import_module

from deploy.verbs.arguments import positive_int

__all__ = ["VERBS", "add_commands", "positive_int"]

VERBS = ("build", "verify", "bench", "infer", "serve", "install", "doctor")


def add_commands(
    subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]",
    verbs: Iterable[str] = VERBS,
) -> None:
    """Add a parser for each verb; its `handler` takes the arguments and returns the exit code."""
    for verb in verbs:
        import_module(f"deploy.verbs.{verb}").add_parser(subparsers)
