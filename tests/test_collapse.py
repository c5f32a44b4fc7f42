import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgereg.errors import DataError
from edgereg.evaluation.collapse import spread


def gaussian(count=4000, dim=16, seed=0):
    return np.random.default_rng(seed).normal(size=(count, dim)).astype(np.float32)


def _reference_effective_rank(features):
    """Return Roy and Vetterli's effective rank from a singular value decomposition."""
    singular = np.linalg.svd(features - features.mean(axis=0), compute_uv=False)
    p = singular / singular.sum()
    return np.exp(-sum(x * np.log(x) for x in p if x > 0))


def test_random_directions_spread_over_all_dimensions():
    measured = spread(gaussian())
    assert measured.relative_std == pytest.approx(1, abs=0.01)
    assert measured.std == pytest.approx(1 / 4, abs=0.003)
    assert measured.effective_rank == pytest.approx(16, abs=0.05)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_constant_features_do_not_spread_at_all(scale):
    vector = scale * np.random.default_rng(1).normal(size=(1, 16))
    measured = spread(np.repeat(vector, 300, axis=0).astype(np.float32))
    assert measured.std == pytest.approx(0, abs=1e-9) and measured.effective_rank == 0


def test_vectors_that_differ_by_rounding_alone_have_no_rank():
    rng = np.random.default_rng(0)
    vector = rng.normal(size=(1, 16)).astype(np.float32)
    rounded = np.where(rng.random((300, 16)) < 0.5, vector, np.nextafter(vector, np.float32(9)))
    assert (rounded != vector).any()
    assert spread(rounded).effective_rank == 0 and spread(rounded).relative_std < 1e-6


def test_features_on_a_line_have_rank_one():
    rng = np.random.default_rng(0)
    through_zero = rng.normal(size=(300, 1)) * rng.normal(size=(1, 16))
    beside_zero = through_zero + rng.normal(size=(1, 16))
    for features in (through_zero, beside_zero):
        rank = spread(features.astype(np.float32)).effective_rank
        assert rank == pytest.approx(1, abs=1e-3)


def test_one_direction_with_any_length_has_no_spread_of_directions():
    features = np.random.default_rng(0).uniform(1, 2, (300, 1)) * np.ones((1, 16))
    measured = spread(features.astype(np.float32))
    assert measured.relative_std < 1e-6 and measured.effective_rank == pytest.approx(1, abs=1e-3)


def test_singular_values_of_one_half_and_two_quarters_have_rank_two_and_the_root_of_two_more():
    # entropy (1/2) ln 2 + 2 (1/4) ln 4 = (3/2) ln 2
    axes = np.concatenate([np.diag([2.0, 1, 1]), -np.diag([2.0, 1, 1])])
    assert spread(axes.astype(np.float32)).effective_rank == pytest.approx(2**1.5, rel=1e-6)


@settings(max_examples=20, deadline=None)
@given(
    st.integers(2, 30),
    st.integers(1, 30),
    st.integers(0, 1000),
)
def test_the_rank_is_that_of_a_singular_value_decomposition(count, dim, seed):
    features = gaussian(count, dim, seed)
    expected = _reference_effective_rank(features.astype(np.float64))
    measured = spread(features)
    assert measured.effective_rank == pytest.approx(expected, rel=1e-4)
    assert 1 - 1e-6 <= measured.effective_rank <= min(count - 1, dim) + 1e-6
    assert 0 <= measured.relative_std <= 1 + 1e-6


def test_one_image_has_no_spread():
    with pytest.raises(DataError, match="two images or more"):
        spread(np.ones((1, 4), np.float32))
