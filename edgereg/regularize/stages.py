"""A model as a row of stages from stem to head, to train each at its own rate, or not at all."""

from torch import nn

from edgereg.errors import RecipeError
from edgereg.models.families import blocks_of
from edgereg.models.zoo import Classifier
from edgereg.regularize.batchnorm import batchnorms

__all__ = ["freeze_stages", "stages"]


def stages(model: Classifier) -> list[tuple[str, list[nn.Parameter]]]:
    """Return a model's stages, each a name and its parameters; each parameter is in one.

    The first is the stem: whatever comes before the first block, positions and class tokens too.
    Then each block of the backbone is one, with what follows it up to the next; the last is the
    head. What a block is, models/families.py knows.

    Args:
        model: Read only.
    """
    names = _stage_names(model)
    members: dict[str, list[nn.Parameter]] = {name: [] for name in names}
    position = 0
    for path, parameter in model.named_parameters():
        position = _stage_at(names, path, position)
        members[names[position]].append(parameter)
    return [(name, parameters) for name, parameters in members.items() if parameters]


def freeze_stages(model: Classifier, count: int) -> None:
    """Stop the training of the first stages, in place.

    Their parameters require no gradient, and their BatchNorms stay in evaluation mode.

    Args:
        model: Of which the head is always trained.
        count: How many, from the stem on.

    Raises:
        RecipeError: The model has fewer.
    """
    rows = stages(model)
    if count > len(rows) - 1:
        raise RecipeError(
            "there are as many stages to freeze as stand before the head",
            found=f"frozen_stages: {count}; the model has {len(rows) - 1}",
            remedy=f"they are {', '.join(name for name, _ in rows[:-1])}",
        )
    frozen = {id(p) for _, parameters in rows[:count] for p in parameters}
    for parameter in model.parameters():
        if id(parameter) in frozen:
            parameter.requires_grad_(False)
    names, kept = _stage_names(model), {name for name, _ in rows[:count]}
    position = 0
    for path, _ in batchnorms(model):
        position = _stage_at(names, path, position)
        if names[position] in kept:
            model.resting |= {path}
    model.train(model.training)


def _stage_names(model: Classifier) -> list[str]:
    return ["stem", *(f"backbone.{path}" for path in blocks_of(model.backbone)), "head"]


def _stage_at(names: list[str], path: str, position: int) -> int:
    """Return the place in `names` of what comes next in the order of definition."""
    for place in range(len(names) - 1, position, -1):
        if f"{path}.".startswith(f"{names[place]}."):
            return place
    return position
