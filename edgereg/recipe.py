"""A recipe: all that a run depends on besides its data. YAML, and dotted flags that win over it."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from deploy.runtime.preprocess import Preprocessing
from edgereg.augment.chain import Chain, build_chain
from edgereg.augment.mixing import MixConfig
from edgereg.augment.progressive import ProgressiveConfig
from edgereg.errors import RecipeError, check_settings, nearest
from edgereg.models.zoo import ModelConfig
from edgereg.regularize.batchnorm import BatchNormConfig
from edgereg.regularize.dropout import Regularizer, build_regularizers
from edgereg.regularize.ema import EmaConfig
from edgereg.regularize.sam import SamConfig
from edgereg.ssl.colorization import ColorizationConfig
from edgereg.ssl.distill import DistillConfig
from edgereg.ssl.lejepa import LeJepaConfig
from edgereg.ssl.pirl import PirlConfig
from edgereg.ssl.simclr import SimClrConfig
from edgereg.ssl.vicreg import VicRegConfig
from edgereg.train.compute import ComputeConfig
from edgereg.train.optim import OptimConfig
from edgereg.train.stopping import StopConfig

__all__ = ["InputConfig", "Recipe", "load_recipe", "recipe_from_json"]


@dataclass(frozen=True)
class InputConfig:
    """How an image becomes the model's input, in training and on the device.

    Args:
        resize: "stretch", or "cover": keep the shape and cut out the centre.
        crop_fraction: For "cover", the part of the tighter side that is kept.
        mean: Of each colour, in [0, 1]; ImageNet's by default.
        std: Of each colour.
    """

    resize: Literal["stretch", "cover"] = "cover"
    crop_fraction: float = 1.0
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Recipe:
    """The settings of a run.

    Args:
        seed: Of everything random.
        epochs: Passes over the data.
        batch_size: Images a step.
        label_smoothing: Share of the target spread over all classes (Szegedy et al., 1512.00567,
            section 7).
        model: See ModelConfig.
        frozen_stages: Stages of the backbone, from the stem on, that are not trained.
        input: See InputConfig.
        compute: See ComputeConfig.
        optim: See OptimConfig.
        augment: Steps in order, each an augmentation's name and options; see augment/chain.py.
        progressive: See ProgressiveConfig.
        mix: See MixConfig.
        regularize: Kinds of dropout, each its name and options; see regularize/dropout.py.
        batchnorm: See BatchNormConfig.
        ema: See EmaConfig.
        sam: See SamConfig.
        stop: See StopConfig.
        method: Of `edgereg pretrain`; each has its constants below.
        pirl: See PirlConfig.
        colorization: See ColorizationConfig.
        simclr: See SimClrConfig.
        vicreg: See VicRegConfig.
        lejepa: See LeJepaConfig.
        distill: See DistillConfig.
    """

    seed: int = 0
    epochs: int = 40
    batch_size: int = 64
    label_smoothing: float = 0.0
    model: ModelConfig = field(default_factory=ModelConfig)
    frozen_stages: int = 0
    input: InputConfig = field(default_factory=InputConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    augment: list[dict[str, Any]] = field(default_factory=list)
    progressive: ProgressiveConfig = field(default_factory=ProgressiveConfig)
    mix: MixConfig = field(default_factory=MixConfig)
    regularize: list[dict[str, Any]] = field(default_factory=list)
    batchnorm: BatchNormConfig = field(default_factory=BatchNormConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    sam: SamConfig = field(default_factory=SamConfig)
    stop: StopConfig = field(default_factory=StopConfig)
    method: Literal["pirl", "colorization", "simclr", "vicreg", "lejepa", "distill"] = "pirl"
    pirl: PirlConfig = field(default_factory=PirlConfig)
    colorization: ColorizationConfig = field(default_factory=ColorizationConfig)
    simclr: SimClrConfig = field(default_factory=SimClrConfig)
    vicreg: VicRegConfig = field(default_factory=VicRegConfig)
    lejepa: LeJepaConfig = field(default_factory=LeJepaConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)

    def __post_init__(self) -> None:
        check_settings(
            self,
            "",
            {
                "seed": ("not negative", self.seed >= 0),
                "epochs": ("1 or more", self.epochs >= 1),
                "batch_size": ("2 or more, for BatchNorm", self.batch_size >= 2),
                "label_smoothing": ("in [0, 1)", 0 <= self.label_smoothing < 1),
                "frozen_stages": ("not negative", self.frozen_stages >= 0),
            },
        )
        if self.sam.rho and self.compute.precision == "fp16":
            raise RecipeError(
                "the loss scale of fp16 does not go with sharpness-aware minimisation",
                found=f"sam.rho: {self.sam.rho}, compute.precision: fp16",
                remedy="use bf16",
            )
        if self.progressive.smallest >= self.model.image_size:
            raise RecipeError(
                "the smallest window is smaller than the model's input",
                found=f"progressive.smallest: {self.progressive.smallest}, "
                f"model.image_size: {self.model.image_size}",
                remedy="lower progressive.smallest",
            )
        self.chain()
        self.regularizers()
        self.preprocessing()

    def to_json(self) -> dict[str, Any]:
        """Return the resolved recipe as JSON values, for an artefact to carry."""
        settings: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return settings

    def preprocessing(self) -> Preprocessing:
        """Return the input as data, as a bundle carries it."""
        size = self.model.image_size
        return Preprocessing(
            height=size,
            width=size,
            resize=self.input.resize,
            crop_fraction=self.input.crop_fraction,
            mean=self.input.mean,
            std=self.input.std,
        )

    def chain(self) -> Chain:
        """Return the augmentations of `augment`."""
        return build_chain(self.augment, self.input.mean, key="augment")

    def regularizers(self) -> tuple[Regularizer, ...]:
        """Return the kinds of dropout of `regularize`."""
        return build_regularizers(self.regularize, key="regularize")


def load_recipe(path: Path | None, flags: Sequence[str] = ()) -> Recipe:
    """Read a recipe; what neither the file nor a flag sets keeps its default.

    Args:
        path: A YAML file, or None for the defaults.
        flags: Such as ["--optim.lr", "1e-3"]; they win over the file.

    Raises:
        RecipeError: The file cannot be read, a key is unknown (the nearest is named), or a value
            cannot be.
    """
    settings: Any = {}
    if path is not None:
        try:
            settings = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise RecipeError(
                "a recipe is a YAML file",
                found=f"'{path}': {' '.join(str(error).split())}",
                remedy="check the path and the indentation",
            ) from error
    return _build(settings, flags)


def recipe_from_json(settings: Mapping[str, Any]) -> Recipe:
    """Rebuild the recipe that an artefact carries."""
    return _build(settings, ())


def _build(settings: Any, flags: Sequence[str]) -> Recipe:
    if not isinstance(settings, Mapping):
        raise RecipeError(
            "a recipe is a mapping", found=f"{type(settings).__name__}", remedy="write `epochs: 40`"
        )
    _refuse_unknown(settings, Recipe, "")
    for flag in flags:
        if flag.startswith("--"):
            _refuse_unknown_path(flag[2:].partition("=")[0])
    parser = ArgumentParser(exit_on_error=False, default_env=False)
    parser.add_class_arguments(Recipe, None)
    try:
        parsed = parser.parse_args(list(flags), namespace=parser.parse_object(dict(settings)))
        recipe = parser.instantiate(parsed)
    except (ArgumentError, TypeError, ValueError) as error:
        raise RecipeError(
            "a setting must be of its type",
            found=" ".join(str(error).split()),
            remedy="see docs/recipes.md",
        ) from error
    return Recipe(**{f.name: recipe[f.name] for f in dataclasses.fields(Recipe)})


def _refuse_unknown(settings: Mapping[str, Any], kind: type, prefix: str) -> None:
    types = get_type_hints(kind)
    for key, value in settings.items():
        if key not in types:
            raise RecipeError(
                "a recipe's key must be known",
                found=f"'{prefix}{key}'",
                remedy=nearest(f"{prefix}{key}", [f"{prefix}{known}" for known in types]),
            )
        if not dataclasses.is_dataclass(types[key]):
            continue
        if not isinstance(value, Mapping):
            raise RecipeError(
                f"{prefix}{key} is a mapping",
                found=f"{prefix}{key}: {value!r}",
                remedy=f"write `{key}: {{...}}`, or leave it out",
            )
        _refuse_unknown(value, types[key], f"{prefix}{key}.")


def _refuse_unknown_path(path: str) -> None:
    nested: dict[str, Any] = {}
    for part in reversed(path.split(".")):
        nested = {part: nested}
    _refuse_unknown(nested, Recipe, "")
