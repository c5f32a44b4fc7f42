"""Optimizers."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from edgereg.errors import check_settings
from edgereg.regularize.weight_decay import parameter_groups
from edgereg.train.muon import Muon, split_matrices
from edgereg.train.sgd import DecoupledSgd, Lars

__all__ = ["OptimConfig", "build_optimizer", "load_optimizer", "optimizer_tensors"]


@dataclass(frozen=True)
class OptimConfig:
    """How the weights move.

    Args:
        name: "adamw" (1711.05101), "sgd" with Nesterov's momentum, or "lars" (1708.03888) for large
            batches, or "muon" (Jordan et al., 2024) with AdamW where that is not for.
        lr: Highest learning rate.
        weight_decay: On weights; never on norms and biases.
        decay: "decoupled" shrinks the weights beside the gradient (Loshchilov and Hutter,
            1711.05101); "l2" adds the penalty weight_decay / 2 * |w|^2 to the loss (Krogh and
            Hertz, NeurIPS 1991). "usual" is decoupled for adamw and muon, and l2 for
            the others.
        momentum: For sgd, lars and muon.
        schedule: See schedule.py.
        warmup: Share of the steps in which the rate rises.
        final_lr: The last rate, as a share of the highest.
        clip: Largest norm of the gradient; 0 is no limit.
        backbone_lr: The backbone's rate, as a share of the head's.
        layer_decay: The rate of each stage, as a share of that of the stage above it.
    """

    name: Literal["adamw", "sgd", "lars", "muon"] = "adamw"
    lr: float = 3e-3
    weight_decay: float = 0.05
    decay: Literal["usual", "decoupled", "l2"] = "usual"
    momentum: float = 0.9
    schedule: Literal["cosine", "linear", "onecycle", "constant"] = "cosine"
    warmup: float = 0.1
    final_lr: float = 0.0
    clip: float = 0.0
    backbone_lr: float = 1.0
    layer_decay: float = 1.0

    def __post_init__(self) -> None:
        check_settings(
            self,
            "optim.",
            {
                "lr": ("above 0", self.lr > 0),
                "weight_decay": ("not negative", self.weight_decay >= 0),
                "momentum": ("in [0, 1)", 0 <= self.momentum < 1),
                "warmup": ("in [0, 1)", 0 <= self.warmup < 1),
                "final_lr": ("in [0, 1]", 0 <= self.final_lr <= 1),
                "clip": ("not negative", self.clip >= 0),
                "backbone_lr": ("not negative", self.backbone_lr >= 0),
                "layer_decay": ("in (0, 1]", 0 < self.layer_decay <= 1),
                "decay": (
                    "decoupled for muon, which does not see a gradient's size",
                    (self.name, self.decay) != ("muon", "l2"),
                ),
            },
        )


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Build an optimizer over the parameters that require a gradient.

    Args:
        model: A classifier, or what stands around one; see parameter_groups.
        config: Which optimizer, and how strongly it decays the weights.
    """
    groups = parameter_groups(
        model,
        weight_decay=config.weight_decay,
        backbone_lr=config.backbone_lr,
        layer_decay=config.layer_decay,
    )
    if config.name == "adamw":
        kind = torch.optim.Adam if config.decay == "l2" else torch.optim.AdamW
        return kind(groups, lr=config.lr)
    if config.name == "muon":
        return Muon(split_matrices(groups, model), lr=config.lr, momentum=config.momentum)
    is_decoupled = config.decay == "decoupled"
    if config.name == "lars":
        return Lars(groups, lr=config.lr, momentum=config.momentum, is_decoupled=is_decoupled)
    kind_of_sgd = DecoupledSgd if is_decoupled else torch.optim.SGD
    return kind_of_sgd(groups, lr=config.lr, momentum=config.momentum, nesterov=config.momentum > 0)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    """Yield all that an optimizer keeps, each by the name that `load_optimizer` takes."""
    for index, values in optimizer.state_dict()["state"].items():
        for key, value in values.items():
            if value is not None:
                yield f"{index}.{key}", torch.as_tensor(value)


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Give an optimizer, in place, what one over the same parameters kept."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, _, key = name.partition(".")
        parameter = parameters[int(index)]
        if value.shape == parameter.shape:
            # the same strides as before: another order of sums would be another rounding
            value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )
