"""Run a model by ONNX Runtime on the CPU. The only file of deploy that imports it."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploy.bundle.manifest import TensorSpec
from deploy.bundle.read import Bundle
from deploy.errors import BadInputError

__all__ = ["OrtRunner"]

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
        ort = _onnxruntime()
        self.name = f"onnxruntime {ort.__version__} CPU"
        self.precision = precision
        self.threads = 1 if threads is None else threads
        self._input = bundle.manifest.inputs[0]
        self._output = bundle.manifest.outputs[0]
        file = bundle.manifest.variants[precision].file
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        options.log_severity_level = 3  # errors; warnings would mix with the command's own output
        model = bundle.read(file)
        try:
            session = ort.InferenceSession(model, options, providers=[_PROVIDER])
        except Exception as error:  # its exception classes share no documented base
            raise _unusable(file, f"ONNX Runtime says: {error}") from error
        if session.get_providers() != [_PROVIDER]:
            raise _unusable(file, f"it would run on {', '.join(session.get_providers())}")
        _check_tensors(file, session.get_inputs(), self._input)
        _check_tensors(file, session.get_outputs(), self._output)
        self._session: Any = session

    def __call__(self, batch: NDArray[Any]) -> NDArray[np.float32]:
        """Compute (N, classes) logits from what pre-processing gives.

        Raises:
            BadInputError: The batch has another type or shape than the manifest's input.
        """
        spec = self._input
        if batch.dtype != spec.dtype or not _fits(batch.shape, spec.shape):
            raise BadInputError(
                f"the input '{spec.name}' must be {spec.dtype} {_shown(spec.shape)}",
                found=f"{batch.dtype} {_shown(batch.shape)}",
                remedy="pre-process images as the bundle's manifest says",
            )
        outputs = self._session.run([self._output.name], {self._input.name: batch})
        logits: NDArray[np.float32] = outputs[0]
        return logits

    def close(self) -> None:
        """Free the session's memory."""
        self._session = None


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
    if not matches or not _same_shape(found[0][2], expected.shape):
        wanted = f"'{expected.name}' {expected.dtype} {_shown(expected.shape)}"
        shown = ", ".join(f"'{name}' {dtype} {_shown(shape)}" for name, dtype, shape in found)
        raise _unusable(file, f"{shown} where the manifest says {wanted}")


def _same_shape(found: tuple[Any, ...], expected: tuple[int | str, ...]) -> bool:
    """Whether fixed dimensions agree and free ones are free; a free one's name does not matter."""
    return len(found) == len(expected) and all(
        a == b if isinstance(b, int) else not isinstance(a, int)
        for a, b in zip(found, expected, strict=True)
    )


def _fits(shape: tuple[int, ...], expected: tuple[int | str, ...]) -> bool:
    return len(shape) == len(expected) and all(
        a == b or isinstance(b, str) for a, b in zip(shape, expected, strict=True)
    )


def _shown(shape: tuple[Any, ...]) -> str:
    return "(" + ", ".join(map(str, shape)) + ")"


def _unusable(file: str, found: str) -> BadInputError:
    return BadInputError(
        f"the model '{file}' must load on the CPU as the bundle's manifest describes it",
        found=found,
        remedy="export the bundle again",
    )
