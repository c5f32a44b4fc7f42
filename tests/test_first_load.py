import json
import signal

import numpy as np
import onnx
import pytest
from deploy_bundle import bundle_parts, linear_onnx, write_small_bundle
from onnx import helper, numpy_helper

from deploy import children
from deploy.bundle.onnx_structure import structural_problem
from deploy.bundle.read import open_bundle
from deploy.bundle.write import write_bundle
from deploy.errors import BadInputError, CheckFailedError
from deploy.runtime import first_load
from deploy.runtime.first_load import LoadLimits, assert_first_load
from deploy.runtime.runner import open_runner


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEREG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "first-loads"


@pytest.fixture
def asked(monkeypatch):
    """How often a child was started."""
    calls, ask = [], children.ask_child

    def counting(*args, **kwargs):
        calls.append(args)
        return ask(*args, **kwargs)

    monkeypatch.setattr(children, "ask_child", counting)
    return calls


def greedy_onnx(repeats: int) -> bytes:
    """A file of a kilobyte that passes every check of structure and repeats the image."""
    proto = onnx.load_model_from_string(linear_onnx(np.eye(3)))
    times = numpy_helper.from_array(np.array([1, 1, repeats, repeats]), "times")
    proto.graph.initializer.append(times)
    proto.graph.node.insert(0, helper.make_node("Tile", ["images", "times"], ["large"], "greedy"))
    proto.graph.node[1].input[0] = "large"
    file = proto.SerializeToString()
    assert structural_problem(file) is None
    return file


def test_a_child_goes_once_for_each_bundle_and_what_it_survived_is_remembered(
    tmp_path, cache, asked
):
    bundle = write_small_bundle(tmp_path / "b")
    open_runner(bundle, backend="onnxruntime", precision="fp32")
    open_runner(bundle, backend="onnxruntime", precision="fp32")
    assert len(asked) == 1
    assert cache.stat().st_mode & 0o777 == cache.parent.stat().st_mode & 0o777 == 0o700
    copy = write_small_bundle(tmp_path / "copy")  # the same bytes elsewhere
    assert_first_load(copy, "fp32")
    assert len(asked) == 1
    other = write_small_bundle(tmp_path / "c", **{"model.fp32.onnx": linear_onnx(2 * np.eye(3))})
    assert_first_load(other, "fp32")
    assert len(asked) == len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("change", ["manifest_sha256", "runtime", "precision", "half", "gone"])
def test_a_verdict_on_anything_else_is_not_believed(tmp_path, cache, asked, change):
    bundle = write_small_bundle(tmp_path / "b")
    assert_first_load(bundle, "fp32")
    (file,) = cache.iterdir()
    document = json.loads(file.read_bytes())
    if change == "gone":
        file.unlink()
    elif change == "half":
        file.write_bytes(file.read_bytes()[:40])
    else:
        file.write_text(json.dumps(document | {change: "another"}))
    assert_first_load(bundle, "fp32")
    assert len(asked) == 2
    assert json.loads(file.read_bytes()) == document


def test_another_version_of_the_runtime_is_tried_again(tmp_path, asked, monkeypatch):
    bundle = write_small_bundle(tmp_path / "b")
    assert_first_load(bundle, "fp32")
    monkeypatch.setattr(first_load, "runtime_name", lambda: "onnxruntime 99")
    assert_first_load(bundle, "fp32")
    assert len(asked) == 2


@pytest.mark.parametrize(
    ("child", "time_s", "found"),
    [
        ("crash", 120.0, f"killed by signal {signal.SIGSEGV.value}"),
        ("hang", 1.5, r"no answer within 1\.5 s"),
    ],
)
def test_a_child_that_dies_is_a_failed_check_and_the_parent_lives_on(
    tmp_path, cache, monkeypatch, child, time_s, found
):
    bundle = write_small_bundle(tmp_path / "b")
    monkeypatch.setattr(first_load, "_CHILD", ("tests.dying_children", child))
    rule = r"'model\.fp32\.onnx' made onnxruntime .* fail: .*"
    with pytest.raises(CheckFailedError, match=rule + found) as caught:
        assert_first_load(bundle, "fp32", limits=LoadLimits(time_s=time_s))
    assert caught.value.exit_code == 1
    assert list(cache.iterdir()) == []
    monkeypatch.undo()
    monkeypatch.setenv("EDGEREG_CACHE", str(cache.parent))
    assert_first_load(bundle, "fp32")  # a failure is not remembered


def test_a_model_that_wants_more_memory_than_its_size_explains_fails_in_the_child(tmp_path):
    modest = write_small_bundle(tmp_path / "a", **{"model.fp32.onnx": greedy_onnx(10)})
    assert_first_load(modest, "fp32")
    greedy = write_small_bundle(tmp_path / "b", **{"model.fp32.onnx": greedy_onnx(5000)})
    with pytest.raises(CheckFailedError, match=r"fail: .*at most 2048 MiB"):
        assert_first_load(greedy, "fp32")


def test_the_caps_are_those_that_were_asked_for(tmp_path):
    modest = write_small_bundle(tmp_path / "a", **{"model.fp32.onnx": greedy_onnx(400)})
    with pytest.raises(CheckFailedError, match="at most 64 MiB"):
        assert_first_load(modest, "fp32", limits=LoadLimits(memory_bytes=64 << 20))
    assert_first_load(modest, "fp32")


def test_what_the_runtime_refuses_in_the_child_is_said_as_if_it_were_here(tmp_path):
    bundle = write_small_bundle(tmp_path / "b", **{"model.fp32.onnx": linear_onnx(np.ones((4, 3)))})
    with pytest.raises(BadInputError, match=r"'model\.fp32\.onnx' must load .* ONNX Runtime says"):
        assert_first_load(bundle, "fp32")


def test_a_bundle_that_is_swapped_on_the_way_is_not_judged_for_the_other(tmp_path, cache):
    bundle = write_small_bundle(tmp_path / "b")
    manifest, contents = bundle_parts()
    write_bundle(tmp_path / "b", manifest, contents | {"readme.md": b"another"}, force=True)
    with pytest.raises(CheckFailedError, match="must stay as it is while it is loaded"):
        assert_first_load(bundle, "fp32")
    assert list(cache.iterdir()) == []
    assert_first_load(open_bundle(tmp_path / "b"), "fp32")


def test_a_cache_that_others_can_write_to_is_refused(tmp_path, cache):
    bundle = write_small_bundle(tmp_path / "b")
    assert_first_load(bundle, "fp32")
    cache.chmod(0o777)
    with pytest.raises(BadInputError, match=r"'.*first-loads' of verdicts .* found: mode 777"):
        assert_first_load(bundle, "fp32")
    cache.rename(tmp_path / "theirs")
    cache.symlink_to(tmp_path / "theirs")
    with pytest.raises(BadInputError, match="found: a link"):
        assert_first_load(bundle, "fp32")


def test_without_a_place_for_the_verdict_the_remedy_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("EDGEREG_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(BadInputError, match="name another one in EDGEREG_CACHE"):
        assert_first_load(write_small_bundle(tmp_path / "b"), "fp32")
