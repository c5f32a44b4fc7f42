import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.errors import BadInputError
from deploy.measure.paired import _at_most, _interval, compare_answers, count_needed


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


def test_a_row_that_is_not_finite_is_a_wrong_answer_and_no_tie():
    variant = answers(0, 1, 2, 0, 1)
    variant[2, 0] = np.nan
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


@given(st.integers(1, 400), st.floats(0.01, 0.2), st.data())
def test_a_bound_is_the_share_whose_tail_is_the_allowed_error(count, tail, data):
    hits = data.draw(st.integers(0, count))
    lower, upper = _interval(hits, count, tail)
    assert 0 <= lower <= hits / count <= upper <= 1
    if hits < count:
        assert _at_most(hits, count, upper) == pytest.approx(tail, rel=1e-6)
    if hits > 0:
        assert _at_most(count - hits, count, 1 - lower) == pytest.approx(tail, rel=1e-6)


@pytest.mark.parametrize("shares", [(0.0, 0.0), (0.1, 0.0), (0.1, 0.1), (0.3, 0.05), (0.02, 0.4)])
def test_the_interval_holds_with_its_confidence_by_exact_enumeration(shares):
    p, q, n = *shares, 12
    covered = 0.0
    for lost, gained in itertools.product(range(n + 1), repeat=2):
        if lost + gained > n:
            continue
        ways = math.comb(n, lost) * math.comb(n - lost, gained)
        probability = ways * p**lost * q**gained * (1 - p - q) ** (n - lost - gained)
        (p0, p1), (q0, q1) = _interval(lost, n, 0.0125), _interval(gained, n, 0.0125)
        if p0 - q1 <= p - q <= p1 - q0:
            covered += probability
    assert covered >= 0.95


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


def test_mcnemars_p_is_the_binomials():
    reference, variant = np.tile(answers(0), (20, 1)), np.tile(answers(0), (20, 1))
    variant[:6] = answers(1)
    p = compare_answers(variant, reference, np.zeros(20, int)).p_value
    assert p == pytest.approx(2 * 0.5**6)


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
        (answers(0), np.full((1, 3), np.inf), np.array([0]), "not finite"),
    ],
)
def test_answers_that_do_not_belong_together_are_refused(logits, reference, labels, found):
    with pytest.raises(BadInputError, match=found):
        compare_answers(logits, reference, labels)
