"""Every model by name: our own, torchvision's (`torchvision:NAME`) and timm's (`timm:NAME`)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgereg.errors import RecipeError, check_settings, nearest
from edgereg.models.convnet import ConvNet
from edgereg.models.libraries import from_timm, from_torchvision
from edgereg.models.resnet import SmallResNet
from edgereg.models.vit import SmallViT

__all__ = ["MODELS", "Classifier", "ModelConfig", "build_model", "check_input"]


@dataclass(frozen=True)
class ModelConfig:
    """Which model, and how large.

    Args:
        name: A key of MODELS, `torchvision:NAME` or `timm:NAME`.
        image_size: Height and width of the input, in pixels.
        width: Channels of the first stage. Of resnet each further stage doubles them; of convnet
            the further ones have four times as many. Here and below, 0 or none is the size that
            suits the images.
        blocks: Of resnet: residual blocks in each stage.
        dim: Of vit: width of a token, an even multiple of `heads`.
        depth: Of vit: number of blocks.
        heads: Of vit: attention heads a block.
    """

    name: str = "resnet"
    image_size: int = 32
    width: int = 0
    blocks: tuple[int, ...] = ()
    dim: int = 0
    depth: int = 0
    heads: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise RecipeError(
                "a model has a name",
                found=f"model.name: {self.name}",
                remedy="write `name: resnet`",
            )
        size = self.image_size
        check_settings(
            self,
            "model.",
            {
                "image_size": ("a multiple of 4 from 16 to 1024", size in range(16, 1025, 4)),
                "width": ("not negative", self.width >= 0),
                "blocks": ("a list of numbers, 1 or more", all(n >= 1 for n in self.blocks)),
                "dim": ("not negative, and even", self.dim >= 0 and self.dim % 2 == 0),
                "depth": ("not negative", self.depth >= 0),
                "heads": ("not negative", self.heads >= 0),
            },
        )
        for keys, owners in {
            ("width",): ("resnet", "convnet"),
            ("blocks",): ("resnet",),
            ("dim", "depth", "heads"): ("vit",),
        }.items():
            for key in keys:
                if getattr(self, key) and self.name not in owners:
                    raise RecipeError(
                        f"only {' and '.join(owners)} {'has' if len(owners) == 1 else 'have'} "
                        "this setting",
                        found=f"model.{key} of {self.name}",
                        remedy=f"leave it out, or set model.name to {owners[0]}",
                    )


class Classifier(nn.Module):
    """A backbone that turns an image into a vector, dropout, and a linear head.

    Args:
        backbone: Maps (B, 3, H, W) to (B, feature_dim).
        feature_dim: Width of the vector.
        num_classes: Outputs of the head.
        dropout: Rate before the head (Srivastava et al., JMLR 15, 2014).

    Attributes:
        resting: Names of modules that stay in evaluation mode in training, too: BatchNorms whose
            statistics are frozen.
    """

    def __init__(
        self, backbone: nn.Module, *, feature_dim: int, num_classes: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.feature_dim = feature_dim
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(feature_dim, num_classes)
        self.resting: frozenset[str] = frozenset()

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, num_classes) from images (B, 3, H, W), normalized."""
        logits: Tensor = self.head(self.dropout(self.backbone(images)))
        return logits

    def train(self, mode: bool = True) -> "Classifier":
        """Set training or evaluation mode; what rests stays in the latter."""
        super().train(mode)
        for name in self.resting:
            self.get_submodule(name).eval()
        return self


def _resnet(config: ModelConfig) -> nn.Module:
    small = config.image_size < 96
    return SmallResNet(
        width=config.width or (16 if small else 32),
        blocks=config.blocks or ((1, 1, 1) if small else (1, 1, 1, 1)),
        stem="small" if small else "large",
    )


def _vit(config: ModelConfig) -> nn.Module:
    small = config.image_size < 96
    patch_size = 4 if small else 16
    if config.image_size % patch_size:
        raise RecipeError(
            f"from 96 pixels on, the image size of vit is a multiple of {patch_size}",
            found=f"model.image_size: {config.image_size}",
            remedy=f"{config.image_size // patch_size * patch_size} is the next smaller one",
        )
    dim, heads = config.dim or (64 if small else 192), config.heads or (4 if small else 6)
    if dim % heads:
        raise RecipeError(
            "the heads of vit divide its width",
            found=f"model.dim: {dim}, model.heads: {heads}",
            remedy="change one of them",
        )
    return SmallViT(
        image_size=config.image_size,
        patch_size=patch_size,
        dim=dim,
        depth=config.depth or (4 if small else 8),
        heads=heads,
    )


def _convnet(config: ModelConfig) -> nn.Module:
    width = config.width or 64
    further = 2 if config.image_size < 96 else 4
    return ConvNet(widths=(width, *[4 * width] * further))


MODELS: dict[str, Callable[[ModelConfig], nn.Module]] = {
    "resnet": _resnet,
    "convnet": _convnet,
    "vit": _vit,
}


def build_model(config: ModelConfig, *, num_classes: int, seed: int = 0) -> Classifier:
    """Build a classifier with random weights that depend on the seed alone.

    Dropout is at rest, but where torchvision or timm have set a rate of their own; the rate that
    torchvision has before its head is that of ours.

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
        library, _, name = config.name.partition(":")
        dropout = 0.0
        if library == "torchvision" and name:
            backbone, dropout = from_torchvision(name, config.image_size)
        elif library == "timm" and name:
            backbone = from_timm(name, config.image_size)
        elif config.name in MODELS:
            backbone = MODELS[config.name](config)
        else:
            raise RecipeError(
                "a model must be known",
                found=f"model.name: '{config.name}'",
                remedy=nearest(config.name, [*MODELS, "torchvision:NAME", "timm:NAME"]),
            )
        feature_dim = check_input(backbone, config.image_size, what=f"model.name: {config.name}")
        return Classifier(
            backbone, feature_dim=feature_dim, num_classes=num_classes, dropout=dropout
        )


def check_input(
    backbone: nn.Module,
    size: int,
    *,
    what: str,
    remedy: str = "try model.image_size 224, or model.name resnet, which takes any size",
) -> int:
    """Refuse a backbone that does not turn images of a size into vectors, by trying.

    Args:
        backbone: Left in train mode.
        size: Height and width, in pixels.
        what: Names the backbone in the error.
        remedy: Where it does not take this size.

    Returns:
        The width of a vector.

    Raises:
        RecipeError: It fails on one image of zeros, or answers with something else.
    """
    try:
        with torch.inference_mode():
            features = backbone.eval()(torch.zeros(1, 3, size, size))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise RecipeError(
            "the backbone must take the images that it will be shown",
            found=f"{what} does not take {size}x{size}: {' '.join(str(error).split())[:160]}",
            remedy=remedy,
        ) from error
    backbone.train()
    if not isinstance(features, Tensor) or features.ndim != 2:
        shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise RecipeError(
            "a backbone turns an image into one vector",
            found=f"{what} turns it into {shape}",
            remedy="choose another, torchvision:mobilenet_v3_small for instance",
        )
    return features.shape[1]
