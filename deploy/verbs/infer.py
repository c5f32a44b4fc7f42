"""`edgereg infer`: what a bundle says of images, films and what a camera sees."""

import argparse
import contextlib
import dataclasses
import itertools
import json
import signal
import sys
import threading
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy.terminal import printable
from deploy.threads import beside
from deploy.verbs.arguments import (
    add_bundle_arguments,
    opening_bundle_of,
    positive_int,
    runner_of,
    starting,
)

if TYPE_CHECKING:
    from deploy.report.annotate import Annotator
    from deploy.runtime.preprocess import Preprocessing
    from deploy.service.camera import CameraCounts
    from deploy.service.infer import Answer
    from deploy.service.pictures import Frame, Unreadable

__all__ = ["add_parser"]


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the parser of `edgereg infer`."""
    infer = subparsers.add_parser(
        "infer",
        help="classify images, films or a camera with a bundle, or find an encoder's nearest",
        description="Classify images, films or what a camera sees; with an encoder's bundle, find "
        "the nearest of its reference images and the class that they vote for. What is unreadable "
        "is reported and does not stop the others; the exit code is then 2. A camera is read until "
        "SIGTERM or Ctrl-C, its newest frame each time; frames that were overtaken or repeated are "
        "counted.",
    )
    add_bundle_arguments(infer, json_help="print one JSON object per line and image")
    infer.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="an image, a folder, a pattern such as 'in/*.jpg', an array (.npy), a film "
        "(.mp4, ...), or a camera: v4l2:/dev/video0, csi:0",
    )
    infer.add_argument(
        "--top-k",
        type=positive_int,
        default=3,
        metavar="K",
        help="classes, or references, to report for each image (default: %(default)s)",
    )
    infer.add_argument(
        "--annotate",
        type=Path,
        metavar="DIR",
        help="write each picture with its answer on it into a new folder",
    )
    infer.add_argument(
        "--every",
        type=positive_int,
        default=1,
        metavar="N",
        help="of a film, each N-th frame (default: all)",
    )
    infer.add_argument(
        "--frames", type=positive_int, metavar="N", help="stop after so many answers"
    )
    infer.add_argument(
        "--size",
        type=_size,
        default=(1280, 720),
        metavar="WxH",
        help="of a camera's frames (default: 1280x720)",
    )
    infer.add_argument(
        "--fps",
        type=positive_int,
        default=30,
        metavar="N",
        help="frames a second of a CSI camera (default: %(default)s)",
    )
    infer.set_defaults(handler=_infer)


def _infer(args: argparse.Namespace) -> int:
    annotate = None if args.annotate is None else _annotator(args.annotate)
    with contextlib.ExitStack() as start:
        start.enter_context(starting())
        with opening_bundle_of(args) as bundle:
            spec = bundle.manifest.preprocessing
            with beside(lambda: _read_ahead(args, spec)) as read:
                runner = runner_of(args, bundle)
        first, rest = read[0]
        from deploy.service.infer import answer
        from deploy.service.pictures import Unreadable

        width = max((len(printable(label)) for label in bundle.labels), default=0)
        count = unreadable = 0
        with contextlib.closing(rest):
            frames = itertools.chain(first, rest)
            for result in answer(bundle, runner, frames, top_k_count=args.top_k):
                count += 1
                _show(result, as_json=args.json, width=width)
                start.close()
                if isinstance(result, Unreadable):
                    unreadable += 1
                elif annotate is not None:
                    annotate(result[0].pixels, name=result[0].name, lines=_lines(result[1]))
                if _is_live(args):
                    from deploy.service.notify import notify

                    # a heart beats for a fresh frame that was answered, and for nothing else
                    notify("READY=1\nWATCHDOG=1")
                if count == args.frames:
                    break
    if unreadable:
        print(f"edgereg: {unreadable} of {count} could not be read", file=sys.stderr)
    return 2 if unreadable else 0


def _read_ahead(
    args: argparse.Namespace, spec: "Preprocessing"
) -> "tuple[list[Frame | Unreadable], Generator[Frame | Unreadable, None, None]]":
    """Return the first frame, but of a camera none, and the others; import what answers them."""
    import deploy.service.infer  # noqa: F401

    frames = _frames(args, spec)
    return [] if _is_live(args) else list(itertools.islice(frames, 1)), frames


def _is_live(args: argparse.Namespace) -> bool:
    from deploy.service.sources import is_camera

    return len(args.sources) == 1 and is_camera(args.sources[0])


def _annotator(folder: Path) -> "Annotator":
    from deploy.report.annotate import Annotator

    return Annotator(folder)


def _frames(
    args: argparse.Namespace, spec: "Preprocessing"
) -> "Generator[Frame | Unreadable, None, None]":
    from deploy.service.sources import read_camera, read_sources

    if not _is_live(args):
        yield from read_sources(args.sources, spec, every=args.every)
        return
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    width, height = args.size

    def on_end(counts: "CameraCounts") -> None:
        if args.json:
            print(json.dumps({"source": args.sources[0], **dataclasses.asdict(counts)}), flush=True)
        else:
            print(
                f"{counts.fresh} fresh frames, {counts.dropped} overtaken, {counts.stale} stale",
                file=sys.stderr,
            )

    frames = read_camera(
        args.sources[0], spec, width=width, height=height, fps=args.fps, on_end=on_end
    )
    with contextlib.closing(frames):
        for frame in frames:
            if stop.is_set():
                return
            yield frame


def _show(result: "tuple[Frame, Answer] | Unreadable", *, as_json: bool, width: int) -> None:
    """Print an answer; its labels are as wide as this."""
    from deploy.service.pictures import Unreadable

    if isinstance(result, Unreadable):
        if as_json:
            print(json.dumps(_infer_document(result)), flush=True)
        else:
            print(f"edgereg: {printable(result.error)}", file=sys.stderr)
        return
    frame, said = result
    if as_json:
        print(json.dumps(_infer_document(said, frame.time_s)), flush=True)
    else:
        print(f"{printable(frame.name)}  {_infer_text(said, width)}", flush=True)


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    return positive_int(width), positive_int(height)


def _lines(said: "Answer") -> list[str]:
    """Return what is written onto a picture, best first."""
    from deploy.service.infer import Prediction

    guesses = said.top if isinstance(said, Prediction) else said.vote
    if guesses:
        return [f"{printable(label)} {share:.1%}" for label, share in guesses]
    assert not isinstance(said, Prediction)
    return [f"{printable(near.name)} {near.cosine:.4f}" for near in said.nearest]


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


def _infer_document(result: "Answer | Unreadable", time_s: float | None = None) -> dict[str, Any]:
    document = dataclasses.asdict(result) | {"path": str(result.path)}
    document |= {} if time_s is None else {"time_s": time_s}
    if "top" in document:
        document["top"] = [{"label": label, "probability": p} for label, p in document["top"]]
    if "vote" in document:
        document["vote"] = [{"label": label, "share": share} for label, share in document["vote"]]
    return document
