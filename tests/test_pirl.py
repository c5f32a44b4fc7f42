import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from ssl_setup import draws, setup
from torch import nn
from uniformity import assert_uniform

from edgereg.errors import RecipeError
from edgereg.ssl.memory_bank import MemoryBank
from edgereg.ssl.pirl import Pirl, PirlConfig, infonce, nce

N, TAU = 30, 0.07
PROPERTY = settings(max_examples=40, deadline=None, derandomize=True, database=None)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def method(**options):
    torch.manual_seed(0)
    backbone = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    config = PirlConfig(dim=16, negatives=12, **options)
    return Pirl(setup(backbone, size=N), config)


def batch(transform="jigsaw"):
    generator = torch.Generator().manual_seed(1)
    shape = (5, 3, 32, 32) if transform == "rotation" else (5, 9, 3, 8, 8)
    images = torch.randn(5, 3, 32, 32, generator=generator)
    transformed = torch.randn(shape, generator=generator)
    return (images, transformed), torch.tensor([7, 0, 29, 12, 3])


def _reference_nce(query, positive, negatives, *, size, normaliser):
    """What VISSL's losses/nce_loss.py computes, as the guide writes it (section 1.1)."""
    eps = torch.finfo(torch.float32).eps
    share = negatives.shape[0] / size  # K * Pn
    total = 0.0
    for q, m in zip(query, positive, strict=True):
        p = math.exp(m @ q / TAU) / normaliser
        loss = -math.log(p / (p + share + eps))
        for other in negatives:
            p = math.exp(other @ q / TAU) / normaliser
            loss -= math.log(share / (p + share + eps))
        total += loss / len(query)
    return total


def _reference_infonce(query, positive, negatives):
    logits = torch.cat([(query * positive).sum(dim=1, keepdim=True), query @ negatives.T], dim=1)
    return F.cross_entropy(logits / TAU, torch.zeros(len(query), dtype=torch.int64)).item()


def unit(*shape, seed):
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()
    return F.normalize(values, dim=1)


@PROPERTY
@given(negatives=st.integers(1, 4096), size=st.integers(2, 10**6))
def test_at_zero_similarity_both_losses_have_their_closed_form(negatives, size):
    nothing = torch.zeros(2, dtype=torch.float64), torch.zeros(2, negatives, dtype=torch.float64)
    k = negatives
    expected = math.log(1 + k) + k * math.log((k + 1) / k)
    assert nce(*nothing, size=size, normaliser=size).item() == pytest.approx(expected, rel=1e-12)
    assert infonce(*nothing).item() == pytest.approx(math.log(1 + k), rel=1e-12)


@pytest.mark.parametrize("normaliser", [50.0, 3000.0])
def test_nce_is_what_the_released_code_computes(normaliser):
    query, positive, negatives = (unit(n, 16, seed=n) for n in (4, 5, 20))
    positive = positive[:4]
    found = nce(
        (query * positive).sum(dim=1) / TAU,
        query @ negatives.T / TAU,
        size=50,
        normaliser=normaliser,
    )
    expected = _reference_nce(query, positive, negatives, size=50, normaliser=normaliser)
    assert found.item() == pytest.approx(expected, rel=1e-5)  # their eps is 1.2e-7


def test_infonce_is_the_cross_entropy_of_explicit_logits():
    query, positive, negatives = (unit(n, 16, seed=n) for n in (5, 5, 20))
    found = infonce((query * positive).sum(dim=1) / TAU, query @ negatives.T / TAU)
    assert found.item() == pytest.approx(_reference_infonce(query, positive, negatives), rel=1e-12)


@pytest.mark.parametrize("sign", [-1, 1])
def test_nce_stays_finite_at_the_ends_of_similarity(sign):
    positive, others = torch.tensor([sign / TAU]), torch.full((1, 8), -sign / TAU)
    assert nce(positive, others, size=10**6, normaliser=1e12).isfinite()


@pytest.mark.parametrize("loss", ["infonce", "nce"])
def test_the_loss_weighs_patches_and_images_as_equation_5(loss):
    pirl, (views, indices) = method(loss=loss, transform_weight=0.3), batch()
    with torch.no_grad():
        f, g = pirl.embed_image(views[0]).double(), pirl.embed_transformed(views[1]).double()
    state = torch.get_rng_state()
    drawn = pirl.bank.draw(12)
    torch.set_rng_state(state)
    before = pirl.bank.rows.double()  # of before the update
    rows, negatives = before[indices], before[drawn]
    assert set(drawn.tolist()) & set(indices.tolist()), "the case where an image draws itself"
    found = pirl(views, indices).item()
    if loss == "nce":
        z = ((g @ negatives.T) / TAU).exp().mean().item() * N  # of the patches, the first scored
        assert pirl.normaliser.item() == pytest.approx(z, rel=1e-5)
        by_g, by_f = (_reference_nce(q, rows, negatives, size=N, normaliser=z) for q in (g, f))
    else:
        others = [before[[d for d in drawn.tolist() if d != i]] for i in indices.tolist()]
        by_g, by_f = (
            sum(_reference_infonce(q[i : i + 1], rows[i : i + 1], others[i]) for i in range(5)) / 5
            for q in (g, f)
        )
    assert abs(by_g - by_f) > 0.01
    assert found == pytest.approx(0.3 * by_g + 0.7 * by_f, rel=1e-4)


def test_the_normaliser_is_estimated_once():
    pirl = method(loss="nce")
    pirl(*batch())
    first = pirl.normaliser.clone()
    pirl(*batch())
    assert first > 0 and torch.equal(pirl.normaliser, first)


@pytest.mark.parametrize("loss", ["infonce", "nce"])
@pytest.mark.parametrize(
    ("weight", "silent"),
    [(0.0, {"transform_head", "patch_head"}), (1.0, {"image_head"}), (0.5, set())],
)
def test_a_weight_of_zero_or_one_leaves_one_head_exactly_without_gradient(loss, weight, silent):
    pirl = method(loss=loss, transform_weight=weight)
    pirl(*batch()).backward()
    heads = ("image_head", "transform_head", "patch_head")
    without = {name for name in heads if (getattr(pirl, name).weight.grad == 0).all()}
    assert without == silent
    assert all((getattr(pirl, name).bias.grad == 0).all() for name in silent)
    assert (pirl.backbone[0].weight.grad != 0).any()


def test_the_bank_is_no_parameter_and_is_saved_with_the_normaliser():
    pirl = method(loss="nce")
    pirl(*batch())
    assert not any(name.startswith("bank") for name, _ in pirl.named_parameters())
    other = method(loss="nce")
    assert not torch.equal(other.bank.rows, pirl.bank.rows)
    other.load_state_dict(pirl.state_dict())
    assert torch.equal(other.bank.rows, pirl.bank.rows)
    assert other.normaliser == pirl.normaliser > 0


def test_a_step_moves_the_rows_of_its_images_only_towards_the_image_head():
    pirl, (views, indices) = method(momentum=0.25), batch()
    with torch.no_grad():
        f = pirl.embed_image(views[0])
    before = pirl.bank.rows.clone()
    pirl(views, indices)
    untouched = torch.ones(N, dtype=torch.bool)
    untouched[indices] = False
    assert torch.equal(pirl.bank.rows[untouched], before[untouched])
    expected = F.normalize(0.25 * before[indices] + 0.75 * f, dim=1)
    assert (pirl.bank.rows[indices] - expected).abs().max() < 1e-6


@PROPERTY
@given(momentum=st.floats(0, 1), data=st.data())
def test_rows_have_unit_length_and_the_others_keep_their_bits(momentum, data):
    bank = MemoryBank(N, 16, momentum=momentum)
    indices = data.draw(st.lists(st.integers(0, N - 1), min_size=1, max_size=N, unique=True))
    before = bank.rows.clone()
    embeddings = unit(len(indices), 16, seed=3).float()
    bank.update(torch.tensor(indices), embeddings)
    assert (bank.rows.norm(dim=1) - 1).abs().max() < 1e-6
    others = [i for i in range(N) if i not in indices]
    assert torch.equal(bank.rows[others], before[others])
    if momentum == 1:
        assert (bank.rows - before).abs().max() < 1e-6
    if momentum == 0:
        assert (bank.rows[indices] - embeddings).abs().max() < 1e-6


@pytest.mark.parametrize(("momentum", "source"), [(1.0, "before"), (0.0, "embeddings")])
def test_momentum_one_keeps_a_row_and_zero_replaces_it(momentum, source):
    bank = MemoryBank(N, 16, momentum=momentum)
    indices = torch.tensor([4, 2])
    rows = {"before": bank.rows[indices], "embeddings": unit(2, 16, seed=3).float()}
    bank.update(indices, rows["embeddings"])
    assert (bank.rows[indices] - rows[source]).abs().max() < 1e-6


@pytest.mark.parametrize("taken", [False, True])
def test_the_updates_of_a_step_are_taken_back_together_or_not_at_all(taken):
    bank = MemoryBank(N, 16)
    before = bank.rows.clone()
    for indices in ([4, 2], [7, 9]):
        bank.update(torch.tensor(indices), unit(2, 16, seed=3).float())
    bank.end_step(taken=taken)
    changed = (bank.rows != before).any(dim=1).nonzero().flatten().tolist()
    assert changed == ([2, 4, 7, 9] if taken else [])
    moved = bank.rows.clone()
    bank.end_step(taken=False)
    assert torch.equal(bank.rows, moved), "what was kept is no longer taken back"


def test_negatives_are_drawn_evenly_and_with_replacement():
    bank = MemoryBank(8, 16, momentum=0.5)
    assert_uniform(bank.draw(2000), 8)


def test_embeddings_have_unit_length():
    pirl, (views, _) = method(), batch()
    for embedding in (pirl.embed_image(views[0]), pirl.embed_transformed(views[1])):
        assert embedding.shape == (5, 16)
        assert (embedding.norm(dim=1) - 1).abs().max() < 1e-6


def test_patches_share_one_projection_and_their_order_matters():
    pirl, ((_, patches), _) = method(), batch()
    seen = []
    pirl.transform_head.register_forward_hook(lambda m, x, y: seen.append(y.reshape(5, 9, -1)))
    order = torch.tensor([4, 0, 8, 2, 6, 1, 3, 7, 5])
    straight, shuffled = (pirl.embed_transformed(each) for each in (patches, patches[:, order]))
    assert (seen[0][:, order] - seen[1]).abs().max() < 1e-6
    assert (straight - shuffled).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", 0),
        ("transform_weight", 1.1),
        ("momentum", -0.1),
        ("negatives", 0),
        ("dim", 1),
    ],
)
def test_impossible_settings_are_named(key, value):
    with pytest.raises(RecipeError, match=rf"pirl\.{key}: {value}"):
        PirlConfig(**{key: value})


def corner(transform):
    """Return a method, and images whose bright corner tells how they were turned."""
    images = torch.zeros(64, 3, 32, 32, dtype=torch.uint8)
    images[:, :, :16, :16] = 255
    return method(transform=transform), images


def test_the_rotation_turns_each_image_by_a_quarter_of_its_own():
    pirl, images = corner("rotation")
    straight, turned = pirl.views(images, draws(64))
    assert torch.equal(straight, images.float() / 255)
    places = turned[:, 0, ::31, ::31].flatten(1).argmax(dim=1)
    quarters = draws(64)(1).integers("turn", 4)[:, 0]
    # counter-clockwise: top left, bottom left, bottom right, top right
    assert torch.equal(places, torch.tensor([0, 2, 3, 1])[quarters])
    assert set(quarters.tolist()) == {0, 1, 2, 3}


def test_both_turns_the_image_before_it_is_cut():
    pirl, images = corner("both")
    _, patches = pirl.views(images, draws(64))
    cut, _ = corner("jigsaw")
    _, straight = cut.views(images, draws(64))
    assert patches.shape == straight.shape == (64, 9, 3, 8, 8)
    still = draws(64)(1).integers("turn", 4)[:, 0] == 0
    same = (patches == straight).flatten(1).all(dim=1)
    assert torch.equal(same, still)


@pytest.mark.parametrize("transform", ["rotation", "both"])
@pytest.mark.parametrize("heads", ["linear", "mlp"])
def test_every_form_learns_a_small_batch_by_heart(transform, heads):
    pirl = method(transform=transform, heads=heads, momentum=0.9)
    optimizer = torch.optim.Adam(pirl.parameters(), lr=0.01)
    losses = []
    for _ in range(60):
        loss = pirl(*batch(transform))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert min(losses[-5:]) < losses[0] - 0.5


def test_only_whole_images_reach_batchnorms_running_statistics():
    pirl = method()
    pirl.backbone.insert(1, nn.BatchNorm2d(8))
    (images, patches), _ = batch()
    pirl.embed_transformed(patches)
    norm = pirl.backbone[1]
    assert int(norm.num_batches_tracked) == 0 and torch.equal(norm.running_mean, torch.zeros(8))
    pirl.embed_image(images)
    assert int(norm.num_batches_tracked) == 1


def test_the_rotation_has_no_head_for_patches():
    names = {name.partition(".")[0] for name, _ in method(transform="rotation").named_parameters()}
    assert names == {"backbone", "image_head", "transform_head"}


def test_the_mlp_heads_have_a_hidden_layer_without_batchnorm():
    kinds = [type(m).__name__ for m in method(heads="mlp").image_head]
    assert kinds == ["Linear", "ReLU", "Linear"]
