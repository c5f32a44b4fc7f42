"""Read a graph's convolutions, linear layers and average pools as kernels, and write them back."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch.fx import GraphModule, Node

from export.traced.graph import arguments, is_stored, operator, shape, store, tensor
from export.traced.kernels import Kernel

__all__ = ["LAYERS", "read", "write"]

LAYERS = {
    "aten.linear": torch.ops.aten.linear.default,
    "aten.conv1d": torch.ops.aten.conv1d.default,
    "aten.conv2d": torch.ops.aten.conv2d.default,
    "aten.conv3d": torch.ops.aten.conv3d.default,
}
_POOLS = {"aten.avg_pool1d", "aten.avg_pool2d", "aten.avg_pool3d"}


def read(module: GraphModule, node: Node) -> Kernel | None:
    """Return what a layer of stored weights, or an average pool, computes; None for all else."""
    if operator(node) in _POOLS:
        return _read_pool(node)
    if operator(node) not in LAYERS:
        return None
    given = arguments(node)
    stored = [given[name] for name in ("weight", "bias") if given[name] is not None]
    if not all(is_stored(x) for x in stored):
        return None
    weight = tensor(module, given["weight"])
    bias = None if given["bias"] is None else tensor(module, given["bias"])
    if operator(node) == "aten.linear":
        return Kernel(weight, bias, (), (), (), 1, (), ()) if weight.ndim == 2 else None
    sizes = _sizes(given["input"], node, weight.ndim - 2)
    if sizes is None:
        return None
    stride, dilation = (_each(given[name], len(sizes[0])) for name in ("stride", "dilation"))
    padding = given["padding"]
    if isinstance(padding, str):  # "same": of an odd total, the smaller half comes first
        rows = zip(dilation, weight.shape[2:], strict=True)
        total = [step * (taps - 1) if padding == "same" else 0 for step, taps in rows]
        first = tuple(-(both // 2) for both in total)
    else:
        first = tuple(-before for before in _each(padding, len(sizes[0])))
    return Kernel(weight, bias, stride, first, dilation, given["groups"], *sizes)


def write(module: GraphModule, node: Node, source: Node, kernel: Kernel) -> None:
    """Let a layer compute a kernel of a source; its weight takes the old one's name."""
    given = arguments(node)
    prefix, _, leaf = str(given["weight"].target).rpartition(".")
    old_weight, old_bias = given["weight"], given["bias"]
    weight = store(module, f"{prefix}.{leaf}", kernel.weight, before=node, instead_of=old_weight)
    bias = None
    if kernel.bias is not None:
        name = f"{prefix}.{'bias' if leaf == 'weight' else f'{leaf}_bias'}"
        bias = store(module, name, kernel.bias, before=node, instead_of=old_bias)
    node.kwargs = {}
    if operator(node) == "aten.linear":
        node.args = (source, weight, bias)
        return
    node.target = LAYERS[operator(node)]  # "same" is another overload
    padding = [-first for first in kernel.first]
    geometry = (list(kernel.stride), padding, list(kernel.dilation), kernel.groups)
    node.args = (source, weight, bias, *geometry)


def _read_pool(node: Node) -> Kernel | None:
    given = arguments(node)
    dims = int(operator(node)[-2])
    source = given["self"]
    sizes = _sizes(source, node, dims)
    if sizes is None:
        return None
    taps = _each(given["kernel_size"], dims)
    stride = _each(given["stride"], dims) if given["stride"] else taps
    padding = _each(given["padding"], dims)
    rows = zip(*sizes, taps, stride, padding, strict=True)
    if any((i + 2 * p - k) // s + 1 != o for i, o, k, s, p in rows):
        return None  # "ceil_mode" put a place more, whose mean is of fewer values
    if any(padding) and not given["count_include_pad"]:
        return None  # at the border, too
    channels = shape(node)[1]
    divisor = given.get("divisor_override") or math.prod(taps)
    weight = torch.full((channels, 1, *taps), 1 / divisor, dtype=torch.float64)
    first, ones = tuple(-p for p in padding), (1,) * dims
    return Kernel(weight, None, stride, first, ones, channels, *sizes)


def _sizes(source: Any, result: Node, dims: int) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Return the extent in space of a batch of inputs and outputs; None where it is not fixed."""
    values = [node.meta["val"] for node in (source, result)]
    if any(value.ndim != dims + 2 for value in values):
        return None
    sizes = [tuple(value.shape[2:]) for value in values]
    if not all(isinstance(size, int) for extent in sizes for size in extent):
        return None
    return sizes[0], sizes[1]


def _each(value: int | Iterable[int], dims: int) -> tuple[int, ...]:
    """Return a number for each dimension of space, where one may stand for all."""
    numbers = (value,) if isinstance(value, int) else tuple(value)
    return numbers * dims if len(numbers) == 1 else numbers
