"""The commands between a checkpoint and a bundle: export, and a look at what it simplifies."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from deploy.commands import positive_int
from edgereg.console import CHECKPOINT_HELP, DATA_HELP, add_json, add_output, print_json, say
from edgereg.errors import EdgeregError, nearest

if TYPE_CHECKING:
    from deploy.inspection import Inspection
    from export.report import SimplifyReport

__all__ = ["add_export_commands"]

_LIBRARIES = ("torchvision:", "timm:")


def add_export_commands(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the verbs of this file."""
    export = verbs.add_parser(
        "export", help="fold, strip, prove and pack a checkpoint for a target"
    )
    export.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help=CHECKPOINT_HELP)
    export.add_argument("--target", required=True, help="such as jetpack6.2 or onnxruntime-x86")
    export.add_argument(
        "--data", required=True, help="images that were not trained on: " + DATA_HELP
    )
    export.add_argument("--out", type=Path, required=True, metavar="BUNDLE", help="what to write")
    add_output(export)
    export.set_defaults(handler=_export)

    inspect = verbs.add_parser(
        "inspect",
        help="show what the simplification folds, strips and skips",
        description="Show what the simplification did to a bundle, or does to a checkpoint or to "
        "a model with random weights: site by site, with the reason for each that it skips.",
    )
    inspect.add_argument(
        "subject",
        metavar="CHECKPOINT|BUNDLE|MODEL",
        help="a directory that `edgereg train`, `pretrain` or `export` wrote, or torchvision:NAME "
        "or timm:NAME",
    )
    inspect.add_argument(
        "--image-size",
        type=positive_int,
        metavar="N",
        help="height and width of a model's input (default: its usual ones)",
    )
    inspect.add_argument(
        "--all", action="store_true", help="a line for each site, however many there are"
    )
    add_json(inspect)
    inspect.set_defaults(handler=_inspect)


def _export(args: argparse.Namespace) -> int:
    from edgereg.data.images import open_images
    from edgereg.ship import ship

    result = ship(
        args.checkpoint,
        open_images(args.data),
        args.out,
        target=args.target,
        force=args.force,
        on_stage=say,
    )
    judged, comparison, accuracy = result.conformance, result.comparison, result.accuracy
    if args.json:
        print_json(
            {
                "bundle": str(result.path),
                "conformance": {"judge": judged.judge, "verdict": judged.verdict},
                "max_scaled_error": comparison.max_scaled_error,
                "top1": None if accuracy is None else accuracy.top1,
                "simplify": result.report.to_json(),
            }
        )
        return 0
    print(_simplify_text(result.report))
    print(f"{args.target}: {judged.verdict} ({judged.judge}: {judged.detail})")
    print(
        f"fp32: scaled error {comparison.max_scaled_error:.1e} on {comparison.count} golden images"
    )
    if accuracy is not None:
        print(f"fp32: top-1 {accuracy.top1:.1%} on {accuracy.count} held-out images")
    print(f"wrote {result.path}")
    return 0


def _inspect(args: argparse.Namespace) -> int:
    inspection = _inspected(args.subject, args.image_size)
    if args.json:
        print_json(inspection.to_json())
    else:
        print(inspection.to_text(show_all=args.all))
    return 0


def _inspected(subject: str, image_size: int | None) -> "Inspection":
    """Find out what is to be inspected; torch is imported for what needs it only."""
    path, is_model = Path(subject), subject.startswith(_LIBRARIES)
    if image_size is not None and not is_model:
        raise EdgeregError(
            "only a model that is built for the occasion can be given an image size",
            found=f"--image-size {image_size} with '{subject}'",
            remedy="leave it out: a checkpoint and a bundle have theirs",
        )
    if is_model:
        from edgereg.inspection import inspect_model

        return inspect_model(subject, image_size=image_size, on_stage=say)
    if (path / "manifest.json").is_file():
        from deploy.inspection import inspect_bundle

        return inspect_bundle(path)
    if (path / "checkpoint.json").is_file():
        from edgereg.inspection import inspect_checkpoint

        return inspect_checkpoint(path, on_stage=say)
    found = (
        "holds neither manifest.json nor checkpoint.json" if path.is_dir() else "is no directory"
    )
    remedy = "name what `edgereg train` or `edgereg export` wrote, or torchvision:NAME or timm:NAME"
    if ":" in subject and not path.exists():
        remedy = nearest(subject, [library + subject.partition(":")[2] for library in _LIBRARIES])
    raise EdgeregError(
        "what is inspected is a checkpoint, a bundle, torchvision:NAME or timm:NAME",
        found=f"'{subject}' {found}",
        remedy=remedy,
    )


def _simplify_text(report: "SimplifyReport") -> str:
    from deploy.inspection import counts_text

    document = report.to_json()
    return "\n".join(
        [
            counts_text(document["before"], document["after"]),
            f"left, with the reason: {len(report.skipped)} sites (edgereg inspect names them)",
            f"float64 relative error {report.model_error:.1e}",
        ]
    )
