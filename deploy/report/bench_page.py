"""The page of `edgereg bench`: the verdict first, then figures, then what they are made of."""

from collections.abc import Iterable, Sequence
from html import escape

from deploy.measure.bench import END_TO_END, STAGES, BenchResult
from deploy.measure.bench_report import BenchReport
from deploy.measure.interleaved import Interleaved
from deploy.report.svg import Series, bar_chart, plot, thin

__all__ = ["bench_page", "interleaved_page"]

_POINTS = 1500  # of a plot; a minute of a fast model has 100,000
_SHOWN_SHARE = 0.999  # of the distribution: one hiccup of a second would squeeze the rest

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1f2933; max-width: 56rem;
  margin: 2.5rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .4rem; border-top: 1px solid #d3dae2;
  padding-top: 1.3rem; }
table { border-collapse: collapse; width: 100%; font-size: .88rem; margin: .75rem 0; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid #e4e9ee; text-align: right; }
th:first-child, td:first-child { text-align: left; }
.good, .bad { padding: .6rem .9rem; border-left: 4px solid #2f7a32; background: #eef7ee; }
.bad { border-color: #b3261e; background: #fdecea; }
.note { color: #52606d; font-size: .9rem; }
svg { width: 100%; height: auto; }
"""


def bench_page(report: BenchReport) -> str:
    """Draw a report as one HTML file: no script, nothing from elsewhere."""
    first = report.runs[0]
    title = f"{first.bundle}: {first.precision} on {first.backend}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        _lines(str(report.platform), f"{first.cpu}, threads {first.threads}"),
        _verdict(report.failures, first.validity.verdict),
        "<h2>Latency of a batch, in ms</h2>",
        _latency_table(report.runs),
        '<p class="note">A percentile is given only where the samples suffice for it, with 99 % '
        "confidence.</p>",
        _stage_bars(report.runs),
        *(part for run in report.runs for part in _run_plots(run)),
    ]
    if len(report.runs) > 1:
        parts += ["<h2>Batches</h2>", _batch_plot(report.runs)]
    parts += ["<h2>Besides</h2>", _lines(*_besides(report))]
    return _document(title, parts)


def interleaved_page(result: Interleaved) -> str:
    """Draw a comparison of two as one HTML file."""
    labels = [f"{c.bundle}: {c.precision} on {c.backend}" for c in (result.first, result.second)]
    ratios = [
        (i, a / b)
        for i, (a, b) in enumerate(
            zip(result.first.blocks_ms, result.second.blocks_ms, strict=True)
        )
    ]
    low, high = result.ratios[END_TO_END].interval
    ends = [0, len(ratios) - 1]
    series = [
        Series("ratio", thin(ratios, limit=_POINTS), "dots"),
        *(Series(f"{v:.3f}", [(i, v) for i in ends]) for v in (low, high)),
    ]
    turns = [
        Series(name, thin(list(enumerate(who.blocks_ms)), limit=_POINTS), "dots")
        for name, who in (("first", result.first), ("second", result.second))
    ]
    rows = [(stage, str(ratio), str(ratio.rounds)) for stage, ratio in result.ratios.items()]
    title = "Two in turns"
    return _document(
        title,
        [
            f"<h1>{title}</h1>",
            _lines(f"first: {labels[0]}", f"second: {labels[1]}"),
            _verdict(result.failures, result.validity.verdict),
            "<h2>The first's time over the second's</h2>",
            _table(("stage", "median [95 %]", "alternations"), rows),
            plot(
                series,
                title="ratio by alternation",
                x_label="alternation",
                y_label="time of the first / of the second",
                from_zero=False,
            ),
            "<h2>Each by itself</h2>",
            plot(
                turns,
                title="time by alternation",
                x_label="alternation",
                y_label="ms per image, end to end",
            ),
        ],
    )


def _verdict(failures: Sequence[str], verdict: str) -> str:
    if failures:
        items = "".join(f"<li>{escape(reason)}</li>" for reason in failures)
        return f'<div class="bad">Failed:<ul>{items}</ul></div>'
    if verdict == "not watched":
        return (
            '<p class="note">The board could not be watched: no clocks, throttle events or '
            "temperatures can be read here.</p>"
        )
    return '<p class="good">The board was watched and kept its pace.</p>'


def _latency_table(runs: Sequence[BenchResult]) -> str:
    percentiles = tuple(runs[0].summaries_ms()[END_TO_END].percentiles)
    rows = []
    for run in runs:
        for stage, summary in run.summaries_ms().items():
            values = (summary.percentiles[name] for name in percentiles)
            shown = ("n too small" if value is None else f"{value:.3f}" for value in values)
            rows.append((f"batch {run.batch}: {stage}", *shown, f"{summary.mean:.3f}"))
        rows.append(
            (
                f"batch {run.batch}: {run.images_per_second:.1f} images/s, n = {run.count}",
                *[""] * (len(percentiles) + 1),
            )
        )
    return _table(("stage", *percentiles, "mean"), rows)


def _stage_bars(runs: Sequence[BenchResult]) -> str:
    stages = [stage for stage in STAGES if stage not in runs[0].not_timed]
    rows = [
        (f"batch {run.batch}", [run.summaries_ms()[stage].mean / run.batch for stage in stages])
        for run in runs
    ]
    return bar_chart(rows, stages, title="time of each stage", x_label="mean ms per image")


def _run_plots(run: BenchResult) -> Iterable[str]:
    samples = run.samples_ms[END_TO_END]
    ordered = sorted(samples)
    shown = ordered[: max(1, round(_SHOWN_SHARE * len(ordered)))]
    shares = [(ms, 100 * (i + 1) / len(ordered)) for i, ms in enumerate(shown)]
    elapsed, times = 0.0, []
    for ms in samples:
        elapsed += ms / 1e3
        times.append((elapsed, ms))
    percentiles = run.summaries_ms()[END_TO_END].percentiles
    marks = [(n, v) for n, v in percentiles.items() if v is not None and v <= shown[-1]]
    yield f"<h2>Batch {run.batch}, end to end</h2>"
    step = max(1, len(shares) // _POINTS)
    yield plot(
        [Series("share", [*shares[::step], shares[-1]], "steps")],
        title=f"distribution of the latency at batch {run.batch}",
        x_label=f"ms per batch (the slowest {1 - _SHOWN_SHARE:.1%} are not drawn)",
        y_label="% of the samples at or below",
        marks=marks,
    )
    yield plot(
        [Series("latency", thin(times, limit=_POINTS), "dots")],
        title=f"latency over time at batch {run.batch}",
        x_label="s of the run",
        y_label="ms per batch",
    )
    yield from _board_plots(run)


def _board_plots(run: BenchResult) -> Iterable[str]:
    """Temperatures, clocks and power over time, as far as they could be read."""
    begin = run.states[0].time_s
    heat: dict[str, list[tuple[float, float]]] = {}
    clocks: dict[str, list[tuple[float, float]]] = {}
    power = []
    for state in run.states:
        x = state.time_s - begin
        for zone, celsius in state.temperatures_c.items():
            heat.setdefault(zone, []).append((x, celsius))
        cores = [clock.current_hz / 1e6 for clock in state.clocks if not clock.is_gpu]
        if cores:
            clocks.setdefault("fastest CPU core", []).append((x, max(cores)))
        for clock in state.clocks:
            if clock.is_gpu:
                clocks.setdefault(clock.name, []).append((x, clock.current_hz / 1e6))
        if state.power_mw is not None:
            power.append((x, state.power_mw / 1e3))
    hottest = sorted(heat, key=lambda zone: -max(y for _, y in heat[zone]))[:4]
    figures = (
        ({zone: heat[zone] for zone in hottest}, "temperature", "degrees C, the 4 hottest", False),
        (clocks, "clocks", "MHz", True),
        ({"power": power} if power else {}, "power", "W", True),
    )
    for values, title, unit, from_zero in figures:
        if values:
            yield plot(
                [Series(name, points, "steps") for name, points in values.items()],
                title=title,
                x_label="s of the run",
                y_label=unit,
                from_zero=from_zero,
                height=200,
            )


def _batch_plot(runs: Sequence[BenchResult]) -> str:
    points = sorted((float(run.batch), run.images_per_second) for run in runs)
    return plot(
        [Series("throughput", points)],
        title="throughput by batch",
        x_label="images in a batch",
        y_label="images/s",
    )


def _besides(report: BenchReport) -> Iterable[str]:
    for run in report.runs:
        yield (
            f"batch {run.batch}: {run.validity}; {run.check.count} outputs were checked; "
            f"{run.energy or 'no power is measured here'}"
        )
    yield str(report.repeated)
    if report.cold_start is not None:
        yield str(report.cold_start)


def _lines(*lines: str) -> str:
    return f"<p>{'<br>'.join(map(escape, lines))}</p>"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>"

    body = "".join(row(cells, "td") for cells in rows)
    return f"<table><thead>{row(head, 'th')}</thead><tbody>{body}</tbody></table>"


def _document(title: str, parts: Sequence[str]) -> str:
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )
