import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from deploy_bundle import linear_onnx, write_labelled_bundle, write_small_bundle
from engine_models import write_engine_bundle
from fake_device import put_device
from test_deploy_commands import run

import deploy
from deploy.bundle.read import open_bundle
from deploy.errors import BadInputError, CheckFailedError, TamperedBundleError
from deploy.runtime import runner
from deploy.runtime.first_load import assert_first_load
from deploy.runtime.runner import open_runner
from deploy.service import install as module
from deploy.service.install import Gates, install, roll_back
from deploy.service.releases import Releases, opened

ROOT = Path(deploy.__file__).parent.parent


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """Two that are good, told apart by their samples, and one that answers wrongly."""
    root = tmp_path_factory.mktemp("bundles")
    return {
        "a": write_small_bundle(root / "a").path,
        "b": write_labelled_bundle(root / "b").path,
        "wrong": write_small_bundle(
            root / "wrong", **{"model.fp32.onnx": linear_onnx(-np.eye(3))}
        ).path,
    }


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "service"


@pytest.fixture(autouse=True)
def known_models(monkeypatch):
    """A first load in a process of its own takes a second; one test has it."""
    monkeypatch.setattr(runner, "assert_first_load", lambda *arguments: None)


def put(bundle, folder, **gates):
    return install(bundle, folder, backend="onnxruntime", gates=Gates(**gates))


def in_service(folder):
    """The hash of the bundle in service, each byte of which is checked; None if there is none."""
    if not (folder / "current").is_symlink():
        return None
    assert (folder / "current" / "engines").stat().st_mode & 0o777 == 0o700
    return open_bundle(folder / "current" / "bundle").manifest_sha256


def is_clean(folder):
    """Whether there are two releases at most, and nothing that is half done."""
    names = {path.name for path in folder.iterdir()}
    return (
        names <= {"current", "releases", ".lock"}
        and len(list((folder / "releases").iterdir())) <= 2
    )


def test_a_first_installation_is_in_service_and_has_no_way_back(bundles, folder):
    made = put(bundles["a"], folder)
    assert made.previous is None and made.precision == "fp32" and made.p99_ms is None
    assert in_service(folder) == made.manifest_sha256 and is_clean(folder)
    assert json.loads((folder / "current" / "install.json").read_text()) == made.to_json()
    assert (folder / "current").stat().st_mode & 0o777 == 0o755  # another user's service reads it
    with pytest.raises(BadInputError, match="there is none"):
        roll_back(folder)


def test_the_one_before_is_kept_and_comes_back_and_older_ones_go(bundles, folder):
    first, second = put(bundles["a"], folder), put(bundles["b"], folder)
    assert second.previous == first.release and in_service(folder) == second.manifest_sha256
    assert roll_back(folder) == first and in_service(folder) == first.manifest_sha256
    third = put(bundles["b"], folder)
    assert third == second  # its name was free again
    fourth = put(bundles["a"], folder)
    assert is_clean(folder) and fourth.release.endswith("-2")
    assert {path.name for path in (folder / "releases").iterdir()} == {
        third.release,
        fourth.release,
    }


def test_the_verdict_of_the_first_load_goes_with_the_release(bundles, folder, monkeypatch):
    monkeypatch.setattr(runner, "assert_first_load", assert_first_load)
    monkeypatch.delenv("EDGEREG_CACHE", raising=False)
    put(bundles["a"], folder)
    assert "EDGEREG_CACHE" not in os.environ
    assert list((folder / "current" / "engines").rglob("*.json"))


@pytest.mark.parametrize(
    ("name", "gates", "said"),
    [
        ("wrong", {}, "inference: scaled error"),
        ("b", {"max_p99_ms": 1e-6, "timed_s": 3.0}, "p99 .* ms > 1e-06 ms"),
        ("b", {"max_p99_ms": 1e6, "timed_s": 0.01}, "a p99 needs 662"),
        ("b", {"check": ("false",)}, "exit code 1; the old release is back"),
        ("b", {"check": ("/nowhere/x",)}, "No such file .* the old release is back"),
    ],
)
def test_what_fails_leaves_the_old_one_in_service(bundles, folder, name, gates, said):
    first = put(bundles["a"], folder)
    with pytest.raises(CheckFailedError, match=said):
        put(bundles[name], folder, **gates)
    assert in_service(folder) == first.manifest_sha256
    put(bundles["a"], folder)
    assert is_clean(folder)


def test_a_sample_that_is_lost_here_is_not_put_into_service(tmp_path, folder, monkeypatch):
    weight = np.eye(3) + 0.1
    weight[:, 0] = weight[:, 2]
    losing = {"model.fp32.onnx": linear_onnx(weight)}
    bundle = write_labelled_bundle(tmp_path / "b", changes=losing).path
    with pytest.raises(CheckFailedError, match=r"hold-out: top-1 66\.67%"):
        put(bundle, folder)
    assert in_service(folder) is None


def test_a_fast_enough_bundle_passes_and_its_p99_is_kept(bundles, folder):
    made = put(bundles["a"], folder, max_p99_ms=1e4, timed_s=3.0)
    assert 0 < made.p99_ms < 1e4


def test_a_first_installation_whose_check_fails_leaves_nothing_in_service(bundles, folder):
    with pytest.raises(CheckFailedError, match="nothing is in service"):
        put(bundles["a"], folder, check=("false",))
    assert in_service(folder) is None


def test_the_check_sees_the_new_release_and_the_old_one_again(bundles, folder, tmp_path):
    put(bundles["a"], folder)
    log = tmp_path / "log"
    script = f"readlink {folder}/current >> {log}; exit 1"
    with pytest.raises(CheckFailedError, match="the old release is back, and fails too"):
        put(bundles["b"], folder, check=("sh", "-c", script))
    new, old = log.read_text().split()
    assert new != old and old == str((folder / "current").readlink())


def test_a_release_that_was_tampered_with_does_not_come_back(bundles, folder):
    first, second = put(bundles["a"], folder), put(bundles["b"], folder)
    (folder / "releases" / first.release / "bundle" / "golden" / "0.png").write_bytes(b"x")
    with pytest.raises(TamperedBundleError):
        roll_back(folder)
    assert in_service(folder) == second.manifest_sha256


def test_what_is_no_bundle_or_no_folder_of_ours_is_refused(bundles, folder, tmp_path):
    with pytest.raises(BadInputError, match="must be a directory with a manifest"):
        put(tmp_path, folder)
    assert not folder.exists()
    (folder / "current").mkdir(parents=True)
    with pytest.raises(BadInputError, match="is no link"):
        put(bundles["a"], folder)


def test_two_installations_at_once_are_refused(bundles, folder):
    with opened(folder), pytest.raises(BadInputError, match="one installation goes on"):
        put(bundles["a"], folder)


def test_a_full_disk_is_said_before_anything_is_copied(bundles, folder, monkeypatch):
    full = type("Usage", (), {"free": 10})()
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: full)
    with pytest.raises(BadInputError, match="make room"):
        put(bundles["a"], folder)


def test_an_installation_with_tensorrt_keeps_its_engines_in_the_release(
    monkeypatch, tmp_path, folder
):
    put_device(monkeypatch, tmp_path)
    first = write_engine_bundle(tmp_path / "a")
    made = install(first.path, folder, backend="tensorrt", precision="fp16")
    assert made.precision == "fp16" and list((folder / "current/engines").glob("*.plan"))
    second = write_engine_bundle(tmp_path / "b", provenance={"seed": 1})
    install(second.path, folder, backend="tensorrt", precision="fp16")
    roll_back(folder)  # needs no build: the engine is there, and is the old bundle's
    monkeypatch.setenv("EDGEREG_CACHE", str(folder / "current" / "engines"))
    bundle = open_bundle(folder / "current" / "bundle")
    opened = open_runner(bundle, backend="tensorrt", precision="fp16")
    assert opened.precision == "fp16" and bundle.manifest_sha256 == first.manifest_sha256
    opened.close()


_CHILD = """
import sys
from pathlib import Path
from deploy.runtime import runner
from deploy.service.install import install

runner.assert_first_load = lambda *arguments: None
first, second, folder = map(Path, sys.argv[1:])
print("ready", flush=True)
while True:
    for bundle in (first, second):
        install(bundle, folder, backend="onnxruntime")
    print("both", flush=True)
"""


def start_child(bundles, folder):
    arguments = [str(bundles["a"]), str(bundles["b"]), str(folder)]
    child = subprocess.Popen(
        [sys.executable, "-c", _CHILD, *arguments], stdout=subprocess.PIPE, cwd=ROOT, text=True
    )
    assert child.stdout.readline() == "ready\n"
    return child


def kill(child):
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()


def assert_killed_installations_lose_nothing(bundles, folder, *, kills, seed):
    """Kill at moments drawn from the time that two installations take."""
    whole = {open_bundle(bundles[name]).manifest_sha256 for name in "ab"}
    child, started = start_child(bundles, folder), time.monotonic()
    assert child.stdout.readline() == "both\n"
    both_s = time.monotonic() - started
    kill(child)
    draw, seen, leftovers = random.Random(seed), set(), 0
    for _ in range(kills):
        child = start_child(bundles, folder)
        time.sleep(draw.uniform(0, both_s))
        kill(child)
        found = in_service(folder)
        assert found in whole
        seen.add(found)
        leftovers += not is_clean(folder)
        releases = Releases(folder)
        made = releases.record(releases.current())
        assert made.manifest_sha256 == found
        open_bundle(folder / "releases" / made.previous / "bundle")  # the way back is whole, too
    put(bundles["a"], folder)
    assert is_clean(folder)
    return seen, leftovers


def test_kill_9_leaves_the_old_or_the_new(bundles, folder):
    seen, leftovers = assert_killed_installations_lose_nothing(bundles, folder, kills=6, seed=0)
    assert seen and leftovers  # of some, a part was left, and removed


@pytest.mark.slow
def test_a_hundred_kills_leave_the_old_or_the_new(bundles, folder):
    seen, leftovers = assert_killed_installations_lose_nothing(bundles, folder, kills=100, seed=1)
    assert len(seen) == 2 and leftovers > 0  # some were killed half way


def test_the_check_after_a_kill_finds_half_of_a_release(bundles, folder):
    put(bundles["a"], folder)
    (folder / "current" / "bundle" / "golden" / "0.png").unlink()
    with pytest.raises(TamperedBundleError, match="is missing"):
        in_service(folder)


def test_the_command_says_what_is_in_service(bundles, folder, capsys):
    assert run("install", bundles["a"], "--to", folder) == 0
    shown = capsys.readouterr().out
    assert "its time was not judged" in shown and "none, it is the first" in shown
    assert run("install", bundles["b"], "--to", folder, "--json") == 0
    assert json.loads(capsys.readouterr().out)["bundle"] == "colours"
    assert run("install", "--rollback", "--to", folder) == 0
    assert "current -> colours-" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [(), ("b", "--rollback")])
def test_the_command_installs_or_goes_back_and_not_both(arguments, folder):
    with pytest.raises(BadInputError, match="or the last installation is taken back"):
        run("install", *arguments, "--to", folder)
