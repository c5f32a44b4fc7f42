import configparser
import dataclasses
import json
import re

import numpy as np
import pytest
from deploy_bundle import SPEC, bundle_parts, write_small_bundle

from deploy.bundle.read import open_bundle
from deploy.bundle.write import write_bundle
from deploy.errors import BadInputError
from deploy.runtime.preprocess import normalize
from export.repositories import write_repository


@pytest.fixture
def bundle(tmp_path):
    return write_small_bundle(tmp_path / "colours.bundle")


def for_jetson(path, **preprocessing):
    manifest, contents = bundle_parts()
    spec = dataclasses.replace(SPEC, std=(0.25, 0.25, 0.25))
    manifest = dataclasses.replace(
        manifest,
        target={"name": "jetpack6.2", "opset": 20},
        preprocessing=dataclasses.replace(spec, **preprocessing),
    )
    write_bundle(path, manifest, contents)
    return open_bundle(path)


def test_a_triton_repository_holds_the_model_its_shapes_and_its_labels(bundle, tmp_path):
    write_repository(bundle, tmp_path / "repo", kind="triton", precision="fp32")
    root = tmp_path / "repo" / "colours"
    assert (root / "1" / "model.onnx").read_bytes() == bundle.read("model.fp32.onnx")
    assert (root / "labels.txt").read_text().split() == ["red", "green", "blue"]
    config = (root / "config.pbtxt").read_text()
    assert 'name: "colours"' in config and "max_batch_size: 16" in config
    assert re.search(r'input \[\{ name: "images" .*dims: \[3, 8, 8\]', config)
    assert re.search(r'output \[\{ name: "logits" .*dims: \[3\]', config)
    assert "tensorrt" not in config
    assert json.loads((root / "preprocessing.json").read_text()) == SPEC_JSON


SPEC_JSON = json.loads(json.dumps(SPEC.to_json()))


def test_on_a_jetson_triton_runs_it_through_tensorrt(tmp_path):
    write_repository(for_jetson(tmp_path / "b"), tmp_path / "repo", kind="triton", precision="fp32")
    assert 'name: "tensorrt"' in (tmp_path / "repo/colours/config.pbtxt").read_text()


def test_kserve_is_told_where_the_repository_is(bundle, tmp_path):
    uri = "s3://models/colours"
    write_repository(bundle, tmp_path / "k", kind="kserve", precision="fp32", storage_uri=uri)
    text = (tmp_path / "k/inferenceservice.yaml").read_text()
    assert f'storageUri: "{uri}"' in text and 'name: "colours"' in text
    assert (tmp_path / "k/colours/1/model.onnx").is_file()
    for wrong in (None, "models/colours"):
        with pytest.raises(BadInputError, match="--storage-uri"):
            write_repository(
                bundle, tmp_path / "l", kind="kserve", precision="fp32", storage_uri=wrong
            )


def test_nvinfers_formula_gives_what_the_bundles_preprocessing_does(tmp_path):
    bundle = for_jetson(tmp_path / "b")
    write_repository(bundle, tmp_path / "d", kind="deepstream", precision="fp32")
    config = configparser.ConfigParser()
    config.read(tmp_path / "d/nvinfer.txt")
    found = dict(config["property"])
    pixels = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(1, 8, 8, 3)
    offsets = np.array([float(n) for n in found["offsets"].split(";")])
    theirs = float(found["net-scale-factor"]) * (pixels - offsets)
    ours = normalize(pixels, bundle.manifest.preprocessing)
    np.testing.assert_allclose(theirs.transpose(0, 3, 1, 2), ours, rtol=1e-5, atol=1e-5)
    assert found["infer-dims"] == "3;8;8" and found["network-mode"] == "0"
    assert (tmp_path / "d/labels.txt").read_text() == "red;green;blue\n"


@pytest.mark.parametrize(
    ("preprocessing", "match"),
    [
        ({"resize": "cover", "crop_fraction": 0.875}, "by stretching it"),
        ({"std": (0.2, 0.3, 0.4)}, "by one factor"),
    ],
)
def test_what_nvinfer_cannot_say_is_refused_and_nothing_is_written(preprocessing, match, tmp_path):
    bundle = for_jetson(tmp_path / "b", **preprocessing)
    with pytest.raises(BadInputError, match=match):
        write_repository(bundle, tmp_path / "d", kind="deepstream", precision="fp32")
    assert not (tmp_path / "d").exists()


def test_a_bundle_for_another_machine_or_precision_is_refused(bundle, tmp_path):
    with pytest.raises(BadInputError, match="DeepStream runs on NVIDIA's boards"):
        write_repository(bundle, tmp_path / "d", kind="deepstream", precision="fp32")
    with pytest.raises(BadInputError, match=r"'int8'; 'colours\.bundle' has fp32"):
        write_repository(bundle, tmp_path / "d", kind="triton", precision="int8")


def test_an_earlier_repository_is_kept_without_force(bundle, tmp_path):
    for force in (False, True):
        write_repository(bundle, tmp_path / "r", kind="triton", precision="fp32", force=force)
    with pytest.raises(BadInputError, match="--force"):
        write_repository(bundle, tmp_path / "r", kind="triton", precision="fp32")
