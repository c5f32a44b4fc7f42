import math

import pytest
import torch
import torch.nn.functional as F
from ssl_setup import draws, setup
from torch import nn

from edgereg.errors import RecipeError
from edgereg.ssl.distill import Distill, DistillConfig, distillation_loss, queue_size


def unit(*shape, seed):
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()
    return F.normalize(values, dim=1)


def _reference_loss(student, teacher, known, tau):
    """KL(p || q) of softmaxes over the queue, as in 2101.04731, equations 3 and 4."""

    def softmax(z):
        e = [math.exp(float(z @ k) / tau) for k in known]
        return [x / sum(e) for x in e]

    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        total += sum(p * math.log(p / q) for p, q in zip(softmax(t), softmax(s), strict=True))
    return total / len(student)


def method(**options):
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 6)).requires_grad_(False)
    student = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 8))
    config = DistillConfig(teacher="t", **options)
    return Distill(setup(student), config, teacher=lambda x: teacher(x), teacher_dim=6), teacher


def images(count=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)


def test_the_loss_is_the_divergence_of_similarities():
    student, teacher, known = unit(3, 5, seed=1), unit(3, 5, seed=2), unit(7, 5, seed=3)
    found = distillation_loss(student, teacher, known, temperature=0.2).item()
    assert found == pytest.approx(_reference_loss(student, teacher, known, 0.2), rel=1e-9)
    assert distillation_loss(teacher, teacher, known, temperature=0.2).item() == pytest.approx(0)


def test_the_queue_holds_the_newest_teacher_embeddings_first():
    distill, _ = method(queue=6, mixes=False)
    told = []
    for seed in range(3):
        views = distill.views(images(seed=seed), draws(4))
        told.append(views[1])
        distill(views, torch.arange(4))
        assert int(distill.filled) == min(6, 4 * (seed + 1))
    assert torch.equal(distill.queue, torch.cat([told[2], told[1][:2]]))


def test_rows_that_nobody_has_filled_are_no_references():
    distill, _ = method(queue=100, mixes=False)
    views = distill.views(images(), draws(4))
    found = distill(views, torch.arange(4))
    answer = F.normalize(distill.head(distill.backbone(views[0])), dim=1)
    expected = distillation_loss(answer, views[1], views[1], temperature=0.07)
    assert torch.equal(found, expected)


def test_both_see_the_same_mixed_image():
    distill, teacher = method()
    shown, told = distill.views(images(), draws(4))
    assert torch.equal(told, F.normalize(teacher(shown), dim=1))
    plain = images().float() / 255
    share = draws(4)(1).uniform("share")[:, :, None, None]
    assert torch.allclose(shown, (1 - share) * plain + share * plain.flip(0))
    assert not torch.allclose(shown, plain)


def test_the_teacher_is_not_trained_and_no_part_of_the_state():
    distill, teacher = method()
    distill(distill.views(images(), draws(4)), torch.arange(4)).backward()
    assert teacher[1].weight.grad is None
    assert {name.partition(".")[0] for name in distill.state_dict()} == {
        "backbone",
        "head",
        "queue",
        "filled",
    }


@pytest.mark.parametrize(("taken", "filled"), [(False, 4), (True, 12)])
def test_what_a_step_left_in_the_queue_is_taken_back_together_or_not_at_all(taken, filled):
    distill, _ = method()
    distill(distill.views(images(), draws(4)), torch.arange(4))
    distill.end_step(taken=True)
    before = distill.queue.clone()
    for seed in (1, 2):
        distill(distill.views(images(seed=seed), draws(4)), torch.arange(4))
    distill.end_step(taken=taken)
    assert torch.equal(distill.queue, before) != taken and int(distill.filled) == filled


def test_a_teachers_answer_that_is_no_number_gives_no_loss():
    distill, _ = method()
    shown, told = distill.views(images(), draws(4))
    assert distill((shown, told * float("nan")), torch.arange(4)).isnan()


def test_the_student_comes_to_see_as_the_teacher_does():
    distill, _ = method(queue=32, mixes=False)
    views = distill.views(images(32), draws(32))
    optimizer = torch.optim.Adam(distill.parameters(), lr=0.01)
    losses = []
    for _ in range(150):
        loss = distill(views, torch.arange(32))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def test_the_queue_suits_the_data_set():
    sizes = [queue_size(n) for n in (10, 1000, 1001, 15_000, 50_000)]
    assert sizes == [256, 256, 2048, 4096, 8192]


@pytest.mark.parametrize(("key", "value"), [("temperature", 0), ("queue", -1)])
def test_impossible_settings_are_named(key, value):
    with pytest.raises(RecipeError, match=rf"distill\.{key}: {value}"):
        DistillConfig(**{key: value})
