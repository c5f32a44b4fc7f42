"""The export of several precisions at once, on a classifier that knows its images."""

import dataclasses
import json

import numpy as np
import onnx
import pytest
import torch
from int8_models import fitted_classifier

import export.judge.judging
from deploy.bundle.read import open_bundle
from deploy.errors import BadInputError, CheckFailedError
from deploy.measure.verify import verify
from deploy.runtime.decode import encode_png
from deploy.runtime.preprocess import Preprocessing
from deploy.runtime.runner import open_runner
from edgereg.data.emoji10 import Emoji10
from export.exporter import ExportRequest, export_bundle
from export.judge.speed import Speed


def pictures(split: str, numbers: range) -> tuple[list[np.ndarray], list[int]]:
    data = Emoji10(vendor="both", split=split)
    order = np.random.default_rng(0).permutation(len(data))[numbers.start : numbers.stop]
    return [data.load(int(i)) for i in order], [int(data.labels[i]) for i in order]


@pytest.fixture(scope="module")
def request_():
    golden, _ = pictures("test", range(64))
    calibration, _ = pictures("train", range(48))
    return ExportRequest(
        name="emoji",
        target="jetpack6.2",
        labels=tuple(f"class {i}" for i in range(10)),
        preprocessing=Preprocessing(32, 32, "stretch", 1.0, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
        golden_images=[encode_png(image) for image in golden],
        holdout=pictures("test", range(64, 400)),
        precisions=("fp32", "fp16", "int8"),
        calibration=[encode_png(image) for image in calibration],
        gates={"fp16": 0.003},
    )


@pytest.fixture(scope="module")
def exported(request_, tmp_path_factory):
    stages: list[str] = []
    destination = tmp_path_factory.mktemp("variants") / "emoji.bundle"
    result = export_bundle(
        fitted_classifier(), destination, request=request_, on_stage=stages.append
    )
    return result, stages


def test_every_variant_is_judged_and_its_accuracy_is_beside_the_models(exported):
    result, stages = exported
    assert [*result.variants] == ["fp32", "fp16", "int8"]
    for precision, found in result.manifest.variants.items():
        accuracy = found.accuracy
        assert accuracy.count == 336 and accuracy.reference_top1 > 0.45
        assert accuracy.interval[0] < accuracy.interval[1]
        assert (accuracy.lost - accuracy.gained) / 336 <= accuracy.gate
        assert found.conformance.verdict in ("accepted", "not judged")
        assert any(text.startswith(f"{precision}: top-1 ") for text in stages)
    gates = {
        p: (v.accuracy.gate, v.accuracy.is_overridden) for p, v in result.manifest.variants.items()
    }
    assert gates["fp32"] == (0.0, False) and gates["fp16"] == (0.003, True)
    assert gates["int8"][0] >= 0.005
    assert result.variants["int8"].speed is None  # a Jetson is not this machine


def test_the_files_are_of_their_precisions_and_verify(exported):
    bundle = open_bundle(exported[0].path)
    types = {}
    for precision in bundle.manifest.variants:
        report = verify(bundle, open_runner(bundle, backend="onnxruntime", precision=precision))
        assert report.passed
        graph = onnx.load_model_from_string(bundle.read(f"model.{precision}.onnx")).graph
        types[precision] = {tensor.data_type for tensor in graph.initializer}
        operators = {node.op_type for node in graph.node}
        assert ("QuantizeLinear" in operators) == (precision == "int8")
    assert onnx.TensorProto.FLOAT16 in types["fp16"] and onnx.TensorProto.INT8 in types["int8"]
    assert onnx.TensorProto.FLOAT not in types["fp16"]


def test_the_bundle_tells_how_each_variant_was_made(exported):
    document = json.loads(open_bundle(exported[0].path).read("variants.json"))
    assert document["fp32"] == {} and document["fp16"]["islands"] == []
    int8 = document["int8"]
    assert int8["scheme"] == "tensorrt" and int8["judged_by"] == "emulation"
    assert int8["method"] in {trial["method"] for trial in int8["tried"]}
    assert int8["calibration"]["count"] == 48 and len(int8["calibration"]["sha256"]) == 64
    card = open_bundle(exported[0].path).read("readme.md").decode()
    for text in ("int8, accuracy", "fp16, conformance", "(set by hand)", "emulated"):
        assert text in card


def test_the_same_request_gives_the_same_bytes(exported, request_, tmp_path):
    export_bundle(fitted_classifier(), tmp_path / "again.bundle", request=request_)
    first, second = (
        {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()}
        for root in (exported[0].path, tmp_path / "again.bundle")
    )
    assert first == second


def refused(tmp_path, request, error, match, model=None):
    with pytest.raises(error, match=match):
        export_bundle(model or fitted_classifier(), tmp_path / "x.bundle", request=request)
    assert list(tmp_path.iterdir()) == []


def test_calibration_on_noise_is_caught_by_the_gate_and_nothing_is_written(request_, tmp_path):
    rng = np.random.default_rng(0)
    noise = [encode_png(rng.integers(126, 131, (32, 32, 3), dtype=np.uint8)) for _ in range(48)]
    request = dataclasses.replace(request_, precisions=("int8",), calibration=noise)
    refused(tmp_path, request, CheckFailedError, "in int8 passes its accuracy gate")


def test_an_overflow_planted_in_one_module_is_an_island_that_is_named(request_, tmp_path):
    model = fitted_classifier()
    planted = type(model)()
    planted.load_state_dict(model.state_dict())
    planted.eval()
    with torch.no_grad():  # a ReLU lets a positive factor through
        planted.down.weight *= 1e5
        planted.down.bias *= 1e5
        planted.last.weight *= 1e-5
    request = dataclasses.replace(request_, precisions=("fp16",))
    result = export_bundle(planted, tmp_path / "x.bundle", request=request)
    islands = {island["module"]: island for island in result.variants["fp16"].details["islands"]}
    assert {"down", "last"} <= islands.keys() and "stem" not in islands
    assert "overflow" in islands["down"]["reason"] and islands["down"]["error_without"] is None
    assert [*result.manifest.variants] == ["fp16"]


def test_a_weight_that_is_not_a_number_is_refused(request_, tmp_path):
    model = fitted_classifier()
    broken = type(model)()
    broken.load_state_dict(model.state_dict())
    broken.eval()
    with torch.no_grad():
        broken.last.weight[0, 0, 0, 0] = float("nan")
    refused(tmp_path, request_, BadInputError, "last", model=broken)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"precisions": ("fp16",), "target": "onnxruntime-x86"}, "takes fp32, int8, each once"),
        ({"precisions": ("int8", "int8")}, "each once"),
        ({"precisions": ()}, "found: none"),
        ({"calibration": ()}, "at least 32 calibration images; found: 0"),
        ({"holdout": None}, "fp16, int8 and no such images"),
        ({"max_batch": 0}, "largest batch is 1 to 256"),
    ],
)
def test_what_does_not_go_together_is_refused(change, match, request_, tmp_path):
    refused(tmp_path, dataclasses.replace(request_, **change), BadInputError, match)


def test_an_image_that_is_both_golden_and_for_calibration_is_refused(request_, tmp_path):
    shared = [*request_.calibration, request_.golden_images[5]]
    request = dataclasses.replace(request_, calibration=shared)
    refused(tmp_path, request, BadInputError, "1 images in both, first calibration image 48")


@pytest.mark.parametrize("allow_slower", [False, True])
def test_a_variant_that_is_slower_on_its_own_target_is_not_shipped_unasked(
    allow_slower, request_, tmp_path, monkeypatch
):
    slow = Speed(1.3, (1.2, 1.4), 1.3, 1.0, 41)
    monkeypatch.setattr(export.judge.judging, "is_host", lambda target: True)
    monkeypatch.setattr(export.judge.judging, "compare_speed", lambda *args: slow)
    request = dataclasses.replace(
        request_,
        target="onnxruntime-x86",
        precisions=("fp32", "int8"),
        allow_slower=allow_slower,
        max_batch=4,
    )
    if not allow_slower:
        refused(tmp_path, request, CheckFailedError, r"1\.30x \[1\.20, 1\.40\]")
        return
    result = export_bundle(fitted_classifier(), tmp_path / "x.bundle", request=request)
    assert result.variants["int8"].speed == slow and result.variants["fp32"].speed is None
    assert result.manifest.max_batch == 4 and result.manifest.inputs[0].shape[0] == "batch"


def test_a_file_that_answers_otherwise_in_a_larger_batch_is_refused(
    request_, tmp_path, monkeypatch
):
    """The control: a run that forgets the images behind the first of a batch of four."""
    real = export.judge.judging.open_variant

    def forgetful(precision, file, target):
        run = real(precision, file, target)
        return lambda x: np.repeat(run(x[:1]), 4, axis=0) if len(x) == 4 else run(x)

    monkeypatch.setattr(export.judge.judging, "open_variant", forgetful)
    request = dataclasses.replace(request_, precisions=("fp32",), max_batch=4)
    refused(tmp_path, request, CheckFailedError, "in a batch of 4")
