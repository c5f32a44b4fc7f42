"""Backbones of torchvision and timm, by name and without their heads."""

from importlib import import_module
from typing import Any, cast

from torch import nn

from edgereg.errors import RecipeError, nearest

__all__ = ["from_timm", "from_torchvision"]


def from_torchvision(name: str, image_size: int) -> tuple[nn.Module, float]:
    """Take the last linear layer off a torchvision classifier: what feeds it are the features.

    Args:
        name: As torchvision has it, `resnet18` for instance.
        image_size: Height and width, for the transformers, which are built for one.

    Returns:
        The backbone, and the rate of the dropout that stood before the layer, which is taken off
        too.

    Raises:
        RecipeError: There is no such model, none for this size, or none that ends in such a layer.
    """
    from torchvision import models  # 1 s to import, and most runs do without

    known = models.list_models(module=models)
    if name not in known:
        raise RecipeError(
            "torchvision must have the model",
            found=f"model.name: 'torchvision:{name}'",
            remedy=nearest(name, known),
        )
    options = {"image_size": image_size} if name.startswith("vit_") else {}
    options |= (
        {"init_weights": True, "aux_logits": False} if name in ("googlenet", "inception_v3") else {}
    )
    try:
        model = cast(nn.Module, models.get_model(name, weights=None, **options))
    except AssertionError as error:
        raise RecipeError(
            "a torchvision model must be made for images of this size",
            found=f"model.name: 'torchvision:{name}', {image_size}x{image_size}: {error}",
            remedy="choose another size or model",
        ) from error
    layers = [(path, m) for path, m in model.named_modules() if not any(True for _ in m.children())]
    linear = [place for place, (_, m) in enumerate(layers) if isinstance(m, nn.Linear)]
    path, head = layers[linear[-1]] if linear else ("", None)
    if not isinstance(head, nn.Linear) or head.out_features != 1000:
        raise RecipeError(
            "a torchvision classifier must end in a linear layer",
            found=f"model.name: 'torchvision:{name}' does not",
            remedy="choose another, torchvision:mobilenet_v3_small for instance",
        )
    model.set_submodule(path, nn.Identity())
    path, before = layers[linear[-1] - 1]
    if not isinstance(before, nn.Dropout):
        return model, 0.0
    model.set_submodule(path, nn.Identity())
    return model, before.p


def from_timm(name: str, image_size: int) -> nn.Module:
    """Build a timm model without its head.

    Args:
        name: As timm has it, `vit_tiny_patch16_224` for instance.
        image_size: Height and width, for models that take one size only.

    Raises:
        RecipeError: timm is not installed, has no such model, or none for this size.
    """
    try:
        timm: Any = import_module("timm")
    except ModuleNotFoundError as error:
        raise RecipeError(
            "timm's models need timm",
            found=f"model.name: 'timm:{name}', and no timm",
            remedy="pip install 'edgereg[timm]'",
        ) from error
    if not timm.is_model(name):
        raise RecipeError(
            "timm must have the model",
            found=f"model.name: 'timm:{name}'",
            remedy=nearest(name, timm.list_models()),
        )
    # models that take one size only, transformers above all, are built for it
    is_of_one_size = getattr(timm.get_pretrained_cfg(name), "fixed_input_size", False)
    options = {"img_size": image_size} if is_of_one_size else {}
    try:
        model = timm.create_model(name, pretrained=False, num_classes=0, **options)
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise RecipeError(
            "a timm model must be made for images of this size",
            found=f"model.name: 'timm:{name}': {' '.join(str(error).split())[:160]}",
            remedy="choose another size or model",
        ) from error
    return cast(nn.Module, model)
