import dataclasses
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from test_engine_key import KEY, OTHER

from deploy.errors import BadInputError
from deploy.runtime.engine_cache import Engine, EngineCache, Sidecar, Unusable, default_folder
from deploy.runtime.engine_key import EngineKey

PLAN = b"a plan of TensorRT"


@pytest.fixture
def cache(tmp_path):
    return EngineCache(tmp_path / "engines")


def store(cache, *, key=KEY, plan=PLAN):
    with cache.lock():
        return cache.store("net", key, plan, layers={"fp16": 3}, build_s=1.5)


def sidecar_path(cache):
    return cache.folder / "net.fp16.json"


def assert_unusable(found, reason, *, is_tampered):
    assert isinstance(found, Unusable)
    assert any(reason in text for text in found.reasons), found.reasons
    assert found.is_tampered == is_tampered


def test_an_engine_comes_back_as_it_was_stored(cache):
    stored = store(cache)
    found = cache.find("net", KEY)
    assert found == stored and isinstance(found, Engine)
    assert found.plan == PLAN and found.sidecar.layers == {"fp16": 3}
    assert (cache.folder / found.sidecar.plan).read_bytes() == PLAN  # a plain plan, as it is
    assert found.sidecar.sha256 == hashlib.sha256(PLAN).hexdigest()


def test_of_what_was_never_built_it_is_said_that_there_is_none(cache):
    assert_unusable(cache.find("net", KEY), "there is none yet", is_tampered=False)


@pytest.mark.parametrize("field", [name for name in OTHER if name != "precision"])
def test_an_engine_for_something_else_is_not_found_and_the_field_is_named(cache, field):
    store(cache)
    wanted = dataclasses.replace(KEY, **{field: OTHER[field]})
    assert_unusable(cache.find("net", wanted), f"{field}: built with", is_tampered=False)


def test_a_runner_does_not_ask_how_an_engine_was_built_but_where(cache):
    store(cache)
    other = dataclasses.replace(KEY, profile=(1, 1, 1), flags=())
    assert isinstance(cache.find("net", other, anyhow=True), Engine)
    elsewhere = dataclasses.replace(other, gpu="Thor")
    assert_unusable(cache.find("net", elsewhere, anyhow=True), "gpu: ", is_tampered=False)


def edit(change):
    def tamper(cache):
        document = json.loads(sidecar_path(cache).read_text("utf-8"))
        change(document)
        sidecar_path(cache).write_text(json.dumps(document), "utf-8")

    return tamper


def replace_plan(data):
    def tamper(cache):
        (cache.folder / f"{hashlib.sha256(PLAN).hexdigest()}.plan").write_bytes(data)

    return tamper


def resign_elsewhere(cache):
    """All of another device's files but its key, with a plan of their own."""
    other = EngineCache(cache.folder.parent / "other")
    store(other, plan=b"another plan")
    for path in other.folder.iterdir():
        if path.name != "device.key":
            shutil.copy(path, cache.folder)


@pytest.mark.parametrize(
    ("tamper", "reason"),
    [
        (edit(lambda d: d["key"].update(gpu="Thor")), "not signed with this device's key"),
        (edit(lambda d: d.update(sha256="0" * 64)), "not signed with this device's key"),
        (edit(lambda d: d.update(hmac="0" * 64)), "not signed with this device's key"),
        (edit(lambda d: d.update(plan="../../evil.plan")), "not signed with this device's key"),
        (edit(lambda d: d.update(more=1)), "the unknown key 'more'"),
        (lambda cache: sidecar_path(cache).write_bytes(b"{"), "net.fp16.json"),
        (replace_plan(b"x" * len(PLAN)), "another sha256"),
        (replace_plan(b"x"), "of another size"),
        (lambda cache: next(cache.folder.glob("*.plan")).unlink(), "is gone"),
        (lambda cache: (cache.folder / "device.key").write_bytes(b"k" * 32), "not signed"),
        (lambda cache: (cache.folder / "device.key").unlink(), "not signed"),
        (resign_elsewhere, "not signed"),
    ],
)
def test_a_tampered_engine_is_refused_before_anybody_loads_it(cache, tamper, reason):
    store(cache)
    tamper(cache)
    assert_unusable(cache.find("net", KEY), reason, is_tampered=True)
    assert isinstance(store(cache), Engine)  # and can be built again
    assert isinstance(cache.find("net", KEY), Engine)


def test_a_new_engine_takes_the_place_of_an_older_one_which_the_next_build_removes(cache):
    store(cache)
    store(cache, plan=b"a newer plan")
    assert cache.find("net", KEY).plan == b"a newer plan"
    with cache.lock():
        pass
    (plan,) = cache.folder.glob("*.plan")
    assert plan.read_bytes() == b"a newer plan"


def test_engines_of_other_precisions_and_bundles_stay(cache):
    store(cache)
    with cache.lock():
        int8 = dataclasses.replace(KEY, precision="int8")
        cache.store("net", int8, b"8", layers={}, build_s=1.0)
        cache.store("other", KEY, b"other", layers={}, build_s=1.0)
    with cache.lock():
        pass
    assert cache.find("net", KEY).plan == PLAN
    assert cache.find("net", int8).plan == b"8"
    assert cache.find("other", KEY).plan == b"other"


def test_the_key_and_the_directory_are_the_users_alone(cache):
    store(cache)
    assert cache.folder.stat().st_mode & 0o777 == 0o700
    assert (cache.folder / "device.key").stat().st_mode & 0o777 == 0o600
    assert len((cache.folder / "device.key").read_bytes()) == 32


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o701])
def test_a_directory_that_others_can_enter_is_refused(tmp_path, mode):
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(BadInputError, match=f"must be this user's alone; found: mode {mode:o}"):
        EngineCache(folder)


def test_a_link_to_a_directory_is_refused(tmp_path):
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(BadInputError, match="found: a link"):
        EngineCache(tmp_path / "link")


def test_one_build_runs_at_a_time(cache):
    again = "one build runs at a time; found: another one"
    with cache.lock(), pytest.raises(BadInputError, match=again), EngineCache(cache.folder).lock():
        pass
    with cache.lock():
        pass


def test_the_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("EDGEREG_CACHE", str(tmp_path / "a"))
    assert default_folder() == tmp_path / "a"
    monkeypatch.delenv("EDGEREG_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "edgereg/engines"


def test_what_was_timed_comes_back_on_the_same_machine_only(cache):
    with cache.lock():
        cache.store_timing(KEY, b"timings")
    assert cache.timing(KEY) == b"timings"
    assert cache.timing(dataclasses.replace(KEY, precision="int8", flags=())) == b"timings"
    for field in ("tensorrt", "gpu", "sm", "jetpack"):
        assert cache.timing(dataclasses.replace(KEY, **{field: OTHER[field]})) == b""


def test_timings_that_were_changed_are_not_used(cache):
    with cache.lock():
        cache.store_timing(KEY, b"timings")
    (path,) = cache.folder.glob("*.timing")
    path.write_bytes(path.read_bytes()[:-1] + b"S")
    assert cache.timing(KEY) == b""
    path.write_bytes(b"short")
    assert cache.timing(KEY) == b""


def choose(cache, precision="fp16"):
    engine = store(cache)
    with cache.lock():
        cache.choose("net", precision, {"fp16": engine.sidecar.sha256})


def test_a_choice_holds_for_the_engines_that_were_timed(cache):
    assert_unusable(cache.choice("net"), "there is none yet", is_tampered=False)
    choose(cache)
    assert cache.choice("net") == "fp16"
    store(cache, plan=b"built again")
    assert_unusable(cache.choice("net"), "built again since it was timed", is_tampered=False)


def test_a_choice_that_was_edited_is_refused(cache):
    choose(cache)
    path = cache.folder / "net.choice.json"
    path.write_text(
        path.read_text("utf-8").replace('"precision": "fp16"', '"precision": "fp32"'), "utf-8"
    )
    assert_unusable(cache.choice("net"), "not signed", is_tampered=True)


WRITER = """
import sys
from pathlib import Path
from deploy.runtime.engine_cache import EngineCache
from test_engine_key import KEY
cache, i = EngineCache(Path(sys.argv[1])), 0
print("ready", flush=True)
while True:
    i += 1
    with cache.lock(), cache.work_folder() as folder:
        (folder / "engine.plan").write_bytes(b"half")
        cache.store("net", KEY, b"%08d" % i * 4096, layers={}, build_s=float(i))
        cache.store_timing(KEY, b"%08d" % i)
    print(i, flush=True)
"""


def test_a_writer_that_is_killed_leaves_nothing_half_written(cache):
    """kill -9, again and again, at moments that sweep over the writing."""
    store(cache, plan=b"%08d" % 0 * 4096)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    seen = set()
    for attempt in range(6):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(cache.folder)],
            env=environment,
            stdout=subprocess.PIPE,
        )
        with writer:
            assert writer.stdout.readline() == b"ready\n"
            for _ in range(attempt % 3):
                writer.stdout.readline()
            time.sleep(0.001 * attempt)
            writer.send_signal(signal.SIGKILL)
        found = cache.find("net", KEY)
        assert isinstance(found, Engine), found
        assert found.plan == found.plan[:8] * 4096
        seen.add(found.plan[:8])
        timing = cache.timing(KEY)
        assert timing == b"" or timing.isdigit()
    assert len(seen) >= 3  # the kills met different rounds of writing
    with cache.lock():
        pass
    known = {"device.key", "lock", "net.fp16.json", found.sidecar.plan}
    left = {path.name for path in cache.folder.iterdir() if path.suffix != ".timing"}
    assert left == known


def test_a_sidecar_of_another_format_is_refused(cache, monkeypatch):
    monkeypatch.setattr("deploy.runtime.engine_cache.FORMAT_VERSION", 2)
    store(cache)
    monkeypatch.undo()
    assert_unusable(cache.find("net", KEY), "format: built with 2, here 1", is_tampered=False)


def test_the_signature_covers_every_field(cache):
    sidecar = store(cache).sidecar
    for field in dataclasses.fields(Sidecar):
        if field.name == "hmac":
            continue
        value = getattr(sidecar, field.name)
        other = {
            EngineKey: lambda v: dataclasses.replace(v, gpu="?"),
            int: lambda v: v + 1,
            float: lambda v: v + 1,
            str: lambda v: v + "?",
            dict: lambda v: {**v, "fp32": 9},
        }[type(value)](value)
        changed = dataclasses.replace(sidecar, **{field.name: other})
        assert cache._signature(changed) != sidecar.hmac


def test_a_precision_that_is_a_path_is_refused(cache):
    with pytest.raises(BadInputError, match=r"fp32, fp16, int8; found: '\.\./\.\./x'"):
        cache.find("net", dataclasses.replace(KEY, precision="../../x"))
