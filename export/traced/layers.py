"""Scale and shift what a convolution or linear layer puts out, or what it takes in.

    Given   y = conv(x; W, b)                          W's output channels: o, its inputs: i
    Result  y * s + t  = conv(x; W[o] * s[o], b * s + t)                       outputs
            conv(x * s + t) = conv(x; W[o, i] * s[i], b[o] + sum W[o, i] * t[i])    inputs

Output channels are W's dimension 0; a transposed convolution of g groups stores W as
(g * C_in/g, C_out/g, ...), so that channel o of group j, o = j * C_out/g + i, is W[j-th block of
rows, i]. A convolution of g groups stores W as (g * C_out/g, C_in/g, ...) likewise. A shift of the
inputs is exact where the convolution pads nothing: the zeros around the image are not shifted.

The arithmetic is the weights', float64 while the passes run.

Source: Jacob et al., arXiv:1712.05877, section 3.2, equation 14 (the outputs); the inputs are
linear algebra.
"""

from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from export.traced.graph import arguments, is_stored, operator, shape, store, tensor

__all__ = ["is_layer", "scale_inputs", "scale_outputs", "why_not_inputs", "why_not_outputs"]

_CONVOLUTIONS = {"aten.conv1d", "aten.conv2d", "aten.conv3d"}
_TRANSPOSED = {"aten.conv_transpose1d", "aten.conv_transpose2d", "aten.conv_transpose3d"}


def is_layer(node: Node) -> bool:
    """Say whether a node is a convolution, transposed or not, or a linear layer."""
    return operator(node) in _CONVOLUTIONS | _TRANSPOSED | {"aten.linear"}


def why_not_outputs(module: GraphModule, layer: Node, dim: int | None) -> str | None:
    """Say why a layer's outputs cannot be scaled along a dimension, or None."""
    reason = _why_not_stored(layer)
    if reason:
        return reason
    channels = _channel_dim(module, layer, layer)
    if dim is not None and dim != channels:
        return f"it scales another dimension than the output channels of {layer.name}"
    return None


def why_not_inputs(
    module: GraphModule, layer: Node, dim: int | None, *, shifts: bool
) -> str | None:
    """Say why a layer cannot take over a scale, and perhaps a shift, of its input, or None."""
    reason = _why_not_stored(layer)
    if reason:
        return reason
    if dim is not None and dim != _channel_dim(module, layer, arguments(layer)["input"]):
        return f"it scales another dimension than the input channels of {layer.name}"
    if shifts and operator(layer) in _TRANSPOSED:
        return f"{layer.name} is transposed: its border sees fewer of the shifted values"
    if shifts and _pads(layer):
        return f"{layer.name} pads with zeros, which are not shifted"
    return None


def scale_outputs(module: GraphModule, layer: Node, scale: Tensor, shift: Tensor) -> None:
    """Give a layer weights that put out y * scale + shift.

    Args:
        module: The traced module.
        layer: Of which `why_not_outputs` has nothing to say.
        scale: (C_out,), or (1,) for all.
        shift: Likewise.
    """
    given = arguments(layer)
    weight = tensor(module, given["weight"])
    groups = given["groups"] if operator(layer) in _TRANSPOSED else None
    channels = weight.shape[0] if groups is None else weight.shape[1] * groups
    scale, shift = (x.to(weight.dtype).expand(channels) for x in (scale, shift))
    if groups is None:
        scaled = weight * scale.view(-1, *[1] * (weight.ndim - 1))
    else:
        blocks = weight.view(groups, -1, *weight.shape[1:])  # (g, C_in/g, C_out/g, *kernel)
        scaled = blocks * scale.view(groups, 1, -1, *[1] * (weight.ndim - 2))
        scaled = scaled.flatten(0, 1)
    bias = shift if given["bias"] is None else tensor(module, given["bias"]) * scale + shift
    _set(module, layer, scaled, bias if given["bias"] is not None or shift.any() else None)


def scale_inputs(module: GraphModule, layer: Node, scale: Tensor, shift: Tensor) -> None:
    """Give a layer weights that do to x what they did to x * scale + shift.

    Args:
        module: The traced module.
        layer: Of which `why_not_inputs` has nothing to say.
        scale: (C_in,), or (1,) for all.
        shift: Likewise.
    """
    given = arguments(layer)
    weight = tensor(module, given["weight"])
    groups = given.get("groups", 1)
    is_transposed = operator(layer) in _TRANSPOSED
    channels = weight.shape[0] if is_transposed else weight.shape[1] * groups
    scale, shift = (x.to(weight.dtype).expand(channels) for x in (scale, shift))
    ones = [1] * (weight.ndim - 2)
    if is_transposed:
        _set(module, layer, weight * scale.view(-1, 1, *ones), given["bias"])
        return
    blocks = weight.view(groups, -1, *weight.shape[1:])  # (g, C_out/g, C_in/g, *kernel)
    scaled = (blocks * scale.view(groups, 1, -1, *ones)).flatten(0, 1)
    bias: Any = given["bias"]
    if shift.any():
        moved = (blocks * shift.view(groups, 1, -1, *ones)).flatten(2).sum(2).flatten()
        bias = moved if bias is None else tensor(module, bias) + moved
    _set(module, layer, scaled, bias)


def _set(module: GraphModule, layer: Node, weight: Tensor, bias: Tensor | Node | None) -> None:
    """Store a layer's new weight, and its bias if that is new too."""
    given = arguments(layer)
    prefix, _, leaf = str(given["weight"].target).rpartition(".")
    named = (weight, f"{prefix}.{leaf}", given["weight"])
    new_weight = store(module, named[1], weight, before=layer, instead_of=given["weight"])
    if isinstance(bias, Tensor):
        name = f"{prefix}.{'bias' if leaf == 'weight' else f'{leaf}_bias'}"
        bias = store(module, name, bias, before=layer, instead_of=given["bias"])
    layer.args = (layer.args[0], new_weight, bias, *layer.args[3:])
    layer.kwargs = {
        name: value for name, value in layer.kwargs.items() if name not in ("weight", "bias")
    }


def _why_not_stored(layer: Node) -> str | None:
    given = arguments(layer)
    if given["weight"].meta["val"].ndim < 2:
        return f"the weight of {layer.name} is a vector"
    for name in ("weight", "bias"):
        if given[name] is not None and not is_stored(given[name]):
            return f"the {name} of {layer.name} is computed in the graph"
    return None


def _channel_dim(module: GraphModule, layer: Node, value: Node) -> int:
    """Return which dimension of a layer's input or output holds the channels."""
    ndim = len(shape(value))
    if operator(layer) == "aten.linear":
        return ndim - 1
    return ndim - tensor(module, arguments(layer)["weight"]).ndim + 1  # without a batch: 0


def _pads(layer: Node) -> bool:
    padding = arguments(layer).get("padding", 0)
    if isinstance(padding, str):
        kernel = arguments(layer)["weight"].meta["val"].shape[2:]
        return padding == "same" and any(size > 1 for size in kernel)
    return any(padding) if isinstance(padding, (list, tuple)) else bool(padding)
