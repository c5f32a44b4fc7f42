"""Training and evaluation runs, from a labelled data set to a checkpoint and its accuracy."""

import dataclasses
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edgereg.augment.foreign import import_callables
from edgereg.augment.progressive import smaller_sizes
from edgereg.checkpoint import Checkpoint, load_classifier, load_start
from edgereg.data.feed import feed
from edgereg.data.images import Images, check_classes, epoch_order, labels_of
from edgereg.data.pixels import Pixels
from edgereg.errors import DataError, RecipeError
from edgereg.models.zoo import build_model, check_input
from edgereg.recipe import Recipe
from edgereg.regularize.batchnorm import configure_batchnorm, recompute_statistics
from edgereg.regularize.placement import place
from edgereg.regularize.stages import freeze_stages
from edgereg.train.batches import epoch_batches
from edgereg.train.evaluate import Evaluation, evaluate
from edgereg.train.loop import Hooks
from edgereg.train.prepared import Bar, RunOptions, RunResult, check_out, prepared, read_pixels
from edgereg.train.supervised import Supervised

__all__ = ["eval_run", "train_run"]


def train_run(
    images: Images,
    out: Path,
    recipe: Recipe,
    *,
    bar: Bar,
    val: Images | None = None,
    init: Path | None = None,
    options: RunOptions | None = None,
) -> RunResult:
    """Train a classifier and write its checkpoint.

    Args:
        images: Labelled.
        out: The checkpoint to write.
        recipe: All settings.
        bar: Shows how far it is.
        val: Labelled with the same classes; measured after each epoch and at the end.
        init: A checkpoint whose backbone to start from, and whose head where the classes are the
            same.
        options: How to carry it out.

    Raises:
        BadInputError, EdgeregError: Before the first step, where the input is at fault.
        TrainingError, StoppedError: Later; see Loop.run.
    """
    options = options or RunOptions()
    check_out(out, options)
    import_callables(recipe.chain(), key="augment")
    labels = labels_of(images)
    classes = images.class_names
    if len(classes) < 2:
        raise DataError(
            "a classifier needs at least two classes",
            found=f"'{images.name}' has one, {classes[0]}",
            remedy="name the folder whose sub-folders are the classes",
        )
    if val is not None:
        check_classes(val, classes)
    elif recipe.stop.patience:
        raise RecipeError(
            "early stopping watches a validation set",
            found=f"stop.patience: {recipe.stop.patience}, and no validation set",
            remedy="name one with --val, or leave stop.patience out",
        )
    model = build_model(recipe.model, num_classes=len(classes), seed=recipe.seed)
    for size in smaller_sizes(recipe.progressive, recipe.model.image_size):
        check_input(
            model.backbone,
            size,
            what=f"progressive.smallest: {recipe.progressive.smallest}; {recipe.model.name}",
            remedy="change progressive.smallest and progressive.step, or leave them out",
        )
    placement = place(model, recipe.regularizers())
    if init is not None:
        load_start(init, model, recipe.model, class_names=classes)
    model = configure_batchnorm(model, recipe.batchnorm)
    freeze_stages(model, recipe.frozen_stages)
    spec = recipe.preprocessing()
    with prepared(images, out, recipe, "train", bar, options, val=val, init=init) as run:
        if isinstance(run, RunResult):
            return run
        held_out = None if val is None else read_pixels(val, spec, run.bar, workers=options.workers)
        objective = Supervised(model, labels, recipe).to(run.world.device)

        def measure(pixels: Pixels, truth: NDArray[np.int64]) -> Evaluation:
            return evaluate(
                model.eval(), pixels, truth, spec, num_classes=len(classes), world=run.world
            )

        def settle() -> None:
            epoch = recipe.epochs  # beyond the last one: places and colours that no step has seen
            chosen = islice(
                epoch_batches(
                    epoch_order(images, seed=recipe.seed, epoch=epoch), recipe.batch_size
                ),
                recipe.batchnorm.recompute,
            )
            recompute_statistics(
                model,
                (
                    objective.augmented(
                        x.to(run.world.device),
                        torch.from_numpy(i).to(run.world.device),
                        epoch=epoch,
                    )
                    for i, x in feed(run.pixels, chosen, workers=options.workers)
                ),
            )

        def validate() -> Mapping[str, float]:
            assert val is not None and held_out is not None
            measured = measure(held_out, labels_of(val))
            return {"top1": measured.top1, "loss": measured.loss}

        hooks = Hooks(
            begin_epoch=placement.at,
            settle=settle if recipe.batchnorm.recompute else None,
            measure=None if val is None else validate,
        )
        if recipe.compute.compile:
            model.compile()
        checkpoint = Checkpoint("classifier", recipe, classes, run.data, {})
        history = run.loop(objective, hooks, model, checkpoint)
        metrics: dict[str, Any] = {"train": _accuracy(measure(run.pixels, labels))}
        if val is not None and held_out is not None:
            metrics["val"] = _accuracy(measure(held_out, labels_of(val))) | {"data": val.name}
        return run.finish(model, dataclasses.replace(checkpoint, metrics=metrics), history)


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
    pixels = read_pixels(images, spec, bar)
    return checkpoint, evaluate(
        model, pixels, labels, spec, num_classes=len(checkpoint.class_names)
    )


def _accuracy(result: Evaluation) -> dict[str, Any]:
    return {"top1": result.top1, "loss": result.loss, "count": result.count}
