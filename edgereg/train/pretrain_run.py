"""Pre-training runs, from images without labels to an encoder, watched for collapse."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from edgereg.augment.foreign import import_callables
from edgereg.checkpoint import Checkpoint
from edgereg.data.images import Images, evenly, labels_of
from edgereg.data.pixels import Pixels
from edgereg.errors import CollapsedError
from edgereg.evaluation.collapse import Spread, spread
from edgereg.evaluation.knn import leave_one_out
from edgereg.models.zoo import build_model
from edgereg.recipe import Recipe
from edgereg.regularize.batchnorm import configure_batchnorm
from edgereg.regularize.placement import place
from edgereg.report.colorization_grid import write_colorization_grid
from edgereg.ssl.colorization import Colorization
from edgereg.train.batches import steps_per_epoch
from edgereg.train.evaluate import predict
from edgereg.train.loop import Hooks
from edgereg.train.prepared import Bar, RunOptions, RunResult, check_out, prepared, read_pixels
from edgereg.train.pretrain import Pretraining, check_pretraining

__all__ = ["check_spread", "pretrain_run"]

_DRAWN = 8  # images of the picture of colours
_WATCHED = 1024  # images of the data set whose features are watched
# Below these standard deviations, of that of random directions, or this rank, it has collapsed.
# Features that come from ReLUs all lie in one corner, and learn there (0.05 was seen); heads start
# near 0.5, and without anything that drives them apart fall below 0.1 within a few epochs.
_LEAST_STD, _LEAST_HEAD_STD, _LEAST_RANK = 0.01, 0.1, 1.5
_SETTLED = 50  # steps: 0.5 % is left of the running statistics that BatchNorm began with


def pretrain_run(
    images: Images,
    out: Path,
    recipe: Recipe,
    *,
    bar: Bar,
    watch: Images | None = None,
    options: RunOptions | None = None,
) -> RunResult:
    """Pre-train a backbone without labels and write its checkpoint.

    After each epoch the features of some images are looked at, and a run in which they no longer
    differ is ended.

    Args:
        images: Labels, if there are any, are not looked at.
        out: The checkpoint to write.
        recipe: All settings.
        bar: Shows how far it is.
        watch: Labelled; how well neighbours tell its classes is measured after each epoch, and
            changes nothing.
        options: How to carry it out.

    Raises:
        BadInputError, EdgeregError: Before the first step, where the input is at fault.
        TrainingError, StoppedError: Later; see Loop.run.
        CollapsedError: At the end of an epoch.
    """
    options = options or RunOptions()
    check_out(out, options)
    check_pretraining(recipe, size=len(images))
    import_callables(recipe.chain(), key="augment")
    labels = None if watch is None else labels_of(watch)
    model = build_model(recipe.model, num_classes=1, seed=recipe.seed)
    placement = place(model, recipe.regularizers())
    model = configure_batchnorm(model, recipe.batchnorm)
    spec = recipe.preprocessing()
    chosen = _spread_over(len(images), _WATCHED)
    sample = Pixels(images, spec, cache_limit_bytes=0).batch(chosen)
    objective = Pretraining(model, sample=sample, size=len(images), recipe=recipe)
    teacher = Path(recipe.distill.teacher) if recipe.method == "distill" else None
    with prepared(images, out, recipe, "pretrain", bar, options, val=watch, init=teacher) as run:
        if isinstance(run, RunResult):
            return run
        shown = None if watch is None else read_pixels(watch, spec, run.bar)

        epoch, per_epoch = 0, steps_per_epoch(len(images), recipe.batch_size)

        def begin_epoch(share: float) -> None:
            nonlocal epoch
            epoch = round(share * recipe.epochs)
            placement.at(share)

        @torch.inference_mode()
        def projected(features: NDArray[np.float32]) -> NDArray[np.float32] | None:
            on_device = torch.from_numpy(features).to(run.world.device)
            answer = objective.method.project(on_device)
            return None if answer is None else answer.cpu().numpy()

        def measure() -> Mapping[str, float]:
            features = predict(model.backbone, run.pixels, spec, indices=chosen)
            is_settled = (epoch + 1) * per_epoch >= _SETTLED
            measured = {}
            for prefix, what, seen, least in (
                ("", "the features", features, _LEAST_STD),
                ("head_", "the head's answers", projected(features), _LEAST_HEAD_STD),
            ):
                if seen is None:
                    continue
                found = spread(seen)
                if is_settled:
                    check_spread(found, what=what, least_std=least)
                measured[f"{prefix}std"] = found.relative_std
                measured[f"{prefix}rank"] = found.effective_rank
            if watch is not None and shown is not None and labels is not None:
                few = evenly(labels, min(_WATCHED, len(labels)))
                features = predict(model.backbone, shown, spec, indices=few)
                classes = len(watch.class_names)
                measured["knn"] = leave_one_out(features, labels[few], num_classes=classes)
            return measured

        checkpoint = Checkpoint("encoder", recipe, (), run.data, {})
        hooks = Hooks(begin_epoch=begin_epoch, measure=measure)
        history = run.loop(objective.to(run.world.device), hooks, model.backbone, checkpoint)
        if isinstance(objective.method, Colorization) and run.world.is_first:
            # now: the decoder is no part of the checkpoint
            source = run.pixels if shown is None else shown
            drawn = source.batch(_spread_over(len(source), _DRAWN))
            write_colorization_grid(objective.method, drawn, run.folder.colours, force=True)
        metrics = {
            "method": recipe.method,
            "loss": {"first": history[0].loss, "last": history[-1].loss},
            "features": dict(history[-1].val),
        }
        checkpoint = dataclasses.replace(checkpoint, metrics=metrics)
        return run.finish(model.backbone, checkpoint, history)


def _spread_over(size: int, count: int) -> NDArray[np.int64]:
    """Return up to `count` indices, evenly over 0..size-1: data sets are often sorted."""
    return np.linspace(0, size - 1, min(size, count)).astype(np.int64)


def check_spread(found: Spread, *, what: str, least_std: float) -> None:
    """Refuse vectors that do not differ, or lie on a line.

    Args:
        found: How far they spread.
        what: Names them in the error.
        least_std: Of `found.relative_std`.

    Raises:
        CollapsedError: So they do.
    """
    if found.relative_std < least_std or found.effective_rank < _LEAST_RANK:
        raise CollapsedError(
            "an encoder tells images apart",
            found=f"it has collapsed: {what} have a standard deviation of {found.relative_std:.2g} "
            f"of that of random directions, and an effective rank of {found.effective_rank:.2g}",
            remedy="lower optim.lr, make the batch larger, or weaken what draws views together",
        )
