import dataclasses
import json

import pytest
from deploy_bundle import bundle_parts

from deploy.bundle.manifest import Accuracy, FileEntry, TensorSpec, Tolerance, check_file_names
from deploy.bundle.manifest_json import manifest_from_bytes, manifest_to_bytes
from deploy.errors import BadInputError

MANIFEST, _ = bundle_parts()
VARIANT = MANIFEST.variants["fp32"]


def test_a_manifest_survives_the_way_to_json_and_back():
    data = manifest_to_bytes(MANIFEST)
    assert manifest_from_bytes(data, bundle="b") == MANIFEST
    assert manifest_to_bytes(manifest_from_bytes(data, bundle="b")) == data
    assert data.endswith(b"}\n")
    assert list(json.loads(data)) == sorted(json.loads(data))


@pytest.mark.parametrize("version", [0, 1, 4])
def test_another_format_is_named_before_its_keys_are_judged(version):
    data = json.dumps({"format_version": version, "new": 1}).encode()
    found = f"bundle 'b' has format {version}; this edgereg reads 2-3"
    with pytest.raises(BadInputError, match=found):
        manifest_from_bytes(data, bundle="b")


@pytest.mark.parametrize("document", ["[]", "null", "{}", '{"format_version": "1"}'])
def test_a_document_that_is_no_manifest_is_refused(document):
    with pytest.raises(BadInputError, match=r"manifest\.json of bundle 'b' must be strict JSON"):
        manifest_from_bytes(document.encode(), bundle="b")


ACCURACY = Accuracy(0.5, 0.5, 10, 1, 1, (-0.3, 0.3), 0.01, False, False)


def with_variant(**changes):
    return {"variants": {"fp32": dataclasses.replace(VARIANT, **changes)}}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"name": "../b"}, "the name '../b'"),
        ({"labels": ("red", "red", "blue")}, "no labels, or one twice"),
        ({"labels": ("red", "green")}, "one for each label"),
        ({"inputs": ()}, "not one input"),
        (
            {"inputs": (TensorSpec("i", "float32", ("batch", 3, 8, 9)),)},
            "as the pre-processing gives it",
        ),
        ({"inputs": (TensorSpec("i", "float16", ("batch", 3, 8, 8)),)}, "not float32"),
        ({"max_batch": 1}, "does not fit max_batch 1"),
        ({"max_batch": 0}, "max_batch 0"),
        ({"variants": {}}, "no variants"),
        ({"variants": {"fp16": VARIANT}}, "the key of another precision"),
        (with_variant(tolerance=Tolerance(-1.0, 1.0, "x")), "a tolerance outside"),
        (with_variant(tolerance=Tolerance(0.1, 1.0, "")), "without a reason"),
        (with_variant(accuracy=dataclasses.replace(ACCURACY, top1=1.1)), "an accuracy outside"),
        (with_variant(accuracy=dataclasses.replace(ACCURACY, count=0)), "of no images"),
        (with_variant(accuracy=dataclasses.replace(ACCURACY, lost=11)), "more answers than"),
        (
            with_variant(accuracy=dataclasses.replace(ACCURACY, lost=3)),
            "not that of its",
        ),
        (with_variant(accuracy=dataclasses.replace(ACCURACY, interval=(0.1, 0.2))), "outside its"),
        (with_variant(file="../../etc/passwd"), "the file name '../../etc/passwd'"),
        ({"golden": dataclasses.replace(MANIFEST.golden, count=5)}, "5 for 6 golden images"),
        ({"files": (FileEntry("a", 1, "0" * 64),)}, "files that are not listed"),
        ({"files": (FileEntry("a", 1, "0" * 63),)}, "not 64 lower-case"),
        ({"files": (FileEntry("a", -1, "0" * 64),)}, "size outside"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(changes, problem):
    with pytest.raises(BadInputError, match=problem):
        manifest_to_bytes(dataclasses.replace(MANIFEST, **changes))


@pytest.mark.parametrize("value", [{1: "x"}, {"x": (1, 2)}, {"x": object()}, {"x": float("nan")}])
def test_provenance_that_json_does_not_keep_is_refused(value):
    with pytest.raises(BadInputError, match="a manifest must"):
        manifest_to_bytes(dataclasses.replace(MANIFEST, provenance=value))


@pytest.mark.parametrize(
    "name",
    ["/a", "a/", "a//b", "../a", "a/../b", "a..b", "./a", "A", "a b", "a\\b", "ä", "a\n", "", "."],
)
def test_a_file_name_that_could_leave_the_bundle_or_confuse_is_refused(name):
    with pytest.raises(BadInputError, match="the file name"):
        check_file_names(["model.onnx", name])


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["a", "a"], "'a' twice"),
        (["a", "a/b"], "as a file and as a folder"),
        (["manifest.json"], "reserved"),
        (["manifest.json.sha256"], "reserved"),
        (["x" * 256], "256 characters"),
        ([str(i) for i in range(5000)], "5000 files"),
    ],
)
def test_file_names_that_clash_are_refused(names, found):
    with pytest.raises(BadInputError, match=found):
        check_file_names(names)
