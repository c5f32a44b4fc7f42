import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgereg.augment import mixing
from edgereg.augment.mixing import MixConfig, cutmix, mix, mixup
from edgereg.errors import RecipeError

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True, database=None)
UNIT = st.floats(0, 1, exclude_max=True)
BOTH = MixConfig(mixup=0.2, cutmix=1.0)


def one(value):
    """The same for every image of a batch."""
    return torch.tensor([value], dtype=torch.float64)


CENTRE = one([0.5, 0.5])


def batch(count=4, height=8, width=8):
    """Image i is i everywhere, and so is its class: what was pasted can be counted."""
    images = torch.arange(count, dtype=torch.float64)[:, None, None, None]
    return images.expand(count, 3, height, width).clone(), torch.eye(count, dtype=torch.float64)


@PROPERTY
@given(
    share=st.floats(0, 1),
    row=UNIT,
    column=UNIT,
    height=st.integers(1, 33),
    width=st.integers(1, 33),
)
def test_cutmix_weighs_the_targets_by_the_area_that_was_really_pasted(
    share, row, column, height, width
):
    images, targets = batch(3, height, width)
    partner = torch.tensor([1, 2, 0])
    pasted, mixed = cutmix(images, targets, partner, one(share), one([row, column]))
    for i in range(3):
        for j in range(3):
            area = (pasted[i, 0] == j).double().mean().item()
            assert mixed[i, j].item() == pytest.approx(area, abs=1e-12)
    assert (mixed.sum(dim=1) - 1).abs().max() < 1e-12
    assert torch.equal(images, batch(3, height, width)[0]), "the input was changed"


@PROPERTY
@given(share=st.floats(0, 1))
def test_an_unclipped_box_has_the_intended_area(share):
    images, targets = batch(2, 64, 64)
    _, mixed = cutmix(images, targets, torch.tensor([1, 0]), one(share), CENTRE)
    # each side is rounded down to an even number of pixels
    assert -1e-12 < mixed[0, 0].item() - share < 2 * 2 / 64


@PROPERTY
@given(share=st.floats(0, 1))
def test_mixup_blends_images_and_targets_alike(share):
    images, targets = batch()
    partner = torch.tensor([2, 0, 3, 1])
    blended, mixed = mixup(images, targets, partner, one(share))
    assert torch.allclose(blended, share * images + (1 - share) * images[partner], atol=1e-12)
    assert torch.allclose(mixed, share * targets + (1 - share) * targets[partner], atol=1e-12)
    assert (mixed.sum(dim=1) - 1).abs().max() < 1e-12


@pytest.mark.parametrize("technique", [mixup, lambda *args: cutmix(*args, CENTRE)])
def test_a_share_of_one_keeps_the_image_and_of_zero_takes_the_partner(technique):
    images, targets = batch()
    partner = torch.tensor([2, 0, 3, 1])
    kept, own = technique(images, targets, partner, one(1.0))
    taken, theirs = technique(images, targets, partner, one(0.0))
    assert torch.equal(kept, images) and torch.equal(own, targets)
    assert torch.equal(taken, images[partner]) and torch.equal(theirs, targets[partner])


def test_a_mixed_batch_is_a_function_of_seed_and_step():
    images, targets = batch(8)
    first, _ = mix(images, targets, BOTH, seed=1, step=5)
    torch.rand(7)
    again, _ = mix(images, targets, BOTH, seed=1, step=5)
    assert torch.equal(first, again)
    others = [mix(images, targets, BOTH, seed=s, step=t)[0] for s, t in ((2, 5), (1, 6), (5, 1))]
    assert not any(torch.equal(first, other) for other in others)


def test_parts_of_a_step_are_mixed_apart():
    images, targets = batch(8)
    parts = [mix(images, targets, BOTH, seed=0, step=3, part=part)[0] for part in (0, 1, 2)]
    assert not torch.equal(parts[0], parts[1]) and not torch.equal(parts[1], parts[2])


@PROPERTY
@given(
    seed=st.integers(0, 100),
    height=st.integers(2, 20),
    width=st.integers(2, 20),
    kind=st.sampled_from(["mixup", "cutmix"]),
)
def test_each_image_may_draw_a_share_and_a_box_of_its_own(seed, height, width, kind):
    images, targets = batch(6, height, width)
    config = MixConfig(**{kind: 1.0}, per_sample=True)
    mixed, weights = mix(images, targets, config, seed=seed, step=0)
    assert (weights.sum(dim=1) - 1).abs().max() < 1e-12
    # image i is i everywhere, so its mean tells how much of each class is in it
    found = mixed.mean(dim=(1, 2, 3))
    wanted = weights @ torch.arange(6, dtype=torch.float64)
    assert (found - wanted).abs().max() < 1e-9


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_shares_differ_within_a_batch_only_where_that_is_asked_for(kind):
    images, targets = batch(16, 32, 32)

    def kept(per_sample):
        config = MixConfig(**{kind: 1.0}, per_sample=per_sample)
        for step in range(50):  # one in which nobody is his own partner's equal
            _, weights = mix(images, targets, config, seed=0, step=step)
            yield len({round(w, 6) for w in weights.diagonal().tolist() if w < 1})

    assert max(kept(per_sample=False)) == 1 and max(kept(per_sample=True)) > 10


def test_targets_of_any_mixed_batch_sum_to_one():
    images, targets = batch(8)
    for step in range(200):
        _, mixed = mix(images.float(), targets.float(), BOTH, seed=0, step=step)
        assert (mixed.sum(dim=1) - 1).abs().max() < 1e-6 and mixed.min() >= 0


def test_batches_are_mixed_as_often_as_asked_and_each_way_evenly(monkeypatch):
    used = []
    for name in ("mixup", "cutmix"):
        monkeypatch.setattr(
            mixing, name, lambda x, t, *rest, name=name: used.append(name) or (x, t)
        )
    images, targets = batch()
    config = MixConfig(mixup=0.2, cutmix=1.0, probability=0.5)
    for step in range(1000):
        mix(images, targets, config, seed=0, step=step)
    assert 440 < len(used) < 560
    assert 0.4 < used.count("cutmix") / len(used) < 0.6


@pytest.mark.parametrize(
    "config", [MixConfig(), MixConfig(mixup=1.0, cutmix=1.0, probability=0.0)], ids=str
)
def test_a_batch_that_is_not_mixed_is_the_batch_itself(config):
    images, targets = batch()
    same_images, same_targets = mix(images, targets, config, seed=0, step=0)
    assert same_images is images and same_targets is targets


def test_the_share_follows_the_beta_distribution(monkeypatch):
    shares = []
    monkeypatch.setattr(mixing, "mixup", lambda x, t, p, share: shares.append(share) or (x, t))
    for step in range(2000):
        mix(*batch(2), MixConfig(mixup=2.0), seed=0, step=step)
    shares = torch.cat(shares)
    # Beta(2, 2): mean 1/2, variance 1/20
    assert abs(shares.mean() - 0.5) < 0.02 and abs(shares.var() - 0.05) < 0.004


@pytest.mark.parametrize(
    ("settings_", "match"),
    [
        ({"mixup": -0.1}, r"mix\.mixup: -0\.1"),
        ({"cutmix": -1}, r"mix\.cutmix: -1"),
        ({"probability": 1.5}, r"mix\.probability: 1\.5"),
    ],
)
def test_impossible_settings_are_named(settings_, match):
    with pytest.raises(RecipeError, match=match):
        MixConfig(**settings_)
