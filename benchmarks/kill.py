"""Writers that are killed at random moments, and disks that are full.

    nice -n 15 python benchmarks/kill.py --kills 300 --out kill.json
    python benchmarks/kill.py --quick

Exports of a tiny network are killed (SIGKILL) while they replace an earlier bundle: half of them at
any moment, half while they write. So are writes of a cached verdict; installations of a bundle;
what keeps a built engine; and, a tenth as many, whole builds by TensorRT-RTX, which is NVIDIA's
builder and needs no GPU: no engine of TensorRT proper was built here. Afterwards the result must be
one or the other, whole, at the latest after the next start; and what is left over is counted. A
naive writer, without a staging directory, is killed too: the harness must notice.

Full disks: the bundle is written to a tmpfs of ever more pages (in a mount namespace of its own,
where the kernel lets us have one), until it fits.
"""

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

from kill_device import another_bundle, kill_builds, kill_installs, kill_stores
from killing import kill_writers, leftovers
from setting import describe_setting

from deploy import strict_json
from deploy.bundle.manifest import DIGEST_NAME, MANIFEST_NAME, Manifest
from deploy.bundle.read import open_bundle
from deploy.bundle.write import write_bundle
from deploy.errors import DeployError
from deploy.publish import check_free, publish_bytes
from deploy.runtime.first_load import FORMAT_VERSION, FirstLoad, _read

__all__ = ["bundle_parts", "full_disks", "kill_naive_writer", "kill_verdicts", "lost"]

_HERE = Path(__file__)
_PAGE_KB = 4
_NO_NAMESPACE = "not run: no mount namespace to be had"
_NO_BUILDER = "not run: no TensorRT-RTX here"
_BUILDS = 10  # of so many kills one is of a whole build, which takes seconds


def bundle_state(path: Path) -> str:
    """Say whether a bundle is whole, absent or "corrupt"."""
    if not path.exists():
        return "absent"
    try:
        open_bundle(path)
    except DeployError:
        return "corrupt"
    return "whole"


def fill_disk(manifest: Manifest, contents: dict[str, bytes]) -> Counter[str]:
    """Write a bundle over another, on tmpfs of ever more pages; runs where it may mount."""
    tally: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        disk = Path(name)
        size_kb = sum(-(-len(data) // 4096) * _PAGE_KB for data in contents.values())
        for kb in range(size_kb, 3 * size_kb + 400, _PAGE_KB):
            mount = ["mount", "-t", "tmpfs", "-o", f"size={kb}k", "tmpfs", str(disk)]
            subprocess.run(mount, check=True)
            try:
                said = _fill(disk / "b", manifest, contents)
            finally:
                subprocess.run(["umount", str(disk)], check=True)
            tally[said] += 1
            if said == "written twice":
                return tally
    raise RuntimeError("the largest disk is too small")


def _fill(path: Path, manifest: Manifest, contents: dict[str, bytes]) -> str:
    done = 0
    for _ in range(2):
        try:
            write_bundle(path, manifest, contents, force=True)
            done += 1
        except OSError as error:
            if "No space left" not in str(error):
                raise
    state = bundle_state(path)
    if state != ("whole" if done else "absent") or leftovers(path.parent):
        return f"{state} after {done} writes, {leftovers(path.parent)} left over"
    return ("refused, nothing there", "refused, the earlier one whole", "written twice")[done]


def main() -> int:
    """Kill, fill, print, and say whether nothing was lost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=300, help="of each of exports, verdicts, ...")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="the figures, as JSON")
    parser.add_argument("--quick", action="store_true", help="10 kills of each")
    parser.add_argument("--disk", type=Path, metavar="BUNDLE", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.disk is not None:
        print(json.dumps(fill_disk(*bundle_parts(args.disk))))
        return 0
    if args.quick:
        args.kills = 10
    with tempfile.TemporaryDirectory() as name:
        figures = _figures(Path(name), args.kills, args.seed)
    for title, tally in figures.items():
        print(title)
        for word, count in sorted(tally.items()):
            print(f"  {count:6} {word}")
    if args.out is not None:
        args.out.write_text(json.dumps(describe_setting() | figures, indent=1) + "\n", "utf-8")
    return 1 if lost(figures) else 0


def lost(figures: dict[str, dict[str, int]]) -> list[str]:
    """Which figures say that something was lost, or that the harness sees nothing."""
    fine = {"whole", "absent", "killed", "done before the kill", "left over: 0", "left over: 1"}
    fine |= {"left over: 2", "after the next start: whole", "written twice"}
    fine |= {f"after the next start, left over: {n}" for n in (0, 1)}
    fine |= {"refused, nothing there", "refused, the earlier one whole"}
    fine |= {_NO_NAMESPACE, _NO_BUILDER}
    found = [
        f"{title}: {word}"
        for title, tally in figures.items()
        if title != "naive writer"
        for word in tally
        if word not in fine
    ]
    found += [  # what came to its end each time proves nothing
        f"{title}: no kill struck"
        for title, tally in figures.items()
        if "done before the kill" in tally and "killed" not in tally
    ]
    if "corrupt" not in figures["naive writer"]:
        found.append("the naive writer was never caught")
    return found


def _figures(folder: Path, kills: int, seed: int) -> dict[str, dict[str, int]]:
    import torch
    from randomize import images, randomize
    from tiny_bundles import TinyNet, tiny_request

    from export.exporter import BUNDLE_MEMBERS, export_bundle

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    model, path = TinyNet(), folder / "out" / "tiny.bundle"
    randomize(model, images(4, 16, seed=0))
    request = tiny_request("onnxruntime-x86")

    def export() -> None:
        export_bundle(model, path, request=request, force=True)

    def write() -> None:
        write_bundle(path, manifest, contents, force=True)

    def start() -> None:
        check_free(path, force=True, members=BUNDLE_MEMBERS)

    def check() -> str:
        return bundle_state(path)

    export()
    manifest, contents = bundle_parts(path)
    figures = {
        title: kill_writers(
            writer, check, start, folder=path.parent, count=kills // 2, seed=seed + i
        )
        for i, (title, writer) in enumerate(
            {"exports, at any moment": export, "exports, while they write": write}.items()
        )
    }
    many = max(50, kills)  # a verdict is written so fast that a quarter of the kills strike
    figures["cached verdicts"] = kill_verdicts(folder / "verdicts", many, seed=seed)
    bundles = path, another_bundle(folder / "other.bundle", path)
    (folder / "service").mkdir()
    figures["installations"] = kill_installs(folder / "service", bundles, kills, seed=seed)
    figures["engines, while they are stored"] = kill_stores(folder / "stored", kills, seed=seed)
    figures["engines, at any moment"] = _kill_builds(folder / "built", path, kills, seed=seed)
    figures["naive writer"] = kill_naive_writer(
        folder / "naive" / "b", manifest, contents, max(20, kills // 10), seed=seed
    )
    figures["full disks"] = full_disks(path)
    return {title: dict(tally) for title, tally in figures.items()}


def _kill_builds(folder: Path, bundle: Path, kills: int, *, seed: int) -> Counter[str]:
    try:
        return kill_builds(folder, bundle, max(2, kills // _BUILDS), seed=seed)
    except ImportError:
        return Counter({_NO_BUILDER: 1})


def kill_verdicts(folder: Path, count: int, *, seed: int) -> Counter[str]:
    """Kill what writes a cached verdict."""
    folder.mkdir()
    path = folder / "verdict.json"
    verdict = FirstLoad(FORMAT_VERSION, "0" * 64, "fp32", "onnxruntime 1")

    def write() -> None:
        publish_bytes(path, strict_json.dump(verdict))

    def check() -> str:
        return "whole" if _read(path) == verdict else "corrupt"

    write()
    return kill_writers(write, check, write, folder=folder, count=count, seed=seed)


def kill_naive_writer(
    path: Path, manifest: Manifest, contents: dict[str, bytes], count: int, *, seed: int
) -> Counter[str]:
    """Kill what replaces a bundle as one would without thinking."""

    def write() -> None:
        shutil.rmtree(path)
        for name, data in contents.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data)
        shutil.copy(good / MANIFEST_NAME, path)
        shutil.copy(good / DIGEST_NAME, path)

    def start() -> None:
        if bundle_state(path) != "whole":
            shutil.rmtree(path, ignore_errors=True)
            shutil.copytree(good, path)

    good = path.parent / "good"
    write_bundle(good, manifest, contents)
    start()
    return kill_writers(
        write, lambda: bundle_state(path), start, folder=path.parent, count=count, seed=seed
    )


def full_disks(bundle: Path) -> Counter[str]:
    """Fill disks in a mount namespace; where the kernel gives none, say so."""
    command = ["unshare", "-rm", sys.executable, str(_HERE), "--disk", str(bundle)]
    root = str(_HERE.parent.parent)
    result = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": root}
    )
    if "unshare: " in result.stderr:
        return Counter({_NO_NAMESPACE: 1})
    result.check_returncode()
    return Counter(json.loads(result.stdout))


def bundle_parts(path: Path) -> tuple[Manifest, dict[str, bytes]]:
    """A bundle's manifest without files, and the contents, as `write_bundle` takes them."""
    bundle = open_bundle(path)
    contents = {entry.path: bundle.read(entry.path) for entry in bundle.manifest.files}
    return dataclasses.replace(bundle.manifest, files=()), contents


if __name__ == "__main__":
    sys.exit(main())
