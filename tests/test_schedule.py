import math
from itertools import pairwise

import pytest
import torch
from torch.optim.lr_scheduler import OneCycleLR

from edgereg.train.optim import OptimConfig, build_optimizer
from edgereg.train.schedule import Settings, apply_settings, settings_at


def shares(steps, **config):
    return [settings_at(OptimConfig(**config), step, steps).lr_share for step in range(steps)]


def _reference_cosine(step, *, warmup, steps):
    """1608.03983, equation 5, after a linear rise."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def test_the_cosine_rises_and_falls_as_its_equation():
    wanted = [_reference_cosine(step, warmup=20, steps=100) for step in range(100)]
    assert shares(100, schedule="cosine", warmup=0.2) == pytest.approx(wanted)


def test_the_last_rate_is_a_floor():
    found = shares(100, schedule="cosine", warmup=0.0, final_lr=0.1)
    assert min(found) == found[-1] > 0.1 and found[0] == 1.0
    assert found[50] == pytest.approx(0.55)


def test_linear_falls_in_a_straight_line():
    found = shares(50, schedule="linear", warmup=0.2)
    falls = [a - b for a, b in pairwise(found[10:])]
    assert falls == pytest.approx([1 / 40] * 39)


def test_constant_rises_and_stays():
    found = shares(50, schedule="constant", warmup=0.1)
    assert found[5:] == [1.0] * 45 and found[:5] == sorted(found[:5])


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize(("steps", "warmup"), [(100, 0.3), (37, 0.25), (11, 0.5)])
def test_one_cycle_is_torchs(steps, warmup, kind):
    weight = torch.nn.Parameter(torch.zeros(1))
    make = {
        "sgd": lambda: torch.optim.SGD([weight], lr=0.4, momentum=0.9),
        "adamw": lambda: torch.optim.AdamW([weight], lr=0.4),
    }[kind]
    theirs, ours = make(), make()
    schedule = OneCycleLR(
        theirs, max_lr=0.4, total_steps=steps, pct_start=warmup, final_div_factor=4.0
    )
    config = OptimConfig(
        name=kind, lr=0.4, schedule="onecycle", warmup=warmup, final_lr=1 / 25 / 4.0
    )
    for step in range(steps):
        apply_settings(ours, settings_at(config, step, steps), config)
        for key in ("lr", "momentum" if kind == "sgd" else "betas"):
            found, wanted = (o.param_groups[0][key] for o in (ours, theirs))
            assert found == pytest.approx(wanted, rel=1e-9), (step, key)
        weight.grad = torch.zeros(1)
        theirs.step()
        schedule.step()


def test_a_groups_scale_multiplies_its_rate():
    weights = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": weights[:1], "lr_scale": 0.1}, {"params": weights[1:]}])
    apply_settings(optimizer, Settings(0.5), OptimConfig(lr=2.0))
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.1, 1.0])
    assert [group["momentum"] for group in optimizer.param_groups] == [0, 0]


def test_muons_momentum_follows_the_schedule_beside_adamws_betas():
    module = torch.nn.Linear(3, 3)
    optimizer = build_optimizer(module, OptimConfig("muon"))
    apply_settings(optimizer, Settings(1.0, 0.7), OptimConfig("muon"))
    assert [group["momentum"] for group in optimizer.param_groups] == [0.7] * len(
        optimizer.param_groups
    )
    assert all(group["betas"] == (0.7, 0.95) for group in optimizer.param_groups)
