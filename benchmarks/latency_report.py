"""The jobs of a latency run as one table, judged, and as plots: one for each question."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from latency_job import OURS, Result, Row
from peers import PLAIN
from rounds import Interval
from subjects import Subject

from edgereg.report.figure import figure_of

__all__ = ["draw", "figure", "misses", "to_markdown"]

_LEEWAY = 0.98  # of the fastest peer's speed
_LEAST_DB = 10.0  # noise has 0; random weights have no accuracy that could tell it
_COLOURS = {
    OURS: "#d9822b",
    "edgereg fp32": "#f0bf8a",
    PLAIN: "#52606d",
    "torch eager": "#b3261e",
    "torch.compile": "#e58b86",
    "onnxslim": "#3f9142",
    "onnxsim": "#8fc492",
    "ORT static int8": "#8c4fa3",
    "OpenVINO": "#2f6fb0",
    "OpenVINO f32": "#8db4da",
}


def to_markdown(results: Sequence[Result]) -> str:
    """Return the table."""
    lines = [
        "| model | threads | batch | peer | ms | x plain ORT | end to end, ms | x plain ORT "
        "| of the peak | SQNR dB | net top-1 loss, points |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        place = f"| {result.model} | {result.threads} | {result.batch} "
        for row in result.rows:
            if row.error:
                lines.append(
                    f"{place}| {row.peer} | failed: {row.error.replace('|', '/')} " + "|" * 7
                )
                continue
            lines.append(
                f"{place}| {row.peer}{_kind(row)} | {_number(row.ms)} | {_ratio(row.speedup)} "
                f"| {_number(row.end_ms)} | {_ratio(row.end_speedup)} "
                f"| {'' if row.share is None else f'{row.share:.0%}'} "
                f"| {'equal' if row.sqnr_db is None else f'{row.sqnr_db:.0f}'} | {_loss(row)} |"
            )
    return "\n".join(lines) + "\n"


def misses(results: Sequence[Result], subjects: Sequence[Subject]) -> list[str]:
    """Return what is not as wanted; a peer that fails int8's gate, in any job, is no faster peer.

    A peer that is to be beaten and fails to run is a miss: nobody knows whether it is faster.
    """
    found = []
    lossy = {(each.model, row.peer) for each in results for row in each.rows if row.gate is False}
    for result in results:
        subject = next(each for each in subjects if each.name == result.model)
        ours = result.rows[0]
        where = f"{result.model}, {result.threads} threads, batch {result.batch}"
        if ours.gate is False:
            found.append(f"{where}: ours fails int8's gate")
        if ours.sqnr_db is not None and ours.sqnr_db < _LEAST_DB:
            found.append(f"{where}: ours answers noise: SQNR {ours.sqnr_db:.0f} dB")
        reached = None if ours.speedup is None else ours.speedup[0]
        if subject.wanted is not None and (reached is None or reached < subject.wanted):
            found.append(f"{where}: {reached or 0:.2f}x, wanted {subject.wanted:g}x")
        for row in result.rows[1:]:
            if not subject.beats_peers or (result.model, row.peer) in lossy:
                continue
            if row.beside_ours is None:
                found.append(f"{where}: {row.peer} failed: nothing to compare with")
            else:
                median, _, high = row.beside_ours
                if median < _LEEWAY or high < 1:
                    found.append(f"{where}: {row.peer} takes {median:.2f} of our time")
    return found


def figure(results: Sequence[Result]) -> str:
    """Return the run's figure: ours against plain ONNX Runtime, the first job of each model."""
    shown: dict[str, str] = {}
    for result in results:
        ours = result.rows[0]
        if ours.speedup is not None:
            shown.setdefault(result.model, f"{result.model} {_ratio(ours.speedup)}")
    return f"edgereg against plain ONNX Runtime: {'; '.join(shown.values()) or 'not measured'}"


def draw(results: Sequence[Result], out: Path) -> list[Path]:
    """Write the plots, as PNG."""
    made = []
    for threads, batch in sorted({(each.threads, each.batch) for each in results}):
        some = [each for each in results if (each.threads, each.batch) == (threads, batch)]
        setting = f"{threads} thread{'s' * (threads > 1)}, batch {batch}"
        for name, title, value in (
            ("network", f"The network alone: times as fast as plain ORT ({setting})", _alone),
            ("end-to-end", f"JPEG to answer: times as fast as plain ORT ({setting})", _whole),
            ("peak", f"Share of the machine's peak for the type, % ({setting})", _share),
        ):
            path = out / f"latency-{name}-t{threads}-b{batch}.png"
            _bars(some, title, value, path)
            made.append(path)
    made.append(out / "latency-error.png")
    _errors(results, made[-1])
    return made


def _alone(row: Row) -> Interval | None:
    return row.speedup


def _whole(row: Row) -> Interval | None:
    return row.end_speedup


def _share(row: Row) -> Interval | None:
    return None if row.share is None else (100 * row.share,) * 3


def _bars(
    results: Sequence[Result], title: str, value: Callable[[Row], Interval | None], path: Path
) -> None:
    """A group of dots for each model, with the ends of the intervals."""
    figure, axes = figure_of(height=0.9 + 0.62 * len(results))
    for place, result in enumerate(results):
        for i, row in enumerate(result.rows):
            interval = value(row)
            if interval is not None:
                y = place + (i / len(result.rows) - 0.5) * 0.8
                _dot(axes, row, interval, y)
        axes.axhline(place + 0.5, color="#e4e7eb", linewidth=0.8)
    axes.set_yticks(range(len(results)), [result.model for result in results])
    axes.set_ylim(len(results) - 0.4, -0.6)
    axes.set_xlim(left=0)
    axes.set_title(title, loc="left", fontsize=10)
    if value is not _share:
        axes.axvline(1, color="#52606d", linewidth=0.8, linestyle=":")
    _legend(figure, axes)
    figure.savefig(path, dpi=130, metadata={"Software": None})


def _dot(axes: Any, row: Row, interval: Interval, y: float) -> None:
    median, low, high = interval
    colour = _COLOURS[row.peer]
    axes.plot([low, high], [y, y], color=colour, linewidth=1.5)
    size = 7 if row.peer == OURS else 4.5
    axes.plot([median], [y], "o", color=colour, markersize=size, label=row.peer)


def _errors(results: Sequence[Result], path: Path) -> None:
    """What the speed costs: SQNR against speed-up, a dot for each peer of each job."""
    figure, axes = figure_of(height=4)
    for result in results:
        for row in result.rows:
            if row.speedup is not None and row.sqnr_db is not None:
                _dot(axes, row, row.speedup, row.sqnr_db)
    axes.set_xlabel("times as fast as plain ONNX Runtime")
    axes.set_ylabel("SQNR of the logits, dB")
    axes.set_title("What the speed costs; a dot for each model", loc="left", fontsize=10)
    _legend(figure, axes)
    figure.savefig(path, dpi=130, metadata={"Software": None})


def _legend(figure: Any, axes: Any) -> None:
    handles, names = axes.get_legend_handles_labels()
    shown = dict(zip(names, handles, strict=True))
    figure.legend(
        shown.values(), shown.keys(), loc="outside lower center", ncols=5, frameon=False, fontsize=8
    )


def _kind(row: Row) -> str:
    return "" if row.computes in (None, "fp32") else f" ({row.computes})"


def _number(ms: float | None) -> str:
    return "" if ms is None else f"{ms:.3g}"


def _ratio(interval: Interval | None) -> str:
    if interval is None:
        return ""
    median, low, high = interval
    return f"{median:.2f} [{low:.2f}, {high:.2f}]"


def _loss(row: Row) -> str:
    if row.accuracy is None:
        return ""
    low, high = (100 * end for end in row.accuracy["interval"])
    verdict = "" if row.gate else ", FAILS int8's gate"
    return f"{100 * row.accuracy['net_loss']:.2f} [{low:.2f}, {high:.2f}]{verdict}"
