import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.errors import BadInputError
from deploy.measure.paired import (
    _at_most,
    _calibration_error,
    _interval,
    compare_answers,
    count_needed,
)

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def answers(*classes, of=3):
    """Return (N, 3) logits that prefer the given classes clearly."""
    return np.eye(of, dtype=np.float32)[list(classes)] * 5


LABELS = np.array([0, 1, 2, 0, 1])


def test_flips_losses_and_gains_are_counted_apart():
    reference = answers(0, 1, 2, 1, 2)  # three right
    variant = answers(0, 2, 2, 0, 0)  # image 1 lost, image 3 gained, image 4 wrong both times
    paired = compare_answers(variant, reference, LABELS)
    assert (paired.lost, paired.gained, paired.flips, paired.ties) == (1, 1, 3, 0)
    assert (paired.reference_top1, paired.top1, paired.net_loss) == (0.6, 0.6, 0.0)
    assert paired.p_value == 1.0
    assert paired.interval[0] < 0 < paired.interval[1]


def test_a_flip_between_classes_that_the_reference_does_not_tell_apart_is_a_tie():
    reference = np.array([[5.0, 4.9999, 0], [5.0, 4.99, 0]])
    variant = np.array([[4.9999, 5.0, 0], [4.99, 5.0, 0]])
    paired = compare_answers(variant, reference, np.array([0, 0]))
    assert (paired.flips, paired.ties, paired.lost) == (2, 1, 2)


def test_a_flip_to_a_third_class_is_no_tie_though_the_reference_hardly_prefers_its_own():
    reference = np.array([[5.0, 4.9999, 0]])
    paired = compare_answers(np.array([[0.0, 0, 5]]), reference, np.array([0]))
    assert (paired.flips, paired.ties) == (1, 0)


def test_ties_of_half_precision_logits_are_found_though_their_range_is_no_half():
    reference = np.array([[60_000, -60_000, 0], [60_000, 0, -60_000]], np.float16)
    paired = compare_answers(reference[::-1, [0, 2, 1]], reference, np.array([0, 0]))
    assert (paired.flips, paired.ties) == (0, 0)
    paired = compare_answers(reference[:, [1, 0, 2]], reference, np.array([0, 0]))
    assert (paired.flips, paired.ties) == (2, 0)


def test_the_comparison_is_plain_json():
    report = compare_answers(answers(1, 1), answers(0, 1), np.array([0, 1])).to_json()
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert report["lost"] == 1 and len(report["interval"]) == 2


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_row_that_is_not_finite_is_a_wrong_answer_and_no_tie(value):
    variant = answers(0, 1, 2, 0, 1)
    variant[0, 0] = value  # the largest by argmax, and where the right answer stands
    paired = compare_answers(variant, answers(0, 1, 2, 0, 1), LABELS)
    assert (paired.lost, paired.flips, paired.ties, paired.ece) == (1, 1, 0, 1.0)


@pytest.mark.parametrize(
    ("hits", "count", "bounds"),
    [  # closed forms at 0 and all; the others solve the binomial tail, checked below
        (0, 10, (0.0, 1 - 0.025 ** (1 / 10))),
        (10, 10, (0.025 ** (1 / 10), 1.0)),
        (1, 2, (1 - math.sqrt(0.975), math.sqrt(0.975))),
    ],
)
def test_clopper_pearsons_bounds_equal_their_closed_forms(hits, count, bounds):
    assert _interval(hits, count, 0.025) == pytest.approx(bounds, abs=1e-12)


@pytest.mark.parametrize(
    ("hits", "count", "bounds"),
    [
        (682, 925, (0.7076683, 0.7654066)),  # Conover 1971, p. 97, in R's help on binom.test
        (7, 20, (0.1539092, 0.5921885)),  # what R's binom.test prints
    ],
)
def test_clopper_pearsons_bounds_equal_published_ones(hits, count, bounds):
    assert _interval(hits, count, 0.025) == pytest.approx(bounds, abs=5e-8)


@PROPERTY
@given(st.integers(1, 400), st.floats(0.01, 0.2), st.data())
def test_a_bound_is_the_share_whose_tail_is_the_allowed_error(count, tail, data):
    hits = data.draw(st.integers(0, count))
    lower, upper = _interval(hits, count, tail)
    assert 0 <= lower <= hits / count <= upper <= 1
    if hits < count:
        assert _at_most(hits, count, upper) == pytest.approx(tail, rel=1e-6)
    if hits > 0:
        assert _at_most(count - hits, count, 1 - lower) == pytest.approx(tail, rel=1e-6)


def coverage(n, p, q, *, tail):
    """Return how often the interval holds the net loss p - q, over all outcomes of n images."""
    bounds, covered = [_interval(hits, n, tail) for hits in range(n + 1)], 0.0
    for lost, gained in itertools.product(range(n + 1), repeat=2):
        same = n - lost - gained
        if same < 0:
            continue
        (p0, p1), (q0, q1) = bounds[lost], bounds[gained]
        if p0 - q1 <= p - q <= p1 - q0:
            ways = math.comb(n, lost) * math.comb(n - lost, gained)
            covered += ways * p**lost * q**gained * (1 - p - q) ** same
    return covered


SHARES = [(0.0, 0.0), (0.1, 0.0), (0.1, 0.1), (0.3, 0.05), (0.02, 0.4), (0.5, 0.25), (0.75, 0.25)]


@pytest.mark.parametrize("n", [1, 5, 12, 30])
@pytest.mark.parametrize(("p", "q"), SHARES)
def test_the_interval_holds_with_its_confidence_by_exact_enumeration(n, p, q):
    assert coverage(n, p, q, tail=0.05 / 4) >= 0.95


def test_ends_that_each_take_the_whole_error_do_not_hold():
    assert min(coverage(30, p, q, tail=0.05) for p, q in SHARES) < 0.95


def test_the_interval_is_made_of_a_quarter_of_the_error_each():
    paired = compare_answers(answers(0, 2, 2, 0, 0), answers(0, 1, 2, 1, 2), LABELS, confidence=0.9)
    low, high = _interval(1, 5, 0.025)  # one lost, one gained
    assert paired.interval == pytest.approx((low - high, high - low))
    assert paired.confidence == 0.9


def test_without_a_flip_the_interval_is_no_point_and_shrinks_with_the_images():
    widths = []
    for n in (100, 1000, 50_000):
        logits = np.tile(answers(0), (n, 1))
        low, high = compare_answers(logits, logits, np.zeros(n, int)).interval
        assert low < 0 < high
        widths.append(high - low)
    assert widths[0] > 5 * widths[1] > 100 * widths[2]


def test_so_many_images_certify_a_limit_and_not_one_fewer():
    n = count_needed(0.001)
    assert _interval(0, n, 0.0125)[1] <= 0.001 < _interval(0, n - 1, 0.0125)[1]
    assert n == 4380


@PROPERTY
@given(st.sampled_from([0.001, 0.005, 0.01, 0.05]), st.floats(0, 0.01))
def test_so_many_images_certify_that_nothing_is_lost_on_balance_and_a_third_does_not(
    limit, discordant
):
    def end(n):
        lower, upper = _interval(round(n * discordant / 2), n, 0.0125)
        return upper - lower

    n = count_needed(limit, discordant=discordant)
    assert end(n) <= limit * (1 + 1e-9) < end(n // 3)


def test_mcnemars_p_is_the_binomials():
    reference, variant = np.tile(answers(0), (20, 1)), np.tile(answers(0), (20, 1))
    variant[:6] = answers(1)
    p = compare_answers(variant, reference, np.zeros(20, int)).p_value
    assert p == pytest.approx(2 * 0.5**6)


def _reference_ece(logits, labels):
    """Equation 3 of arXiv:1706.04599, a bin at a time."""
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    confidence, is_right = shares.max(axis=1), shares.argmax(axis=1) == labels
    error = 0.0
    for m in range(15):
        inside = (confidence > m / 15) & (confidence <= (m + 1) / 15)
        if inside.any():
            gap = abs(is_right[inside].mean() - confidence[inside].mean())
            error += inside.sum() / len(labels) * gap
    return error


def test_the_calibration_error_is_that_of_the_paper():
    generator = np.random.default_rng(0)
    logits, labels = generator.normal(size=(500, 4)) * 2, generator.integers(0, 4, 500)
    ece = _calibration_error(logits, labels)
    assert ece == pytest.approx(_reference_ece(logits, labels), abs=1e-12)
    assert abs(ece - _reference_ece(logits * 2, labels)) > 0.01


def test_the_calibration_error_is_the_gap_of_confidence_and_accuracy():
    sure, unsure = np.array([[20.0, 0.0]] * 4), np.array([[math.log(3), 0.0]] * 4)
    labels = np.array([0, 0, 0, 1])  # 75 % right
    paired = compare_answers(unsure, sure, labels)
    assert paired.reference_ece == pytest.approx(0.25, abs=1e-6)
    assert paired.ece == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(
    ("logits", "reference", "labels", "found"),
    [
        (answers(0, 1), answers(0), np.array([0]), r"logits \(2, 3\) and \(1, 3\)"),
        (answers(0), answers(0), np.array([0, 1]), r"labels \(2,\)"),
        (answers(), answers(), np.array([], int), "no images"),
        (np.empty((1, 0)), np.empty((1, 0)), np.array([0]), "no images"),
        (answers(0), np.full((1, 3), np.inf), np.array([0]), "not finite"),
        (np.full((1, 3), np.nan), answers(0), np.array([-1]), "1 others, the first -1"),
        (answers(0, 1), answers(0, 1), np.array([0, 3]), "1 others, the first 3"),
    ],
)
def test_answers_that_do_not_belong_together_are_refused(logits, reference, labels, found):
    with pytest.raises(BadInputError, match=found):
        compare_answers(logits, reference, labels)


@pytest.mark.parametrize("confidence", [0, 1, 95, math.nan])
def test_a_confidence_that_is_no_share_is_refused(confidence):
    with pytest.raises(BadInputError, match="a confidence is a share"):
        compare_answers(answers(0), answers(0), np.array([0]), confidence=confidence)
