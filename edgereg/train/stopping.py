"""When to stop: early, on a metric of the validation set, or after too many skipped steps."""

import math
from dataclasses import dataclass
from typing import Literal

from edgereg.errors import check_settings

__all__ = ["StopConfig", "is_better"]


@dataclass(frozen=True)
class StopConfig:
    """When to stop before the last epoch.

    Args:
        patience: Epochs without a better value of the metric after which to stop early; the
            weights of the best epoch are kept (Prechelt, "Early stopping - but when?", 1998).
            0 is never. Needs a validation set.
        metric: "top1" or "loss", on the validation set.
        min_delta: By how much a better value must be better, in the metric's unit.
        max_skipped: Steps in a row that may be skipped because the loss or a gradient was no
            number.
    """

    patience: int = 0
    metric: Literal["top1", "loss"] = "top1"
    min_delta: float = 0.0
    max_skipped: int = 10

    def __post_init__(self) -> None:
        check_settings(
            self,
            "stop.",
            {
                "patience": ("not negative", self.patience >= 0),
                "min_delta": ("not negative", self.min_delta >= 0),
                "max_skipped": ("not negative", self.max_skipped >= 0),
            },
        )


def is_better(config: StopConfig, value: float, best: float | None) -> bool:
    """Return whether a value of the metric beats the best so far; NaN beats nothing."""
    if math.isnan(value):
        return False
    if best is None:
        return True
    gain = value - best if config.metric == "top1" else best - value
    return gain > config.min_delta
