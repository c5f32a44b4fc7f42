from typing import Any, Literal

import pytest

from edgereg.augment.options import checked
from edgereg.errors import RecipeError

Mode = Literal["border", "zeros"]


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        (3, int, 3),
        (3, float, 3),
        (0.5, float, 0.5),
        (True, bool, True),
        ("a.b", str, "a.b"),
        ("zeros", Mode, "zeros"),
        ([0.5, 2], tuple[float, float], (0.5, 2)),
        ((0.5, 2), tuple[float, float], (0.5, 2)),
        ({"alpha": [1]}, dict[str, Any], {"alpha": [1]}),
        ([1, "x"], list[Any], [1, "x"]),
        (None, int | None, None),
        (2, int | None, 2),
    ],
)
def test_a_value_of_its_type_is_kept_and_a_pair_becomes_a_tuple(value, kind, expected):
    result = checked(value, kind, "augment[0].x.y")
    assert result == expected and type(result) is type(expected)


@pytest.mark.parametrize(
    ("value", "kind", "match"),
    [
        (3.0, int, "a whole number; found: k: 3.0"),
        (True, int, "a whole number"),
        (True, float, "a number"),
        ("3", float, "a number; found: k: '3'"),
        (float("nan"), float, "a number"),
        (-1, int, "not negative; found: k: -1"),
        (1, bool, "true or false"),
        (1, str, "a text"),
        ("reflect", Mode, "one of border, zeros; found: k: 'reflect'"),
        (["zeros"], Mode, "one of border, zeros"),
        (0.5, tuple[float, float], "a pair of numbers"),
        ([0.5], tuple[float, float], "a pair of numbers"),
        ([0.5, None], tuple[float, float], "a pair of numbers"),
        ([2, 1], tuple[float, float], r"0 < low <= high; found: k: \[2, 1\]"),
        ([1], dict[str, Any], "a mapping"),
        ({}, list[Any], "a list"),
        (None, int, "a whole number"),
        ("x", int | None, "a whole number"),
    ],
)
def test_another_value_is_refused_and_named(value, kind, match):
    with pytest.raises(RecipeError, match=match):
        checked(value, kind, "k")


def test_a_probability_lies_between_none_and_one():
    assert checked(1, float, "augment[0].flip.probability") == 1
    with pytest.raises(RecipeError, match=r"a probability lies in \[0, 1\]"):
        checked(1.01, float, "augment[0].flip.probability")
