"""Simplify a checkpoint, or a freshly built model, only to look at what was done to it."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deploy.inspection import Inspection
from edgereg.checkpoint import load_checkpoint, load_classifier, load_start
from edgereg.models.zoo import ModelConfig, build_model
from export.passes.simplify import simplify

__all__ = ["inspect_checkpoint", "inspect_model"]

_USUAL_SIZE = 224  # where a library does not say
_CLASSES = 1000  # ImageNet's: the parameters are then those that papers count


def inspect_checkpoint(
    path: Path, *, on_stage: Callable[[str], None] = lambda stage: None
) -> Inspection:
    """Simplify what a checkpoint holds: a classifier, or an encoder's backbone.

    Raises:
        CheckpointError: It is no checkpoint, or damaged.
        DeployError: The model cannot be traced, or its simplification is not proved.
    """
    checkpoint = load_checkpoint(path)
    config = checkpoint.recipe.model
    if checkpoint.kind == "classifier":
        model: nn.Module = load_classifier(path)[0]
    else:
        whole = build_model(config, num_classes=1)
        load_start(path, whole, config, class_names=())
        model = whole.backbone
    detail = f"{checkpoint.kind}, {config.name}"
    return Inspection(
        str(path),
        "checkpoint",
        detail,
        (config.image_size, config.image_size),
        _simplified(model, config.image_size, on_stage=on_stage),
    )


def inspect_model(
    name: str,
    *,
    image_size: int | None = None,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> Inspection:
    """Build a model as a training does, shake it, and simplify it.

    Args:
        name: `torchvision:NAME` or `timm:NAME`.
        image_size: Height and width of the input, or None for the model's usual ones.
        on_stage: Told what comes next.

    Raises:
        RecipeError: There is no such model, or it does not take images of this size.
        DeployError: The model cannot be traced, or its simplification is not proved.
    """
    size = _usual_size(name) if image_size is None else image_size
    model = build_model(ModelConfig(name=name, image_size=size), num_classes=_CLASSES)
    _shake(model)
    simplified = _simplified(model, size, on_stage=on_stage)
    return Inspection(name, "model", f"{_CLASSES} classes", (size, size), simplified)


def _simplified(model: nn.Module, size: int, *, on_stage: Callable[[str], None]) -> dict[str, Any]:
    on_stage(f"simplifying for images of {size}x{size}, and proving it in float64")
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    return simplify(model.eval(), (images,)).report.to_json()


def _shake(model: nn.Module) -> None:
    """Move every parameter and statistic off its first value.

    A fold that forgot the mean, or beta, would be right for the zeros that a model begins with.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            least = 0.2 if parameter.ndim < 2 else 0.0  # gains and biases all begin alike
            spread = parameter.std(correction=0).clamp(min=least)
            parameter.add_(0.3 * spread * torch.randn(parameter.shape, generator=generator))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.add_(0.3 * torch.randn(buffer.shape, generator=generator))
            elif name.endswith("running_var"):
                buffer.mul_(0.5 + torch.rand(buffer.shape, generator=generator))


def _usual_size(name: str) -> int:
    """Return the size for which a library publishes weights, as a multiple of 4.

    Of a name that is not known any size will do: it is refused when the model is built.
    """
    library, _, model = name.partition(":")
    sizes = _torchvision_sizes(model) if library == "torchvision" else _timm_sizes(model)
    fitting = [size for size in sizes if size % 4 == 0]
    # 299 of the Inception nets is no multiple of 4: 300 goes through their convolutions as well
    return next(iter([*fitting, *(size + -size % 4 for size in sizes)]), _USUAL_SIZE)


def _torchvision_sizes(name: str) -> list[int]:
    from torchvision import models

    if name not in models.list_models(module=models):
        return []
    weights = models.get_model_weights(name)
    best_first = [weights.DEFAULT, *weights] if len(weights) else []
    return [weight.transforms().crop_size[0] for weight in best_first]


def _timm_sizes(name: str) -> list[int]:
    try:
        timm: Any = import_module("timm")
    except ModuleNotFoundError:
        return []
    config = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    return [] if config is None else [config.input_size[1]]
