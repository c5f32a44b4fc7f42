"""A latency run in three tables that can be read at a glance: a line for each job."""

from collections.abc import Callable, Sequence

from latency_job import OURS, OURS_FP32, Result, Row
from peers import PEERS, PLAIN
from rounds import Interval

__all__ = ["to_summary"]

_PEERS = (OURS, OURS_FP32, *(name for name in PEERS if name != PLAIN))


def to_summary(results: Sequence[Result]) -> str:
    """Return the tables: the network alone, JPEG to answer, and what else is to be known."""
    alone = _speeds(results, lambda row: row.ms, lambda row: row.speedup)
    whole = _speeds(results, lambda row: row.end_ms, lambda row: row.end_speedup)
    return (
        "The network alone: milliseconds of a batch, and times as fast as plain ONNX Runtime\n\n"
        f"{alone}\nFrom JPEG files to answers\n\n{whole}\nWhat it costs\n\n{_costs(results)}"
    )


def _speeds(
    results: Sequence[Result],
    ms: Callable[[Row], float | None],
    speed: Callable[[Row], Interval | None],
) -> str:
    lines = [f"| {PLAIN}, ms | {OURS}, ms | {' | '.join(_PEERS)} |"]
    for result in results:
        rows = _rows(result)
        cells = [f"{_ms(rows.get(name), ms)}" for name in (PLAIN, OURS)]
        for name in _PEERS:
            row = rows.get(name)
            interval = None if row is None else speed(row)
            cells.append("failed" if row is not None and row.error else _ratio(interval, name))
        lines.append(f"| {' | '.join(cells)} |")
    return _table(results, lines)


def _costs(results: Sequence[Result]) -> str:
    lines = [
        f"| n | of the peak: {OURS}, {OURS_FP32}, OpenVINO | SQNR, dB: {OURS}, ORT static int8, "
        f"OpenVINO | net top-1 loss of {OURS}, points | OpenVINO's time / ours |"
    ]
    for result in results:
        rows = _rows(result)
        shares = (_share(rows.get(name)) for name in (OURS, OURS_FP32, "OpenVINO"))
        decibels = (_decibels(rows.get(name)) for name in (OURS, "ORT static int8", "OpenVINO"))
        beside = rows["OpenVINO"].beside_ours if "OpenVINO" in rows else None
        lines.append(
            f"| {result.rounds[0]}, {result.rounds[1]} | {', '.join(shares)} "
            f"| {', '.join(decibels)} | {_loss(rows[OURS])} | {_ratio(beside, OURS)} |"
        )
    return _table(results, lines)


def _rows(result: Result) -> dict[str, Row]:
    """Return the rows by name; where int8 was refused, what is shipped is fp32."""
    rows = {row.peer: row for row in result.rows}
    if rows[OURS].computes == "fp32":
        rows[OURS_FP32] = rows[OURS]
    return rows


def _table(results: Sequence[Result], lines: Sequence[str]) -> str:
    """Put the jobs in front of the lines, of which the first is the head."""
    head, *body = lines
    rule = "|---" * (head.count("|") + 2) + "|"
    jobs = (f"| {each.model} | {each.threads} | {each.batch} " for each in results)
    rows = (job + line for job, line in zip(jobs, body, strict=True))
    return "\n".join([f"| model | threads | batch {head}", rule, *rows]) + "\n"


def _ms(row: Row | None, ms: Callable[[Row], float | None]) -> str:
    value = None if row is None else ms(row)
    return "" if value is None else f"{value:.3g}"


def _ratio(interval: Interval | None, name: str) -> str:
    if interval is None:
        return ""
    median, low, high = interval
    return f"{median:.2f} [{low:.2f}, {high:.2f}]" if name == OURS else f"{median:.2f}"


def _share(row: Row | None) -> str:
    return "-" if row is None or row.share is None else f"{row.share:.0%}"


def _decibels(row: Row | None) -> str:
    return "-" if row is None or row.sqnr_db is None else f"{row.sqnr_db:.0f}"


def _loss(row: Row) -> str:
    if row.accuracy is None:
        return "not measured"
    low, high = (100 * end for end in row.accuracy["interval"])
    return f"{100 * row.accuracy['net_loss']:.2f} [{low:.2f}, {high:.2f}]"
