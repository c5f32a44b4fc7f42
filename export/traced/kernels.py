"""Convolutions, linear layers and average pools as data: what two side by side, or in a row, make.

A kernel maps an input x of channels c to an output y of channels o, at each place i:

    y[o, i] = bias[o] + sum over c and taps t of  weight[o, c, t] * x[c, stride * i + offset(t)]

with x = 0 outside, and offset(t) = first + dilation * t, where `first` is minus the padding. In
this form a 1x1 kernel is one tap at offset 0, the identity a 1x1 kernel of ones, one channel each,
and a linear layer a kernel without a place.

    Given   y = a(x) + b(x)     of one stride
    Result  y = c(x)            whose taps are those of a and of b, and zeros between

    Given   y = b(a(x))         one of them pointwise
    Result  y = c(x)            with weight[o, c, t] = sum over m of b[o, m, t] * a[m, c, t]

A grouped kernel is a coarser or dense one with zeros off its diagonal blocks.

Source: Ding et al., "Diverse Branch Block", arXiv:2103.13425, section 3.2 (transforms I to VI).
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = [
    "Kernel",
    "identity",
    "loses_bias",
    "parallel",
    "parallel_cost",
    "sequence",
    "sequence_cost",
]


@dataclass(frozen=True)
class Kernel:
    """A linear map of channels and places.

    Args:
        weight: (C_out, C_in / groups, *taps); without taps for a linear layer.
        bias: (C_out,) or None.
        stride: Of each dimension of space.
        first: The offset of the first tap, 0 or less.
        dilation: From tap to tap, at least 1.
        groups: Blocks of channels that do not mix.
        in_size: The input's extent in space.
        out_size: The output's.
    """

    weight: Tensor
    bias: Tensor | None
    stride: tuple[int, ...]
    first: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    in_size: tuple[int, ...]
    out_size: tuple[int, ...]

    @property
    def taps(self) -> tuple[int, ...]:
        """How many taps there are along each dimension of space."""
        return tuple(self.weight.shape[2:])

    @property
    def last(self) -> tuple[int, ...]:
        """The offset of the last tap."""
        rows = zip(self.first, self.dilation, self.taps, strict=True)
        return tuple(first + step * (taps - 1) for first, step, taps in rows)

    @property
    def cost(self) -> int:
        """Multiply-adds for one image; for one token of a linear layer."""
        return self.weight.numel() * math.prod(self.out_size)

    @property
    def is_pointwise(self) -> bool:
        """Whether each place of the output depends on one place of the input."""
        return not any(self.first) and all(taps == 1 for taps in self.taps)

    @property
    def pads(self) -> bool:
        """Whether some place of the output depends on what is outside of the input."""
        rows = zip(self.first, self.last, self.stride, self.in_size, self.out_size, strict=True)
        return any(
            first < 0 or stride * (outputs - 1) + last > inputs - 1
            for first, last, stride, inputs, outputs in rows
        )

    def scaled(self, scale: Tensor, shift: Tensor) -> "Kernel":
        """Return the kernel of y * scale + shift, with (C_out,) or (1,) numbers of each."""
        channels = self.weight.shape[0]
        scale, shift = (x.to(self.weight.dtype).expand(channels) for x in (scale, shift))
        bias = shift if self.bias is None else self.bias * scale + shift
        weight = self.weight * scale.view(-1, *[1] * (self.weight.ndim - 1))
        return replace(self, weight=weight, bias=bias if bias.any() else None)


def identity(like: Kernel) -> Kernel:
    """Return the kernel of y = x, for the channels and places of another's output."""
    ones = torch.ones_like(like.weight[:, :1]).flatten(1)[:, :1]
    space = tuple(1 for _ in like.taps)
    zero = tuple(0 for _ in like.taps)
    weight = ones.view(-1, 1, *space)
    return Kernel(weight, None, space, zero, space, len(ones), like.out_size, like.out_size)


def parallel_cost(a: Kernel, b: Kernel) -> int | None:
    """Return the multiply-adds of two kernels' sum as one; None where no one layer is the sum.

    Strides differ, or no padding that is the same on both sides gives the output's size.
    """
    grid = _grid(a, b) if a.stride == b.stride else None
    if grid is None:
        return None
    groups = math.gcd(a.groups, b.groups)
    channels = a.weight.shape[0] * a.weight.shape[1] * a.groups // groups
    return channels * math.prod(grid.taps) * math.prod(a.out_size)


def parallel(a: Kernel, b: Kernel) -> Kernel:
    """Return the kernel of the sum of two; `parallel_cost` is not None."""
    grid, groups = _grid(a, b), math.gcd(a.groups, b.groups)
    assert grid is not None
    weight = _placed(a, grid, groups)
    weight += _placed(b, grid, groups)
    biases = [x for x in (a.bias, b.bias) if x is not None]
    return Kernel(
        weight,
        sum(biases[1:], biases[0]) if biases else None,
        a.stride,
        grid.first,
        grid.dilation,
        groups,
        a.in_size,
        a.out_size,
    )


def sequence_cost(a: Kernel, b: Kernel) -> int | None:
    """Return the multiply-adds of b(a(x)) as one kernel; None where no one layer computes it."""
    chained = _chained(a, b)
    grid = None if chained is None else _grid(chained)
    if chained is None or grid is None:
        return None
    out_channels, in_channels = b.weight.shape[0], a.weight.shape[1] * a.groups
    channels = out_channels * in_channels // chained.groups
    return channels * math.prod(grid.taps) * math.prod(b.out_size)


def loses_bias(a: Kernel, b: Kernel) -> bool:
    """Say whether b pads a's output with zeros where one kernel of both would put a's bias."""
    return a.bias is not None and bool(a.bias.any()) and b.pads


def sequence(a: Kernel, b: Kernel) -> Kernel:
    """Return the kernel of b(a(x)); `sequence_cost` is not None, and no bias is lost."""
    chained = _chained(a, b)
    assert chained is not None
    groups = chained.groups
    rows, columns = _coarser(a.weight, a.groups, groups), _coarser(b.weight, b.groups, groups)
    rows = rows.reshape(groups, -1, rows.shape[1], math.prod(a.taps))
    columns = columns.reshape(groups, -1, columns.shape[1], math.prod(b.taps))
    weight = torch.einsum("gomt,gmiu->goitu", columns, rows)  # t or u is 1
    weight = weight.reshape(len(b.weight), -1, *chained.taps)
    bias = b.bias
    if a.bias is not None:
        through = torch.einsum("gomt,gm->go", columns, a.bias.view(groups, -1)).flatten()
        bias = through if bias is None else bias + through
    whole = replace(chained, weight=weight, bias=bias)
    grid = _grid(whole)
    assert grid is not None
    return replace(
        whole,
        weight=_placed(whole, grid, groups),
        first=grid.first,
        dilation=grid.dilation,
    )


@dataclass(frozen=True)
class _Grid:
    first: tuple[int, ...]
    dilation: tuple[int, ...]
    taps: tuple[int, ...]


def _grid(*kernels: Kernel) -> _Grid | None:
    """Return the smallest grid of taps that holds those of all kernels, of one stride.

    A layer pads alike on both sides: its first tap says how large its output is. Where it is not as
    large as these kernels' (an even kernel, of padding "same"), the grid is widened.
    """
    rows = []
    for dim in range(len(kernels[0].stride)):
        low = min(kernel.first[dim] for kernel in kernels)
        high = max(kernel.last[dim] for kernel in kernels)
        inputs, outputs = kernels[0].in_size[dim], kernels[0].out_size[dim]
        stride = kernels[0].stride[dim]
        if (inputs - low - high - 1) // stride + 1 != outputs:
            high = max(high, -low)
            low = -high
        if (inputs - low - high - 1) // stride + 1 != outputs:
            return None
        steps = [kernel.first[dim] - low for kernel in kernels]
        steps += [kernel.dilation[dim] for kernel in kernels if kernel.taps[dim] > 1]
        step = math.gcd(high - low, *steps) or 1
        rows.append((low, step, (high - low) // step + 1))
    first, dilation, taps = zip(*rows, strict=True) if rows else ((), (), ())
    return _Grid(first, dilation, taps)


def _placed(kernel: Kernel, grid: _Grid, groups: int) -> Tensor:
    """Return a kernel's weight on a wider grid of taps and in fewer groups: a new tensor."""
    weight = _coarser(kernel.weight, kernel.groups, groups)
    placed = weight.new_zeros(*weight.shape[:2], *grid.taps)
    where = [slice(None), slice(None)]
    for dim, taps in enumerate(kernel.taps):
        start = (kernel.first[dim] - grid.first[dim]) // grid.dilation[dim]
        step = kernel.dilation[dim] // grid.dilation[dim] if taps > 1 else 1
        where.append(slice(start, start + step * (taps - 1) + 1, step))
    placed[tuple(where)] = weight
    return placed


def _coarser(weight: Tensor, groups: int, fewer: int) -> Tensor:
    """Write a weight of so many groups as one of fewer, a divisor, with zeros between blocks."""
    blocks = groups // fewer
    if blocks == 1:
        return weight
    split = weight.reshape(fewer, blocks, -1, *weight.shape[1:])
    sizes = (fewer, blocks, split.shape[2], blocks, *split.shape[3:])
    wide = weight.new_zeros(sizes)
    wide.diagonal(dim1=1, dim2=3).copy_(split.movedim(1, -1))
    return wide.flatten(0, 2).flatten(1, 2)


def _chained(a: Kernel, b: Kernel) -> Kernel | None:
    """Return b(a(x)) as a kernel without its weight: on the "meta" device, (1, 1, *taps)."""
    if b.is_pointwise:
        shaped, stride = a, tuple(s * t for s, t in zip(a.stride, b.stride, strict=True))
    elif a.is_pointwise and all(step == 1 for step in a.stride):
        shaped, stride = b, b.stride
    else:
        return None
    return replace(
        shaped,
        weight=torch.empty(1, 1, *shaped.taps, device="meta"),
        bias=None,
        stride=stride,
        groups=math.gcd(a.groups, b.groups),
        in_size=a.in_size,
        out_size=b.out_size,
    )
