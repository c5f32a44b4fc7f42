"""Supervised training: cross-entropy on soft targets, with augmentation and mixing."""

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from edgereg.augment.draws import Draws
from edgereg.augment.mixing import mix
from edgereg.data.pixels import Pixels
from edgereg.errors import RecipeError
from edgereg.models.zoo import Classifier
from edgereg.progress import Report
from edgereg.recipe import Recipe
from edgereg.train.loop import Epoch, run_epochs
from edgereg.train.normalize import Normalize

__all__ = ["train_classifier"]


def train_classifier(
    model: Classifier,
    pixels: Pixels,
    labels: NDArray[np.int64],
    recipe: Recipe,
    *,
    report: Report,
) -> tuple[Epoch, ...]:
    """Train a classifier in place, and leave it in eval mode.

    Args:
        model: On the device to train on.
        pixels: The images.
        labels: (N,) in 0..C-1.
        recipe: All settings.
        report: Called after each step.

    Raises:
        RecipeError: A batch would be a single image, of which BatchNorm can take no statistics.
        TrainingError: The loss is no longer a number.
    """
    if len(pixels) < 2:
        raise RecipeError(
            "training needs at least two images", found=f"{len(pixels)}", remedy="add images"
        )
    device = next(model.parameters()).device
    classes = model.head.out_features
    chain, normalize = recipe.chain(), Normalize(recipe.preprocessing()).to(device)
    targets_of = torch.from_numpy(labels)

    def loss_of(batch: NDArray[np.int64], epoch: int, step: int) -> Tensor:
        indices = torch.from_numpy(batch).to(device)
        images = chain(pixels.batch(batch).to(device), Draws(recipe.seed, epoch, indices))
        targets = F.one_hot(targets_of[batch], classes).to(device, torch.float32)
        images, targets = mix(normalize(images), targets, recipe.mix, seed=recipe.seed, step=step)
        logits = model(images.contiguous(memory_format=torch.channels_last))
        return F.cross_entropy(logits, targets, label_smoothing=recipe.label_smoothing)

    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed + 1)  # dropout's masks, apart from the stream of the weights
        history = run_epochs(model, loss_of, recipe, size=len(pixels), report=report)
    model.eval().to(memory_format=torch.contiguous_format)
    return history
