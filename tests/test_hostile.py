"""Some hundreds of what benchmarks/hostile.py does by the ten thousand, on the tests' bundles."""

import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from deploy_bundle import linear_onnx, write_embedding_bundle, write_small_bundle

from deploy import publish
from deploy.bundle import read

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

from hostile import (
    Loader,
    broken,
    hostile_models,
    mutated_bundles,
    mutated_caches,
    mutated_images,
)
from mutants import mutate_bytes, mutate_json, mutate_onnx


@pytest.fixture
def bases(tmp_path):
    return [
        write_small_bundle(tmp_path / "classifier").path,
        write_embedding_bundle(tmp_path / "encoder").path,
    ]


def test_a_damaged_bundle_is_always_refused(bases):
    tally = mutated_bundles(bases, 300, seed=1)
    assert tally.total() == 300
    assert not {"bytes: accepted", "files: accepted"} & tally.keys()
    assert min(tally["bytes: refused"], tally["files: refused"]) > 30
    assert tally["manifest hashed again: refused"] > 10


def test_the_count_of_accepted_ones_can_tell(bases, monkeypatch):
    monkeypatch.setattr(read, "_check_digest", lambda path, entry, actual: None)
    assert mutated_bundles(bases, 100, seed=1)["bytes: accepted"] > 0


def test_damaged_images_are_pixels_or_an_error_of_ours(bases):
    images = [path.read_bytes() for path in sorted(bases[0].glob("golden/*.png"))]
    tally = mutated_images(images, 200, seed=2)
    assert tally.total() == 200 and tally["images: refused"] > 0


def test_of_a_damaged_cache_nothing_is_used(tmp_path):
    tally = mutated_caches(tmp_path, 300, seed=3)
    assert tally["caches: used"] == 0 and tally["caches: refused"] > 150


def test_a_hostile_model_at_worst_ends_a_child(bases, tmp_path, monkeypatch):
    monkeypatch.setattr(publish.os, "fsync", lambda handle: None)  # for speed
    figures = hostile_models(bases, 120, seed=4, folder=tmp_path, whole_way=1)
    assert figures["legitimate exports"] == {"loaded": 2}
    ended = figures["hostile models"]
    assert ended.total() == 120
    assert ended["refused before ONNX Runtime"] > 40
    assert ended["loaded"] > 0  # or nothing would have come through to the child
    assert figures["refused ones that were loaded anyway"].total() > 0


def test_what_crashes_onnx_runtime_is_a_crash_to_the_harness_too(tmp_path):
    """`Min(x, "")`, which the structure does not let pass."""
    import onnx

    proto = onnx.load_model_from_string(linear_onnx(np.eye(3)))
    proto.graph.node.append(onnx.helper.make_node("Min", ["images", ""], ["m"]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(read, "check_structure", lambda model, file: None)
        path = write_small_bundle(
            tmp_path / "b", **{"model.fp32.onnx": proto.SerializeToString()}
        ).path
    with closing(Loader()) as loader:
        assert loader.load(path, "fp32", is_checked=False) == "killed by signal 11"
        assert loader.load(path, "fp32") == "an error in the child: BadInputError"


@pytest.mark.parametrize(
    ("title", "word"), [("damaged bundles", "bytes: accepted"), ("legitimate exports", "refused")]
)
def test_one_failure_is_enough(title, word):
    good = {"damaged bundles": {"bytes: refused": 9}, "legitimate exports": {"loaded": 9}}
    assert broken(good) == []
    assert broken(good | {title: {word: 1}}) == [word]


def test_mutants_differ_and_are_the_same_by_the_same_seed():
    model, document = linear_onnx(np.eye(3)), b'{"a": [1, {"b": "c"}]}'
    for change, data in ((mutate_bytes, model), (mutate_onnx, model), (mutate_json, document)):
        some = [change(data, np.random.default_rng(seed)) for seed in range(20)]
        assert some == [change(data, np.random.default_rng(seed)) for seed in range(20)]
        assert len(set(some)) > 10


def test_changes_upon_changes_need_no_model_that_holds_together():
    model, rng = linear_onnx(np.eye(3)), np.random.default_rng(0)
    mutants = {mutate_onnx(model, rng) for _ in range(3000)}  # some meet a weight without its data
    assert len(mutants) > 1000
