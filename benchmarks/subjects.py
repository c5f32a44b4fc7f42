"""What is timed against the peers: models, as checkpoints of ours, and the images they see.

The trained ones are trained here, on the images at hand, in minutes: enough for an accuracy that
a variant can lose. The others have their library's random weights, with BatchNorm statistics and
LayerScale as they are in use: they show what a network costs, and how its logits move, and are not
counted as passing an accuracy gate.
"""

import dataclasses
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from deploy.bundle.read import open_bundle
from deploy.errors import DeployError
from deploy.runtime.preprocess import preprocess
from edgereg.checkpoint import Checkpoint, save_checkpoint
from edgereg.data.images import Images, Subset, evenly, labels_of, open_images
from edgereg.errors import EdgeregError
from edgereg.models.zoo import build_model
from edgereg.recipe import Recipe, load_recipe
from edgereg.ship import ship
from edgereg.train.prepared import RunOptions
from edgereg.train.run import train_run
from export.precision.variants import TOLERANCES
from export.targets import Precision

__all__ = ["QUICK", "SUBJECTS", "Photos", "Shipped", "Subject", "make_checkpoint", "ship_best"]

TARGET = "onnxruntime-x86"
_RECIPES = Path(__file__).parent.parent / "edgereg" / "demo" / "recipes"
_TRAINED_ON, _TESTED_ON = 2000, 500  # images at most
_FITTED_ON = 32  # images, for the statistics of random networks
_LAYER_SCALE = 0.1  # at the initial 1e-6 it would hide its branch, and the error made there


@dataclass(frozen=True)
class Subject:
    """A model.

    Args:
        name: In the table.
        zoo: In `edgereg.models.zoo`.
        size: Of its images.
        recipe: Of the demo's, by which it is trained; empty for random weights.
        flags: On top of the recipe.
        wanted: How many times as fast as plain ONNX Runtime it is to be; None where nothing is
            wanted.
        beats_peers: Whether it is to be no slower than the fastest peer.
    """

    name: str
    zoo: str
    size: int = 224
    recipe: str = ""
    flags: tuple[str, ...] = ()
    wanted: float | None = None
    beats_peers: bool = False

    @property
    def slug(self) -> str:
        """Return the name as a file's."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower())


_SHORT = ("--epochs", "12")
_LARGE = ("--epochs", "4", "--optim.lr", "1e-3", "--compute.precision", "bf16")
SUBJECTS = (
    Subject("our CNN", "resnet", 32, "cnn-regularized", _SHORT),
    Subject("our transformer", "vit", 32, "vit-regularized", _SHORT),
    Subject(
        "ResNet-18", "torchvision:resnet18", 224, "cnn-regularized", _LARGE, 2.5, beats_peers=True
    ),
    Subject("ResNet-50", "torchvision:resnet50", wanted=2.5, beats_peers=True),
    Subject("MobileNetV3-L", "torchvision:mobilenet_v3_large", wanted=1.2),
    Subject("EfficientNet-B0", "torchvision:efficientnet_b0", wanted=1.2),
    Subject("ConvNeXt-T", "torchvision:convnext_tiny", wanted=2.0, beats_peers=True),
    Subject("ViT-Ti", "timm:vit_tiny_patch16_224", wanted=2.0, beats_peers=True),
    Subject("ViT-S", "timm:vit_small_patch16_224", wanted=2.0, beats_peers=True),
)
# of a name of its own: what OUT keeps of it must not be taken for the full form's
QUICK = (Subject("our CNN, 4 epochs", "resnet", 32, "cnn-regularized", ("--epochs", "4")),)


class Photos:
    """Images to train and calibrate on, and others to be judged by.

    Args:
        folder: Holds train/CLASS/ and test/CLASS/; None for the embedded emoji-10.
    """

    def __init__(self, folder: Path | None) -> None:
        names = [
            f"emoji-10:both:{part}" if folder is None else str(folder / part)
            for part in ("train", "test")
        ]
        self.test = _part(open_images(names[1]), _TESTED_ON)
        self.train = _part(_without(open_images(names[0]), self.test), _TRAINED_ON)


@dataclass(frozen=True)
class Shipped:
    """The bundle that the product makes of a checkpoint.

    Args:
        path: Of the bundle.
        precision: Its best variant: int8 where the export ships that, which it does not where it
            is slower here or loses too much, and else fp32.
        refused: Why there is no int8; else nothing.
    """

    path: Path
    precision: Precision
    refused: str


def make_checkpoint(subject: Subject, photos: Photos, out: Path) -> Path:
    """Train a subject, or draw its weights; a finished one is not made again."""
    path = out / "models" / subject.slug
    if path.is_dir():
        return path
    flags = ["--model.name", subject.zoo, "--model.image_size", str(subject.size), *subject.flags]
    if subject.recipe:
        recipe = load_recipe(_RECIPES / f"{subject.recipe}.yaml", flags)
        options = RunOptions(resume=True)
        train_run(photos.train, path, recipe, bar=_no_bar, options=options)
    else:
        _draw(load_recipe(None, flags), photos, path)
    return path


def ship_best(
    subject: Subject, checkpoint: Path, photos: Photos, out: Path, *, batch: int
) -> Shipped:
    """Export a checkpoint as `edgereg export` does, in fp32 and int8, or in fp32 if int8 fails."""
    path = out / "bundles" / f"{subject.slug}-b{batch}.bundle"
    path.parent.mkdir(parents=True, exist_ok=True)
    reason = path.with_suffix(".refused.txt")
    if not path.is_dir():
        gates: dict[Precision, float] = {} if subject.recipe else {"fp32": 1.0, "int8": 1.0}
        asked: tuple[Precision, ...]
        for asked in (("fp32", "int8"), ("fp32",)):
            try:
                with nullcontext() if subject.recipe else _of_random_weights():
                    ship(
                        checkpoint,
                        photos.test,
                        path,
                        target=TARGET,
                        precisions=asked,
                        calibration=photos.train,
                        gates=gates,
                        max_batch=batch,
                        force=True,
                    )
                break
            except (DeployError, EdgeregError) as error:
                if "int8" not in asked:
                    raise
                reason.write_text(f"{error}\n", encoding="utf-8")
    best: Precision = "int8" if "int8" in open_bundle(path).manifest.variants else "fp32"
    refused = reason.read_text(encoding="utf-8").strip() if best == "fp32" else ""
    return Shipped(path, best, refused)


def _of_random_weights() -> AbstractContextManager[Any]:
    """Let int8's top-1 be any: random weights have none that could be lost, only errors."""
    tolerance = dataclasses.replace(TOLERANCES["int8"], min_top1_agreement=0.0)
    return patch.dict(TOLERANCES, {"int8": tolerance})


def _part(images: Images, most: int) -> Images:
    if len(images) <= most:
        return images
    return Subset(images, np.sort(evenly(labels_of(images), most)))


def _without(images: Images, others: Images) -> Images:
    """Leave out what is among the others, too: emoji-10 has a few drawings twice."""
    seen = {others.content(index) for index in range(len(others))}
    kept = [index for index in range(len(images)) if images.content(index) not in seen]
    return Subset(images, np.array(kept, np.int64))


def _draw(recipe: Recipe, photos: Photos, path: Path) -> None:
    """Write random weights, whose statistics are those of the images."""
    torch.manual_seed(recipe.seed)
    model = build_model(recipe.model, num_classes=len(photos.train.class_names), seed=recipe.seed)
    chosen = evenly(labels_of(photos.train), _FITTED_ON)
    decoded = [photos.train.load(int(index)) for index in chosen]
    fit_statistics(model, torch.from_numpy(preprocess(decoded, recipe.preprocessing())))
    nothing: dict[str, Any] = {"name": "none", "count": 0, "sha256": ""}
    described = Checkpoint("classifier", recipe, photos.train.class_names, nothing, {})
    path.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(path, model, described)


def fit_statistics(model: nn.Module, images: torch.Tensor) -> None:
    """Give BatchNorms the statistics of (N, 3, H, W) images, and LayerScale a size, in place."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.reset_running_stats()
            module.momentum = None  # the mean of all batches, not a moving one
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("layer_scale"):
                parameter.fill_(_LAYER_SCALE)
        model.train()
        model(images)
        model.eval()


@contextmanager
def _no_bar(description: str, total: int) -> Iterator[Any]:
    yield lambda done, text: None
