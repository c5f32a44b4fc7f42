"""One step of simclr and vicreg, with our losses and with lightly's: same net, views and heads.

The two losses of the first step must be the same: else there is nothing to compare.
"""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from install import install
from timing import Row, compare
from torch import Tensor

from edgereg.models.zoo import ModelConfig, build_model
from edgereg.recipe import Recipe, recipe_from_json
from edgereg.train.pretrain import Pretraining

__all__ = ["compare_with_lightly"]

_LIGHTLY = "lightly==1.6.0"
_BATCH = 128


def compare_with_lightly(folder: Path, *, rounds: int) -> list[Row]:
    """Time the steps in turns; a ratio above 1 says that ours takes longer.

    Args:
        folder: Where lightly is put, without its dependencies, if it is not there.
        rounds: Of each comparison.
    """
    losses = _lightly(folder)
    rows = []
    for method, theirs in {
        "simclr": losses.NTXentLoss(temperature=0.5),
        "vicreg": losses.VICRegLoss(),
    }.items():
        recipe = recipe_from_json({"method": method, "model": {"name": "resnet"}})
        ours = _step(recipe, lambda pretraining, views: pretraining.method(views, _indices()))
        other = _step(recipe, _with(theirs))
        first, second = (run() for run in (other, ours))
        if abs(first - second) > 1e-4 * abs(first):
            raise SystemExit(f"{method}: our loss is {second}, lightly's {first}")
        name = f"{method}: our step / lightly's, small ResNet 32x32, batch {_BATCH}"
        rows.append(compare(name, other, ours, rounds=rounds, wanted=1.02, is_limit=True))
    return rows


def _with(loss: Any) -> Callable[[Pretraining, tuple[Tensor, ...]], Tensor]:
    def answer(pretraining: Pretraining, views: tuple[Tensor, ...]) -> Tensor:
        method = pretraining.method
        projected = method.project(method.backbone(views[0]))
        value: Tensor = loss(*projected.chunk(2))
        return value

    return answer


def _step(
    recipe: Recipe, loss: Callable[[Pretraining, tuple[Tensor, ...]], Tensor]
) -> Callable[[], float]:
    generator = torch.Generator().manual_seed(0)
    model = build_model(ModelConfig(), num_classes=1, seed=0)
    sample = torch.randint(0, 256, (8, 3, 32, 32), generator=generator, dtype=torch.uint8)
    pretraining = Pretraining(model, sample=sample, size=1000, recipe=recipe)
    pretraining.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(pretraining.parameters(), lr=0.01)
    views = (torch.randn(2 * _BATCH, 3, 32, 32, generator=generator),)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        value = loss(pretraining, views)
        value.backward()
        optimizer.step()
        return value.item()

    return step


def _indices() -> Tensor:
    return torch.arange(_BATCH)


def _lightly(folder: Path) -> Any:
    said = install(folder, [_LIGHTLY])
    if said:
        raise RuntimeError(said)
    return import_module("lightly.loss")
