"""Simplify every torchvision classifier and hundreds of timm's, with random weights; judge it all.

    python benchmarks/zoo.py --out OUT --onnx --report docs/zoo.md      about an hour on two cores
    python benchmarks/zoo.py --out OUT --all                            every timm architecture
    python benchmarks/zoo.py --quick                                    six of them, a minute

Each architecture is a line of OUT/rows.jsonl. Those that have one are not run again, so that a run
that was stopped goes on; `--again crashed refused` does run those of a status again, `--again all`
everything. One that crashes, or takes too long or too much memory, stops nothing and is named.

Once in each family a wrong fold is planted, which the proof must find, and with --onnx the
simplified model is exported and run by ONNX Runtime at two batch sizes.

Gates: nothing wrong, nothing crashed, >= 99 % simplified and the rest refused with a reason, every
planted fold caught, every file's answers the same; at least 300 timm architectures from 60
families; ResNet-50 in at most 5 s on one core, at 224 pixels. Where --only, --families or --quick
leave a part, no number of architectures is wanted and ResNet-50 is not timed.
"""

import argparse
import dataclasses
import fnmatch
import json
import math
import os
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from architectures import Architecture, choose, every_architecture, million_parameters
from pool import GIB, Limits, Outcome, run
from setting import describe_setting
from zoo_row import STATUSES, Job, measure
from zoo_summary import RESNET50, Summary, gates, summarize
from zoo_table import to_markdown

from edgereg.progress import progress

_QUICK = (
    "torchvision/squeezenet1_1",
    "timm/convnext_atto",
    "timm/fasternet_t0",
    "timm/repvgg_a0",
    "timm/resnetv2_18",
    "timm/vit_tiny_patch16_224",
)
_BYTES = 24  # of a parameter: float32, and two copies in float64
_ONNX_LIMIT = 400.0  # million parameters; a file of 2 GiB holds 500
_REPEATS = 3
_AT_ONCE = 20  # architectures that are built sooner than new processes have imported torch


def main() -> int:
    """Choose, measure, judge."""
    args = _parser().parse_args()
    if args.quick:
        with tempfile.TemporaryDirectory() as folder:
            return _judge(args, args.out or Path(folder))
    if args.out is None:
        _parser().error("--out is needed, except with --quick")
    return _judge(args, args.out)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--all", action="store_true", help="every timm architecture")
    parser.add_argument("--per-family", type=int, default=4, help="timm architectures")
    parser.add_argument("--only", metavar="PATTERN", help="names like timm/resnet*")
    parser.add_argument("--families", help="such as timm/resnet,torchvision/vgg")
    parser.add_argument("--jobs", type=int, default=2, help="processes, a core each")
    parser.add_argument("--limit-seconds", type=float, default=300.0, help="for an architecture")
    parser.add_argument("--limit-gib", type=float, default=_machine_gib() * 0.8)
    parser.add_argument("--again", nargs="+", default=[], choices=(*STATUSES, "all"))
    parser.add_argument("--onnx", action="store_true", help="one of each family as ONNX, too")
    parser.add_argument("--report", type=Path, help="the table, in Markdown")
    parser.add_argument("--quick", action="store_true")
    return parser


def _judge(args: argparse.Namespace, out: Path) -> int:
    out.mkdir(parents=True, exist_ok=True)
    is_part = bool(args.quick or args.only or args.families)
    architectures = _matching(every_architecture(), args)
    limits = Limits(seconds=args.limit_seconds, bytes=args.limit_gib * GIB)
    costs = _costs(architectures, out / "costs.json", workers=args.jobs, limits=limits)
    if not (args.all or is_part):
        architectures = choose(architectures, costs, per_family=args.per_family)
    rows = read_rows(out / "rows.jsonl", again=args.again)
    todo = plan(architectures, costs, rows, onnx=args.onnx)
    rows |= _measure(todo, out / "rows.jsonl", costs, workers=args.jobs, limits=limits)
    if not is_part and RESNET50 not in rows:  # alone on the machine
        timed = next(a for a in architectures if str(a) == "torchvision/resnet50")
        job = Job(timed, size=224, repeats=_REPEATS)
        rows |= _measure([job], out / "rows.jsonl", costs, workers=1, limits=limits)

    names = {str(architecture) for architecture in architectures} | {RESNET50}
    shown = [row for name, row in rows.items() if name in names]
    if args.report:
        args.report.write_text(to_markdown(shown, describe_setting()))
    families = None if is_part else len({a.group for a in architectures})
    return _print_verdict(summarize(shown), families=families)


def plan(
    architectures: Iterable[Architecture],
    costs: Mapping[str, float],
    rows: Mapping[str, Mapping[str, Any]],
    *,
    onnx: bool,
) -> list[Job]:
    """Return what is still to be done, the cheapest first.

    A family's wrong fold is planted into its cheapest member, or, if that could not be simplified,
    into the next; likewise the export.
    """
    jobs = []
    represented: set[str] = set()
    for a in sorted(architectures, key=lambda a: (costs.get(str(a), 0.0), str(a))):
        row = rows.get(str(a))
        job = Job(a)
        if a.group not in represented and (row is None or row["status"] == "simplified"):
            represented.add(a.group)
            is_small = costs.get(str(a), 0.0) <= _ONNX_LIMIT
            job = dataclasses.replace(job, plant=True, onnx=onnx and is_small)
        is_done = row is not None and all(
            part in row for part, wanted in (("plant", job.plant), ("onnx", job.onnx)) if wanted
        )
        if not is_done:
            jobs.append(job)
    return jobs


def read_rows(path: Path, *, again: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """Return the rows of a former run by name, the last of each, but those to be done again.

    A run that was killed may have left half a line.
    """
    rows = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        rows[row["name"]] = row
    return {name: row for name, row in rows.items() if not {row["status"], "all"} & set(again)}


def _measure(
    jobs: Sequence[Job],
    path: Path,
    costs: Mapping[str, float],
    *,
    workers: int,
    limits: Limits,
) -> dict[str, dict[str, Any]]:
    """Run the jobs and append each row when it is there."""
    rows = {}

    def estimate(job: Job) -> float:
        return GIB + costs.get(str(job.architecture), 0.0) * 1e6 * _BYTES

    with progress("zoo", len(jobs)) as report, path.open("a+") as file:
        if file.tell() and not path.read_text().endswith("\n"):
            file.write("\n")  # after the half line of a run that was killed
        results = run(jobs, measure, workers=workers, limits=limits, estimate=estimate)
        for done, (job, outcome) in enumerate(results, start=1):
            row = _row(job, outcome)
            rows[row["name"]] = row
            file.write(json.dumps(row) + "\n")
            file.flush()
            report(done, f"{row['name']}: {row['status']}")
    return rows


def _row(job: Job, outcome: Outcome) -> dict[str, Any]:
    """Return the worker's row, or one that says how the worker ended."""
    row = {"name": job.key, "family": job.architecture.group}
    if outcome.kind == "done":
        row |= outcome.value
    else:
        row |= {"status": outcome.kind, "reason": outcome.detail}
    return row | {"all_seconds": outcome.seconds, "peak_gib": outcome.peak_bytes / GIB}


def _matching(
    architectures: Iterable[Architecture], args: argparse.Namespace
) -> list[Architecture]:
    """Return what --quick, --only and --families leave."""
    found = list(architectures)
    if args.quick:
        found = [a for a in found if str(a) in _QUICK]
    if args.only:
        found = [a for a in found if fnmatch.fnmatch(str(a), args.only)]
    if args.families:
        found = [a for a in found if a.group in args.families.split(",")]
    if not found:
        raise SystemExit("no architecture is left; names are like timm/resnet18")
    return found


def _costs(
    architectures: Sequence[Architecture], path: Path, *, workers: int, limits: Limits
) -> dict[str, float]:
    """Return millions of parameters by name, kept in a file; infinite for what cannot be built."""
    costs: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}
    unknown = [a for a in architectures if str(a) not in costs]
    if len(unknown) <= _AT_ONCE:
        costs |= {str(a): million_parameters(a) for a in unknown}
    else:
        with progress("sizes", len(unknown)) as report:
            results = run(unknown, million_parameters, workers=workers, limits=limits)
            for done, (a, outcome) in enumerate(results, start=1):
                costs[str(a)] = outcome.value if outcome.kind == "done" else math.inf
                report(done, str(a))
    path.write_text(json.dumps(costs, indent=0) + "\n")
    return costs


def _print_verdict(summary: Summary, *, families: int | None) -> int:
    """Print each thing that is wanted and missing, and the figure last."""
    missed = [text for text, passed in gates(summary, families=families).items() if not passed]
    for text in missed:
        print(f"missed: {text}")
    print(summary.to_text())
    return 1 if missed else 0


def _machine_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB


if __name__ == "__main__":
    sys.exit(main())
