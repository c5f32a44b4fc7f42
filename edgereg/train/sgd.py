"""Stochastic gradient descent where torch has none: decoupled decay, and layer-wise rates."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = ["DecoupledSgd", "Lars"]


class DecoupledSgd(torch.optim.SGD):
    """SGD whose weight decay stands beside the gradient (Loshchilov and Hutter, 1711.05101).

        w <- (1 - lr * decay) * w, then a step along the gradient and its momentum

    The decay does not enter the momentum, and with it the fixed point of a loss plus a constant
    gradient differs from that of the l2 penalty.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Shrink the weights, then step without decay."""
        decays = [group["weight_decay"] for group in self.param_groups]
        for group, decay in zip(self.param_groups, decays, strict=True):
            moved = [p for p in group["params"] if p.grad is not None]
            if decay and moved:
                torch._foreach_mul_(moved, 1 - group["lr"] * decay)
            group["weight_decay"] = 0.0
        try:
            return super().step(closure)  # type: ignore[no-any-return]
        finally:
            for group, decay in zip(self.param_groups, decays, strict=True):
                group["weight_decay"] = decay


class Lars(torch.optim.Optimizer):
    """Layer-wise adaptive rates, for batches of thousands (You et al., 1708.03888, algorithm 1).

        local = trust * |w| / (|g| + decay * |w|)
        v <- momentum * v + lr * local * (g + decay * w),   w <- w - v

    Biases and the gains and shifts of norms (one dimension) take the plain rate: their norm says
    nothing about the scale of their gradient.

    Args:
        groups: As torch's optimizers take them.
        lr: Learning rate.
        momentum: In [0, 1).
        trust: The paper's eta.
        is_decoupled: Whether the decay shrinks the weights beside the gradient.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        momentum: float = 0.9,
        trust: float = 0.001,
        is_decoupled: bool = False,
    ) -> None:
        self._is_decoupled = is_decoupled
        super().__init__(
            groups, {"lr": lr, "momentum": momentum, "trust": trust, "weight_decay": 0.0}
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take a step."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad, group)

    def _move(self, weight: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        decay, rate = group["weight_decay"], group["lr"]
        if decay and self._is_decoupled:
            weight.mul_(1 - rate * decay)
            decay = 0.0
        if weight.ndim > 1:
            size, slope = weight.norm(), gradient.norm()
            local = group["trust"] * size / (slope + decay * size)
            # a weight or a gradient of zero says nothing about the scale
            rate = rate * torch.where((size > 0) & (slope > 0), local, torch.ones_like(local))
        state = self.state[weight]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        moment: Tensor = state["momentum_buffer"]
        moment.mul_(group["momentum"]).add_((gradient + decay * weight) * rate)
        weight.sub_(moment)
