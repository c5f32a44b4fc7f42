import dataclasses
import sys
import tracemalloc

import numpy as np
import pytest
from deploy_bundle import SIZE, bundle_parts, golden_pixels, linear_onnx, write_small_bundle

from deploy.bundle.manifest import TensorSpec
from deploy.bundle.read import open_bundle
from deploy.bundle.write import write_bundle
from deploy.errors import BadInputError
from deploy.runtime import cudart
from deploy.runtime.ort_runner import open_session
from deploy.runtime.preprocess import preprocess
from deploy.runtime.runner import BACKENDS, open_runner


def open_ort(bundle, **options):
    return open_runner(bundle, backend="onnxruntime", precision="fp32", **options)


def test_a_runner_computes_the_stored_logits(tmp_path):
    bundle = write_small_bundle(tmp_path / "b")
    runner = open_ort(bundle)
    logits = runner(preprocess(golden_pixels(), bundle.manifest.preprocessing))
    np.testing.assert_allclose(logits, bundle.array("golden/outputs.npy"), atol=1e-5)
    assert runner.name.startswith("onnxruntime ") and runner.name.endswith(" CPU")
    assert runner.precision == "fp32"
    runner.close()


def test_a_runner_uses_one_thread_unless_told(tmp_path):
    bundle = write_small_bundle(tmp_path / "b")
    assert open_ort(bundle).threads == 1
    assert open_ort(bundle, threads=2).threads == 2


def test_an_answer_is_written_where_it_is_wanted_and_is_else_an_array_of_its_own(tmp_path):
    bundle = write_small_bundle(tmp_path / "b")
    runner, batch = open_ort(bundle), bundle.array("golden/preprocessed.npy")
    out = np.empty((len(batch), 3), np.float32)
    first = runner(batch)
    assert runner(batch, out=out) is out
    np.testing.assert_array_equal(out, first)
    runner(-batch)
    np.testing.assert_array_equal(out, first)
    with pytest.raises(BadInputError, match=r"`out` must be float32 \(6, 3\)"):
        runner(batch, out=out[:1])


def traced_bytes(runner, batch, out):
    """The most that Python and numpy allocate during an inference."""
    runner(batch, out=out)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    runner(batch, out=out)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return most - before


def test_no_array_is_made_for_an_inference_that_is_given_one(tmp_path):
    runner = open_ort(write_small_bundle(tmp_path / "b"))
    batch = np.zeros((16, 3, SIZE, SIZE), np.float32)
    out = np.empty((16, 3), np.float32)
    assert traced_bytes(runner, batch, out) < batch.nbytes / 2
    assert traced_bytes(runner, batch[:, ::-1], out) > batch.nbytes  # which must be copied


@pytest.mark.parametrize(
    ("batch", "found"),
    [
        (np.zeros((1, 3, SIZE, SIZE)), r"float64 \(1, 3, 8, 8\)"),
        (np.zeros((1, SIZE, SIZE, 3), np.float32), r"float32 \(1, 8, 8, 3\)"),
        (np.zeros((3, SIZE, SIZE), np.float32), r"float32 \(3, 8, 8\)"),
    ],
)
def test_a_batch_of_the_wrong_type_or_shape_is_refused(tmp_path, batch, found):
    runner = open_ort(write_small_bundle(tmp_path / "b"))
    rule = r"input 'images' must be float32 \(batch, 3, 8, 8\); found: "
    with pytest.raises(BadInputError, match=rule + found):
        runner(batch)


@pytest.mark.parametrize(
    ("model", "found"),
    [
        (linear_onnx(np.eye(3), name="pixels"), "'pixels' float32 .* says 'images' float32"),
        (linear_onnx(np.eye(3), size=9), r"\(batch, 3, 9, 9\) .* says .*\(batch, 3, 8, 8\)"),
        (linear_onnx(np.ones((3, 4))), r"'logits' float32 \(batch, 4\) .* says .*\(batch, 3\)"),
        (linear_onnx(np.ones((4, 3))), "ONNX Runtime says"),
    ],
)
def test_a_model_that_is_not_what_the_manifest_says_is_refused(tmp_path, model, found):
    bundle = write_small_bundle(tmp_path / "b", **{"model.fp32.onnx": model})
    with pytest.raises(BadInputError, match=found):
        open_ort(bundle)


def test_a_free_dimension_does_not_pass_for_a_fixed_one(tmp_path):
    manifest, contents = bundle_parts()
    fixed = dataclasses.replace(
        manifest,
        max_batch=1,
        inputs=(TensorSpec("images", "float32", (1, 3, SIZE, SIZE)),),
        outputs=(TensorSpec("logits", "float32", (1, 3)),),
    )
    write_bundle(tmp_path / "b", fixed, contents)
    with pytest.raises(BadInputError, match=r"\(batch, 3, 8, 8\) where .*\(1, 3, 8, 8\)"):
        open_ort(open_bundle(tmp_path / "b"))


def test_fp32_is_run_by_onnx_runtime_where_no_precision_is_asked_for(tmp_path):
    bundle = write_small_bundle(tmp_path / "b")
    assert open_runner(bundle, backend="onnxruntime", precision=None).precision == "fp32"


def test_an_unknown_precision_names_those_that_the_bundle_has(tmp_path):
    bundle = write_small_bundle(tmp_path / "b")
    with pytest.raises(BadInputError, match="'int8'; bundle 'b' has fp32"):
        open_runner(bundle, backend="onnxruntime", precision="int8")


class NoDriver:
    def call(self, function, *inputs):
        return 35, ()

    def error_name(self, code):
        return "cudaErrorInsufficientDriver"


def test_tensorrt_without_a_gpu_is_refused_and_nothing_else_is_tried(tmp_path, monkeypatch):
    bundle = write_small_bundle(tmp_path / "b")
    monkeypatch.setattr(cudart, "load_cudart", NoDriver)
    with pytest.raises(BadInputError, match="needs an NVIDIA GPU and its driver") as caught:
        open_runner(bundle, backend="tensorrt", precision="fp32")
    assert caught.value.exit_code == 2
    assert set(BACKENDS) == {"onnxruntime", "tensorrt"}


def test_a_session_that_would_run_elsewhere_is_refused(tmp_path, monkeypatch):
    import onnxruntime

    bundle = write_small_bundle(tmp_path / "b")
    elsewhere = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime.InferenceSession, "get_providers", lambda _: elsewhere)
    with pytest.raises(BadInputError, match="it would run on CUDAExecutionProvider"):
        open_ort(bundle)


def test_a_load_that_fails_is_not_tried_again_and_prints_nothing(tmp_path, monkeypatch, capsys):
    import onnxruntime

    bundle, loads = write_small_bundle(tmp_path / "b"), []

    def fail(*_):
        loads.append(1)
        raise RuntimeError("no room")

    monkeypatch.setattr(onnxruntime.InferenceSession, "_create_inference_session", fail)
    with pytest.raises(BadInputError, match=r"ONNX Runtime says: no room"):
        open_ort(bundle)
    assert len(loads) == 1 and capsys.readouterr().out == ""


def test_a_session_forgets_the_name_of_its_model_which_may_be_another_files_later(tmp_path):
    bundle = write_small_bundle(tmp_path / "b")
    file = bundle.manifest.variants["fp32"].file
    for model in (bundle.sealed(file), bundle.read(file)):
        session = open_session(model, file=file, threads=1)
        with pytest.raises(TypeError):  # it has nothing to load
            session.set_providers(["CPUExecutionProvider"])


def test_missing_onnxruntime_names_the_extra(tmp_path, monkeypatch):
    bundle = write_small_bundle(tmp_path / "b")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BadInputError, match=r"pip install 'edgereg\[ort\]'"):
        open_ort(bundle)
