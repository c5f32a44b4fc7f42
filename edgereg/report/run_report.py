"""The curves of training runs, from their logs: one self-contained HTML file."""

import json
import math
from base64 import b64encode
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from deploy.publish import check_new_file, publish_text
from edgereg.errors import DataError
from edgereg.report.figure import COLOURS, figure_of, svg_of
from edgereg.report.page import document

__all__ = ["RunReport", "read_run", "write_report"]

_SMOOTHED = 0.02  # of a run: the width of the running mean over its steps

Point = tuple[float, float]


@dataclass(frozen=True)
class Run:
    """What a log says of a run.

    Args:
        name: Of the checkpoint.
        steps: The events "step", in order.
        epochs: The events "epoch", in order.
        skips: Number of skipped steps.
        resumes: Number of resumes.
        resumed_at: The first step after each resume.
        colours: A PNG that the pre-training by colorization drew.
    """

    name: str
    steps: tuple[dict[str, Any], ...]
    epochs: tuple[dict[str, Any], ...]
    skips: int
    resumes: int
    resumed_at: tuple[float, ...]
    colours: bytes | None


@dataclass(frozen=True)
class RunReport:
    """What was drawn, and where."""

    path: Path
    runs: tuple[Run, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the last epoch of each run as JSON values."""
        return {
            "report": str(self.path),
            "runs": [
                {
                    "name": run.name,
                    "epochs": len(run.epochs),
                    "last": run.epochs[-1] if run.epochs else None,
                    "skipped_steps": run.skips,
                    "resumes": run.resumes,
                }
                for run in self.runs
            ],
        }


def write_report(paths: Sequence[Path], out: Path, *, force: bool = False) -> RunReport:
    """Draw the curves of runs beside one another.

    Args:
        paths: Checkpoints, or the run folders beside them.
        out: The HTML file to write.
        force: Whether an earlier file may be replaced.

    Raises:
        BadInputError: `out` exists.
        DataError: There is no log, or a line of it cannot be read.
    """
    check_new_file(out, what="a report", force=force)
    runs = tuple(read_run(path) for path in paths)
    publish_text(out, _page(runs))
    return RunReport(out, runs)


def read_run(path: Path) -> Run:
    """Read the log of a run, which may still be going on.

    Raises:
        DataError: There is no log, or a line of it cannot be read.
    """
    folder = path if path.name.endswith(".run") else path.with_name(path.name + ".run")
    log = folder / "log.jsonl"
    try:
        # the last line may be half written
        lines = log.read_text(encoding="utf-8").rpartition("\n")[0].splitlines()
        events = [dict(json.loads(line)) for line in lines]
    except (OSError, TypeError, ValueError) as error:
        raise DataError(
            "a run has a log: CHECKPOINT.run/log.jsonl",
            found=f"'{log}': {error}",
            remedy="name a checkpoint that `edgereg train` or `edgereg pretrain` wrote",
        ) from error
    colours = folder / "colours.png"
    starts = [n for n, event in enumerate(events) if event.get("event") == "resume"]
    return Run(
        name=folder.name.removesuffix(".run"),
        steps=tuple(event for event in events if event.get("event") == "step"),
        epochs=tuple(event for event in events if event.get("event") == "epoch"),
        skips=sum(event.get("event") == "skip" for event in events),
        resumes=len(starts),
        resumed_at=tuple(
            next((e["step"] for e in events[n:] if "step" in e), math.nan) for n in starts
        ),
        colours=colours.read_bytes() if colours.exists() else None,
    )


def _page(runs: Sequence[Run]) -> str:
    sections = [f"<h1>{escape(', '.join(run.name for run in runs))}</h1>", _table(runs)]
    sections.append("<h2>Loss</h2>" + _loss(runs))
    for title, unit, points in (
        ("Accuracy on the training images, as augmented", "top-1, %", _percent("top1")),
        ("Accuracy on the validation set", "top-1, %", _percent("val", "top1")),
        ("Loss on the validation set", "cross-entropy, nats", _value("val", "loss")),
        ("Watched images: neighbours of the same class", "kNN top-1, %", _percent("val", "knn")),
        ("Features: effective rank", "dimensions", _value("val", "rank")),
        ("Features: spread", "std / that of random directions", _value("val", "std")),
        ("Learning rate", "learning rate of an epoch's last step", _value("lr")),
        ("Speed", "images/s", _value("images_per_second")),
    ):
        if chart := _by_epoch(runs, unit, points):
            sections.append(f"<h2>{title}</h2>{chart}")
    sections += [
        f"<h2>Colours of {escape(run.name)}</h2>"
        f'<p><img src="data:image/png;base64,{b64encode(run.colours).decode()}" '
        'alt="grey, as the model colours it, and as it is"></p>'
        for run in runs
        if run.colours is not None
    ]
    return document("edgereg: " + ", ".join(run.name for run in runs), "\n".join(sections))


def _table(runs: Sequence[Run]) -> str:
    head = "<tr><th>run</th><th>epochs</th><th>loss</th><th>train</th><th>validation</th>"
    rows = [head + "<th>skipped steps</th><th>resumes</th></tr>"]
    for run in runs:
        last = run.epochs[-1] if run.epochs else {}
        cells = [
            str(len(run.epochs)),
            _shown(last.get("loss"), "{:.3f}"),
            _shown(last.get("top1"), "{:.1%}"),
            _shown((last.get("val") or {}).get("top1"), "{:.1%}"),
            str(run.skips),
            str(run.resumes),
        ]
        cells_html = "".join(f"<td>{cell}</td>" for cell in cells)
        rows.append(f"<tr><td>{escape(run.name)}</td>{cells_html}</tr>")
    return f'<div class="scroll"><table>{"".join(rows)}</table></div>'


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _loss(runs: Sequence[Run]) -> str:
    figure, axes = figure_of(height=3.2)
    for place, run in enumerate(runs):
        points = [(event["step"], event["loss"]) for event in run.steps]
        points = [(x, y) for x, y in points if y is not None]
        colour = _colour(place)
        axes.plot(*_columns(points), color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(*_columns(_smooth(points)), color=colour, label=run.name)
        for step in run.resumed_at:
            axes.axvline(step, color=colour, linestyle=":", linewidth=0.8)
    axes.set_xlabel("step; faint: each step, dotted: a resume")
    axes.set_ylabel("training loss")
    axes.legend(frameon=False)
    return svg_of(figure)


def _by_epoch(
    runs: Sequence[Run], unit: str, value: Callable[[dict[str, Any]], float | None]
) -> str:
    """Draw a value over the epochs; an empty text where no run has it."""
    figure, axes = figure_of(height=2.6)
    is_empty = True
    for place, run in enumerate(runs):
        points = [(event["epoch"] + 1, value(event)) for event in run.epochs]
        known = [(x, y) for x, y in points if y is not None]
        is_empty &= not known
        marker = "o" if len(known) == 1 else None
        axes.plot(*_columns(known), color=_colour(place), label=run.name, marker=marker)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("epoch")
    axes.set_ylabel(unit)
    axes.legend(frameon=False)
    return "" if is_empty else svg_of(figure)


def _value(*path: str) -> Callable[[dict[str, Any]], float | None]:
    def value(event: dict[str, Any]) -> float | None:
        found: Any = event
        for key in path:
            found = (found or {}).get(key)
        return None if found is None else float(found)

    return value


def _percent(*path: str) -> Callable[[dict[str, Any]], float | None]:
    share = _value(*path)

    def percent(event: dict[str, Any]) -> float | None:
        found = share(event)
        return None if found is None else 100 * found

    return percent


def _smooth(points: Sequence[Point]) -> list[Point]:
    """Return the running mean over a fiftieth of the run, on both sides of each step."""
    half = max(1, round(_SMOOTHED * len(points)))
    return [
        (x, sum(y for _, y in near) / len(near))
        for place, (x, _) in enumerate(points)
        if (near := points[max(0, place - half) : place + half + 1])
    ]


def _columns(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _colour(place: int) -> str:
    return COLOURS[(place + 1) % len(COLOURS)]
