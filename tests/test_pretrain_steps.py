"""What a step of pre-training leaves behind: in banks, queues and statistics."""

import math

import pytest
import torch

from edgereg.checkpoint import Checkpoint, save_checkpoint
from edgereg.models.zoo import build_model
from edgereg.recipe import recipe_from_json
from edgereg.train.distributed import World
from edgereg.train.pretrain import METHODS, Pretraining
from edgereg.train.step import Part, Stepper

SIZE, BATCH = 40, 8
TINY = {"model": {"name": "resnet", "width": 4, "image_size": 32}, "pirl": {"loss": "nce"}}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    path = tmp_path_factory.mktemp("teacher") / "teacher"
    recipe = recipe_from_json({"model": {"name": "resnet", "width": 4}})
    backbone = build_model(recipe.model, num_classes=1, seed=1).backbone
    save_checkpoint(path, backbone, Checkpoint("encoder", recipe, (), {}, {}))
    return str(path)


def steps(method, teacher, **settings):
    """Return an objective, and what takes a step of it."""
    recipe = recipe_from_json(TINY | settings | {"method": method, "distill": {"teacher": teacher}})
    model = build_model(recipe.model, num_classes=1, seed=0)
    objective = Pretraining(model, sample=images(16, 9), size=SIZE, recipe=recipe).train()
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.01)
    return objective, Stepper(objective, optimizer, recipe, World())


def images(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)


def part(start, count=BATCH):
    return Part(torch.arange(start, start + count), images(count, start))


def snapshot(objective):
    return {name: tensor.clone() for name, tensor in objective.state_dict().items()}


def differences(before, after):
    return [name for name in before if not torch.equal(before[name], after[name])]


@pytest.mark.parametrize("at", ["first", "later"])
@pytest.mark.parametrize("method", METHODS)
def test_a_skipped_step_leaves_no_trace(method, at, teacher):
    """Only the gradient is no number, as where fp16 overflows: what forward saw was fine."""
    objective, take = steps(method, teacher)
    if at == "later":
        assert not take([part(0)], epoch=0, step=0).is_skipped
    before = snapshot(objective)
    weight = next(objective.parameters())
    handle = weight.register_hook(lambda gradient: gradient * math.inf)
    halves = [part(BATCH, 4), part(BATCH + 4, 4)]
    assert take(halves, epoch=0, step=1).is_skipped
    assert differences(before, snapshot(objective)) == []
    handle.remove()
    assert not take(halves, epoch=0, step=1).is_skipped
    moved = differences(before, snapshot(objective))
    memory = {"pirl": "method.bank.rows", "distill": "method.queue"}.get(method, "running_mean")
    assert any(name.endswith(memory) for name in moved)


@pytest.mark.parametrize("method", ["pirl", "distill"])
def test_a_network_that_answers_with_no_numbers_is_skipped_and_forgotten(method, teacher):
    objective, take = steps(method, teacher)
    before = snapshot(objective)
    with torch.no_grad():
        weight = next(objective.method.backbone.parameters())
        kept = weight.clone()
        weight.fill_(math.nan)
    assert take([part(0)], epoch=0, step=0).is_skipped
    with torch.no_grad():
        weight.copy_(kept)
    assert differences(before, snapshot(objective)) == []


def test_a_teacher_that_answers_with_no_numbers_is_no_teacher(teacher):
    objective, take = steps("distill", teacher)
    before = snapshot(objective)
    objective.method._teacher = lambda views: torch.full((len(views), 16), math.nan)
    assert take([part(0)], epoch=0, step=0).is_skipped
    assert differences(before, snapshot(objective)) == []
