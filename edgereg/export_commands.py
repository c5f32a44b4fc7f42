"""The commands between a checkpoint and a bundle: export, and a look at what it simplifies."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from deploy.commands import positive_int
from edgereg.console import CHECKPOINT_HELP, DATA_HELP, add_json, add_output, print_json, say
from edgereg.errors import EdgeregError, nearest

if TYPE_CHECKING:
    from collections.abc import Mapping

    from deploy.inspection import Inspection
    from edgereg.data.images import Images
    from export.module_diff import ModuleDiff
    from export.report import SimplifyReport
    from export.targets import Precision

__all__ = ["add_export_commands"]

_LIBRARIES = ("torchvision:", "timm:")


def add_export_commands(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the verbs of this file."""
    export = verbs.add_parser(
        "export", help="fold, strip, prove and pack a checkpoint for a target"
    )
    export.add_argument(
        "checkpoint",
        type=Path,
        metavar="CHECKPOINT|BUNDLE",
        help=CHECKPOINT_HELP + "; with --to, a bundle that `edgereg export` wrote",
    )
    export.add_argument("--target", help="such as jetpack6.2 or onnxruntime-x86")
    export.add_argument("--data", help="images that were not trained on: " + DATA_HELP)
    what = export.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, metavar="BUNDLE", help="what to write")
    what.add_argument(
        "--bisect",
        action="store_true",
        help="write nothing: compare every module's output with the exported graph, and name the "
        "first at which they part",
    )
    export.add_argument(
        "--precision",
        default="fp32",
        metavar="LIST",
        help="variants to make, such as fp32,fp16,int8 (default: fp32)",
    )
    export.add_argument(
        "--calib",
        metavar="DATA",
        help="images that int8 and fp16 take their ranges from, none of them in --data: "
        + DATA_HELP,
    )
    export.add_argument(
        "--index",
        type=Path,
        help="of the images of --calib, skip what `edgereg data check --out` found",
    )
    export.add_argument(
        "--gate",
        metavar="PRECISION=SHARE",
        help="the largest net loss of accuracy to ship, as a share of the images, in place of the "
        "usual ones: int8=0.01,fp16=0.002",
    )
    export.add_argument(
        "--max-batch",
        type=positive_int,
        default=1,
        metavar="N",
        help="let the batch be anything from 1 to N (default: a static shape of 1)",
    )
    export.add_argument(
        "--input",
        choices=("float", "uint8"),
        default="float",
        help="what the model takes: normalised float32 (N, 3, H, W), or pixels, uint8 (N, H, W, 3) "
        "(default: float)",
    )
    export.add_argument(
        "--allow-slower",
        action="store_true",
        help="ship a variant that is slower than fp32 where this machine is the target",
    )
    export.add_argument(
        "--to",
        choices=("triton", "kserve", "deepstream"),
        help="write what this server needs to run one precision of a bundle",
    )
    export.add_argument(
        "--storage-uri", metavar="URI", help="for --to kserve: where its files will be found"
    )
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
    inspect.add_argument(
        "--diff",
        type=Path,
        metavar="CHECKPOINT",
        help="of a bundle: compare every module's output with the checkpoint it was exported from",
    )
    add_json(inspect)
    inspect.set_defaults(handler=_inspect)


def _export(args: argparse.Namespace) -> int:
    if args.to is not None:
        return _hand_over(args)
    missing = [name for name in ("target", "data") if getattr(args, name) is None]
    if missing:
        raise EdgeregError(
            "a checkpoint is exported for a target, and judged on images",
            found=f"no --{missing[0]}",
            remedy="such as --target jetpack6.2 --data VAL",
        )
    if args.bisect:
        return _bisect(args)
    from edgereg.data.images import open_images
    from edgereg.ship import ship
    from export.accuracy import parse_gates

    result = ship(
        args.checkpoint,
        open_images(args.data),
        args.out,
        target=args.target,
        precisions=_precisions(args.precision),
        calibration=_calibration(args),
        gates={} if args.gate is None else parse_gates(args.gate),
        allow_slower=args.allow_slower,
        max_batch=args.max_batch,
        takes_pixels=args.input == "uint8",
        force=args.force,
        on_stage=say,
    )
    if args.json:
        print_json({**result.to_json(), "bundle": str(result.path)})
        return 0
    print(_simplify_text(result.report))
    for precision, variant in result.variants.items():
        judged, comparison = variant.conformance, variant.comparison
        print(f"{precision}: {judged.verdict} for {args.target} ({judged.judge}: {judged.detail})")
        print(
            f"{precision}: scaled error {comparison.max_scaled_error:.1e} on {comparison.count} "
            f"golden images, {variant.size:,} bytes"
        )
        if variant.verdict is not None:
            print(variant.verdict.text)
        if variant.speed is not None:
            print(f"{precision}: {variant.speed.to_text()}")
    if result.ablation is not None:
        print(result.ablation.to_text())
    print(f"wrote {result.path}, and its report as .json and .html beside it")
    return 0


def _hand_over(args: argparse.Namespace) -> int:
    from deploy.bundle.read import open_bundle
    from export.repositories import write_repository

    if args.bisect:
        raise EdgeregError(
            "--to writes a bundle's files for a server",
            found="--bisect, which writes nothing",
            remedy="name a directory with --out",
        )
    write_repository(
        open_bundle(args.checkpoint),
        args.out,
        kind=args.to,
        precision=args.precision,
        storage_uri=args.storage_uri,
        force=args.force,
    )
    if args.json:
        print_json({"to": args.to, "precision": args.precision, "out": str(args.out)})
    else:
        print(f"wrote {args.out} for {args.to}")
    return 0


def _bisect(args: argparse.Namespace) -> int:
    from edgereg.data.images import open_images
    from edgereg.parting import bisect_export

    diffs = bisect_export(
        args.checkpoint,
        open_images(args.data),
        target=args.target,
        precisions=_precisions(args.precision),
        calibration=_calibration(args),
        max_batch=args.max_batch,
        takes_pixels=args.input == "uint8",
        on_stage=say,
    )
    return _print_diffs(diffs, as_json=args.json)


def _print_diffs(diffs: "Mapping[str, ModuleDiff]", *, as_json: bool) -> int:
    """Print the comparisons; 1 if one parts."""
    if as_json:
        print_json({precision: diff.to_json() for precision, diff in diffs.items()})
    else:
        print("\n\n".join(f"{precision}\n{diff.to_text()}" for precision, diff in diffs.items()))
    return int(any(diff.output_error > diff.limit for diff in diffs.values()))


def _calibration(args: argparse.Namespace) -> "Images | None":
    from edgereg.data.images import open_images
    from edgereg.data.index import apply_index

    if args.calib is None:
        if args.index is not None:
            raise EdgeregError(
                "an index belongs to the images of --calib",
                found="--index without --calib",
                remedy="name the calibration images, or leave it out",
            )
        return None
    images = open_images(args.calib)
    if args.index is None:
        return images
    kept, skipped = apply_index(images, args.index)
    say(f"skipping {skipped} calibration images that {args.index} sets aside")
    return kept


def _precisions(text: str) -> "tuple[Precision, ...]":
    """Read a list of precisions; which of them a target takes, its row says."""
    from export.targets import Precision

    known: tuple[Precision, ...] = get_args(Precision)
    names = [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise EdgeregError(
            f"a precision is one of {', '.join(known)}, with commas between several",
            found=f"'{unknown[0]}'",
            remedy=nearest(unknown[0], known),
        )
    return tuple(precision for name in names for precision in known if precision == name)


def _inspect(args: argparse.Namespace) -> int:
    if args.diff is not None:
        from edgereg.parting import diff_bundle

        return _print_diffs(
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
