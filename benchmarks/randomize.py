"""Give a model random parameters and statistics with which its output depends on its input.

At their initial values a proof shows little: norms are the identity, LayerScale hides its branch
behind 1e-6, heads of zeros answer zeros whatever the rest computes. Drawn blindly, a deep network
without norms explodes or dies out, and statistics that are not the data's bury the image under
offsets. So all is drawn, and then fitted to a batch of images: each layer's weight is scaled for an
output of unit size, and each BatchNorm's statistics lie around those of its input.

Source: Mishkin and Matas, "All you need is a good init", arXiv:1511.06422, section 3.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["images", "randomize"]

_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_OFFSETS = ("bias", "beta", "token", "embed", "pos", "mean", "table", "query", "queries", "latent")


def images(count: int, size: int, *, seed: int) -> Tensor:
    """Return images `(count, 3, size, size)` of coarse noise, which survives pooling, and fine."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 4, 4, generator=generator)
    fine = torch.randn(count, 3, size, size, generator=generator)
    return F.interpolate(coarse, size=(size, size), mode="bilinear") + 0.5 * fine


def randomize(model: nn.Module, x: Tensor, *, seed: int = 0) -> None:
    """Randomise all parameters and running statistics, in place; `x` are images to fit them to."""
    generator = torch.Generator().manual_seed(seed)
    layers = {id(m.weight) for m in model.modules() if isinstance(m, _LAYERS)}
    model.eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        _draw(parameter, name, is_weight=id(parameter) in layers, generator=generator)
    for name, buffer in model.named_buffers():
        leaf = name.rpartition(".")[2]
        if leaf == "running_mean":
            buffer.normal_(0, 0.3, generator=generator)
        elif leaf == "running_var":
            buffer.uniform_(0.3, 3.0, generator=generator)
    _calibrate(model, x)


def _draw(parameter: Tensor, name: str, *, is_weight: bool, generator: torch.Generator) -> None:
    """Draw a weight by its fan-in, a gain around one, an offset around zero."""
    is_offset = any(word in name.rpartition(".")[2].lower() for word in _OFFSETS)
    matrix = parameter.squeeze()
    if is_weight or (matrix.ndim > 1 and not is_offset):
        fan_in = parameter[0].numel() if is_weight else matrix[0].numel()
        parameter.normal_(0, max(fan_in, 1) ** -0.5, generator=generator)
    elif is_offset:
        parameter.normal_(0, 0.3, generator=generator)
    else:
        parameter.uniform_(0.5, 1.5, generator=generator)
        # One in eight is negative: a positive scale may pass through a ReLU, no other may.
        sign = torch.rand(parameter.shape, generator=generator).sub_(1 / 8).sign_()
        parameter.mul_(sign)


def _calibrate(model: nn.Module, x: Tensor) -> None:
    """Fit weights and statistics to the values that meet them, layer after layer, in one run."""
    seen: set[int] = set()

    def before(norm: Any, inputs: tuple[Tensor, ...]) -> None:
        if id(norm) in seen or norm.running_mean is None:
            return
        seen.add(id(norm))
        values = inputs[0].transpose(0, 1).flatten(1)  # (C, all else)
        variance = float(values.var(1, correction=0).mean())
        if variance > 1e-6:
            norm.running_mean.mul_(variance**0.5).add_(values.mean(1))
            norm.running_var.mul_(variance)

    def after(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if id(layer) in seen:
            return None
        seen.add(id(layer))
        shift = 0.0 if layer.bias is None else layer.bias
        if layer.bias is not None and not isinstance(layer, nn.Linear):
            shift = layer.bias.view(-1, *[1] * (output.ndim - 2))
        size = float((output - shift).square().mean().sqrt())
        if not 1e-6 < size < 1e6:
            return None
        layer.weight.div_(size)
        scaled: Tensor = layer.forward(*inputs)
        return scaled

    hooks = [
        module.register_forward_hook(after)
        if isinstance(module, _LAYERS)
        else module.register_forward_pre_hook(before)
        for module in model.modules()
        if isinstance(module, (*_LAYERS, _BatchNorm))
    ]
    try:
        with torch.no_grad():
            model(x)
    finally:
        for hook in hooks:
            hook.remove()
