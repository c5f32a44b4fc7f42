"""Put the dropouts of a recipe at named places of a model, and move their rates over the run.

    head           before the classifier
    residual       at the end of each residual branch, before the addition
    blocks         after each block
    stages         after each stage; last_stages: after the last two, as DropBlock does
    attention      on the attention weights
    mlp            in the perceptrons, after the activation (VGG: within the classifier)
    embedding      after the position embedding

models/families.py says where these are. A model's own dropout at a place is replaced; where there
is none, the new one hangs on the module whose output it changes. Either way no name of a parameter
changes, so that a checkpoint fits the model with and without. What a model drops at places that
the recipe does not name stays as its library has it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from edgereg.errors import RecipeError
from edgereg.models.families import blocks_of, family_of, matching
from edgereg.models.zoo import Classifier
from edgereg.regularize.dropout import (
    REGULARIZERS,
    DropBlock,
    Regularizer,
    SpatialDropout,
    StochasticDepth,
)

__all__ = ["Dial", "Placement", "place", "places"]

_CHILD = "regularizer"  # the name under which a dropout hangs on a module that had none
_KEPT = ("residual", "blocks", "stages", "last_stages")  # places where maps still are maps


@dataclass(frozen=True)
class Site:
    """One spot of a model.

    Args:
        path: Of the module, with ":" before the attribute that is a rate itself, if it is one.
        block: Which block it belongs to, from 1, of how many; (1, 1) outside all.
    """

    path: str
    block: tuple[int, int] = (1, 1)


@dataclass(frozen=True)
class Dial:
    """One rate of a model.

    Args:
        site: Where.
        owner: Holds the rate.
        attribute: As which it holds it.
        regularizer: What sets it.
        part: The part of the regularizer's rate that it gets.
    """

    site: str
    owner: nn.Module
    attribute: str
    regularizer: Regularizer
    part: float


@dataclass(frozen=True)
class Placement:
    """The rates that a recipe has set in a model; of this very model, not of copies."""

    dials: tuple[Dial, ...]

    def at(self, share: float) -> None:
        """Set all rates to those of a moment.

        Args:
            share: Of the run that is done, in [0, 1].
        """
        for dial in self.dials:
            setattr(dial.owner, dial.attribute, dial.part * dial.regularizer.rate_at(share))


def place(
    model: Classifier, regularizers: Sequence[Regularizer], *, key: str = "regularize"
) -> Placement:
    """Put dropouts into a model, in place, with the rates of the run's start.

    Args:
        model: Receives them.
        regularizers: What to put where.
        key: The recipe's key, for the error.

    Raises:
        RecipeError: The model has no such place, or the place is not one for this kind.
    """
    offered = places(model)
    planned: dict[Site, list[Regularizer]] = {}
    for number, regularizer in enumerate(regularizers):
        _check(regularizer, offered, model, f"{key}[{number}].{_kind(regularizer)}")
        for site in offered[regularizer.where]:
            if any(type(other) is type(regularizer) for other in planned.get(site, ())):
                raise RecipeError(
                    "a kind of dropout goes to a spot once",
                    found=f"{key}[{number}].{_kind(regularizer)}.where: {regularizer.where}, "
                    f"a second time at {site.path}",
                    remedy="remove one of them",
                )
            planned.setdefault(site, []).append(regularizer)
    placement = Placement(
        tuple(dial for site, chosen in planned.items() for dial in _install(model, site, chosen))
    )
    placement.at(0.0)
    return placement


def places(model: Classifier) -> dict[str, tuple[Site, ...]]:
    """Return the places that a model has, each with its spots."""
    backbone, family = model.backbone, family_of(model.backbone)
    paths = blocks_of(backbone) if family.blocks else []
    stages = matching(backbone, family.stages) if family.stages else []
    found = {
        "head": [Site("dropout")],
        "blocks": [Site(f"backbone.{path}") for path in paths],
        "stages": [Site(f"backbone.{path}") for path in stages],
        "last_stages": [Site(f"backbone.{path}") for path in stages[-2:]],
    }
    for name, patterns in family.outside.items():
        found[name] = [Site(f"backbone.{p}") for q in patterns for p in matching(backbone, q)]
    for name, children in family.within.items():
        held = [path for path in paths if name != "residual" or _adds(backbone, path)]
        found[name] = [
            Site(f"backbone.{path}.{_first(backbone.get_submodule(path), child)}", (n, len(held)))
            for n, path in enumerate(held, 1)
            for child in children
        ]
    return {name: tuple(sites) for name, sites in found.items() if sites}


def _adds(backbone: nn.Module, path: str) -> bool:
    """Say whether a block has a shortcut; torchvision's and timm's tell where it is not certain."""
    block = backbone.get_submodule(path)
    return bool(getattr(block, "use_res_connect", getattr(block, "has_skip", True)))


def _first(block: nn.Module, names: str) -> str:
    alternatives = names.split("|")
    return next((name for name in alternatives if hasattr(block, name)), alternatives[-1])


def _kind(regularizer: Regularizer) -> str:
    return next(name for name, kind in REGULARIZERS.items() if type(regularizer) is kind)


def _check(
    regularizer: Regularizer, offered: dict[str, tuple[Site, ...]], model: Classifier, key: str
) -> None:
    architecture = type(model.backbone).__name__
    found = f"{key}.where: {regularizer.where}, of {architecture}"
    if regularizer.where not in offered:
        raise RecipeError(
            "dropout goes to a place that the model has",
            found=found,
            remedy=f"choose one of: {', '.join(offered)}",
        )
    family = family_of(model.backbone)
    fitting = {
        DropBlock: [name for name in offered if family.maps and name in _KEPT],
        SpatialDropout: [name for name in offered if family.maps and name in _KEPT],
        StochasticDepth: [name for name in offered if name == "residual"],
    }.get(type(regularizer), list(offered))
    if regularizer.where not in fitting:
        raise RecipeError(
            "stochastic depth drops residual branches"
            if isinstance(regularizer, StochasticDepth)
            else "this kind of dropout is for maps (B, C, H, W)",
            found=found,
            remedy=f"choose one of: {', '.join(fitting)}" if fitting else "use dropout",
        )


def _install(model: Classifier, site: Site, chosen: Sequence[Regularizer]) -> list[Dial]:
    """Put a site's dropouts there, in the recipe's order."""
    path, _, attribute = site.path.partition(":")
    parts = [regularizer.part(*site.block) for regularizer in chosen]
    if attribute:
        owner = model.get_submodule(path)
        return [Dial(site.path, owner, attribute, chosen[0], parts[0])]
    modules = [regularizer.build() for regularizer in chosen]
    new = modules[0] if len(modules) == 1 else nn.Sequential(*modules)
    above, _, name = path.rpartition(".")
    parent = model.get_submodule(above)
    old = getattr(parent, name)
    new.train(parent.training)
    if old is None or _only_drops(old):
        setattr(parent, name, new)
    else:
        _hang(old, new)
    return [
        Dial(site.path, module, "p", regularizer, part)
        for module, regularizer, part in zip(modules, chosen, parts, strict=True)
    ]


def _only_drops(module: nn.Module) -> bool:
    """Say whether a module does nothing but dropping, so that another may stand in its place."""
    kinds = nn.Identity | nn.Dropout | nn.Dropout2d
    # torchvision's and timm's, by name: neither is imported where it is not used
    return isinstance(module, kinds) or type(module).__name__ in ("StochasticDepth", "DropPath")


def _hang(module: nn.Module, new: nn.Module) -> None:
    """Let a module's output pass through a dropout, without another module around it."""
    module.add_module(_CHILD, new)
    if type(module).forward is not nn.Sequential.forward:  # which calls its last child by itself
        module.register_forward_hook(_drop)


def _drop(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    dropped: Tensor = module.get_submodule(_CHILD)(output)
    return dropped
