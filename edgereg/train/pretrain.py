"""Self-supervised pre-training of a backbone: one objective around every method."""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgereg.augment.draws import Draws
from edgereg.checkpoint import load_backbone
from edgereg.errors import RecipeError
from edgereg.models.zoo import Classifier, check_input
from edgereg.recipe import Recipe
from edgereg.regularize.batchnorm import batchnorms
from edgereg.regularize.sync_batchnorm import synchronise
from edgereg.ssl.colorization import Colorization
from edgereg.ssl.distill import Distill
from edgereg.ssl.jigsaw import jigsaw_sizes
from edgereg.ssl.lejepa import LeJepa
from edgereg.ssl.method import MAX_VIEWS, Method, Setup
from edgereg.ssl.pirl import Pirl
from edgereg.ssl.simclr import SimClr
from edgereg.ssl.vicreg import VicReg
from edgereg.train.compute import autocast
from edgereg.train.normalize import Normalize
from edgereg.train.step import Loss, Place

__all__ = ["METHODS", "Pretraining", "check_pretraining"]


class Pretraining(nn.Module):
    """A method around a classifier's backbone; the classifier's head is not touched.

    Args:
        model: Whose backbone is trained.
        sample: (M, 3, H, W) uint8, some images of the data set, always the same ones.
        size: Images in the data set.
        recipe: `method` and its constants; `augment` makes the views.

    Raises:
        RecipeError: The backbone, the data or a setting does not go with the method.
    """

    def __init__(self, model: Classifier, *, sample: Tensor, size: int, recipe: Recipe) -> None:
        super().__init__()
        self._recipe = recipe
        self._normalize = Normalize(recipe.preprocessing())
        setup = Setup(
            backbone=model.backbone,
            feature_dim=model.feature_dim,
            image_size=recipe.model.image_size,
            size=size,
            sample=sample,
            chain=recipe.chain(),
            normalize=self._normalize,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)  # the heads' first weights
            self.method = METHODS[recipe.method](setup, recipe)
        if recipe.batchnorm.sync:
            for name, norm in batchnorms(self.method):  # the heads', too
                synchronise(norm, what=f"batchnorm.sync: {name}")
        self.has_unused_parameters = self.method.has_unused_parameters

    def forward(self, images: Tensor, indices: Tensor, place: Place) -> Loss:
        """Return the method's loss of a batch.

        Args:
            images: (B, 3, H, W) uint8.
            indices: (B,) int64, of the images in the data set.
            place: Where in the run.
        """
        seed = self._recipe.seed

        def draws(view: int) -> Draws:
            return Draws(seed, MAX_VIEWS * place.epoch + view, indices)

        with torch.no_grad():
            views = self.method.views(images, draws)
        with autocast(self._recipe.compute, images.device):
            return Loss(self.method(views, indices))

    def end_step(self, *, taken: bool) -> None:
        """Keep or take back what the step left in the method's memory; see Method."""
        self.method.end_step(taken=taken)


def check_pretraining(recipe: Recipe, *, size: int) -> None:
    """Refuse what pre-training would not heed, and a method that cannot be, before the first step.

    Args:
        recipe: All settings.
        size: Images in the data set.

    Raises:
        RecipeError: So it is.
    """
    for key, is_set in {
        "label_smoothing": recipe.label_smoothing > 0,
        "mix.mixup": recipe.mix.mixup > 0,
        "mix.cutmix": recipe.mix.cutmix > 0,
        "progressive.smallest": recipe.progressive.smallest > 0,
        "frozen_stages": recipe.frozen_stages > 0,
        "batchnorm.frozen": recipe.batchnorm.frozen,
        "batchnorm.recompute": recipe.batchnorm.recompute > 0,
        "sam.rho": recipe.sam.rho > 0,  # a second pass would move memory banks and queues again
        "stop.patience": recipe.stop.patience > 0,
        "optim.backbone_lr": recipe.optim.backbone_lr != 1,
        "optim.layer_decay": recipe.optim.layer_decay != 1,
        "compute.compile": recipe.compute.compile,
    }.items():
        if is_set:
            raise RecipeError(
                "this setting is for training with labels",
                found=f"{key} in pre-training",
                remedy="leave it out",
            )
    parts = recipe.compute.accumulate
    if parts > 1 and min(size, recipe.batch_size) < 2 * parts:
        raise RecipeError(
            "pre-training compares images, and so needs two in each part of a batch",
            found=f"batch_size: {recipe.batch_size}, compute.accumulate: {parts}, {size} images",
            remedy="lower compute.accumulate, raise batch_size, or add images",
        )
    if recipe.method == "distill" and not recipe.distill.teacher:
        raise RecipeError(
            "distillation has a teacher",
            found="no distill.teacher",
            remedy="give a checkpoint: --distill.teacher CHECKPOINT",
        )


def _pirl(setup: Setup, recipe: Recipe) -> Method:
    if recipe.pirl.transform != "rotation":
        patch = jigsaw_sizes(setup.image_size).patch
        try:
            check_input(setup.backbone, patch, what=recipe.model.name)
        except RecipeError as error:
            raise RecipeError(
                "PIRL's patches are smaller than images, and the backbone must take them",
                found=error.found,
                remedy="set pirl.transform to rotation, which cuts no patches, or model.name to "
                "resnet, which takes any size",
            ) from error
    return Pirl(setup, recipe.pirl)


def _distill(setup: Setup, recipe: Recipe) -> Method:
    backbone, teacher_dim, checkpoint = load_backbone(Path(recipe.distill.teacher))
    size = checkpoint.recipe.model.image_size
    teacher = nn.Sequential(Normalize(checkpoint.recipe.preprocessing()), backbone).eval()
    if recipe.compute.channels_last:
        teacher.to(memory_format=torch.channels_last)

    def embed(views: Tensor) -> Tensor:
        if views.shape[2] != size:
            views = F.interpolate(views, (size, size), mode="bilinear", antialias=True)
        with autocast(recipe.compute, views.device):
            embedded: Tensor = teacher.to(views.device)(views)
        return embedded

    return Distill(setup, recipe.distill, teacher=embed, teacher_dim=teacher_dim)


METHODS: dict[str, Callable[[Setup, Recipe], Method]] = {
    "pirl": _pirl,
    "colorization": lambda setup, recipe: Colorization(setup, recipe.colorization),
    "simclr": lambda setup, recipe: SimClr(setup, recipe.simclr),
    "vicreg": lambda setup, recipe: VicReg(setup, recipe.vicreg),
    "lejepa": lambda setup, recipe: LeJepa(setup, recipe.lejepa),
    "distill": _distill,
}
