"""Muon: steps along orthogonalized gradients.

Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024,
kellerjordan.github.io/posts/muon.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from edgereg.models.zoo import Classifier

__all__ = ["Muon", "orthogonalized", "split_matrices"]

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic that Jordan et al. tuned for few steps
_ADAMW_RMS = 0.2  # of an update of AdamW, by which one rate suits both (Liu et al., 2502.16982)


class Muon(torch.optim.AdamW):
    """Muon for the matrices of hidden layers, AdamW for all else.

        v <- momentum * v + g,    u = g + momentum * v
        w <- (1 - lr * decay) * w - lr * 0.2 * sqrt(max(A, B)) * orthogonalized(u)

    for a weight of (A, B), a convolution's kernel being one of (out, in * height * width). torch's
    own Muon takes no kernels. The scale gives an update AdamW's usual size (Liu et al.,
    2502.16982, equation 4), so that both share the rate and the decay.

    Args:
        groups: As torch's optimizers take them; where `is_matrix` is true Muon is used.
        lr: Learning rate.
        momentum: In [0, 1).
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], *, lr: float, momentum: float = 0.95
    ) -> None:
        super().__init__(groups, lr=lr, betas=(0.9, 0.95))
        for group in self.param_groups:
            group.setdefault("is_matrix", False)
            group["momentum"] = momentum

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take a step."""
        groups = self.param_groups
        for group in groups:
            if group["is_matrix"]:
                for weight in group["params"]:
                    if weight.grad is not None:
                        self._move(weight, weight.grad, group)
        self.param_groups = [group for group in groups if not group["is_matrix"]]
        try:
            super().step()
        finally:
            self.param_groups = groups

    def _move(self, weight: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[weight]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(weight)
            state["step"] = torch.tensor(0.0)  # AdamW looks for one when a state is loaded
        moment: Tensor = state["momentum_buffer"]
        moment.mul_(group["momentum"]).add_(gradient)
        matrix = gradient.add(moment, alpha=group["momentum"]).flatten(1)
        scale = _ADAMW_RMS * max(matrix.shape) ** 0.5
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.sub_(orthogonalized(matrix).view_as(weight), alpha=group["lr"] * scale)


def orthogonalized(matrix: Tensor, *, steps: int = 5) -> Tensor:
    """Return nearly the orthogonal factor of a matrix's polar decomposition.

    Five steps of Newton and Schulz's iteration in bfloat16; singular values end between 0.7 and
    1.2, which does as well as 1 (Jordan et al., 2024).

    Args:
        matrix: (A, B) float; zeros stay zeros.
        steps: Of the iteration.

    Returns:
        (A, B) in the dtype of `matrix`.
    """
    a, b, c = _COEFFICIENTS
    is_tall = matrix.shape[0] > matrix.shape[1]
    x: Tensor = (matrix / (matrix.norm() + 1e-7)).bfloat16()
    x = x.T if is_tall else x
    for _ in range(steps):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return (x.T if is_tall else x).to(matrix.dtype)


def split_matrices(groups: Iterable[dict[str, Any]], model: nn.Module) -> list[dict[str, Any]]:
    """Split groups of parameters by whether Muon is for them.

    It is for the weights of linear layers and convolutions, but not for what reads the image, the
    classifier's head, and depthwise kernels, whose rows are no features of one another.
    """
    heads = {id(m.head.weight) for m in model.modules() if isinstance(m, Classifier)}
    matrices = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, nn.Linear)
        or (isinstance(module, nn.Conv2d) and module.weight.shape[1] not in (1, 3))
    } - heads
    return [
        {**group, "params": chosen, "is_matrix": is_matrix}
        for group in groups
        for is_matrix in (True, False)
        if (chosen := [p for p in group["params"] if (id(p) in matrices) == is_matrix])
    ]
