"""Parse an ONNX file and build an engine: one path through TensorRT 8.6, 10 and 11.

What differs between them stands in trt_versions.py. This runs in a process of its own: see
engine_build.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from deploy.errors import BadInputError, CheckFailedError
from deploy.runtime.trt_layers import constrain, wanted_types
from deploy.runtime.trt_versions import Dialect, dialect_of, error_log

__all__ = ["BuildRequest", "BuiltPlan", "build_plan", "engine_flags", "inspect_plan"]

OnStage = Callable[[str], None]


@dataclass(frozen=True)
class BuildRequest:
    """What is to be built.

    Attributes:
        precision: The variant: "fp32", "fp16" or "int8".
        profile: The smallest, the usual and the largest batch.
        dla: The number of a DLA core; None for the GPU.
        allows_tf32: Whether fp32 products may be rounded to TF32's 10 bits.
        compute_capability: The GPU to build for, such as "SM86", where it is not here; only
            TensorRT-RTX can.
    """

    precision: str
    profile: tuple[int, int, int] = (1, 1, 1)
    dla: int | None = None
    allows_tf32: bool = False
    compute_capability: str | None = None


@dataclass(frozen=True)
class BuiltPlan:
    """A serialized engine.

    Attributes:
        plan: Its bytes.
        timing_cache: What was timed on the way, for the next build; empty if there is none.
        wanted: The type of each layer, as the ONNX file says it; see `wanted_types`.
        gpu_layers: Layers that the DLA cannot compute; none without a DLA.
    """

    plan: bytes
    timing_cache: bytes
    wanted: dict[str, str]
    gpu_layers: tuple[str, ...]


def engine_flags(trt: Any, request: BuildRequest) -> tuple[str, ...]:
    """Return all that is asked of the builder besides the batch, sorted, for an engine's key."""
    dialect = _dialect(trt, request)
    flags = {*dialect.network_flags, *dialect.precision_flags.get(request.precision, ())}
    flags |= {"TF32"} if request.allows_tf32 else set()
    flags |= {f"DLA core {request.dla}"} if request.dla is not None else set()
    return tuple(sorted(flags))


def build_plan(
    trt: Any,
    model: bytes,
    request: BuildRequest,
    *,
    workspace_bytes: int,
    timing_cache: bytes = b"",
    on_stage: OnStage = lambda stage: None,
) -> BuiltPlan:
    """Build an engine.

    Args:
        trt: The module tensorrt. There must be a GPU: see `open_cuda`.
        model: An ONNX file.
        request: What to build.
        workspace_bytes: The most memory that a layer may use beside its tensors.
        timing_cache: From an earlier build on this GPU with this TensorRT.
        on_stage: Told what is being done.

    Raises:
        BadInputError: The model is not parsed, or there is no such DLA core.
        CheckFailedError: The engine is not built.
    """
    dialect = _dialect(trt, request)
    log = error_log(trt)
    builder = trt.Builder(log)
    on_stage("parse")
    network = builder.create_network(_bits(trt.NetworkDefinitionCreationFlag, dialect))
    parser = trt.OnnxParser(network, log)
    if not parser.parse(model):
        raise BadInputError(
            f"the model must be parsed by TensorRT {trt.__version__}",
            found="; ".join(_error_text(parser.get_error(i)) for i in range(parser.num_errors)),
            remedy="export the bundle for this device's JetPack: `edgereg export --target`",
        )
    wanted = wanted_types(trt, network)
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # for `inspect_plan`
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_bytes)
    for name in dialect.precision_flags.get(request.precision, ()):
        config.set_flag(getattr(trt.BuilderFlag, name))
    if not request.allows_tf32:
        config.clear_flag(trt.BuilderFlag.TF32)  # set by default, and not the fp32 asked for
    if dialect.constrains_layers and request.precision == "fp16":
        constrain(trt, network, wanted)
    gpu_layers = () if request.dla is None else _use_dla(trt, builder, network, config, request.dla)
    if request.compute_capability is not None:
        _build_for(trt, config, request.compute_capability)
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    if any(-1 in tuple(tensor.shape) for tensor in inputs):
        profile = builder.create_optimization_profile()
        for tensor in inputs:
            sizes = ((n, *tuple(tensor.shape)[1:]) for n in request.profile)
            profile.set_shape(tensor.name, *sizes)
        config.add_optimization_profile(profile)
    if dialect.keeps_timings:
        # One that is refused is begun anew; False: so is one of another GPU.
        cache = config.create_timing_cache(timing_cache) or config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    if hasattr(trt, "IProgressMonitor") and hasattr(config, "progress_monitor"):
        monitor = _monitor(trt, on_stage)
        config.progress_monitor = monitor
    on_stage("build")
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise CheckFailedError(
            f"TensorRT {trt.__version__} builds an engine",
            found="; ".join(log.errors) or "none, and no message",
            remedy="free memory or set --workspace; then report it together with the ONNX file",
        )
    timings = b""
    if dialect.keeps_timings:
        cache = config.get_timing_cache()
        timings = bytes(cache.serialize())
    return BuiltPlan(bytes(plan), timings, wanted, gpu_layers)


def inspect_plan(trt: Any, plan: bytes, request: BuildRequest) -> str:
    """Load an engine, and return its layer information as JSON.

    Raises:
        CheckFailedError: It cannot be loaded.
    """
    log = error_log(trt)
    runtime = trt.Runtime(log)
    if request.dla is not None:
        runtime.DLA_core = request.dla
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise CheckFailedError(
            "an engine loads where it was built",
            found="; ".join(log.errors) or "it does not, and no message",
            remedy="free memory and build it again",
        )
    context = engine.create_execution_context()
    for i in range(engine.num_io_tensors):
        name = engine.get_tensor_name(i)
        if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT:
            # Formats are told only for shapes that are known.
            shape = tuple(engine.get_tensor_shape(name))
            context.set_input_shape(name, (request.profile[1], *shape[1:]))
    inspector = engine.create_engine_inspector()
    inspector.execution_context = context
    return str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def _dialect(trt: Any, request: BuildRequest) -> Dialect:
    if request.dla is not None and request.precision == "fp32":
        raise BadInputError(
            "a DLA computes fp16 or int8", found="fp32", remedy="build another precision for it"
        )
    if request.dla is not None and request.profile[2] > 1:
        raise BadInputError(
            "a DLA takes one size of batch",
            found=f"a profile of {request.profile[0]} to {request.profile[2]}",
            remedy="export without --max-batch",
        )
    return dialect_of(trt, on_dla=request.dla is not None)


def _bits(flags: Any, dialect: Dialect) -> int:
    # A flag's number is its bit, and another one in each version.
    return sum(1 << int(getattr(flags, name)) for name in dialect.network_flags)


def _error_text(error: Any) -> str:
    if hasattr(error, "node_name") and hasattr(error, "node_operator"):  # from 10
        return f"node '{error.node_name()}' ({error.node_operator()}): {error.desc()}"
    return f"node {error.node()}: {error.desc()}"


def _use_dla(trt: Any, builder: Any, network: Any, config: Any, core: int) -> tuple[str, ...]:
    """Put what is possible on a DLA core; return the names of the layers that stay on the GPU."""
    if builder.num_DLA_cores <= core:
        raise BadInputError(
            "the DLA core must be one of this machine",
            found=f"core {core}; it has {builder.num_DLA_cores}",
            remedy="leave --dla out",
        )
    config.default_device_type = trt.DeviceType.DLA
    config.DLA_core = core
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    return tuple(layer.name for layer in layers if not config.can_run_on_DLA(layer))


def _build_for(trt: Any, config: Any, compute_capability: str) -> None:
    """Build for a GPU that is not here."""
    if (
        hasattr(trt, "ComputeCapability")
        and hasattr(config, "num_compute_capabilities")
        and hasattr(config, "set_compute_capability")
    ):
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, compute_capability), 0)
    else:
        raise BadInputError(
            "TensorRT builds for the GPU that it finds; only TensorRT-RTX for another one",
            found=f"{trt.__name__} {trt.__version__}, and {compute_capability} asked for",
            remedy="build on the device",
        )


def _monitor(trt: Any, on_stage: OnStage) -> Any:
    """Return what TensorRT tells its progress to."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # known at run time only
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str | None, num_steps: int) -> None:
            self.steps[phase] = num_steps

        def step_complete(self, phase: str, step: int) -> bool:
            on_stage(f"build: {phase}, {step + 1} of {self.steps[phase]}")
            return True  # go on

        def phase_finish(self, phase: str) -> None:
            self.steps.pop(phase, None)

    return Monitor()
