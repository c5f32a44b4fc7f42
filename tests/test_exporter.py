import dataclasses
import json

import numpy as np
import onnx
import pytest
import torch
from export_models import AttentionBlock, Chain, randomized, small_cnn
from torch import nn

import export.exporter
from deploy.bundle.read import open_bundle
from deploy.errors import BadInputError, CheckFailedError
from deploy.measure.verify import verify
from deploy.runtime.decode import encode_png
from deploy.runtime.preprocess import Preprocessing, preprocess
from deploy.runtime.runner import open_runner
from export.exporter import ExportRequest, export_bundle

CLASSES = ("circle", "square", "star", "none")


def images(count: int, *, seed: int) -> list[np.ndarray]:
    """Return images whose mean colour and pattern vary, of several sizes."""
    rng = np.random.default_rng(seed)
    sizes = [(16, 16), (20, 24), (33, 17)]
    return [
        np.clip(rng.normal(rng.uniform(30, 220, 3), 40, (*sizes[i % 3], 3)), 0, 255).astype(
            np.uint8
        )
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def request_():
    return ExportRequest(
        name="shapes",
        target="onnxruntime-x86",
        labels=CLASSES,
        preprocessing=Preprocessing(16, 16, "stretch", 1.0, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
        golden_images=[encode_png(image) for image in images(64, seed=0)],
        golden_labels=[i % 4 for i in range(64)],
        holdout=(images(10, seed=1), [i % 4 for i in range(10)]),
        provenance={"dataset_sha256": "0" * 64, "edgereg": "0.1.0"},
    )


@pytest.fixture(scope="module")
def exported(request_, tmp_path_factory):
    destination = tmp_path_factory.mktemp("export") / "shapes.bundle"
    stages = []
    result = export_bundle(
        randomized(small_cnn()), destination, request=request_, on_stage=stages.append
    )
    return result, stages


def test_a_bundle_opens_and_verifies_on_the_deploy_side(exported):
    result, _ = exported
    bundle = open_bundle(result.path)
    assert bundle.manifest == result.manifest
    assert bundle.labels == CLASSES
    report = verify(bundle, open_runner(bundle, backend="onnxruntime", precision="fp32"))
    assert report.passed


def test_the_reference_is_the_model_itself_in_float64_on_deploys_preprocessing(exported):
    bundle = open_bundle(exported[0].path)
    inputs = torch.from_numpy(bundle.array("golden/preprocessed.npy"))
    with torch.no_grad():
        expected = randomized(small_cnn()).double()(inputs.double()).float().numpy()
    np.testing.assert_array_equal(bundle.array("golden/logits.npy"), expected)
    assert bundle.array("golden/labels.npy").tolist() == [i % 4 for i in range(64)]
    assert exported[0].variants["fp32"].comparison.max_scaled_error < 1e-6


def test_the_bundle_tells_what_was_done_and_measured(exported):
    result, stages = exported
    bundle = open_bundle(result.path)
    report = json.loads(bundle.read("simplify.json"))
    assert report["passes"]["fold_batchnorm"]["changed"] == {
        "1": "folded into 0",
        "5": "folded into 4",
    }
    assert report["float64_relative_error_below"]["model"] <= 1e-13
    card = bundle.read("readme.md").decode()
    top1 = f"{result.variants['fp32'].paired.top1:.2%}"
    for fact in (
        "2 BatchNorms folded, 2 dropouts stripped",
        top1,
        "10 held-out",
        "64 golden",
        "0" * 64,
    ):
        assert fact in card
    assert bundle.read("labels.txt").decode().split() == list(CLASSES)
    assert "not required" in "\n".join(stages)
    assert set(result.manifest.provenance["exporter"]) >= {"torch", "onnx", "onnxruntime"}


def test_two_exports_of_the_same_model_are_the_same_bytes_and_name_no_machine(
    exported, request_, tmp_path
):
    destination = tmp_path / "again.bundle"
    export_bundle(randomized(small_cnn()), destination, request=request_)
    first, second = (
        {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}
        for root in (exported[0].path, destination)
    )
    assert first == second
    for name, data in first.items():
        for secret in (str(tmp_path), "site-packages", __file__, ".py"):
            assert secret.encode() not in data, name


def test_the_holdout_accuracy_is_the_files_own(exported, request_):
    model, (pictures, labels) = randomized(small_cnn()), request_.holdout
    inputs = torch.from_numpy(preprocess(pictures, request_.preprocessing))
    with torch.no_grad():
        expected = (model(inputs).argmax(1) == torch.tensor(labels)).float().mean().item()
    paired = exported[0].variants["fp32"].paired
    assert (paired.count, paired.flips) == (10, 0)
    assert paired.top1 == paired.reference_top1 == pytest.approx(expected)
    accuracy = exported[0].manifest.variants["fp32"].accuracy
    assert (accuracy.top1, accuracy.count, accuracy.is_certified) == (paired.top1, 10, False)


def refused(tmp_path, request, model, error, match):
    destination = tmp_path / "x.bundle"
    with pytest.raises(error, match=match):
        export_bundle(model, destination, request=request)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"golden_images": [], "golden_labels": None}, "at least 64 golden images; found: 0"),
        ({"golden_labels": [0] * 64}, "none of square, star, none"),
        ({"golden_labels": [0] * 63}, "64 images, 63 classes"),
        ({"golden_labels": [4] * 64}, "64 images, 64 classes, of them 4"),
        ({"holdout": ([], [])}, "each held-out image has a class from 0 to 3; found: 0 images"),
        (
            {"labels": CLASSES[:3], "golden_labels": None, "holdout": None},
            r"\(2, 4\) for a batch of 2",
        ),
        ({"labels": ("a", "b", "c", "d\ne")}, "one line of printable text"),
        ({"target": "jetpack6"}, "did you mean jetpack6.2?"),
        ({"golden_images": [b"BM not an image"] * 64}, "golden/0000.bmp"),
    ],
)
def test_a_request_that_cannot_make_a_useful_bundle_is_refused(change, match, request_, tmp_path):
    request = dataclasses.replace(request_, **change)
    refused(tmp_path, request, randomized(small_cnn()), BadInputError, match)


def test_unlabelled_golden_images_are_enough(request_, tmp_path):
    request = dataclasses.replace(request_, golden_labels=None, holdout=None)
    result = export_bundle(randomized(AttentionBlock()), tmp_path / "x.bundle", request=request)
    assert result.manifest.golden.labels is None
    assert result.variants["fp32"].paired is None
    assert "not measured" in open_bundle(result.path).read("readme.md").decode()


def test_a_model_in_training_mode_is_refused_even_in_part(request_, tmp_path):
    model = randomized(small_cnn())
    model[3].train()
    refused(tmp_path, request_, model, BadInputError, "1 modules in training mode, first 3")
    refused(tmp_path, request_, model.train(), BadInputError, "first the model itself")


def test_a_half_precision_model_is_refused(request_, tmp_path):
    refused(tmp_path, request_, randomized(small_cnn()).half(), BadInputError, "torch.float16")


def test_a_batchnorm_that_cannot_be_folded_stops_the_export_with_the_reason(request_, tmp_path):
    model = randomized(Chain(nn.BatchNorm2d(3, track_running_stats=False), nn.Conv2d(3, 4, 1)))
    refused(tmp_path, request_, model, CheckFailedError, "BatchNorm 0.; 0: it has no running stat")


def test_a_file_that_answers_otherwise_than_the_model_is_not_exported(
    request_, tmp_path, monkeypatch
):
    """The control of the last comparison: a file whose weights were moved by 0.1 %."""

    def to_onnx(*args, **kwargs):
        proto = onnx.load_model_from_string(export.onnx_file.to_onnx.to_onnx(*args, **kwargs))
        for weight in proto.graph.initializer:
            if weight.data_type == onnx.TensorProto.FLOAT:
                weight.raw_data = (np.frombuffer(weight.raw_data, np.float32) * 1.001).tobytes()
        return proto.SerializeToString()

    monkeypatch.setattr(export.exporter, "to_onnx", to_onnx)
    refused(
        tmp_path,
        request_,
        randomized(small_cnn()),
        CheckFailedError,
        "scaled error .* golden images",
    )


def test_an_existing_bundle_is_kept_without_force(exported, request_):
    with pytest.raises(BadInputError, match="exists"):
        export_bundle(randomized(small_cnn()), exported[0].path, request=request_)
