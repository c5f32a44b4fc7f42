"""Fold a BatchNorm backwards into the convolution or linear layer that feeds it.

    Given   y = conv(x; W, b)                          W's output channels: o
            z = (y - mean) / sqrt(var + eps) * gamma + beta
    Result  z = conv(x; W * s, (b - mean) * s + beta)  with s[o] = gamma[o] / sqrt(var[o] + eps)

Output channels are W's dimension 0; a transposed convolution of g groups stores W as
(g * C_in/g, C_out/g, ...), so that channel o of group j, o = j * C_out/g + i, is W[j-th block of
rows, i].

The arithmetic is float64, rounded to the weight's type at the end.

Source: Ioffe and Szegedy, "Batch Normalization", arXiv:1502.03167, section 3.1, algorithm 2
(inference is a fixed affine map); Jacob et al., arXiv:1712.05877, section 3.2, equation 14 (that
map folded into the weights).
"""

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from export.graph import arguments, operator, store, tensor
from export.report import Change, PassReport
from export.sites import is_batchnorm, site_names

__all__ = ["fold_batchnorm"]

_CONVOLUTIONS = {"aten.conv1d", "aten.conv2d", "aten.conv3d"}
_TRANSPOSED = {"aten.conv_transpose1d", "aten.conv_transpose2d", "aten.conv_transpose3d"}
_FOLDABLE = _CONVOLUTIONS | _TRANSPOSED | {"aten.linear"}


def fold_batchnorm(module: GraphModule) -> tuple[GraphModule, PassReport]:
    """Fold a traced module's BatchNorms, in place.

    One that cannot be folded exactly is skipped, with the reason.
    """
    changed, skipped = [], {}
    names = {node: name for node, name in site_names(module).items() if is_batchnorm(node)}
    for batchnorm, name in names.items():
        reason = _obstacle(module, batchnorm)
        if reason:
            skipped[name] = reason
            continue
        layer = batchnorm.args[0]
        assert isinstance(layer, Node)
        into = str(arguments(layer)["weight"].target).rpartition(".")[0] or layer.name
        _fold(module, layer, batchnorm)
        changed.append(Change(name, f"folded into {into}", batchnorm.name, layer.name))
    return module, PassReport(tuple(changed), skipped)


def _obstacle(module: GraphModule, batchnorm: Node) -> str | None:
    """Say why a BatchNorm cannot be folded exactly, or None."""
    if operator(batchnorm) != "aten.batch_norm":
        return f"{operator(batchnorm)} is not understood"
    norm = arguments(batchnorm)
    if norm["running_mean"] is None:
        return "it has no running statistics and normalises by those of the batch"
    if norm["training"]:
        return "its training flag is live: it always normalises by the batch's statistics"
    computed = _computed(norm, "weight", "bias", "running_mean", "running_var")
    if computed:
        return f"its {computed} is computed in the graph"

    layer = norm["input"]
    if operator(layer) not in _FOLDABLE:
        follows = operator(layer) or "the input"
        return f"it follows {follows}, not a convolution or linear layer"
    if len(layer.users) > 1:
        return f"the output of {layer.name} has {len(layer.users)} consumers"
    computed = _computed(arguments(layer), "weight", "bias")
    if computed:
        return f"the {computed} of {layer.name} is computed in the graph"
    # Equal exactly where the layer's output channels are dimension 1, the one that BatchNorm
    # normalises.
    if layer.meta["val"].ndim != tensor(module, arguments(layer)["weight"]).ndim:
        return f"it normalises another dimension than the output channels of {layer.name}"
    return None


def _fold(module: GraphModule, layer: Node, batchnorm: Node) -> None:
    """Give the layer the folded weight and bias, and the BatchNorm's users the layer's output."""
    norm, conv = arguments(batchnorm), arguments(layer)
    mean = tensor(module, norm["running_mean"]).double()
    var = tensor(module, norm["running_var"]).double()
    gamma = _stored(module, norm["weight"], default=torch.ones_like(mean))
    beta = _stored(module, norm["bias"], default=torch.zeros_like(mean))
    bias = _stored(module, conv["bias"], default=torch.zeros_like(mean))
    weight = tensor(module, conv["weight"])

    scale = gamma / torch.sqrt(var + norm["eps"])
    groups = conv["groups"] if operator(layer) in _TRANSPOSED else None
    folded_weight = _scale_output_channels(weight.double(), scale, groups=groups).to(weight.dtype)
    folded_bias = ((bias - mean) * scale + beta).to(weight.dtype)

    prefix, _, leaf = str(conv["weight"].target).rpartition(".")
    bias_leaf = "bias" if leaf == "weight" else f"{leaf}_bias"
    new_weight = store(
        module, f"{prefix}.{leaf}", folded_weight, before=layer, instead_of=conv["weight"]
    )
    new_bias = store(
        module, f"{prefix}.{bias_leaf}", folded_bias, before=layer, instead_of=conv["bias"]
    )
    layer.args = (layer.args[0], new_weight, new_bias, *layer.args[3:])
    layer.kwargs = {
        name: value for name, value in layer.kwargs.items() if name not in ("weight", "bias")
    }
    batchnorm.replace_all_uses_with(layer)
    module.graph.erase_node(batchnorm)


def _scale_output_channels(weight: Tensor, scale: Tensor, *, groups: int | None) -> Tensor:
    """Multiply each output channel by its scale; `groups` None: they are dimension 0."""
    kernel = weight.shape[2:]
    if groups is None:
        return weight * scale.view(-1, *[1] * (weight.ndim - 1))
    blocks = weight.view(groups, -1, weight.shape[1], *kernel)  # (g, C_in/g, C_out/g, *kernel)
    return (blocks * scale.view(groups, 1, -1, *[1] * len(kernel))).view_as(weight)


def _stored(module: GraphModule, source: Node | None, *, default: Tensor) -> Tensor:
    return default if source is None else tensor(module, source).double()


def _computed(call: dict[str, Any], *names: str) -> str | None:
    """Return the first of the named arguments that is neither absent nor stored in the module."""
    for name in names:
        if call[name] is not None and call[name].op != "get_attr":
            return name
    return None
