"""One step: the gradients of a batch's parts, a check that they are numbers, and the move."""

import hashlib
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from edgereg.recipe import Recipe
from edgereg.regularize.batchnorm import (
    hold_statistics,
    restore_statistics,
    save_statistics,
)
from edgereg.regularize.sam import ascend, descend
from edgereg.train.distributed import World

__all__ = ["Loss", "Part", "Place", "Step", "Stepper"]


class Place(NamedTuple):
    """Where in a run a part of a batch is met; with the seed, all that random draws depend on."""

    epoch: int
    step: int
    part: int


class Part(NamedTuple):
    """A part of a batch: the images' indices (B,) int64 and the images (B, 3, H, W) uint8."""

    indices: Tensor
    images: Tensor


class Loss(NamedTuple):
    """What an objective answers: the mean loss, and the number of right answers, if it is known."""

    value: Tensor
    correct: Tensor | None = None


@dataclass(frozen=True)
class Step:
    """What a step came to, over all processes.

    Args:
        loss: Mean over the batch; may be NaN or infinite where the step was skipped.
        correct: Right answers; None where the objective has no labels.
        count: Images.
        is_skipped: Whether the loss or a gradient was no number, so that nothing was moved.
        flags: The sum of the processes' flags.
    """

    loss: float
    correct: float | None
    count: int
    is_skipped: bool
    flags: tuple[float, ...]


class Stepper:
    """Takes steps.

    Args:
        objective: Called with images, indices and Place; answers with a Loss. Its
            `has_unused_parameters`, if it has one, says whether the loss may ignore some of them;
            its `end_step`, if it has one, is told whether the step was taken.
        optimizer: Over the objective's parameters.
        recipe: Precision, clipping, sharpness-aware minimisation, seed.
        world: This process and the others.
    """

    def __init__(
        self, objective: nn.Module, optimizer: torch.optim.Optimizer, recipe: Recipe, world: World
    ) -> None:
        self._objective, self._optimizer, self._recipe, self._world = (
            objective,
            optimizer,
            recipe,
            world,
        )
        self._wrapped = world.wrap(
            objective, has_unused=getattr(objective, "has_unused_parameters", False)
        )
        self._end_step = getattr(objective, "end_step", None)
        self._parameters = [p for p in objective.parameters() if p.requires_grad]
        self.scaler = torch.amp.GradScaler(
            torch.device(world.device).type, enabled=recipe.compute.precision == "fp16"
        )

    def __call__(
        self, parts: Sequence[Part], *, epoch: int, step: int, flags: Sequence[float] = ()
    ) -> Step:
        """Take a step, or skip it where the loss or a gradient is no number.

        Args:
            parts: Of this process.
            epoch: From 0.
            step: Of the run, from 0.
            flags: Summed over the processes on the way, so that all decide alike.
        """
        statistics = save_statistics(self._objective)
        loss, correct = self._descend_into(parts, epoch, step)
        norm = self._gradient_norm()
        count = sum(len(part.indices) for part in parts)
        sums = self._world.total(
            torch.tensor(
                [loss * count, -1.0 if correct is None else correct, count, *flags],
                dtype=torch.float64,
                device=self._world.device,
            )
        ).tolist()
        loss = sums[0] / sums[2]
        is_finite = bool(torch.isfinite(norm)) and loss - loss == 0
        if is_finite and self._recipe.sam.rho:
            is_finite = self._sharpen(parts, epoch, step)
            norm = self._gradient_norm()
        if is_finite:
            if self._recipe.optim.clip:
                torch.nn.utils.clip_grads_with_norm_(
                    self._parameters, self._recipe.optim.clip, norm
                )
            self._optimizer.step()
        else:
            restore_statistics(self._objective, statistics)
        if self._end_step is not None:
            self._end_step(taken=is_finite)
        if self.scaler.is_enabled():
            self.scaler.update()
        self._optimizer.zero_grad(set_to_none=True)
        return Step(
            loss=loss,
            correct=None if correct is None else sums[1],
            count=int(sums[2]),
            is_skipped=not is_finite,
            flags=tuple(sums[3:]),
        )

    def _descend_into(
        self, parts: Sequence[Part], epoch: int, step: int
    ) -> tuple[float, float | None]:
        """Leave the batch's mean gradient in the parameters; return mean loss and right answers."""
        count = sum(len(part.indices) for part in parts)
        loss, correct = 0.0, None
        for number, part in enumerate(parts):
            is_last = number == len(parts) - 1
            torch.manual_seed(_seed(self._recipe.seed, step, self._world.rank, number))
            wait = nullcontext() if is_last else _no_sync(self._wrapped)
            with wait:
                answer: Loss = self._wrapped(
                    part.images, part.indices, Place(epoch, step, self._world.rank << 16 | number)
                )
                share = len(part.indices) / count
                self.scaler.scale(answer.value * share).backward()  # type: ignore[no-untyped-call]
            loss += float(answer.value.detach()) * share
            if answer.correct is not None:
                correct = (correct or 0.0) + float(answer.correct)
        if self.scaler.is_enabled():
            self.scaler.unscale_(self._optimizer)
        return loss, correct

    def _sharpen(self, parts: Sequence[Part], epoch: int, step: int) -> bool:
        """Replace the gradient by the one at the worst point nearby; say whether it is a number."""
        climbed = ascend(self._parameters, self._recipe.sam)
        self._optimizer.zero_grad(set_to_none=True)
        with hold_statistics(self._objective):
            self._descend_into(parts, epoch, step)
        descend(self._parameters, climbed)
        return bool(torch.isfinite(self._gradient_norm()))

    def _gradient_norm(self) -> Tensor:
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)


def _no_sync(module: nn.Module) -> AbstractContextManager[None]:
    """Return the context in which gradients are summed up here, and not yet sent."""
    if isinstance(module, nn.parallel.DistributedDataParallel):
        return module.no_sync()
    return nullcontext()


def _seed(*place: int) -> int:
    """Return the seed of dropout's masks: a function of the place, and a resume needs no state."""
    key = "/".join(map(str, place)).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=7).digest(), "little")
