import dataclasses
import hashlib
import json
import shutil
import subprocess

import numpy as np
import pytest
from deploy_bundle import bundle_parts, npy, write_small_bundle

from deploy.bundle.read import open_bundle
from deploy.bundle.write import digest_line, write_bundle
from deploy.errors import BadInputError, TamperedBundleError


@pytest.fixture
def path(tmp_path):
    write_small_bundle(tmp_path / "b")
    return tmp_path / "b"


def all_bytes(path):
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def test_a_written_bundle_opens_and_gives_its_contents_back(tmp_path):
    manifest, contents = bundle_parts()
    written = write_bundle(tmp_path / "b", manifest, contents)
    bundle = open_bundle(tmp_path / "b")
    assert bundle.manifest == written
    assert bundle.labels == manifest.labels
    assert {name: bundle.read(name) for name in contents} == contents
    assert bundle.array("golden/labels.npy").tolist() == [0, 1, 2, 0, 1, 2]


def test_equal_contents_give_equal_bytes(tmp_path):
    manifest, contents = bundle_parts()
    write_bundle(tmp_path / "a", manifest, contents)
    write_bundle(tmp_path / "b", manifest, dict(reversed(contents.items())))
    assert all_bytes(tmp_path / "a") == all_bytes(tmp_path / "b")


def test_any_flipped_byte_is_found_and_its_file_named(path):
    original = all_bytes(path)
    for name, data in original.items():
        for at in {0, len(data) // 3, len(data) // 2, len(data) - 1}:
            for bit in (0x01, 0x20):  # 0x20 turns a letter of a hash into its capital
                (path / name).write_bytes(data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :])
                with pytest.raises(TamperedBundleError, match=f"'{name}'") as caught:
                    open_bundle(path)
                assert caught.value.exit_code == 1
        (path / name).write_bytes(data)
    open_bundle(path)


def test_a_tampered_file_is_explained_by_both_hashes(path):
    file = path / "model.fp32.onnx"
    data = file.read_bytes()
    file.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    expected, actual = hashlib.sha256(data), hashlib.sha256(file.read_bytes())
    with pytest.raises(TamperedBundleError) as caught:
        open_bundle(path)
    assert expected.hexdigest() in str(caught.value)
    assert actual.hexdigest() in str(caught.value)


@pytest.mark.parametrize("name", ["model.fp32.onnx", "golden/0.png", "manifest.json.sha256"])
def test_a_missing_file_is_named(path, name):
    (path / name).unlink()
    with pytest.raises(TamperedBundleError, match=f"'{name}' is missing"):
        open_bundle(path)


def test_an_extra_file_is_named(path):
    (path / "golden" / "extra.txt").write_text("x")
    with pytest.raises(TamperedBundleError, match=r"'golden/extra\.txt' is not listed"):
        open_bundle(path)


def test_a_longer_file_is_refused_before_it_is_hashed(path):
    with (path / "model.fp32.onnx").open("ab") as file:
        file.write(b"x")
    with pytest.raises(TamperedBundleError, match=r"'model\.fp32\.onnx' is \d+ bytes, expected"):
        open_bundle(path)


@pytest.mark.parametrize("name", ["model.fp32.onnx", "manifest.json", "golden"])
def test_a_link_inside_a_bundle_is_refused(path, name):
    shutil.move(path / name, path.parent / "elsewhere")
    (path / name).symlink_to(path.parent / "elsewhere")
    with pytest.raises(TamperedBundleError, match=f"'{name}' is a link"):
        open_bundle(path)


def test_a_bundle_may_be_reached_by_a_link(path):
    (path.parent / "current").symlink_to(path)
    assert open_bundle(path.parent / "current").path == path.resolve()


def test_a_huge_manifest_is_refused_before_it_is_read(path):
    (path / "manifest.json").write_bytes(b" " * (2 << 20))
    with pytest.raises(TamperedBundleError, match=r"'manifest\.json' has 2097152 bytes"):
        open_bundle(path)


@pytest.mark.parametrize("kind", ["empty folder", "file", "nothing"])
def test_what_is_no_bundle_is_a_wrong_input_and_not_a_failed_check(tmp_path, kind):
    path = tmp_path / "x"
    if kind == "empty folder":
        path.mkdir()
    elif kind == "file":
        path.write_text("x")
    with pytest.raises(BadInputError, match=r"must be a directory with a manifest\.json") as caught:
        open_bundle(path)
    assert caught.value.exit_code == 2


def rewrite_manifest(path, change):
    document = json.loads((path / "manifest.json").read_bytes())
    change(document)
    data = json.dumps(document).encode()
    (path / "manifest.json").write_bytes(data)
    (path / "manifest.json.sha256").write_bytes(digest_line(data))


def test_a_manifest_with_a_right_digest_must_still_be_strict(path):
    rewrite_manifest(path, lambda document: document.update(hook="rm -rf /"))
    with pytest.raises(BadInputError, match="unknown key 'hook'"):
        open_bundle(path)


def test_a_listed_path_out_of_the_bundle_is_refused(path):
    (path.parent / "secret").write_text("x")
    entry = {"path": "../secret", "size": 1, "sha256": hashlib.sha256(b"x").hexdigest()}
    rewrite_manifest(path, lambda document: document["files"].insert(0, entry))
    with pytest.raises(BadInputError, match=r"the file name '\.\./secret'"):
        open_bundle(path)


def test_a_file_that_changes_after_opening_is_not_handed_out(path):
    bundle = open_bundle(path)
    data = (path / "golden/outputs.npy").read_bytes()
    (path / "golden/outputs.npy").write_bytes(data[:-1] + b"x")
    with pytest.raises(TamperedBundleError, match=r"'golden/outputs\.npy'"):
        bundle.array("golden/outputs.npy")
    (path / "golden/outputs.npy").unlink()
    with pytest.raises(TamperedBundleError, match="is gone"):
        bundle.read("golden/outputs.npy")


def test_an_array_that_needs_pickle_is_refused(tmp_path):
    pickled = npy(np.array([{"a": 1}], dtype=object))
    bundle = write_small_bundle(tmp_path / "b", **{"golden/outputs.npy": pickled})
    with pytest.raises(BadInputError, match=r"'golden/outputs\.npy'.*without objects"):
        bundle.array("golden/outputs.npy")


def test_the_digest_file_is_one_that_sha256sum_reads(path):
    result = subprocess.run(
        ["sha256sum", "-c", "manifest.json.sha256"], cwd=path, capture_output=True, text=True
    )
    assert (result.returncode, result.stdout) == (0, "manifest.json: OK\n")


def test_writing_refuses_a_manifest_that_uses_a_file_that_is_not_there(tmp_path):
    manifest, contents = bundle_parts()
    del contents["model.fp32.onnx"]
    with pytest.raises(BadInputError, match=r"not listed: \['model\.fp32\.onnx'\]"):
        write_bundle(tmp_path / "b", manifest, contents)
    assert list(tmp_path.iterdir()) == []


def test_writing_refuses_a_manifest_that_lists_files_already(tmp_path):
    manifest, contents = bundle_parts()
    listed = write_bundle(tmp_path / "b", manifest, contents)
    with pytest.raises(BadInputError, match="pass files="):
        write_bundle(tmp_path / "c", listed, contents)


def test_writing_replaces_an_earlier_bundle_only_with_force(tmp_path, path):
    manifest, contents = bundle_parts()
    manifest = dataclasses.replace(manifest, name="second")
    with pytest.raises(BadInputError, match="--force"):
        write_bundle(path, manifest, contents)
    write_bundle(path, manifest, contents, force=True)
    assert open_bundle(path).manifest.name == "second"
