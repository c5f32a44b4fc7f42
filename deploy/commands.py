"""The verbs that run on the device, in the order in which data travels.

Only the parsers are made here at start; numpy and the backends are imported by the verb that runs.
"""

import argparse

from deploy.verbs import bench, build, doctor, infer, install, serve, verify
from deploy.verbs.arguments import positive_int

__all__ = ["add_commands", "positive_int"]

VERBS = (build, verify, bench, infer, serve, install, doctor)


def add_commands(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add a parser for each verb; its `handler` takes the arguments and returns the exit code."""
    for verb in VERBS:
        verb.add_parser(subparsers)
