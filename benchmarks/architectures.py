"""The image classifiers of torchvision and timm: which there are, and how to build one small.

A proof does not need a large image, and float64 is slow: each architecture is built for the
smallest image on which every one of its layers still has something to do.
"""

import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import timm
import torch
import torchvision
from timm.models import list_modules
from torch import nn
from torch.overrides import TorchFunctionMode

__all__ = [
    "Architecture",
    "build",
    "choose",
    "every_architecture",
    "million_parameters",
    "smallest_image",
]

_SIZES = (64, 56, 96, 112, 128, 160, 192, 224, 256)  # 56 and 112 are for patches of 14
_LARGE = 150.0  # million parameters; VGG has 133
_RESOLUTION = re.compile(r"_(192|224|240|256|288|320|336|384|448|512)$")
_SMALLEST_MAP = 2  # at 1x1 a softmax over positions is 1, and a padded kernel sees one pixel


@dataclass(frozen=True)
class Architecture:
    """A model that a library can build.

    Args:
        library: "timm" or "torchvision".
        family: The module of the library that defines it.
        name: Its name there.
    """

    library: str
    family: str
    name: str

    def __str__(self) -> str:
        """Return what the table calls it."""
        return f"{self.library}/{self.name}"

    @property
    def group(self) -> str:
        """Return the family with its library; both define a `resnet`."""
        return f"{self.library}/{self.family}"


def every_architecture() -> list[Architecture]:
    """Return all that torchvision and timm list."""
    found = []
    for name in torchvision.models.list_models(module=torchvision.models):
        module = torchvision.models.get_model_builder(name).__module__
        found.append(Architecture("torchvision", module.rpartition(".")[2], name))
    for family in list_modules():
        found += [Architecture("timm", family, name) for name in timm.list_models(module=family)]
    return found


def choose(
    architectures: Sequence[Architecture], costs: Mapping[str, float], *, per_family: int
) -> list[Architecture]:
    """Return the cheapest of each timm family, of as many kinds as it has; all of torchvision.

    A kind is the name up to its first digit or underscore: timm's resnet.py also defines squeezed
    and ECA ones. Left out are the `test_` models, which nobody exports, the same model for another
    resolution, and large ones where the family has a smaller one.

    Args:
        architectures: To choose from.
        costs: Millions of parameters, by name.
        per_family: At most so many of a timm family.
    """
    chosen = [a for a in architectures if a.library == "torchvision"]
    families: dict[str, dict[str, Architecture]] = {}
    for a in sorted(architectures, key=lambda a: (costs[str(a)], a.name)):
        if a.library == "timm" and not a.name.startswith("test_"):
            members = families.setdefault(a.family, {})
            if not members or costs[str(a)] <= _LARGE:
                members.setdefault(_RESOLUTION.sub("", a.name), a)
    for members in families.values():
        met: Counter[str] = Counter()
        turns = {}
        for a in members.values():
            turns[a] = met[_kind(a.name)]
            met[_kind(a.name)] += 1
        chosen += sorted(members.values(), key=turns.__getitem__)[:per_family]  # else by cost
    return chosen


def build(architecture: Architecture, size: int | None = None) -> nn.Module:
    """Return a new model, for square images of a size if the architecture must know it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of deprecated names and slow initialisers
        if architecture.library == "torchvision":
            return _build_torchvision(architecture.name, size)
        if size is not None:
            try:
                return timm.create_model(architecture.name, img_size=size)
            except TypeError as error:
                if "img_size" not in str(error):
                    raise
        return timm.create_model(architecture.name)


def smallest_image(architecture: Architecture) -> int:
    """Return the smallest size that the architecture takes, tried without computing anything."""
    default = default_image(architecture)
    for size in [size for size in _SIZES if size < default]:
        try:
            with torch.no_grad(), _undrawn():
                model = build(architecture, size).eval().to("meta")
                if size // _stride(model) >= _SMALLEST_MAP:
                    with torch.device("meta"):
                        model(torch.empty(2, 3, size, size))
                    return size
        except Exception:  # an assertion, a shape: whatever it is, the next size is tried
            continue
    return default


def default_image(architecture: Architecture) -> int:
    """Return the size that the library's own weights were trained for."""
    if architecture.library == "timm":
        known = timm.get_pretrained_cfg(architecture.name)
        return int(known.input_size[-1]) if known else 224
    return 299 if architecture.name == "inception_v3" else 224


def million_parameters(architecture: Architecture) -> float:
    """Return the number of parameters; memory that nothing writes to costs nothing."""
    with _undrawn():
        return sum(p.numel() for p in build(architecture).parameters()) / 1e6


@contextmanager
def _undrawn() -> Iterator[None]:
    """Leave parameters as they were allocated: drawing them is most of the time of building."""
    with _NothingInPlace(), patch.object(nn.init, "trunc_normal_", lambda x, *_, **__: x):
        yield  # the patched one compares what it drew, and draws again


class _NothingInPlace(TorchFunctionMode):
    """Lets no function change a parameter."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = getattr(function, "__name__", "")
        is_in_place = name.endswith("_") and not name.endswith("__") and name != "requires_grad_"
        kwargs = kwargs or {}
        first = args[0] if args else kwargs.get("tensor")  # what torch.nn.init calls it
        if is_in_place and isinstance(first, nn.Parameter):
            return first
        return function(*args, **kwargs)


def _kind(name: str) -> str:
    return name[: next((i for i, letter in enumerate(name) if letter in "_0123456789"), None)]


def _build_torchvision(name: str, size: int | None) -> nn.Module:
    builder = torchvision.models.get_model_builder(name)
    options: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False  # a truncated normal by scipy, a minute; drawn anew anyway
    if size is not None and builder.__module__.endswith(".vision_transformer"):
        options["image_size"] = size
    if size is not None and builder.__module__.endswith(".maxvit"):
        options["input_size"] = (size, size)
    model: nn.Module = builder(weights=None, **options)
    return model


def _stride(model: nn.Module) -> int:
    """Return the stride of the last feature map, 1 where the model does not say."""
    info = getattr(model, "feature_info", None)
    return int(info[-1]["reduction"]) if isinstance(info, list) and info else 1
