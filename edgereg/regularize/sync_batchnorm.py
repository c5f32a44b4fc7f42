"""BatchNorm over the batches of all processes together, on any device.

torch's SyncBatchNorm refuses the CPU, where equality with one process is tested. This one does the
same in plain operators: forward, one all_gather of (count, mean, variance) a process; backward, one
all_reduce of (sum dy, sum dy x_hat):

    dx = gain / sqrt(var + eps) (dy - sum dy / N - x_hat sum dy x_hat / N)

which is the gradient of Ioffe and Szegedy (1502.03167, section 3) with its sums taken over all
processes. Gains and shifts get those of this process's samples: DistributedDataParallel averages
them, as it does all gradients.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from edgereg.errors import RecipeError

__all__ = ["SynchronisedBatchNorm", "synchronise"]


class SynchronisedBatchNorm(_BatchNorm):
    """A BatchNorm whose batch is that of all processes; the plain one where there is only one.

    Parameters, buffers and their names are BatchNorm's.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, ...) from the same, normalised per channel."""
        many = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        y = self._together(x) if many and self.training else super().forward(x)
        for name in ("drop", "act"):  # timm's BatchNormAct2d goes on to these
            if name in self._modules:
                y = self.get_submodule(name)(y)
        return y

    def _together(self, x: Tensor) -> Tensor:
        weight = x.new_ones(x.shape[1]) if self.weight is None else self.weight
        bias = torch.zeros_like(weight) if self.bias is None else self.bias
        y, mean, var, count = _Normalise.apply(x, weight, bias, self.eps)
        if self.running_mean is not None and self.running_var is not None:
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
            # None is the plain mean of all batches, as torch has it
            share = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean.to(self.running_mean), share)
            self.running_var.lerp_((var * count / (count - 1)).to(self.running_var), share)
        normalised: Tensor = y
        return normalised

    def _check_input_dim(self, input: Tensor) -> None:
        """Take any number of dimensions: the module was of the right kind before."""


def synchronise(norm: _BatchNorm, *, what: str) -> None:
    """Make a BatchNorm a synchronised one, in place: hooks and children stay.

    Args:
        norm: Of torch's own kinds, or timm's BatchNormAct2d.
        what: Names it in the error.

    Raises:
        RecipeError: It is of another kind, whose own forward would be lost.
    """
    kind = type(norm)
    known = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, SynchronisedBatchNorm)
    if kind not in known and kind.__name__ != "BatchNormAct2d":
        raise RecipeError(
            "only plain BatchNorms can be synchronised",
            found=f"{what} is a {kind.__name__}",
            remedy="choose another model, or leave batchnorm.sync out",
        )
    norm.__class__ = SynchronisedBatchNorm


class _Normalise(torch.autograd.Function):
    """(x, weight, bias, eps) to (y, mean, biased variance, count), of all processes."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        values = _wide(x)
        var, mean = torch.var_mean(values, _axes(x), correction=0)
        own = torch.cat([mean, var, mean.new_tensor([x.numel() // x.shape[1]])])
        gathered = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, own)
        table = torch.stack(gathered)  # (processes, 2 C + 1)
        means, variances, counts = table[:, : len(mean)], table[:, len(mean) : -1], table[:, -1:]
        count = counts.sum()
        shares = counts / count
        mean = (shares * means).sum(0)
        var = (shares * (variances + (means - mean) ** 2)).sum(0)
        scale = torch.rsqrt(var + eps)
        ctx.save_for_backward(x, weight, mean, scale, count)
        ctx.mark_non_differentiable(mean, var, count)
        x_hat = (values - _wide_as(mean, x)) * _wide_as(scale, x)
        y = x_hat * _wide_as(weight, x) + _wide_as(bias, x)
        return y.to(x.dtype), mean, var, count

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *unused: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, mean, scale, count = ctx.saved_tensors
        x_hat = (_wide(x) - _wide_as(mean, x)) * _wide_as(scale, x)
        slope = _wide(dy)
        d_bias, d_weight = slope.sum(_axes(x)), (slope * x_hat).sum(_axes(x))
        sums = torch.cat([d_bias, d_weight])
        dist.all_reduce(sums)
        mean_slope, mean_product = (sums / count).chunk(2)
        dx = slope - _wide_as(mean_slope, x) - x_hat * _wide_as(mean_product, x)
        dx = dx * _wide_as(scale * weight, x)
        return dx.to(x.dtype), d_weight.to(weight), d_bias.to(weight), None


def _axes(x: Tensor) -> list[int]:
    return [axis for axis in range(x.ndim) if axis != 1]


def _wide(x: Tensor) -> Tensor:
    """Return float32 for the narrower kinds, in which a mean over a batch is too coarse."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _wide_as(values: Tensor, x: Tensor) -> Tensor:
    """Return (C,) as (1, C, 1, ...), to go with x (B, C, ...)."""
    return _wide(values).view(1, -1, *[1] * (x.ndim - 2))
