import math
from fractions import Fraction

import numpy as np
import pytest

from deploy.measure.statistics import (
    median_interval,
    median_ratio,
    minimum_samples,
    percentile,
    summarize,
)


@pytest.mark.parametrize(("q", "n"), [(50, 11), (90, 64), (95, 130), (99, 662), (99.9, 6636)])
def test_the_smallest_samples_are_those_of_mlperf(q, n):
    assert minimum_samples(q) == n


@pytest.mark.parametrize("q", [50, 90, 95, 99, 99.9])
def test_a_percentile_is_reported_from_the_smallest_sample_on(q):
    n = minimum_samples(q)
    assert percentile(range(n - 1), q) is None
    assert percentile(range(n), q) is not None


def test_a_percentile_is_the_sample_of_its_rank_in_any_order():
    samples = np.random.default_rng(0).permutation(1000) + 1.0
    assert [percentile(samples, q) for q in (50, 90, 95, 99)] == [500, 900, 950, 990]


@pytest.mark.parametrize("n", [8, 25, 200])
def test_the_interval_covers_the_true_median_as_often_as_it_says(n):
    rng = np.random.default_rng(n)
    intervals = [median_interval(rng.exponential(size=n)) for _ in range(2000)]
    covered = np.mean([low <= np.log(2) <= high for low, high in intervals])
    assert covered >= 0.985  # 99 %, less four standard errors of the simulation


def test_a_narrower_interval_does_not_cover_as_often():
    rng = np.random.default_rng(0)
    samples = [np.sort(rng.exponential(size=200)) for _ in range(2000)]
    assert np.mean([s[89] <= np.log(2) <= s[110] for s in samples]) < 0.985


def test_an_interval_needs_eight_samples():
    assert median_interval(range(7)) is None
    assert median_interval(range(8)) == (0, 7)


def test_the_interval_of_a_long_run_is_narrow():
    assert median_interval(range(100_000)) == (49_592, 50_407)


def exact_interval(n, tail):
    """By integers: the largest k of which P(X < k) <= tail, X binomial (n, 1/2)."""
    ways, below, k = 1, 0, 0
    while below + ways <= tail * 2**n:
        below += ways
        ways = ways * (n - k) // (k + 1)
        k += 1
    return (k - 1, n - k) if k else None


@pytest.mark.parametrize("confidence", [0.95, 0.99])
def test_the_interval_is_that_of_exact_binomials_however_many_samples(confidence):
    tail = (1 - Fraction(str(confidence))) / 2
    for n in (*range(1, 130), *range(1070, 1080), 5000, 20_000):  # 0.5**1075 is 0 in float64
        assert median_interval(range(n), confidence=confidence) == exact_interval(n, tail)


def test_the_exact_binomials_of_the_test_are_those_of_the_textbook():
    assert exact_interval(20, Fraction(1, 40)) == (5, 14)  # P(X < 6) = 0.0207, P(X < 7) = 0.0577
    assert sum(math.comb(20, i) for i in range(6)) / 2**20 == pytest.approx(0.0207, abs=5e-5)


def test_a_summary_leaves_out_what_the_sample_cannot_say():
    summary = summarize([1.0, 2.0, 4.0] * 30)
    assert (summary.count, summary.mean) == (90, pytest.approx(7 / 3))
    unknown = dict.fromkeys(("p95", "p99", "p99.9"))
    assert summary.percentiles == {"p50": 2.0, "p90": 4.0, **unknown}


def noisy_pairs(rng, rounds, ratio):
    """Two times under a load that strikes both, and noise that strikes each."""
    load = rng.lognormal(sigma=0.5, size=rounds)
    own = rng.lognormal(sigma=0.05, size=(2, rounds))
    return list(zip(ratio * load * own[0], load * own[1], strict=True))


@pytest.mark.parametrize("rounds", [20, 101])
def test_the_interval_of_a_ratio_holds_the_true_one_as_often_as_it_says(rounds):
    rng = np.random.default_rng(rounds)
    found = [median_ratio(noisy_pairs(rng, rounds, 0.8)) for _ in range(1000)]
    covered = np.mean([low <= 0.8 <= high for low, high in (ratio.interval for ratio in found)])
    assert covered >= 0.93  # 95 %, less three standard errors of the simulation


def test_equal_times_are_not_told_apart_and_different_ones_are():
    rng = np.random.default_rng(0)
    equal, slower = (median_ratio(noisy_pairs(rng, 41, ratio)) for ratio in (1.0, 1.1))
    assert equal.interval[0] <= 1 <= equal.interval[1]
    assert slower.interval[0] > 1 and "[" in str(slower)
