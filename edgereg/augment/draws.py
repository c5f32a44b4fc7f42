"""Random numbers that are a function of (seed, epoch, sample index, name), whatever the batch.

A generator's state depends on everything drawn before, so the number of workers, the batch size or
a resume would change what is drawn. A counter-based generator has no state: each draw hashes its
coordinates. The hash is the finalizer of SplitMix64 (Steele, Lea and Flood, "Fast splittable
pseudorandom number generators", OOPSLA 2014, figure 13), applied to whole tensors.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

__all__ = ["Draws"]

_GOLDEN = 0x9E3779B97F4A7C15
_MOST_KEPT = 64  # numbers a sample; what draws more is noise, that is used once


@dataclass(frozen=True)
class Draws:
    """The draws for one batch.

    Args:
        seed: The run's seed.
        epoch: The epoch, from 0.
        indices: (B,) int64, each sample's index in its data set.
    """

    seed: int
    epoch: int
    indices: Tensor
    _batch: "_Batch | None" = field(default=None, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.indices)

    def split(self, parts: int) -> "Draws":
        """Return the draws for `parts` pieces of each sample, (B * parts,), sample by sample."""
        pieces = self.indices[:, None] * parts + torch.arange(parts, device=self.indices.device)
        return Draws(self.seed, self.epoch, pieces.reshape(-1))

    def of(self, places: Tensor) -> "Draws":
        """Return the draws of some samples, by their places (K,) int64 in this batch."""
        batch = self._batch
        if batch is not None:
            batch = _Batch(batch.indices, batch.places[places], batch.drawn)
        return replace(self, indices=self.indices[places], _batch=batch)

    def pieces(self, size: int) -> Iterator[tuple[slice, "Draws"]]:
        """Yield runs of up to `size` samples and their draws.

        The same numbers as the batch's: drawn for all of it when the first piece asks, as hashing
        a few numbers costs as much as hashing a few thousand.
        """
        every = torch.arange(len(self), device=self.indices.device)
        drawn: dict[tuple[str, int], Tensor] = {}
        for start in range(0, len(self), size):
            piece = slice(start, start + size)
            batch = _Batch(self.indices, every[piece], drawn)
            yield piece, replace(self, indices=self.indices[piece], _batch=batch)

    def uniform(self, name: str, low: float = 0.0, high: float = 1.0, *, count: int = 1) -> Tensor:
        """Return (B, count) float32, uniform in [low, high).

        Args:
            name: Tells this draw from the others of the same sample.
            low: The lower end.
            high: The upper end.
            count: Numbers a sample.
        """
        key = f"{self.seed}/{self.epoch}/{name}"
        if self._batch is None or count > _MOST_KEPT:
            unit = _unit(key, self.indices, count)
        else:
            unit = self._batch.unit(key, count)
        return low + (high - low) * unit

    def normal(self, name: str, *, count: int = 1) -> Tensor:
        """Return (B, count) float32 of mean 0 and variance 1 (Box and Muller, 1958, eq. 1)."""
        pairs = (count + 1) // 2
        radius = torch.sqrt(-2 * torch.log1p(-self.uniform(f"{name}/radius", count=pairs)))
        angle = self.uniform(f"{name}/angle", high=2 * math.pi, count=pairs)
        both = torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)], dim=1)
        return both[:, :count]

    def chance(self, name: str, probability: float) -> Tensor:
        """Return (B,) bool, true with the given probability."""
        return self.uniform(name)[:, 0] < probability

    def integers(self, name: str, high: int, *, count: int = 1) -> Tensor:
        """Return (B, count) int64, uniform in 0..high-1."""
        return (self.uniform(name, count=count) * high).to(torch.int64)

    def log_uniform(self, name: str, low: float, high: float) -> Tensor:
        """Return (B, 1) float32 whose logarithm is uniform: x and 1/x are equally likely."""
        return torch.exp(self.uniform(name, math.log(low), math.log(high)))

    def permutations(self, name: str, size: int) -> Tensor:
        """Return (B, size) int64, each row a uniformly drawn permutation of 0..size-1."""
        return torch.argsort(self.uniform(name, count=size), dim=1, stable=True)


@dataclass(frozen=True)
class _Batch:
    """Where a piece's samples stand in their batch, and what was drawn for all of it so far."""

    indices: Tensor
    places: Tensor
    drawn: dict[tuple[str, int], Tensor]

    def unit(self, key: str, count: int) -> Tensor:
        if (key, count) not in self.drawn:
            self.drawn[key, count] = _unit(key, self.indices, count)
        return self.drawn[key, count][self.places]


def _unit(key: str, indices: Tensor, count: int) -> Tensor:
    """Return (B, count) float32, uniform in [0, 1)."""
    start = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")
    sample = _mix(indices.to(torch.int64) * _signed(_GOLDEN) + _signed(start))
    counter = torch.arange(1, count + 1, device=indices.device) * _signed(_GOLDEN)
    bits = _mix(sample[:, None] + counter)
    return _shift(bits, 40).to(torch.float32) / 2**24  # float32 holds 24 bits exactly


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Shift right without the sign: torch has no unsigned 64-bit arithmetic."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value
