"""What a chain of augmentations does with a batch.

A step is one of four kinds, told by its method: it moves pixels, changes colours, hides a part, or
does what it will with the images. Steps may hold chains: `Some` does one to a share of the samples,
`OneOf` gives each sample one of its steps.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from edgereg.augment.draws import Draws
from edgereg.augment.geometric import Beyond, warp
from edgereg.augment.sometimes import in_some
from edgereg.errors import DataError

__all__ = ["Augmentation", "Chain", "Erases", "OneOf", "Recolours", "Some", "Transforms", "Warps"]

_PIECE_BYTES = 2**21  # of floats, a core: about its cache, where a piece stays through all steps


@runtime_checkable
class Warps(Protocol):
    """Moves pixels."""

    @property
    def beyond(self) -> Beyond | None:
        """What lies beyond the image; None if the step never looks there."""

    def matrices(self, draws: Draws, height: int, width: int) -> Tensor:
        """Return (B, 3, 3), from a place in the output to its place in the input."""


@runtime_checkable
class Recolours(Protocol):
    """Changes colours, and leaves every thing in its place."""

    def recolour(self, images: Tensor, draws: Draws) -> Tensor:
        """Return (B, 3, H, W) float in [0, 1], of such; leaves the input alone."""


@runtime_checkable
class Erases(Protocol):
    """Hides a part."""

    def erase(self, images: Tensor, draws: Draws, mean: Tensor) -> Tensor:
        """Return images (B, 3, H, W) with a part in colour `mean` (3,); leaves the input alone."""


@runtime_checkable
class Transforms(Protocol):
    """Does what it will."""

    def transform(self, images: Tensor, draws: Draws) -> Tensor:
        """Return (B, 3, H, W) float in [0, 1], of such; leaves the input alone."""


Augmentation = Warps | Recolours | Erases | Transforms


class _Move(NamedTuple):
    """Moves as one: matrices (B, 3, 3), and what lies beyond the image."""

    matrices: Tensor
    beyond: Beyond | None


@dataclasses.dataclass(frozen=True)
class Chain:
    """Augmentations applied in order, each with draws of its own for each sample.

    What a sample becomes depends on its pixels and its draws, to the last bit, and on no other
    sample.

    Args:
        steps: The augmentations; those that move pixels and follow one another resample once,
            unless they differ in what lies beyond the image.
        mean: Colour of what is hidden, in [0, 1].
    """

    steps: tuple[Augmentation, ...]
    mean: tuple[float, float, float]

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        """Return augmented images.

        Args:
            images: (B, 3, H, W) uint8, or float in [0, 1].
            draws: The draws of these B samples.

        Returns:
            (B, 3, H, W) in [0, 1], of the input's dtype, or float32 for uint8.

        Raises:
            DataError: The images are of another dtype.
        """
        if images.dtype != torch.uint8 and not images.is_floating_point():
            raise DataError(
                "images are uint8, or float in [0, 1]",
                found=str(images.dtype),
                remedy="convert them",
            )
        if not self.steps or len(images) == 0:
            return _as_float(images)
        plan = self._plan(draws, *images.shape[2:])
        size = _piece_size(images)
        if len(images) <= size:
            return self._apply(plan, images, draws)
        out = images.new_empty(images.shape, dtype=_float_type(images))
        for piece, own in draws.pieces(size):
            stages = [
                stage._replace(matrices=stage.matrices[piece])
                if isinstance(stage, _Move)
                else stage
                for stage in plan
            ]
            out[piece] = self._apply(stages, images[piece], own)
        return out

    def colour_steps(self) -> "Chain":
        """Return the chain of the steps that change colours alone, also within some and one_of."""
        kept: list[Augmentation] = []
        for step in self.steps:
            if isinstance(step, Recolours):
                kept.append(step)
            elif isinstance(step, Some | OneOf) and (inner := step.steps.colour_steps()).steps:
                kept.append(dataclasses.replace(step, steps=inner))
        return Chain(tuple(kept), self.mean)

    def _plan(self, draws: Draws, height: int, width: int) -> list[_Move | int]:
        """Return what to do: moves, drawn for the whole batch, and the places of other steps."""
        plan: list[_Move | int] = []
        for place, step in enumerate(self.steps):
            if not isinstance(step, Warps):
                plan.append(place)
                continue
            move = _Move(step.matrices(_at(place, draws), height, width), step.beyond)
            last = plan[-1] if plan else None
            if isinstance(last, _Move) and (
                last.beyond == move.beyond or None in (last.beyond, move.beyond)
            ):
                plan[-1] = _Move(last.matrices @ move.matrices, last.beyond or move.beyond)
            else:
                plan.append(move)
        return plan

    def _apply(self, plan: Sequence[_Move | int], images: Tensor, draws: Draws) -> Tensor:
        images = _as_float(images)
        for stage in plan:
            if isinstance(stage, _Move):
                images = warp(images, stage.matrices, padding=stage.beyond or "border")
                continue
            step, own = self.steps[stage], _at(stage, draws)
            if isinstance(step, Recolours):
                images = step.recolour(images, own)
            elif isinstance(step, Erases):
                images = step.erase(images, own, images.new_tensor(self.mean))
            elif isinstance(step, Transforms):
                images = step.transform(images, own)
        return images


@dataclasses.dataclass(frozen=True)
class Some:
    """Do a chain to a share of the samples; its moves resample apart from those outside it.

    Args:
        steps: The chain.
        probability: Of a sample going through it, in [0, 1].
    """

    steps: Chain
    probability: float = 0.5

    def transform(self, images: Tensor, draws: Draws) -> Tensor:
        """Return the images, some of them changed."""
        return in_some(images, draws, self.probability, self.steps)


@dataclasses.dataclass(frozen=True)
class OneOf:
    """Do to each sample one of the steps, evenly drawn.

    Args:
        steps: To choose from.
        probability: Of a sample being changed at all, in [0, 1].
    """

    steps: Chain
    probability: float = 1.0

    def transform(self, images: Tensor, draws: Draws) -> Tensor:
        """Return the images, each after one of the steps."""
        return in_some(images, draws, self.probability, self._transform)

    def _transform(self, images: Tensor, draws: Draws) -> Tensor:
        chosen = draws.integers("step", len(self.steps.steps))[:, 0]
        changed = torch.empty_like(images)
        for number, step in enumerate(self.steps.steps):
            places = (chosen == number).nonzero()[:, 0]
            if len(places):
                alone = Chain((step,), self.steps.mean)
                changed[places] = alone(images[places], draws.of(places))
        return changed


def _as_float(images: Tensor) -> Tensor:
    if images.dtype == torch.uint8:
        return images.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
    return images.contiguous()


def _float_type(images: Tensor) -> torch.dtype:
    return torch.float32 if images.dtype == torch.uint8 else images.dtype


def _piece_size(images: Tensor) -> int:
    """Return how many samples to take through the chain at a time."""
    if images.device.type != "cpu":
        return len(images)
    return max(1, _PIECE_BYTES // (4 * images[0].numel())) * torch.get_num_threads()


def _at(place: int, draws: Draws) -> Draws:
    return dataclasses.replace(draws, seed=_seed(draws.seed, place))


def _seed(seed: int, place: int) -> int:
    """Give each place draws of its own: two Cutouts in a row must not hide the same square."""
    return seed * 1009 + place
