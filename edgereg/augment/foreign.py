"""Augmentations of other libraries, or of the user's own, by their names in a recipe.

A recipe may come with a checkpoint of somebody else's. So reading one imports nothing: what it
names is imported when the first image is to be changed, or by `import_callables`.
"""

import importlib
import os
import random
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgereg.augment.compose import Chain, OneOf, Some
from edgereg.augment.draws import Draws
from edgereg.augment.sometimes import in_some
from edgereg.errors import RecipeError, check_settings

__all__ = ["Foreign", "import_callables"]

_OVERSHOOT = 0.5  # beyond [0, 1]: a bicubic filter's stays below, a normalization's does not


@dataclass(frozen=True)
class Foreign:
    """Call something on each sample by itself.

    It draws from Python's, numpy's and torch's generators, all three seeded for this sample, so
    that the result depends on no other sample; they are put back afterwards. So it must keep
    nothing from one call to the next. It runs on the CPU.

    Args:
        path: Module and name of a class or function, such as
            "torchvision.transforms.v2.ElasticTransform".
        options: What it is called with, once, to make the callable.
        kind: "torchvision": called with (3, H, W) float32 in [0, 1], returns the like.
            "albumentations": called with image=(H, W, 3) uint8, returns a mapping with "image", the
            like.
        probability: Of a sample being changed, in [0, 1].
    """

    path: str
    options: dict[str, Any] = field(default_factory=dict)
    kind: Literal["torchvision", "albumentations"] = "torchvision"
    probability: float = 1.0

    def __post_init__(self) -> None:
        is_path = self.path.count(".") > 0 and all(p.isidentifier() for p in self.path.split("."))
        check_settings(self, "", {"path": ("a module and a name, such as my.module.Name", is_path)})

    def transform(self, images: Tensor, draws: Draws) -> Tensor:
        """Return the images (B, 3, H, W), each changed by itself.

        Raises:
            RecipeError: There is no such callable, it refuses its options or an image, or returns
                something else than an image of the same size.
        """
        return in_some(images, draws, self.probability, self._transform)

    @cached_property
    def called(self) -> Any:
        """Return the callable.

        Raises:
            RecipeError: It cannot be imported, or refuses its options.
        """
        if self.kind == "albumentations":
            # its import asks pypi.org for a newer version, and warns where there is no network
            os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
        module, _, name = self.path.rpartition(".")
        try:
            make = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise RecipeError(
                "a callable can be imported",
                found=f"callable.path: '{self.path}': {error}",
                remedy="check its name, and install its package",
            ) from error
        try:
            with _seeded(0), warnings.catch_warnings():  # seeded: a resume makes the same
                # Albumentations only warns of an option that it does not know
                warnings.filterwarnings("error", "Argument.* not valid for transform")
                return make(**self.options)
        except Exception as error:  # whatever its constructor makes of wrong options
            raise RecipeError(
                f"{self.path} takes its options",
                found=f"callable.options: {self.options}: {_reason(error)}",
                remedy="change them",
            ) from error

    def _transform(self, images: Tensor, draws: Draws) -> Tensor:
        # 2 x 24 bits: as many as a draw has
        seeds = draws.integers("seed", 2**24, count=2).tolist()
        changed = images.new_empty(images.shape)
        for place, (image, (high, low)) in enumerate(zip(images.cpu(), seeds, strict=True)):
            seed = high * 2**24 + low
            with _seeded(seed):
                changed[place] = self._call(image, seed)
        return changed

    def _call(self, image: Tensor, seed: int) -> Tensor:
        """Return a changed copy of image (3, H, W)."""
        called = self.called
        try:
            if self.kind == "torchvision":
                result = called(image.to(torch.float32, copy=True))
            else:
                if hasattr(called, "set_random_seed"):  # Albumentations' newer releases
                    called.set_random_seed(seed % 2**32)
                result = called(image=_as_bytes(image))
        except Exception as error:  # of another's code
            raise RecipeError(
                f"{self.path} takes images as kind {self.kind} hands them over",
                found=f"callable.kind: {self.kind}: {_reason(error)}",
                remedy="change its kind or its options",
            ) from error
        return (self._checked if self.kind == "torchvision" else self._checked_bytes)(result, image)

    def _checked(self, result: Any, image: Tensor) -> Tensor:
        if not isinstance(result, Tensor):
            raise self._wrong_result(f"a {type(result).__name__}")
        if result.shape != image.shape or result.dtype != torch.float32:
            raise self._wrong_result(f"{tuple(result.shape)} {result.dtype}")
        low, high = result.min().item(), result.max().item()
        if not (low >= -_OVERSHOOT and high <= 1 + _OVERSHOOT):  # not a number, either
            raise self._wrong_result(f"values from {low:.3g} to {high:.3g}")
        return result.clamp(0, 1)

    def _checked_bytes(self, result: Any, image: Tensor) -> Tensor:
        pixels = result.get("image") if isinstance(result, Mapping) else None
        if not isinstance(pixels, np.ndarray):
            raise self._wrong_result(f"a {type(result).__name__} without an array 'image'")
        if pixels.shape != (*image.shape[1:], 3) or pixels.dtype != np.uint8:
            raise self._wrong_result(f"{pixels.shape} {pixels.dtype}")
        return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1) / 255

    def _wrong_result(self, found: str) -> RecipeError:
        rule = {
            "torchvision": "returns (3, H, W) float32 in [0, 1], of the size it was given",
            "albumentations": 'returns {"image": (H, W, 3) uint8}, of the size it was given',
        }[self.kind]
        return RecipeError(
            f"a callable of kind {self.kind} {rule}",
            found=f"callable.path: '{self.path}' returned {found}",
            remedy="change its options or its kind, or leave it out",
        )


def import_callables(chain: Chain, *, key: str) -> None:
    """Import what a chain names, so that what cannot be is known before the data are read.

    Args:
        chain: May have chains within.
        key: The recipe's key, for the error.

    Raises:
        RecipeError: Something cannot be imported, or refuses its options.
    """
    for place, step in enumerate(chain.steps):
        if isinstance(step, Some | OneOf):
            name = "some" if isinstance(step, Some) else "one_of"
            import_callables(step.steps, key=f"{key}[{place}].{name}.steps")
        elif isinstance(step, Foreign):
            try:
                _ = step.called
            except RecipeError as error:
                found = f"{key}[{place}].{error.found}"
                raise RecipeError(error.rule, found=found, remedy=error.remedy) from error


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _as_bytes(image: Tensor) -> NDArray[np.uint8]:
    """Return (H, W, 3) uint8 of (3, H, W) float in [0, 1]."""
    pixels: NDArray[np.uint8] = (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return np.ascontiguousarray(pixels)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the three global generators for the block, and put them back after it."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            random.seed(seed)
            np.random.seed([seed >> 32, seed % 2**32])
            torch.default_generator.manual_seed(seed)  # the CPU's alone
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
