"""Run a model by ONNX Runtime on the CPU. The only file of deploy that imports it.

Inputs are read where they lie. Outputs are written where they are wanted (I/O binding) if they are
wanted somewhere; else they are copied once, which for an answer takes less time than to bind it.
"""

import threading
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from deploy.bundle.manifest import TensorSpec
from deploy.bundle.read import Bundle
from deploy.bundle.sealed import SealedCopy
from deploy.errors import BadInputError
from deploy.runtime.heap import use_heap
from deploy.runtime.tensors import check_batch, check_out, same_shape, shown_shape

__all__ = ["OrtRunner", "open_session", "run_bound", "runtime_name"]

_PROVIDER = "CPUExecutionProvider"
_DTYPES = {"tensor(float)": "float32", "tensor(uint8)": "uint8"}


class OrtRunner:
    """A session of ONNX Runtime, checked against the bundle's manifest.

    Args:
        bundle: The opened bundle.
        precision: Which of its variants.
        threads: Threads within an operator. One by default: a latency that does not depend on who
            else is on the machine, and the fastest for small models.

    Raises:
        BadInputError: ONNX Runtime is missing, or cannot load the model on the CPU, or the model's
            input or output is not what the manifest says.
    """

    def __init__(self, bundle: Bundle, precision: str, threads: int | None) -> None:
        self.name = f"{runtime_name()} CPU"
        self.precision = precision
        self.threads = 1 if threads is None else threads
        self._input = bundle.manifest.inputs[0]
        self._output = bundle.manifest.outputs[0]
        file = bundle.manifest.variants[precision].file
        model = bundle.sealed(file)
        session = open_session(model, file=file, threads=self.threads)
        threading.Thread(target=model.close).start()  # some milliseconds, for which nobody waits
        _check_tensors(file, session.get_inputs(), self._input)
        _check_tensors(file, session.get_outputs(), self._output)
        self._session: Any = session
        self._binding: Any = session.io_binding()

    def __call__(self, batch: NDArray[Any], *, out: NDArray[Any] | None = None) -> NDArray[Any]:
        """Compute (N, ...) outputs from what pre-processing gives.

        Args:
            batch: Of the manifest's input type and shape.
            out: Where to write; without it a new array is made.

        Raises:
            BadInputError: An array has another type or shape than the manifest's.
        """
        check_batch(batch, self._input)
        inputs = {self._input.name: batch}
        if out is None:
            (answer,) = self._session.run([self._output.name], inputs)
            return cast("NDArray[Any]", answer)
        check_out(out, self._output, len(batch))
        run_bound(self._session, self._binding, inputs=inputs, outputs={self._output.name: out})
        return out

    def close(self) -> None:
        """Free the session's memory."""
        self._binding = None
        self._session = None


def open_session(model: bytes | SealedCopy, *, file: str, threads: int) -> Any:
    """Load a model, for the CPU and nothing else.

    Args:
        model: An ONNX file; by its name ONNX Runtime makes two copies fewer than of bytes.
        file: Its name, for the error.
        threads: Threads within an operator.

    Raises:
        BadInputError: ONNX Runtime is missing, or cannot load it.
    """
    ort = _onnxruntime()
    source = model.path if isinstance(model, SealedCopy) else model
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3  # errors; warnings would mix with the command's own output
    use_heap()
    try:
        # without its fallback, which prints and loads again
        session = ort.InferenceSession(source, options, providers=[_PROVIDER], enable_fallback=0)
    except Exception as error:  # its exception classes share no documented base
        raise _unusable(file, f"ONNX Runtime says: {error}") from error
    # Kept for a second session on other providers; the path may be another file's by then.
    session._model_bytes = session._model_path = None
    if session.get_providers() != [_PROVIDER]:
        raise _unusable(file, f"it would run on {', '.join(session.get_providers())}")
    return session


def run_bound(
    session: Any,
    binding: Any,
    *,
    inputs: Mapping[str, NDArray[Any]],
    outputs: Mapping[str, NDArray[Any]],
) -> None:
    """Run a session on inputs where they lie, into outputs where they are wanted.

    Args:
        session: From `open_session`.
        binding: Of this session.
        inputs: By name.
        outputs: By name, contiguous, of the type and shape that will be computed.
    """
    for name, array in inputs.items():
        binding.bind_cpu_input(name, np.asarray(array, order="C"))
    for name, array in outputs.items():
        binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
    session.run_with_iobinding(binding)


def runtime_name() -> str:
    """ONNX Runtime and its version.

    Raises:
        BadInputError: It is missing.
    """
    return f"onnxruntime {_onnxruntime().__version__}"


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise BadInputError(
            "the backend onnxruntime needs ONNX Runtime",
            found="no onnxruntime here",
            remedy="pip install 'edgereg[ort]'",
        ) from error
    return onnxruntime


def _check_tensors(file: str, tensors: list[Any], expected: TensorSpec) -> None:
    found = [(t.name, _DTYPES.get(t.type, t.type), tuple(t.shape)) for t in tensors]
    matches = len(found) == 1 and found[0][:2] == (expected.name, expected.dtype)
    if not matches or not same_shape(found[0][2], expected.shape):
        wanted = f"'{expected.name}' {expected.dtype} {shown_shape(expected.shape)}"
        shown = ", ".join(f"'{name}' {dtype} {shown_shape(shape)}" for name, dtype, shape in found)
        raise _unusable(file, f"{shown} where the manifest says {wanted}")


def _unusable(file: str, found: str) -> BadInputError:
    return BadInputError(
        f"the model '{file}' must load on the CPU as the bundle's manifest describes it",
        found=found,
        remedy="export the bundle again",
    )
