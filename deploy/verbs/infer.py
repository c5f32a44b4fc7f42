"""`edgereg infer`: what a bundle says of image files and folders."""

import argparse
import dataclasses
import json
import sys
from typing import TYPE_CHECKING, Any

from deploy.terminal import printable
from deploy.verbs.arguments import add_bundle_arguments, open_runner_of, positive_int

if TYPE_CHECKING:
    from deploy.service.infer import Answer
    from deploy.service.pictures import Unreadable

__all__ = ["add_parser"]


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the parser of `edgereg infer`."""
    infer = subparsers.add_parser(
        "infer",
        help="classify images with a bundle, or find the nearest references of an encoder's",
        description="Classify image files and folders; with an encoder's bundle, find the nearest "
        "of its reference images and the class that they vote for. An unreadable image is "
        "reported and does not stop the others; the exit code is then 2.",
    )
    add_bundle_arguments(infer, json_help="print one JSON object per line and image")
    infer.add_argument(
        "paths",
        nargs="+",
        metavar="SOURCE",
        help="an image, a folder, a pattern such as 'in/*.jpg', or an array (.npy)",
    )
    infer.add_argument(
        "--top-k",
        type=positive_int,
        default=3,
        metavar="K",
        help="classes, or references, to report for each image (default: %(default)s)",
    )
    infer.set_defaults(handler=_infer)


def _infer(args: argparse.Namespace) -> int:
    from deploy.service.infer import answer
    from deploy.service.pictures import Unreadable, expand, read_frames

    bundle, runner = open_runner_of(args)
    paths = [path for text in args.paths for path in expand(text)]
    frames = read_frames(paths, bundle.manifest.preprocessing)
    width = max((len(printable(label)) for label in bundle.labels), default=0)
    count = unreadable = 0
    for result in answer(bundle, runner, frames, top_k_count=args.top_k):
        count += 1
        if isinstance(result, Unreadable):
            unreadable += 1
        if args.json:
            said = result if isinstance(result, Unreadable) else result[1]
            print(json.dumps(_infer_document(said)), flush=True)
        elif isinstance(result, Unreadable):
            print(f"edgereg: {printable(result.error)}", file=sys.stderr)
        else:
            print(f"{printable(result[0].name)}  {_infer_text(result[1], width)}", flush=True)
    if unreadable:
        print(f"edgereg: {unreadable} of {count} could not be read", file=sys.stderr)
    return 2 if unreadable else 0


def _infer_text(result: "Answer", width: int) -> str:
    from deploy.service.infer import Prediction

    if isinstance(result, Prediction):
        return "  ".join(f"{printable(label):{width}} {p:6.1%}" for label, p in result.top)
    votes = [f"{printable(label):{width}} {share:6.1%}" for label, share in result.vote[:1]]
    nearest = (
        " ".join(printable(part) for part in (near.label, near.name) if part is not None)
        + f" {near.cosine:.4f}"
        for near in result.nearest
    )
    return "  ".join((*votes, *nearest))


def _infer_document(result: "Answer | Unreadable") -> dict[str, Any]:
    document = dataclasses.asdict(result) | {"path": str(result.path)}
    if "top" in document:
        document["top"] = [{"label": label, "probability": p} for label, p in document["top"]]
    if "vote" in document:
        document["vote"] = [{"label": label, "share": share} for label, share in document["vote"]]
    return document
