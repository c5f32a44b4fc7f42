"""What a user would run instead: each peer takes a PyTorch model and gives what runs it.

All get as many threads as the job has, and none is pinned to a core. What an error is made of is
the peer's own affair: whoever times them shows it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

__all__ = ["OPSET", "PEERS", "PLAIN", "REQUIREMENTS", "Case", "Kind", "Ready", "plain", "slimmed"]

Kind = Literal["fp32", "bf16", "int8"]
Run = Callable[[NDArray[np.float32]], NDArray[np.float32]]

OPSET = 20
PLAIN = "ONNX Runtime"
"""The peer that all are compared with: torch.onnx.export as it comes."""
REQUIREMENTS = ("onnxslim", "colorama", "onnxsim", "openvino", "openvino-telemetry")


@dataclass(frozen=True)
class Case:
    """What a peer is given.

    Args:
        model: In evaluation mode, float32.
        images: (N, 3, H, W): the batch that it will be run on.
        calibration: (M, 3, H, W) images like those trained on, M a multiple of N.
        threads: That may compute.
        folder: For its files.
    """

    model: nn.Module
    images: NDArray[np.float32]
    calibration: NDArray[np.float32]
    threads: int
    folder: Path

    @property
    def plain(self) -> Path:
        """What torch.onnx.export writes, made once."""
        path = self.folder / "plain.onnx"
        if not path.is_file():
            x = torch.from_numpy(self.images)
            path.write_bytes(plain(self.model, x, opset=OPSET, is_fixed=True))
        return path


@dataclass(frozen=True)
class Ready:
    """A peer that can be run.

    Args:
        run: From (N, 3, H, W) images to (N, classes) logits.
        computes: The type of most of its products.
    """

    run: Run
    computes: Kind


def plain(model: nn.Module, x: Tensor, *, opset: int, is_fixed: bool = False) -> bytes:
    """Return what torch's exporter writes of a model as it is, for any batch size or for x's."""
    program = torch.onnx.export(
        model,
        (x,),
        dynamo=True,
        opset_version=opset,
        dynamic_shapes=None if is_fixed else ({0: torch.export.Dim("batch", min=1)},),
        input_names=["images"],
        output_names=["logits"],
        external_data=False,
        verbose=False,
    )
    assert program is not None
    return bytes(program.model_proto.SerializeToString())


def slimmed(file: bytes) -> bytes:
    """Return what onnxslim makes of a file."""
    import onnxslim

    slim: Any = onnxslim.slim
    return bytes(slim(onnx.load_model_from_string(file)).SerializeToString())


def _eager(case: Case) -> Ready:
    return Ready(_torch_run(case.model), "fp32")


def _compiled(case: Case) -> Ready:
    torch.compiler.reset()
    run = _torch_run(torch.compile(case.model))
    run(case.images)  # compiles
    return Ready(run, "fp32")


def _torch_run(model: Any) -> Run:
    def run(images: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.inference_mode():
            logits: NDArray[np.float32] = model(torch.from_numpy(images)).numpy()
        return logits

    return run


def _plain_ort(case: Case) -> Ready:
    return _ort(case.plain.read_bytes(), case, "fp32")


def _onnxslim(case: Case) -> Ready:
    return _ort(slimmed(case.plain.read_bytes()), case, "fp32")


def _onnxsim(case: Case) -> Ready:
    import onnxsim

    simplify: Any = onnxsim.simplify
    proto, is_checked = simplify(onnx.load_model(case.plain))
    if not is_checked:
        raise RuntimeError("onnxsim's own check of what it made failed")
    return _ort(proto.SerializeToString(), case, "fp32")


def _static(case: Case) -> Ready:
    """ONNX Runtime's own static quantization, all of it at its defaults."""
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    size = len(case.images)
    batches = np.split(case.calibration, len(case.calibration) // size)

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # the package has no types
        def __init__(self) -> None:
            self.left = iter(batches)

        def get_next(self) -> dict[str, NDArray[np.float32]] | None:
            batch = next(self.left, None)
            return None if batch is None else {"images": batch}

    path = case.folder / "static.onnx"
    quantize_static(case.plain, path, Reader())
    return _ort(path.read_bytes(), case, "int8")


def _ort(file: bytes, case: Case, computes: Kind) -> Ready:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = case.threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    def run(images: NDArray[np.float32]) -> NDArray[np.float32]:
        logits: NDArray[np.float32] = session.run(["logits"], {"images": images})[0]
        return logits

    return Ready(run, computes)


def _openvino(case: Case, **settings: Any) -> Ready:
    import openvino

    core: Any = openvino.Core()
    settings |= {"INFERENCE_NUM_THREADS": case.threads, "ENABLE_CPU_PINNING": False}
    compiled = core.compile_model(core.read_model(case.plain), "CPU", settings)
    request = compiled.create_infer_request()
    found = str(compiled.get_property("INFERENCE_PRECISION_HINT"))
    computes: Kind = "bf16" if "bfloat16" in found else "fp32"

    def run(images: NDArray[np.float32]) -> NDArray[np.float32]:
        results = request.infer([images], share_inputs=True, share_outputs=False)
        logits: NDArray[np.float32] = results[0]
        return logits

    return Ready(run, computes)


def _openvino_f32(case: Case) -> Ready:
    return _openvino(case, INFERENCE_PRECISION_HINT="f32")


PEERS: dict[str, Callable[[Case], Ready]] = {
    PLAIN: _plain_ort,
    "torch eager": _eager,
    "torch.compile": _compiled,
    "onnxslim": _onnxslim,
    "onnxsim": _onnxsim,
    "ORT static int8": _static,
    "OpenVINO": _openvino,
    "OpenVINO f32": _openvino_f32,
}
