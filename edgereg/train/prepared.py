"""What training and pre-training share: the data read, the run's folder open, and the loop run."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deploy.publish import check_free
from deploy.runtime.preprocess import Preprocessing
from edgereg.checkpoint import MEMBERS, Checkpoint, load_checkpoint, save_checkpoint
from edgereg.data.feed import feed
from edgereg.data.images import Images, digest, epoch_order
from edgereg.data.pixels import Pixels
from edgereg.errors import DataError, RecipeError, TrainingError
from edgereg.progress import Report
from edgereg.recipe import Recipe
from edgereg.train.batches import steps_per_epoch
from edgereg.train.distributed import World, join_world
from edgereg.train.log import RunLog
from edgereg.train.loop import Hooks, Loop, Session
from edgereg.train.run_folder import RunFolder, open_run_folder, run_folder_of
from edgereg.train.signals import stop_request
from edgereg.train.tally import Epoch

__all__ = ["Bar", "Prepared", "RunOptions", "RunResult", "check_out", "prepared", "read_pixels"]

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


@dataclass(frozen=True)
class Prepared:
    """A run whose data is read and whose folder is open."""

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
        objective: torch.nn.Module,
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
                    remedy=f"{error.remedy}; the last good weights can be trained with labels: "
                    f"edgereg train --init {self.folder.last_good}",
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
def prepared(
    images: Images,
    out: Path,
    recipe: Recipe,
    verb: str,
    bar: Bar,
    options: RunOptions,
    *,
    val: Images | None = None,
    init: Path | None = None,
) -> Iterator[Prepared | RunResult]:
    """Read the data and open the run folder; a resume of a finished run has its result at once.

    Args:
        images: To train on.
        out: The checkpoint to write.
        recipe: All settings.
        verb: Names the kind of run.
        bar: Shows how far it is.
        options: How to carry it out.
        val: Measured on the way; with all before, what a resumed run must have in common.
        init: A checkpoint that is started from, or learnt from.
    """
    with ExitStack() as stack:
        world = stack.enter_context(join_world(options.device))
        recipe.compute.check_device(world.device)
        world.check_batch(recipe.batch_size, recipe.compute.accumulate, size=len(images))
        shown = bar if world.is_first else _no_bar
        pixels = read_pixels(images, recipe.preprocessing(), shown, workers=options.workers)
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
        yield Prepared(images, pixels, data, out, recipe, verb, shown, options, world, folder)


def check_out(out: Path, options: RunOptions) -> None:
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


def read_pixels(images: Images, spec: Preprocessing, bar: Bar, *, workers: int = 0) -> Pixels:
    """Read a data set, and show how far it is.

    Raises:
        DataError: It has fewer than two images, or a damaged one.
    """
    if len(images) < 2:
        raise DataError(
            "a run needs at least two images",
            found=f"'{images.name}' has {len(images)}",
            remedy="add images",
        )
    with bar(f"read {images.name}", len(images)) as report:
        return Pixels(images, spec, workers=workers, progress=lambda done: report(done, ""))


def _describe(images: Images) -> dict[str, Any]:
    return {"name": images.name, "count": len(images), "sha256": digest(images)}


def _fingerprint(checkpoint: Path) -> str:
    return hashlib.sha256((checkpoint / MEMBERS[1]).read_bytes()).hexdigest()


@contextmanager
def _no_bar(description: str, total: int) -> Iterator[Report]:
    yield lambda done, text: None
