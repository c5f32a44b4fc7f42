"""The bundle of an encoder on the device's side: its index, its parity, its answers."""

import dataclasses
import io
import json

import numpy as np
import pytest
from deploy_bundle import (
    COUNT,
    LABELS,
    bundle_parts,
    embedding_parts,
    linear_onnx,
    npy,
    write_embedding_bundle,
    write_small_bundle,
)

from deploy.bundle.index import index_contents, read_index
from deploy.bundle.manifest_json import manifest_from_bytes, manifest_to_bytes
from deploy.bundle.read import open_bundle
from deploy.bundle.write import digest_line, write_bundle
from deploy.errors import BadInputError, CheckFailedError, TamperedBundleError
from deploy.measure.bench import bench
from deploy.measure.verify import verify
from deploy.runtime.neighbours import ReferenceIndex
from deploy.runtime.runner import open_runner
from deploy.service.infer import Unreadable, retrieve
from edgereg.cli import main

MANIFEST, CONTENTS = embedding_parts()
WEIGHT = np.eye(3) + 0.1


def runner(bundle):
    return open_runner(bundle, backend="onnxruntime", precision="fp32")


def stored(name):
    return np.load(io.BytesIO(CONTENTS[name]))


def failures(bundle):
    report = verify(bundle, runner(bundle))
    assert report.stages[0].comparison.passed  # decoding and pre-processing are as they were
    assert {stage.comparison.passed for stage in report.stages[1:]} == {False}
    return " ".join(report.stages[1].comparison.reasons)


def test_a_right_bundle_verifies_on_its_embeddings(tmp_path):
    bundle = write_embedding_bundle(tmp_path / "b")
    report = verify(bundle, runner(bundle))
    assert report.passed
    assert [stage.compared.rpartition(" ")[2] for stage in report.stages[1:]] == ["embeddings"] * 2
    document = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert document["stages"][1]["neighbour_agreement"] == 1.0
    assert document["stages"][1]["min_cosine"] == pytest.approx(1, abs=1e-6)
    assert "top1_agreement" not in document["stages"][1]


def test_a_rotated_embedding_has_the_right_lengths_and_fails_by_its_cosine(tmp_path):
    turn = np.array([[np.cos(0.1), -np.sin(0.1), 0], [np.sin(0.1), np.cos(0.1), 0], [0, 0, 1]])
    rotated = linear_onnx(WEIGHT @ turn, output="embedding")
    bundle = write_embedding_bundle(tmp_path / "b", **{"model.fp32.onnx": rotated})
    inputs, golden = stored("golden/preprocessed.npy"), stored("golden/outputs.npy")
    lengths = (np.linalg.norm(rows, axis=1) for rows in (runner(bundle)(inputs), golden))
    np.testing.assert_allclose(*lengths, rtol=1e-5)
    assert "cosine similarity 0.99" in failures(bundle)


def test_the_embeddings_of_two_images_that_were_swapped_fail_by_their_neighbours(tmp_path):
    golden = stored("golden/outputs.npy")
    golden[[0, 1]] = golden[[1, 0]]
    bundle = write_embedding_bundle(tmp_path / "b", **{"golden/outputs.npy": npy(golden)})
    assert "neighbour agreement 0.6667 < 1.0000" in failures(bundle)


def test_a_scaled_embedding_has_the_right_direction_and_fails_by_its_error(tmp_path):
    model = linear_onnx(1.01 * WEIGHT, output="embedding")
    bundle = write_embedding_bundle(tmp_path / "b", **{"model.fp32.onnx": model})
    assert failures(bundle).startswith("scaled error") and "cosine" not in failures(bundle)


def test_bench_times_the_search_and_checks_the_embeddings(tmp_path):
    bundle = write_embedding_bundle(tmp_path / "b")
    result = bench(bundle, runner(bundle), count=30, warmup=0)
    assert result.check.passed and result.check.golden.neighbour_agreement == 1.0
    assert min(result.samples_ms["postprocess"]) > 0
    wrong = linear_onnx(-WEIGHT, output="embedding")
    bundle = write_embedding_bundle(tmp_path / "w", **{"model.fp32.onnx": wrong})
    assert not bench(bundle, runner(bundle), count=1, warmup=0).check.passed


def test_infer_finds_the_nearest_references_and_what_they_vote_for(tmp_path):
    bundle = write_embedding_bundle(tmp_path / "b")
    results = [*retrieve(bundle, runner(bundle), [bundle.path / "golden"], top_k_count=2)]
    assert len(results) == COUNT
    for i, result in enumerate(results):
        assert [near.label for near in result.nearest] == [LABELS[i % 3]] * 2
        assert result.vote[0][0] == LABELS[i % 3]
        assert result.nearest[0].name.startswith(f"{LABELS[i % 3]}/")
        assert 1 >= result.nearest[0].cosine >= result.nearest[1].cosine
    (missing,) = retrieve(bundle, runner(bundle), [tmp_path / "no.png"], top_k_count=2)
    assert isinstance(missing, Unreadable)


def test_infer_prints_neighbours_as_text_and_json(tmp_path, capsys):
    path = write_embedding_bundle(tmp_path / "b").path
    assert main(["infer", str(path), str(path / "golden/0.png"), "--top-k", "2"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("red/") == 2 and shown.count("%") == 1
    assert main(["infer", str(path), str(path / "golden/0.png"), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["nearest"][0].keys() == {"name", "label", "cosine"}
    assert document["vote"][0]["label"] == "red" and 0 < document["vote"][0]["share"] <= 1


def test_verify_prints_the_columns_of_an_embedding(tmp_path, capsys):
    path = write_embedding_bundle(tmp_path / "b").path
    assert main(["verify", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "cosine" in shown and "neighbours" in shown and "top-1" not in shown
    assert "1.000000  0.999999     100.00%  100.00%    pass" in shown


def test_an_index_without_labels_answers_with_names_alone(tmp_path, capsys):
    contents = {name: data for name, data in CONTENTS.items() if name != "index/labels.npy"}
    manifest = dataclasses.replace(
        MANIFEST, labels=(), index=dataclasses.replace(MANIFEST.index, labels=None)
    )
    write_bundle(tmp_path / "b", manifest, contents)
    assert main(["infer", str(tmp_path / "b"), str(tmp_path / "b/golden/0.png")]) == 0
    shown = capsys.readouterr().out
    assert "%" not in shown and shown.count(".png 0.9") == 3


def test_a_model_that_answers_with_zeros_stops_the_run(tmp_path):
    model = linear_onnx(np.zeros((3, 3)), output="embedding")
    bundle = write_embedding_bundle(tmp_path / "b", **{"model.fp32.onnx": model})
    with pytest.raises(CheckFailedError, match="3 zeros"):
        list(retrieve(bundle, runner(bundle), [bundle.path / "golden"], top_k_count=1))


def changed(name, change):
    rows = stored(name)
    return {name: npy(change(rows))}


def with_nan(rows):
    rows[2, 1] = np.nan
    return rows


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        (changed("index/embeddings.npy", lambda e: e[:-1]), r"float32 \(8, 3\), not float32"),
        (changed("index/embeddings.npy", lambda e: e[:, :2]), r"float32 \(9, 2\), not float32"),
        (changed("index/embeddings.npy", lambda e: e[None]), r"\(1, 9, 3\), not float32"),
        (changed("index/embeddings.npy", lambda e: e.astype(np.float64)), "float64"),
        (changed("index/embeddings.npy", lambda e: e.astype(object)), "without objects"),
        (changed("index/embeddings.npy", with_nan), "not finite"),
        (changed("index/embeddings.npy", lambda e: 1.001 * e), "to 1.001, not 1"),
        (changed("index/embeddings.npy", lambda e: 0 * e), "lengths from 0 to 0, not 1"),
        (changed("index/labels.npy", lambda x: x + 1), "from 1 to 3; there are 3"),
        (changed("index/labels.npy", lambda x: x - 1), "from -1 to 1"),
        (changed("index/labels.npy", lambda x: x[1:]), r"\(8,\), not integer \(9,\)"),
        (changed("index/labels.npy", lambda x: x / 1), "float64"),
        ({"index/names.json": b'["a"]'}, "names 1 images, not 9"),
        ({"index/names.json": b'{"a": 1}'}, "no list of names"),
        ({"index/names.json": b"[1,2,3,4,5,6,7,8,9]"}, "no list of names"),
        ({"index/names.json": b"not json"}, "strict JSON"),
    ],
)
def test_an_index_that_is_none_is_refused_by_every_command(changes, found, tmp_path):
    bundle = write_embedding_bundle(tmp_path / "b", **changes)
    with pytest.raises(BadInputError, match=found):
        read_index(bundle)
    for use in (
        lambda: verify(bundle, runner(bundle)),
        lambda: bench(bundle, runner(bundle), count=1),
        lambda: next(retrieve(bundle, runner(bundle), [bundle.path], top_k_count=1)),
    ):
        with pytest.raises(BadInputError, match=found):
            use()


@pytest.mark.parametrize("name", [name for name in CONTENTS if name.startswith("index/")])
def test_an_index_file_that_is_not_listed_missing_or_changed_is_refused(name, tmp_path):
    contents = {key: data for key, data in CONTENTS.items() if key != name}
    with pytest.raises(BadInputError, match=rf"not listed: \['{name}'\]"):
        write_bundle(tmp_path / "b", MANIFEST, contents)
    file = write_embedding_bundle(tmp_path / "b").path / name
    data = file.read_bytes()
    file.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    with pytest.raises(TamperedBundleError, match=f"'{name}'"):
        open_bundle(tmp_path / "b")
    file.unlink()
    with pytest.raises(TamperedBundleError, match=f"'{name}' is missing"):
        open_bundle(tmp_path / "b")


def test_a_classifier_has_no_index_to_search(tmp_path):
    bundle = write_small_bundle(tmp_path / "b")
    assert read_index(bundle) is None
    with pytest.raises(BadInputError, match="is a classifier's"):
        next(retrieve(bundle, runner(bundle), [bundle.path], top_k_count=1))


def test_names_that_could_not_be_read_again_are_not_written():
    units = np.eye(2, dtype=np.float32)
    index = ReferenceIndex(units, ("a" * (1 << 20), "b"), None, ())
    with pytest.raises(BadInputError, match="for 2 names"):
        index_contents(index)


CLASSIFIER, _ = bundle_parts()


@pytest.mark.parametrize(
    ("manifest", "changes", "problem"),
    [
        (MANIFEST, {"index": None}, "the task embedding without an index"),
        (CLASSIFIER, {"index": MANIFEST.index}, "the task classification with an index"),
        (MANIFEST, {"format_version": 2}, "in format 2"),
        (MANIFEST, {"index": dataclasses.replace(MANIFEST.index, count=0)}, "an index of 0"),
        (MANIFEST, {"labels": ()}, "labels without those of the index or the reverse"),
        (MANIFEST, {"labels": ("red", "red", "blue")}, "or one twice"),
        (
            MANIFEST,
            {"index": dataclasses.replace(MANIFEST.index, labels=None)},
            "labels without those of the index or the reverse",
        ),
        (MANIFEST, {"variants": CLASSIFIER.variants}, "another task's"),
        (CLASSIFIER, {"variants": MANIFEST.variants}, "another task's"),
        (
            MANIFEST,
            {"outputs": (dataclasses.replace(MANIFEST.outputs[0], shape=("batch", "d")),)},
            r"not \(batch, a number\)",
        ),
        (
            MANIFEST,
            {"index": dataclasses.replace(MANIFEST.index, names="../names.json")},
            r"the file name '\.\./names\.json'",
        ),
    ],
)
def test_a_manifest_whose_task_and_parts_disagree_is_refused(manifest, changes, problem):
    with pytest.raises(BadInputError, match=problem):
        manifest_to_bytes(dataclasses.replace(manifest, **changes))


def test_a_limit_outside_its_range_is_refused():
    variant = MANIFEST.variants["fp32"]
    broken = dataclasses.replace(variant.tolerance, min_cosine=1.1)
    variants = {"fp32": dataclasses.replace(variant, tolerance=broken)}
    with pytest.raises(BadInputError, match="a tolerance outside 0 to 1"):
        manifest_to_bytes(dataclasses.replace(MANIFEST, variants=variants))


def test_a_manifest_says_which_task_by_its_own_keys_and_survives_json():
    for manifest in (MANIFEST, CLASSIFIER):
        data = manifest_to_bytes(manifest)
        assert manifest_from_bytes(data, bundle="b") == manifest
        assert ("index" in json.loads(data)) == (manifest is MANIFEST)


def test_a_classifier_of_format_2_is_still_read_and_verified(tmp_path):
    path = write_small_bundle(tmp_path / "b").path
    document = json.loads((path / "manifest.json").read_bytes())
    data = json.dumps(document | {"format_version": 2}).encode()
    (path / "manifest.json").write_bytes(data)
    (path / "manifest.json.sha256").write_bytes(digest_line(data))
    bundle = open_bundle(path)
    assert bundle.manifest.format_version == 2 and verify(bundle, runner(bundle)).passed
