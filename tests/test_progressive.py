from importlib.util import find_spec

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edgereg.augment.draws import Draws
from edgereg.augment.progressive import ProgressiveConfig, window, window_size
from edgereg.data.emoji10 import Emoji10
from edgereg.data.images import FewLabels
from edgereg.errors import RecipeError
from edgereg.models.convnet import ConvNet
from edgereg.models.zoo import ModelConfig
from edgereg.progress import progress
from edgereg.recipe import Recipe
from edgereg.regularize.batchnorm import BatchNormConfig
from edgereg.train.run import train_run

FEW = FewLabels(Emoji10(vendor="twitter", split="train"), 0.04, seed=0)  # 40 images


def draws(count, *, epoch=0):
    return Draws(0, epoch, torch.arange(count))


def test_the_sizes_rise_in_equal_shares_and_end_whole():
    config = ProgressiveConfig(smallest=20, step=4, whole_from=0.75)
    sizes = [window_size(config, epoch, epochs=12, whole=32) for epoch in range(14)]
    assert sizes == [20] * 3 + [24] * 3 + [28] * 3 + [32] * 5


@given(
    smallest=st.integers(8, 63),
    step=st.integers(1, 70),
    whole_from=st.floats(0.01, 0.99),
    epochs=st.integers(1, 50),
)
def test_the_sizes_never_fall_and_are_whole_in_the_end(smallest, step, whole_from, epochs):
    config = ProgressiveConfig(smallest, step, whole_from)
    sizes = [window_size(config, epoch, epochs=epochs, whole=64) for epoch in range(epochs)]
    assert sizes == sorted(sizes) and sizes[-1] == 64
    assert epochs == 1 or sizes[0] == smallest
    assert all((size - smallest) % step == 0 for size in sizes if size < 64)


def test_without_a_smallest_size_images_are_whole():
    assert window_size(ProgressiveConfig(), 0, epochs=9, whole=32) == 32
    images = torch.rand(2, 3, 32, 32)
    assert window(images, 32, draws(2)) is images


def test_a_window_is_a_part_of_its_image_and_every_place_is_met():
    height, width, size = 9, 7, 5
    place = torch.arange(height * width).view(1, 1, height, width).float()
    shown = window(place.expand(4000, 2, -1, -1), size, draws(4000))
    assert shown.shape == (4000, 2, size, size)
    assert shown.is_contiguous(memory_format=torch.channels_last)
    corners = shown[:, 0, 0, 0].long()
    rows, columns = corners // width, corners % width
    for sample in (0, 1, 77):
        row, column = rows[sample], columns[sample]
        part = place[0, 0, row : row + size, column : column + size]
        assert torch.equal(shown[sample, 1], part)
    counts = np.bincount(corners.numpy(), minlength=height * width).reshape(height, width)
    wanted = 4000 / (5 * 3)
    assert counts[5:].sum() == counts[:, 3:].sum() == 0
    assert np.abs(counts[:5, :3] - wanted).max() < 5 * wanted**0.5


def test_another_epoch_and_another_image_see_another_place():
    images = torch.rand(1, 1, 32, 32).expand(64, -1, -1, -1)
    first, second = window(images, 20, draws(64)), window(images, 20, draws(64, epoch=1))
    assert torch.equal(first, window(images, 20, draws(64)))
    assert not torch.equal(first, second) and not torch.equal(first[0], first[1])
    few = window(images[:3], 20, Draws(0, 0, torch.tensor([9, 2, 40])))
    assert torch.equal(few, first[[9, 2, 40]])  # whatever else is in the batch


def test_training_goes_through_the_sizes_and_ships_whole_images(tmp_path, monkeypatch):
    seen = []
    forward = ConvNet.forward

    def spy(self, images):
        seen.append((images.shape[-1], self.training))
        return forward(self, images)

    monkeypatch.setattr(ConvNet, "forward", spy)
    recipe = Recipe(
        epochs=4,
        batch_size=20,
        model=ModelConfig(name="convnet", width=8),
        progressive=ProgressiveConfig(smallest=16, step=8, whole_from=0.5),
        batchnorm=BatchNormConfig(recompute=1),
    )
    train_run(FEW, tmp_path / "c", recipe, bar=progress)
    tries = [(32, False), (16, False), (24, False)]  # before the first step
    assert seen[:3] == tries
    shown = [size for size, is_training in seen if is_training]
    assert shown == [16] * 2 + [24] * 2 + [32] * 4
    # BatchNorm's statistics are measured anew, and the accuracy is measured, on whole images
    assert {size for size, is_training in seen[3:] if not is_training} == {32}


@pytest.mark.skipif(find_spec("timm") is None, reason="needs timm")
def test_a_model_for_one_size_is_refused_before_the_first_step(tmp_path):
    model = ModelConfig(name="timm:vit_tiny_patch16_224", image_size=64)
    recipe = Recipe(model=model, progressive=ProgressiveConfig(smallest=48))
    with pytest.raises(
        RecipeError, match=r"progressive\.smallest: 48; timm:.* does not take 48x48"
    ):
        train_run(FEW, tmp_path / "c", recipe, bar=progress)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"smallest": 7}, r"smallest: 7"),
        ({"smallest": -20}, r"smallest: -20"),
        ({"step": 0}, r"step: 0"),
        ({"whole_from": 0.0}, r"whole_from: 0\.0"),
        ({"whole_from": 1.0}, r"whole_from: 1\.0"),
    ],
)
def test_what_cannot_be_is_refused(settings, match):
    with pytest.raises(RecipeError, match=rf"progressive\.{match}"):
        ProgressiveConfig(**settings)


def test_a_smallest_window_is_smaller_than_the_input():
    with pytest.raises(RecipeError, match=r"smallest: 32, model\.image_size: 32"):
        Recipe(progressive=ProgressiveConfig(smallest=32))
