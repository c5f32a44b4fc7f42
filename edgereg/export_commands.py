"""`edgereg export`: from a checkpoint to a bundle, or from a bundle to another server."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from deploy.commands import positive_int
from deploy.verbs.arguments import natural
from edgereg.console import CHECKPOINT_HELP, DATA_HELP, add_output, print_json, say
from edgereg.errors import EdgeregError, nearest
from edgereg.inspect_command import add_inspect, print_diffs

if TYPE_CHECKING:
    from edgereg.data.images import Images
    from export.targets import Precision
    from export.traced.report import SimplifyReport

__all__ = ["add_export_commands"]


def add_export_commands(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the verbs between a checkpoint and a bundle: export, and a look at what it does."""
    export = verbs.add_parser(
        "export", help="fold, strip, prove and pack a checkpoint for a target"
    )
    export.add_argument(
        "checkpoint",
        type=Path,
        metavar="CHECKPOINT|BUNDLE",
        help=CHECKPOINT_HELP + ", with --encoder also `edgereg pretrain`; with --to, a bundle that "
        "`edgereg export` wrote",
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
        "--encoder",
        action="store_true",
        help="export the embedding, without a head; labels are not needed",
    )
    export.add_argument(
        "--reference",
        metavar="DATA",
        help="with --encoder: images among which the bundle finds neighbours (default: half of "
        "--data): " + DATA_HELP,
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
        "--holdout",
        type=natural,
        metavar="N",
        help="labelled images of --data that the bundle carries, for `edgereg verify` to measure "
        "its accuracy on the device (default: 256, or fewer within 32 MiB); 0 for none",
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
    add_inspect(verbs)


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
    if args.reference is not None and not args.encoder:
        raise EdgeregError(
            "reference images belong to an encoder",
            found="--reference without --encoder",
            remedy="export the embedding with --encoder, or leave it out",
        )
    if args.bisect:
        return _bisect(args)
    from edgereg.data.images import open_images
    from edgereg.ship import ship
    from export.judge.accuracy import parse_gates
    from export.judge.judging import neighbours_text

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
        is_encoder=args.encoder,
        reference=None if args.reference is None else open_images(args.reference),
        holdout=args.holdout,
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
        if comparison.min_cosine is not None:
            print(f"{precision}: {neighbours_text(comparison, variant.verdict)}")
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
        is_encoder=args.encoder,
        on_stage=say,
    )
    return print_diffs(diffs, as_json=args.json)


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
