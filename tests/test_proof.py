import pytest
import torch

from deploy.errors import CheckFailedError
from export.passes.proof import _promises, assert_below_limit, largest_error, relative_error
from export.traced.report import Change

TRACED = {"conv", "bn", "dropout", "scale", "pool", "conv_1"}


def test_a_site_is_judged_where_its_value_ended_up():
    changes = [
        Change("drop", "stripped", before="dropout", after="conv"),
        Change("bn", "folded", before="bn", after="conv"),
        Change("ls", "folded", before="scale", after="conv"),
    ]
    assert _promises(changes, TRACED) == {
        "drop": [("scale", "conv")],
        "bn": [("scale", "conv")],
        "ls": [("scale", "conv")],
    }


def test_a_value_on_the_way_is_judged_behind_it():
    changes = [
        Change("drop", "stripped", before="dropout", after="conv"),
        Change("bn", "folded", before="bn", after="pool", moved=("pool", "conv")),
    ]
    assert _promises(changes, TRACED) == {"drop": [("bn", "pool")], "bn": [("bn", "pool")]}


def test_a_fold_forwards_is_judged_at_every_layer_that_took_over():
    change = Change("bn", "forwards", "conv_1", "conv_1", moved=("bn", "pool"), also=("scale",))
    assert _promises([change], TRACED) == {"bn": [("conv_1", "conv_1"), ("scale", "scale")]}


def test_a_new_node_has_the_value_that_was_promised_for_it():
    changes = [
        Change("a", "merged", before="bn", after="conv_new"),
        Change("b", "folded", before="conv_new", after="conv_newer"),
    ]
    assert _promises(changes, TRACED)["a"] == [("bn", "conv_newer")]


def test_what_no_traced_node_has_is_left_to_the_outputs():
    changes = [
        Change("a", "one", before="unknown", after="unknown_too"),
        Change("bn", "folded", before="bn", after="conv"),
        Change("b", "replaced", before="unknown_too", after="other", moved=("conv",)),
    ]
    assert _promises(changes, TRACED) == {"a": [], "bn": [], "b": []}


def test_relative_error_and_its_limit():
    reference = torch.tensor([0.0, 2.0], dtype=torch.float64)
    assert relative_error(reference, reference) == 0
    assert relative_error(reference + 2e-6, reference) == pytest.approx(1e-6)
    assert relative_error(reference[:1], reference) == float("inf")
    assert relative_error(reference, torch.zeros_like(reference)) == float("inf")
    nan = torch.full_like(reference, torch.nan)
    assert relative_error(nan, nan) == relative_error(reference[:0], reference[:0]) == 0
    assert relative_error(nan, reference) == float("inf")
    assert largest_error([reference, nan], [reference, reference]) == float("inf")
    assert_below_limit({"fine": 1e-10})
    with pytest.raises(CheckFailedError, match=r"0\.001 at wrong, and at 1 more"):
        assert_below_limit({"fine": 0.0, "wrong": 1e-3, "nothing": float("nan")})
