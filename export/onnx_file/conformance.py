"""Let NVIDIA's own ONNX parser and engine builder judge an export, without a GPU.

TensorRT itself cannot be installed without NVIDIA's index, nor build without a GPU. TensorRT-RTX
can do both, on a CPU: its parser is TensorRT's, and it builds for a GPU that is not there. It does
not know the Jetsons' compute capabilities, so each target names a proxy, and its plans are thrown
away. It has no plugins: it may refuse NonZero, RoiAlign, DeformConv and NonMaxSuppression where a
Jetson would not.

The judge is native code that is fed a file: it runs in a child process, which may crash, hang or
run out of memory.
"""

import importlib
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from deploy.bundle.manifest import Conformance
from deploy.errors import CheckFailedError
from export.targets import Target

__all__ = ["judge"]

_JUDGE = "tensorrt_rtx"
_MEMORY_LIMIT_BYTES = 32 * 2**30
_CHILD = "import sys; from export.onnx_file.conformance import _child; _child(*sys.argv[1:])"


def judge(
    model: bytes, target: Target, *, max_batch: int = 1, time_limit_s: float = 600.0
) -> Conformance:
    """Return the verdict on a model for a target: accepted, not judged, or not required.

    Raises:
        CheckFailedError: The model was refused, at the node that is named; or the judge crashed or
            took too long.
    """
    if target.proxy is None:
        return Conformance("none", "not required", f"{target.runtime} runs it during the export")
    answer = _ask_child(model, target.proxy, max_batch=max_batch, time_limit_s=time_limit_s)
    if "missing" in answer:
        return Conformance(_JUDGE, "not judged", answer["missing"])
    if "refused" in answer:
        raise CheckFailedError(
            f"a model for {target.name} is accepted by NVIDIA's parser and builder",
            found=f"{answer['judge']} refuses {answer['refused']}",
            remedy="replace this operation in the model's code by one that the parser knows",
        )
    sizes = "1" if max_batch == 1 else f"1 to {max_batch}"
    detail = (
        f"parsed and built for {target.proxy}, the proxy of compute capability "
        f"{target.compute_capability}, strongly typed, batch {sizes}; not run on a device"
    )
    return Conformance(answer["judge"], "accepted", detail)


def _ask_child(model: bytes, proxy: str, *, max_batch: int, time_limit_s: float) -> dict[str, str]:
    """Return {"judge": its name}, the same with {"refused": why}, or {"missing": why}."""
    rule = "NVIDIA's parser and builder come to a verdict"
    with tempfile.TemporaryDirectory() as directory:
        question, answer = Path(directory, "model.onnx"), Path(directory, "answer.json")
        question.write_bytes(model)
        arguments = (_JUDGE, str(question), str(answer), proxy, str(max_batch))
        command = [sys.executable, "-c", _CHILD, *arguments]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        try:
            done = subprocess.run(
                command,
                env=environment,
                timeout=time_limit_s,
                capture_output=True,
                text=True,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise CheckFailedError(
                rule,
                found=f"none after {time_limit_s:g} s",
                remedy="export a smaller model, or raise the limit",
            ) from error
        if not answer.is_file():
            raise CheckFailedError(
                rule,
                found=f"it ended with status {done.returncode}: {done.stderr.strip()[-300:]}",
                remedy="give the machine more memory, or report it together with the ONNX file",
            )
        verdict: dict[str, str] = json.loads(answer.read_text("utf-8"))
        return verdict


def _child(judge_module: str, question: str, answer: str, proxy: str, max_batch: str) -> None:
    """Judge a file and write the answer; runs in a process of its own."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_LIMIT_BYTES, _MEMORY_LIMIT_BYTES))
    try:
        trt = importlib.import_module(judge_module)
    except ModuleNotFoundError as error:  # installed and broken is an error, not an absence
        verdict = {
            "missing": f"{judge_module} is not here ({error}): pip install 'edgereg[conformance]'"
        }
    else:
        verdict = {"judge": f"TensorRT-RTX {trt.__version__}"}
        refused = _refusal(trt, Path(question).read_bytes(), proxy, int(max_batch))
        if refused:
            verdict["refused"] = refused
    Path(answer).write_text(json.dumps(verdict), "utf-8")


def _refusal(trt: Any, model: bytes, proxy: str, max_batch: int) -> str | None:
    """Parse and build a model; say why that fails, or return None."""

    class Log(trt.ILogger):  # type: ignore[misc]  # the default logger prints to stdout
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            # After an error of ours the library also reports that there is no GPU: that's no news.
            if (
                severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR)
                and "catchCudaError" not in message
            ):
                self.errors.append(message)

    log = Log()
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse(model):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        return "; ".join(
            f"node '{error.node_name()}' ({error.node_operator()}): {error.desc()}"
            for error in errors
        )
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, proxy), 0)
    if max_batch > 1:
        config.add_optimization_profile(_profile(builder, network, max_batch))
    if builder.build_serialized_network(network, config) is None:
        return "; ".join(log.errors) or "to build it, without a message"
    return None


def _profile(builder: Any, network: Any, max_batch: int) -> Any:
    """Return the sizes, smallest, usual and largest, that an engine is built for."""
    profile = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        sizes = (1, (1 + max_batch) // 2, max_batch)
        profile.set_shape(tensor.name, *([n, *list(tensor.shape)[1:]] for n in sizes))
    return profile
