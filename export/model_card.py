"""The readme.md of a bundle: what is in it and how good it is, by the figures of this export."""

import json
from collections.abc import Mapping

from deploy.bundle.manifest import Manifest, TensorSpec, Variant
from deploy.measure.compare import Comparison
from export.targets import Precision
from export.traced.report import SimplifyReport, order_above

__all__ = ["LICENSES", "model_card"]

LICENSES = """\
This bundle was written by edgereg, whose Apache-2.0 licence does not extend to what it packs.
The weights are under the licence of the model and of the data that they were trained on; the golden
images are under that of their data set. See the provenance in manifest.json.
"""


def model_card(
    manifest: Manifest, report: SimplifyReport, comparisons: Mapping[Precision, Comparison]
) -> str:
    """Return the model card as Markdown."""
    spec, target = manifest.preprocessing, manifest.target
    folded = report.before.batchnorms - report.after.batchnorms
    stripped = report.before.dropouts - report.after.dropouts
    (taken,), (given,) = manifest.inputs, manifest.outputs
    rows = {
        "Task": _task(manifest),
        "Target": f"{target['name']} ({target['runtime']})",
        "Input": f"`images` {taken.dtype} {_shape(taken)}, RGB",
        "Pre-processing": (
            f"{spec.resize}, crop {spec.crop_fraction:g}, x / 255, "
            f"mean {list(spec.mean)}, std {list(spec.std)}"
            f"{' (in the graph)' if spec.layout == 'nhwc-uint8' else ''}"
        ),
        "Output": f"`{given.name}` float32 {_shape(given)}",
        "Simplified": (
            f"{folded} BatchNorms folded, {stripped} dropouts stripped, "
            f"{report.before.nodes} nodes to {report.after.nodes}; "
            f"in float64 the outputs moved by at most {order_above(report.model_error):g}"
        ),
    }
    for precision, comparison in comparisons.items():
        rows |= _variant_rows(manifest.variants[precision], comparison)
    table = "\n".join(f"| {key} | {value.replace('|', '/')} |" for key, value in rows.items())
    provenance = json.dumps(manifest.provenance, indent=1, sort_keys=True)
    return f"""\
# {manifest.name}

| | |
|---|---|
{table}

Check it where it is to run: `edgereg verify {manifest.name}.bundle`

Nothing here was measured on the target itself.

## Provenance

```json
{provenance}
```
"""


def _task(manifest: Manifest) -> str:
    classes = f"{len(manifest.labels)} classes, listed in labels.txt"
    if manifest.index is None:
        return f"{manifest.task}, {classes}"
    known = f"of {classes}" if manifest.labels else "without labels"
    return (
        f"{manifest.task}, not normalised; {manifest.index.count} reference images in index/, "
        f"{known}"
    )


def _shape(tensor: TensorSpec) -> str:
    return f"({', '.join(map(str, tensor.shape))})"


def _variant_rows(variant: Variant, comparison: Comparison) -> dict[str, str]:
    accuracy, judged, name = variant.accuracy, variant.conformance, variant.precision
    measured = "not measured: no held-out images were given"
    top1, plural = "top-1", "logits'"
    agreement = f"{comparison.top1_agreement or 0:.0%} the same top-1"
    if comparison.min_cosine is not None:
        measured = "not measured: no labels were given; judged by the golden images alone"
        top1, plural = "by the vote of the nearest references", "embeddings'"
        agreement = (
            f"cosine distances of at most {order_above(max(0.0, 1 - comparison.min_cosine)):g} and "
            f"{comparison.neighbour_agreement:.0%} the same nearest reference"
        )
    if accuracy is not None:
        low, high = (100 * end for end in accuracy.interval)
        measured = (
            f"{accuracy.top1:.2%} {top1} on {accuracy.count} held-out images (the model in PyTorch "
            f"{accuracy.reference_top1:.2%}); net loss "
            f"{100 * (accuracy.lost - accuracy.gained) / accuracy.count:.2f} points "
            f"[{low:.2f}, {high:.2f}], gate {100 * accuracy.gate:.2f}"
            f"{' (set by hand)' if accuracy.is_overridden else ''}: "
            f"{'certified' if accuracy.is_certified else 'not certified'}"
        )
    return {
        f"{name}, accuracy": measured,
        f"{name}, conformance": f"{judged.verdict} ({judged.judge}): {judged.detail}",
        f"{name}, against the model in float64": (
            f"error at most {order_above(comparison.max_scaled_error):g} of the {plural} range "
            f"and {agreement}, on {comparison.count} golden images"
            + ("; emulated" if name == "fp16" else "")
        ),
    }
