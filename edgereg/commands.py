"""The verbs of a workstation. Only parsers are made at start; nothing heavy is imported."""

import argparse
from pathlib import Path

from deploy.commands import positive_int
from edgereg.console import DATA_HELP, add_output, count_from_zero, print_json
from edgereg.eval_commands import add_eval_command
from edgereg.export_commands import add_export_commands
from edgereg.train_commands import add_train_commands

__all__ = ["add_commands", "add_last_commands"]


def add_commands(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add a parser for each verb; its `handler` takes the arguments and returns the exit code."""
    demo = verbs.add_parser("demo", help="go the whole road on the embedded images, and report")
    demo.add_argument("--out", type=Path, required=True, metavar="DIR", help="where to write")
    demo.add_argument("--quick", action="store_true", help="at most 100 s: machinery and direction")
    add_output(demo)
    demo.set_defaults(handler=_demo)

    data = verbs.add_parser("data", help="look after a data set")
    check = _only_verb(data, "check", "find undecodable, duplicate and leaked images")
    check.add_argument("--data", required=True, help=DATA_HELP)
    check.add_argument(
        "--against",
        action="append",
        default=[],
        metavar="DATA",
        help="a test set, of which no image may be in --data; may be given several times",
    )
    check.add_argument(
        "--near",
        type=int,
        choices=range(9),
        metavar="BITS",
        help="report images that look alike, too: 0 to 8 bits of a 64-bit hash may differ",
    )
    check.add_argument(
        "--workers",
        type=count_from_zero,
        default=0,
        metavar="N",
        help="processes that decode (default: 0)",
    )
    check.add_argument(
        "--out", type=Path, metavar="INDEX", help="write an index that training skips images by"
    )
    add_output(check)
    check.set_defaults(handler=_data_check)

    augment = verbs.add_parser("augment", help="look at a recipe's augmentation")
    preview = _only_verb(augment, "preview", "draw what a recipe does to real images")
    preview.add_argument("--recipe", type=Path, metavar="YAML", help="default: the built-in recipe")
    preview.add_argument("--data", required=True, help=DATA_HELP)
    preview.add_argument("--out", type=Path, required=True, metavar="PNG", help="what to write")
    preview.add_argument(
        "--images", type=positive_int, default=8, metavar="N", help="images, one a row (default: 8)"
    )
    preview.add_argument(
        "--draws", type=positive_int, default=6, metavar="N", help="draws an image (default: 6)"
    )
    add_output(preview)
    preview.set_defaults(handler=_augment_preview, takes_recipe_flags=True)

    add_train_commands(verbs)
    add_eval_command(verbs)
    add_export_commands(verbs)


def add_last_commands(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add what looks back on the others' work."""
    report = verbs.add_parser("report", help="draw the curves of training runs")
    report.add_argument(
        "runs",
        type=Path,
        nargs="+",
        metavar="RUN",
        help="a checkpoint, or the CHECKPOINT.run beside it",
    )
    report.add_argument("--out", type=Path, required=True, metavar="HTML", help="what to write")
    add_output(report)
    report.set_defaults(handler=_report)


def _only_verb(
    parser: argparse.ArgumentParser, name: str, description: str
) -> argparse.ArgumentParser:
    """Add a second word to a command, such as `check` to `edgereg data`."""
    words = parser.add_subparsers(metavar=name.upper(), required=True, parser_class=type(parser))
    word: argparse.ArgumentParser = words.add_parser(name, help=description)
    word.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return word


def _demo(args: argparse.Namespace) -> int:
    from edgereg.demo.run import run_demo

    result = run_demo(args.out, quick=args.quick, force=args.force)
    if args.json:
        print_json(result.to_json())
    else:
        print(result.to_text())
    return 0 if result.passed else 1


def _data_check(args: argparse.Namespace) -> int:
    from edgereg.data.check import check_images
    from edgereg.data.images import open_images
    from edgereg.data.index import write_index
    from edgereg.progress import progress

    images, against = open_images(args.data), [open_images(name) for name in args.against]
    with progress(f"check {images.name}", len(images)) as shown:
        report = check_images(
            images,
            against=against,
            near=args.near,
            workers=args.workers,
            progress=lambda done: shown(done, ""),
        )
    if args.out is not None:
        write_index(report, args.out, force=args.force)
    if args.json:
        print_json(report.to_json())
    else:
        print(report.to_text())
        if args.out is not None:
            print(f"wrote {args.out}")
    return 1 if report.quarantined else 0


def _augment_preview(args: argparse.Namespace) -> int:
    from edgereg.augment.preview import write_preview
    from edgereg.data.images import open_images
    from edgereg.recipe import load_recipe

    recipe = load_recipe(args.recipe, args.recipe_flags)
    preview = write_preview(
        open_images(args.data),
        recipe,
        args.out,
        rows=args.images,
        columns=args.draws,
        force=args.force,
    )
    if args.json:
        print_json(preview.to_json())
    else:
        print(f"wrote {args.out}")
    return 0


def _report(args: argparse.Namespace) -> int:
    from edgereg.report.run_report import write_report

    report = write_report(args.runs, args.out, force=args.force)
    if args.json:
        print_json(report.to_json())
    else:
        print(f"wrote {args.out}")
    return 0
