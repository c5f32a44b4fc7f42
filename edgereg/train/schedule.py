"""The learning rate's course, as a function of the step; a resume needs no state."""

import math
from dataclasses import dataclass

import torch

from edgereg.train.optim import OptimConfig

__all__ = ["Settings", "apply_settings", "settings_at"]

_LOW_MOMENTUM, _HIGH_MOMENTUM = 0.85, 0.95  # of 1708.07120, section 4.2
_START = 1 / 25  # of the highest rate, as torch's OneCycleLR starts


@dataclass(frozen=True)
class Settings:
    """What holds for one step.

    Args:
        lr_share: Of the highest learning rate.
        momentum: Or AdamW's first beta; None leaves it as it is.
    """

    lr_share: float
    momentum: float | None = None


def settings_at(config: OptimConfig, step: int, steps: int) -> Settings:
    """Return what holds for a step.

    cosine    rises linearly in the first `warmup` of the steps, then falls as a cosine
              (Loshchilov and Hutter, 1608.03983, equation 5)
    onecycle  rises from 1/25 and falls, both as cosines, while momentum falls and rises (Smith and
              Topin, 1708.07120)
    linear    as cosine, but falls in a straight line
    constant  rises, and stays

    Args:
        config: Kind, warm-up and last rate.
        step: From 0.
        steps: Of the whole run.
    """
    if config.schedule == "onecycle":
        return _one_cycle(config, step, steps)
    warmup = round(config.warmup * steps)
    if step < warmup:
        return Settings((step + 1) / (warmup + 1))
    if config.schedule == "constant":
        return Settings(1.0)
    done = (step - warmup) / max(1, steps - warmup)
    left = 1 - done if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return Settings(config.final_lr + (1 - config.final_lr) * left)


def _one_cycle(config: OptimConfig, step: int, steps: int) -> Settings:
    top = max(1.0, config.warmup * steps - 1)
    if step <= top:
        done, low = step / top, _START
        return Settings(_cosine(low, 1.0, done), _cosine(_HIGH_MOMENTUM, _LOW_MOMENTUM, done))
    done = (step - top) / max(1.0, steps - 1 - top)
    return Settings(
        _cosine(1.0, config.final_lr, done), _cosine(_LOW_MOMENTUM, _HIGH_MOMENTUM, done)
    )


def _cosine(start: float, end: float, done: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * done))


def apply_settings(
    optimizer: torch.optim.Optimizer, settings: Settings, config: OptimConfig
) -> None:
    """Set rate and momentum of every group; a group's `lr_scale` multiplies its rate."""
    for group in optimizer.param_groups:
        group["lr"] = config.lr * settings.lr_share * group.get("lr_scale", 1.0)
        if settings.momentum is None:
            continue
        if "betas" in group:
            group["betas"] = (settings.momentum, group["betas"][1])
        if "momentum" in group:  # muon's groups have both
            group["momentum"] = settings.momentum
