"""From a checkpoint and held-out images to a bundle: the door between training and export."""

from collections.abc import Callable
from pathlib import Path

from edgereg import __version__
from edgereg.checkpoint import load_classifier
from edgereg.data.images import Images, check_classes, digest, evenly, labels_of
from export.exporter import ExportResult, export_bundle
from export.request import MIN_GOLDEN, ExportRequest

__all__ = ["MAX_HOLDOUT", "ship"]

MAX_HOLDOUT = (
    2000  # images on which the exported file's accuracy is measured; held in memory at once
)


def ship(
    checkpoint_path: Path,
    images: Images,
    out: Path,
    *,
    target: str,
    force: bool = False,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> ExportResult:
    """Export a checkpoint for a target.

    The golden images and those on which the accuracy is measured are taken from each class in turn.

    Args:
        checkpoint_path: A classifier's checkpoint.
        images: Labelled, with the checkpoint's classes, and not trained on.
        out: The bundle to write.
        target: A key of `export.targets.TARGETS`.
        force: Whether an earlier bundle may be replaced.
        on_stage: Told what comes next.

    Raises:
        DeployError, EdgeregError: Nothing was written.
    """
    model, checkpoint = load_classifier(checkpoint_path)
    labels = labels_of(images)
    check_classes(images, checkpoint.class_names)
    golden = evenly(labels, max(MIN_GOLDEN, len(checkpoint.class_names)))
    held_out = evenly(labels, MAX_HOLDOUT)
    request = ExportRequest(
        name=checkpoint_path.name,
        target=target,
        labels=checkpoint.class_names,
        preprocessing=checkpoint.recipe.preprocessing(),
        golden_images=[images.encoded(int(index)) for index in golden],
        golden_labels=[int(label) for label in labels[golden]],
        holdout=(
            [images.load(int(index)) for index in held_out],
            [int(label) for label in labels[held_out]],
        ),
        provenance={
            "edgereg": __version__,
            "recipe": checkpoint.recipe.to_json(),
            "training_data": dict(checkpoint.data),
            "held_out_data": {
                "name": images.name,
                "count": len(images),
                "measured_on": len(held_out),
                "sha256": digest(images),
            },
        },
    )
    return export_bundle(model, out, request=request, force=force, on_stage=on_stage)
