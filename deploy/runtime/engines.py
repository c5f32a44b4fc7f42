"""From a bundle to its engine on this machine; none is built on the way."""

import hashlib

from deploy.bundle.read import Bundle
from deploy.errors import BadInputError, CheckFailedError
from deploy.runtime.cudart import open_cuda
from deploy.runtime.engine_cache import Engine, EngineCache
from deploy.runtime.engine_key import EngineKey, jetpack_release
from deploy.runtime.trt_builder import BuildRequest, engine_flags
from deploy.runtime.trt_runner import TrtRunner
from deploy.runtime.trt_versions import load_tensorrt

__all__ = ["chosen_precision", "engine_key", "engine_runner", "open_engine"]

_ON_DLA = "DLA core "


def engine_key(bundle: Bundle, request: BuildRequest) -> EngineKey:
    """Return all that an engine of a variant would depend on, here and now."""
    cuda, trt = open_cuda(), load_tensorrt()
    model = bundle.read(bundle.manifest.variants[request.precision].file)
    return EngineKey(
        onnx_sha256=hashlib.sha256(model).hexdigest(),
        tensorrt=trt.__version__,
        gpu=cuda.gpu,
        sm=cuda.sm,
        jetpack=jetpack_release(),
        precision=request.precision,
        profile=request.profile,
        flags=engine_flags(trt, request),
    )


def open_engine(bundle: Bundle, precision: str, threads: int | None) -> TrtRunner:
    """Open the engine of a variant that `edgereg build` has made here.

    Raises:
        BadInputError: There is none that was built for this model, this machine and this TensorRT;
            or CPU threads were asked for.
        CheckFailedError: It is not the one that was built here.
    """
    if threads is not None:
        raise BadInputError(
            "the backend tensorrt computes on the GPU",
            found=f"{threads} CPU threads asked for",
            remedy="leave --threads out",
        )
    wanted = engine_key(bundle, BuildRequest(precision))
    found = EngineCache().find(bundle.manifest.name, wanted, anyhow=True)
    if isinstance(found, Engine):
        return engine_runner(bundle, found.plan, found.sidecar.key)
    kind = CheckFailedError if found.is_tampered else BadInputError
    raise kind(
        f"the engine of bundle '{bundle.path.name}' in {precision} was built here and for this",
        found="; ".join(found.reasons),
        remedy=f"edgereg build {bundle.path.name} --precision {precision}",
    )


def chosen_precision(bundle: Bundle) -> str:
    """Return the precision that `edgereg build` found to be the fastest here.

    Raises:
        BadInputError: There is no GPU, the engines were not compared, or one was built again since.
        CheckFailedError: What it wrote is not what it was.
    """
    open_cuda()  # where there is no GPU, this is what is to be said
    choice = EngineCache().choice(bundle.manifest.name)
    if isinstance(choice, str):
        return choice
    kind = CheckFailedError if choice.is_tampered else BadInputError
    raise kind(
        f"the engines of bundle '{bundle.path.name}' were timed here",
        found="; ".join(choice.reasons),
        remedy=f"edgereg build {bundle.path.name}, or name one with --precision",
    )


def engine_runner(bundle: Bundle, plan: bytes, key: EngineKey) -> TrtRunner:
    """Load a checked engine, as its key says that it was built."""
    cores = [int(flag[len(_ON_DLA) :]) for flag in key.flags if flag.startswith(_ON_DLA)]
    return TrtRunner(
        plan,
        (bundle.manifest.inputs[0], bundle.manifest.outputs[0]),
        max_batch=key.profile[2],
        precision=key.precision,
        dla=cores[0] if cores else None,
    )
