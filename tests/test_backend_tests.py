"""Onnx's own tests of some operators of vision, by benchmarks/backend_tests.py; it runs all."""

import dataclasses
import re
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

import backend_tests
from backend_tests import EXPLAINED, differences, node_cases, outcome, read_expected, unexplained


@pytest.fixture(scope="module")
def cases():
    return {case.name: case for case in node_cases(backend_tests.VISION)}


def test_operators_of_vision_end_as_expected(cases):
    held_for, expected = read_expected()
    if held_for != backend_tests.versions():
        pytest.skip(f"the list is for {held_for}; here is {backend_tests.versions()}")
    found = {name: outcome(case) for name, case in cases.items()}
    assert differences(found, expected, is_all=False) == []
    assert sum(end == "passes" for end in found.values()) > 150


def test_the_list_has_no_unexplained_failure_and_no_explanation_without_one():
    _, expected = read_expected()
    assert unexplained(expected) == []
    ends = [f"{name} {end}" for name, end in expected.items()]
    assert [p for p in EXPLAINED if not any(re.fullmatch(p, end) for end in ends)] == []


@pytest.mark.parametrize("name", ["test_basic_conv_with_padding", "test_maxpool_2d_default"])
def test_a_wrong_value_is_noticed(cases, name):
    case = cases[name]
    assert outcome(case) == "passes"
    wrong = np.array(case.outputs[0])
    wrong.flat[0] *= 1 + 3 * case.rtol
    changed = dataclasses.replace(case, outputs=[wrong, *case.outputs[1:]])
    assert outcome(changed) == f"differs: 1 of {wrong.size} values"


def test_a_second_output_is_looked_at_too(cases):
    case = cases["test_maxpool_with_argmax_2d_precomputed_pads"]
    changed = dataclasses.replace(case, outputs=[case.outputs[0], case.outputs[1] + 1])
    assert outcome(changed).startswith("differs: ")


def test_what_the_reader_refuses_does_not_run(cases):
    case = cases["test_maxpool_2d_default"]  # of opset 22: it goes as it is
    model = type(case.model)()
    model.CopyFrom(case.model)
    model.graph.node[0].domain = "com.example"
    changed = dataclasses.replace(case, model=model)
    assert re.match("refused: .* of the domain or overload 'com.example'", outcome(changed))


def test_another_end_a_missing_test_and_an_unknown_one_are_differences():
    expected = {"a": "passes", "b": "refused: x"}
    assert differences(dict(expected), expected, is_all=True) == []
    found = {"a": "differs: 1 of 2 values", "c": "passes"}
    assert differences(found, expected, is_all=True) == [
        "a: differs: 1 of 2 values; expected: passes",
        "b: not there; expected: refused: x",
        "c: passes; expected: not there",
    ]
    assert len(differences(found, expected, is_all=False)) == 2
    assert unexplained(found | expected) == []
    assert unexplained(found) == ["a: differs: 1 of 2 values; unexplained"]
