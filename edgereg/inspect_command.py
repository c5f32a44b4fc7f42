"""`edgereg inspect`: what the simplification does, and where a bundle parts from its checkpoint."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from deploy.commands import positive_int
from edgereg.console import add_json, print_json, say
from edgereg.errors import EdgeregError, nearest

if TYPE_CHECKING:
    from collections.abc import Mapping

    from deploy.inspection import Inspection
    from export.judge.module_report import ModuleDiff

__all__ = ["add_inspect", "print_diffs"]

_LIBRARIES = ("torchvision:", "timm:")


def add_inspect(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the parser of `edgereg inspect`."""
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
    inspect.add_argument(
        "--diff",
        type=Path,
        metavar="CHECKPOINT",
        help="of a bundle: compare every module's output with the checkpoint it was exported from",
    )
    add_json(inspect)
    inspect.set_defaults(handler=_inspect)


def _inspect(args: argparse.Namespace) -> int:
    if args.diff is not None:
        from edgereg.parting import diff_bundle

        return print_diffs(
            diff_bundle(Path(args.subject), args.diff, on_stage=say), as_json=args.json
        )
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


def print_diffs(diffs: "Mapping[str, ModuleDiff]", *, as_json: bool) -> int:
    """Print the comparisons; 1 if one parts."""
    if as_json:
        print_json({precision: diff.to_json() for precision, diff in diffs.items()})
    else:
        print("\n\n".join(f"{precision}\n{diff.to_text()}" for precision, diff in diffs.items()))
    return int(any(diff.output_error > diff.limit for diff in diffs.values()))
