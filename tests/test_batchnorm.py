import copy
import gc

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from edgereg.errors import DataError, RecipeError
from edgereg.models.zoo import Classifier, ModelConfig, build_model
from edgereg.regularize.batchnorm import (
    BatchNormConfig,
    batchnorms,
    configure_batchnorm,
    recompute_statistics,
    restore_statistics,
    save_statistics,
)
from edgereg.regularize.dropout import Dropout
from edgereg.regularize.placement import place
from edgereg.regularize.sync_batchnorm import SynchronisedBatchNorm, synchronise


def images(count=6, *, seed=0, side=16):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def small(**options):
    model = build_model(ModelConfig(width=8, blocks=(1,)), num_classes=3)
    return configure_batchnorm(model, BatchNormConfig(**options))


def row(norm):
    """Return a classifier that is a BatchNorm and little else."""
    return Classifier(
        nn.Sequential(norm, nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        feature_dim=norm.num_features,
        num_classes=2,
    )


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, SynchronisedBatchNorm])
def test_the_running_statistics_are_those_of_the_guide(kind):
    norm = kind(1).train()
    norm(torch.tensor([[1.0], [2.0], [4.0], [9.0]]))
    # from 0 and 1: 0.1 * 4, and 0.9 + 0.1 * 38 / 3, the unbiased variance
    assert norm.running_mean.item() == pytest.approx(0.4, abs=1e-6)
    assert norm.running_var.item() == pytest.approx(2.16667, abs=1e-5)


def test_the_momentum_is_that_of_the_recipe():
    model = small(momentum=0.25)
    assert {norm.momentum for _, norm in batchnorms(model)} == {0.25}
    model.train()(images())
    first = model.backbone.stem[0](images())
    expected = 0.25 * first.mean((0, 2, 3))
    torch.testing.assert_close(model.backbone.stem[1].running_mean, expected, rtol=1e-5, atol=1e-6)


def test_frozen_statistics_are_used_and_stay_while_gains_learn():
    model, plain = small(frozen=True), small()
    before = save_statistics(model)
    model.train()(images()).logsumexp(1).sum().backward()
    assert all(map(torch.equal, before, save_statistics(model)))
    assert model.backbone.stem[1].weight.grad.abs().max() > 0
    assert torch.equal(model(images()), plain.eval()(images()))
    plain.train()(images())
    assert not all(map(torch.equal, before, save_statistics(plain))), "the negative control"


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"momentum": 0.0}, r"batchnorm\.momentum: 0\.0"),
        ({"momentum": 1.5}, r"batchnorm\.momentum: 1\.5"),
        ({"recompute": -1}, r"batchnorm\.recompute: -1"),
        ({"frozen": True, "sync": True}, r"batchnorm\.frozen: true, batchnorm\.sync: True"),
        ({"frozen": True, "recompute": 9}, r"batchnorm\.recompute: 9"),
    ],
)
def test_impossible_settings_are_named(settings, match):
    with pytest.raises(RecipeError, match=match):
        BatchNormConfig(**settings)


@pytest.mark.parametrize("sizes", [[40], [10, 10, 20], [7, 1, 32]])
def test_recomputed_statistics_are_those_of_all_values_together(sizes):
    model = row(nn.BatchNorm2d(3)).double()
    x = (images(40).double() + 100) * torch.tensor([1e-3, 1.0, 50.0])[:, None, None]
    recompute_statistics(model, x.split(sizes))
    norm, values = model.backbone[0], x.transpose(0, 1).flatten(1)
    torch.testing.assert_close(norm.running_mean, values.mean(1), rtol=1e-12, atol=0)
    torch.testing.assert_close(norm.running_var, values.var(1), rtol=1e-9, atol=0)
    # the negative control: a mean of the batches' variances is another number
    apart = torch.stack([part.transpose(0, 1).flatten(1).var(1) for part in x.split(sizes)]).mean(0)
    if len(sizes) > 1:
        assert not torch.allclose(apart, values.var(1), rtol=1e-9)


def test_recomputing_normalises_with_the_batchs_own_statistics_and_without_dropout():
    model = small()
    for _, norm in batchnorms(model):
        nn.init.constant_(norm.running_mean, 5.0)  # as they might be after averaging weights
    place(model, [Dropout(0.9, "residual")])
    clean = copy.deepcopy(model)
    clean.backbone.blocks[0].second.regularizer.p = 0.0
    model.eval()
    recompute_statistics(model, [images()])
    assert not any(m.training for m in model.modules()), "the model is left in its mode"

    clean.train()
    for _, norm in batchnorms(clean):
        norm.momentum = 1.0  # the statistics of the last batch
    clean(images())
    for (_, ours), (_, theirs) in zip(batchnorms(model), batchnorms(clean), strict=True):
        torch.testing.assert_close(ours.running_mean, theirs.running_mean, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(ours.running_var, theirs.running_var, rtol=1e-4, atol=1e-6)


def test_recomputing_spares_what_is_frozen_and_restores_each_mode():
    model = small()
    model.resting = frozenset({"backbone.stem.1"})
    model.train()
    modes = [m.training for m in model.modules()]
    before = copy.deepcopy(model.backbone.stem[1].state_dict())
    recompute_statistics(model, [images() + 3])
    assert [m.training for m in model.modules()] == modes
    assert model.backbone.blocks[0].first[1].running_mean.abs().max() > 0
    for key, value in model.backbone.stem[1].state_dict().items():
        assert torch.equal(value, before[key])
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_recomputing_needs_a_batch():
    model = small()
    with pytest.raises(DataError, match=r"batchnorm\.recompute"):
        recompute_statistics(model, [])
    assert all(m.training for m in model.modules())


def test_saved_statistics_come_back_bit_for_bit():
    model = small().train()
    model(images())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    saved = save_statistics(model)
    model(images() * torch.nan)
    assert model.backbone.stem[1].running_mean.isnan().all()
    restore_statistics(model, saved)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    model(images())
    assert not torch.equal(saved[0], save_statistics(model)[0]), "what is saved is a copy"


def test_a_synchronised_batchnorm_keeps_names_and_dropout_and_is_plain_alone():
    plain = small()
    place(plain, [Dropout(0.5, "residual")])
    model = configure_batchnorm(copy.deepcopy(plain), BatchNormConfig(sync=True))
    assert list(model.state_dict()) == list(plain.state_dict())
    kinds = {type(norm) for _, norm in batchnorms(model)}
    assert kinds == {SynchronisedBatchNorm} and isinstance(plain.backbone.stem[1], nn.BatchNorm2d)
    for mode in (True, False):
        answers = []
        for each in (plain.train(mode), model.train(mode)):
            torch.manual_seed(0)
            answers.append(each(images()))
        assert torch.equal(*answers)


def test_a_batchnorm_with_a_forward_of_its_own_is_refused():
    class Odd(nn.BatchNorm2d):
        pass

    with pytest.raises(RecipeError, match=r"batchnorm\.sync: backbone\.0 is a Odd"):
        configure_batchnorm(row(Odd(3)), BatchNormConfig(sync=True))


def test_timms_batchnorm_still_acts_when_it_is_synchronised():
    timm = pytest.importorskip("timm", reason="the extra `timm` is not installed")
    norm = timm.layers.BatchNormAct2d(3, act_layer=nn.SiLU).train()
    expected = copy.deepcopy(norm)(images())
    synchronise(norm, what="it")
    assert isinstance(norm, SynchronisedBatchNorm) and torch.equal(norm(images()), expected)


class Nested(nn.Module):
    """BatchNorm of each kind: after a convolution, without a gain, and over vectors."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.BatchNorm2d(4, affine=False),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.BatchNorm1d(16, momentum=None),
            nn.Linear(16, 5),
        )

    def forward(self, x):
        return self.layers(x)


def nested():
    torch.manual_seed(3)
    model = Nested().double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.affine:
            nn.init.normal_(module.weight)
    return model


def learn(model, x):
    """Return gradients and buffers after a step on the mean of a nonlinear loss."""
    x = x.clone().requires_grad_()
    model(x).square().sum(1).mean().backward()
    result = {f"grad {k}": p.grad for k, p in model.named_parameters()}
    result |= {f"buffer {k}": b.double() for k, b in model.named_buffers()}
    return result, x.grad


def measure(rank, folder, sizes):
    x = images(sum(sizes)).double().split(sizes)[rank]
    model = nested()
    synchronised = copy.deepcopy(model)
    for module in synchronised.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            synchronise(module, what="it")
    half = copy.deepcopy(synchronised).float().bfloat16()
    for name, each in {"sync": synchronised, "plain": model}.items():
        wrapped = nn.parallel.DistributedDataParallel(each, broadcast_buffers=False)
        result, slope = learn(wrapped, x)
        result |= {"slope": slope / 2}  # this process's loss is half of the mean's weight
        arrays = {k.replace("module.", ""): v.detach().numpy() for k, v in result.items()}
        np.savez(f"{folder}/{name}{rank}.npz", **arrays)
    assert half(x.bfloat16()).dtype == torch.bfloat16
    uneven = images(8).double().split([5, 3])[rank]
    norm = nn.BatchNorm2d(3, momentum=1.0).double()
    synchronise(norm, what="it")
    y = norm(uneven)
    np.savez(f"{folder}/uneven{rank}.npz", y=y.detach(), var=norm.running_var)


def work(rank, folder, sizes):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    measure(rank, folder, sizes)
    dist.destroy_process_group()
    gc.collect()  # what DistributedDataParallel kept of the group, as in join_world


def test_two_processes_normalise_as_one(tmp_path):
    """Gradients, input gradients and statistics in float64; without synchronising they differ."""
    mp.spawn(work, args=(str(tmp_path), [4, 4]), nprocs=2)
    result, slope = learn(nested(), images(8).double())
    expected = {k: v.detach().numpy() for k, v in result.items()}
    worst = {}
    for name in ("sync", "plain"):
        errors = []
        for rank in range(2):
            got = np.load(tmp_path / f"{name}{rank}.npz")
            own = slope[rank * 4 : rank * 4 + 4].numpy()
            assert set(got) == {*expected, "slope"}
            errors += [np.abs(got[k] - expected[k]).max() for k in expected]
            errors.append(np.abs(got["slope"] - own).max())
        worst[name] = max(errors)
    assert worst["sync"] < 1e-12
    assert worst["plain"] > 1e-2, "the negative control"

    norm = nn.BatchNorm2d(3, momentum=1.0).double()
    together = norm(images(8).double()).detach().numpy()
    parts = [np.load(tmp_path / f"uneven{rank}.npz") for rank in range(2)]
    assert np.abs(np.concatenate([p["y"] for p in parts]) - together).max() < 1e-12
    assert all(np.abs(p["var"] - norm.running_var.numpy()).max() < 1e-12 for p in parts)
