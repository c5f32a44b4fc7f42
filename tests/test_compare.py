import dataclasses
import json
import math

import numpy as np
import pytest

from deploy.bundle.tolerance import EmbeddingTolerance, Tolerance
from deploy.errors import BadInputError
from deploy.measure.compare import compare
from deploy.runtime.neighbours import unit_rows

TOLERANCE = Tolerance(0.01, 0.9, "for the test")
REFERENCE = np.random.default_rng(0).normal(size=(50, 10))
RANGE = float(np.ptp(REFERENCE))


def shifted_in_one_place(error):
    actual = REFERENCE.copy()
    actual[3, np.argmax(REFERENCE[3])] += error  # upwards: the class stays
    return actual


def test_equal_outputs_pass_with_infinite_sqnr():
    result = compare(REFERENCE, REFERENCE, Tolerance(0.0, 1.0, "x"))
    assert result.passed and result.finite and result.reasons == ()
    assert (result.max_abs_error, result.max_scaled_error) == (0.0, 0.0)
    assert (result.sqnr_db, result.top1_agreement, result.count) == (math.inf, 1.0, 50)


def test_each_figure_is_its_formula():
    actual = REFERENCE + np.random.default_rng(1).normal(size=REFERENCE.shape) * 0.001
    result = compare(actual, REFERENCE, TOLERANCE)
    noise = actual - REFERENCE
    assert result.max_abs_error == pytest.approx(np.abs(noise).max())
    assert result.max_scaled_error == pytest.approx(np.abs(noise).max() / RANGE)
    assert result.sqnr_db == pytest.approx(10 * np.log10((REFERENCE**2).sum() / (noise**2).sum()))


@pytest.mark.parametrize(("factor", "passed"), [(0.999, True), (1.001, False)])
def test_an_error_just_above_the_tolerance_fails_and_one_just_below_passes(factor, passed):
    actual = shifted_in_one_place(factor * TOLERANCE.max_scaled_error * RANGE)
    result = compare(actual, REFERENCE, TOLERANCE)
    assert result.passed is passed
    assert ("scaled error" in " ".join(result.reasons)) is not passed


def test_the_verdict_does_not_depend_on_the_scale_of_the_outputs():
    actual = shifted_in_one_place(1.001 * TOLERANCE.max_scaled_error * RANGE)
    for scale in (1e-6, 1e6):
        assert not compare(actual * scale, REFERENCE * scale, TOLERANCE).passed


def test_permuted_classes_fail():
    result = compare(np.roll(REFERENCE, 1, axis=1), REFERENCE, Tolerance(1.0, 0.9, "x"))
    assert not result.passed
    assert any("top-1 agreement" in reason for reason in result.reasons)


def test_swapped_images_fail():
    assert not compare(REFERENCE[::-1], REFERENCE, TOLERANCE).passed


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", ["outputs", "reference"])
def test_one_value_that_is_not_finite_fails(value, side):
    broken = REFERENCE.copy()
    broken[7, 2] = value
    pair = (broken, REFERENCE) if side == "outputs" else (REFERENCE, broken)
    result = compare(*pair, Tolerance(1.0, 0.0, "allows anything"))
    assert not result.passed and not result.finite
    assert "not finite" in result.reasons[0]
    document = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert document["max_abs_error"] is None and document["passed"] is False


def test_half_precision_is_compared_without_overflow():
    actual = np.array([[60000, 0], [0, 60000]], np.float16)
    assert compare(actual, -actual, TOLERANCE).max_abs_error == 120000


def test_tensors_other_than_logits_have_no_top1():
    images = REFERENCE.reshape(50, 1, 2, 5)
    result = compare(images, images, dataclasses.replace(TOLERANCE, min_top1_agreement=1.0))
    assert result.top1_agreement is None and result.passed


@pytest.mark.parametrize("actual", [REFERENCE[:1], REFERENCE[:, :1], REFERENCE.ravel()])
def test_shapes_are_never_broadcast(actual):
    with pytest.raises(BadInputError, match="same shape"):
        compare(actual, REFERENCE, TOLERANCE)


def test_nothing_to_compare_is_an_error():
    with pytest.raises(BadInputError, match="not be empty"):
        compare(REFERENCE[:0], REFERENCE[:0], TOLERANCE)


def test_a_constant_reference_is_an_error():
    constant = np.ones((4, 3))
    with pytest.raises(BadInputError, match="must not be constant"):
        compare(constant, constant, TOLERANCE)


ALLOWED = EmbeddingTolerance(0.01, 0.999, 1.0, "for the test")
INDEX = unit_rows(np.random.default_rng(2).normal(size=(200, 10)))


def judged(actual, tolerance=ALLOWED, reference=REFERENCE, index=INDEX):
    return compare(actual, reference, tolerance, index=index)


def test_equal_embeddings_pass_and_each_figure_is_its_formula():
    same = judged(REFERENCE)
    assert same.passed and same.top1_agreement is None and same.neighbour_agreement == 1.0
    assert same.min_cosine == pytest.approx(1)
    actual = REFERENCE + np.random.default_rng(1).normal(size=REFERENCE.shape) * 0.1
    result = judged(actual)
    a, r = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (actual, REFERENCE))
    nearest = (a @ INDEX.T).argmax(axis=1) == (r @ INDEX.T).argmax(axis=1)
    assert result.min_cosine == pytest.approx((a * r).sum(axis=1).min())
    assert result.neighbour_agreement == pytest.approx(nearest.mean()) and not nearest.all()
    assert set(result.to_json()) - {"min_cosine", "neighbour_agreement"} == set(
        compare(REFERENCE, REFERENCE, TOLERANCE).to_json()
    ) - {"top1_agreement"}


def test_a_rotation_keeps_every_length_and_fails_by_the_cosine():
    turn, _ = np.linalg.qr(np.random.default_rng(3).normal(size=(10, 10)))
    result = judged(REFERENCE @ turn, dataclasses.replace(ALLOWED, max_scaled_error=1.0))
    assert not result.passed and result.reasons[0].startswith("cosine similarity")


@pytest.mark.parametrize(("angle", "passed"), [(0.0446, True), (0.0448, False)])
def test_an_angle_just_above_the_tolerance_fails_and_one_just_below_passes(angle, passed):
    assert (math.cos(angle) > 0.999) is passed
    actual = REFERENCE.copy()
    across = np.roll(REFERENCE[3], 1)
    across -= (across @ REFERENCE[3]) / (REFERENCE[3] @ REFERENCE[3]) * REFERENCE[3]
    across *= np.linalg.norm(REFERENCE[3]) / np.linalg.norm(across)
    actual[3] = math.cos(angle) * REFERENCE[3] + math.sin(angle) * across
    result = judged(actual, EmbeddingTolerance(1.0, 0.999, 0.0, "x"))
    assert result.passed is passed and result.min_cosine == pytest.approx(math.cos(angle))


def test_the_embeddings_of_two_images_that_were_swapped_fail_by_their_neighbours():
    actual = REFERENCE.copy()
    actual[[4, 7]] = actual[[7, 4]]
    result = judged(actual, EmbeddingTolerance(1.0, 0.0, 1.0, "x"))
    assert result.neighbour_agreement == 48 / 50
    assert result.reasons == ("neighbour agreement 0.9600 < 1.0000",)


def test_references_that_are_equally_near_count_as_one_neighbour_and_no_further_ones():
    twice = np.repeat(INDEX, 2, axis=0)
    moved = twice.copy()
    moved[1::2] = unit_rows(twice[1::2] + 1e-7)
    tilted = REFERENCE + 1e-6  # which of the two is nearer is now another one for some
    chosen = ((unit_rows(x) @ moved.T).argmax(axis=1) for x in (tilted, REFERENCE))
    assert not np.array_equal(*chosen)
    assert judged(tilted, index=moved).neighbour_agreement == 1.0


def test_an_embedding_of_zeros_has_no_direction_and_fails():
    actual = REFERENCE.copy()
    actual[5] = 0
    assert judged(actual, EmbeddingTolerance(1.0, 0.5, 0.0, "x")).min_cosine == 0


def test_one_value_of_an_embedding_that_is_not_finite_fails():
    broken = REFERENCE.copy()
    broken[7, 2] = np.nan
    result = judged(broken, EmbeddingTolerance(1.0, 0.0, 0.0, "allows anything"))
    assert not result.passed and not result.finite
    assert (result.min_cosine, result.neighbour_agreement, result.top1_agreement) == (-1, 0, None)


@pytest.mark.parametrize("index", [None, INDEX[:, :9]])
def test_embeddings_need_references_of_their_width(index):
    with pytest.raises(BadInputError, match="of the same width"):
        judged(REFERENCE, index=index)
