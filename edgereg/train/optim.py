"""Optimizers and the learning rate's course."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from edgereg.errors import check_settings
from edgereg.regularize.weight_decay import decay_groups

__all__ = ["OptimConfig", "build_optimizer", "build_schedule"]


@dataclass(frozen=True)
class OptimConfig:
    """How the weights move.

    Args:
        name: "adamw" (1711.05101), or "sgd" with Nesterov's momentum.
        lr: Highest learning rate.
        weight_decay: On weights; never on norms and biases. Decoupled for adamw, in the gradient
            for sgd.
        momentum: For sgd.
        warmup: Share of the steps in which the rate rises from zero; then it falls to zero as a
            cosine.
        clip: Largest norm of the gradient; 0 is no limit.
    """

    name: Literal["adamw", "sgd"] = "adamw"
    lr: float = 3e-3
    weight_decay: float = 0.05
    momentum: float = 0.9
    warmup: float = 0.1
    clip: float = 0.0

    def __post_init__(self) -> None:
        check_settings(
            self,
            "optim.",
            {
                "lr": ("above 0", self.lr > 0),
                "weight_decay": ("not negative", self.weight_decay >= 0),
                "momentum": ("in [0, 1)", 0 <= self.momentum < 1),
                "warmup": ("in [0, 1)", 0 <= self.warmup < 1),
                "clip": ("not negative", self.clip >= 0),
            },
        )


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Build an optimizer over the parameters that require a gradient."""
    groups = decay_groups(model, config.weight_decay)
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr)
    return torch.optim.SGD(
        groups, lr=config.lr, momentum=config.momentum, nesterov=config.momentum > 0
    )


def build_schedule(
    optimizer: torch.optim.Optimizer, config: OptimConfig, *, steps: int
) -> LambdaLR:
    """Rise linearly, then fall to zero as a cosine (Loshchilov and Hutter, 1608.03983).

    Args:
        optimizer: Whose rate to set, step by step.
        config: Highest rate and share of warm-up.
        steps: Of the whole run.
    """
    warmup = round(config.warmup * steps)

    def share(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    return LambdaLR(optimizer, share)
