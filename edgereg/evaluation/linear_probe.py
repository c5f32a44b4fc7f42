"""A linear classifier on frozen features: multinomial logistic regression.

The features are standardised with the training set's mean and deviation. The strength of the l2
penalty is chosen among a few by the cross-entropy on a fifth of the training features.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from edgereg.errors import DataError

__all__ = ["STRENGTHS", "LinearProbe", "linear_probe"]

STRENGTHS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
"""Of the l2 penalty, from strong to weak: each fit starts where the stronger one ended."""

_HELD_OUT = 0.2
_MAX_STEPS = 500


@dataclass(frozen=True)
class LinearProbe:
    """What the linear classifier answers, and how it was fitted.

    Args:
        predictions: (N,) int64, the class of each test vector.
        l2: The chosen strength.
        held_out_loss: The cross-entropy in nats that each strength had on what was held out.
        gradient: The largest absolute entry of the loss's gradient at the end; 0 at the optimum.
    """

    predictions: NDArray[np.int64]
    l2: float
    held_out_loss: Mapping[float, float]
    gradient: float


@dataclass(frozen=True)
class _Fit:
    weight: Tensor  # (D, C)
    bias: Tensor  # (C,)
    gradient: float

    def logits(self, features: Tensor) -> Tensor:
        return features @ self.weight + self.bias


def linear_probe(
    features: NDArray[np.float32],
    labels: NDArray[np.int64],
    test_features: NDArray[np.float32],
    *,
    num_classes: int,
    seed: int = 0,
) -> LinearProbe:
    """Fit a linear classifier and return its answers.

    Args:
        features: (N, D) float32, to train on.
        labels: (N,) in 0..C-1.
        test_features: (M, D) float32.
        num_classes: C.
        seed: Decides which features are held out while the strength is chosen.

    Raises:
        DataError: No class has two images, so that none can be held out; or features that are not
            finite.
    """
    if not (np.isfinite(features).all() and np.isfinite(test_features).all()):
        raise DataError(
            "features are finite numbers",
            found="NaN or infinity",
            remedy="look at the encoder's training log: its loss has diverged",
        )
    truth = torch.from_numpy(labels)
    is_held_out = torch.from_numpy(_held_out(labels, seed))
    x, held_out = _standardised(features[~is_held_out.numpy()], features[is_held_out.numpy()])
    fit, losses = _start(x.shape[1], num_classes), {}
    for l2 in STRENGTHS:
        fit = _fitted(x, truth[~is_held_out], l2=l2, start=fit)
        losses[l2] = float(F.cross_entropy(fit.logits(held_out), truth[is_held_out]))
    l2 = min(losses, key=losses.__getitem__)
    x, test = _standardised(features, test_features)
    fit = _fitted(x, truth, l2=l2, start=_start(x.shape[1], num_classes))
    return LinearProbe(fit.logits(test).argmax(dim=1).numpy(), l2, losses, fit.gradient)


def _held_out(labels: NDArray[np.int64], seed: int) -> NDArray[np.bool_]:
    """Return (N,) which are held out: a fifth of each class; of one image none, of two one."""
    rng = np.random.default_rng(seed)
    chosen = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = min(max(1, round(_HELD_OUT * len(members))), len(members) - 1)
        chosen[rng.permutation(members)[:count]] = True
    if not chosen.any():
        raise DataError(
            "a linear probe holds some of the training images out to choose its l2",
            found="one image a class",
            remedy="give more images a class",
        )
    return chosen


def _standardised(
    features: NDArray[np.float32], others: NDArray[np.float32]
) -> tuple[Tensor, Tensor]:
    """Return both in float64 with the mean and deviation of the first taken out."""
    x, y = torch.from_numpy(features).double(), torch.from_numpy(others).double()
    mean, std = x.mean(dim=0), x.std(dim=0, correction=0)
    # a dimension that is always the same tells nothing: it becomes 0, whatever it is elsewhere
    is_varied = std > torch.finfo(torch.float32).eps * x.abs().amax(dim=0)
    scale = torch.where(is_varied, 1 / std, 0.0)
    return (x - mean) * scale, (y - mean) * scale


def _start(dim: int, num_classes: int) -> _Fit:
    zeros = torch.zeros(dim + 1, num_classes, dtype=torch.float64)
    return _Fit(zeros[:-1], zeros[-1], 0.0)


def _fitted(x: Tensor, labels: Tensor, *, l2: float, start: _Fit) -> _Fit:
    """Minimise mean cross-entropy + l2/2 |W|^2 by L-BFGS; the bias is free.

    It ends where no entry of the gradient is above 1e-7, or after _MAX_STEPS.
    """
    weight, bias = (t.clone().requires_grad_() for t in (start.weight, start.bias))
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=_MAX_STEPS,
        tolerance_grad=1e-7,
        tolerance_change=0.0,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def loss() -> float:
        optimizer.zero_grad()
        value = F.cross_entropy(x @ weight + bias, labels) + l2 / 2 * weight.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value.item()

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    loss()  # the gradient of where it ended, not of the last place that was tried
    assert weight.grad is not None and bias.grad is not None
    gradient = max(float(weight.grad.abs().max()), float(bias.grad.abs().max()))
    return _Fit(weight.detach(), bias.detach(), gradient)
