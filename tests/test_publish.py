import errno
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from deploy import publish
from deploy.errors import BadInputError
from deploy.publish import publish_directory, publish_text


@pytest.fixture
def old(tmp_path):
    """An earlier result."""
    path = tmp_path / "result"
    with publish_directory(path, members=("manifest.json",)) as staging:
        (staging / "manifest.json").write_text("old")
    return path


def names(path):
    return sorted(p.name for p in path.iterdir())


def test_a_result_appears_whole_and_readable_for_others(old):
    assert names(old) == ["manifest.json"]
    assert old.stat().st_mode & 0o777 == 0o755
    assert names(old.parent) == ["result"]


def test_nothing_is_there_while_the_block_runs(tmp_path):
    with publish_directory(tmp_path / "deep" / "new", members=("m",)) as staging:
        (staging / "m").write_text("x")
        assert not (tmp_path / "deep" / "new").exists()
    assert names(tmp_path / "deep") == ["new"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_in_the_block_leaves_the_old_result_and_no_staging(old, error):
    with (
        pytest.raises(error, match="boom"),
        publish_directory(old, members=("manifest.json",), force=True) as staging,
    ):
        (staging / "manifest.json").write_text("half")
        raise error("boom")
    assert (old / "manifest.json").read_text() == "old"
    assert names(old.parent) == ["result"]


def test_force_replaces_an_earlier_result_as_a_whole(old):
    (old / "leftover").write_text("x")
    with publish_directory(old, members=("manifest.json", "leftover"), force=True) as staging:
        (staging / "manifest.json").write_text("new")
    assert (old / "manifest.json").read_text() == "new"
    assert names(old) == ["manifest.json"]
    assert names(old.parent) == ["result"]


def test_without_force_an_earlier_result_is_refused_before_any_work(old):
    with pytest.raises(BadInputError, match="--force"), publish_directory(old, members=("x",)):
        pytest.fail("the block must not run")


@pytest.mark.parametrize("force", [True, False])
def test_a_directory_of_somebody_else_is_never_replaced(tmp_path, force):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_text("x")
    with (
        pytest.raises(BadInputError, match="photos"),
        publish_directory(tmp_path / "photos", members=("manifest.json",), force=force),
    ):
        pytest.fail("the block must not run")
    assert names(tmp_path / "photos") == ["cat.png"]


def test_files_that_appear_during_the_block_are_not_replaced(tmp_path):
    with (
        pytest.raises(BadInputError, match="not empty"),
        publish_directory(tmp_path / "new", members=("m",)) as staging,
    ):
        (staging / "m").write_text("x")
        (tmp_path / "new").mkdir()
        (tmp_path / "new" / "theirs").write_text("x")
    assert names(tmp_path) == ["new"]
    assert names(tmp_path / "new") == ["theirs"]


def test_an_empty_directory_may_be_filled(tmp_path):
    (tmp_path / "new").mkdir()
    with publish_directory(tmp_path / "new", members=("m",)) as staging:
        (staging / "m").write_text("x")
    assert names(tmp_path / "new") == ["m"]


@pytest.mark.parametrize("kind", ["file", "link"])
def test_a_file_or_link_in_the_way_is_refused_even_with_force(tmp_path, old, kind):
    path = tmp_path / "taken"
    path.write_text("x") if kind == "file" else path.symlink_to(old)
    with (
        pytest.raises(BadInputError, match="is a file or a link"),
        publish_directory(path, members=("manifest.json",), force=True),
    ):
        pytest.fail("the block must not run")


def test_a_failed_swap_puts_the_old_result_back(old, monkeypatch):
    rename = publish.Path.rename

    def failing(self, target):
        if target == old and self.name.startswith(".staging-"):
            raise OSError("disk full")
        return rename(self, target)

    monkeypatch.setattr(publish.Path, "rename", failing)
    with (
        pytest.raises(OSError, match="disk full"),
        publish_directory(old, members=("manifest.json",), force=True) as staging,
    ):
        (staging / "manifest.json").write_text("new")
    assert (old / "manifest.json").read_text() == "old"
    assert names(old.parent) == ["result"]


def test_a_text_file_is_replaced_whole(tmp_path):
    path = tmp_path / "deep" / "report.json"
    publish_text(path, "one")
    publish_text(path, "two")
    assert path.read_text() == "two"
    assert path.stat().st_mode & 0o777 == 0o644
    assert names(path.parent) == ["report.json"]


def test_a_text_that_cannot_be_written_leaves_the_old_file(tmp_path):
    path = tmp_path / "report.json"
    publish_text(path, "one")
    with pytest.raises(UnicodeEncodeError, match="surrogates"):
        publish_text(path, "\udcff")
    assert path.read_text() == "one"
    assert names(tmp_path) == ["report.json"]


def test_force_keeps_a_result_to_which_somebody_added_a_file(old):
    (old / "thesis.txt").write_text("x")
    with (
        pytest.raises(BadInputError, match=r"holds thesis\.txt"),
        publish_directory(old, members=("manifest.json",), force=True),
    ):
        pytest.fail("the block must not run")
    assert names(old) == ["manifest.json", "thesis.txt"]


def test_a_file_above_the_destination_is_refused_before_any_work(old):
    path = old / "manifest.json" / "deeper" / "result"
    with (
        pytest.raises(BadInputError, match="is no such directory"),
        publish_directory(path, members=()),
    ):
        pytest.fail("the block must not run")


def test_the_current_directory_is_never_the_destination(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with (
        pytest.raises(BadInputError, match="the current directory"),
        publish_directory(publish.Path("."), members=()),
    ):
        pytest.fail("the block must not run")


# Killed writers. Each is a process of its own that stops at a place and is killed there.

_WRITER = """
import sys
from pathlib import Path
from deploy import publish

def wait(*_):
    print("here", flush=True)
    sys.stdin.read()

where, path = sys.argv[1], Path(sys.argv[2])
if where == "in the block":
    with publish.publish_directory(path, members=("m",), force=True) as staging:
        (staging / "m").write_text("half")
        wait()
elif where == "between the renames":
    rename = publish.Path.rename
    publish.Path.rename = lambda self, target: (
        wait() if self.name.startswith(".staging-") else rename(self, target)
    )
    with publish.publish_directory(path, members=("m",), force=True) as staging:
        (staging / "m").write_text("new")
else:
    publish.os.fsync = wait
    publish.publish_text(path, "half")
"""


@contextmanager
def stopped_writer(where, path):
    """A process that has come to a place, and lives until it is killed or the block ends."""
    command = [sys.executable, "-c", _WRITER, where, str(path)]
    root = str(Path(publish.__file__).parent.parent)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, env=os.environ | {"PYTHONPATH": root}) as process:
        try:
            assert process.stdout.readline() == b"here\n"
            yield process
        finally:
            process.send_signal(signal.SIGKILL)


def leftovers(folder):
    return [name for name in names(folder) if name.startswith(".staging-")]


@pytest.mark.parametrize("where", ["in the block", "in a file"])
def test_what_a_killed_writer_left_is_removed_by_the_next_one_and_a_live_ones_is_not(
    tmp_path, where
):
    with stopped_writer(where, tmp_path / "a"):
        (live,) = leftovers(tmp_path)
        publish_text(tmp_path / "b", "x")
        with publish_directory(tmp_path / "c", members=()):
            pass
        assert leftovers(tmp_path) == [live]
    assert leftovers(tmp_path) == [live]
    publish_text(tmp_path / "b", "y")
    assert names(tmp_path) == ["b", "c"]


def test_a_result_that_was_cut_off_from_its_place_is_put_back_whole(tmp_path):
    path = tmp_path / "result"
    with publish_directory(path, members=("m",)) as staging:
        (staging / "m").write_text("old")
    with stopped_writer("between the renames", path):
        publish_text(tmp_path / "b", "x")
        assert not path.exists()
    assert len(leftovers(tmp_path)) == 2
    with pytest.raises(BadInputError, match="--force"):  # before any work, although it was gone
        publish.check_free(path, force=False, members=("m",))
    assert (path / "m").read_text() == "old"
    assert names(tmp_path) == ["b", "result"]


@pytest.mark.parametrize("name", [".staging-area", ".staging-edgereg-", ".staging-edgereg-mine"])
def test_what_only_looks_like_a_leftover_stays(tmp_path, name):
    (tmp_path / name).mkdir()
    publish_text(tmp_path / "b", "x")
    assert names(tmp_path) == sorted([name, "b"])


def test_a_link_that_is_called_like_a_leftover_is_not_followed(tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis").write_text("x")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".staging-edgereg-abcdefgh").symlink_to(tmp_path / "theirs")
    publish_text(tmp_path / "out" / "b", "x")
    assert names(tmp_path / "theirs") == ["thesis"]


def fail_at(monkeypatch, count):
    """Let the disk be full at the given call that changes it."""
    calls = []

    def failing(function):
        def call(*args, **kwargs):
            calls.append(1)
            if len(calls) == count:
                raise OSError(errno.ENOSPC, "No space left on device")
            return function(*args, **kwargs)

        return call

    places = [
        (publish.os, "fsync"),
        (publish.tempfile, "mkdtemp"),
        (publish.tempfile, "mkstemp"),
        (publish.Path, "write_text"),
        (publish.Path, "rename"),
        (publish.Path, "replace"),
        (publish.Path, "chmod"),
    ]
    for owner, name in places:
        monkeypatch.setattr(owner, name, failing(getattr(owner, name)))


def test_a_disk_that_is_full_at_any_step_is_said_and_costs_nothing(old):
    def write(kind):
        if kind == "directory":
            with publish_directory(old, members=("manifest.json",), force=True) as staging:
                (staging / "manifest.json").write_text("new")
        else:
            publish_text(old.parent / "file", "new")

    for kind, file in (("directory", old / "manifest.json"), ("file", old.parent / "file")):
        file.write_text("old")
        for count in range(1, 100):
            with pytest.MonkeyPatch.context() as patch:
                fail_at(patch, count)
                try:
                    write(kind)
                except OSError as error:
                    assert error.errno == errno.ENOSPC
                else:
                    break
            assert file.read_text() in ("old", "new")
            assert leftovers(old.parent) == []
        assert count > 4 and file.read_text() == "new"
