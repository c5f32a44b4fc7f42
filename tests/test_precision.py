"""Autocast is for the network: a loss of the same vectors is the same to the bit within it."""

import pytest
import torch
from ssl_setup import setup
from torch import nn

from edgereg.ssl.distill import Distill, DistillConfig
from edgereg.ssl.lejepa import LeJepa, LeJepaConfig
from edgereg.ssl.pirl import Pirl, PirlConfig
from edgereg.ssl.simclr import SimClr, SimClrConfig
from edgereg.ssl.vicreg import VicReg, VicRegConfig

DIM, BATCH = 12, 10


def vectors(count, seed):
    return torch.randn(count, DIM, generator=torch.Generator().manual_seed(seed))


def pirl(loss):
    method = Pirl(setup(nn.Identity()), PirlConfig(transform="rotation", dim=DIM, loss=loss))
    method.image_head = method.transform_head = nn.Identity()
    return method


def joined(kind, config):
    method = kind(setup(nn.Identity()), config)
    method.projector = nn.Identity()
    return method


def distill():
    method = Distill(
        setup(nn.Identity()), DistillConfig(queue=20), teacher=lambda x: x, teacher_dim=DIM
    )
    method.head = nn.Identity()
    return method


PAIRS = (vectors(BATCH, 0), vectors(BATCH, 1))
CASES = {
    "pirl": (lambda: pirl("infonce"), PAIRS),
    "pirl, nce": (lambda: pirl("nce"), PAIRS),
    "simclr": (lambda: joined(SimClr, SimClrConfig(temperature=0.1)), (vectors(2 * BATCH, 2),)),
    "vicreg": (lambda: joined(VicReg, VicRegConfig()), (vectors(2 * BATCH, 2),)),
    "lejepa": (lambda: joined(LeJepa, LeJepaConfig(dim=DIM)), (vectors(2 * BATCH, 2),)),
    "distill": (distill, (PAIRS[0], nn.functional.normalize(PAIRS[1], dim=1))),
}


@pytest.mark.parametrize("case", CASES)
def test_products_within_a_loss_are_not_rounded_to_half_precision(case):
    build, views = CASES[case]
    found = []
    for is_half in (False, True):
        torch.manual_seed(0)  # the bank, what is drawn from it, and the slices
        method = build()
        with torch.autocast("cpu", torch.bfloat16, enabled=is_half):
            found.append(method(views, torch.arange(BATCH)))
    assert torch.equal(*found) and found[0] > 0.01
