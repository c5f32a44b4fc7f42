import numpy as np
import pytest

from deploy.errors import CheckFailedError
from deploy.runtime.postprocess import top_k

LABELS = ("a", "b", "c")


def test_the_best_classes_come_first_with_their_probabilities():
    logits = np.log(np.array([0.2, 0.5, 0.3], np.float32))
    (first, p), (second, q) = top_k(logits, LABELS, k=2)
    assert (first, second) == ("b", "c")
    assert (p, q) == (pytest.approx(0.5), pytest.approx(0.3))


def test_large_logits_do_not_overflow_and_few_classes_are_enough():
    guesses = top_k(np.array([3e38, 0, -3e38], np.float32), LABELS, k=5)
    assert guesses == (("a", 1.0), ("b", 0.0), ("c", 0.0))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_a_failed_check(value):
    with pytest.raises(CheckFailedError, match="1 of 3 are not"):
        top_k(np.array([0, value, 0], np.float32), LABELS, k=1)
