"""The whole batch, where each process has a part of it; in one process, what it has.

With the gathered embeddings every process computes its part of one loss over the whole batch, and
DistributedDataParallel's mean of the gradients is that of one process (tests/test_gather.py).
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["gather", "gather_with_gradient", "mean_over_processes", "rank"]


def rank() -> int:
    """Return this process's place in a gathered batch."""
    return dist.get_rank() if _is_shared() else 0


def gather(values: Tensor) -> Tensor:
    """Return (processes * B, ...) from each one's (B, ...), in the order of ranks, detached."""
    values = values.detach()
    if not _is_shared():
        return values
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, values.contiguous())
    return torch.cat(parts)


def gather_with_gradient(values: Tensor) -> Tensor:
    """Return (processes * B, ...); the gradient comes back from every process's loss."""
    if not _is_shared():
        return values
    gathered: Tensor = _Gather.apply(values)
    return gathered


def mean_over_processes(value: Tensor) -> Tensor:
    """Return the mean of a tensor, detached."""
    value = value.detach().clone()
    if _is_shared():
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return value


class _Gather(torch.autograd.Function):
    """All-gather; backwards, the sum of what all processes' losses ask of this one's part."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        ctx.count = len(values)
        return gather(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        start = dist.get_rank() * ctx.count
        return total[start : start + ctx.count]


def _is_shared() -> bool:
    return dist.is_available() and dist.is_initialized()
