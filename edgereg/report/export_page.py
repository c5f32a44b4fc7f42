"""The report of an export, beside the bundle: what was judged, measured and left, and how long."""

import platform
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

from deploy.bundle.manifest import Manifest
from edgereg.report.page import document
from export.exporter import ExportResult
from export.judge.judging import VariantResult
from export.precision.emulate_int8 import describe_int8

__all__ = ["export_json", "export_page"]

_VOTE = (
    " An answer is the class for which the 20 nearest reference images vote, each by its cosine "
    "similarity."
)


def export_json(result: ExportResult) -> dict[str, Any]:
    """Return the whole result as JSON values, with the machine that measured it."""
    return {**result.to_json(), "machine": _machine()}


def export_page(result: ExportResult) -> str:
    """Return the report as one HTML file."""
    manifest, report = result.manifest, result.report
    is_encoder = manifest.index is not None
    target = manifest.target
    ablation = (
        ""
        if result.ablation is None
        else f"<p>{escape(_sentence(result.ablation.to_text()))}.</p>\n"
    )
    machine = ", ".join(f"{key} {value}" for key, value in _machine().items())
    parts = [
        f"<h1>{escape(manifest.name)} for {escape(target['name'])}</h1>\n"
        f"<p>{escape(target['runtime'])}, opset {target['opset']}, batch 1"
        f"{'' if manifest.max_batch == 1 else f' to {manifest.max_batch}'}; "
        f"{_given(manifest)}, images of {manifest.preprocessing.height}x"
        f"{manifest.preprocessing.width}.</p>\n"
        f'<p class="note">{escape(machine)}. Nothing here was run on a Jetson.</p>',
        "<h2>Accuracy on held-out images</h2>\n"
        "<p>Net loss: images that the PyTorch model gets right and the variant does not, less the "
        "reverse, over all; with its exact 95 % interval. Certified: all of it is within the gate, "
        f"or within 0.1 points. ECE: expected calibration error.{_VOTE if is_encoder else ''}</p>\n"
        + _table(
            (
                "variant",
                "top-1",
                "PyTorch",
                "lost",
                "gained",
                "ties",
                "net loss, points",
                "gate",
                "verdict",
                "ECE",
                "ECE, PyTorch",
            ),
            (_accuracy_row(name, variant) for name, variant in result.variants.items()),
        )
        + ablation,
        "<h2>Files</h2>\n<p>Error: the largest difference to the model's answers in float64 over "
        "their range, on the golden images; fp16 emulated.</p>\n"
        + _table(
            (
                "variant",
                "parser and builder",
                "error",
                "smallest cosine, same nearest reference" if is_encoder else "same top-1",
                "bytes",
                "time to fp32's",
                "made and judged",
            ),
            (_file_row(name, variant) for name, variant in result.variants.items()),
        ),
        *(_details(name, variant.details) for name, variant in result.variants.items()),
        "<h2>Simplified, proved in float64</h2>\n"
        + _table(
            ("", "before", "after"),
            (
                (name, f"{getattr(report.before, name):,}", f"{getattr(report.after, name):,}")
                for name in ("nodes", "parameters", "batchnorms", "dropouts")
            ),
        )
        + f"<p>The outputs moved by {report.model_error:.1e} at most, relatively; "
        f"{len(report.skipped)} sites are left, each with its reason in simplify.json.</p>",
    ]
    return document(f"{manifest.name}: export", "\n".join(parts))


def _accuracy_row(name: str, variant: VariantResult) -> tuple[str, ...]:
    paired, verdict = variant.paired, variant.verdict
    if paired is None or verdict is None:
        return (name, *[""] * 7, "not measured", "", "")
    low, high = (100 * end for end in paired.interval)
    return (
        name,
        f"{paired.top1:.2%}",
        f"{paired.reference_top1:.2%}",
        str(paired.lost),
        str(paired.gained),
        str(paired.ties),
        f"{100 * paired.net_loss:.2f} [{low:.2f}, {high:.2f}]",
        f"{100 * verdict.limit:.2f}{' by hand' if verdict.is_overridden else ''}",
        "certified" if verdict.certified else "passed, not certified",
        f"{paired.ece:.3f}",
        f"{paired.reference_ece:.3f}",
    )


def _given(manifest: Manifest) -> str:
    """Say what the model gives."""
    if manifest.index is None:
        return f"{len(manifest.labels)} classes"
    width, count = manifest.outputs[0].shape[1], manifest.index.count
    return f"embeddings of {width} numbers, {count:,} reference images"


def _file_row(name: str, variant: VariantResult) -> tuple[str, ...]:
    found, speed = variant.comparison, variant.speed
    agreement = "" if found.top1_agreement is None else f"{found.top1_agreement:.1%}"
    if found.neighbour_agreement is not None:
        agreement = f"{found.min_cosine:.6f}, {found.neighbour_agreement:.1%}"
    return (
        name,
        f"{variant.conformance.verdict} ({variant.conformance.judge})",
        f"{variant.comparison.max_scaled_error:.1e}",
        agreement,
        f"{variant.size:,}",
        "" if speed is None else f"{speed.ratio:.2f}x",
        f"{variant.seconds:.1f} s",
    )


def _details(name: str, details: Mapping[str, Any]) -> str:
    """Return what stays in another precision, and why."""
    if "islands" in details:
        rows = [
            (
                island["node"],
                island["reason"],
                _error(island["error_with"]),
                _error(island["error_without"]),
            )
            for island in details["islands"]
        ]
        summary = f"{details['fp16_nodes']} nodes in fp16, {len(rows)} kept in fp32."
        headings: tuple[str, ...] = ("node", "why it is fp32", "error with it", "without")
    elif "left_in_float" in details:
        rows = [*details["left_in_float"].items()]
        summary = (
            f"{details['layers'] - len(rows)} of {details['layers']} layers in int8, scheme "
            f"{details['scheme']}, ranges by {details['method']} on "
            f"{details['calibration']['count'] - details['calibration']['held_back']} images: "
            f"{details['sqnr_db']:.1f} dB."
        )
        headings = ("layer", "why it is in float")
    else:
        return ""
    return f"<h2>{name}: what stays in higher precision</h2>\n<p>{escape(summary)}</p>\n" + (
        _table(headings, rows) if rows else "<p>Nothing had to.</p>"
    )


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _error(error: float | None) -> str:
    return "not finite" if error is None else f"{error:.1e}"


def _table(headings: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in headings)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table>\n<tr>{head}</tr>\n{body}\n</table></div>\n'


def _machine() -> dict[str, str]:
    return {"python": platform.python_version(), "int8 of this CPU": describe_int8()}
