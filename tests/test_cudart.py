import numpy as np
import pytest
from fake_cudart import ContractError, FakeCudart

from deploy.errors import BadInputError, DeployError
from deploy.runtime import cudart
from deploy.runtime.cudart import (
    SIGNATURES,
    Bindings,
    Cuda,
    Library,
    find_library,
    open_cuda,
    pinned_array,
)

NO_DRIVER = 35
INPUTS = {
    "cudaGetDeviceProperties": (0,),
    "cudaDeviceGetAttribute": (75, 0),
    "cudaMalloc": (64,),
    "cudaFree": (0,),
    "cudaMallocHost": (64,),
    "cudaFreeHost": (0,),
    "cudaStreamCreateWithFlags": (1,),
    "cudaStreamDestroy": (0,),
    "cudaStreamSynchronize": (0,),
    "cudaMemcpyAsync": (0, 0, 0, 1, 0),
    "cudaStreamBeginCapture": (0, 1),
    "cudaStreamEndCapture": (0,),
    "cudaGraphInstantiate": (0, 0),
    "cudaGraphLaunch": (0, 0),
    "cudaGraphExecDestroy": (0,),
    "cudaGraphDestroy": (0,),
}


def real_library():
    try:
        return Library(find_library())
    except BadInputError as error:
        pytest.skip(error.found)


def real_bindings():
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")
    return Bindings(runtime)


def has_gpu():
    return real_library().call("cudaGetDeviceCount")[0] == 0


@pytest.mark.parametrize("function", SIGNATURES)
@pytest.mark.parametrize("runtime", [real_library, real_bindings])
def test_every_function_exists_and_takes_our_arguments_in_the_real_runtime(runtime, function):
    runtime = runtime()
    if has_gpu():
        pytest.skip("with a GPU these arguments would be dangerous")
    code, _ = runtime.call(function, *INPUTS.get(function, ()))
    assert code != 0
    assert runtime.error_name(code).startswith("cudaError")


def test_both_ways_to_the_real_runtime_say_alike_that_there_is_no_driver():
    library, bindings = real_library(), real_bindings()
    if has_gpu():
        pytest.skip("there is a driver")
    for runtime in (library, bindings):
        code, _ = runtime.call("cudaGetDeviceCount")
        assert (code, runtime.error_name(code)) == (NO_DRIVER, "cudaErrorInsufficientDriver")


@pytest.mark.parametrize("runtime", [real_library, real_bindings])
def test_the_wrong_number_of_arguments_does_not_pass(runtime):
    runtime = runtime()
    with pytest.raises((TypeError, StopIteration)):
        runtime.call("cudaMemcpyAsync", 0, 0, 0, 1)


def test_every_function_has_inputs_in_this_test():
    outputs_only = {"cudaGetDeviceCount", "cudaMemGetInfo"}
    assert INPUTS.keys() | outputs_only == SIGNATURES.keys()


def test_without_a_gpu_it_is_said_before_anything_else_is_called(monkeypatch):
    fake = FakeCudart(devices=0)
    monkeypatch.setattr(cudart, "load_cudart", lambda: fake)
    with pytest.raises(BadInputError, match="error 100, cudaErrorNoDevice"):
        open_cuda()
    assert fake.calls == ["cudaGetDeviceCount"]


def test_without_any_runtime_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(cudart, "_LIBRARIES", ("libcudart.of.nobody",))
    with pytest.raises(BadInputError, match=r"pip install 'edgereg\[jetson\]'"):
        find_library()


def test_a_failed_call_names_the_function_and_the_error():
    cuda = Cuda(FakeCudart(memory_bytes=1 << 10))
    with pytest.raises(DeployError, match=r"cudaMalloc succeeds; found: error 2, cudaErrorMemory"):
        cuda.allocate(1 << 11)


def test_the_gpu_is_described():
    cuda = Cuda(FakeCudart(gpu="Orin", sm=(8, 7), memory_bytes=1 << 20))
    cuda.allocate(1 << 10)
    assert (cuda.gpu, cuda.sm, cuda.is_integrated) == ("Orin", "8.7", True)
    assert cuda.free_bytes() == (1 << 20) - (1 << 10)
    assert cuda.allocations == 1


def assert_copies_there_and_back(cuda, *, wait=True):
    """Copy numbers to the device and back into other memory, in one stream."""
    stream, device = cuda.create_stream(), cuda.allocate(32)
    there, back = (pinned_array(cuda.allocate_pinned(32), (8,), "float32") for _ in range(2))
    there[:], back[:] = range(8), 0
    cuda.copy_to_device(device, there.ctypes.data, 32, stream=stream)
    cuda.copy_to_host(back.ctypes.data, device, 32, stream=stream)
    if wait:
        cuda.synchronize(stream)
    np.testing.assert_array_equal(there, back)
    for address in (there, back):
        cuda.free_pinned(address.ctypes.data)
    cuda.free(device)
    cuda.destroy_stream(stream)


def test_memory_goes_to_the_device_and_back_in_the_order_of_a_stream():
    fake = FakeCudart()
    assert_copies_there_and_back(Cuda(fake))
    assert fake.live() == []


def test_a_reader_that_does_not_wait_reads_old_bytes_in_the_double():
    with pytest.raises(AssertionError):
        assert_copies_there_and_back(Cuda(FakeCudart()), wait=False)


@pytest.mark.gpu
def test_memory_goes_to_a_real_device_and_back():
    try:
        cuda = open_cuda()
    except BadInputError as error:
        pytest.skip(f"no GPU: {error.found}")
    assert_copies_there_and_back(cuda)


def test_a_graph_does_again_what_was_recorded():
    fake = FakeCudart()
    cuda = Cuda(fake)
    stream, device = cuda.create_stream(), cuda.allocate(4)
    host = pinned_array(cuda.allocate_pinned(4), (1,), "int32")
    cuda.begin_capture(stream)
    cuda.copy_to_device(device, host.ctypes.data, 4, stream=stream)
    graph = cuda.end_capture(stream)
    for number in (1, 2):
        host[:] = number
        cuda.launch(graph, stream=stream)
        cuda.synchronize(stream)
        assert fake.memory(device, 4).cast("i")[0] == number
    cuda.destroy_graph(graph)
    with pytest.raises(ContractError, match="a graph is launched that is not there"):
        cuda.launch(graph, stream=stream)


@pytest.mark.parametrize(
    ("misuse", "found"),
    [
        (lambda cuda, stream, device, host: [cuda.free(device), cuda.free(device)], "twice"),
        (
            lambda cuda, stream, device, host: cuda.copy_to_device(device, host, 99, stream=stream),
            "99 bytes .* not pinned",
        ),
        (
            lambda cuda, stream, device, host: [
                cuda.free(device),
                cuda.copy_to_host(host, device, 4, stream=stream),
            ],
            "is not there or was freed",
        ),
        (
            lambda cuda, stream, device, host: [
                cuda.copy_to_host(host, device, 4, stream=stream),
                cuda.free(device),
            ],
            "nobody waited",
        ),
        (
            lambda cuda, stream, device, host: cuda.copy_to_host(host, device, 4, stream=99),
            "the stream 99",
        ),
    ],
)
def test_the_double_catches_what_cuda_leaves_undefined(misuse, found):
    cuda = Cuda(FakeCudart())
    with pytest.raises(ContractError, match=found):
        misuse(cuda, cuda.create_stream(), cuda.allocate(4), cuda.allocate_pinned(4))


def test_the_double_refuses_an_allocation_while_a_graph_is_recorded():
    cuda = Cuda(FakeCudart())
    cuda.begin_capture(cuda.create_stream())
    with pytest.raises(DeployError, match="error 900"):
        cuda.allocate(4)
