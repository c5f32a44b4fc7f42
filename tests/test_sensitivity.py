import copy
from functools import cache

import numpy as np
import pytest
import torch
from int8_models import classifier_file, emoji, exported, fitted_classifier

from deploy.errors import CheckFailedError
from export.precision.emulate_int8 import run_emulated
from export.precision.quantize import SCHEMES, layers_of
from export.precision.sensitivity import quantize_until

IMAGES = emoji("train", 64)[0]
CALIBRATION, HELD_BACK = IMAGES[:48], IMAGES[48:]
VALIDATION = emoji("test", 496)


def accuracy(model):
    images, labels = VALIDATION
    return float((run_emulated(model, images).argmax(1) == labels).mean())


@cache
def required():
    """At most one image in fifty may be lost: 496 tell no smaller loss from chance."""
    return accuracy(classifier_file()) - 0.02


def is_good(model):
    return accuracy(model) >= required()


@cache
def planted_file():
    """The same function, but that one channel of one activation is a thousand times the others."""
    model = copy.deepcopy(fitted_classifier())
    with torch.no_grad():
        model.block.bn1.weight[3] *= 3000  # a ReLU passes a positive factor
        model.block.bn1.bias[3] *= 3000
        model.block.conv2.weight[:, 3] /= 3000
    return exported(model)


def search(model, *, images=CALIBRATION, gate=is_good, scheme="tensorrt", **options):
    return quantize_until(
        model, [images], scheme=scheme, held_back=HELD_BACK, is_good=gate, **options
    )


@pytest.mark.parametrize("scheme", SCHEMES)
def test_where_all_layers_pass_none_is_left_and_the_best_method_is_taken(scheme):
    found = search(classifier_file(), scheme=scheme)
    assert found.left == {} and found.layers == 6
    *measured, last = found.tried
    assert [trial.is_good for trial in measured] == [None] * 3 and last.is_good
    best = max(measured, key=lambda trial: trial.sqnr_db)
    assert (found.method, found.sqnr_db) == (best.method, best.sqnr_db)
    assert is_good(found.model)


def test_the_method_is_chosen_by_measurement():
    # One pixel in a million, a thousand times too bright: only minmax makes room for it.
    images = CALIBRATION.copy()
    images[0, 0, 0, 0] = 1000
    found = search(classifier_file(), images=images)
    assert found.method != "minmax"
    scores = {trial.method: trial.sqnr_db for trial in found.tried[:3]}
    assert scores["minmax"] < scores["percentile"] - 6


def test_a_layer_with_outliers_is_left_in_float_and_no_other():
    assert not is_good(search(planted_file(), gate=lambda model: True).model)
    found = search(planted_file())
    assert list(found.left) == ["block.conv2/Conv"]
    assert "alone in int8" in found.left["block.conv2/Conv"]
    assert is_good(found.model)


def test_on_a_cpu_the_layer_that_makes_the_outliers_may_be_left_too():
    found = search(planted_file(), scheme="u8s8")
    assert set(found.left) <= {"block.conv1/Conv", "block.conv2/Conv"} and found.left


def test_calibration_on_noise_is_caught_by_the_gate():
    noise = np.random.default_rng(0).normal(0, 0.1, CALIBRATION.shape).astype(np.float32)
    with pytest.raises(CheckFailedError, match="none of 5 that were tried") as caught:
        search(classifier_file(), images=noise)
    assert "5 in float" in str(caught.value) and "nor does the float" not in str(caught.value)


def test_a_gate_that_the_float_model_fails_is_said_to_be_the_reason():
    with pytest.raises(CheckFailedError, match="nor does the float model; remedy: the gate asks"):
        search(classifier_file(), gate=lambda model: False)


@pytest.mark.parametrize("needed", range(6))
def test_the_fewest_layers_are_found_by_doubling_and_bisection(needed):
    asked = []

    def gate(model):
        asked.append(len(layers_of(model)))  # those in float: the others read a DequantizeLinear
        return asked[-1] >= needed

    found = search(classifier_file(), gate=gate, methods=("minmax",))
    assert len(found.left) == needed
    assert len(asked) == len(set(asked)) <= 5
    assert [trial.left for trial in found.tried[1:]] == asked
    assert [trial.is_good for trial in found.tried[1:]] == [count >= needed for count in asked]


def test_a_search_is_reproducible_and_tells_its_stages():
    stages: list[str] = []
    gate = lambda model: len(layers_of(model)) >= 3  # noqa: E731
    first = search(classifier_file(), gate=gate, on_stage=stages.append)
    assert search(classifier_file(), gate=gate) == first
    assert [stage.split(":")[0] for stage in stages[:3]] == [
        "int8, minmax",
        "int8, entropy",
        "int8, percentile",
    ]
    assert any(stage.startswith("ranked 6 layers") for stage in stages)


def test_the_ranking_is_by_the_sqnr_of_each_layer_alone():
    found = search(classifier_file(), gate=lambda model: len(layers_of(model)) >= 5)
    decibels = [float(reason.split()[7]) for reason in found.left.values()]
    assert decibels == sorted(decibels) and len(decibels) == 5
