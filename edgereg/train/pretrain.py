"""Self-supervised pre-training of a backbone with PIRL."""

import torch
from torch import Tensor, nn

from edgereg.augment.draws import Draws
from edgereg.errors import RecipeError
from edgereg.models.zoo import Classifier, check_input
from edgereg.recipe import Recipe
from edgereg.ssl.jigsaw import jigsaw_sizes, jigsaw_views
from edgereg.ssl.pirl import Pirl
from edgereg.train.compute import autocast
from edgereg.train.normalize import Normalize
from edgereg.train.step import Loss, Place

__all__ = ["Pretraining"]


class Pretraining(nn.Module):
    """PIRL around a classifier's backbone, and the two views that it compares.

    Args:
        model: Its backbone must take images of any size: patches are smaller than images. Its head
            is not touched.
        size: Images in the data set.
        recipe: `augment` makes the first view, and its colour steps recolour each patch.

    Raises:
        RecipeError: The backbone takes one size only, or a setting needs labels.
    """

    def __init__(self, model: Classifier, *, size: int, recipe: Recipe) -> None:
        super().__init__()
        for key, is_set in {
            "sam.rho": recipe.sam.rho > 0,  # a second pass would move the memory bank again
            "batchnorm.recompute": recipe.batchnorm.recompute > 0,
            "stop.patience": recipe.stop.patience > 0,
        }.items():
            if is_set:
                raise RecipeError(
                    "this setting is for training with labels",
                    found=f"{key} in pre-training",
                    remedy="leave it out",
                )
        patch = jigsaw_sizes(recipe.model.image_size).patch
        check_input(model.backbone, patch, what=f"PIRL's patches: {recipe.model.name}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)  # the heads' first weights and the bank's first rows
            self.method = Pirl(
                model.backbone, feature_dim=model.feature_dim, size=size, config=recipe.pirl
            )
        self.has_unused_parameters = recipe.pirl.patch_weight in (0, 1)  # a head without a loss
        self._recipe, self._chain = recipe, recipe.chain()
        self._recolour = self._chain.colour_steps()
        self._normalize = Normalize(recipe.preprocessing())

    def forward(self, images: Tensor, indices: Tensor, place: Place) -> Loss:
        """Return PIRL's loss of two views of each image.

        Args:
            images: (B, 3, H, W) uint8.
            indices: (B,) int64, of the images in the data set.
            place: Where in the run.
        """
        seed, epoch = self._recipe.seed, place.epoch
        # two views, two independent sets of draws
        first = self._chain(images, Draws(seed, 2 * epoch, indices))
        pixels = images.float() / 255
        patches, _ = jigsaw_views(pixels, Draws(seed, 2 * epoch + 1, indices), self._recolour)
        with autocast(self._recipe.compute, images.device):
            value = self.method(self._normalize(first), self._normalize(patches), indices)
        return Loss(value)
