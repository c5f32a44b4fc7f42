"""What augmentation, mixing, dropout, label smoothing and EMA add to a training step.

Two steps of the trainer itself, with and without, in turns: our small ResNet at 32 pixels, batch
128, and torchvision's ResNet-18 at 224, batch 32, both in float32.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from timing import Row, compare

from edgereg.models.zoo import ModelConfig, build_model
from edgereg.recipe import Recipe, recipe_from_json
from edgereg.regularize.ema import WeightAverage
from edgereg.regularize.placement import place
from edgereg.train.distributed import World
from edgereg.train.optim import build_optimizer
from edgereg.train.step import Part, Stepper
from edgereg.train.supervised import Supervised

__all__ = ["SUITE", "compare_steps", "step_of"]

SUITE: dict[str, Any] = {
    "label_smoothing": 0.1,
    "augment": [
        {"flip": {}},
        {"affine": {"degrees": 15, "translate": 0.1, "scale": [0.9, 1.1], "shear": 5}},
        {"colour_jitter": {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4}},
    ],
    "mix": {"mixup": 0.2, "cutmix": 1.0},
    "regularize": [
        {"dropout": {"rate": 0.2, "where": "head"}},
        {"stochastic_depth": {"rate": 0.1, "where": "residual"}},
    ],
    "ema": {"decay": 0.999},
}
_CASES = [
    ("our ResNet", ModelConfig(), 128, 1.25),
    ("ResNet-18", ModelConfig("torchvision:resnet18", image_size=224), 32, 1.10),
]
_CLASSES = 10


def compare_steps(*, quick: bool) -> list[Row]:
    """Time the steps of each case, without and with the suite."""
    rows = []
    for name, config, batch, wanted in _CASES:
        plain = step_of(Recipe(model=config, batch_size=batch))
        suite = step_of(
            dataclasses.replace(recipe_from_json(SUITE), model=config, batch_size=batch)
        )
        for run in (plain, suite):
            run()
        size = config.image_size
        rounds = {32: 9 if quick else 61, 224: 3 if quick else 15}[size]
        label = f"step with the suite / without, {name} {size}x{size}, batch {batch}"
        limit = wanted + (wanted - 1) * quick
        rows.append(compare(label, plain, suite, rounds=rounds, wanted=limit, is_limit=True))
    return rows


def step_of(recipe: Recipe) -> Callable[[], None]:
    """Return what takes the next step of a training."""
    count, size = recipe.batch_size, recipe.model.image_size
    model = build_model(recipe.model, num_classes=_CLASSES)
    place(model, recipe.regularizers())
    objective = Supervised(model, np.arange(count) % _CLASSES, recipe).train()
    objective.to(memory_format=torch.channels_last)
    optimizer = build_optimizer(objective, recipe.optim)
    stepper = Stepper(objective, optimizer, recipe, World())
    average = WeightAverage(objective, recipe.ema) if recipe.ema.decay else None
    images = torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    steps = iter(range(1_000_000))

    def step() -> None:
        number = next(steps)
        if stepper([Part(torch.arange(count), images)], epoch=number, step=number).is_skipped:
            raise SystemExit("error: a step was skipped")
        if average is not None:
            average.update(number, 1_000_000)

    return step
