"""The loop that supervised training and pre-training share; it goes on where a state left off.

Nothing random is kept from step to step: the order of an epoch, the augmentation of an image, the
mixing of a batch and the masks of dropout are functions of (seed, epoch, step, index). So a state
is weights, moments, averages and counters, and a resumed run is the uninterrupted one, bit for
bit.
"""

import math
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict, dataclass
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgereg.errors import StoppedError, TrainingError
from edgereg.progress import Report
from edgereg.recipe import Recipe
from edgereg.regularize.batchnorm import restore_statistics, save_statistics
from edgereg.regularize.ema import WeightAverage
from edgereg.train.batches import epoch_batches, steps_per_epoch
from edgereg.train.distributed import World
from edgereg.train.log import RunLog
from edgereg.train.optim import build_optimizer, load_optimizer, optimizer_tensors
from edgereg.train.run_folder import RunFolder, State
from edgereg.train.schedule import apply_settings, settings_at
from edgereg.train.signals import StopRequest
from edgereg.train.step import Part, Step, Stepper
from edgereg.train.stopping import is_better
from edgereg.train.tally import SLOWER, Epoch, Tally

__all__ = ["Feed", "Hooks", "Loop", "Session"]

_LOGGED_STEPS = 2000  # of a run, at most; more would say no more

Feed = Callable[
    [Iterable[NDArray[np.int64]]], Generator[tuple[NDArray[np.int64], Tensor], None, None]
]
"""Index arrays to (the same array, images (B, 3, H, W) uint8), in order."""


@dataclass(frozen=True)
class Hooks:
    """What differs between kinds of training.

    Args:
        begin_epoch: Called with the share of the run that is done, in [0, 1).
        settle: Recomputes BatchNorm's statistics for the weights that will be measured.
        measure: Returns the validation metrics of the weights as they are.
    """

    begin_epoch: Callable[[float], None] = lambda share: None
    settle: Callable[[], None] | None = None
    measure: Callable[[], Mapping[str, float]] | None = None


@dataclass(frozen=True)
class Session:
    """What the loop runs in.

    Args:
        world: This process and the others.
        folder: Where states are kept.
        log: The run's log; None in all processes but the first.
        report: Called after each step.
        request: Set by SIGTERM.
        snapshot_every_s: Seconds between two states.
    """

    world: World
    folder: RunFolder
    log: RunLog | None
    report: Report
    request: StopRequest
    snapshot_every_s: float


class Loop:
    """A run: made, set to a state if there is one, and run to its end.

    Args:
        objective: Its parameters are moved; see Stepper.
        recipe: All settings.
        size: Images in the data set.
        order: The indices in the order of an epoch.
        feed: Loads the images.
        hooks: What is particular to this kind of training.
        session: What the loop runs in.
    """

    def __init__(
        self,
        objective: nn.Module,
        recipe: Recipe,
        *,
        size: int,
        order: Callable[[int], NDArray[np.int64]],
        feed: Feed,
        hooks: Hooks,
        session: Session,
    ) -> None:
        if recipe.compute.channels_last:
            # our ResNet ran 1.5 times as fast with one CPU thread, 1.3 with two; our ViT 1.1, 1.2
            objective.to(memory_format=torch.channels_last)
        self._objective, self._recipe, self._session = objective, recipe, session
        self._order, self._feed, self._hooks = order, feed, hooks
        self._steps = steps_per_epoch(size, recipe.batch_size)
        self._total = self._steps * recipe.epochs
        self._optimizer = build_optimizer(objective, recipe.optim)
        self._average = WeightAverage(objective, recipe.ema) if recipe.ema.decay else None
        self._best: dict[str, Tensor] = {}
        self._candidate: dict[str, Tensor] = {}
        self._tally = Tally()
        self._last_snapshot = time.monotonic()
        self._stepper = Stepper(objective, self._optimizer, recipe, session.world)

    def state(self) -> State:
        """Return all that changes from step to step."""
        tensors = {f"objective.{k}": t for k, t in self._objective.state_dict().items()}
        tensors |= {f"optimizer.{k}": t for k, t in optimizer_tensors(self._optimizer)}
        if self._average is not None:
            tensors |= {f"average.{k}": t for k, t in self._average.state().items()}
        tensors |= {f"best.{k}": t for k, t in self._best.items()}
        log = self._session.log
        facts = asdict(self._tally) | {
            "scaler": self._stepper.scaler.state_dict(),
            "log_bytes": 0 if log is None else log.offset(),
        }
        return State(tensors, facts)

    def load(self, state: State) -> None:
        """Set the run to a state of an earlier process."""

        def part(name: str) -> dict[str, Tensor]:
            return {
                key[len(name) + 1 :]: tensor
                for key, tensor in state.tensors.items()
                if key.startswith(f"{name}.")
            }

        self._objective.load_state_dict(part("objective"))
        load_optimizer(self._optimizer, part("optimizer"))
        if self._average is not None:
            self._average.load(part("average"))
        self._best = part("best")
        facts = dict(state.facts)
        facts.pop("log_bytes")
        if scaler := facts.pop("scaler"):
            self._stepper.scaler.load_state_dict(scaler)
        self._tally = Tally(**facts)

    def is_finite(self) -> bool:
        """Return whether all weights and buffers are numbers."""
        return all(bool(t.isfinite().all()) for t in self._objective.state_dict().values())

    def run(self) -> tuple[Epoch, ...]:
        """Train to the end, in place, and leave the objective in eval mode.

        Raises:
            TrainingError: Too many steps in a row were no numbers, or the weights are none.
            StoppedError: SIGTERM; the state after the last step is kept.
        """
        tally, recipe = self._tally, self._recipe
        for epoch in range(tally.step // self._steps, recipe.epochs):
            if self._is_over(epoch):
                break
            self._objective.train()
            self._hooks.begin_epoch(epoch / recipe.epochs)
            self._run_epoch(epoch)
        self._finish()
        return tuple(Epoch(**epoch) for epoch in tally.history)

    def _run_epoch(self, epoch: int) -> None:
        tally, world = self._tally, self._session.world
        batches = epoch_batches(self._order(epoch), self._recipe.batch_size)
        rest = islice(batches, tally.step - epoch * self._steps, None)
        cut = [world.part(batch, self._recipe.compute.accumulate) for batch in rest]
        started, seen_before = time.perf_counter(), tally.seen
        with closing(self._feed(indices for parts in cut for indices in parts)) as fed:
            for parts in cut:
                taken = [
                    Part(torch.from_numpy(indices).to(world.device), images.to(world.device))
                    for indices, images in islice(fed, len(parts))
                ]
                lr, flags = self._step(taken, epoch)
                rate = (tally.seen - seen_before) / (time.perf_counter() - started)
                self._session.report(tally.step, tally.to_text(rate))
                if tally.step == (epoch + 1) * self._steps:
                    self._end_epoch(epoch, lr, rate)
                self._heed(*flags)

    def _step(self, parts: list[Part], epoch: int) -> tuple[float, tuple[float, ...]]:
        """Take one step, count it, and return its learning rate and what the processes flagged."""
        tally, session = self._tally, self._session
        settings = settings_at(self._recipe.optim, tally.step, self._total)
        apply_settings(self._optimizer, settings, self._recipe.optim)
        is_due = time.monotonic() - self._last_snapshot >= session.snapshot_every_s
        flags = (float(session.request.is_set), float(session.world.is_first and is_due))
        step = self._stepper(parts, epoch=epoch, step=tally.step, flags=flags)
        lr = self._recipe.optim.lr * settings.lr_share
        self._log_step(step, epoch, lr)
        if self._average is not None and not step.is_skipped:
            self._average.update(tally.step, self._total)
        tally.count(step, epoch, max_skipped=self._recipe.stop.max_skipped)
        return lr, step.flags

    def _log_step(self, step: Step, epoch: int, lr: float) -> None:
        log, number = self._session.log, self._tally.step
        if log is None:
            return
        if step.is_skipped:
            log.write("skip", step=number, epoch=epoch, loss=step.loss, lr=lr)
        elif number % math.ceil(self._total / _LOGGED_STEPS) == 0:
            log.write("step", step=number, epoch=epoch, loss=step.loss, lr=lr)

    def _heed(self, stopped: float, due: float) -> None:
        """Write a state where one is due, and leave where the run was told to stop."""
        if stopped or due:
            # a state that is no number is none to go on from; the one before it stays
            if self._session.world.is_first and self.is_finite():
                self._session.folder.write(self._tally.step, self.state())
            self._last_snapshot = time.monotonic()
        if stopped:
            raise StoppedError(
                "a run that is told to stop writes its state first",
                found=f"SIGTERM after step {self._tally.step} of {self._total}",
                remedy=f"go on with --resume; the state is in '{self._session.folder.path}'",
            )

    def _end_epoch(self, epoch: int, lr: float, images_per_second: float) -> None:
        tally = self._tally
        if tally.steps == 0:
            raise TrainingError(
                "an epoch needs a step whose loss and gradient are numbers",
                found=f"none in epoch {epoch}",
                remedy=SLOWER,
            )
        val = self._measure()
        ended = tally.end_epoch(epoch, lr=lr, val=val, images_per_second=images_per_second)
        if self._session.log is not None:
            self._session.log.write("epoch", step=tally.step, **ended)
        if self._recipe.stop.patience:
            self._remember_best(epoch, val[self._recipe.stop.metric])

    def _measure(self) -> dict[str, float]:
        """Measure what would be shipped now, and leave the run as it was."""
        if self._hooks.measure is None:
            return {}
        self._session.world.average_statistics(self._objective)
        statistics = save_statistics(self._objective)
        with self._shipped():
            if self._hooks.settle is not None:
                self._hooks.settle()
            self._objective.eval()
            measured = dict(self._hooks.measure())
            self._candidate = _copy(self._objective) if self._recipe.stop.patience else {}
        restore_statistics(self._objective, statistics)
        self._objective.train()
        return measured

    def _shipped(self) -> AbstractContextManager[None]:
        return nullcontext() if self._average is None else self._average.swap()

    def _remember_best(self, epoch: int, value: float) -> None:
        tally = self._tally
        if is_better(self._recipe.stop, value, tally.best):
            tally.best, tally.best_epoch = value, epoch
            self._best = self._candidate

    def _is_over(self, epoch: int) -> bool:
        tally, patience = self._tally, self._recipe.stop.patience
        return bool(patience) and tally.best_epoch >= 0 and epoch - tally.best_epoch > patience

    def _finish(self) -> None:
        """Put the weights that are shipped into the objective, and check that they are numbers."""
        if self._best:
            self._objective.load_state_dict(self._best)
        else:
            self._session.world.average_statistics(self._objective)
            with self._shipped():
                shipped = _copy(self._objective)
            self._objective.load_state_dict(shipped)
            if self._hooks.settle is not None:
                self._hooks.settle()
        self._objective.eval().to(memory_format=torch.contiguous_format)
        if not self.is_finite():
            raise TrainingError(
                "the weights must stay finite",
                found="NaN or inf after the last step",
                remedy=SLOWER,
            )


def _copy(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
