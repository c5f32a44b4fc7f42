"""A chain of augmentations, as a recipe writes it."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast, get_type_hints, runtime_checkable

from torch import Tensor

from edgereg.augment.colour import ColourJitter, Greyscale, RGBShift
from edgereg.augment.draws import Draws
from edgereg.augment.erasing import Cutout
from edgereg.augment.geometric import Affine, Flip, ResizedCrop, Translate, warp
from edgereg.errors import RecipeError, nearest

__all__ = ["AUGMENTATIONS", "Augmentation", "Chain", "build_chain"]

AUGMENTATIONS: dict[str, type] = {
    "flip": Flip,
    "affine": Affine,
    "translate": Translate,
    "resized_crop": ResizedCrop,
    "rgb_shift": RGBShift,
    "colour_jitter": ColourJitter,
    "greyscale": Greyscale,
    "cutout": Cutout,
}


@runtime_checkable
class Warps(Protocol):
    """Moves pixels."""

    def matrices(self, draws: Draws, height: int, width: int) -> Tensor: ...


@runtime_checkable
class Recolours(Protocol):
    """Changes colours, pixel by pixel."""

    def recolour(self, images: Tensor, draws: Draws) -> Tensor: ...


@runtime_checkable
class Erases(Protocol):
    """Hides a part."""

    def erase(self, images: Tensor, draws: Draws, mean: Tensor) -> Tensor: ...


Augmentation = Warps | Recolours | Erases


@dataclasses.dataclass(frozen=True)
class Chain:
    """Augmentations applied in order, each with draws of its own for each sample.

    Args:
        steps: The augmentations; those that move pixels and follow one another resample once.
        mean: Colour of what is hidden, in [0, 1].
    """

    steps: tuple[Augmentation, ...]
    mean: tuple[float, float, float]

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        """Return augmented images.

        Args:
            images: (B, 3, H, W) float in [0, 1].
            draws: The draws of these B samples.
        """
        height, width = images.shape[2:]
        pending: Tensor | None = None
        mean = images.new_tensor(self.mean)
        for place, step in enumerate(self.steps):
            own = dataclasses.replace(draws, seed=_seed(draws.seed, place))
            if isinstance(step, Warps):
                matrices = step.matrices(own, height, width)
                pending = matrices if pending is None else pending @ matrices
                continue
            if pending is not None:
                images, pending = warp(images, pending), None
            if isinstance(step, Recolours):
                images = step.recolour(images, own)
            else:
                images = step.erase(images, own, mean)
        return images if pending is None else warp(images, pending)

    def colour_steps(self) -> "Chain":
        """Return the chain of the steps that change colours alone."""
        return Chain(tuple(step for step in self.steps if isinstance(step, Recolours)), self.mean)


def build_chain(
    steps: Sequence[Mapping[str, Any]], mean: tuple[float, float, float], *, key: str
) -> Chain:
    """Build a chain from a recipe's list, such as `[{flip: {}}, {affine: {degrees: 10}}]`.

    Args:
        steps: One mapping a step: the augmentation's name to its options.
        mean: Colour of what is hidden, in [0, 1].
        key: The recipe's key, for the error.

    Raises:
        RecipeError: An unknown name or option (the nearest is given), or a value that cannot be.
    """
    return Chain(tuple(_build(step, f"{key}[{n}]") for n, step in enumerate(steps)), mean)


def _build(step: Mapping[str, Any], key: str) -> Augmentation:
    if not isinstance(step, Mapping) or len(step) != 1:
        raise RecipeError(
            "a step of a chain is one augmentation's name and its options",
            found=f"{key}: {step!r}",
            remedy="write `- flip: {probability: 0.5}`, for instance",
        )
    ((name, options),) = step.items()
    if name not in AUGMENTATIONS:
        raise RecipeError(
            "an augmentation must be known",
            found=f"{key}: '{name}'",
            remedy=nearest(name, AUGMENTATIONS),
        )
    if not isinstance(options, Mapping | None):
        raise RecipeError(
            "an augmentation's options are a mapping",
            found=f"{key}.{name}: {options!r}",
            remedy=f"write `- {name}: {{}}` for the defaults",
        )
    kind = AUGMENTATIONS[name]
    types = get_type_hints(kind)
    values = {}
    for option, value in (options or {}).items():
        if option not in types:
            raise RecipeError(
                f"an option of {name} must be known",
                found=f"{key}.{name}.{option}",
                remedy=nearest(option, types),
            )
        values[option] = _checked(value, types[option], f"{key}.{name}.{option}")
    missing = [
        f.name
        for f in dataclasses.fields(kind)
        if f.default is dataclasses.MISSING and f.name not in values
    ]
    if missing:
        raise RecipeError(f"{name} needs {missing[0]}", found=f"{key}: none", remedy="add it")
    return cast(Augmentation, kind(**values))


def _checked(value: Any, kind: Any, key: str) -> Any:
    """Return a whole number, a number or a pair of numbers within its range."""
    pair = isinstance(value, list | tuple)
    numbers = list(value) if pair else [value]
    wanted, allowed = {
        int: ("a whole number", int),
        float: ("a number", int | float),
    }.get(kind, ("a pair of numbers", int | float))
    is_of_kind = pair == (kind not in (int, float)) and all(
        isinstance(n, allowed) and not isinstance(n, bool) and math.isfinite(n) for n in numbers
    )
    if not is_of_kind:
        raise RecipeError(
            f"this option is {wanted}", found=f"{key}: {value!r}", remedy=f"give {wanted}"
        )
    if key.endswith(".probability") and not 0 <= numbers[0] <= 1:
        raise RecipeError(
            "a probability lies in [0, 1]", found=f"{key}: {value}", remedy="change it"
        )
    if pair and not (len(numbers) == 2 and 0 < numbers[0] <= numbers[1]):
        raise RecipeError(
            "a range is [low, high], 0 < low <= high", found=f"{key}: {value}", remedy="change it"
        )
    if min(numbers) < 0:
        raise RecipeError("an amount is not negative", found=f"{key}: {value}", remedy="change it")
    return tuple(numbers) if pair else value


def _seed(seed: int, place: int) -> int:
    """Give each place draws of its own: two Cutouts in a row must not hide the same square."""
    return seed * 1009 + place
