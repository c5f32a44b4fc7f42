"""Put a bundle into service: only what passed here, all at once, and with a way back.

A release is made in a staging folder and judged there: its bytes, its engines, its answers, its
time. Then it gets its name, and `current` leads to it.
"""

import contextlib
import os
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.bundle.manifest import DIGEST_NAME, MANIFEST_NAME
from deploy.bundle.read import Bundle, open_bundle
from deploy.errors import BadInputError, CheckFailedError
from deploy.measure.bench import END_TO_END, bench
from deploy.measure.engines import build_engines
from deploy.measure.statistics import minimum_samples
from deploy.measure.verify import verify
from deploy.runtime.engine_build import Limits
from deploy.runtime.engine_cache import EngineCache
from deploy.runtime.runner import Backend, Runner, open_runner
from deploy.runtime.trt_builder import BuildRequest
from deploy.service.releases import Installation, Releases, opened

__all__ = ["Gates", "install", "roll_back"]

_CACHE = "EDGEREG_CACHE"


@dataclass(frozen=True)
class Gates:
    """What a release has to pass beside parity.

    Attributes:
        max_p99_ms: Of an image, end to end; None: its time is not judged.
        timed_s: How long images are timed.
        check: A command that is run once `current` is changed, such as one that restarts the
            service and asks whether it is ready; if it fails, the old release comes back.
    """

    max_p99_ms: float | None = None
    timed_s: float = 20.0
    check: tuple[str, ...] = ()


def install(
    source: Path,
    folder: Path,
    *,
    backend: Backend,
    precision: str | None = None,
    threads: int | None = None,
    gates: Gates = Gates(),
    on_stage: Callable[[str], None] = lambda stage: None,
) -> Installation:
    """Copy a bundle, judge it, and put it into service.

    Args:
        source: The bundle.
        folder: Where `current` is; made if it is missing.
        backend: What will run it.
        precision: Which variant; None is `open_runner`'s choice.
        threads: CPU threads.
        gates: What it has to pass.
        on_stage: Told what is being done.

    Raises:
        BadInputError: It is no bundle, cannot be run here, or another installation goes on.
        CheckFailedError: It failed, and what was in service still is.
    """
    original = open_bundle(source)
    with opened(folder) as releases:
        old = releases.current()
        releases.remove_others(old)
        with releases.staging() as staging:
            on_stage("copying, and checking every byte")
            bundle = _copy(original, staging / "bundle")
            (staging / "engines").mkdir(mode=0o700)
            with _engines_in(staging / "engines"):
                if backend == "tensorrt":
                    _build(bundle, precision, on_stage)
                runner = open_runner(bundle, backend=backend, precision=precision, threads=threads)
                try:
                    found = _judge(bundle, runner, gates, on_stage)
                finally:
                    runner.close()
            name = releases.free_name(original)
            made = Installation(release=name, previous=old, **found)
            on_stage("changing over")
            releases.add(staging, made)
        _change_over(releases, name, old=old, check=gates.check)
        releases.remove_others(name)
    return made


def roll_back(folder: Path, *, check: Sequence[str] = ()) -> Installation:
    """Put the release into service that the current one replaced, once its bytes are checked.

    Args:
        folder: Where `current` is.
        check: As in `Gates`.

    Raises:
        BadInputError: There is no such release.
        CheckFailedError: It is not what it was, or the check failed; nothing has changed then.
    """
    with opened(folder) as releases:
        now = releases.current()
        previous = None if now is None else releases.record(now).previous
        if previous is None or not releases.path(previous).is_dir():
            raise BadInputError(
                "the way back leads to the release that the current one replaced",
                found="there is none" if now else f"no installation in '{folder}'",
                remedy="install another bundle",
            )
        open_bundle(releases.path(previous) / "bundle")
        _change_over(releases, previous, old=now, check=check)
        return releases.record(previous)


def _judge(
    bundle: Bundle, runner: Runner, gates: Gates, on_stage: Callable[[str], None]
) -> dict[str, Any]:
    """Compare and time a release; return what is to be kept of it.

    Raises:
        CheckFailedError: It does not pass.
    """
    on_stage("comparing with the reference")
    report = verify(bundle, runner, with_holdout=True)
    if not report.passed:
        failed = [
            f"{stage.name}: {'; '.join(stage.comparison.reasons)}"
            for stage in report.stages
            if not stage.comparison.passed
        ]
        if report.holdout is not None and not report.holdout.passed:
            failed.append(f"hold-out: {report.holdout}")
        raise _failed("; ".join(failed), "run `edgereg verify` on it")
    p99 = None if gates.max_p99_ms is None else _p99(bundle, runner, gates, on_stage)
    return {
        "bundle": bundle.manifest.name,
        "manifest_sha256": bundle.manifest_sha256,
        "backend": runner.name,
        "precision": runner.precision,
        "p99_ms": p99,
        "not_checked": report.not_checked,
    }


def _p99(bundle: Bundle, runner: Runner, gates: Gates, on_stage: Callable[[str], None]) -> float:
    on_stage(f"timing it for {gates.timed_s:g} s")
    timed = bench(bundle, runner, duration_s=gates.timed_s)
    p99 = timed.summaries_ms()[END_TO_END].percentiles["p99"]
    limit = gates.max_p99_ms
    assert limit is not None
    if not timed.check.passed:
        raise _failed(f"timed outputs: {'; '.join(timed.check.reasons)}", "run `edgereg bench`")
    if timed.validity.reasons:
        raise _failed(f"the timing is invalid: {'; '.join(timed.validity.reasons)}", "cool it")
    if p99 is None:
        raise _failed(
            f"{timed.count} images in {gates.timed_s:g} s; a p99 needs {minimum_samples(99)}",
            "give it more time",
        )
    if p99 > limit:
        raise _failed(f"p99 {p99:.3f} ms > {limit:g} ms", "raise the limit or use a faster variant")
    return p99


def _build(bundle: Bundle, precision: str | None, on_stage: Callable[[str], None]) -> None:
    most = bundle.manifest.max_batch
    wanted = sorted(bundle.manifest.variants) if precision is None else [precision]
    report = build_engines(
        bundle,
        EngineCache(),
        [BuildRequest(name, (1, 1, most)) for name in wanted],
        limits=Limits(),
        on_stage=on_stage,
    )
    if report.failures:
        found = "; ".join(f"{name}: {error.found}" for name, error in report.failures.items())
        raise _failed(found, "run `edgereg build` on it, or name a --precision")


def _change_over(releases: Releases, name: str, *, old: str | None, check: Sequence[str]) -> None:
    """Point `current` at a release; back again if the check fails.

    Raises:
        CheckFailedError: It did.
    """
    releases.point_at(name)
    problem = _problem(check)
    if problem is None:
        return
    releases.point_at(old)
    if old is None:
        after = "there was nothing before it: nothing is in service"
    else:
        again = _problem(check)
        after = "the old release is back" + (f", and fails too: {again}" if again else "")
    raise CheckFailedError(
        f"after the change the check '{shlex.join(check)}' succeeds",
        found=f"{problem}; {after}",
        remedy="look into the service's journal",
    )


def _problem(check: Sequence[str]) -> str | None:
    if not check:
        return None
    try:
        done = subprocess.run(check, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    except OSError as error:
        return str(error)
    if done.returncode == 0:
        return None
    said = done.stderr.strip().splitlines() or done.stdout.strip().splitlines()
    return f"exit code {done.returncode}" + (f": {said[-1]}" if said else "")


def _copy(original: Bundle, destination: Path) -> Bundle:
    """Copy the files that the manifest lists, and no others; each is hashed on the way."""
    needed = sum(entry.size for entry in original.manifest.files)
    free = shutil.disk_usage(destination.parent).free
    if free < 2 * needed:
        raise BadInputError(
            "an installation needs twice the bundle's size on the disk",
            found=f"{free >> 20} MiB free, {2 * needed >> 20} needed",
            remedy="make room",
        )
    destination.mkdir()
    for entry in original.manifest.files:
        path = destination / entry.path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(original.read(entry.path))
    for name in (MANIFEST_NAME, DIGEST_NAME):
        shutil.copyfile(original.path / name, destination / name)
    return open_bundle(destination)


@contextlib.contextmanager
def _engines_in(folder: Path) -> Iterator[None]:
    """Keep engines, and the verdicts of first loads, in the release."""
    before = os.environ.get(_CACHE)
    os.environ[_CACHE] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ[_CACHE]
        else:
            os.environ[_CACHE] = before


def _failed(found: str, remedy: str) -> CheckFailedError:
    return CheckFailedError(
        "a bundle is put into service if it passes where it is to run",
        found=f"{found}; what was in service still is",
        remedy=remedy,
    )
