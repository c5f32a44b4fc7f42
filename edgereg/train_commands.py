"""The commands that train: without labels, and with them."""

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy.commands import positive_int
from edgereg.console import DATA_HELP, add_output, count_from_zero, print_json

if TYPE_CHECKING:
    from edgereg.data.images import Images
    from edgereg.recipe import Recipe
    from edgereg.train.prepared import RunOptions

__all__ = ["add_train_commands"]

_METHODS = ("pirl", "colorization", "simclr", "vicreg", "lejepa", "distill")  # as in the recipe

_RECIPE_EPILOG = (
    "Any key of a recipe can be set on the command line and wins over the file: "
    "--epochs 10 --optim.lr 1e-3 --model.name torchvision:mobilenet_v3_small"
)


def add_train_commands(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the verbs of this file."""
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
        "--workers",
        type=count_from_zero,
        default=0,
        metavar="N",
        help="processes that decode (default: 0)",
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
