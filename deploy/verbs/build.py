"""`edgereg build`: TensorRT engines of a bundle, for this machine."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy.terminal import Progress, printable
from deploy.verbs.arguments import json_text, natural, positive_float, positive_int

if TYPE_CHECKING:
    from deploy.measure.engines import BuildReport, BuiltEngine
    from deploy.measure.interleaved import Interleaved

__all__ = ["add_parser"]

_MIB = 1 << 20


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the parser of `edgereg build`."""
    build = subparsers.add_parser(
        "build",
        help="build TensorRT engines of a bundle, for this machine",
        description="Build an engine of each variant with this machine's TensorRT, check that it "
        "computes in the precision asked for and answers as the bundle's reference, and choose the "
        "fastest. What fits is kept. Exit 1 if a variant fails; the others are kept all the same.",
    )
    build.add_argument("bundle", type=Path, metavar="BUNDLE", help="a directory made by export")
    build.add_argument(
        "--precision",
        metavar="P,P",
        help="the bundle's variants to build (default: all; with --dla all but fp32)",
    )
    build.add_argument(
        "--batch",
        type=positive_int,
        default=1,
        metavar="N",
        help="the batch to be fastest for, if the bundle allows more than 1 (default: %(default)s)",
    )
    build.add_argument("--dla", type=natural, metavar="CORE", help="use this DLA core")
    build.add_argument(
        "--tf32", action="store_true", help="let fp32 products be rounded to TF32's 10 bits"
    )
    build.add_argument(
        "--workspace",
        type=positive_int,
        metavar="MIB",
        help="scratch memory of a layer (default: half of what the device has free)",
    )
    build.add_argument(
        "--memory",
        type=positive_int,
        metavar="MIB",
        help="host memory of a build (default: four fifths of what is available)",
    )
    build.add_argument(
        "--time-limit",
        type=positive_float,
        default=3600.0,
        metavar="S",
        help="seconds for each engine (default: %(default)g)",
    )
    build.add_argument("--force", action="store_true", help="build also what the cache has")
    build.add_argument("--json", action="store_true", help="print one JSON document")
    build.set_defaults(handler=_build)


def _build(args: argparse.Namespace) -> int:
    from deploy.bundle.read import open_bundle
    from deploy.errors import BadInputError
    from deploy.measure.engines import build_engines
    from deploy.runtime.engine_build import Limits
    from deploy.runtime.engine_cache import EngineCache
    from deploy.runtime.trt_builder import BuildRequest

    bundle = open_bundle(args.bundle)
    most, variants = bundle.manifest.max_batch, sorted(bundle.manifest.variants, key=_order)
    if args.batch > most:
        raise BadInputError(
            f"bundle '{bundle.path.name}' takes batches of 1 to {most}",
            found=f"--batch {args.batch}",
            remedy="choose another, or export with a larger --max-batch",
        )
    if args.precision is None:
        wanted = [name for name in variants if args.dla is None or name != "fp32"]
    else:
        wanted = sorted(set(args.precision.split(",")), key=_order)
    for name in wanted:
        if name not in variants:
            raise BadInputError(
                "the precisions must be the bundle's variants",
                found=f"'{name}'; bundle '{bundle.path.name}' has {', '.join(variants)}",
                remedy="choose some of them with --precision, or export this one too",
            )
    cache = EngineCache()
    with Progress("build") as progress:
        report = build_engines(
            bundle,
            cache,
            [BuildRequest(name, (1, args.batch, most), args.dla, args.tf32) for name in wanted],
            limits=Limits(
                None if args.memory is None else args.memory * _MIB,
                None if args.workspace is None else args.workspace * _MIB,
                args.time_limit,
            ),
            force=args.force,
            on_stage=progress,
        )
    folder = str(cache.folder)
    print(json_text(report.to_json() | {"folder": folder}) if args.json else _text(report, folder))
    return 1 if report.failures else 0


def _order(name: str) -> tuple[bool, str]:
    return name != "fp32", name


def _text(report: "BuildReport", folder: str) -> str:
    lines = [f"{report.bundle}: {report.backend}"] if report.backend else []
    for name, built in report.engines.items():
        lines += [f"{name}: {line}" for line in _engine_lines(built)]
    lines += [f"{name}: {_speed_line(speed)}" for name, speed in report.speeds.items()]
    for name, error in report.failures.items():
        lines += [f"{name}: FAILED: {error.rule}", f"  found:  {error.found}"]
        lines.append(f"  remedy: {error.remedy}; an older engine, if there is one, was kept")
    lines.append(
        "no choice: without an fp32 engine there is nothing to compare with"
        if report.chosen is None
        else f"chosen, where no precision is asked for: {report.chosen}"
    )
    lines.append(f"engines are in {folder}")
    return "\n".join(map(printable, lines))


def _engine_lines(built: "BuiltEngine") -> list[str]:
    sidecar = built.engine.sidecar
    layers = ", ".join(f"{count} {kind}" for kind, count in sidecar.layers.items())
    size = f"{sidecar.size:,} bytes; its layers show {layers}"
    of_outputs = [stage for stage in built.verified.stages if stage.name != "decode+preprocess"]
    worst = max(stage.comparison.max_scaled_error for stage in of_outputs)
    verified = f"verified: scaled error {worst:.1e} on the golden images"
    if built.outcome is None:
        return [f"kept, nothing has changed since it was built; {size}", verified]
    stages = ", ".join(
        f"{name} {seconds:.1f} s" for name, seconds in built.outcome.stages_s.items()
    )
    lines = [f"built: {reason}" for reason in built.reasons]
    lines.append(f"{stages}; workspace {built.outcome.workspace_bytes // _MIB} MiB; {size}")
    notes = built.outcome.types.notes if built.outcome.types else ()
    lines += [f"note: {note}" for note in notes]
    if built.outcome.gpu_layers:
        lines.append(f"not on the DLA: {', '.join(built.outcome.gpu_layers)}")
    return [*lines, verified]


def _speed_line(speed: "Interleaved") -> str:
    ratio: Any = speed.ratios["infer"]
    line = f"{ratio} of fp32's time, n = {ratio.rounds}, 95 %"
    if speed.failures:
        return f"{line}; {'; '.join(speed.failures)}: not chosen"
    return line if ratio.interval[1] < 1 else f"{line}: not faster than fp32, not chosen"
