import numpy as np
import pytest
import torch
import torch.nn.functional as F

from edgereg.errors import DataError
from edgereg.evaluation import linear_probe as module
from edgereg.evaluation.linear_probe import STRENGTHS, linear_probe


def clusters(count, *, classes=3, dim=6, noise=0.8, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    features = np.eye(dim)[labels] + noise * rng.normal(size=(count, dim))
    return features.astype(np.float32), labels


def _reference_fit(x, labels, num_classes, l2):
    """Newton's method on mean cross-entropy + l2/2 |W|^2, with torch's own derivatives."""

    def loss(flat):
        table = flat.reshape(x.shape[1] + 1, num_classes)
        penalty = l2 / 2 * table[:-1].square().sum()
        return F.cross_entropy(x @ table[:-1] + table[-1], labels) + penalty

    flat = torch.zeros((x.shape[1] + 1) * num_classes, dtype=torch.float64)
    for _ in range(30):
        gradient = torch.autograd.functional.jacobian(loss, flat)
        # the biases may shift together at no cost: a least-squares step leaves them where they are
        flat = flat - torch.linalg.pinv(torch.autograd.functional.hessian(loss, flat)) @ gradient
    assert gradient.abs().max() < 1e-12
    return flat.reshape(-1, num_classes)


@pytest.mark.parametrize("l2", STRENGTHS)
def test_the_fit_is_the_one_that_newtons_method_finds(l2):
    features, labels = clusters(90)
    x = torch.from_numpy(features).double()
    truth = torch.from_numpy(labels)
    fit = module._fitted(x, truth, l2=l2, start=module._start(6, 3))
    expected = _reference_fit(x, truth, 3, l2)
    assert fit.gradient <= 1e-7
    assert torch.allclose(fit.weight, expected[:-1], atol=1e-4)
    assert torch.allclose(fit.bias - fit.bias.mean(), expected[-1] - expected[-1].mean(), atol=1e-4)


def test_two_values_and_two_classes_have_the_log_odds_in_closed_form():
    # x = 1 is class 1 in 3 of 4 cases, x = -1 in 1 of 4: without a penalty the odds are 3 and 1/3
    x = torch.tensor([[1.0], [-1.0]], dtype=torch.float64).repeat_interleave(4, dim=0)
    labels = torch.tensor([1, 1, 1, 0, 0, 0, 0, 1])
    fit = module._fitted(x, labels, l2=0.0, start=module._start(1, 2))
    difference = fit.logits(torch.tensor([[1.0]], dtype=torch.float64)).diff()
    assert difference.item() == pytest.approx(np.log(3), abs=1e-6)


def test_clusters_are_told_apart_and_shuffled_labels_are_not():
    features, labels = clusters(1500, noise=0.3)
    test, truth = clusters(900, noise=0.3, seed=1)
    probe = linear_probe(features, labels, test, num_classes=3)
    assert (probe.predictions == truth).mean() > 0.9 and probe.gradient <= 1e-7
    shuffled = np.random.default_rng(0).permutation(labels)
    by_chance = linear_probe(features, shuffled, test, num_classes=3)
    assert abs((by_chance.predictions == truth).mean() - 1 / 3) < 0.07


def test_the_strength_is_the_one_with_the_lowest_loss_on_what_was_held_out():
    features, labels = clusters(60, dim=40, noise=1.0)
    probe = linear_probe(features, labels, features, num_classes=3)
    assert set(probe.held_out_loss) == set(STRENGTHS)
    assert probe.held_out_loss[probe.l2] == min(probe.held_out_loss.values())
    assert probe.held_out_loss[1e-5] > 2 * probe.held_out_loss[probe.l2], "it matters here"


def test_scale_and_place_of_a_feature_do_not_matter():
    features, labels = clusters(300)
    test, _ = clusters(200, seed=1)
    plain = linear_probe(features, labels, test, num_classes=3)
    scale, shift = np.float32([1e-3, 1e3, 1, 2, 8, 1]), np.float32([0, 5, -3, 0, 1, 100])
    moved = linear_probe(features * scale + shift, labels, test * scale + shift, num_classes=3)
    assert (plain.predictions == moved.predictions).mean() > 0.99  # float32 rounds what is moved


def test_a_feature_that_never_varies_in_training_counts_for_nothing():
    features, labels = clusters(300)
    test, _ = clusters(200, seed=1)
    plain = linear_probe(features, labels, test, num_classes=3)
    constant = np.full((300, 1), 0.1, np.float32)
    noise = np.random.default_rng(0).normal(size=(200, 1)).astype(np.float32)
    wider = linear_probe(
        np.hstack([features, constant]), labels, np.hstack([test, noise]), num_classes=3
    )
    assert np.array_equal(plain.predictions, wider.predictions)


def test_the_same_seed_gives_the_same_answers():
    features, labels = clusters(100)
    first, again = (linear_probe(features, labels, features, num_classes=3) for _ in range(2))
    other = linear_probe(features, labels, features, num_classes=3, seed=1)
    assert first.held_out_loss == again.held_out_loss != other.held_out_loss
    assert np.array_equal(first.predictions, again.predictions)


def test_the_only_image_of_a_class_is_trained_on():
    features, labels = clusters(30, noise=0.1)
    alone = np.append(np.flatnonzero(labels != 2), 2)
    probe = linear_probe(features[alone], labels[alone], features, num_classes=3)
    assert (probe.predictions == labels).mean() > 0.9


def test_one_image_a_class_is_refused():
    features, labels = clusters(3)
    with pytest.raises(DataError, match="found: one image a class"):
        linear_probe(features, labels, features, num_classes=3)


def test_what_is_no_number_is_refused():
    features, labels = clusters(30)
    broken = np.where(features > 1, np.inf, features)
    with pytest.raises(DataError, match="NaN or infinity"):
        linear_probe(broken, labels, features, num_classes=3)
