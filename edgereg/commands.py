"""The verbs of a workstation. Only parsers are made at start; nothing heavy is imported."""

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy.commands import positive_int
from edgereg.console import DATA_HELP, add_output, print_json
from edgereg.eval_commands import add_eval_command
from edgereg.export_commands import add_export_commands

if TYPE_CHECKING:
    from edgereg.data.images import Images
    from edgereg.recipe import Recipe
    from edgereg.train.prepared import RunOptions

__all__ = ["add_commands", "add_last_commands"]

_METHODS = ("pirl", "colorization", "simclr", "vicreg", "lejepa", "distill")  # as in the recipe

_RECIPE_EPILOG = (
    "Any key of a recipe can be set on the command line and wins over the file: "
    "--epochs 10 --optim.lr 1e-3 --model.name torchvision:mobilenet_v3_small"
)


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
        "--workers", type=_count, default=0, metavar="N", help="processes that decode (default: 0)"
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

    pretrain = verbs.add_parser(
        "pretrain", help="train an encoder without labels", epilog=_RECIPE_EPILOG
    )
    pretrain.add_argument("--data", required=True, help=DATA_HELP + "; labels are not looked at")
    pretrain.add_argument(
        "--method", choices=_METHODS, help="how to learn (default: the recipe's, or pirl)"
    )
    pretrain.add_argument(
        "--watch",
        metavar="DATA",
        help="labelled images: show after each epoch how well neighbours tell their classes",
    )
    _add_training(pretrain)
    pretrain.set_defaults(handler=_pretrain)

    train = verbs.add_parser("train", help="train a classifier", epilog=_RECIPE_EPILOG)
    train.add_argument("--data", required=True, help=DATA_HELP)
    train.add_argument("--val", metavar="DATA", help="measure the accuracy on these images")
    train.add_argument(
        "--init", type=Path, metavar="CHECKPOINT", help="start from this checkpoint's weights"
    )
    _add_training(train)
    train.set_defaults(handler=_train)

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


def _add_training(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", type=Path, metavar="YAML", help="default: the built-in recipe")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="CHECKPOINT", help="what to write"
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: cuda where there is one"
    )
    parser.add_argument(
        "--threads", type=positive_int, metavar="N", help="CPU threads (default: torch's)"
    )
    parser.add_argument(
        "--workers", type=_count, default=0, metavar="N", help="processes that decode (default: 0)"
    )
    parser.add_argument(
        "--index", type=Path, metavar="INDEX", help="skip what `edgereg data check --out` found"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on where a stopped run of this --out left off"
    )
    parser.add_argument(
        "--snapshot-minutes",
        type=float,
        default=5.0,
        metavar="M",
        help="minutes between two states on the disk (default: 5)",
    )
    add_output(parser)
    parser.set_defaults(takes_recipe_flags=True)


def _only_verb(
    parser: argparse.ArgumentParser, name: str, description: str
) -> argparse.ArgumentParser:
    """Add a second word to a command, such as `check` to `edgereg data`."""
    words = parser.add_subparsers(metavar=name.upper(), required=True, parser_class=type(parser))
    word: argparse.ArgumentParser = words.add_parser(name, help=description)
    word.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return word


def _count(text: str) -> int:
    """Return a whole number from 0 on."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"a whole number from 0 on, not '{text}'")
    return int(text)


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


def _pretrain(args: argparse.Namespace) -> int:
    from edgereg.data.images import open_images
    from edgereg.progress import progress
    from edgereg.train.pretrain_run import pretrain_run

    if args.method is not None:
        args.recipe_flags += ["--method", args.method]
    recipe, options = _prepare(args)
    result = pretrain_run(
        _open_training(args),
        args.out,
        recipe,
        bar=progress,
        watch=None if args.watch is None else open_images(args.watch),
        options=options,
    )
    if not _is_first():
        return 0
    if args.json:
        print_json(result.to_json())
        return 0
    loss, features = (result.checkpoint.metrics[key] for key in ("loss", "features"))
    print(f"{recipe.method} on {recipe.epochs} epochs of {_data(result.checkpoint.data)}")
    print(f"loss {loss['first']:.3f} -> {loss['last']:.3f}")
    print(
        f"features: standard deviation {features['std']:.2f} of that of random directions, "
        f"effective rank {features['rank']:.1f}"
    )
    if "knn" in features:
        print(f"kNN top-1 {features['knn']:.1%} among {args.watch}")
    print(f"wrote {args.out}" if result.history else f"{args.out} was finished before")
    return 0


def _train(args: argparse.Namespace) -> int:
    from edgereg.data.images import open_images
    from edgereg.progress import progress
    from edgereg.train.run import train_run

    recipe, options = _prepare(args)
    result = train_run(
        _open_training(args),
        args.out,
        recipe,
        bar=progress,
        val=None if args.val is None else open_images(args.val),
        init=args.init,
        options=options,
    )
    if not _is_first():
        return 0
    if args.json:
        print_json(result.to_json())
        return 0
    metrics, history = result.checkpoint.metrics, result.history
    epochs = len(history) or recipe.epochs
    print(f"{recipe.model.name}: {epochs} epochs of {_data(result.checkpoint.data)}")
    if history:
        last = history[-1]
        print(f"last epoch: loss {last.loss:.3f}, {last.images_per_second:.0f} images/s")
        if skipped := sum(epoch.skipped for epoch in history):
            print(f"{skipped} steps were skipped: the loss or a gradient was no number")
    for split, measured in metrics.items():
        print(f"{split:5} top-1 {measured['top1']:6.1%}  n = {measured['count']}")
    print(f"wrote {args.out}" if history else f"{args.out} was finished before")
    return 0


def _report(args: argparse.Namespace) -> int:
    from edgereg.report.run_report import write_report

    report = write_report(args.runs, args.out, force=args.force)
    if args.json:
        print_json(report.to_json())
    else:
        print(f"wrote {args.out}")
    return 0


def _open_training(args: argparse.Namespace) -> "Images":
    """Open --data, without what the index sets aside."""
    from edgereg.data.images import open_images
    from edgereg.data.index import apply_index

    images = open_images(args.data)
    if args.index is None:
        return images
    kept, skipped = apply_index(images, args.index)
    if _is_first():
        print(f"{args.index}: {skipped} of {len(images)} images are skipped", file=sys.stderr)
    return kept


def _is_first() -> bool:
    """Return whether this process speaks, among those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def _prepare(args: argparse.Namespace) -> "tuple[Recipe, RunOptions]":
    import torch

    from edgereg.device import choose_device
    from edgereg.recipe import load_recipe
    from edgereg.train.prepared import RunOptions

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    options = RunOptions(
        force=args.force,
        resume=args.resume,
        device=choose_device(args.device),
        workers=args.workers,
        snapshot_every_s=60 * args.snapshot_minutes,
    )
    return load_recipe(args.recipe, args.recipe_flags), options


def _data(data: Mapping[str, Any]) -> str:
    return f"{data['name']} ({data['count']} images)"
