"""What a start of `edgereg infer` does without, and what it does not read twice."""

import errno
import gc
import json
import subprocess
import sys
import threading
from pathlib import Path

import onnxruntime
import pytest
from deploy_bundle import write_small_bundle

from deploy.bundle import read, sealed
from deploy.bundle.read import open_bundle, opening_bundle
from deploy.errors import BadInputError, TamperedBundleError
from deploy.runtime.heap import return_free_memory
from deploy.runtime.ort_runner import OrtRunner
from deploy.verbs.arguments import starting
from edgereg.cli import main

NEVER = (
    *("torch", "onnx", "export", "edgereg.commands", "yaml", "http.server", "socket"),
    *("deploy.doctor", "deploy.verbs.doctor", "deploy.verbs.serve", "deploy.measure"),
    *("deploy.publish", "deploy.children", "deploy.service.camera", "deploy.report.annotate"),
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


OPEN = """
import sys
from pathlib import Path
from deploy.bundle.read import opening_bundle
with opening_bundle(Path(sys.argv[1]), keep="fp32", meanwhile=lambda: print(*sys.modules)):
    print(*sys.modules)
"""


def test_a_bundle_is_opened_without_numpy_which_is_imported_meanwhile(bundle):
    command = [sys.executable, "-c", OPEN, str(bundle)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    meanwhile, opened = (set(line.split()) for line in result.stdout.splitlines())
    assert "deploy.bundle.onnx_structure" in meanwhile and "numpy" not in meanwhile | opened


def change(file):
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def test_what_is_imported_meanwhile_is_imported_while_the_model_is_hashed(bundle, monkeypatch):
    asked, copied, copy = threading.Event(), threading.Event(), read.SealedCopy

    def waiting(*args, **options):
        assert asked.wait(10)
        copied.set()
        return copy(*args, **options)

    def meanwhile():
        asked.set()
        assert copied.wait(10)

    monkeypatch.setattr(read, "SealedCopy", waiting)
    with opening_bundle(bundle, keep="fp32", meanwhile=meanwhile) as opened:
        assert bytes(opened.sealed("model.fp32.onnx").view())


@pytest.fixture
def loads(monkeypatch):
    """Return the list of the loads by ONNX Runtime, as it grows."""
    made, create = [], onnxruntime.InferenceSession._create_inference_session

    def counted(session, *args):
        made.append(1)
        create(session, *args)

    monkeypatch.setattr(onnxruntime.InferenceSession, "_create_inference_session", counted)
    return made


@pytest.mark.parametrize("name", ["model.fp32.onnx", "golden/0.png", "manifest.json"])
def test_a_changed_bundle_is_refused_before_onnx_runtime_sees_it(bundle, name, loads, capsys):
    image = bundle.parent / "image.png"
    image.write_bytes((bundle / "golden/0.png").read_bytes())
    arguments = ["infer", str(bundle), str(image)]
    assert main(arguments) == 0 and len(loads) == 1
    answer = capsys.readouterr().out
    change(bundle / name)
    assert main(arguments) == 1 and len(loads) == 1
    said = capsys.readouterr()
    assert answer and not said.out and f"'{name}'" in said.err


def test_a_large_file_that_no_model_reads_is_refused_before_the_first_line(
    bundle, monkeypatch, loads, capsys
):
    monkeypatch.setattr(read, "_LARGE_BYTES", 1)
    assert main(["infer", str(bundle), str(bundle / "golden/0.png")]) == 0
    change(bundle / "golden/outputs.npy")
    capsys.readouterr()
    assert main(["infer", str(bundle), str(bundle / "golden/0.png")]) == 1
    said = capsys.readouterr()
    assert not said.out and "'golden/outputs.npy': expected sha256" in said.err
    assert len(loads) == 2  # the model is the one that was written
    change(bundle / "model.fp32.onnx")
    assert main(["infer", str(bundle), str(bundle / "golden/0.png")]) == 1
    assert "'model.fp32.onnx'" in capsys.readouterr().err and len(loads) == 2


def open_numbers():
    return sorted(path.name for path in Path("/proc/self/fd").iterdir())


@pytest.mark.parametrize("error", [KeyboardInterrupt, ModuleNotFoundError])
@pytest.mark.parametrize("when", ["meanwhile", "within"])
def test_an_error_beside_the_hashing_leaves_no_thread_and_no_file_open(bundle, error, when):
    gc.collect()  # what earlier tests left
    opened, threads = open_numbers(), threading.active_count()

    def fail():
        raise error

    def interrupted():
        meanwhile = fail if when == "meanwhile" else lambda: None
        with opening_bundle(bundle, keep="fp32", meanwhile=meanwhile):
            fail()

    with pytest.raises(error):
        interrupted()
    gc.collect()
    assert threading.active_count() == threads and open_numbers() == opened


def test_garbage_is_looked_for_after_a_start_and_not_within():
    assert gc.isenabled()
    with pytest.raises(KeyboardInterrupt), starting():
        assert not gc.isenabled()
        raise KeyboardInterrupt
    assert gc.isenabled()


@pytest.mark.parametrize("count", [1, 3])
def test_the_picture_that_is_read_beside_the_load_is_answered_once(bundle, count, capsys):
    images = [str(bundle / f"golden/{place}.png") for place in range(count)]
    assert main(["infer", str(bundle), *images]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == images


def resident_bytes():
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) << 12


def test_what_is_free_between_blocks_that_are_not_goes_back_to_the_system():
    blocks = [bytes(60_000) for _ in range(1000)]  # small enough for the heap
    full = resident_bytes()
    del blocks[:-1]  # the last one holds the heap's end
    return_free_memory()
    assert resident_bytes() < full - (40 << 20)
