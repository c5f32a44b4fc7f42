"""Every model by name: our own, and torchvision's classifiers as `torchvision:NAME`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from edgereg.errors import RecipeError, nearest
from edgereg.models.resnet import SmallResNet
from edgereg.models.vit import SmallViT

__all__ = ["MODELS", "Classifier", "ModelConfig", "build_model", "check_input"]


@dataclass(frozen=True)
class ModelConfig:
    """Which model, and how large.

    Args:
        name: A key of MODELS, or `torchvision:NAME`.
        image_size: Height and width of the input, in pixels.
        dropout: Rate before the head, and for our transformer also in its blocks, in [0, 1). What
            a torchvision model drops inside its backbone stays as torchvision has it.
    """

    name: str = "resnet"
    image_size: int = 32
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise RecipeError(
                "a model has a name",
                found=f"model.name: {self.name}",
                remedy="write `name: resnet`",
            )
        if not 0 <= self.dropout < 1:
            raise RecipeError(
                "a dropout rate lies in [0, 1)",
                found=f"model.dropout: {self.dropout}",
                remedy="0 is none; 0.1 to 0.5 is usual",
            )
        if not 16 <= self.image_size <= 1024 or self.image_size % 8:
            raise RecipeError(
                "the image size is a multiple of 8 from 16 to 1024",
                found=f"model.image_size: {self.image_size}",
                remedy="32 and 224 are usual",
            )


class Classifier(nn.Module):
    """A backbone that turns an image into a vector, dropout, and a linear head.

    Args:
        backbone: Maps (B, 3, H, W) to (B, feature_dim).
        feature_dim: Width of the vector.
        num_classes: Outputs of the head.
        dropout: Rate before the head (Srivastava et al., JMLR 15, 2014).
    """

    def __init__(
        self, backbone: nn.Module, *, feature_dim: int, num_classes: int, dropout: float
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.feature_dim = feature_dim
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(feature_dim, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, num_classes) from images (B, 3, H, W), normalized."""
        logits: Tensor = self.head(self.dropout(self.backbone(images)))
        return logits


def _resnet(config: ModelConfig) -> tuple[nn.Module, int]:
    if config.image_size < 96:
        backbone = SmallResNet(width=16, blocks=(1, 1, 1), stem="small")
    else:
        backbone = SmallResNet(width=32, blocks=(1, 1, 1, 1), stem="large")
    return backbone, backbone.feature_dim


def _vit(config: ModelConfig) -> tuple[nn.Module, int]:
    small = config.image_size < 96
    patch_size = 4 if small else 16
    if config.image_size % patch_size:
        raise RecipeError(
            f"from 96 pixels on, the image size of vit is a multiple of {patch_size}",
            found=f"model.image_size: {config.image_size}",
            remedy=f"{config.image_size // patch_size * patch_size} is the next smaller one",
        )
    backbone = SmallViT(
        image_size=config.image_size,
        patch_size=patch_size,
        dim=64 if small else 192,
        depth=4 if small else 8,
        heads=4 if small else 6,
        dropout=config.dropout,
    )
    return backbone, backbone.feature_dim


MODELS: dict[str, Callable[[ModelConfig], tuple[nn.Module, int]]] = {"resnet": _resnet, "vit": _vit}


def build_model(config: ModelConfig, *, num_classes: int, seed: int = 0) -> Classifier:
    """Build a classifier with random weights that depend on the seed alone.

    Args:
        config: Which model.
        num_classes: At least 1.
        seed: Of the initial weights; torch's global generator is left as it was.

    Raises:
        RecipeError: There is no such model, it cannot be fitted with another head, or it does not
            take images of this size.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        prefix, _, rest = config.name.partition(":")
        if prefix == "torchvision" and rest:
            backbone, feature_dim = _torchvision(rest, config)
        elif config.name in MODELS:
            backbone, feature_dim = MODELS[config.name](config)
        else:
            raise RecipeError(
                "a model must be known",
                found=f"model.name: '{config.name}'",
                remedy=nearest(config.name, [*MODELS, "torchvision:NAME"]),
            )
        check_input(backbone, config.image_size, what=f"model.name: {config.name}")
        return Classifier(
            backbone, feature_dim=feature_dim, num_classes=num_classes, dropout=config.dropout
        )


def check_input(backbone: nn.Module, size: int, *, what: str) -> None:
    """Refuse a backbone that does not take images of a size, by trying.

    Args:
        backbone: Left in train mode.
        size: Height and width, in pixels.
        what: Names the backbone in the error.

    Raises:
        RecipeError: It fails on one image of zeros.
    """
    try:
        with torch.inference_mode():
            backbone.eval()(torch.zeros(1, 3, size, size))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise RecipeError(
            "the backbone must take the images that it will be shown",
            found=f"{what} does not take {size}x{size}: {' '.join(str(error).split())[:160]}",
            remedy="try model.image_size 224, or model.name resnet, which takes any size",
        ) from error
    backbone.train()


def _torchvision(name: str, config: ModelConfig) -> tuple[nn.Module, int]:
    """Take the last linear layer off a torchvision classifier: what feeds it are the features."""
    from torchvision import models  # 1 s to import, and most runs do without

    known = models.list_models(module=models)
    if name not in known:
        raise RecipeError(
            "torchvision must have the model",
            found=f"model.name: 'torchvision:{name}'",
            remedy=nearest(name, known),
        )
    options = {"image_size": config.image_size} if name.startswith("vit_") else {}
    options |= (
        {"init_weights": True, "aux_logits": False} if name in ("googlenet", "inception_v3") else {}
    )
    model = cast(nn.Module, models.get_model(name, weights=None, **options))
    linear = [(path, m) for path, m in model.named_modules() if isinstance(m, nn.Linear)]
    if not linear or linear[-1][1].out_features != 1000:
        raise RecipeError(
            "a torchvision classifier must end in a linear layer",
            found=f"model.name: 'torchvision:{name}' does not",
            remedy="choose another, torchvision:mobilenet_v3_small for instance",
        )
    path, head = linear[-1]
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, nn.Identity())
    return model, head.in_features
