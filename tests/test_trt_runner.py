import gc
import tracemalloc

import numpy as np
import pytest
from deploy_bundle import SIZE, golden_pixels
from engine_models import MODELS, reference, write_engine_bundle
from fake_cudart import ContractError
from fake_device import put_device
from fake_tensorrt import STYLES

from deploy.bundle.manifest import TensorSpec
from deploy.errors import BadInputError, CheckFailedError, DeployError
from deploy.runtime import trt_runner
from deploy.runtime.cudart import Cuda, open_cuda
from deploy.runtime.preprocess import preprocess
from deploy.runtime.trt_builder import BuildRequest, build_plan
from deploy.runtime.trt_runner import TrtRunner
from deploy.runtime.trt_versions import load_tensorrt

MOST = 16


def specs(batch):
    return (
        TensorSpec("images", "float32", (batch, 3, SIZE, SIZE)),
        TensorSpec("logits", "float32", (batch, 3)),
    )


def build(*, batch="batch", precision="fp32"):
    """Build an engine with whatever TensorRT is at hand."""
    open_cuda()
    profile = (1, 1, MOST) if batch == "batch" else (1, 1, 1)
    request = BuildRequest(precision, profile)
    model = MODELS[precision](batch=batch)
    return build_plan(load_tensorrt(), model, request, workspace_bytes=1 << 28).plan


def open_runner(plan, *, batch="batch", precision="fp32"):
    return TrtRunner(
        plan, specs(batch), max_batch=MOST if batch == "batch" else 1, precision=precision
    )


def images(count, seed=0):
    return np.random.default_rng(seed).normal(size=(count, 3, SIZE, SIZE)).astype(np.float32)


def assert_runs_right(runner, counts, *, scaled_error=1e-5):
    """Different inputs, in batches of changing sizes, against the network in float64."""
    for i, count in enumerate(counts):
        batch = images(count, seed=i)
        wanted = reference(batch)
        error = np.abs(runner(batch) - wanted).max() / np.abs(wanted).max()
        assert error <= scaled_error


def assert_nothing_is_allocated(runner, batch):
    """No buffer, and with `out` no array, is made after the first call."""
    out = np.empty((len(batch), 3), np.float32)
    runner(batch, out=out)
    before = runner.allocations
    for _ in range(5):
        assert runner(batch, out=out) is out
    assert runner.allocations == before


@pytest.fixture(params=STYLES)
def device(request, monkeypatch, tmp_path):
    return put_device(monkeypatch, tmp_path, request.param)


@pytest.fixture
def real_device():
    """TensorRT and a GPU, or a reason to skip."""
    try:
        open_cuda()
        load_tensorrt()
    except BadInputError as error:
        pytest.skip(f"no TensorRT on a GPU: {error.found}")


@pytest.mark.parametrize(("batch", "counts"), [(1, (1, 1, 1)), ("batch", (1, MOST, 3, 3, 1))])
def test_an_engine_computes_what_the_network_does(device, batch, counts):
    runner = open_runner(build(batch=batch), batch=batch)
    assert_runs_right(runner, counts)
    runner.close()


@pytest.mark.gpu
@pytest.mark.parametrize(("batch", "counts"), [(1, (1, 1, 1)), ("batch", (1, MOST, 3, 3, 1))])
def test_an_engine_computes_what_the_network_does_on_a_real_gpu(real_device, batch, counts):
    runner = open_runner(build(batch=batch), batch=batch)
    assert_runs_right(runner, counts)
    assert_nothing_is_allocated(runner, images(1))
    runner.close()


def test_a_wrong_engine_does_not_pass(monkeypatch, tmp_path):
    put_device(monkeypatch, tmp_path, flips=("logits",))
    with pytest.raises(AssertionError):
        assert_runs_right(open_runner(build()), (1,))


def test_nothing_is_allocated_after_the_warm_up(device):
    cuda, _ = device
    runner = open_runner(build())
    assert_nothing_is_allocated(runner, images(MOST))
    assert runner.allocations == 4  # input and output, here and on the device
    cuda.calls.clear()
    runner(images(3))
    assert not {"cudaMalloc", "cudaMallocHost", "cudaStreamCreateWithFlags"} & set(cuda.calls)
    runner.close()


def test_a_runner_that_allocates_is_counted(device):
    runner = open_runner(build())

    class Allocating:
        allocations = property(lambda self: runner.allocations)

        def __call__(self, batch, *, out):
            runner._cuda.allocate(16)
            return runner(batch, out=out)

    with pytest.raises(AssertionError):
        assert_nothing_is_allocated(Allocating(), images(1))


def test_the_runners_own_code_makes_no_array_when_it_is_given_one(monkeypatch, tmp_path):
    put_device(monkeypatch, tmp_path)
    runner = open_runner(build(batch=1), batch=1)
    batch, out = images(1), np.empty((1, 3), np.float32)
    monkeypatch.setattr(runner._cuda, "launch", lambda graph, stream: None)
    runner(batch, out=out)
    tracemalloc.start()
    base = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    runner(batch, out=out)
    added = tracemalloc.get_traced_memory()[1] - base
    tracemalloc.stop()
    assert added < batch.nbytes


def test_a_fixed_shape_is_one_launch_of_a_graph(device):
    cuda, _ = device
    runner = open_runner(build(batch=1), batch=1)
    assert runner.uses_graph
    cuda.calls.clear()
    runner(images(1))
    assert cuda.calls == ["cudaGraphLaunch", "cudaStreamSynchronize"]
    runner.close()


def test_closing_leaves_nothing_behind(device):
    cuda, trt = device
    for batch in (1, "batch"):
        runner = open_runner(build(batch=batch), batch=batch)
        runner(images(1))
        assert cuda.live() and len(trt.live) > 0
        runner.close()
        gc.collect()
        assert cuda.live() == [] and len(trt.live) == 0


def test_a_runner_that_fails_half_way_leaves_nothing_behind(device, monkeypatch):
    cuda, _ = device
    plan = build(batch=1)
    monkeypatch.setattr(cuda, "_cudaGraphInstantiate", lambda graph, flags: (2, ()))
    with pytest.raises(DeployError, match="cudaGraphInstantiate"):
        open_runner(plan, batch=1)
    assert cuda.live() == []


def test_a_capture_that_fails_is_ended_and_leaves_nothing_behind(device, monkeypatch):
    cuda, _ = device
    plan = build(batch=1)
    copy, copies = cuda._cudaMemcpyAsync, []

    def third_copy_fails(*inputs):  # the first two are the warm-up's
        copies.append(inputs)
        return (1, ()) if len(copies) == 3 else copy(*inputs)

    monkeypatch.setattr(cuda, "_cudaMemcpyAsync", third_copy_fails)
    with pytest.raises(DeployError, match="cudaMemcpyAsync"):
        open_runner(plan, batch=1)
    assert cuda.live() == [] and cuda.captures == {}


def test_an_answer_is_not_overwritten_by_the_next(device):
    runner = open_runner(build(batch=1), batch=1)
    first = runner(images(1, seed=1))
    kept = first.copy()
    runner(images(1, seed=2))
    np.testing.assert_array_equal(first, kept)


@pytest.mark.parametrize(
    ("batch", "found"),
    [
        (np.zeros((1, 3, SIZE, SIZE)), "float64"),
        (np.zeros((1, SIZE, SIZE, 3), np.float32), r"\(1, 8, 8, 3\)"),
        (np.zeros((MOST + 1, 3, SIZE, SIZE), np.float32), "1 to 16 images; found: 17"),
        (np.zeros((0, 3, SIZE, SIZE), np.float32), "1 to 16 images; found: 0"),
    ],
)
def test_a_batch_of_the_wrong_type_or_size_is_refused(monkeypatch, tmp_path, batch, found):
    put_device(monkeypatch, tmp_path)
    with pytest.raises(BadInputError, match=found):
        open_runner(build())(batch)


@pytest.mark.parametrize(
    "out",
    [
        np.empty((1, 3)),
        np.empty((2, 3), np.float32),
        np.empty((1, 6), np.float32)[:, ::2],
    ],
)
def test_an_out_that_does_not_fit_is_refused(monkeypatch, tmp_path, out):
    put_device(monkeypatch, tmp_path)
    runner = open_runner(build())
    with pytest.raises(BadInputError, match="`out` must be float32"):
        runner(images(1), out=out)


@pytest.mark.parametrize(
    "tensors",
    [
        (TensorSpec("pixels", "float32", ("batch", 3, SIZE, SIZE)), specs("batch")[1]),
        (TensorSpec("images", "uint8", ("batch", 3, SIZE, SIZE)), specs("batch")[1]),
        (specs("batch")[0], TensorSpec("logits", "float32", ("batch", 4))),
        specs(1),
    ],
)
def test_an_engine_with_other_tensors_than_the_manifests_is_refused(device, tensors):
    with pytest.raises(BadInputError, match="what the bundle's manifest says"):
        TrtRunner(build(), tensors, max_batch=MOST, precision="fp32")


def test_an_engine_of_another_gpu_is_refused_with_tensorrts_words(monkeypatch, tmp_path):
    put_device(monkeypatch, tmp_path, gpu="Thor")
    plan = build()
    put_device(monkeypatch, tmp_path, gpu="Orin")
    with pytest.raises(CheckFailedError, match="gpu Thor does not match Orin"):
        open_runner(plan)


def test_a_small_device_says_that_its_memory_is_short(device):
    cuda, _ = device
    plan = build()
    cuda.memory_bytes = 100
    with pytest.raises(DeployError, match=r"cudaErrorMemoryAllocation.*free memory"):
        open_runner(plan)
    assert cuda.live() == []


def test_the_double_catches_a_missing_synchronize(monkeypatch, tmp_path):
    cuda, _ = put_device(monkeypatch, tmp_path)
    runner = open_runner(build(batch=1), batch=1)
    assert_runs_right(runner, (1,))
    monkeypatch.setattr(Cuda, "synchronize", lambda self, stream: None)
    with pytest.raises(AssertionError):
        assert_runs_right(runner, (1, 1))
    assert any(cuda.streams.values())  # the work that nobody waited for


def test_the_double_catches_a_freed_buffer(monkeypatch, tmp_path):
    put_device(monkeypatch, tmp_path)
    for batch in (1, "batch"):
        runner = open_runner(build(batch=batch), batch=batch)
        runner._cuda.free(runner._output.device_address)
        with pytest.raises(ContractError, match="is not there or was freed"):
            runner(images(1))


@pytest.mark.parametrize("name", ["images", "logits"])
def test_the_double_catches_an_address_that_is_not_set(monkeypatch, tmp_path, name):
    _, trt = put_device(monkeypatch, tmp_path)
    plan = build()
    engine = trt.Runtime(trt.ILogger()).deserialize_cuda_engine(plan)
    context = type(engine.create_execution_context())
    set_address = context.set_tensor_address
    monkeypatch.setattr(
        context,
        "set_tensor_address",
        lambda self, given, address: given == name or set_address(self, given, address),
    )
    with pytest.raises(ContractError, match=f"the address of '{name}' is not set"):
        open_runner(plan)


def test_the_double_catches_a_shape_that_is_not_set(monkeypatch, tmp_path):
    put_device(monkeypatch, tmp_path)
    plan = build()
    monkeypatch.setattr(TrtRunner, "_set_batch", lambda self, count: setattr(self, "_count", count))
    with pytest.raises(ContractError, match="the shape of 'images' is not set"):
        open_runner(plan)


def test_the_double_catches_a_wrong_type(monkeypatch, tmp_path):
    put_device(monkeypatch, tmp_path)
    plan = build()
    half = tuple(TensorSpec(spec.name, "float16", spec.shape) for spec in specs("batch"))
    monkeypatch.setattr(trt_runner, "_check_tensors", lambda *_: None)
    with pytest.raises(ContractError, match="which holds"):
        TrtRunner(plan, half, max_batch=MOST, precision="fp32")


def test_the_double_catches_a_capture_without_a_warm_up(monkeypatch, tmp_path):
    put_device(monkeypatch, tmp_path)
    plan = build(batch=1)
    record, enqueue = TrtRunner._record, TrtRunner._enqueue

    def only_recorded(self):
        if self._graph is self:
            enqueue(self)

    def record_it(self):
        self._graph = self
        return record(self)

    monkeypatch.setattr(TrtRunner, "_enqueue", only_recorded)
    monkeypatch.setattr(TrtRunner, "_record", record_it)
    monkeypatch.setattr(TrtRunner, "_graph", None, raising=False)
    with pytest.raises(ContractError, match="a first inference is captured"):
        open_runner(plan, batch=1)


def test_the_double_catches_tensorrt_before_a_gpu_was_found(monkeypatch, tmp_path):
    put_device(monkeypatch, tmp_path)
    plan = build()
    cuda, _ = put_device(monkeypatch, tmp_path)
    monkeypatch.setattr(trt_runner, "open_cuda", lambda: Cuda(cuda))
    with pytest.raises(ContractError, match="before a GPU was found"):
        open_runner(plan)


def test_the_golden_images_of_a_bundle_go_through(monkeypatch, tmp_path):
    put_device(monkeypatch, tmp_path)
    bundle = write_engine_bundle(tmp_path / "b")
    runner = open_runner(build())
    answers = runner(preprocess(golden_pixels(), bundle.manifest.preprocessing))
    np.testing.assert_allclose(answers, bundle.array("golden/outputs.npy"), atol=1e-4)
