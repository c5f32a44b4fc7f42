"""`edgereg eval`: a classifier's accuracy, or what an encoder's features are worth."""

import argparse
from pathlib import Path

from deploy.commands import positive_int
from edgereg.console import CHECKPOINT_HELP, DATA_HELP, add_output, print_json
from edgereg.errors import CheckpointError, EdgeregError

__all__ = ["add_eval_command"]

_FOR_ENCODERS = ("knn", "linear", "finetune", "retrieval", "device", "workers")


def add_eval_command(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the verb of this file."""
    evaluate = verbs.add_parser(
        "eval",
        help="measure a classifier's accuracy, or what an encoder's features are worth",
        description="Without --train, measure a classifier. With it, measure what the backbone of "
        "an encoder or a classifier is worth: by --knn and --linear unless others are named.",
        epilog="Any key of a recipe can be set on the command line for --finetune: --epochs 10",
    )
    evaluate.add_argument(
        "checkpoint", type=Path, metavar="CHECKPOINT", help=CHECKPOINT_HELP + ", or `pretrain`"
    )
    evaluate.add_argument("--data", required=True, help="labelled, to measure on: " + DATA_HELP)
    evaluate.add_argument(
        "--train", metavar="DATA", help="labelled with the same classes, to learn from"
    )
    evaluate.add_argument(
        "--knn", action="store_true", help="let the nearest training images vote, weighted"
    )
    evaluate.add_argument(
        "--linear", action="store_true", help="fit a linear classifier to frozen features"
    )
    evaluate.add_argument(
        "--finetune",
        type=_shares,
        metavar="SHARES",
        help="train the whole model with these shares of the labels, such as 0.01,0.1,1",
    )
    evaluate.add_argument(
        "--scratch",
        action="store_true",
        help="for each share of --finetune, train from random weights, too",
    )
    evaluate.add_argument(
        "--recipe", type=Path, metavar="YAML", help="of --finetune (default: the built-in recipe)"
    )
    evaluate.add_argument(
        "--retrieval", type=Path, metavar="PNG", help="draw test images and their neighbours"
    )
    evaluate.add_argument(
        "--seed",
        type=int,
        metavar="N",
        help="of everything that is drawn (default: the recipe's, which is 0)",
    )
    evaluate.add_argument(
        "--device", choices=("cpu", "cuda"), help="with --train (default: cuda where there is one)"
    )
    evaluate.add_argument(
        "--threads", type=positive_int, metavar="N", help="CPU threads (default: torch's)"
    )
    evaluate.add_argument(
        "--workers",
        type=positive_int,
        metavar="N",
        help="with --train: processes that decode (default: none but this one)",
    )
    add_output(evaluate)
    evaluate.set_defaults(handler=_eval, takes_recipe_flags=True, parser=evaluate)


def _shares(text: str) -> tuple[float, ...]:
    """Read shares of the labels, such as 0.01,0.1,1."""
    try:
        shares = tuple(float(share) for share in text.split(","))
    except ValueError:
        shares = ()
    if not shares or not all(0 < share <= 1 for share in shares):
        raise argparse.ArgumentTypeError(f"shares above 0 and up to 1, such as 0.1,1, not '{text}'")
    return shares


def _eval(args: argparse.Namespace) -> int:
    if not args.finetune:
        if args.recipe_flags:
            args.parser.error(f"unrecognized arguments: {' '.join(args.recipe_flags)}")
        for name in ("recipe", "scratch"):
            if getattr(args, name):
                args.parser.error(f"--{name} is for --finetune")
    if args.threads is not None:
        import torch

        torch.set_num_threads(args.threads)
    if args.train is not None:
        return _eval_encoder(args)
    given = [name for name in _FOR_ENCODERS if getattr(args, name)]
    if given:
        raise EdgeregError(
            "features are measured with labelled images to learn from",
            found=f"--{given[0]} without --train",
            remedy="name them with --train; --data are those that are measured on",
        )
    return _eval_classifier(args)


def _eval_encoder(args: argparse.Namespace) -> int:
    import dataclasses

    from edgereg.data.images import open_images
    from edgereg.device import choose_device
    from edgereg.evaluate_encoder import Plan, evaluate_encoder
    from edgereg.progress import progress
    from edgereg.recipe import load_recipe
    from edgereg.train.prepared import RunOptions

    recipe = load_recipe(args.recipe, args.recipe_flags)
    if args.seed is not None:
        recipe = dataclasses.replace(recipe, seed=args.seed)
    usual = not (args.knn or args.linear or args.finetune)
    result = evaluate_encoder(
        args.checkpoint,
        open_images(args.data),
        open_images(args.train),
        plan=Plan(
            knn=args.knn or usual,
            linear=args.linear or usual,
            shares=args.finetune or (),
            scratch=args.scratch,
            retrieval=args.retrieval,
        ),
        recipe=recipe,
        bar=progress,
        options=RunOptions(
            force=args.force, device=choose_device(args.device), workers=args.workers or 0
        ),
    )
    if args.json:
        print_json(result.to_json())
        return 0
    print(result.to_text())
    if args.retrieval is not None:
        print(f"wrote {args.retrieval}")
    return 0


def _eval_classifier(args: argparse.Namespace) -> int:
    from edgereg.checkpoint import load_checkpoint
    from edgereg.data.images import open_images
    from edgereg.progress import progress
    from edgereg.train.run import eval_run

    if load_checkpoint(args.checkpoint).kind == "encoder":
        raise CheckpointError(
            "an encoder has no head: it is measured with labelled images to learn from",
            found=f"'{args.checkpoint}' is an encoder, and no --train",
            remedy="name them with --train",
        )
    checkpoint, result = eval_run(args.checkpoint, open_images(args.data), bar=progress)
    per_class = dict(zip(checkpoint.class_names, result.per_class, strict=True))
    if args.json:
        # JSON has no NaN: a class without an image has no accuracy
        shown = {name: None if share != share else share for name, share in per_class.items()}
        print_json({"top1": result.top1, "count": result.count, "per_class": shown})
        return 0
    print(f"top-1 {result.top1:.1%}  n = {result.count}")
    for name, share in per_class.items():
        print(f"  {name:20} {'no image' if share != share else f'{share:6.1%}'}")
    return 0
