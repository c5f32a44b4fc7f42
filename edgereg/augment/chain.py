"""A chain of augmentations, as a recipe writes it."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, cast, get_type_hints

from edgereg.augment.colour import ColourJitter, Greyscale, RGBShift
from edgereg.augment.compose import Augmentation, Chain, OneOf, Some
from edgereg.augment.erasing import Cutout, RandomErasing
from edgereg.augment.filters import Blur, Noise, Sharpness
from edgereg.augment.foreign import Foreign
from edgereg.augment.geometric import (
    Affine,
    Crop,
    Flip,
    ResizedCrop,
    Rotate,
    Scale,
    Shear,
    Translate,
    VerticalFlip,
)
from edgereg.augment.options import checked
from edgereg.augment.policies import RandAugment, TrivialAugment
from edgereg.augment.tone import Autocontrast, Equalize, Posterize, Solarize
from edgereg.errors import RecipeError, nearest

__all__ = ["AUGMENTATIONS", "Augmentation", "Chain", "build_chain"]

AUGMENTATIONS: dict[str, type] = {
    "flip": Flip,
    "vertical_flip": VerticalFlip,
    "translate": Translate,
    "rotate": Rotate,
    "scale": Scale,
    "shear": Shear,
    "affine": Affine,
    "crop": Crop,
    "resized_crop": ResizedCrop,
    "rgb_shift": RGBShift,
    "colour_jitter": ColourJitter,
    "greyscale": Greyscale,
    "blur": Blur,
    "noise": Noise,
    "sharpness": Sharpness,
    "posterize": Posterize,
    "solarize": Solarize,
    "autocontrast": Autocontrast,
    "equalize": Equalize,
    "cutout": Cutout,
    "random_erasing": RandomErasing,
    "rand_augment": RandAugment,
    "trivial_augment": TrivialAugment,
    "callable": Foreign,
    "some": Some,
    "one_of": OneOf,
}


def build_chain(steps: Any, mean: tuple[float, float, float], *, key: str) -> Chain:
    """Build a chain from a recipe's list, such as `[{flip: {}}, {affine: {degrees: 10}}]`.

    Args:
        steps: One mapping a step: the augmentation's name to its options.
        mean: Colour of what is hidden, in [0, 1].
        key: The recipe's key, for the error.

    Raises:
        RecipeError: An unknown name or option (the nearest is given), or a value that cannot be.
    """
    if not isinstance(steps, Sequence) or isinstance(steps, str):
        raise RecipeError(
            "a chain is a list of steps",
            found=f"{key}: {steps!r}",
            remedy="write `- flip: {}` below it, for instance",
        )
    return Chain(tuple(_build(step, mean, f"{key}[{n}]") for n, step in enumerate(steps)), mean)


def _build(step: Any, mean: tuple[float, float, float], key: str) -> Augmentation:
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
            remedy=nearest(str(name), AUGMENTATIONS),
        )
    kind, key = AUGMENTATIONS[name], f"{key}.{name}"
    if kind is OneOf and isinstance(options, list):
        options = {"steps": options}
    if not isinstance(options, Mapping | None):
        raise RecipeError(
            "an augmentation's options are a mapping",
            found=f"{key}: {options!r}",
            remedy=f"write `- {name}: {{}}` for the defaults",
        )
    types = get_type_hints(kind)
    known = {f.name: f for f in dataclasses.fields(kind)}
    values = {}
    for option, value in (options or {}).items():
        if option not in known:
            raise RecipeError(
                f"an option of {name} must be known",
                found=f"{key}.{option}",
                remedy=nearest(str(option), known),
            )
        values[option] = (
            _inner_chain(value, mean, f"{key}.{option}")
            if types[option] is Chain
            else checked(value, types[option], f"{key}.{option}")
        )
    for option, field in known.items():
        has_default = field.default is not field.default_factory  # both MISSING where there is none
        if not has_default and option not in values:
            raise RecipeError(f"{name} needs {option}", found=f"{key}: none", remedy="add it")
    try:
        return cast(Augmentation, kind(**values))
    except RecipeError as error:
        raise RecipeError(error.rule, found=f"{key}.{error.found}", remedy=error.remedy) from None


def _inner_chain(steps: Any, mean: tuple[float, float, float], key: str) -> Chain:
    chain = build_chain(steps, mean, key=key)
    if not chain.steps:
        raise RecipeError(
            "a chain within a step has steps", found=f"{key}: none", remedy="add one, or remove it"
        )
    return chain
