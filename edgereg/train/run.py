"""Training and pre-training runs, from a data set to a checkpoint."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from deploy.publish import check_free
from deploy.runtime.preprocess import Preprocessing
from edgereg.augment.foreign import import_callables
from edgereg.checkpoint import (
    MEMBERS,
    Checkpoint,
    load_checkpoint,
    load_classifier,
    load_start,
    save_checkpoint,
)
from edgereg.data.feed import feed
from edgereg.data.images import Images, check_classes, digest, epoch_order, labels_of
from edgereg.data.pixels import Pixels
from edgereg.errors import DataError, RecipeError, TrainingError
from edgereg.models.zoo import build_model
from edgereg.progress import Report
from edgereg.recipe import Recipe
from edgereg.regularize.batchnorm import configure_batchnorm, recompute_statistics
from edgereg.regularize.placement import place
from edgereg.regularize.stages import freeze_stages
from edgereg.train.batches import epoch_batches, steps_per_epoch
from edgereg.train.distributed import World, join_world
from edgereg.train.evaluate import Evaluation, evaluate
from edgereg.train.log import RunLog
from edgereg.train.loop import Epoch, Hooks, Loop, Session
from edgereg.train.pretrain import Pretraining
from edgereg.train.run_folder import RunFolder, open_run_folder, run_folder_of
from edgereg.train.signals import stop_request
from edgereg.train.supervised import Supervised

__all__ = ["Bar", "RunOptions", "RunResult", "eval_run", "pretrain_run", "train_run"]

Bar = Callable[[str, int], AbstractContextManager[Report]]
"""Opens a progress bar: a description and a total."""


@dataclass(frozen=True)
class RunOptions:
    """How a run is carried out; nothing here changes what is learned.

    Args:
        force: Whether an earlier checkpoint, or the state of a stopped run, may be replaced.
        resume: Whether to go on from the state of a stopped run, if there is one.
        device: "cpu" or "cuda".
        workers: Processes that decode images; 0 decodes in this one.
        snapshot_every_s: Seconds between two states on the disk.
    """

    force: bool = False
    resume: bool = False
    device: str = "cpu"
    workers: int = 0
    snapshot_every_s: float = 300.0


@dataclass(frozen=True)
class RunResult:
    """What a run wrote and measured.

    Args:
        path: Of the checkpoint.
        checkpoint: What it says of itself.
        history: Epoch by epoch; empty where a resume found the run finished.
    """

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
    _check_out(out, options)
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
    placement = place(model, recipe.regularizers())
    if init is not None:
        load_start(init, model, recipe.model, class_names=classes)
    model = configure_batchnorm(model, recipe.batchnorm)
    freeze_stages(model, recipe.frozen_stages)
    spec = recipe.preprocessing()
    with _prepared(images, out, recipe, "train", bar, options, val=val, init=init) as run:
        if isinstance(run, RunResult):
            return run
        held_out = None if val is None else _read(val, spec, run.bar, workers=options.workers)
        objective = Supervised(model, labels, recipe).to(run.world.device)

        def measure(pixels: Pixels, truth: NDArray[np.int64]) -> Evaluation:
            return evaluate(
                model.eval(), pixels, truth, spec, num_classes=len(classes), world=run.world
            )

        def settle() -> None:
            epoch = recipe.epochs  # beyond the last one: draws that no step has seen
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


def pretrain_run(
    images: Images,
    out: Path,
    recipe: Recipe,
    *,
    bar: Bar,
    options: RunOptions | None = None,
) -> RunResult:
    """Pre-train a backbone without labels and write its checkpoint.

    Args:
        images: Labels, if there are any, are not looked at.
        out: The checkpoint to write.
        recipe: All settings.
        bar: Shows how far it is.
        options: How to carry it out.

    Raises:
        BadInputError, EdgeregError: Before the first step, where the input is at fault.
        TrainingError, StoppedError: Later; see Loop.run.
    """
    options = options or RunOptions()
    _check_out(out, options)
    import_callables(recipe.chain(), key="augment")
    model = build_model(recipe.model, num_classes=1, seed=recipe.seed)
    placement = place(model, recipe.regularizers())
    model = configure_batchnorm(model, recipe.batchnorm)
    objective = Pretraining(model, size=len(images), recipe=recipe)
    with _prepared(images, out, recipe, "pretrain", bar, options) as run:
        if isinstance(run, RunResult):
            return run
        checkpoint = Checkpoint("encoder", recipe, (), run.data, {})
        history = run.loop(
            objective.to(run.world.device),
            Hooks(begin_epoch=placement.at),
            model.backbone,
            checkpoint,
        )
        metrics = {"method": "pirl", "loss": {"first": history[0].loss, "last": history[-1].loss}}
        checkpoint = dataclasses.replace(checkpoint, metrics=metrics)
        return run.finish(model.backbone, checkpoint, history)


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


@dataclass(frozen=True)
class _Run:
    """What training and pre-training share, once the data is read and the folder open."""

    images: Images
    pixels: Pixels
    data: Mapping[str, Any]
    out: Path
    recipe: Recipe
    verb: str
    bar: Bar
    options: RunOptions
    world: World
    folder: RunFolder

    def loop(
        self,
        objective: Supervised | Pretraining,
        hooks: Hooks,
        module: torch.nn.Module,
        checkpoint: Checkpoint,
    ) -> tuple[Epoch, ...]:
        """Run the loop; where it gives up, write the last good weights as a checkpoint."""
        recipe, size = self.recipe, len(self.images)
        total = steps_per_epoch(size, recipe.batch_size) * recipe.epochs
        state = self.folder.latest()
        with ExitStack() as stack:
            report = stack.enter_context(self.bar(f"{self.verb} {recipe.model.name}", total))
            request = stack.enter_context(stop_request())
            stack.enter_context(torch.random.fork_rng())
            log = None
            if self.world.is_first:
                offset = None if state is None else int(state.facts["log_bytes"])
                log = stack.enter_context(RunLog(self.folder.log, resume_at=offset))
                log.write(
                    "start" if state is None else "resume",
                    torch=torch.__version__,
                    threads=torch.get_num_threads(),
                    processes=self.world.size,
                    device=self.world.device,
                )
            loop = Loop(
                objective,
                recipe,
                size=size,
                order=lambda epoch: epoch_order(self.images, seed=recipe.seed, epoch=epoch),
                feed=lambda batches: feed(self.pixels, batches, workers=self.options.workers),
                hooks=hooks,
                session=Session(
                    self.world, self.folder, log, report, request, self.options.snapshot_every_s
                ),
            )
            if state is not None:
                loop.load(state)
            try:
                return loop.run()
            except TrainingError as error:
                if not (self.world.is_first and self._save_last_good(loop, module, checkpoint)):
                    raise
                raise TrainingError(
                    error.rule,
                    found=error.found,
                    remedy=f"{error.remedy}; the last good weights: --init {self.folder.last_good}",
                ) from error

    def _save_last_good(self, loop: Loop, module: torch.nn.Module, checkpoint: Checkpoint) -> bool:
        """Write the newest weights that are numbers; return whether there are any."""
        if not loop.is_finite():
            if (state := self.folder.latest()) is None:
                return False
            loop.load(state)
        save_checkpoint(self.folder.last_good, module, checkpoint, force=True)
        return True

    def finish(
        self, module: torch.nn.Module, checkpoint: Checkpoint, history: tuple[Epoch, ...]
    ) -> RunResult:
        """Write the checkpoint, and remove the states that are no longer needed."""
        if self.world.is_first:
            save_checkpoint(self.out, module, checkpoint, force=self.options.force)
            self.folder.clear()
        return RunResult(self.out, checkpoint, history)


@contextmanager
def _prepared(
    images: Images,
    out: Path,
    recipe: Recipe,
    verb: str,
    bar: Bar,
    options: RunOptions,
    *,
    val: Images | None = None,
    init: Path | None = None,
) -> Iterator[_Run | RunResult]:
    """Read the data and open the run folder; a resume of a finished run has its result at once."""
    with ExitStack() as stack:
        world = stack.enter_context(join_world(options.device))
        recipe.compute.check_device(world.device)
        world.check_batch(recipe.batch_size, recipe.compute.accumulate)
        shown = bar if world.is_first else _no_bar
        pixels = _read(images, recipe.preprocessing(), shown, workers=options.workers)
        # before the first step: what is trained on must be what is named
        data = _describe(images)
        if options.resume and out.exists():
            yield _finished(out, recipe, data)
            return
        folder = RunFolder(run_folder_of(out))
        if world.is_first:
            identity = {
                "verb": verb,
                "recipe": recipe.to_json(),
                "data": data,
                "val": None if val is None else _describe(val),
                "init": None if init is None else _fingerprint(init),
            }
            folder = stack.enter_context(
                open_run_folder(out, identity, resume=options.resume, force=options.force)
            )
        world.from_first(None)  # nobody looks for a state before the folder is settled
        yield _Run(images, pixels, data, out, recipe, verb, shown, options, world, folder)


def _check_out(out: Path, options: RunOptions) -> None:
    """Refuse a checkpoint's place before anything is read; a resume may find the run finished."""
    if not (options.resume and out.exists()):
        check_free(out, force=options.force, members=MEMBERS)


def _finished(out: Path, recipe: Recipe, data: Mapping[str, Any]) -> RunResult:
    checkpoint = load_checkpoint(out)
    if checkpoint.recipe != recipe or dict(checkpoint.data) != dict(data):
        what = "recipe" if checkpoint.recipe != recipe else "data"
        raise RecipeError(
            "a run is resumed with the same recipe and data",
            found=f"'{out}' was finished with another {what}",
            remedy="name another --out, or replace it with --force and without --resume",
        )
    return RunResult(out, checkpoint, ())


def _read(images: Images, spec: Preprocessing, bar: Bar, *, workers: int = 0) -> Pixels:
    if len(images) < 2:
        raise DataError(
            "a run needs at least two images",
            found=f"'{images.name}' has {len(images)}",
            remedy="add images",
        )
    with bar(f"read {images.name}", len(images)) as report:
        return Pixels(images, spec, workers=workers, progress=lambda done: report(done, ""))


def _accuracy(result: Evaluation) -> dict[str, Any]:
    return {"top1": result.top1, "loss": result.loss, "count": result.count}


def _describe(images: Images) -> dict[str, Any]:
    return {"name": images.name, "count": len(images), "sha256": digest(images)}


def _fingerprint(checkpoint: Path) -> str:
    return hashlib.sha256((checkpoint / MEMBERS[1]).read_bytes()).hexdigest()


@contextmanager
def _no_bar(description: str, total: int) -> Iterator[Report]:
    yield lambda done, text: None
