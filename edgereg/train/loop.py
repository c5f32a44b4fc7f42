"""The loop that supervised training and pre-training share."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgereg.errors import TrainingError
from edgereg.progress import Report
from edgereg.recipe import Recipe
from edgereg.train.batches import epoch_batches, steps_per_epoch
from edgereg.train.optim import build_optimizer, build_schedule

__all__ = ["Epoch", "run_epochs"]

_SLOWER = "lower optim.lr, or set optim.clip to 1"

Loss = Callable[[NDArray[np.int64], int, int], Tensor]
"""(indices of the batch, epoch, step of the run) -> the loss to descend."""


@dataclass(frozen=True)
class Epoch:
    """What one epoch came to."""

    epoch: int
    loss: float
    lr: float
    images_per_second: float


def run_epochs(
    model: nn.Module, loss_of: Loss, recipe: Recipe, *, size: int, report: Report
) -> tuple[Epoch, ...]:
    """Train a model, in place.

    Args:
        model: Its parameters are moved; left in train mode.
        loss_of: Computes the loss of a batch.
        recipe: Epochs, batch size, optimizer and seed.
        size: Images in the data set.
        report: Called after each step.

    Raises:
        TrainingError: The loss or a weight is no longer a number; nothing was written.
    """
    steps = steps_per_epoch(size, recipe.batch_size)
    optimizer = build_optimizer(model, recipe.optim)
    schedule = build_schedule(optimizer, recipe.optim, steps=steps * recipe.epochs)
    history = []
    # our ResNet ran 1.5 times as fast with one CPU thread, 1.3 with two; our ViT 1.1 and 1.2
    model.train().to(memory_format=torch.channels_last)
    for epoch in range(recipe.epochs):
        started = time.perf_counter()
        losses: list[float] = []
        for batch in epoch_batches(size, recipe.batch_size, seed=recipe.seed, epoch=epoch):
            step = epoch * steps + len(losses)
            optimizer.zero_grad(set_to_none=True)
            lr = float(schedule.get_last_lr()[0])
            loss = loss_of(batch, epoch, step)
            losses.append(loss.item())
            if not np.isfinite(losses[-1]):
                raise TrainingError(
                    "the loss must stay finite",
                    found=f"{losses[-1]} in epoch {epoch}, step {step}",
                    remedy=_SLOWER,
                )
            loss.backward()  # type: ignore[no-untyped-call]
            if recipe.optim.clip:
                torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.optim.clip)
            optimizer.step()
            schedule.step()
            report(step + 1, f"loss {losses[-1]:.3f}")
        seconds = time.perf_counter() - started
        history.append(
            Epoch(
                epoch=epoch,
                loss=float(np.mean(losses)),
                lr=lr,
                images_per_second=len(losses) * min(recipe.batch_size, size) / seconds,
            )
        )
    # the loss of the last step was computed before the weights moved once more
    if not all(t.isfinite().all() for t in [*model.parameters(), *model.buffers()]):
        raise TrainingError(
            "the weights must stay finite", found="NaN or inf after the last step", remedy=_SLOWER
        )
    return tuple(history)
