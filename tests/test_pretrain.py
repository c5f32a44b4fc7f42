import dataclasses
import math
from importlib.util import find_spec

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from edgereg.checkpoint import load_backbone, load_checkpoint
from edgereg.data.images import open_images
from edgereg.errors import CollapsedError, DataError, RecipeError
from edgereg.evaluation.collapse import Spread
from edgereg.models.zoo import ModelConfig, build_model
from edgereg.progress import progress
from edgereg.recipe import Recipe, load_recipe
from edgereg.ssl.distill import DistillConfig
from edgereg.ssl.pirl import PirlConfig
from edgereg.ssl.simclr import SimClr
from edgereg.train.pretrain import METHODS, Pretraining
from edgereg.train.pretrain_run import check_spread, pretrain_run
from edgereg.train.step import Place

CHAIN = [{"flip": {}}, {"resized_crop": {"area": [0.3, 1.0]}}, {"colour_jitter": {}}]
QUICK = Recipe(
    epochs=2,
    batch_size=62,
    model=ModelConfig(width=8),
    augment=CHAIN,
)


@pytest.fixture(scope="module")
def images():
    return open_images("emoji-10:google:test")


@pytest.fixture(scope="module")
def teacher(images, tmp_path_factory):
    path = tmp_path_factory.mktemp("teacher") / "teacher"
    recipe = dataclasses.replace(QUICK, method="simclr", epochs=1, model=ModelConfig(width=12))
    pretrain_run(images, path, recipe, bar=progress)
    return path


def objective(recipe, **options):
    model = build_model(recipe.model, num_classes=1, seed=0)
    size = recipe.model.image_size
    sample = torch.randint(0, 256, (8, 3, size, size), dtype=torch.uint8)
    return Pretraining(model, sample=sample, size=40, recipe=recipe, **options), model


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_a_backbone_that_is_watched(method, images, teacher, tmp_path):
    recipe = dataclasses.replace(
        QUICK, method=method, distill=DistillConfig(teacher=str(teacher) * (method == "distill"))
    )
    result = pretrain_run(images, tmp_path / "e", recipe, bar=progress, watch=images)
    metrics = load_checkpoint(tmp_path / "e").metrics
    assert metrics["method"] == method
    heads = {"head_std", "head_rank"} if method != "colorization" else set()
    assert set(metrics["features"]) == {"std", "rank", "knn"} | heads
    assert 0.1 < metrics["features"]["knn"] <= 1
    assert all(math.isfinite(epoch.loss) for epoch in result.history)
    backbone, width, _ = load_backbone(tmp_path / "e")
    start = build_model(recipe.model, num_classes=1, seed=0).backbone.state_dict()
    assert backbone(torch.zeros(1, 3, 32, 32)).shape == (1, width)
    assert set(start) == set(backbone.state_dict()), "heads are no part of an encoder"
    moved = [n for n, t in backbone.named_parameters() if not torch.equal(t, start[n])]
    assert len(moved) == len(list(backbone.parameters()))


@pytest.mark.parametrize(
    "model",
    [
        ModelConfig("vit", dim=16, depth=1, heads=2),
        ModelConfig("torchvision:resnet18", image_size=64),
        ModelConfig("timm:mobilenetv3_small_050", image_size=64),
    ],
    ids=lambda model: model.name,
)
@pytest.mark.parametrize("method", [m for m in METHODS if m != "distill"])
def test_every_backbone_is_trained(method, model):
    pretraining, classifier = objective(dataclasses.replace(QUICK, method=method, model=model))
    images = torch.randint(0, 256, (8, 3, *[model.image_size] * 2), dtype=torch.uint8)
    pretraining(images, torch.arange(8), Place(0, 0, 0)).value.backward()
    trained = [p.grad is not None for p in classifier.backbone.parameters()]
    assert sum(trained) > 0.8 * len(trained)  # colorization leaves what follows the map
    assert all(trained) or method == "colorization"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", [m for m in METHODS if m != "distill"])
def test_a_loss_is_in_full_precision_whatever_the_network_runs_in(method, precision):
    recipe = load_recipe(None, ["--method", method, "--compute.precision", precision])
    pretraining, _ = objective(recipe)
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    value = pretraining(images, torch.arange(8), Place(0, 0, 0)).value
    assert value.dtype == torch.float32 and value.isfinite() and value.ndim == 0


class Attract(SimClr):
    """Draws views together, and nothing apart."""

    def forward(self, views, indices):
        first, second = self.project(self.backbone(views[0])).chunk(2)
        return 1 - F.cosine_similarity(first, second).mean()


def test_a_run_whose_views_are_only_drawn_together_is_ended(images, tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "simclr", lambda setup, recipe: Attract(setup, recipe.simclr))
    recipe = dataclasses.replace(QUICK, method="simclr", epochs=16)
    with pytest.raises(CollapsedError, match="collapsed: the head's answers have"):
        pretrain_run(images, tmp_path / "e", recipe, bar=progress)
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize(
    ("found", "has_collapsed"),
    [
        (Spread(0.1, 0.9, 30.0), False),
        (Spread(0.1, 0.009, 30.0), True),
        (Spread(0.1, 0.9, 1.4), True),
    ],
)
def test_either_figure_tells_a_collapse(found, has_collapsed):
    if has_collapsed:
        with pytest.raises(CollapsedError):
            check_spread(found, what="they", least_std=0.01)
    else:
        check_spread(found, what="they", least_std=0.01)


def test_views_of_two_epochs_are_drawn_anew():
    pretraining, _ = objective(dataclasses.replace(QUICK, method="simclr"))
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    values = [
        pretraining(images, torch.arange(8), Place(epoch, 0, 0)).value.item() for epoch in (0, 0, 1)
    ]
    assert values[0] == values[1] != values[2]


def test_the_watched_images_change_nothing(images, tmp_path):
    recipe = dataclasses.replace(QUICK, method="simclr", epochs=1)
    pretrain_run(images, tmp_path / "a", recipe, bar=progress, watch=images)
    pretrain_run(images, tmp_path / "b", recipe, bar=progress)
    a, b = (load_backbone(tmp_path / name)[0].state_dict() for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_watched_images_need_labels(images, tmp_path):
    np.savez(tmp_path / "x.npz", images=np.zeros((4, 32, 32, 3), np.uint8))
    with pytest.raises(DataError, match="label"):
        pretrain_run(
            images, tmp_path / "e", QUICK, bar=progress, watch=open_images(str(tmp_path / "x.npz"))
        )


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--method", "distill"], "no distill.teacher"),
        (["--sam.rho", "0.05"], "sam.rho"),
        (["--stop.patience", "3"], "stop.patience"),
        (["--batchnorm.recompute", "3"], "batchnorm.recompute"),
        (["--progressive.smallest", "16"], "progressive.smallest"),
        (["--batchnorm.frozen", "true"], "batchnorm.frozen"),
        (["--frozen_stages", "1"], "frozen_stages"),
        (["--label_smoothing", "0.1"], "label_smoothing"),
        (["--mix.mixup", "0.2"], "mix.mixup"),
        (["--mix.cutmix", "1"], "mix.cutmix"),
        (["--compute.compile", "true"], "compute.compile"),
        (["--optim.backbone_lr", "0.1"], "optim.backbone_lr"),
        (["--optim.layer_decay", "0.9"], "optim.layer_decay"),
        (["--batch_size", "8", "--compute.accumulate", "8"], "two in each part"),
        (["--compute.accumulate", "248", "--batch_size", "496"], "496.* 248, 248 images"),
    ],
)
def test_what_does_not_go_with_pre_training_is_refused_before_anything_is_written(
    flags, named, images, tmp_path
):
    with pytest.raises(RecipeError, match=named):
        pretrain_run(images, tmp_path / "e", load_recipe(None, flags), bar=progress)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(find_spec("timm") is None, reason="timm is not installed")
def test_a_net_of_one_size_can_see_turned_images():
    recipe = dataclasses.replace(
        QUICK,
        method="pirl",
        model=ModelConfig("timm:vit_tiny_patch16_224", image_size=32),
        pirl=PirlConfig(transform="rotation"),
    )
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    value = objective(recipe)[0](images, torch.arange(4), Place(0, 0, 0)).value
    assert value.isfinite()


def test_synchronised_batchnorm_reaches_the_heads():
    recipe = load_recipe(None, ["--method", "vicreg", "--batchnorm.sync", "true"])
    pretraining, _ = objective(recipe)
    kinds = {type(m).__name__ for m in pretraining.modules() if "BatchNorm" in type(m).__name__}
    assert kinds == {"SynchronisedBatchNorm"}
