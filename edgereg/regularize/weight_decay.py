"""Which parameters decay, and how fast each is trained."""

from typing import Any

from torch import nn

from edgereg.errors import RecipeError
from edgereg.models.zoo import Classifier
from edgereg.regularize.stages import stages

__all__ = ["parameter_groups"]

_PLACES = ("position", "pos_embedding", "pos_embed", "class_token", "cls_token", "dist_token")


def parameter_groups(
    model: nn.Module,
    *,
    weight_decay: float,
    backbone_lr: float = 1.0,
    layer_decay: float = 1.0,
) -> list[dict[str, Any]]:
    """Split the parameters by whether they decay and by how fast they are trained.

    Weight decay is the penalty 1/2 lambda sum w^2 (Krogh and Hertz, NeurIPS 1991, eq. 3) in the
    gradient, or decoupled from it (Loshchilov and Hutter, 1711.05101). Biases and the gains
    and shifts of normalisations are left alone: they have one dimension, and pulling a gain to
    zero silences its channel. Position embeddings are places, not weights, and are left alone too.

    The rates are discriminative (ULMFiT, 1801.06146, section 3.2; layer by layer as in BEiT,
    2106.08254): the stage that is d stages before the head, see stages.py, is trained at

        backbone_lr * layer_decay^d

    times the head's rate.

    Args:
        model: A classifier, or what stands around one; frozen parameters are left out.
        weight_decay: lambda, not negative.
        backbone_lr: Share of the head's rate that the backbone gets, not negative.
        layer_decay: Share of a stage's rate that the one before it gets, in (0, 1].

    Returns:
        Groups in the form that torch's optimizers take, each with its `lr_scale`; of two with the
        same, the one that decays comes first.

    Raises:
        RecipeError: There is no classifier whose stages could have rates of their own.
    """
    scales = _scales(model, backbone_lr, layer_decay)
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and name.rpartition(".")[2] not in _PLACES
            groups.setdefault((scales.get(id(parameter), 1.0), decays), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": weight_decay if decays else 0.0,
            "lr_scale": scale,
        }
        for (scale, decays), parameters in sorted(groups.items(), key=lambda g: g[0], reverse=True)
    ]


def _scales(model: nn.Module, backbone_lr: float, layer_decay: float) -> dict[int, float]:
    """Return the share of the rate that each of a classifier's parameters gets, by its id."""
    if backbone_lr == layer_decay == 1:
        return {}
    classifier = next((m for m in model.modules() if isinstance(m, Classifier)), None)
    if classifier is None:
        raise RecipeError(
            "the rates of stages are for training with labels",
            found=f"optim.backbone_lr: {backbone_lr}, optim.layer_decay: {layer_decay}",
            remedy="set both to 1",
        )
    head = {id(parameter) for parameter in classifier.head.parameters()}
    return {
        id(parameter): layer_decay**distance * (1 if id(parameter) in head else backbone_lr)
        for distance, (_, parameters) in enumerate(reversed(stages(classifier)))
        for parameter in parameters
    }
