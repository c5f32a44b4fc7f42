"""Build an engine in a process of its own, which may crash, hang or run out of memory.

The parent watches: it shows the stage, stops the child at its limits of memory and time, and says
which it was. The limit is on resident memory, not on address space, of which CUDA reserves more
than there is. A child is the first to go if the machine runs out of memory, and ends with its
parent.
"""

import ctypes
import dataclasses
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from deploy.errors import BadInputError, CheckFailedError, DeployError
from deploy.runtime.cudart import open_cuda
from deploy.runtime.trt_builder import BuildRequest, build_plan, inspect_plan
from deploy.runtime.trt_layers import BuiltTypes, judge_types, read_layers

__all__ = ["BuildOutcome", "Limits", "available_bytes", "build_engine", "workspace_bytes"]

_TENSORRT = "tensorrt"
_CHILD = (  # not from the working directory
    "import sys; sys.path.remove('') if '' in sys.path else None; "
    "from deploy.runtime.engine_build import _child; "
    "_child(sys.argv[1:])"
)
_POLL_S = 0.1
_RESERVE_BYTES = 64 << 20  # below this the machine itself is in danger
_SHARE = 0.8  # of what is available, by default
_PARENT_DIES = 1  # prctl's PR_SET_PDEATHSIG


@dataclass(frozen=True)
class Limits:
    """What a build may use.

    Attributes:
        memory_bytes: Of the host; None is four fifths of what is available.
        workspace_bytes: For a layer's scratch memory on the device; None is half of what is free.
        time_s: From start to end.
    """

    memory_bytes: int | None = None
    workspace_bytes: int | None = None
    time_s: float = 3600.0


@dataclass(frozen=True)
class BuildOutcome:
    """What came of a build.

    Attributes:
        plan: The serialized engine.
        timing_cache: What was timed on the way.
        types: What it was built in; None where the GPU that it is for is not here.
        gpu_layers: With a DLA, the layers that it cannot compute.
        workspace_bytes: What a layer was allowed.
        stages_s: How long each stage took.
    """

    plan: bytes
    timing_cache: bytes
    types: BuiltTypes | None
    gpu_layers: tuple[str, ...]
    workspace_bytes: int
    stages_s: dict[str, float]


def build_engine(
    model: bytes,
    request: BuildRequest,
    *,
    folder: Path,
    limits: Limits,
    timing_cache: bytes = b"",
    on_stage: Callable[[str], None] = lambda stage: None,
) -> BuildOutcome:
    """Build an engine, load it and read its layers, in a child process.

    Args:
        model: An ONNX file.
        request: What to build.
        folder: An empty one, for the files that the two processes exchange.
        limits: Of memory and time.
        timing_cache: From an earlier build on this GPU with this TensorRT.
        on_stage: Told the stage and the time since the start, several times a second.

    Raises:
        BadInputError: The model is not parsed, or asks for what this machine has not.
        CheckFailedError: No engine is built; or the child crashed, hung or took too much memory.
    """
    question = {
        "tensorrt": _TENSORRT,
        "request": dataclasses.asdict(request),
        "workspace_bytes": limits.workspace_bytes,
    }
    (folder / "model.onnx").write_bytes(model)
    (folder / "timing.old").write_bytes(timing_cache)
    (folder / "question.json").write_text(json.dumps(question), "utf-8")
    stages_s = _run_child(folder, limits, on_stage)
    answer: dict[str, Any] = json.loads((folder / "answer.json").read_text("utf-8"))
    if "error" in answer:
        kind = BadInputError if answer["exit_code"] == 2 else CheckFailedError
        raise kind(answer["error"], found=answer["found"], remedy=answer["remedy"])
    types = answer["types"]
    return BuildOutcome(
        plan=(folder / "engine.plan").read_bytes(),
        timing_cache=(folder / "timing.new").read_bytes(),
        types=None
        if types is None
        else BuiltTypes(types["layers"], tuple(types["problems"]), tuple(types["notes"])),
        gpu_layers=tuple(answer["gpu_layers"]),
        workspace_bytes=answer["workspace_bytes"],
        stages_s=stages_s,
    )


def workspace_bytes(free_bytes: int, available: int, *, is_integrated: bool) -> int:
    """Return half of what a device has free; where its memory is the host's, of the lesser."""
    return (min(free_bytes, available) if is_integrated else free_bytes) // 2


def available_bytes(root: Path = Path("/")) -> int:
    """Return the memory that the machine can give without swapping."""
    for line in (root / "proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    raise BadInputError(
        "/proc/meminfo says how much memory is available", found="no MemAvailable", remedy="Linux"
    )


def _run_child(folder: Path, limits: Limits, on_stage: Callable[[str], None]) -> dict[str, float]:
    """Run the child to its end; return how long each stage took."""
    cap = limits.memory_bytes or int(_SHARE * available_bytes())
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    read, write = os.pipe()
    with os.fdopen(read, "rb") as stages, (folder / "output.txt").open("wb") as output:
        child = subprocess.Popen(
            [sys.executable, "-c", _CHILD, str(folder), str(write)],
            env=environment,
            stdout=output,
            stderr=output,
            pass_fds=(write,),
        )
        os.close(write)
        try:
            seconds = _watch(child, stages, limits.time_s, cap, on_stage)
        finally:
            child.kill()
            child.wait()
    if not (folder / "answer.json").is_file():
        last = (folder / "output.txt").read_text("utf-8", errors="replace").strip()[-300:]
        raise _failed(
            "it was killed, most likely for want of memory"
            if child.returncode == -signal.SIGKILL
            else f"it ended with status {child.returncode}: {last}"
        )
    return seconds


def _watch(
    child: "subprocess.Popen[bytes]",
    stages: IO[bytes],
    time_s: float,
    cap_bytes: int,
    on_stage: Callable[[str], None],
) -> dict[str, float]:
    """Follow a child until it closes its end of the pipe; kill it at a limit."""
    os.set_blocking(stages.fileno(), False)
    start = since = time.monotonic()
    stage, text, seconds, buffer = "start", "start", {}, b""
    while True:
        ready, _, _ = select.select([stages], [], [], _POLL_S)
        now = time.monotonic()
        if ready:
            data = os.read(stages.fileno(), 1 << 16)
            *lines, buffer = (buffer + data).split(b"\n")
            for line in lines:
                text = line.decode()
                if (new := text.partition(":")[0]) != stage:
                    seconds[stage] = now - since
                    stage, since = new, now
            if not data:
                child.wait()
                return seconds | {stage: now - since}
        on_stage(f"{text}, {now - start:.0f} s")
        if now - start > time_s:
            raise _failed(f"nothing after {time_s:g} s, during: {text}")
        resident, available = _resident_bytes(child.pid), available_bytes()
        if resident > cap_bytes:
            raise _failed(f"out of memory: {_mib(resident)} during: {text}; {_mib(cap_bytes)} cap")
        if available < _RESERVE_BYTES:
            raise _failed(f"out of memory: the machine has {_mib(available)} left, during: {text}")


def _resident_bytes(pid: int) -> int:
    """Return how much memory a process holds; 0 once it has ended."""
    try:
        pages = Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def _mib(size_bytes: int) -> str:
    return f"{size_bytes >> 20} MiB"


def _failed(found: str) -> CheckFailedError:
    return CheckFailedError(
        "the process that builds an engine comes to its end",
        found=found,
        remedy="if memory is short, stop other programs, set a smaller --workspace, raise --memory "
        "or add swap; an earlier engine is still there",
    )


def _child(arguments: list[str]) -> None:
    """Build as the question in a folder says, and write the answer; runs in its own process."""
    folder, pipe = Path(arguments[0]), int(arguments[1])
    ctypes.CDLL(None).prctl(_PARENT_DIES, signal.SIGKILL)
    Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    question = json.loads((folder / "question.json").read_text("utf-8"))
    try:
        answer = _answer(question, folder, lambda stage: _tell(pipe, stage))
    except DeployError as error:
        answer = {
            "error": error.rule,
            "found": error.found,
            "remedy": error.remedy,
            "exit_code": error.exit_code,
        }
    (folder / "answer.part").write_text(json.dumps(answer), "utf-8")
    (folder / "answer.part").rename(folder / "answer.json")


def _tell(pipe: int, stage: str) -> None:
    os.write(pipe, stage.replace("\n", " ").encode("utf-8", "replace") + b"\n")


def _answer(
    question: dict[str, Any], folder: Path, on_stage: Callable[[str], None]
) -> dict[str, Any]:
    request = BuildRequest(
        **question["request"] | {"profile": tuple(question["request"]["profile"])}
    )
    is_for_here = request.compute_capability is None
    workspace = question["workspace_bytes"]
    if is_for_here:  # before TensorRT is touched
        cuda = open_cuda()
        workspace = workspace or workspace_bytes(
            cuda.free_bytes(), available_bytes(), is_integrated=cuda.is_integrated
        )
    trt = importlib.import_module(question["tensorrt"])
    built = build_plan(
        trt,
        (folder / "model.onnx").read_bytes(),
        request,
        workspace_bytes=workspace,
        timing_cache=(folder / "timing.old").read_bytes(),
        on_stage=on_stage,
    )
    (folder / "engine.plan").write_bytes(built.plan)
    (folder / "timing.new").write_bytes(built.timing_cache)
    types = None
    if is_for_here:
        on_stage("inspect")
        layers = read_layers(inspect_plan(trt, built.plan, request))
        types = dataclasses.asdict(
            judge_types(request.precision, built.wanted, layers, is_constrained=request.dla is None)
        )
    return {"types": types, "gpu_layers": built.gpu_layers, "workspace_bytes": workspace}
