"""Accuracy on a labelled data set, through the very pre-processing that the device runs."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from deploy.runtime.preprocess import Preprocessing, normalize
from edgereg.data.pixels import Pixels
from edgereg.train.distributed import World

__all__ = ["Evaluation", "evaluate", "predict"]


@dataclass(frozen=True)
class Evaluation:
    """How often the model is right.

    Args:
        top1: Share of images whose largest logit is their label's, in [0, 1].
        loss: Mean cross-entropy in nats, without label smoothing.
        count: Number of images.
        per_class: The share for each class; NaN where it has no image.
    """

    top1: float
    loss: float
    count: int
    per_class: tuple[float, ...]


def evaluate(
    model: nn.Module,
    pixels: Pixels,
    labels: NDArray[np.int64],
    spec: Preprocessing,
    *,
    num_classes: int,
    world: World | None = None,
) -> Evaluation:
    """Return the accuracy of a model in eval mode.

    Args:
        model: Answers with logits (B, C).
        pixels: The images.
        labels: (N,) in 0..C-1.
        spec: How an image becomes the input.
        num_classes: C.
        world: Its processes share the images out; the answer is the same in each.
    """
    world = world or World()
    mine = np.arange(world.rank, len(pixels), world.size)
    logits = predict(model, pixels, spec, indices=mine)
    right = logits.argmax(axis=1) == labels[mine]
    loss = F.cross_entropy(
        torch.from_numpy(logits), torch.from_numpy(labels[mine]), reduction="sum"
    )
    sums = world.total(
        torch.tensor(
            [
                float(loss),
                *np.bincount(labels[mine], minlength=num_classes),
                *np.bincount(labels[mine][right], minlength=num_classes),
            ],
            dtype=torch.float64,
            device=world.device,
        )
    ).cpu()
    counts, hits = sums[1 : 1 + num_classes], sums[1 + num_classes :]
    return Evaluation(
        top1=float(hits.sum() / counts.sum()),
        loss=float(sums[0] / counts.sum()),
        count=int(counts.sum()),
        per_class=tuple((hits / counts).tolist()),  # 0 / 0 is NaN
    )


@torch.inference_mode()
def predict(
    model: nn.Module,
    pixels: Pixels,
    spec: Preprocessing,
    *,
    indices: NDArray[np.int64] | None = None,
    batch_size: int = 256,
) -> NDArray[np.float32]:
    """Return the logits (N, C) of the images, in order; of all, or of some indices."""
    device = next(model.parameters()).device
    indices = np.arange(len(pixels)) if indices is None else indices
    logits = []
    for start in range(0, len(indices), batch_size):
        inputs = normalize(pixels.fitted(indices[start : start + batch_size]), spec)
        logits.append(model(torch.from_numpy(inputs).to(device)).float().cpu().numpy())
    return np.concatenate(logits)
