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
        if target == old and self.name != "old":
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
