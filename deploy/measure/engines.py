"""Build a bundle's engines, check that they are what was asked for, and choose the fastest.

An engine that is not of its precision, or answers otherwise than the bundle's reference, is not
kept: an older one stays. fp32 is run where none is asked for, unless another is surely faster.
"""

import dataclasses
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from deploy.bundle.read import Bundle
from deploy.errors import CheckFailedError
from deploy.measure.interleaved import LEAST_ALTERNATIONS, Interleaved, compare_speed
from deploy.measure.verify import VerifyReport, verify
from deploy.runtime.engine_build import BuildOutcome, Limits, build_engine
from deploy.runtime.engine_cache import Engine, EngineCache, Unusable
from deploy.runtime.engine_key import EngineKey
from deploy.runtime.engines import engine_key, engine_runner
from deploy.runtime.trt_builder import BuildRequest

__all__ = ["BuildReport", "BuiltEngine", "build_engines", "fastest"]

OnStage = Callable[[str], None]


@dataclass(frozen=True)
class BuiltEngine:
    """What came of building one variant.

    Attributes:
        engine: The engine that is in the cache now.
        reasons: Why it was built; empty if the one in the cache still fitted.
        outcome: Of the build, if there was one.
        verified: Its outputs for the golden images, against the reference.
    """

    engine: Engine
    reasons: tuple[str, ...]
    outcome: BuildOutcome | None
    verified: VerifyReport

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, without the engine's bytes."""
        built = self.outcome
        return {
            "sidecar": dataclasses.asdict(self.engine.sidecar),
            "reasons": list(self.reasons),
            "is_new": built is not None,
            "stages_s": {} if built is None else built.stages_s,
            "workspace_bytes": None if built is None else built.workspace_bytes,
            "notes": [] if built is None or built.types is None else list(built.types.notes),
            "gpu_layers": [] if built is None else list(built.gpu_layers),
            "verified": self.verified.to_json(),
        }


@dataclass(frozen=True)
class BuildReport:
    """What came of building a bundle's variants.

    Attributes:
        bundle: Its name.
        backend: TensorRT's version and the GPU.
        engines: By precision.
        failures: By precision, of which there is no new engine.
        speeds: By precision, the time over that of fp32, in turns.
        chosen: What is run where none is asked for; None without an fp32 engine to compare with.
    """

    bundle: str
    backend: str
    engines: dict[str, BuiltEngine]
    failures: dict[str, CheckFailedError]
    speeds: dict[str, Interleaved]
    chosen: str | None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "bundle": self.bundle,
            "backend": self.backend,
            "engines": {name: built.to_json() for name, built in self.engines.items()},
            "failures": {
                name: {"rule": error.rule, "found": error.found, "remedy": error.remedy}
                for name, error in self.failures.items()
            },
            "speeds": {name: speed.to_json() for name, speed in self.speeds.items()},
            "chosen": self.chosen,
        }


def build_engines(
    bundle: Bundle,
    cache: EngineCache,
    requests: Sequence[BuildRequest],
    *,
    limits: Limits,
    force: bool = False,
    alternations: int = LEAST_ALTERNATIONS,
    on_stage: OnStage = lambda stage: None,
) -> BuildReport:
    """Build and verify engines, keep those that pass, time them, and choose one.

    Args:
        bundle: The opened bundle.
        cache: Where engines are kept.
        requests: One for each precision, at least one, otherwise alike.
        limits: Of memory and time, for each build.
        force: Whether to build what the cache has.
        alternations: Of the timing, at least 20.
        on_stage: Told what is being done.

    Raises:
        BadInputError: There is no TensorRT or GPU, a model is not parsed, or another build runs.
    """
    engines: dict[str, BuiltEngine] = {}
    failures: dict[str, CheckFailedError] = {}
    with cache.lock():
        for request in requests:
            name = request.precision

            def on_own_stage(stage: str, name: str = name) -> None:
                on_stage(f"{name}: {stage}")

            try:
                engines[name] = _build(bundle, cache, request, limits, force, on_own_stage)
            except CheckFailedError as error:
                failures[name] = error
        fitting = _fitting(bundle, cache, requests[0], engines, failures)
        speeds = _compare(bundle, fitting, alternations, on_stage)
        chosen = fastest(speeds) if "fp32" in fitting else None
        if chosen is not None:
            hashes = {name: engine.sidecar.sha256 for name, engine in fitting.items()}
            cache.choose(bundle.manifest.name, chosen, hashes)
    backends = [built.verified.backend for built in engines.values()]
    return BuildReport(
        bundle.path.name, backends[0] if backends else "", engines, failures, speeds, chosen
    )


def fastest(speeds: dict[str, Interleaved]) -> str:
    """Return the precision to run where none is asked for: fp32, unless one is surely faster."""
    faster = {
        name: speed.ratios["infer"].median
        for name, speed in speeds.items()
        if not speed.failures and speed.ratios["infer"].interval[1] < 1
    }
    return min(faster, key=faster.__getitem__) if faster else "fp32"


def _build(
    bundle: Bundle,
    cache: EngineCache,
    request: BuildRequest,
    limits: Limits,
    force: bool,
    on_stage: OnStage,
) -> BuiltEngine:
    wanted = engine_key(bundle, request)
    found = cache.find(bundle.manifest.name, wanted)
    if isinstance(found, Engine) and not force:
        on_stage("verify")
        return BuiltEngine(found, (), None, _verified(bundle, found.plan, wanted))
    reasons = found.reasons if isinstance(found, Unusable) else ("it was asked for",)
    with cache.work_folder() as folder:
        outcome = build_engine(
            bundle.read(bundle.manifest.variants[request.precision].file),
            request,
            folder=folder,
            limits=limits,
            timing_cache=cache.timing(wanted),
            on_stage=on_stage,
        )
    types = outcome.types
    if types is None or types.problems:
        raise CheckFailedError(
            f"an engine that is asked for in {request.precision} computes in it",
            found="; ".join(types.problems[:5]) if types else "its layers are not known",
            remedy="build another precision, and report it with TensorRT's version",
        )
    on_stage("verify")
    verified = _verified(bundle, outcome.plan, wanted)
    if outcome.timing_cache:
        cache.store_timing(wanted, outcome.timing_cache)
    engine = cache.store(
        bundle.manifest.name,
        wanted,
        outcome.plan,
        layers=types.layers,
        build_s=sum(outcome.stages_s.values()),
    )
    return BuiltEngine(engine, reasons, outcome, verified)


def _verified(bundle: Bundle, plan: bytes, key: EngineKey) -> VerifyReport:
    runner = engine_runner(bundle, plan, key)
    try:
        report = verify(bundle, runner)
    finally:
        runner.close()
    if not report.passed:
        failed = [stage for stage in report.stages if not stage.comparison.passed]
        raise CheckFailedError(
            f"an engine in {report.precision} answers as the bundle's reference",
            found="; ".join(f"{s.name}: {'; '.join(s.comparison.reasons)}" for s in failed),
            remedy="build it again, for builds differ; or another precision",
        )
    return report


def _fitting(
    bundle: Bundle,
    cache: EngineCache,
    request: BuildRequest,
    engines: dict[str, BuiltEngine],
    failures: Collection[str],
) -> dict[str, Engine]:
    """Return the engines to compare: those at hand, and what fits of the others in the cache."""
    fitting = {name: built.engine for name, built in engines.items()}
    for name in bundle.manifest.variants.keys() - fitting.keys() - set(failures):
        dla = None if name == "fp32" else request.dla
        other = dataclasses.replace(request, precision=name, dla=dla)
        found = cache.find(bundle.manifest.name, engine_key(bundle, other))
        fitting |= {name: found} if isinstance(found, Engine) else {}
    return fitting


def _compare(
    bundle: Bundle, engines: dict[str, Engine], alternations: int, on_stage: OnStage
) -> dict[str, Interleaved]:
    """Return how long each engine takes, over fp32's."""
    speeds = {}
    for name, engine in engines.items():
        if name == "fp32" or "fp32" not in engines:
            continue
        runners = [
            engine_runner(bundle, one.plan, one.sidecar.key) for one in (engine, engines["fp32"])
        ]
        try:
            speeds[name] = compare_speed(
                (bundle, runners[0]),
                (bundle, runners[1]),
                alternations=alternations,
                on_progress=lambda stage, name=name: on_stage(f"{name} and fp32: {stage}"),  # type: ignore[misc]
            )
        finally:
            for runner in runners:
                runner.close()
    return speeds
