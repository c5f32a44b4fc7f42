"""A few kills and disks of benchmarks/kill.py, and that it would notice."""

import sys
from pathlib import Path

import pytest
from deploy_bundle import bundle_parts, write_small_bundle

from deploy.bundle.read import open_bundle

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

import kill
import kill_device
import killing

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


@pytest.fixture
def in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(kill.os, "fsync", lambda handle: None)  # for speed; no power is cut here


def test_a_killed_write_of_a_verdict_loses_nothing(tmp_path, in_memory):
    tally = kill.kill_verdicts(tmp_path / "cache", 12, seed=0)
    assert tally["killed"] + tally["done before the kill"] == 12 and tally["killed"] > 0
    assert tally["whole"] == tally["after the next start: whole"] == 12


def test_a_killed_write_of_a_bundle_leaves_the_old_one_or_the_new_one(tmp_path, in_memory):
    manifest, contents = bundle_parts()
    path = write_small_bundle(tmp_path / "out" / "b").path
    members = [member.name for member in path.iterdir()]
    tally = kill.kill_writers(
        lambda: kill.write_bundle(path, manifest, contents, force=True),
        lambda: kill.bundle_state(path),
        lambda: kill.check_free(path, force=True, members=members),
        folder=path.parent,
        count=12,
        seed=0,
    )
    assert tally["killed"] > 0 and tally["corrupt"] == 0
    assert tally["after the next start: whole"] == 12
    assert tally["after the next start, left over: 0"] == 12


def test_a_killed_installation_leaves_the_old_one_or_the_new_one(tmp_path, in_memory):
    first = write_small_bundle(tmp_path / "a").path
    bundles = first, kill_device.another_bundle(tmp_path / "b", first)
    folder = tmp_path / "service"
    folder.mkdir()
    tally = kill_device.kill_installs(folder, bundles, 8, seed=0)
    assert tally["killed"] > 0 and tally["whole"] == tally["after the next start: whole"] == 8
    assert tally["after the next start, left over: 0"] == 8
    known = {open_bundle(bundle).manifest_sha256 for bundle in bundles}
    assert kill_device.service_state(folder, known) == "whole"
    assert kill_device.service_state(folder, {"0" * 64}) == "corrupt"
    (folder / "current" / "bundle" / "golden" / "0.png").unlink()
    assert kill_device.service_state(folder, known) == "corrupt"
    (folder / "current").unlink()
    assert kill_device.service_state(folder, known) == "nothing in service"


def test_a_killed_store_of_an_engine_leaves_the_old_one_or_the_new_one(tmp_path, in_memory):
    tally = kill_device.kill_stores(tmp_path / "engines", 12, seed=0)
    assert tally["killed"] > 0 and tally["whole"] == tally["after the next start: whole"] == 12
    assert tally["after the next start, left over: 0"] == 12


def test_a_writer_that_fails_by_itself_proves_nothing(tmp_path, capfd):
    with pytest.raises(RuntimeError, match="must come to its end"):
        killing.kill_writers(lambda: 1 / 0, lambda: "whole", list, folder=tmp_path, count=1, seed=0)


def test_a_naive_writer_is_caught(tmp_path, in_memory):
    manifest, contents = bundle_parts()
    tally = kill.kill_naive_writer(tmp_path / "b", manifest, contents, 12, seed=0)
    assert tally["corrupt"] + tally["absent"] > 0


def test_a_bundle_on_a_full_disk_is_refused_and_the_earlier_one_stays(tmp_path):
    tally = kill.full_disks(write_small_bundle(tmp_path / "b").path)
    if kill._NO_NAMESPACE in tally:
        pytest.skip(kill._NO_NAMESPACE)
    assert set(tally) == {
        "refused, nothing there",
        "refused, the earlier one whole",
        "written twice",
    }


@pytest.mark.parametrize(
    ("title", "word"),
    [
        ("exports", "corrupt"),
        ("exports", "after the next start: absent"),
        ("exports", "after the next start, left over: 2"),
        ("installations", "nothing in service"),
        ("exports", "the next start failed"),
        ("exports", "failed before the kill"),
        ("full disks", "corrupt after 1 writes, 0 left over"),
    ],
)
def test_one_loss_is_enough(title, word):
    good = {"exports": {"whole": 9}, "full disks": {}, "naive writer": {"corrupt": 1}}
    good |= {"installations": {"whole": 9}}
    assert kill.lost(good) == kill.lost(good | {"verdicts": {"killed": 1, "whole": 9}}) == []
    missed = {"done before the kill": 9, "whole": 9}
    assert kill.lost(good | {"verdicts": missed}) == ["verdicts: no kill struck"]
    assert kill.lost(good | {title: {word: 1}}) == [f"{title}: {word}"]
    assert kill.lost(good | {"naive writer": {"whole": 9}}) == ["the naive writer was never caught"]
