"""Our bundles against what a user would run instead, side by side in one run.

    python benchmarks/latency.py --out OUT      nine models, 1 and 2 threads, batch 1 and 8; hours
    python benchmarks/latency.py --out OUT --only "ViT-Ti,our CNN" --threads 1 --batch 1
    python benchmarks/latency.py --quick        our CNN, one thread, batch 1; a minute

*Ours* is the bundle that `edgereg export --target onnxruntime-x86 --precision fp32,int8` ships, in
int8 where it ships that and else in fp32, run by deploy's runner. The peers are in peers.py; they
are installed into OUT/peers. All run in turns in one process, with as many threads; a ratio is the
median of the rounds' ratios to plain torch.onnx.export and ONNX Runtime, with a 95 % interval. The
answers of all are compared with torch's on real images: by SQNR, and for trained models by top-1.

Each model, number of threads and batch size is a job, whose result is OUT/JOB.json; a finished one
is not run again (--again does; other images need another OUT), so that a long run may be stopped
and continued. The table is OUT/latency.md, shorter OUT/latency-summary.md, the plots
OUT/latency-*.png.

The full form fails (exit 1) where a model is slower than its wanted speed or than the fastest peer,
as subjects.py has them, where such a peer fails, or where ours answers noise. --quick leaves
torch.compile out, which takes half a minute to compile, and fails where ours cannot be run or is
less than 0.8 times as fast as plain ONNX Runtime.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from install import install
from latency_job import IMAGES, Job, Result, Row, measure
from latency_report import draw, figure, misses, to_markdown
from latency_summary import to_summary
from peak import Peak
from peers import PEERS, REQUIREMENTS
from setting import describe_setting
from subjects import QUICK, SUBJECTS, Photos, Subject

_FLOOR = 0.8  # of plain ONNX Runtime's speed, in --quick
_QUICK_PEERS = tuple(name for name in PEERS if name != "torch.compile")


def main() -> int:
    """Measure what is not measured yet, write the table, judge."""
    args = _parser().parse_args()
    if args.out is None and not args.quick:
        _parser().error("--out is needed, except with --quick")
    with tempfile.TemporaryDirectory() as folder:
        out = args.out or Path(folder)
        out.mkdir(parents=True, exist_ok=True)
        keep_images(out, args.images)
        said = install(args.peers or out / "peers", REQUIREMENTS)
        if said:
            _say(f"the peers could not all be installed: {said.splitlines()[-1]}")
        results = run(jobs(args), Photos(args.images), out, again=args.again)
        return _judge(results, out, quick=args.quick)


def _parser() -> argparse.ArgumentParser:
    names = ", ".join(subject.name for subject in SUBJECTS)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, metavar="DIR", help="results, bundles and peers")
    parser.add_argument("--peers", type=Path, metavar="DIR", help="where peers are installed")
    parser.add_argument("--only", metavar="MODELS", help=f"some of {names}, with commas")
    parser.add_argument("--threads", default="1,2", help="numbers (default: %(default)s)")
    parser.add_argument("--batch", default="1,8", help="sizes (default: %(default)s)")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds of rounds a question")
    parser.add_argument("--images", type=Path, metavar="DIR", help="holds train/ and test/CLASS/")
    parser.add_argument("--again", action="store_true", help="run finished jobs again")
    parser.add_argument("--quick", action="store_true", help="a minute: our CNN, hardly trained")
    return parser


def keep_images(out: Path, images: Path | None) -> None:
    """Refuse a folder whose results, nets and bundles are of other images."""
    name, note = "emoji-10" if images is None else str(images.resolve()), out / "images.txt"
    if note.is_file() and (found := note.read_text("utf-8").strip()) != name:
        _parser().error(f"{out} has results on {found}, not {name}: name another --out")
    note.write_text(f"{name}\n", "utf-8")


def jobs(args: argparse.Namespace) -> list[Job]:
    """Return the jobs that the arguments ask for."""
    if args.quick:
        return [Job(QUICK[0], 1, 1, 3.0, _QUICK_PEERS)]
    return [
        Job(subject, threads, batch, args.budget, with_accuracy=(threads, batch) == (1, 1))
        for threads in _numbers(args.threads)
        for batch in _batches(args.batch)
        for subject in _chosen(args.only)
    ]


def run(todo: Sequence[Job], photos: Photos, out: Path, *, again: bool = False) -> list[Result]:
    """Return the results of jobs; those that OUT has are read."""
    results = []
    for job in todo:
        path = out / f"{job.slug}.json"
        if again or not path.is_file():
            found = measure(job, photos, out, say=lambda what: _say(f"{job.slug}: {what}"))  # noqa: B023
            document = {**describe_setting(), "peers": _versions(), **dataclasses.asdict(found)}
            part = path.with_suffix(".part")
            part.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
            part.rename(path)
        results.append(read(path))
    return results


def read(path: Path) -> Result:
    """Read the result of a job."""
    document = json.loads(path.read_text(encoding="utf-8"))
    values: dict[str, Any] = {f.name: document[f.name] for f in dataclasses.fields(Result)}
    values["rounds"] = tuple(values["rounds"])
    values["peaks"] = {kind: Peak(**peak) for kind, peak in values["peaks"].items()}
    values["rows"] = tuple(Row(**_tuples(row)) for row in values["rows"])
    return Result(**values)


def _tuples(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row with its intervals as they were: JSON has lists."""
    return {key: tuple(v) if isinstance(v, list) else v for key, v in row.items()}


def _judge(results: Sequence[Result], out: Path, *, quick: bool) -> int:
    table = to_markdown(results)
    (out / "latency.md").write_text(table, encoding="utf-8")
    (out / "latency-summary.md").write_text(to_summary(results), encoding="utf-8")
    plots = draw(results, out)
    print(table)
    for result in results:
        peaks = ", ".join(f"{p.kind} {p.gflops:.0f} ({p.by})" for p in result.peaks.values())
        print(
            f"{result.model}, {result.threads} threads, batch {result.batch}: rounds "
            f"{result.rounds[0]} and {result.rounds[1]}; load {result.load:.1f}; GFLOP/s: {peaks}"
        )
        print(*(f"  {row.peer}: {row.note}" for row in result.rows if row.note), sep="\n", end="")
    print(f"\n{len(plots)} plots beside {out / 'latency.md'}")
    if quick:
        missed = [
            f"below the floor of {_FLOOR} times plain ONNX Runtime"
            for result in results
            if result.rows[0].speedup is None or result.rows[0].speedup[0] < _FLOOR
        ]
    else:
        missed = misses(results, SUBJECTS)
    for line in missed:
        print(f"MISSED: {line}")
    print(f"latency: {figure(results)}: {f'{len(missed)} missed' if missed else 'all kept'}")
    return 1 if missed else 0


def _chosen(only: str | None) -> list[Subject]:
    names = {subject.name: subject for subject in SUBJECTS}
    wanted = [*names] if only is None else [name.strip() for name in only.split(",")]
    unknown = [name for name in wanted if name not in names]
    if unknown:
        _parser().error(f"--only takes some of {', '.join(names)}; found: '{unknown[0]}'")
    return [names[name] for name in wanted]


def _numbers(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = [0]
    if min(numbers) < 1:
        _parser().error(f"a list of numbers of 1 or more is wanted, such as 1,2; found: '{text}'")
    return numbers


def _batches(text: str) -> list[int]:
    sizes = _numbers(text)
    odd = [size for size in sizes if IMAGES % size]
    if odd:
        _parser().error(f"a batch size that divides {IMAGES} is wanted; found: {odd[0]}")
    return sizes


def _versions() -> dict[str, str]:
    """Return the versions of the peers that are here."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in REQUIREMENTS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _say(what: str) -> None:
    print(f"latency: {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
