"""BatchNorm's statistics (Ioffe and Szegedy, 1502.03167): moving, frozen, recomputed, kept aside.

    y       = gain (x - mean) / sqrt(var + eps) + shift
    running <- (1 - momentum) running + momentum batch

with the batch's biased variance in y and its unbiased one in `running`, as torch has it. In
training mean and var are the batch's; in evaluation, and where they are frozen, the running ones.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from edgereg.errors import DataError, RecipeError, check_settings
from edgereg.models.zoo import Classifier
from edgereg.regularize.sync_batchnorm import synchronise

__all__ = [
    "BatchNormConfig",
    "batchnorms",
    "configure_batchnorm",
    "hold_statistics",
    "recompute_statistics",
    "restore_statistics",
    "save_statistics",
]


@dataclass(frozen=True)
class BatchNormConfig:
    """What BatchNorm does in training.

    Args:
        momentum: Share of a batch in the running statistics, in (0, 1].
        frozen: Whether the running statistics stay as they are and are used in training, too, as
            suits fine-tuning with small batches. Gains and shifts are trained all the same;
            `frozen_stages` stops both.
        sync: Whether the statistics are those of all processes' batches together.
        recompute: Batches from which the statistics are measured anew before an evaluation, as
            averaged weights need; 0 leaves the running ones.
    """

    momentum: float = 0.1
    frozen: bool = False
    sync: bool = False
    recompute: int = 0

    def __post_init__(self) -> None:
        check_settings(
            self,
            "batchnorm.",
            {
                "momentum": ("in (0, 1]", 0 < self.momentum <= 1),
                "recompute": ("not negative", self.recompute >= 0),
            },
        )
        for key in ("sync", "recompute"):
            if self.frozen and getattr(self, key):
                raise RecipeError(
                    "frozen statistics are not measured",
                    found=f"batchnorm.frozen: true, batchnorm.{key}: {getattr(self, key)}",
                    remedy="leave one of them out",
                )


def configure_batchnorm(model: Classifier, config: BatchNormConfig) -> Classifier:
    """Set all BatchNorms of a model, in place.

    Args:
        model: Its parameters, buffers and their names stay the same.
        config: What to set.

    Returns:
        The model.

    Raises:
        RecipeError: A BatchNorm of a kind that cannot be synchronised.
    """
    for name, norm in batchnorms(model):
        norm.momentum = config.momentum
        if config.frozen:
            model.resting |= {name}
        if config.sync:
            synchronise(norm, what=f"batchnorm.sync: {name}")
    return model.train(model.training)


def batchnorms(model: nn.Module) -> Iterator[tuple[str, _BatchNorm]]:
    """Yield the names and modules of all BatchNorms that keep running statistics."""
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None:
            yield name, module


@torch.no_grad()
def recompute_statistics(model: Classifier, batches: Iterable[Tensor]) -> None:
    """Measure all statistics anew, for the weights as they are ("precise BatchNorm").

    Each is the mean and the unbiased variance of all values that reach the BatchNorm, over all
    batches, each normalised by its own statistics on the way (Wu and Johnson, 2105.07576, section
    3). All else, dropout above all, is at rest, as it will be in use. Frozen statistics are left as
    they are.

    Args:
        model: Its BatchNorms' running statistics are replaced; it is left in its mode.
        batches: (B, 3, H, W) each, normalized. Of several processes, each measures its own.

    Raises:
        DataError: There is no batch.
    """
    norms = [norm for name, norm in batchnorms(model) if name not in model.resting]
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    count = 0
    try:
        # what a BatchNorm is given can be looked at only while nothing is compiled
        with torch.compiler.set_stance("force_eager"), _measured(norms) as moments:
            for norm in norms:
                norm.train()
            for batch in batches:
                model(batch)
                count += 1
    finally:
        for module, mode in modes:
            module.training = mode
    if count == 0:
        raise DataError(
            "BatchNorm's statistics are measured on a batch or more",
            found="none",
            remedy="set batchnorm.recompute to 0, or give images",
        )
    for norm, moment in zip(norms, moments, strict=True):
        moment.write(norm)


def save_statistics(model: nn.Module) -> list[Tensor]:
    """Return copies of all running statistics, for restore_statistics."""
    return [buffer.clone() for buffer in _buffers(model)]


@torch.no_grad()
def restore_statistics(model: nn.Module, saved: list[Tensor]) -> None:
    """Set all running statistics to those that save_statistics returned, bit for bit."""
    for buffer, value in zip(_buffers(model), saved, strict=True):
        buffer.copy_(value)


@contextmanager
def hold_statistics(module: nn.Module) -> Iterator[None]:
    """Keep the running statistics while the block runs: what it sees is not what use will bring.

    A batch is normalised by its own statistics all the same.
    """
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm)]
    held = [(m, m.track_running_stats, m.running_mean, m.running_var) for m in norms if m.training]
    for norm, *_ in held:
        norm.track_running_stats = False
        norm.running_mean = norm.running_var = None
    try:
        yield
    finally:
        for norm, tracks, mean, variance in held:
            norm.track_running_stats = tracks
            norm.running_mean, norm.running_var = mean, variance


class _Moments:
    """Count, mean and sum of squared differences of values that come batch by batch.

    Two sets merge as in Chan, Golub and LeVeque (1979), eq. 2.1: no difference of large sums.
    """

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, torch.tensor(0.0), torch.tensor(0.0)

    def add(self, values: Tensor) -> None:
        """Add values (B, C, ...)."""
        values = values.detach()
        if values.dtype in (torch.float16, torch.bfloat16):
            values = values.float()
        axes = [axis for axis in range(values.ndim) if axis != 1]
        var, mean = torch.var_mean(values, axes, correction=0)
        var, mean, added = var.double(), mean.double(), values.numel() // values.shape[1]
        total = self.count + added
        gap = mean - self.mean.to(mean)
        self.squares = self.squares.to(var) + var * added + gap**2 * (self.count * added / total)
        self.mean = self.mean.to(mean) + gap * (added / total)
        self.count = total

    def write(self, norm: _BatchNorm) -> None:
        """Set a BatchNorm's running statistics; one that was never reached keeps its own."""
        if self.count == 0:
            return
        assert norm.running_mean is not None and norm.running_var is not None
        norm.running_mean.copy_(self.mean)
        norm.running_var.copy_(self.squares / max(1, self.count - 1))


@contextmanager
def _measured(norms: list[_BatchNorm]) -> Iterator[list[_Moments]]:
    """Measure what reaches each BatchNorm while the block runs."""
    moments = [_Moments() for _ in norms]
    handles = [
        norm.register_forward_pre_hook(lambda _, inputs, moment=moment: moment.add(inputs[0]))
        for norm, moment in zip(norms, moments, strict=True)
    ]
    try:
        yield moments
    finally:
        for handle in handles:
            handle.remove()


def _buffers(model: nn.Module) -> Iterator[Tensor]:
    for _, norm in batchnorms(model):
        yield from norm.buffers(recurse=False)
