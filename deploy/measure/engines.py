"""Build engines, check that they are what was asked for, and time them against each other."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from deploy.bundle.read import Bundle
from deploy.errors import CheckFailedError
from deploy.measure.statistics import median_interval
from deploy.measure.verify import VerifyReport, verify
from deploy.runtime.engine_build import BuildOutcome, Limits, build_engine
from deploy.runtime.engine_cache import Engine, EngineCache, Unusable
from deploy.runtime.engines import engine_key, engine_runner
from deploy.runtime.runner import Runner
from deploy.runtime.trt_builder import BuildRequest

__all__ = ["BuiltEngine", "Speed", "build", "compare_speed", "fastest"]

_ROUNDS = 41  # at least 20 alternations are wanted; 99 % of the median needs 8
_ROUND_S = 0.005


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


def build(
    bundle: Bundle,
    cache: EngineCache,
    request: BuildRequest,
    *,
    limits: Limits,
    force: bool = False,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> BuiltEngine:
    """Build and verify an engine, and keep it, unless one that fits is there; within the lock.

    An engine that is not of its precision, or answers otherwise than the bundle's reference, is
    not kept: an older one stays.

    Args:
        bundle: The opened bundle.
        cache: Where engines are kept.
        request: What to build.
        limits: Of memory and time.
        force: Whether to build in any case.
        on_stage: Told what is being done.

    Raises:
        BadInputError: There is no TensorRT or GPU, or the model is not parsed.
        CheckFailedError: There is no engine, or it fails a check.
    """
    wanted = engine_key(bundle, request)
    found = cache.find(bundle.manifest.name, wanted)
    if isinstance(found, Engine) and not force:
        runner = engine_runner(bundle, found.plan, wanted)
        report = _verified(verify(bundle, runner))
        runner.close()
        return BuiltEngine(found, (), None, report)
    reasons = found.reasons if isinstance(found, Unusable) else ("it was asked for",)
    file = bundle.manifest.variants[request.precision].file
    with cache.work_folder() as folder:
        outcome = build_engine(
            bundle.read(file),
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
    runner = engine_runner(bundle, outcome.plan, wanted)
    report = _verified(verify(bundle, runner))
    runner.close()
    if outcome.timing_cache:
        cache.store_timing(wanted, outcome.timing_cache)
    engine = cache.store(
        bundle.manifest.name,
        wanted,
        outcome.plan,
        layers=types.layers,
        build_s=sum(outcome.stages_s.values()),
    )
    return BuiltEngine(engine, reasons, outcome, report)


@dataclass(frozen=True)
class Speed:
    """The time of a variant over that of fp32, in turns.

    Attributes:
        ratio: Median of the rounds' ratios; above 1 is slower.
        low: Lower end of its 99 % interval.
        high: Upper end.
        rounds: How many.
        fp32_ms: Median time of an inference, copies included.
        ms: The variant's.
    """

    ratio: float
    low: float
    high: float
    rounds: int
    fp32_ms: float
    ms: float

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)


def compare_speed(
    fp32: Runner, variant: Runner, batch: NDArray[Any], *, rounds: int = _ROUNDS
) -> Speed:
    """Time two runners in turns: what disturbs a round disturbs both.

    Args:
        fp32: The yardstick.
        variant: What is judged.
        batch: What both are given.
        rounds: At least 8, each of some 5 ms for each runner.
    """
    outs = [runner(batch) for runner in (fp32, variant)]
    count = max(1, int(_ROUND_S / _time(fp32, batch, outs[0], 1)))
    ones, others = [], []
    for _ in range(rounds):
        ones.append(_time(fp32, batch, outs[0], count))
        others.append(_time(variant, batch, outs[1], count))
    ratios = [other / one for one, other in zip(ones, others, strict=True)]
    low, high = median_interval(ratios) or (0.0, float("inf"))
    return Speed(
        ratio=statistics.median(ratios),
        low=low,
        high=high,
        rounds=rounds,
        fp32_ms=1e3 * statistics.median(ones),
        ms=1e3 * statistics.median(others),
    )


def fastest(speeds: Mapping[str, Speed]) -> str:
    """Return the precision to run where none is asked for: fp32, unless one is surely faster."""
    faster = {name: speed.ratio for name, speed in speeds.items() if speed.high < 1}
    return min(faster, key=faster.__getitem__) if faster else "fp32"


def _time(runner: Runner, batch: NDArray[Any], out: NDArray[Any], count: int) -> float:
    """Return the seconds of one of `count` inferences."""
    start = time.perf_counter()
    for _ in range(count):
        runner(batch, out=out)
    return (time.perf_counter() - start) / count


def _verified(report: VerifyReport) -> VerifyReport:
    if not report.passed:
        failed = [stage for stage in report.stages if not stage.comparison.passed]
        raise CheckFailedError(
            f"an engine in {report.precision} answers as the bundle's reference",
            found="; ".join(f"{s.name}: {'; '.join(s.comparison.reasons)}" for s in failed),
            remedy="build it again, for builds differ; or another precision",
        )
    return report
