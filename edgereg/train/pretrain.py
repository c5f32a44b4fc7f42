"""Self-supervised pre-training of a backbone with PIRL."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgereg.augment.draws import Draws
from edgereg.data.pixels import Pixels
from edgereg.errors import RecipeError
from edgereg.models.zoo import Classifier, check_input
from edgereg.progress import Report
from edgereg.recipe import Recipe
from edgereg.ssl.jigsaw import jigsaw_sizes, jigsaw_views
from edgereg.ssl.pirl import Pirl
from edgereg.train.loop import Epoch, run_epochs
from edgereg.train.normalize import Normalize

__all__ = ["pretrain_backbone"]


def pretrain_backbone(
    model: Classifier, pixels: Pixels, recipe: Recipe, *, report: Report
) -> tuple[Epoch, ...]:
    """Train a classifier's backbone without labels, in place; the head is not touched.

    Args:
        model: Its backbone must take images of any size: patches are smaller than images.
        pixels: The images.
        recipe: All settings; `augment` makes the first view, and its colour steps recolour each
            patch.
        report: Called after each step.

    Raises:
        RecipeError: The backbone takes one size only, or there are fewer than two images.
        TrainingError: The loss is no longer a number.
    """
    if len(pixels) < 2:
        raise RecipeError(
            "PIRL needs at least two images", found=f"{len(pixels)}", remedy="add images"
        )
    device = next(model.parameters()).device
    patch = jigsaw_sizes(recipe.model.image_size).patch
    check_input(model.backbone.cpu(), patch, what=f"PIRL's patches: {recipe.model.name}")
    model.to(device)
    chain, normalize = recipe.chain(), Normalize(recipe.preprocessing()).to(device)
    recolour = chain.colour_steps()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)  # the heads' first weights
        method = Pirl(
            model.backbone,
            feature_dim=model.feature_dim,
            size=len(pixels),
            config=recipe.pirl,
            seed=recipe.seed,
        ).to(device)

    def loss_of(batch: NDArray[np.int64], epoch: int, step: int) -> Tensor:
        indices = torch.from_numpy(batch).to(device)
        images = pixels.batch(batch).to(device)
        # two views, two independent sets of draws
        first = chain(images, Draws(recipe.seed, 2 * epoch, indices))
        patches, _ = jigsaw_views(images, Draws(recipe.seed, 2 * epoch + 1, indices), recolour)
        loss: Tensor = method(normalize(first), normalize(patches), indices)
        return loss

    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed + 1)  # dropout's masks
        history = run_epochs(method, loss_of, recipe, size=len(pixels), report=report)
    model.eval().to(memory_format=torch.contiguous_format)
    return history
