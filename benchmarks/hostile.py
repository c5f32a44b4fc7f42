"""What becomes of bundles that were damaged, and of those that were made to do harm.

    nice -n 15 python benchmarks/hostile.py --bundles 10000 --models 10000 --out hostile.json
    python benchmarks/hostile.py --quick

Bundles: bytes of any file, files added, dropped, swapped; manifests that are changed by meaning and
hashed again; images; sidecars of engines and verdicts of first loads. None may bring the
interpreter down, and of those that were not hashed again none may be accepted.

Models: ONNX files that are changed by bytes or by meaning, in bundles that are whole and hashed
right. At worst the child of a first load fails. Each is opened here; what passes is loaded and run
by the child's own function, in a fork of a process that has imported ONNX Runtime (a hundred times
faster than a new process each; the first ones go the whole way). Some of those that our checks
refuse are loaded anyway, to see what that prevents.
"""

import argparse
import dataclasses
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from mutants import mutate_bytes, mutate_json, mutate_onnx
from setting import describe_setting

from deploy.bundle import read
from deploy.bundle.read import Bundle, open_bundle
from deploy.bundle.write import digest_line, write_bundle
from deploy.errors import CheckFailedError, DeployError
from deploy.runtime import first_load
from deploy.runtime.decode import decode
from deploy.runtime.engine_cache import Engine, EngineCache
from deploy.runtime.engine_key import EngineKey

__all__ = ["Loader", "hostile_models", "mutated_bundles", "mutated_caches", "mutated_images"]

_CAP_BYTES = 2 << 30
_TIME_S = 20.0  # for each child here; 120 s on a device
_CONTROL_EVERY = 10
_HERE = Path(__file__)


def mutated_bundles(bases: list[Path], count: int, *, seed: int) -> Counter[str]:
    """Damage one thing of a bundle at a time, open it, and put it right again.

    Returns:
        How many were refused and accepted, by kind; any other end is an error that is raised.
    """
    rng = np.random.default_rng(seed)
    tally: Counter[str] = Counter()
    for i in range(count):
        base = bases[i % len(bases)]
        files = sorted(path for path in base.rglob("*") if path.is_file())
        manifest, digest = base / "manifest.json", base / "manifest.json.sha256"
        victim = files[int(rng.integers(0, len(files)))]
        saved = {path: path.read_bytes() for path in (victim, manifest, digest)}
        kind = ("bytes", "bytes", "bytes", "files", "manifest hashed again")[
            int(rng.integers(0, 5))
        ]
        extra = base / f"{int(rng.integers(0, 1000))}.extra"
        if kind == "bytes":
            victim.write_bytes(mutate_bytes(saved[victim], rng))
        elif kind == "files":
            _disturb_files(victim, extra, rng)
        else:
            changed = mutate_json(saved[manifest], rng)
            manifest.write_bytes(changed)
            digest.write_bytes(digest_line(changed))
        tally[f"{kind}: {_opened(base)}"] += 1
        extra.unlink(missing_ok=True)
        for path, data in saved.items():
            path.unlink(missing_ok=True)
            path.write_bytes(data)
    for base in bases:
        open_bundle(base)  # or the refusals were due to something else
    return tally


def _disturb_files(victim: Path, extra: Path, rng: np.random.Generator) -> None:
    kind = int(rng.integers(0, 4))
    if kind == 0:
        extra.write_bytes(b"x")
    elif kind == 1:
        victim.unlink()
    elif kind == 2:
        victim.rename(extra)
    else:
        victim.unlink()
        victim.symlink_to("/etc/hostname")


def _opened(path: Path) -> str:
    try:
        open_bundle(path)
    except DeployError:
        return "refused"
    return "accepted"


def mutated_images(images: list[bytes], count: int, *, seed: int) -> Counter[str]:
    """Decode damaged images: pixels or an error of ours, nothing else."""
    rng = np.random.default_rng(seed)
    tally: Counter[str] = Counter()
    for i in range(count):
        try:
            decode(mutate_bytes(images[i % len(images)], rng), name="image")
            tally["images: decoded"] += 1
        except DeployError:
            tally["images: refused"] += 1
    return tally


def mutated_caches(folder: Path, count: int, *, seed: int) -> Counter[str]:
    """Damage an engine, its sidecar or a verdict; what is used must be what was written."""
    rng = np.random.default_rng(seed)
    tally: Counter[str] = Counter()
    cache, key = EngineCache(folder / "engines"), _engine_key()
    with cache.lock():
        stored = cache.store("net", key, b"a plan of TensorRT" * 9, layers={"fp16": 3}, build_s=1.0)
    verdict = first_load.FirstLoad(first_load.FORMAT_VERSION, "0" * 64, "fp32", "onnxruntime 1")
    path = folder / "verdict.json"
    path.write_bytes(first_load.strict_json.dump(verdict))
    files = [cache.folder / "net.fp16.json", cache.folder / stored.sidecar.plan, path]
    for i in range(count):
        victim = files[i % 3]
        saved = victim.read_bytes()
        change = mutate_json if i % 2 and victim.suffix == ".json" else mutate_bytes
        mutant = change(saved, rng)
        victim.write_bytes(mutant)
        if victim == path:
            is_used = first_load._read(path) == verdict
            is_same = json.dumps(_parsed(mutant)) == json.dumps(json.loads(saved))
        else:
            found = cache.find("net", key)
            is_used = isinstance(found, Engine)
            is_same = is_used and found == stored  # a blank more or less changes nothing
        word = "of the same meaning" if is_used and is_same else "used" if is_used else "refused"
        tally[f"caches: {word}"] += 1
        victim.write_bytes(saved)
    return tally


def _parsed(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        return None


def _engine_key() -> EngineKey:
    return EngineKey("0" * 64, "10.3.0", "Orin", "8.7", "6.2", "fp16", (1, 1, 8), ())


class Loader:
    """A process that has imported ONNX Runtime, and forks for each model that is to be loaded."""

    def __init__(self) -> None:
        command = [sys.executable, str(_HERE), "--loader"]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        root = str(_HERE.parent.parent)
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([root, str(_HERE.parent)])}
        self._process = subprocess.Popen(
            command, **pipes, stderr=subprocess.DEVNULL, text=True, env=environment
        )

    def load(self, bundle: Path, precision: str, *, is_checked: bool = True) -> str:
        """Load and run a variant in a child; say how it ended, in a word or two."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps([str(bundle), precision, is_checked]) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the process that forks has died")
        return str(json.loads(line))

    def close(self) -> None:
        """End it."""
        self._process.communicate()


def _serve() -> None:
    """The loader's side: fork, load, tell."""
    first_load.runtime_name()
    for line in sys.stdin:
        path, precision, is_checked = json.loads(line)
        told, tell = os.pipe()
        child = os.fork()
        if child == 0:
            _load_and_tell(path, precision, is_checked=is_checked, tell=tell)
        os.close(tell)
        ready, _, _ = select.select([told], [], [], _TIME_S)
        if not ready:
            os.kill(child, signal.SIGKILL)
        text = os.read(told, 1 << 16).decode() if ready else ""
        os.close(told)
        _, status = os.waitpid(child, 0)
        if not ready:
            answer = "no answer in time"
        elif os.WIFSIGNALED(status):
            answer = f"killed by signal {os.WTERMSIG(status)}"
        else:
            answer = text or "ended without an answer"
        print(json.dumps(answer), flush=True)


def _load_and_tell(path: str, precision: str, *, is_checked: bool, tell: int) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # which is the way to the parent
    if not is_checked:
        read.check_structure = lambda model, file: None
    try:
        digest = first_load.open_bundle(Path(path)).manifest_sha256
        loaded = first_load.load_once(path, precision, digest, _CAP_BYTES)
        answer = "loaded" if loaded == "loaded" else "refused by ONNX Runtime"
    except BaseException as error:
        answer = f"an error in the child: {type(error).__name__}"
    os.write(tell, answer.encode())
    os._exit(0)


def hostile_models(
    bases: list[Path], count: int, *, seed: int, folder: Path, whole_way: int = 20
) -> dict[str, Counter[str]]:
    """Put a mutant of each base's models into a bundle that is hashed right, and open and load it.

    Args:
        bases: Bundles.
        count: How many mutants.
        seed: Of the mutants.
        folder: For their bundles.
        whole_way: How many go by `assert_first_load`, a new process each, too.

    Returns:
        How the bases ended, the mutants, some of them by way of `assert_first_load`, and some that
        our checks refuse and that were loaded anyway.
    """
    rng = np.random.default_rng(seed)
    legitimate, ended, whole, unchecked = (Counter[str]() for _ in range(4))
    opened = [open_bundle(base) for base in bases]
    contents = [{e.path: b.read(e.path) for e in b.manifest.files} for b in opened]
    with closing(Loader()) as loader:
        for bundle in opened:
            for precision in bundle.manifest.variants:
                legitimate[loader.load(bundle.path, precision)] += 1
        for i in range(count):
            bundle, parts = opened[i % len(opened)], contents[i % len(opened)]
            variants = sorted(bundle.manifest.variants)
            precision = variants[i // len(opened) % len(variants)]
            file = bundle.manifest.variants[precision].file
            change = (mutate_bytes, mutate_onnx)[int(rng.integers(0, 2))]
            path = _write(folder / "mutant", bundle, parts | {file: change(parts[file], rng)})
            if _opened(path) == "refused":
                ended["refused before ONNX Runtime"] += 1
                if ended["refused before ONNX Runtime"] % _CONTROL_EVERY == 0:
                    unchecked[loader.load(path, precision, is_checked=False)] += 1
                continue
            ended[loader.load(path, precision)] += 1
            if whole.total() < whole_way:
                whole[_whole_way(open_bundle(path), precision)] += 1
    return {
        "legitimate exports": legitimate,
        "hostile models": ended,
        "the same by the product's own child": whole,
        "refused ones that were loaded anyway": unchecked,
    }


def _write(path: Path, base: Bundle, contents: dict[str, bytes]) -> Path:
    shutil.rmtree(path, ignore_errors=True)
    write_bundle(path, dataclasses.replace(base.manifest, files=()), contents)
    return path


def _whole_way(bundle: Bundle, precision: str) -> str:
    limits = first_load.LoadLimits(time_s=_TIME_S)
    try:
        first_load.assert_first_load(bundle, precision, limits=limits)
    except CheckFailedError:
        return "exit code 1"
    except DeployError:
        return "exit code 2"
    return "loaded"


def main() -> int:
    """Do both, and say whether the promise held."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundles", type=int, default=10_000)
    parser.add_argument("--models", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bases", type=Path, help="keep the exports that are mutated here")
    parser.add_argument("--out", type=Path, help="the figures, as JSON")
    parser.add_argument("--quick", action="store_true", help="200 of each")
    parser.add_argument("--loader", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.loader:
        _serve()
        return 0
    if args.quick:
        args.bundles = args.models = 200
    memory = Path("/dev/shm")  # bundles are flushed to disk as they are written: thousands here
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as name:
        folder = Path(name)
        os.environ["EDGEREG_CACHE"] = str(folder / "cache")
        bases = _bases(args.bases or folder / "bases")
        figures = _run(args, bases, folder)
    for title, tally in figures.items():
        print(f"{title}: {sum(tally.values())}")
        for word, count in sorted(tally.items(), key=lambda item: -item[1]):
            print(f"  {count:6} {word}")
    if args.out is not None:
        args.out.write_text(json.dumps(describe_setting() | figures, indent=1) + "\n", "utf-8")
    return 1 if broken(figures) else 0


def _run(args: argparse.Namespace, bases: list[Path], folder: Path) -> dict[str, dict[str, int]]:
    few = args.bundles // 10
    copies = [Path(shutil.copytree(base, folder / "copies" / base.name)) for base in bases]
    images = [path.read_bytes() for base in bases for path in sorted(base.glob("golden/*.*"))[:9]]
    images = [image for image in images if not image.startswith(b"\x93NUMPY")]
    damaged = mutated_bundles(copies, args.bundles - 2 * few, seed=args.seed)
    damaged += mutated_images(images, few, seed=args.seed)
    damaged += mutated_caches(folder, few, seed=args.seed)
    models = hostile_models(bases, args.models, seed=args.seed, folder=folder)
    return {"damaged bundles": dict(damaged)} | {title: dict(t) for title, t in models.items()}


def broken(figures: dict[str, dict[str, int]]) -> list[str]:
    """Which figures break the promise."""
    damaged = {"bytes: accepted", "files: accepted", "caches: used"} & figures[
        "damaged bundles"
    ].keys()
    return [*damaged, *(word for word in figures["legitimate exports"] if word != "loaded")]


def _bases(folder: Path) -> list[Path]:
    """Exports of ours, made by a process of its own: torch has threads, and is not to be forked."""
    if not folder.is_dir():
        command = [sys.executable, str(_HERE.parent / "tiny_bundles.py"), str(folder)]
        subprocess.run(command, check=True)
    return sorted(folder.glob("*.bundle"))


if __name__ == "__main__":
    sys.exit(main())
