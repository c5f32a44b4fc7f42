"""The zoo's rows as a document in Markdown."""

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from onnx_check import BATCHES, TOLERANCE
from zoo_row import STATUSES
from zoo_summary import RESNET50, Row, summarize

__all__ = ["to_markdown"]


def to_markdown(rows: Sequence[Row], setting: Mapping[str, Any]) -> str:
    """Return the whole document."""
    table = sorted((row for row in rows if row["name"] != RESNET50), key=lambda row: row["name"])
    reasons = _reasons(table)
    versions = ", ".join(f"{name} {version}" for name, version in setting["versions"].items())
    parts = [
        "# The zoo: what `simplify` does to other people's models",
        f"    {setting['command']}",
        f"{setting['machine']}, Python {setting['python']}, {versions}. One core "
        "for each architecture; its seconds are those of `simplify`, while another ran beside it.",
        f"**{summarize(rows).to_text()}.**",
        _EXPLANATION,
        *_ends(table),
        _plants(table),
        _onnx(table),
        _left(table, reasons),
        "## Architectures\n\n" + "\n".join([*_HEAD, *(_line(row, reasons) for row in table)]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


_EXPLANATION = """\
Every parameter is random: norms, LayerScale, heads and gains that are initialised to zero as well;
BatchNorm statistics lie around those of the data. *depends* is how far another image moves the
outputs, relatively: nothing is proved by outputs that do not move. *px* is the smallest image that
the architecture takes. *BatchNorm* and *dropout*: sites in the traced graph before -> after.
*left*: how many sites were not folded (the number of the reason, below). *float64 error*: the
largest relative one, at the outputs and at each rewritten site."""

_HEAD = (
    "| architecture | px | status | depends | BatchNorm | dropout | changed by pass | left "
    "| float64 error | nodes | parameters (M) | s | ONNX error |",
    "|---|--:|---|--:|--:|--:|---|---|--:|--:|--:|--:|--:|",
)


def _line(row: Row, reasons: Mapping[str, int]) -> str:
    cells = [row["name"], str(row.get("size", "")), row["status"]]
    cells.append(f"{row['dependence']:.2g}" if "dependence" in row else "")
    if row["status"] != "simplified":
        return _cells(*cells, *[""] * 9)
    before, after = row["before"], row["after"]
    changed = (f"{name} {count}" for name, count in row["changed"].items() if count)
    cells += [_arrow(before[key], after[key]) for key in ("batchnorms", "dropouts")]
    left = (f"{count} ({reasons[reason]})" for reason, count in row["left"].items())
    cells += [", ".join(changed), ", ".join(left), f"{row['error']:.0e}"]
    cells.append(_arrow(before["nodes"], after["nodes"]))
    cells.append(_arrow(*(f"{counts['parameters'] / 1e6:.2f}" for counts in (before, after))))
    cells.append(f"{row['seconds']:.1f}")
    return _cells(*cells, _onnx_cell(row.get("onnx")))


def _onnx_cell(file: Mapping[str, Any] | None) -> str:
    if file is None:
        return ""
    return "fails" if file["problem"] else f"{file['scaled_error']:.0e}"


def _ends(table: Sequence[Row]) -> Iterable[str]:
    """Yield a list for every status but "simplified", with the reasons."""
    titles = {"out of memory": "Not run: out of memory", "timed out": "Not run: timed out"}
    for status in STATUSES[1:]:
        lines = [f"* {row['name']}: {row['reason']}" for row in table if row["status"] == status]
        if lines:
            yield f"## {titles.get(status, status.capitalize())}\n\n" + "\n".join(lines)


def _plants(table: Sequence[Row]) -> str:
    rows = [(row["family"], row["name"], row["plant"]) for row in table if "plant" in row]
    if not rows:
        return ""
    head = ("| family | in | wrong | caught | found |", "|---|---|---|---|---|")
    lines = [
        _cells(family, name, plant["what"], "yes" if plant["is_caught"] else "NO", plant["found"])
        for family, name, plant in sorted(rows, key=lambda row: row[:2])
    ]
    return "## Wrong folds, planted\n\n" + "\n".join([*head, *lines])


def _onnx(table: Sequence[Row]) -> str:
    files = [row for row in table if "onnx" in row]
    if not files:
        return ""
    errors = [e for row in files if (e := row["onnx"]["scaled_error"]) is not None]
    norms = sum(row["onnx"]["batchnorms"] for row in files)
    unnamed = sum(len(row["onnx"]["unnamed"]) for row in files)
    text = [
        "## ONNX Runtime",
        f"{len(files)} files of {len({row['family'] for row in files})} families, run at batch "
        f"sizes {' and '.join(map(str, BATCHES))} against the model that was handed in, float32. "
        f"Largest scaled error {max(errors, default=float('nan')):.1e} (allowed "
        f"{TOLERANCE.max_scaled_error:g}), median "
        f"{statistics.median(errors or [float('nan')]):.1e}. "
        f"{norms} BatchNormalization nodes, {unnamed} of them not named by the report.",
    ]
    problems = [f"* {r['name']}: {r['onnx']['problem']}" for r in files if r["onnx"]["problem"]]
    return "\n\n".join([*text, *(["\n".join(problems)] if problems else [])])


def _left(table: Sequence[Row], reasons: Mapping[str, int]) -> str:
    """List what was not folded, by reason."""
    if not reasons:
        return ""
    head = ("| | reason | sites | architectures | such as |", "|--:|---|--:|--:|---|")
    lines = []
    for reason, number in reasons.items():
        counts = {
            row["name"]: row["left"][reason] for row in table if reason in row.get("left", {})
        }
        sites = str(sum(counts.values()))
        lines.append(_cells(str(number), reason, sites, str(len(counts)), next(iter(counts))))
    text = (
        "Where nothing takes a BatchNorm up, it becomes one multiplication and one addition "
        "(write_scale_and_shift); any other scale stays as it was."
    )
    return f"## Not folded, with the reason\n\n{text}\n\n" + "\n".join([*head, *lines])


def _reasons(table: Sequence[Row]) -> dict[str, int]:
    """Return a number for each reason, 1 for the one of the most sites."""
    sites: Counter[str] = Counter()
    for row in table:
        sites.update(row.get("left", {}))
    return {reason: number for number, (reason, _) in enumerate(sites.most_common(), start=1)}


def _arrow(before: object, after: object) -> str:
    return f"{before}" if before == after else f"{before} -> {after}"


def _cells(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
