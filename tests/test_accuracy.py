import json
import re

import numpy as np
import pytest

from deploy.errors import BadInputError
from deploy.measure.paired import compare_answers, count_needed
from export.judge.accuracy import judge_accuracy, parse_gates


def paired(count, *, lost=0, gained=0, ties=0):
    """Return the comparison of a reference that is right on 90 % of the images."""
    reference = np.tile(np.array([5.0, 0.0, 4.9999], np.float32), (count, 1))
    labels = np.zeros(count, int)
    labels[: count // 10] = 1
    variant = reference.copy()
    variant[count - lost :] = [0, 5, 0]
    variant[:gained] = [0, 5, 0]
    variant[count // 2 : count // 2 + ties] = [4.9999, 0, 5]
    return compare_answers(variant, reference, labels)


@pytest.mark.parametrize(
    ("precision", "measured", "limit", "passed"),
    [
        ("fp32", paired(1000), 0.0, True),
        ("fp32", paired(1000, gained=1), 0.0, False),  # better, and still not the same model
        ("fp32", paired(1000, ties=2), 0.0, True),
        ("fp16", paired(2000, lost=2), 0.001, True),
        ("fp16", paired(2000, lost=3), 0.001, False),
        ("fp16", paired(1990, lost=1), 0.0, False),
        ("fp16", paired(1990, lost=1, gained=1), 0.0, True),
        ("int8", paired(1000, lost=9), 0.009, True),
        ("int8", paired(1000, lost=10), 0.009, False),
    ],
)
def test_each_precision_has_its_gate(precision, measured, limit, passed):
    verdict = judge_accuracy(precision, measured)
    assert (verdict.passed, verdict.is_overridden) == (passed, False)
    assert verdict.precision == precision and verdict.limit == pytest.approx(limit)
    assert ("FAILED" in verdict.text) == (not passed)


def test_a_poor_reference_leaves_int8_half_a_point():
    reference = np.tile(np.array([5.0, 0.0]), (1000, 1))
    labels = np.ones(1000, int)
    labels[:300] = 0
    assert judge_accuracy("int8", compare_answers(reference, reference, labels)).limit == 0.005


@pytest.mark.parametrize("right", range(500, 1001, 100))
def test_a_loss_of_exactly_one_per_cent_of_the_accuracy_passes_and_one_more_does_not(right):
    # In float64, 0.01 * 0.7 < 7 / 1000.
    reference, labels = np.tile(np.array([5.0, 0.0]), (1000, 1)), np.zeros(1000, int)
    labels[right:] = 1
    for lost, passed in ((right // 100, True), (right // 100 + 1, False)):
        variant = reference.copy()
        variant[:lost] = [0, 5]
        assert judge_accuracy("int8", compare_answers(variant, reference, labels)).passed == passed


def test_few_images_do_not_certify_and_the_text_says_how_many_might():
    few, many = (judge_accuracy("int8", paired(n)) for n in (100, 2000))
    assert few.passed and not few.certified and "certify 0.90 points (about 485" in few.text
    assert many.passed and many.certified and "certified within 0.90 points" in many.text
    assert "0.10 points (about 4,380 images do" in judge_accuracy("fp16", paired(100)).text
    assert judge_accuracy("fp32", paired(4400)).certified


def test_answers_that_differ_need_more_images_than_answers_that_do_not():
    verdict = judge_accuracy("int8", paired(1000, lost=8, gained=6))
    assert verdict.passed and not verdict.certified
    needed = int(re.search(r"about ([\d,]+) images", verdict.text)[1].replace(",", ""))
    assert needed > 1000 > count_needed(verdict.limit)
    certain = paired(needed, lost=needed * 7 // 1000, gained=needed * 7 // 1000)
    assert judge_accuracy("int8", certain).certified


def test_what_fails_its_gate_is_not_certified_however_many_images_there_are():
    verdict = judge_accuracy("fp32", paired(20_000, gained=1))
    assert verdict.text.endswith("FAILED")
    assert not verdict.passed and not verdict.certified


def test_where_the_loss_itself_fills_the_gate_more_images_are_not_promised():
    verdict = judge_accuracy("int8", paired(3000, lost=26))
    assert verdict.passed and not verdict.certified
    assert verdict.text.endswith("not certified: the interval ends beyond 0.90 points")


def test_the_text_is_a_whole_line_of_a_table():
    verdict = judge_accuracy("int8", paired(4000, lost=12, gained=8))
    assert verdict.text == (
        "int8: top-1 89.90% (reference 90.00%) on 4,000 images, 12 lost, 8 gained, 0 ties; net "
        "loss 0.10 points [-0.28, 0.48]; at most 0.90 points; certified within 0.90 points"
    )
    assert json.loads(json.dumps(verdict.to_json(), allow_nan=False)) == verdict.to_json()


def test_a_limit_given_by_hand_replaces_the_gate_and_is_recorded():
    verdict = judge_accuracy("int8", paired(1000, lost=9), override=0.001)
    assert not verdict.passed and verdict.is_overridden and verdict.limit == 0.001
    assert "at most 0.10 points (set by hand); FAILED" in verdict.text
    assert judge_accuracy("fp32", paired(1000, lost=1), override=0.01).passed
    assert "by hand" not in judge_accuracy("int8", paired(1000)).text


def test_gates_are_read_from_text():
    assert parse_gates("int8=0.01, fp16=0.002") == {"int8": 0.01, "fp16": 0.002}


@pytest.mark.parametrize(
    "text", ["int8", "int8=", "int8=2", "int8=-1", "int4=0.1", "int8=1,int8=0", "", "int8=nan"]
)
def test_what_is_no_gate_is_refused(text):
    with pytest.raises(BadInputError, match=r"such as --gate int8=0\.01"):
        parse_gates(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("int4=0.1", r"did you mean int8\?"),
        ("fp61=0.1", r"did you mean fp16\?"),
        ("int8=1,int8=0", "the second of its precision"),
    ],
)
def test_a_refused_gate_names_the_nearest_precision_or_the_repetition(text, said):
    with pytest.raises(BadInputError, match=said):
        parse_gates(text)


def test_a_right_name_with_a_wrong_share_is_not_asked_whether_it_was_meant():
    with pytest.raises(BadInputError) as caught:
        parse_gates("int8=2")
    assert "did you mean" not in str(caught.value)
