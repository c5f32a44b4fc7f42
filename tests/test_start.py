"""What a start of `edgereg infer` does without, and what it does not read twice."""

import errno
import gc
import json
import subprocess
import sys
from pathlib import Path

import pytest
from deploy_bundle import write_small_bundle

from deploy.bundle import read, sealed
from deploy.bundle.read import open_bundle
from deploy.errors import BadInputError, TamperedBundleError
from deploy.runtime.heap import return_free_memory
from deploy.runtime.ort_runner import OrtRunner
from deploy.verbs.arguments import rare_collections
from edgereg.cli import main

NEVER = (
    *("torch", "onnx", "export", "edgereg.commands", "yaml", "http.server", "socket"),
    *("deploy.doctor", "deploy.verbs.doctor", "deploy.verbs.serve", "deploy.measure"),
    *("deploy.publish", "deploy.service.camera", "deploy.report.annotate"),
    *("deploy.runtime.engines", "deploy.runtime.engine_cache", "deploy.runtime.cudart"),
)
START = """
import json, sys
from edgereg.cli import main
code = main(sys.argv[1:])
print(json.dumps([code, sorted(sys.modules)]))
"""


@pytest.fixture
def bundle(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEREG_CACHE", str(tmp_path / "cache"))
    return write_small_bundle(tmp_path / "b").path


def test_a_start_for_a_known_bundle_imports_what_it_needs_and_nothing_more(bundle):
    command = [sys.executable, "-c", START, "infer", str(bundle), str(bundle / "golden/0.png")]
    for _ in range(2):  # the first one has no verdict yet
        result = subprocess.run(command, capture_output=True, text=True, check=True)
    code, modules = json.loads(result.stdout.splitlines()[-1])
    assert code == 0 and {"numpy", "onnxruntime", "PIL.Image"} <= set(modules)
    assert [name for name in NEVER if name in modules] == []


def count_hashed(monkeypatch):
    """Return the list of the files that are hashed, as it grows."""
    hashed = []
    check = read._check_digest

    def counted(path, entry, actual):
        hashed.append(entry.path)
        check(path, entry, actual)

    monkeypatch.setattr(read, "_check_digest", counted)
    return hashed


def test_a_model_that_is_kept_is_hashed_once_and_handed_out_once(bundle, monkeypatch):
    hashed = count_hashed(monkeypatch)
    opened = open_bundle(bundle, keep="fp32")
    file = opened.manifest.variants["fp32"].file
    assert sorted(hashed) == sorted(entry.path for entry in opened.manifest.files)
    OrtRunner(opened, "fp32", None)
    assert hashed.count(file) == 1
    assert bytes(opened.sealed(file).view()) == (bundle / file).read_bytes()
    assert hashed.count(file) == 2


def test_a_model_that_is_kept_is_the_one_that_was_checked(bundle):
    opened = open_bundle(bundle, keep="fp32")
    file = opened.manifest.variants["fp32"].file
    checked = (bundle / file).read_bytes()
    (bundle / file).write_bytes(checked[:-1] + bytes([checked[-1] ^ 1]))
    assert bytes(opened.sealed(file).view()) == checked
    for again in (opened.sealed, opened.read):
        with pytest.raises(TamperedBundleError, match=f"'{file}'"):
            again(file)


def test_a_file_that_grows_after_its_size_was_looked_up_is_not_read_for_ever(bundle, monkeypatch):
    file = "model.fp32.onnx"
    opened = open_bundle(bundle)
    monkeypatch.setattr(read, "_check_size", lambda *_: None)
    (bundle / file).unlink()
    (bundle / file).symlink_to("/dev/zero")
    for hand_out in (opened.read, opened.sealed):
        with pytest.raises(TamperedBundleError, match=f"'{file}'"):
            hand_out(file)


def test_a_refused_copy_in_memory_ends_the_command_with_a_remedy(bundle, monkeypatch, capsys):
    def refuse():
        raise PermissionError(errno.EPERM, "not permitted", "memfd_create")

    monkeypatch.setattr(sealed, "_memory_file", refuse)
    assert main(["infer", str(bundle), str(bundle / "golden/0.png")]) == 2
    said = capsys.readouterr().err
    assert "not permitted: 'memfd_create'" in said and "remedy: free memory" in said


@pytest.mark.parametrize("keep", ["fp32", "int8", None])
def test_whatever_is_kept_every_file_is_hashed(bundle, keep):
    for name in ("model.fp32.onnx", "golden/0.png", "golden/outputs.npy"):
        data = (bundle / name).read_bytes()
        (bundle / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(TamperedBundleError, match=f"'{name}'"):
            open_bundle(bundle, keep=keep)
        (bundle / name).write_bytes(data)
    open_bundle(bundle, keep=keep)


def test_the_structure_is_checked_of_what_is_kept_too(bundle, monkeypatch):
    def refuse(model, *, file):
        raise BadInputError("structure", found=file, remedy="none")

    monkeypatch.setattr(read, "check_structure", refuse)
    with pytest.raises(BadInputError, match=r"model\.fp32\.onnx"):
        open_bundle(bundle, keep="fp32")


def test_garbage_is_looked_for_rarely_within_and_as_before_afterwards():
    before = gc.get_threshold()
    with rare_collections():
        assert gc.get_threshold()[0] > before[0]
    assert gc.get_threshold() == before


def resident_bytes():
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) << 12


def test_what_is_free_between_blocks_that_are_not_goes_back_to_the_system():
    blocks = [bytes(60_000) for _ in range(1000)]  # small enough for the heap
    full = resident_bytes()
    del blocks[:-1]  # the last one holds the heap's end
    return_free_memory()
    assert resident_bytes() < full - (40 << 20)
