"""Run an engine of TensorRT: pinned buffers, one stream, and a CUDA graph where the shape is fixed.

Everything is allocated before the first image. An inference copies into a pinned buffer, lets the
device copy, compute and copy back in the order of one stream, and waits for the stream. With one
possible shape these three are recorded once, as a graph, and launched as one.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploy.bundle.manifest import TensorSpec
from deploy.errors import BadInputError, CheckFailedError
from deploy.runtime.cudart import Cuda, open_cuda, pinned_array
from deploy.runtime.tensors import batch_shape, check_batch, check_out, same_shape, shown_shape
from deploy.runtime.trt_versions import datatypes, error_log, load_tensorrt

__all__ = ["TrtRunner"]


@dataclass(frozen=True)
class _Buffer:
    """A tensor of the largest batch, here and on the device."""

    spec: TensorSpec
    host: NDArray[Any]
    host_address: int
    device_address: int
    row_bytes: int


class TrtRunner:
    """An engine that is ready to run, checked against the bundle's manifest.

    Args:
        plan: The serialized engine, from the cache: whoever calls this has checked it.
        tensors: The manifest's input and output.
        max_batch: The manifest's.
        precision: Which variant it is.
        dla: The DLA core that it was built for, or None.

    Attributes:
        uses_graph: Whether a CUDA graph is launched.

    Raises:
        BadInputError: There is no TensorRT, no GPU, or the engine's tensors are not the manifest's.
        CheckFailedError: The engine does not load.
    """

    def __init__(
        self,
        plan: bytes,
        tensors: tuple[TensorSpec, TensorSpec],
        *,
        max_batch: int,
        precision: str,
        dla: int | None = None,
    ) -> None:
        self._cuda = open_cuda()  # before TensorRT is touched
        trt = load_tensorrt()
        place = f"{self._cuda.gpu}, SM {self._cuda.sm}"
        self.name = f"tensorrt {trt.__version__} {place if dla is None else f'DLA {dla}, {place}'}"
        self.precision = precision
        self.threads = 1
        self.uses_graph = max_batch == 1
        self._log = error_log(trt)
        runtime = trt.Runtime(self._log)
        if dla is not None:
            runtime.DLA_core = dla
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise self._failed("an engine loads", "it does not")
        _check_tensors(trt, engine, tensors)
        with ExitStack() as owned:  # what it holds is freed in reverse order, also after an error
            self._stream = self._cuda.create_stream()
            owned.callback(self._cuda.destroy_stream, self._stream)
            self._input, self._output = (
                _allocate(self._cuda, owned, spec, max_batch) for spec in tensors
            )
            self._runtime, self._engine = runtime, engine
            self._context: Any = engine.create_execution_context()
            if self._context is None:
                raise self._failed("an engine's context is made", "none")
            owned.callback(self._drop)
            owned.callback(self._cuda.synchronize, self._stream)
            for buffer in (self._input, self._output):
                if not self._context.set_tensor_address(buffer.spec.name, buffer.device_address):
                    raise self._failed("a tensor's address is taken", f"not '{buffer.spec.name}'")
            self._count = 0
            self._set_batch(max_batch)
            self._enqueue()  # TensorRT allocates at the first time; a graph cannot record that
            self._cuda.synchronize(self._stream)
            self._graph = None
            if self.uses_graph:
                self._graph = self._record()
                owned.callback(self._cuda.destroy_graph, self._graph)
            self._owned = owned.pop_all()

    @property
    def allocations(self) -> int:
        """How many buffers, pinned or on the device, were ever allocated."""
        return self._cuda.allocations

    def __call__(self, batch: NDArray[Any], *, out: NDArray[Any] | None = None) -> NDArray[Any]:
        """Compute (N, ...) outputs from what pre-processing gives.

        Args:
            batch: Of the manifest's input type and shape.
            out: Where to write; without it a new array is made, and nothing else is.

        Raises:
            BadInputError: An array has another type or shape than the manifest's.
        """
        check_batch(batch, self._input.spec, most=len(self._input.host))
        count = len(batch)
        if out is not None:
            check_out(out, self._output.spec, count)
        if count != self._count:
            self._set_batch(count)
        np.copyto(self._input.host[:count], batch)
        if self._graph is None:
            self._enqueue()
        else:
            self._cuda.launch(self._graph, stream=self._stream)
        self._cuda.synchronize(self._stream)
        if out is None:
            out = np.empty_like(self._output.host[:count])
        np.copyto(out, self._output.host[:count])
        return out

    def close(self) -> None:
        """Free all that is held, on the device and here."""
        self._owned.close()

    def _set_batch(self, count: int) -> None:
        shape = (count, *self._input.host.shape[1:])
        if not self._context.set_input_shape(self._input.spec.name, shape):
            raise self._failed("the engine takes the batch", f"not {shown_shape(shape)}")
        self._count = count

    def _enqueue(self) -> None:
        """Enqueue the copy to the device, the inference and the copy back."""
        given, made, stream = self._input, self._output, self._stream
        size_bytes = self._count * given.row_bytes
        self._cuda.copy_to_device(
            given.device_address, given.host_address, size_bytes, stream=stream
        )
        if not self._context.execute_async_v3(stream):
            raise self._failed("TensorRT takes an inference", "it does not")
        size_bytes = self._count * made.row_bytes
        self._cuda.copy_to_host(made.host_address, made.device_address, size_bytes, stream=stream)

    def _record(self) -> int:
        self._cuda.begin_capture(self._stream)
        try:
            self._enqueue()
        except BaseException:
            self._cuda.destroy_graph(self._cuda.end_capture(self._stream))
            raise
        return self._cuda.end_capture(self._stream)

    def _drop(self) -> None:
        """Let TensorRT's objects go, the context before the engine it belongs to."""
        self._context = None
        self._engine = None
        self._runtime = None

    def _failed(self, rule: str, found: str) -> CheckFailedError:
        return CheckFailedError(
            rule,
            found=f"{found}: {'; '.join(self._log.errors) or 'no message'}",
            remedy="free memory if it is short, or build again: `edgereg build`",
        )


def _allocate(cuda: Cuda, owned: ExitStack, spec: TensorSpec, max_batch: int) -> _Buffer:
    shape = batch_shape(spec, max_batch)
    row_bytes = int(np.prod(shape[1:])) * np.dtype(spec.dtype).itemsize
    device_address = cuda.allocate(max_batch * row_bytes)
    owned.callback(cuda.free, device_address)
    host_address = cuda.allocate_pinned(max_batch * row_bytes)
    owned.callback(cuda.free_pinned, host_address)
    host = pinned_array(host_address, shape, spec.dtype)
    host[...] = 0  # of the first, unmeasured inference
    return _Buffer(spec, host, host_address, device_address, row_bytes)


def _check_tensors(trt: Any, engine: Any, tensors: tuple[TensorSpec, TensorSpec]) -> None:
    """Refuse an engine whose tensors are not the manifest's."""
    kinds = datatypes(trt)
    found = {}
    for i in range(engine.num_io_tensors):
        name = engine.get_tensor_name(i)
        shape = tuple(n if n >= 0 else "batch" for n in engine.get_tensor_shape(name))
        dtype = kinds.get(engine.get_tensor_dtype(name), "another type")
        found[engine.get_tensor_mode(name), name] = (dtype, shape)
    modes = (trt.TensorIOMode.INPUT, trt.TensorIOMode.OUTPUT)
    wanted = {
        (mode, spec.name): (spec.dtype, spec.shape)
        for mode, spec in zip(modes, tensors, strict=True)
    }
    matches = found.keys() == wanted.keys() and all(
        found[key][0] == dtype and same_shape(found[key][1], shape)
        for key, (dtype, shape) in wanted.items()
    )
    if not matches:
        raise BadInputError(
            "an engine takes and gives what the bundle's manifest says",
            found=f"{_shown(found)} where the manifest says {_shown(wanted)}",
            remedy="build the engine again: `edgereg build`",
        )


def _shown(tensors: dict[Any, Any]) -> str:
    return ", ".join(
        f"'{name}' {dtype} {shown_shape(shape)}" for (_, name), (dtype, shape) in tensors.items()
    )
