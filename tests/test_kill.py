"""A few kills and disks of benchmarks/kill.py, and that it would notice."""

import sys
from pathlib import Path

import pytest
from deploy_bundle import bundle_parts, write_small_bundle

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

import kill

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
        ("full disks", "corrupt after 1 writes, 0 left over"),
    ],
)
def test_one_loss_is_enough(title, word):
    good = {"exports": {"whole": 9}, "full disks": {}, "naive writer": {"corrupt": 1}}
    assert kill.lost(good) == []
    assert kill.lost(good | {title: {word: 1}}) == [f"{title}: {word}"]
    assert kill.lost(good | {"naive writer": {"whole": 9}}) == ["the naive writer was never caught"]
