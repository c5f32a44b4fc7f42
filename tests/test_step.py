import math

import pytest
import torch
from torch import nn

from edgereg.recipe import Recipe
from edgereg.regularize.sam import SamConfig
from edgereg.train.compute import ComputeConfig
from edgereg.train.distributed import World
from edgereg.train.optim import OptimConfig
from edgereg.train.step import Loss, Part, Place, Stepper


class Objective(nn.Module):
    """A small net whose loss is mean squared error, and which notes where it was called."""

    def __init__(self, dropout=0.0, batchnorm=True):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Flatten(),
            nn.Linear(12, 8),
            nn.BatchNorm1d(8) if batchnorm else nn.Identity(),
            nn.Dropout(dropout),
            nn.Linear(8, 1),
        )
        self.places, self.factor, self.outputs = [], 1.0, []

    def forward(self, images, indices, place):
        self.places.append(place)
        out = self.net(images.float() / 255)
        self.outputs.append(out.detach().clone())
        loss = ((out[:, 0] - indices) ** 2).mean() * self.factor
        return Loss(loss, torch.tensor(len(indices) // 2))


def part(start, count):
    generator = torch.Generator().manual_seed(start)
    images = torch.randint(0, 256, (count, 3, 2, 2), generator=generator, dtype=torch.uint8)
    return Part(torch.arange(start, start + count), images)


def stepper(objective, **settings):
    recipe = Recipe(**settings)
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.01, momentum=0.9)
    return Stepper(objective, optimizer, recipe, World()), optimizer


def snapshot(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def test_a_step_descends_the_loss():
    objective = Objective()
    take, _ = stepper(objective)
    losses = [take([part(0, 8)], epoch=0, step=n).loss for n in range(30)]
    assert losses[-1] < 0.6 * losses[0]


def test_parts_add_up_to_the_batch():
    whole, cut = Objective(batchnorm=False), Objective(batchnorm=False)
    batch = part(0, 8)
    parts = [Part(batch.indices[a:b], batch.images[a:b]) for a, b in ((0, 3), (3, 8))]
    first = stepper(whole)[0]([batch], epoch=0, step=0)
    second = stepper(cut)[0](parts, epoch=0, step=0)
    assert first.loss == pytest.approx(second.loss, rel=1e-6) and first.count == second.count == 8
    for a, b in zip(whole.parameters(), cut.parameters(), strict=True):
        assert (a - b).abs().max() < 1e-6
    assert [p.part for p in cut.places] == [0, 1]


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_loss_that_is_no_number_leaves_no_trace(factor):
    objective = Objective()
    take, optimizer = stepper(objective)
    take([part(0, 8)], epoch=0, step=0)
    before, moments = snapshot(objective), snapshot_moments(optimizer)
    objective.factor = factor
    skipped = take([part(8, 8)], epoch=0, step=1)
    assert skipped.is_skipped and not math.isfinite(skipped.loss)
    assert same(before, snapshot(objective)), "weights or BatchNorm's statistics have moved"
    assert same(moments, snapshot_moments(optimizer))
    objective.factor = 1.0
    assert not take([part(16, 8)], epoch=0, step=2).is_skipped
    assert not same(before, snapshot(objective))


def test_a_gradient_that_is_no_number_leaves_no_trace():
    objective = Objective()
    take, _ = stepper(objective)
    hook = objective.net[1].weight.register_hook(lambda g: torch.full_like(g, math.nan))
    before = snapshot(objective)
    step = take([part(0, 8)], epoch=0, step=0)
    assert step.is_skipped and math.isfinite(step.loss) and same(before, snapshot(objective))
    hook.remove()
    assert not take([part(0, 8)], epoch=0, step=1).is_skipped


def snapshot_moments(optimizer):
    return {
        f"{i}.{k}": v.clone()
        for i, s in optimizer.state_dict()["state"].items()
        for k, v in s.items()
    }


def test_the_masks_of_dropout_are_a_function_of_seed_step_and_part():
    def outputs(seed, steps):
        objective = Objective(dropout=0.5)
        take, optimizer = stepper(objective, seed=seed)
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        for step in steps:
            torch.rand(3)  # whoever else draws must not matter
            take([part(0, 8), part(0, 8)], epoch=0, step=step)
        return objective.outputs

    straight, resumed, other = outputs(0, [0, 1]), outputs(0, [1]), outputs(1, [1])
    assert torch.equal(straight[2], resumed[0]) and torch.equal(straight[3], resumed[1])
    assert not torch.equal(straight[2], straight[3]) and not torch.equal(straight[2], straight[0])
    assert not torch.equal(resumed[0], other[0])


def test_the_gradient_is_clipped_to_its_norm():
    free, clipped = Objective(), Objective()
    stepper(free)[0]([part(50, 8)], epoch=0, step=0)
    before = snapshot(clipped)
    optim = OptimConfig(clip=0.5)
    stepper(clipped, optim=optim)[0]([part(50, 8)], epoch=0, step=0)
    start = torch.cat([before[n].flatten() for n, _ in clipped.named_parameters()])
    moved = torch.cat([p.detach().flatten() for p in clipped.parameters()]) - start
    unbound = torch.cat([p.detach().flatten() for p in free.parameters()]) - start
    assert moved.norm() == pytest.approx(0.01 * 0.5, rel=1e-3) and unbound.norm() > 0.01


def test_sharpness_aware_steps_take_the_gradient_nearby_and_the_statistics_once():
    plain, sharp = Objective(dropout=0.3), Objective(dropout=0.3)
    stepper(plain)[0]([part(0, 8)], epoch=0, step=0)
    stepper(sharp, sam=SamConfig(rho=0.5))[0]([part(0, 8)], epoch=0, step=0)
    assert len(sharp.places) == 2 and sharp.places[0] == sharp.places[1] == Place(0, 0, 0)
    assert torch.equal(plain.net[2].running_mean, sharp.net[2].running_mean)
    assert sharp.net[2].num_batches_tracked == 1
    assert not torch.equal(plain.net[1].weight, sharp.net[1].weight)


def test_flags_pass_through():
    step = stepper(Objective())[0]([part(0, 8)], epoch=0, step=0, flags=(1.0, 0.0))
    assert step.flags == (1.0, 0.0) and step.correct == 4


def test_bf16_leaves_weights_and_moments_in_float32():
    objective = Objective()
    take, optimizer = stepper(objective, compute=ComputeConfig(precision="bf16"))
    take([part(0, 8)], epoch=0, step=0)
    assert {t.dtype for t in objective.parameters()} == {torch.float32}
    assert {t.dtype for t in snapshot_moments(optimizer).values()} == {torch.float32}
