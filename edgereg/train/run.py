"""Training and pre-training runs, from a data set to a checkpoint."""

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploy.publish import check_free
from deploy.runtime.preprocess import Preprocessing
from edgereg.checkpoint import (
    MEMBERS,
    Checkpoint,
    load_backbone,
    load_classifier,
    save_checkpoint,
)
from edgereg.data.images import Images, check_classes, digest, labels_of
from edgereg.data.pixels import Pixels
from edgereg.errors import DataError
from edgereg.models.zoo import Classifier, build_model
from edgereg.progress import Report
from edgereg.recipe import Recipe
from edgereg.train.batches import steps_per_epoch
from edgereg.train.evaluate import Evaluation, evaluate
from edgereg.train.loop import Epoch
from edgereg.train.pretrain import pretrain_backbone
from edgereg.train.supervised import train_classifier

__all__ = ["RunResult", "eval_run", "pretrain_run", "train_run"]

Bar = Callable[[str, int], AbstractContextManager[Report]]
"""Opens a progress bar: a description and a total."""


@dataclass(frozen=True)
class RunResult:
    """What a run wrote and measured."""

    path: Path
    checkpoint: Checkpoint
    history: tuple[Epoch, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the figures as JSON values."""
        return {
            "checkpoint": str(self.path),
            "data": dict(self.checkpoint.data),
            "metrics": dict(self.checkpoint.metrics),
            "history": [dataclasses.asdict(epoch) for epoch in self.history],
        }


def train_run(
    images: Images,
    out: Path,
    recipe: Recipe,
    *,
    bar: Bar,
    val: Images | None = None,
    init: Path | None = None,
    force: bool = False,
    device: str = "cpu",
) -> RunResult:
    """Train a classifier and write its checkpoint.

    Args:
        images: Labelled.
        out: The checkpoint to write.
        recipe: All settings.
        bar: Shows how far it is.
        val: Labelled with the same classes; the accuracy on it is written into the checkpoint.
        init: A checkpoint whose backbone to start from.
        force: Whether an earlier checkpoint may be replaced.
        device: Where to train, as torch names it.

    Raises:
        BadInputError, EdgeregError: Before the first step, where the input is at fault.
    """
    check_free(out, force=force, members=MEMBERS)
    labels = labels_of(images)
    classes = images.class_names
    if len(classes) < 2:
        raise DataError(
            "a classifier needs at least two classes",
            found=f"'{images.name}' has one sub-folder, {classes[0]}",
            remedy="name the folder whose sub-folders are the classes",
        )
    if val is not None:
        check_classes(val, classes)
    model = build_model(recipe.model, num_classes=len(classes), seed=recipe.seed)
    if init is not None:
        load_backbone(init, model, recipe.model)
    spec = recipe.preprocessing()
    pixels = _read(images, spec, bar)
    held_out = None if val is None else _read(val, spec, bar)
    data = _describe(images)  # before the first step: what is trained on must be what is named
    model.to(device)
    with _steps(bar, f"train {recipe.model.name}", len(images), recipe) as report:
        history = train_classifier(model, pixels, labels, recipe, report=report)
    metrics: dict[str, Any] = {"train": _accuracy(model, pixels, labels, spec)}
    if val is not None and held_out is not None:
        metrics["val"] = _accuracy(model, held_out, labels_of(val), spec) | {"data": val.name}
    checkpoint = Checkpoint("classifier", recipe, classes, data, metrics)
    save_checkpoint(out, model, checkpoint, force=force)
    return RunResult(out, checkpoint, history)


def pretrain_run(
    images: Images,
    out: Path,
    recipe: Recipe,
    *,
    bar: Bar,
    force: bool = False,
    device: str = "cpu",
) -> RunResult:
    """Pre-train a backbone without labels and write its checkpoint.

    Args:
        images: Labels, if there are any, are not looked at.
        out: The checkpoint to write.
        recipe: All settings.
        bar: Shows how far it is.
        force: Whether an earlier checkpoint may be replaced.
        device: Where to train, as torch names it.

    Raises:
        BadInputError, EdgeregError: Before the first step, where the input is at fault.
    """
    check_free(out, force=force, members=MEMBERS)
    model = build_model(recipe.model, num_classes=1, seed=recipe.seed)
    pixels = _read(images, recipe.preprocessing(), bar)
    data = _describe(images)
    model.to(device)
    with _steps(bar, f"pretrain {recipe.model.name} (pirl)", len(images), recipe) as report:
        history = pretrain_backbone(model, pixels, recipe, report=report)
    metrics = {"method": "pirl", "loss": {"first": history[0].loss, "last": history[-1].loss}}
    checkpoint = Checkpoint("encoder", recipe, (), data, metrics)
    save_checkpoint(out, model.backbone, checkpoint, force=force)
    return RunResult(out, checkpoint, history)


def eval_run(path: Path, images: Images, *, bar: Bar) -> tuple[Checkpoint, Evaluation]:
    """Measure a checkpoint on a labelled data set, on the CPU, through the device's pre-processing.

    Raises:
        CheckpointError: It is no classifier's checkpoint.
        DataError: No labels, or other classes.
    """
    model, checkpoint = load_classifier(path)
    labels = labels_of(images)
    check_classes(images, checkpoint.class_names)
    spec = checkpoint.recipe.preprocessing()
    pixels = _read(images, spec, bar)
    return checkpoint, evaluate(
        model, pixels, labels, spec, num_classes=len(checkpoint.class_names)
    )


def _read(images: Images, spec: Preprocessing, bar: Bar) -> Pixels:
    if len(images) < 2:
        raise DataError(
            "a run needs at least two images",
            found=f"'{images.name}' has {len(images)}",
            remedy="add images",
        )
    with bar(f"read {images.name}", len(images)) as report:
        return Pixels(images, spec, progress=lambda done: report(done, ""))


def _steps(bar: Bar, what: str, size: int, recipe: Recipe) -> AbstractContextManager[Report]:
    return bar(what, steps_per_epoch(size, recipe.batch_size) * recipe.epochs)


def _accuracy(
    model: Classifier, pixels: Pixels, labels: NDArray[np.int64], spec: Preprocessing
) -> dict[str, Any]:
    result = evaluate(model, pixels, labels, spec, num_classes=model.head.out_features)
    return {"top1": result.top1, "count": result.count}


def _describe(images: Images) -> dict[str, Any]:
    return {"name": images.name, "count": len(images), "sha256": digest(images)}
