"""Which parameters decay."""

from typing import Any

from torch import nn

__all__ = ["decay_groups"]


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split the parameters into those that decay and those that don't.

    Weight decay is the penalty 1/2 lambda sum w^2 (Krogh and Hertz, NeurIPS 1991, eq. 3),
    decoupled from the gradient by AdamW (Loshchilov and Hutter, 1711.05101). Biases and the gains
    and shifts of normalisations are left alone: they have one dimension, and pulling a gain to
    zero silences its channel. Position embeddings are places, not weights, and are left alone too.

    Args:
        model: Whose parameters to group; frozen ones are left out.
        weight_decay: lambda, not negative.

    Returns:
        Two groups in the form that torch's optimizers take.
    """
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_place = name.rpartition(".")[2] in ("position", "pos_embedding", "class_token")
        (kept if parameter.ndim <= 1 or is_place else decayed).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
