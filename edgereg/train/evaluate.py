"""Accuracy on a labelled data set, through the very pre-processing that the device runs."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from deploy.runtime.preprocess import Preprocessing, normalize
from edgereg.data.pixels import Pixels

__all__ = ["Evaluation", "evaluate", "predict"]


@dataclass(frozen=True)
class Evaluation:
    """How often the model is right.

    Args:
        top1: Share of images whose largest logit is their label's, in [0, 1].
        count: Number of images.
        per_class: The same for each class; NaN where it has no image.
    """

    top1: float
    count: int
    per_class: tuple[float, ...]


def evaluate(
    model: nn.Module,
    pixels: Pixels,
    labels: NDArray[np.int64],
    spec: Preprocessing,
    *,
    num_classes: int,
) -> Evaluation:
    """Return the accuracy of a model in eval mode."""
    right = predict(model, pixels, spec).argmax(axis=1) == labels
    per_class = tuple(
        float(right[labels == label].mean()) if (labels == label).any() else float("nan")
        for label in range(num_classes)
    )
    return Evaluation(top1=float(right.mean()), count=len(right), per_class=per_class)


@torch.inference_mode()
def predict(
    model: nn.Module, pixels: Pixels, spec: Preprocessing, *, batch_size: int = 256
) -> NDArray[np.float32]:
    """Return the logits (N, C) of every image, in order."""
    device = next(model.parameters()).device
    logits = []
    for start in range(0, len(pixels), batch_size):
        indices = np.arange(start, min(start + batch_size, len(pixels)))
        inputs = normalize(pixels.fitted(indices), spec)
        logits.append(model(torch.from_numpy(inputs).to(device)).cpu().numpy())
    return np.concatenate(logits)
