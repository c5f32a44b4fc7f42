"""Kill what a device writes: installations, engines, and builds of them."""

import dataclasses
import json
from collections import Counter
from pathlib import Path

import numpy as np
from killing import Write, kill_writers, leftovers

from deploy.bundle.read import open_bundle
from deploy.bundle.write import write_bundle
from deploy.errors import DeployError
from deploy.runtime import engine_build, runner
from deploy.runtime.engine_build import Limits, build_engine
from deploy.runtime.engine_cache import Engine, EngineCache
from deploy.runtime.engine_key import EngineKey
from deploy.runtime.trt_builder import BuildRequest
from deploy.service.install import install

__all__ = ["another_bundle", "kill_builds", "kill_installs", "kill_stores", "service_state"]

_BUILDER = "tensorrt_rtx"  # builds without a GPU; its child and its files are as with TensorRT
_PROXY = "SM86"
_PLAN_BYTES = 4 << 20


def another_bundle(path: Path, like: Path) -> Path:
    """Write a bundle that answers like another and has another hash."""
    bundle = open_bundle(like)
    contents = {entry.path: bundle.read(entry.path) for entry in bundle.manifest.files}
    provenance = {**bundle.manifest.provenance, "copy": 1}
    manifest = dataclasses.replace(bundle.manifest, files=(), provenance=provenance)
    write_bundle(path, manifest, contents)
    return path


def kill_installs(
    folder: Path, bundles: tuple[Path, Path], count: int, *, seed: int
) -> Counter[str]:
    """Kill installations, each of the bundle that is not in service.

    The child of a first load is left out: it takes a second, and its verdict has a line of its own.
    """
    known = {open_bundle(bundle).manifest_sha256: bundle for bundle in bundles}

    def write() -> None:
        runner.assert_first_load = lambda *arguments: None  # in this fork
        now = _record(folder)["manifest_sha256"] if (folder / "current").exists() else ""
        other = next(bundle for digest, bundle in known.items() if digest != now)
        install(other, folder, backend="onnxruntime")

    return kill_writers(
        write,
        lambda: service_state(folder, set(known)),
        write,
        folder=folder,
        count=count,
        seed=seed,
        left_over=_left_over,
    )


def service_state(folder: Path, known: set[str]) -> str:
    """Say whether one of the known bundles is in service, whole, and the way back from it too."""
    if not (folder / "current").is_symlink():
        return "nothing in service"
    try:
        record = _record(folder)
        found = open_bundle(folder / "current" / "bundle").manifest_sha256
        if record["previous"] is not None:
            open_bundle(folder / "releases" / record["previous"] / "bundle")
    except (DeployError, OSError, ValueError, KeyError):
        return "corrupt"
    return "whole" if found == record["manifest_sha256"] and found in known else "corrupt"


def _record(folder: Path) -> dict[str, str | None]:
    document: dict[str, str | None] = json.loads((folder / "current/install.json").read_bytes())
    return document


def _left_over(folder: Path) -> int:
    """What is staged, and the releases to which nothing leads."""
    record = _record(folder)
    names = {path.name for path in (folder / "releases").iterdir()}
    return leftovers(folder) + len(names - {record["release"], record["previous"]})


def kill_stores(folder: Path, count: int, *, seed: int) -> Counter[str]:
    """Kill what keeps an engine, in the place of an older one, and the choice of it."""
    cache, plans = EngineCache(folder), np.random.default_rng(seed).bytes(8)

    def write() -> None:
        now = cache.find("net", _KEY)
        first = now.plan[0] if isinstance(now, Engine) else 0
        plan = bytes([(first + 1) % 256]) + plans * (_PLAN_BYTES // 8)
        with cache.lock():
            cache.store_timing(_KEY, plan[: _PLAN_BYTES // 4])
            engine = cache.store("net", _KEY, plan, layers={"fp32": 3}, build_s=1.0)
            cache.choose("net", "fp32", {"fp32": engine.sidecar.sha256})

    return _kill(cache, write, count, seed=seed)


def kill_builds(folder: Path, bundle: Path, count: int, *, seed: int) -> Counter[str]:
    """Kill builds by NVIDIA's own builder, in a child, and what keeps its engines.

    Raises:
        ImportError: It is not here.
    """
    __import__(_BUILDER)
    engine_build._TENSORRT = _BUILDER
    opened, cache = open_bundle(bundle), EngineCache(folder)
    model = opened.read(opened.manifest.variants["fp32"].file)
    request = BuildRequest("fp32", (1, 1, 1), compute_capability=_PROXY)
    limits = Limits(workspace_bytes=64 << 20)

    def write() -> None:
        with cache.lock():
            with cache.work_folder() as work:
                built = build_engine(
                    model, request, folder=work, limits=limits, timing_cache=cache.timing(_KEY)
                )
            cache.store_timing(_KEY, built.timing_cache)
            cache.store("net", _KEY, built.plan, layers={"fp32": 3}, build_s=1.0)

    return _kill(cache, write, count, seed=seed)


def _kill(cache: EngineCache, write: Write, count: int, *, seed: int) -> Counter[str]:
    def check() -> str:
        return "whole" if isinstance(cache.find("net", _KEY), Engine) else "corrupt"

    def start() -> None:
        with cache.lock():
            pass

    return kill_writers(write, check, start, folder=cache.folder, count=count, seed=seed)


_KEY = EngineKey("0" * 64, "10.3.0", "Orin", "8.7", "6.2", "fp32", (1, 1, 1), ())
