"""Supervised training: cross-entropy on soft targets, with augmentation and mixing."""

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from edgereg.augment.draws import Draws
from edgereg.augment.mixing import mix
from edgereg.augment.progressive import window, window_size
from edgereg.models.zoo import Classifier
from edgereg.recipe import Recipe
from edgereg.train.compute import autocast
from edgereg.train.normalize import Normalize
from edgereg.train.step import Loss, Place

__all__ = ["Supervised"]


class Supervised(nn.Module):
    """A classifier, and what it is asked in training.

    Args:
        model: The classifier.
        labels: (N,) int64 in 0..C-1, of the whole data set.
        recipe: Augmentation, mixing, label smoothing, precision and seed.
    """

    labels: Tensor

    def __init__(self, model: Classifier, labels: NDArray[np.int64], recipe: Recipe) -> None:
        super().__init__()
        self.model = model
        # no part of a state: it comes with the data
        self.register_buffer("labels", torch.from_numpy(labels), persistent=False)
        self._recipe, self._chain = recipe, recipe.chain()
        self._normalize = Normalize(recipe.preprocessing())

    def augmented(self, images: Tensor, indices: Tensor, *, epoch: int) -> Tensor:
        """Return what the model is shown, before mixing: (B, 3, h, w) float32, normalized.

        h and w are H and W but for progressive learning.
        """
        recipe = self._recipe
        draws = Draws(recipe.seed, epoch, indices)
        size = window_size(
            recipe.progressive, epoch, epochs=recipe.epochs, whole=recipe.model.image_size
        )
        shown = window(self._chain(images, draws), size, draws)
        return self._laid_out(self._normalize(shown))

    def forward(self, images: Tensor, indices: Tensor, place: Place) -> Loss:
        """Return the mean cross-entropy, and how many answers hit the larger share of their target.

        Args:
            images: (B, 3, H, W) uint8.
            indices: (B,) int64, of the images in the data set.
            place: Where in the run.
        """
        recipe = self._recipe
        shown = self.augmented(images, indices, epoch=place.epoch)
        targets = F.one_hot(self.labels[indices], self.model.head.out_features).float()
        shown, targets = mix(
            shown, targets, recipe.mix, seed=recipe.seed, step=place.step, part=place.part
        )
        with autocast(recipe.compute, shown.device):
            logits = self.model(self._laid_out(shown))
        logits = logits.float()
        loss = F.cross_entropy(logits, targets, label_smoothing=recipe.label_smoothing)
        correct = (logits.detach().argmax(dim=1) == targets.argmax(dim=1)).sum()
        return Loss(loss, correct)

    def _laid_out(self, images: Tensor) -> Tensor:
        is_nhwc = self._recipe.compute.channels_last
        return images.contiguous(
            memory_format=torch.channels_last if is_nhwc else torch.contiguous_format
        )
