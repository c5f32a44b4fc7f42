"""The command line: one console script, verbs in the order in which data travels."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from deploy import commands as device_commands
from deploy.errors import ExplainedError
from edgereg import __version__

__all__ = ["build_parser", "main"]


class _Verb(argparse.ArgumentParser):
    """A command's parser; beside a recipe's flags `--dat` must not pass for --data."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)


def build_parser(verb: str | None = None) -> argparse.ArgumentParser:
    """Build the parser; nothing heavy is imported before a command runs.

    Args:
        verb: The command that will be parsed, if it is known. One that runs on the device is then
            the only one that is built: its start counts.
    """
    parser = argparse.ArgumentParser(
        prog="edgereg",
        description="From images, labelled or not, to a small, proved model on an embedded GPU.",
    )
    parser.add_argument("--version", action="version", version=f"edgereg {__version__}")
    parser_class: type[argparse.ArgumentParser] = _Verb
    verbs = parser.add_subparsers(
        title="commands",
        metavar="COMMAND",
        required=True,
        parser_class=parser_class,
    )
    if verb in device_commands.VERBS:
        device_commands.add_commands(verbs, [verb])
    else:
        from edgereg import commands as host_commands

        host_commands.add_commands(verbs)
        device_commands.add_commands(verbs)
        host_commands.add_last_commands(verbs)
    for command in verbs.choices.values():
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        0 fine, 1 a check failed, 2 wrong use or bad input, 75 stopped with a state to go on from.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = build_parser(argv[0] if argv else None)
    args, rest = parser.parse_known_args(argv)
    strange = rest and not rest[0].startswith("--")
    if rest and (strange or not getattr(args, "takes_recipe_flags", False)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.recipe_flags = rest
    try:
        code: int = args.handler(args)
    except ExplainedError as error:
        if args.debug:
            raise
        print(f"edgereg: error: {error.rule}", file=sys.stderr)
        print(f"  found:  {error.found}\n  remedy: {error.remedy}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("edgereg: interrupted; nothing was half written", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        if args.debug or error.name is None:
            raise
        print(f"edgereg: error: this command needs the package {error.name}", file=sys.stderr)
        print(
            "  found:  it is not installed\n  remedy: pip install 'edgereg[all]'", file=sys.stderr
        )
        return 2
    except BrokenPipeError:
        # the reader (head, say) has gone; Python would complain again when it flushes at exit
        sys.stdout = open("/dev/null", "w")  # noqa: SIM115, PTH123
        return 0
    except OSError as error:
        if args.debug:
            raise
        print(
            f"edgereg: error: the files must be readable and writable\n  found:  {error}",
            file=sys.stderr,
        )
        print("  remedy: check the path, its permissions and the free space", file=sys.stderr)
        return 2
    return code
