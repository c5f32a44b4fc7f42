"""Count the nodes of an exported ViT against other exporters, and time what the export runs.

    python benchmarks/simplify_latency.py [--quick] [--out FILE]

Nodes: timm's vit_small_patch16_224, simplified and exported by edgereg (opset 20), beside what
torch's exporter writes of the same module at opset 20 and 23, for any batch size (as ours is) or
for two images, and what onnxslim makes of those at opset 20. onnxslim is installed into a temporary
folder where it is missing. The files must answer alike.

Latency: ONNX Runtime on one thread, one image; the edgereg export against torch's at opset 20, in
turns. A row's figure is the median over the rounds of ours / torch's, with a 95 % interval by order
statistics. Random weights: no operator here is faster for some numbers than for others.

The full form fails (exit 1) where ours has not fewer nodes than the leanest peer, where a ratio is
above 1.02, or where its interval does not reach 1.0. --quick takes four blocks of
vit_tiny_patch16_224 for both, and MobileNetV3-L, needs no network, and fails where ours has not
fewer nodes or a ratio is above 1.10.
"""

import argparse
import json
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import timm
import torch
import torchvision
from install import install
from peers import plain, slimmed
from setting import describe_setting
from timing import Row, compare
from torch import Tensor, nn

from export.onnx_file.run_onnx import open_session
from export.onnx_file.to_onnx import to_onnx
from export.passes.simplify import simplify
from export.targets import TARGETS

_SIZE = 224
_TARGET = TARGETS["onnxruntime-x86"]
_WANTED, _EASED = 1.02, 1.10
MODELS: dict[str, Callable[[], nn.Module]] = {
    "ViT-Ti": lambda: timm.create_model("vit_tiny_patch16_224"),
    "ViT-S": lambda: timm.create_model("vit_small_patch16_224"),
    "ResNet-50": lambda: torchvision.models.resnet50(),
    "MobileNetV3-L": lambda: torchvision.models.mobilenet_v3_large(),
}
QUICK: dict[str, Callable[[], nn.Module]] = {
    "ViT-Ti of 4 blocks": lambda: timm.create_model("vit_tiny_patch16_224", depth=4),
    "MobileNetV3-L": MODELS["MobileNetV3-L"],
}


@dataclass(frozen=True)
class Count:
    """The size of one exporter's file.

    Args:
        exporter: Whose.
        nodes: Of its graph; None where it failed.
        error: Why it failed, or nothing.
    """

    exporter: str
    nodes: int | None
    error: str = ""

    def to_text(self) -> str:
        """Return the count as a line."""
        return f"{self.exporter}: " + (f"failed: {self.error}" if self.error else f"{self.nodes}")


def build(name: str) -> tuple[nn.Module, Tensor]:
    """Return a model with random weights, and a batch of two images."""
    torch.manual_seed(0)
    model = (MODELS | QUICK)[name]().eval().requires_grad_(False)
    return model, torch.randn(2, 3, _SIZE, _SIZE)


def ours(model: nn.Module, x: Tensor) -> bytes:
    """Return what edgereg exports."""
    return to_onnx(simplify(model, (x,)).model, (x,), target=_TARGET, max_batch=2)


def count_nodes(name: str, *, quick: bool) -> tuple[list[Count], bytes, bytes]:
    """Count the nodes of every exporter's file; the first count is ours.

    Returns:
        The counts, our file, and torch's at our opset.
    """
    model, x = build(name)
    mine, theirs = ours(model, x), plain(model, x, opset=_TARGET.opset)
    exporters: dict[str, Callable[[], bytes]] = {
        "edgereg": lambda: mine,
        f"torch, opset {_TARGET.opset}": lambda: theirs,
    }
    if not quick:
        fixed = plain(model, x, opset=_TARGET.opset, is_fixed=True)
        exporters |= {
            f"torch, opset {_TARGET.opset}, two images": lambda: fixed,
            "torch, opset 23": lambda: plain(model, x, opset=23),
            "torch, opset 23, two images": lambda: plain(model, x, opset=23, is_fixed=True),
            "onnxslim": lambda: slimmed(theirs),
            "onnxslim, two images": lambda: slimmed(fixed),
        }
    expected = model(x).numpy()
    counts = []
    for exporter, write in exporters.items():
        try:
            file = write()
            check(answer(file, x.numpy()), expected)
            counts.append(Count(exporter, len(onnx.load_model_from_string(file).graph.node)))
        except Exception as error:  # a peer's own, of whatever type
            if exporter == "edgereg":
                raise
            lines = [*str(error).splitlines(), type(error).__name__]
            counts.append(Count(exporter, None, lines[0][:200]))
    return counts, mine, theirs


def answer(file: bytes, images: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the logits of images."""
    session = open_session(file)
    logits: np.ndarray[Any, Any] = session.run(None, {session.get_inputs()[0].name: images})[0]
    return logits


def check(logits: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> None:
    """Stop unless two files answer alike."""
    error = float(np.abs(logits - expected).max() / np.abs(expected).max())
    if not error < 1e-3:  # float32, added up in another order
        raise RuntimeError(f"the answers differ by {error:.1e}")


def time_both(name: str, mine: bytes, theirs: bytes, *, rounds: int, wanted: float) -> Row:
    """Time both files in turns, on one thread."""
    image = np.random.default_rng(0).standard_normal((1, 3, _SIZE, _SIZE), dtype=np.float32)
    sessions = [open_session(file) for file in (theirs, mine)]
    runs = [lambda s=session: s.run(None, {s.get_inputs()[0].name: image}) for session in sessions]
    for run in [*runs] * 3:  # the warm-up
        run()
    check(runs[1]()[0], runs[0]()[0])
    return compare(f"{name}, edgereg / torch", *runs, rounds=rounds, wanted=wanted, is_limit=True)


def misses(counts: list[Count], rows: list[Row], *, quick: bool) -> list[str]:
    """Return what is not as wanted."""
    found = [row.name for row in rows if not row.passed]
    if not quick:
        found += [f"{row.name}: the interval ends above 1.0" for row in rows if row.low > 1]
    peers = [count.nodes for count in counts[1:] if count.nodes is not None]
    if not peers or counts[0].nodes is None or counts[0].nodes >= min(peers):
        found.append("the node count")
    return found


def main() -> int:
    """Measure, print, and judge."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a minute; two models, eased limits")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the result there, as JSON")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    counted = "ViT-Ti of 4 blocks" if options.quick else "ViT-S"
    wanted = _EASED if options.quick else _WANTED
    with tempfile.TemporaryDirectory() as folder:
        if not options.quick:
            install(Path(folder), ["onnxslim", "colorama"])
        counts, mine, theirs = count_nodes(counted, quick=options.quick)
    for count in counts:
        print(f"{counted}, nodes, {count.to_text()}", flush=True)
    rows = []
    for name in QUICK if options.quick else MODELS:
        files = (mine, theirs)  # of the model that was counted
        if name != counted:
            model, x = build(name)
            files = ours(model, x), plain(model, x, opset=_TARGET.opset)
        rounds = 21 if options.quick else 101
        rows.append(time_both(name, *files, rounds=rounds, wanted=wanted))
        print(rows[-1].to_text(), flush=True)
    missed = misses(counts, rows, quick=options.quick)
    if options.out:
        report = {
            **describe_setting(),
            "threads": 1,
            "nodes": {"model": counted, "counts": [asdict(count) for count in counts]},
            "latency": [asdict(row) for row in rows],
            "missed": missed,
        }
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    peers = [count.nodes for count in counts[1:] if count.nodes is not None]
    verdict = f"missed: {'; '.join(missed)}" if missed else "all kept"
    print(
        f"simplify latency: {counts[0].nodes} nodes against {min(peers, default=None)}, ratios "
        f"{', '.join(f'{row.ratio:.3f}' for row in rows)}: {verdict}"
    )
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
