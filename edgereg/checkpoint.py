"""A checkpoint: a directory with model.safetensors and checkpoint.json. Nothing is pickled."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import nn

from deploy.publish import publish_directory
from edgereg.errors import CheckpointError
from edgereg.models.zoo import Classifier, ModelConfig, build_model
from edgereg.recipe import Recipe, recipe_from_json

__all__ = [
    "MEMBERS",
    "Checkpoint",
    "load_backbone",
    "load_checkpoint",
    "load_classifier",
    "load_start",
    "save_checkpoint",
]

FORMAT_VERSION = 1
MARKER = "checkpoint.json"
_WEIGHTS = "model.safetensors"
MEMBERS = (MARKER, _WEIGHTS)


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint says of itself.

    Args:
        kind: "classifier", or "encoder": a backbone without a head.
        recipe: The resolved recipe it was trained with.
        class_names: The classes in the order of the logits; empty for an encoder.
        data: Name, number of images and SHA-256 of the training data.
        metrics: What was measured when it was written.
    """

    kind: Literal["classifier", "encoder"]
    recipe: Recipe
    class_names: tuple[str, ...]
    data: Mapping[str, Any]
    metrics: Mapping[str, Any]


def save_checkpoint(
    path: Path, module: nn.Module, checkpoint: Checkpoint, *, force: bool = False
) -> None:
    """Write a checkpoint whole or not at all.

    Args:
        path: The directory to write.
        module: The classifier, or the backbone alone for an encoder.
        checkpoint: What to say of it.
        force: Whether an earlier checkpoint may be replaced.

    Raises:
        BadInputError: The directory exists and may not be replaced.
    """
    tensors = {
        name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()
    }
    weights = save_tensors(tensors)
    described = {
        "format_version": FORMAT_VERSION,
        **dataclasses.asdict(checkpoint),
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
    }
    with publish_directory(path, members=MEMBERS, force=force) as staging:
        (staging / _WEIGHTS).write_bytes(weights)
        (staging / MARKER).write_text(json.dumps(described, indent=1, sort_keys=True) + "\n")


def load_checkpoint(path: Path) -> Checkpoint:
    """Read what a checkpoint says of itself, without its weights.

    Raises:
        CheckpointError: It is no checkpoint, or of another format version.
    """
    described = _described(path)
    return Checkpoint(
        kind=described["kind"],
        recipe=recipe_from_json(described["recipe"]),
        class_names=tuple(described["class_names"]),
        data=described["data"],
        metrics=described["metrics"],
    )


def load_classifier(path: Path) -> tuple[Classifier, Checkpoint]:
    """Build the model of a checkpoint and load its weights, in eval mode.

    Raises:
        CheckpointError: It is no classifier's checkpoint, or damaged.
    """
    checkpoint = load_checkpoint(path)
    if checkpoint.kind != "classifier":
        raise CheckpointError(
            "this command needs a classifier",
            found=f"'{path}' is an {checkpoint.kind}, without a head",
            remedy=f"train a head on it: edgereg train --init {path} --data DATA --out CHECKPOINT; "
            "or export it as it is: edgereg export --encoder",
        )
    model = build_model(checkpoint.recipe.model, num_classes=len(checkpoint.class_names))
    _load(model, path)
    return model.eval(), checkpoint


def load_backbone(path: Path) -> tuple[nn.Module, int, Checkpoint]:
    """Build the backbone of an encoder's or a classifier's checkpoint, in eval mode.

    Returns:
        The backbone, which maps (B, 3, H, W) to (B, D), D, and what the checkpoint says of itself.

    Raises:
        CheckpointError: It is damaged.
    """
    checkpoint = load_checkpoint(path)
    model = build_model(checkpoint.recipe.model, num_classes=1)
    _load(model.backbone, path, prefix="backbone." if checkpoint.kind == "classifier" else "")
    return model.backbone.eval(), model.feature_dim, checkpoint


def load_start(
    path: Path, model: Classifier, config: ModelConfig, *, class_names: tuple[str, ...]
) -> None:
    """Load the weights that a training starts from.

    The head comes along from a classifier of the same classes, and stays new otherwise.

    Args:
        path: An encoder's or a classifier's checkpoint.
        model: Receives the weights.
        config: What `model` was built from.
        class_names: What `model` will tell apart.

    Raises:
        CheckpointError: The checkpoint is of another model.
    """
    checkpoint = load_checkpoint(path)
    theirs = checkpoint.recipe.model
    if theirs.name != config.name:
        raise CheckpointError(
            "a backbone fits only the model it was trained as",
            found=f"'{path}' has model.name {theirs.name}, the recipe {config.name}",
            remedy=f"set model.name to {theirs.name}, or pre-train this model",
        )
    if checkpoint.kind == "classifier" and checkpoint.class_names == class_names:
        _load(model, path)
        return
    # another image size is fine where the tensors fit: a convolution takes any
    _load(model.backbone, path, prefix="backbone." if checkpoint.kind == "classifier" else "")


def _load(module: nn.Module, path: Path, *, prefix: str = "") -> None:
    weights = _weights(path)
    tensors = {name[len(prefix) :]: t for name, t in weights.items() if name.startswith(prefix)}
    expected = {name: tuple(t.shape) for name, t in module.state_dict().items()}
    found = {name: tuple(t.shape) for name, t in tensors.items()}
    if expected != found:
        name = min(n for n in {*expected, *found} if expected.get(n) != found.get(n))
        raise CheckpointError(
            "a checkpoint's tensors must be those of its model",
            found=f"'{path}': {name} is {found.get(name, 'missing')}, "
            f"the model has {expected.get(name, 'none')}",
            remedy="use the checkpoint of this model, or train again with this version",
        )
    module.load_state_dict(tensors)


def _weights(path: Path) -> dict[str, Any]:
    try:
        data = (path / _WEIGHTS).read_bytes()
        if hashlib.sha256(data).hexdigest() != _described(path)["weights_sha256"]:
            raise CheckpointError(
                "the weights must be those that were written",
                found=f"'{path / _WEIGHTS}' has another SHA-256",
                remedy="copy the checkpoint again, or train again",
            )
        return load_tensors(data)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            "a checkpoint holds model.safetensors", found=f"'{path}': {error}", remedy="train again"
        ) from error


def _described(path: Path) -> dict[str, Any]:
    try:
        described = json.loads((path / MARKER).read_text())
        version = described["format_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            "a checkpoint is a directory with checkpoint.json and model.safetensors",
            found=f"'{path}': {type(error).__name__}: {error}",
            remedy="name the directory that `edgereg train --out` wrote",
        ) from error
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"this edgereg reads checkpoints of format {FORMAT_VERSION}",
            found=f"'{path}' has format {version}",
            remedy="upgrade edgereg, or train again",
        )
    assert isinstance(described, dict)
    expected = {f.name for f in dataclasses.fields(Checkpoint)} | {"weights_sha256"}
    if missing := sorted(expected - described.keys()):
        raise CheckpointError(
            f"{MARKER} holds {', '.join(sorted(expected))}",
            found=f"'{path}' has no {missing[0]}",
            remedy="copy the checkpoint again, or train again",
        )
    return described
