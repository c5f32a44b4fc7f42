"""What a run has come to so far: its steps, its epochs, and its best; a state keeps all of it."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from edgereg.errors import TrainingError
from edgereg.train.step import Step

__all__ = ["SLOWER", "Epoch", "Tally"]

SLOWER = "lower optim.lr, or set optim.clip to 1"
"""What helps where something was no number."""


@dataclass(frozen=True)
class Epoch:
    """What one epoch came to.

    Args:
        epoch: From 0.
        loss: Mean over the steps that were not skipped.
        lr: Of the last step.
        top1: Share of right answers on the augmented images; None without labels.
        skipped: Steps that were skipped because something was no number.
        val: What was measured on the validation set after it; empty if nothing was.
        images_per_second: Of the part that this process ran.
    """

    epoch: int
    loss: float
    lr: float
    top1: float | None
    skipped: int
    val: Mapping[str, float]
    images_per_second: float


@dataclass
class Tally:
    """Counters of a run.

    Args:
        step: Of the run; the next one's number.
        skipped_in_a_row: Up to the last step.
        loss_sum: Here and below: of the present epoch's steps that were not skipped.
        correct: Right answers; None without labels.
        seen: Images.
        steps: How many.
        skipped: Steps of the present epoch that were skipped.
        history: Each `Epoch` that ended, as a dictionary.
        best: Best value of the metric for early stopping.
        best_epoch: When that was; -1 before the first.
    """

    step: int = 0
    skipped_in_a_row: int = 0
    loss_sum: float = 0.0
    correct: float | None = None
    seen: int = 0
    steps: int = 0
    skipped: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    best: float | None = None
    best_epoch: int = -1

    def count(self, step: Step, epoch: int, *, max_skipped: int) -> None:
        """Count a step.

        Raises:
            TrainingError: More than `max_skipped` steps in a row were skipped.
        """
        if step.is_skipped:
            self.skipped += 1
            self.skipped_in_a_row += 1
        else:
            self.skipped_in_a_row = 0
            self.loss_sum += step.loss
            self.steps += 1
            if step.correct is not None:
                self.correct = (self.correct or 0.0) + step.correct
            self.seen += step.count
        self.step += 1
        if self.skipped_in_a_row > max_skipped:
            raise TrainingError(
                f"at most {max_skipped} steps in a row may be skipped",
                found=f"a loss or gradient that is no number in {self.skipped_in_a_row} steps, "
                f"the last in epoch {epoch}, step {self.step - 1}",
                remedy=SLOWER,
            )

    def end_epoch(
        self, epoch: int, *, lr: float, val: Mapping[str, float], images_per_second: float
    ) -> dict[str, Any]:
        """Return the epoch that ended, as a dictionary, and begin the next."""
        ended = Epoch(
            epoch=epoch,
            loss=self.loss_sum / self.steps,
            lr=lr,
            top1=None if self.correct is None else self.correct / self.seen,
            skipped=self.skipped,
            val=val,
            images_per_second=images_per_second,
        )
        self.history.append(asdict(ended))
        self.loss_sum, self.correct, self.seen = 0.0, None, 0
        self.steps, self.skipped = 0, 0
        return self.history[-1]

    def to_text(self, images_per_second: float) -> str:
        """Return the line beside the progress bar."""
        mean = self.loss_sum / self.steps if self.steps else math.nan
        right = "" if self.correct is None else f", {self.correct / self.seen:.1%}"
        last: Mapping[str, float] = self.history[-1]["val"] if self.history else {}
        seen = "".join(f", {name} {value:.3g}" for name, value in last.items())
        return f"loss {mean:.3f}{right}{seen}, {images_per_second:,.0f} images/s"
