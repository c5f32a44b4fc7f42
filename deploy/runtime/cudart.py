"""CUDA memory, streams and graphs: what a runner needs of them, and no more.

Two ways lead to CUDA's runtime: NVIDIA's cuda-bindings where they are installed, else libcudart
itself by ctypes. Both answer a call with its error code and its outputs. Pointers and handles are
plain integers.
"""

import ctypes
import sys
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from deploy.errors import BadInputError, DeployError

__all__ = [
    "SIGNATURES",
    "Bindings",
    "Cuda",
    "Library",
    "Runtime",
    "find_library",
    "load_cudart",
    "open_cuda",
    "pinned_array",
]

_LIBRARIES = ("libcudart.so.13", "libcudart.so.12")  # JetPack 7, JetPack 6
_TO_DEVICE, _TO_HOST = 1, 2  # cudaMemcpyKind
_NON_BLOCKING = 1  # cudaStreamNonBlocking: does not wait for the default stream
_THREAD_LOCAL = 1  # cudaStreamCaptureModeThreadLocal: other threads may allocate meanwhile
_MAJOR, _MINOR, _INTEGRATED = 75, 76, 18  # cudaDeviceAttr
_PROPERTIES_BYTES = 16384  # the structure has about 1,000 and grows; its first 256 are the name

_int, _size, _handle = ctypes.c_int, ctypes.c_size_t, ctypes.c_void_p
_out = ctypes.POINTER

SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cudaGetDeviceCount": (_out(_int),),
    "cudaGetDeviceProperties": (_out(ctypes.c_char * _PROPERTIES_BYTES), _int),
    "cudaDeviceGetAttribute": (_out(_int), _int, _int),
    "cudaMemGetInfo": (_out(_size), _out(_size)),
    "cudaMalloc": (_out(_handle), _size),
    "cudaFree": (_handle,),
    "cudaMallocHost": (_out(_handle), _size),
    "cudaFreeHost": (_handle,),
    "cudaStreamCreateWithFlags": (_out(_handle), ctypes.c_uint),
    "cudaStreamDestroy": (_handle,),
    "cudaStreamSynchronize": (_handle,),
    "cudaMemcpyAsync": (_handle, _handle, _size, _int, _handle),
    "cudaStreamBeginCapture": (_handle, _int),
    "cudaStreamEndCapture": (_handle, _out(_handle)),
    "cudaGraphInstantiate": (_out(_handle), _handle, ctypes.c_ulonglong),
    "cudaGraphLaunch": (_handle, _handle),
    "cudaGraphExecDestroy": (_handle,),
    "cudaGraphDestroy": (_handle,),
}
"""The functions' arguments in CUDA 12 and 13; a pointer is an output."""

_ENUMS = {
    ("cudaDeviceGetAttribute", 0): "cudaDeviceAttr",
    ("cudaMemcpyAsync", 3): "cudaMemcpyKind",
    ("cudaStreamBeginCapture", 1): "cudaStreamCaptureMode",
}
"""Inputs that cuda-bindings want as a member of an enumeration."""


class Runtime(Protocol):
    """A way to call CUDA's runtime."""

    def call(self, function: str, *inputs: Any) -> tuple[int, tuple[Any, ...]]:
        """Call one of SIGNATURES with its inputs; return the error code and the outputs."""

    def error_name(self, code: int) -> str:
        """The name of an error code."""


class Library:
    """libcudart by ctypes."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        for name, kinds in SIGNATURES.items():
            getattr(library, name).argtypes = kinds
        library.cudaGetErrorName.restype = ctypes.c_char_p

    def call(self, function: str, *inputs: Any) -> tuple[int, tuple[Any, ...]]:
        """Call a function with its inputs; return the error code and the outputs."""
        given, outputs, arguments = iter(inputs), [], []
        for kind in SIGNATURES[function]:
            if issubclass(kind, ctypes._Pointer):
                outputs.append(kind._type_())
                arguments.append(ctypes.byref(outputs[-1]))
            else:
                arguments.append(next(given))
        code = int(getattr(self._library, function)(*arguments))
        return code, tuple(output.value for output in outputs)

    def error_name(self, code: int) -> str:
        """The name of an error code."""
        name: bytes = self._library.cudaGetErrorName(code)
        return name.decode()


class Bindings:
    """NVIDIA's cuda-bindings."""

    def __init__(self, runtime: Any) -> None:
        self._runtime = runtime

    def call(self, function: str, *inputs: Any) -> tuple[int, tuple[Any, ...]]:
        """Call a function with its inputs; return the error code and the outputs."""
        arguments = [
            getattr(self._runtime, _ENUMS[function, i])(value) if (function, i) in _ENUMS else value
            for i, value in enumerate(inputs)
        ]
        code, *outputs = getattr(self._runtime, function)(*arguments)
        if code != 0:
            return int(code), ()
        if function == "cudaGetDeviceProperties":
            return 0, (outputs[0].name,)
        return 0, tuple(map(int, outputs))

    def error_name(self, code: int) -> str:
        """The name of an error code."""
        return str(self._runtime.cudaError_t(code).name)


def load_cudart() -> Runtime:
    """Find CUDA's runtime; no device is touched.

    Raises:
        BadInputError: It is not here.
    """
    try:
        from cuda.bindings import runtime
    except ImportError:
        return Library(find_library())
    return Bindings(runtime)


def find_library() -> ctypes.CDLL:
    """Find libcudart, where the system or a wheel put it.

    Raises:
        BadInputError: It is not here.
    """
    wheels = (
        str(path)
        for name in _LIBRARIES
        for folder in sys.path
        for path in Path(folder).glob(f"nvidia/*/lib/{name}")
    )
    for name in (*_LIBRARIES, *(f"/usr/local/cuda/lib64/{name}" for name in _LIBRARIES), *wheels):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise BadInputError(
        "the backend tensorrt needs CUDA's runtime, of CUDA 12 or 13",
        found=f"no {' or '.join(_LIBRARIES)}, and no cuda-bindings",
        remedy="install JetPack's CUDA, or pip install 'edgereg[jetson]'",
    )


class Cuda:
    """The first GPU.

    Attributes:
        allocations: How many buffers, on the device or pinned, were ever allocated through this.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self.allocations = 0

    @property
    def gpu(self) -> str:
        """The GPU's name: "Orin"."""
        name: bytes = self._value("cudaGetDeviceProperties", 0)
        return name.decode()

    @property
    def sm(self) -> str:
        """The compute capability: "8.7"."""
        major, minor = (self._value("cudaDeviceGetAttribute", a, 0) for a in (_MAJOR, _MINOR))
        return f"{major}.{minor}"

    @property
    def is_integrated(self) -> bool:
        """Whether the GPU's memory is the host's."""
        return bool(self._value("cudaDeviceGetAttribute", _INTEGRATED, 0))

    def free_bytes(self) -> int:
        """The memory that is free on the device."""
        free: int = self._call("cudaMemGetInfo")[0]
        return free

    def allocate(self, size_bytes: int) -> int:
        """Return the address of new memory on the device."""
        self.allocations += 1
        return int(self._value("cudaMalloc", size_bytes))

    def free(self, address: int) -> None:
        """Free memory on the device."""
        self._call("cudaFree", address)

    def allocate_pinned(self, size_bytes: int) -> int:
        """Return the address of new host memory that the device can copy without a detour."""
        self.allocations += 1
        return int(self._value("cudaMallocHost", size_bytes))

    def free_pinned(self, address: int) -> None:
        """Free pinned memory."""
        self._call("cudaFreeHost", address)

    def create_stream(self) -> int:
        """Return a new stream, whose work is done in order."""
        return int(self._value("cudaStreamCreateWithFlags", _NON_BLOCKING))

    def destroy_stream(self, stream: int) -> None:
        """Destroy a stream."""
        self._call("cudaStreamDestroy", stream)

    def synchronize(self, stream: int) -> None:
        """Wait until all work of a stream is done."""
        self._call("cudaStreamSynchronize", stream)

    def copy_to_device(self, device: int, host: int, size_bytes: int, *, stream: int) -> None:
        """Enqueue a copy from pinned memory."""
        self._call("cudaMemcpyAsync", device, host, size_bytes, _TO_DEVICE, stream)

    def copy_to_host(self, host: int, device: int, size_bytes: int, *, stream: int) -> None:
        """Enqueue a copy into pinned memory."""
        self._call("cudaMemcpyAsync", host, device, size_bytes, _TO_HOST, stream)

    def begin_capture(self, stream: int) -> None:
        """From here on record a stream's work and do not do it."""
        self._call("cudaStreamBeginCapture", stream, _THREAD_LOCAL)

    def end_capture(self, stream: int) -> int:
        """Stop recording; return the graph, ready to be launched."""
        graph = self._value("cudaStreamEndCapture", stream)
        try:
            return int(self._value("cudaGraphInstantiate", graph, 0))
        finally:
            self._call("cudaGraphDestroy", graph)

    def launch(self, graph: int, *, stream: int) -> None:
        """Enqueue all the work of a graph."""
        self._call("cudaGraphLaunch", graph, stream)

    def destroy_graph(self, graph: int) -> None:
        """Destroy a graph."""
        self._call("cudaGraphExecDestroy", graph)

    def _value(self, function: str, *inputs: Any) -> Any:
        return self._call(function, *inputs)[0]

    def _call(self, function: str, *inputs: Any) -> tuple[Any, ...]:
        code, outputs = self._runtime.call(function, *inputs)
        if code != 0:
            raise DeployError(
                f"CUDA's {function} succeeds",
                found=f"error {code}, {self._runtime.error_name(code)}",
                remedy="free memory if it is short; after another error start the process again",
            )
        return outputs


def open_cuda() -> Cuda:
    """Find CUDA's runtime and a GPU; TensorRT may be touched only after this.

    TensorRT 11 without a GPU hands out an object around null, and the next call is a crash.

    Raises:
        BadInputError: There is no CUDA runtime, or no GPU that it can use.
    """
    runtime = load_cudart()
    code, outputs = runtime.call("cudaGetDeviceCount")
    if code != 0 or outputs[0] < 1:
        raise BadInputError(
            "the backend tensorrt needs an NVIDIA GPU and its driver",
            found=f"error {code}, {runtime.error_name(code)}" if code else "no GPU",
            remedy="run it on the device, or use --backend onnxruntime",
        )
    return Cuda(runtime)


def pinned_array(address: int, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
    """Return pinned memory as an array; it must not be used after the memory is freed."""
    size_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = (ctypes.c_uint8 * size_bytes).from_address(address)
    return np.ctypeslib.as_array(memory).view(dtype).reshape(shape)
