"""The last feature map of a backbone that answers with one vector, whatever its architecture.

Before a backbone pools, some module's output still has a place for each part of the image: a map
(B, C, h, w) or (B, h, w, C), or tokens (B, T, C), of which some at the start, such as a class
token, may have no place. Two images are sent through, and the last such output is remembered by
its module's name. What it looks for is square, as the images are; so attention's weights of a
pooled query, for instance, are no map.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from edgereg.errors import RecipeError

__all__ = ["FeatureMap", "evaluating", "find_feature_map"]

_MOST_PREFIXES = 8  # a class token and some registers


@dataclass(frozen=True)
class FeatureMap:
    """Where a backbone's last feature map is; holds nothing of the backbone.

    Args:
        path: Name of the module whose output it is.
        layout: "channels_first" (B, C, h, w), "channels_last" (B, h, w, C) or "tokens" (B, T, C).
        prefixes: Tokens at the start that have no place.
        channels: C.
        side: h and w, of the images that it was found with.
        unused: Names of the parameters that it does not depend on: those of what comes after.
    """

    path: str
    layout: Literal["channels_first", "channels_last", "tokens"]
    prefixes: int
    channels: int
    side: int
    unused: tuple[str, ...]

    def of(self, backbone: nn.Module, images: Tensor) -> Tensor:
        """Return the map (B, C, h, w) of images (B, 3, H, W), normalized.

        The whole backbone runs, under a hook that is gone afterwards.
        """
        seen: list[Tensor] = []
        handle = backbone.get_submodule(self.path).register_forward_hook(
            lambda module, arguments, output: seen.append(output)
        )
        try:
            backbone(images)
        finally:
            handle.remove()
        output = seen[-1]
        if self.layout == "channels_first":
            return output
        if self.layout == "channels_last":
            return output.permute(0, 3, 1, 2)
        places = output[:, self.prefixes :].transpose(1, 2)
        return torch.unflatten(places, 2, (math.isqrt(places.shape[2]), -1))


def find_feature_map(backbone: nn.Module, image_size: int, *, what: str) -> FeatureMap:
    """Find a backbone's last feature map of more than one pixel, by trying.

    Args:
        backbone: Maps (B, 3, H, W) to (B, D); its modes and statistics are left as they are.
        image_size: Height and width of the images, in pixels.
        what: Names the backbone in the error.

    Raises:
        RecipeError: There is none, or more than heads stands behind it.
    """
    parameters = {name: p for name, p in backbone.named_parameters() if p.requires_grad}
    device = next((p.device for p in parameters.values()), torch.device("cpu"))
    images = torch.zeros(2, 3, image_size, image_size, device=device)
    with evaluating(backbone), torch.enable_grad():
        outputs = _outputs(backbone, images)
        maps = [(path, y, kind) for path, y in outputs if (kind := _kind_of(y, backbone))]
        if not maps:
            raise RecipeError(
                "colorization needs a feature map of more than one pixel",
                found=f"none in {what} at {image_size}x{image_size}",
                remedy="raise model.image_size, or choose another model, resnet for instance",
            )
        path, last, (layout, prefixes, channels, side) = maps[-1]
        gradients = torch.autograd.grad(last.sum(), list(parameters.values()), allow_unused=True)
    unused = tuple(name for name, g in zip(parameters, gradients, strict=True) if g is None)
    _check_rest(backbone, {name for name, y in outputs if y.ndim > 2}, set(unused), what, path)
    return FeatureMap(path, layout, prefixes, channels, side, unused)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module and all within into evaluation mode for a while."""
    modes = [(inner, inner.training) for inner in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for inner, mode in modes:
            inner.training = mode


def _outputs(backbone: nn.Module, images: Tensor) -> list[tuple[str, Tensor]]:
    """Return every module's output that is a tensor, in the order in which they are done."""
    outputs: list[tuple[str, Tensor]] = []

    def hook_of(path: str) -> Any:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                outputs.append((path, output))

        return hook

    handles = [m.register_forward_hook(hook_of(path)) for path, m in backbone.named_modules()]
    try:
        backbone(images)
    finally:
        for handle in handles:
            handle.remove()
    return outputs


def _kind_of(
    output: Tensor, backbone: nn.Module
) -> tuple[Literal["channels_first", "channels_last", "tokens"], int, int, int] | None:
    """Return layout, prefixes, channels and side of a feature map, None if it is none."""
    if output.ndim == 4:
        _, first, second, third = output.shape
        if second == third > 1:
            return "channels_first", 0, first, second
        if first == second > 1:
            return "channels_last", 0, third, first
    if output.ndim == 3 and output.shape[2] > 1:
        told = getattr(backbone, "num_prefix_tokens", 0)  # timm's name
        for prefixes in sorted(range(_MOST_PREFIXES + 1), key=lambda count: count != told):
            places = output.shape[1] - prefixes
            if places > 1 and (side := math.isqrt(places)) ** 2 == places:
                return "tokens", prefixes, output.shape[2], side
    return None


def _check_rest(
    backbone: nn.Module, on_maps: set[str], unused: set[str], what: str, path: str
) -> None:
    """Refuse a map behind which the network still looks at places, as on images that are too small.

    At 32x32 a resnet18's last stage works on one pixel; it would stay as it was. Linear layers and
    1x1 convolutions behind the pooling are heads, and have no part in this, however large.
    """
    whole = idle = 0
    has_filters = False
    for name, parameter in backbone.named_parameters():
        owner = name.rpartition(".")[0]
        module = backbone.get_submodule(owner)
        is_filter = isinstance(module, nn.Conv2d) and max(module.kernel_size) > 1
        if owner in on_maps and (is_filter or not isinstance(module, nn.Conv2d)):
            whole += parameter.numel()
            idle += parameter.numel() if name in unused else 0
            has_filters |= is_filter and name in unused
    if has_filters or 2 * idle > whole:
        raise RecipeError(
            "colorization trains what stands before the last map of more than one pixel, and "
            "only heads may stand behind it",
            found=f"in {what} it is {path}, and {len(unused)} weights and biases stand behind it",
            remedy="raise model.image_size, or choose another model, resnet for instance",
        )
