"""A running average of the weights, which answers better than the last weights alone.

    ema       m <- m + (1 - d) * (w - m),  d = min(decay, (1 + t) / (10 + t))
    average   m <- m + (w - m) / t

An exponential mean (Polyak and Juditsky, 1992; with the warm-up of its decay as in TensorFlow's
ExponentialMovingAverage) or the plain mean (stochastic weight averaging, Izmailov et al.,
1803.05407, algorithm 1). BatchNorm's statistics are not averaged: `batchnorm.recompute` measures
them anew.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from edgereg.errors import check_settings

__all__ = ["EmaConfig", "WeightAverage"]


@dataclass(frozen=True)
class EmaConfig:
    """Which average of the weights is shipped.

    Args:
        decay: Of the exponential mean, in [0, 1); 0 is no average, 0.999 is usual for long runs.
        kind: "ema", or "average": all weights since `start` count alike, and `decay` only switches
            it on.
        every: Steps between two updates; the decay is per update.
        start: Share of the run before which the average is a copy of the weights, in [0, 1).
    """

    decay: float = 0.0
    kind: Literal["ema", "average"] = "ema"
    every: int = 1
    start: float = 0.0

    def __post_init__(self) -> None:
        check_settings(
            self,
            "ema.",
            {
                "decay": ("in [0, 1)", 0 <= self.decay < 1),
                "every": ("1 or more", self.every >= 1),
                "start": ("in [0, 1)", 0 <= self.start < 1),
            },
        )


class WeightAverage:
    """The average of a module's trained parameters.

    Args:
        module: Whose parameters to average; frozen ones are left alone.
        config: Which average.
    """

    def __init__(self, module: nn.Module, config: EmaConfig) -> None:
        trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        self._names = [name for name, _ in trained]
        self._weights: list[Tensor] = [p.detach() for _, p in trained]
        self._means = [weight.clone() for weight in self._weights]
        self._config = config
        self._updates = 0

    @torch.no_grad()
    def update(self, step: int, steps: int) -> None:
        """Take in the weights after a step.

        Args:
            step: From 0.
            steps: Of the whole run.
        """
        if step < self._config.start * steps:
            torch._foreach_copy_(self._means, self._weights)
            return
        if (step + 1) % self._config.every:
            return
        self._updates += 1
        if self._config.kind == "average":
            share = 1 / self._updates
        else:
            share = 1 - min(self._config.decay, (1 + self._updates) / (10 + self._updates))
        torch._foreach_lerp_(self._means, self._weights, share)

    @contextmanager
    def swap(self) -> Iterator[None]:
        """Put the average into the module while the block runs."""
        before = [weight.clone() for weight in self._weights]
        torch._foreach_copy_(self._weights, self._means)
        try:
            yield
        finally:
            torch._foreach_copy_(self._weights, before)

    def state(self) -> dict[str, Tensor]:
        """Return the average and the number of updates, for a state on the disk."""
        means = dict(zip(self._names, self._means, strict=True))
        return {**means, "updates": torch.tensor(self._updates)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Set the average to an earlier state."""
        self._updates = int(state["updates"])
        torch._foreach_copy_(self._means, [state[name] for name in self._names])
