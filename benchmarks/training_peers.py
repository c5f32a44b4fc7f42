"""A training step as a user of torchvision, or of timm, would write it; ours beside them.

All train the same net (ours, with the same dropout) on the same uint8 images in memory, on the same
number of threads, without worker processes: resized crop, flip and colour jitter of each image by
itself, Mixup or CutMix, label smoothing, AdamW and an average of the weights. *Plain* is the same
step on the images as they are.
"""

import dataclasses
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from install import install
from suite_overhead import SUITE as USUAL_SUITE
from suite_overhead import step_of
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.transforms import v2

from deploy.runtime.preprocess import Preprocessing
from edgereg.data.arrays import ArrayImages
from edgereg.data.pixels import Pixels
from edgereg.models.zoo import ModelConfig, build_model
from edgereg.recipe import recipe_from_json
from edgereg.regularize.placement import place

__all__ = ["CLASSES", "PEERS", "SUITE", "Step", "ours", "ours_plain", "timm_step", "vision_step"]

Step = Callable[[], object]

CLASSES = 10
TIMM = "timm==1.0.31"
SUITE: dict[str, Any] = {
    **USUAL_SUITE,
    "augment": [  # what the peers' own pipelines do
        {"resized_crop": {"area": [0.08, 1.0]}},
        {"flip": {}},
        {"colour_jitter": {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4}},
    ],
    "optim": {"name": "adamw", "lr": 1e-3},
}


def ours(config: ModelConfig, batch: int, *, count: int | None = None) -> Step:
    """Our trainer's own step with the suite, on a batch of so many images; None: of as many."""
    recipe = dataclasses.replace(recipe_from_json(SUITE), model=config, batch_size=batch)
    return _drawing(step_of(recipe), config.image_size, batch, count or batch)


def ours_plain(config: ModelConfig, batch: int) -> Step:
    """Our trainer's own step without it."""
    recipe = recipe_from_json({"optim": SUITE["optim"]})
    step = step_of(dataclasses.replace(recipe, model=config, batch_size=batch))
    return _drawing(step, config.image_size, batch, batch)


def _drawing(step: Step, size: int, batch: int, count: int) -> Step:
    """Draw a batch before each step, as the peers' loaders do; the step has images of its own."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    images = ArrayImages(pixels, name="noise", labels=None, class_names=())
    kept = Pixels(images, Preprocessing(size, size, "stretch", 1.0, (0.5,) * 3, (0.25,) * 3))

    def draw_and_step() -> None:
        kept.batch(rng.integers(0, count, batch))
        step()

    return draw_and_step


def vision_step(config: ModelConfig, batch: int) -> Step:
    """As in torchvision's references/classification: transforms v2 in a Dataset, a collate."""
    size = config.image_size
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(size, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ColorJitter(0.4, 0.4, 0.4),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.5] * 3, [0.25] * 3),
        ]
    )
    mix = v2.RandomChoice(
        [v2.MixUp(alpha=0.2, num_classes=CLASSES), v2.CutMix(alpha=1.0, num_classes=CLASSES)]
    )

    def collate(samples: list[tuple[Tensor, int]]) -> Any:
        return mix(*default_collate(samples))

    net = _net(config)
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    loader = DataLoader(
        _Images(batch, size, transform, as_pil=False), batch, shuffle=True, collate_fn=collate
    )
    loss = nn.CrossEntropyLoss(label_smoothing=0.1)
    return _step(net, loader, loss, lambda: average.update_parameters(net))


def timm_step(config: ModelConfig, batch: int, *, folder: Path) -> Step:
    """As in timm's train.py: its transform on PIL's images, its Mixup, loss and average."""
    timm_data, timm_loss, timm_utils = (
        _timm(folder, name) for name in ("timm.data", "timm.loss", "timm.utils")
    )
    size = config.image_size
    transform = timm_data.create_transform(
        (3, size, size),
        is_training=True,
        color_jitter=(0.4, 0.4, 0.4),
        interpolation="bilinear",
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
    )
    mixup = timm_data.Mixup(
        mixup_alpha=0.2, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=CLASSES
    )

    def collate(samples: list[tuple[Tensor, int]]) -> Any:
        return mixup(*default_collate(samples))

    net = _net(config)
    average = timm_utils.ModelEmaV3(net, decay=0.999)
    loader = DataLoader(
        _Images(batch, size, transform, as_pil=True), batch, shuffle=True, collate_fn=collate
    )
    return _step(net, loader, timm_loss.SoftTargetCrossEntropy(), lambda: average.update(net))


PEERS: dict[str, Callable[..., Step]] = {
    "torchvision": lambda config, batch, folder: vision_step(config, batch),
    "timm": lambda config, batch, folder: timm_step(config, batch, folder=folder),
}


class _Images(Dataset[tuple[Tensor, int]]):
    """So many random images, as a tensor or as Pillow's."""

    def __init__(self, count: int, size: int, transform: Any, *, as_pil: bool) -> None:
        pixels = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)
        self._images = [v2.functional.to_pil_image(p) for p in pixels] if as_pil else list(pixels)
        self._labels, self._transform = np.arange(count) % CLASSES, transform

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._transform(self._images[index]), int(self._labels[index])


def _net(config: ModelConfig) -> nn.Module:
    model = build_model(config, num_classes=CLASSES)
    place(model, recipe_from_json(SUITE).regularizers())
    return model.train().to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def _step(net: nn.Module, loader: DataLoader[Any], loss: Any, end: Callable[[], object]) -> Step:
    optim = recipe_from_json(SUITE).optim
    optimizer = torch.optim.AdamW(net.parameters(), lr=optim.lr, weight_decay=optim.weight_decay)
    batches = _forever(loader)

    def step() -> None:
        images, targets = next(batches)
        value = loss(net(images.contiguous(memory_format=torch.channels_last)), targets)
        if not torch.isfinite(value):
            raise RuntimeError("its loss is no number")
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()
        end()

    return step


def _forever(loader: DataLoader[Any]) -> Iterator[Any]:
    while True:
        yield from loader


def _timm(folder: Path, name: str) -> Any:
    try:
        return import_module(name)
    except ImportError:
        said = install(folder, [TIMM])
        if said:
            raise RuntimeError(said) from None
        return import_module(name)
