import hashlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgereg.ssl.ab_bins import AbBins, anneal, bin_centres, rebalance
from edgereg.ssl.lab import rgb_to_lab

PROPERTY = settings(max_examples=40, deadline=None, derandomize=True, database=None)
_HASH = "5fd1ff840bb9504bc08a988f236f60c2c619bf0be531e655c353818fe597d9ce"
HULL = [  # the polygon whose multiples of 10 are the bins, counter-clockwise (the guide, 2.1)
    *((-90, 90), (-90, 50), (-80, 20), (-60, -20), (-30, -50), (10, -80), (40, -100), (60, -110)),
    *((90, -110), (100, -90), (100, 0), (90, 70), (70, 80), (40, 90), (0, 100), (-50, 100)),
]


def one(a, b):
    return torch.tensor([a, b], dtype=torch.float32).reshape(1, 2, 1, 1)


def encoded(a, b, *, neighbours):
    """Return {bin: share} of a colour."""
    places, shares = AbBins(neighbours=neighbours).encode(one(a, b))
    nodes = [tuple(map(int, node)) for node in bin_centres()[places.flatten()].tolist()]
    return dict(zip(nodes, shares.flatten().tolist(), strict=True))


def dense(bins, places, shares):
    """Return the distribution (B, 313, h, w)."""
    empty = torch.zeros(len(places), len(bins.centres), *places.shape[2:])
    return empty.scatter(1, places, shares)


def every_colour(step):
    some = torch.arange(0, 256, step).float() / 255
    axes = torch.meshgrid(some, some, torch.linspace(0, 1, 256), indexing="ij")
    return rgb_to_lab(torch.stack(axes).reshape(1, 3, -1, 256))[:, 1:]


def test_there_are_313_bins_in_the_released_order():
    nodes = bin_centres().to(torch.int64)
    assert nodes.shape == (313, 2) and nodes[:2].tolist() == [[-90, 50], [-90, 60]]
    assert nodes.tolist() == sorted(nodes.tolist())
    text = ";".join(f"{a},{b}" for a, b in nodes.tolist())
    assert hashlib.sha256(text.encode()).hexdigest() == _HASH


def test_the_bins_are_the_nodes_within_a_convex_polygon():
    def is_within(a, b):
        return all(
            (a2 - a1) * (b - b1) - (b2 - b1) * (a - a1) >= 0
            for (a1, b1), (a2, b2) in zip(HULL, HULL[1:] + HULL[:1], strict=True)
        )

    grid = range(-120, 121, 10)
    expected = [[a, b] for a in grid for b in grid if is_within(a, b)]
    assert bin_centres().to(torch.int64).tolist() == expected


def test_a_colour_at_a_bin_is_spread_as_the_guide_says():
    cross = [(10, 0), (-10, 0), (0, 10), (0, -10)]
    five, ten = encoded(0, 0, neighbours=5), encoded(0, 0, neighbours=10)
    expected = {(0, 0): 0.648786} | dict.fromkeys(cross, 0.087804)
    assert five == pytest.approx(expected, abs=1e-6)
    # the tenth is a tie
    diagonal = [(10, 10), (10, -10), (-10, 10), (-10, -10)]
    expected = {(0, 0): 0.619218} | dict.fromkeys(cross, 0.083802)
    expected |= dict.fromkeys(diagonal, 0.011341)
    assert len(ten) == 10
    assert {node: ten[node] for node in expected} == pytest.approx(expected, abs=1e-6)


def test_a_colour_between_bins_is_spread_as_the_guide_says():
    expected = {
        **{(0, 0): 0.406239, (0, -10): 0.272310, (10, 0): 0.182535},
        **{(10, -10): 0.122357, (-10, 0): 0.016559},
    }
    found = encoded(3, -4, neighbours=5)
    assert found == pytest.approx(expected, abs=1e-6)
    assert next(iter(found)) == (0, 0), "the nearest comes first"
    middle = encoded(5, 5, neighbours=5)
    for node in [(0, 0), (0, 10), (10, 0), (10, 10)]:  # the fifth is a tie
        assert middle[node] == pytest.approx(0.24886, abs=1e-5)


@pytest.mark.parametrize(("neighbours", "worst"), [(5, 0.75), (10, 0.45)])
def test_every_colour_is_close_to_the_mean_of_its_distribution(neighbours, worst):
    bins, ab = AbBins(neighbours=neighbours), every_colour(17)
    places, shares = bins.encode(ab)
    assert places.shape == (1, neighbours, *ab.shape[2:])
    assert (shares.sum(dim=1) - 1).abs().max() < 1e-6 and shares.min() >= 0
    error = torch.stack([(shares * axis[places]).sum(dim=1) for axis in bins.centres.T], 1) - ab
    assert error.abs().max() < 0.7
    assert error.norm(dim=1).max() < worst
    nearest = (bins.centres[places[:, 0]].movedim(-1, 1) - ab).norm(dim=1)
    assert 5 < nearest.max() < 7.08, "half the diagonal of a cell"


@pytest.mark.parametrize("neighbours", [5, 10])
def test_the_table_finds_the_nearest_of_all_bins(neighbours):
    bins, ab = AbBins(neighbours=neighbours), every_colour(15)
    places, _ = bins.encode(ab)
    colours = ab.movedim(1, -1)[..., None, :]
    found = ((colours - bins.centres[places.movedim(1, -1)]) ** 2).sum(dim=-1)
    every = ((colours - bins.centres) ** 2).sum(dim=-1)
    assert torch.equal(found, every.topk(neighbours, largest=False).values)


def test_a_distribution_is_decoded_to_its_mean():
    bins = AbBins(neighbours=10)
    ab = torch.tensor([[3.0, -4.0], [40.0, 25.0]]).T[None, :, None]
    decoded = bins.decode(dense(bins, *bins.encode(ab)))
    assert decoded.shape == ab.shape and (decoded - ab).abs().max() < 0.4


def test_rebalancing_weights_are_the_guides():
    prior = torch.tensor([0.7, 0.2, 0.1])
    weights = rebalance(prior, 0.5)
    assert (weights - torch.tensor([0.754170, 1.461204, 1.798405])).abs().max() < 1e-6
    assert (rebalance(prior, 1.0) - 1).abs().max() < 1e-6


@PROPERTY
@given(
    counts=st.lists(st.integers(0, 1000), min_size=2, max_size=313).filter(any),
    uniform=st.floats(0.01, 1),
)
def test_the_weights_of_any_prior_have_mean_one_and_rare_ones_are_heavier(counts, uniform):
    prior = torch.tensor(counts, dtype=torch.float64)
    prior /= prior.sum()
    weights = rebalance(prior, uniform)
    assert (prior * weights).sum().item() == pytest.approx(1, rel=1e-9)
    assert weights[prior.argmin()] >= weights[prior.argmax()]


def test_the_prior_counts_colours_and_smooths_them():
    bins = AbBins(neighbours=5)
    ab = torch.cat([one(0, 0)] * 3 + [one(60, -60)], dim=3)
    prior = bins.prior(ab)
    nodes = bin_centres().tolist()
    share = [prior[nodes.index(node)].item() for node in ([0, 0], [10, 0], [60, -60], [-40, 60])]
    assert prior.sum().item() == pytest.approx(1, abs=1e-6)
    assert share[0] == pytest.approx(3 * share[2], rel=1e-4)
    assert share[1] == pytest.approx(share[0] * 2.718281828**-2, rel=1e-4)  # exp(-10^2 / (2 * 5^2))
    assert share[3] < 1e-12


def test_annealing_sharpens_as_the_guide_says():
    logits = torch.tensor([0.5, 0.3, 0.2]).log().reshape(1, 3, 1, 1)
    found = anneal(logits, 0.38).flatten()
    assert (found - torch.tensor([0.740506, 0.193071, 0.066423])).abs().max() < 1e-6
    assert (anneal(logits, 1.0).flatten() - logits.exp().flatten()).abs().max() < 1e-6
    assert anneal(logits, 0.01).flatten()[0] > 0.9999
    assert (anneal(logits + 7, 0.38).flatten() - found).abs().max() < 1e-5
    assert anneal(logits.bfloat16(), 0.38).dtype == torch.float32


def test_the_tables_are_in_no_state_dict():
    assert not AbBins(neighbours=5).state_dict()
