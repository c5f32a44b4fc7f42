"""What our runner adds to a bare `session.run` of ONNX Runtime, in turns.

    python benchmarks/runner_overhead.py            our CNN at 32 px, ResNet-18 at 224 px
    python benchmarks/runner_overhead.py --quick    our CNN, fewer rounds

Both run the same file with the same options in one thread. A round is some 1 ms of one, then of
the other. Exits with 1 where the median of the rounds' differences is above 5 % and above 50
microseconds. `--slow US` makes our side so many microseconds slower: the check must then fail.
"""

import argparse
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from randomize import images, randomize
from setting import describe_setting
from timing import in_turns
from torch import nn

from deploy.bundle.read import open_bundle
from deploy.measure.statistics import median_interval
from deploy.runtime.decode import encode_png
from deploy.runtime.ort_runner import OrtRunner
from deploy.runtime.preprocess import Preprocessing
from edgereg.models.zoo import ModelConfig, build_model
from export.exporter import ExportRequest, export_bundle

_WANTED_RATIO, _WANTED_S = 0.05, 50e-6
_ROUND_S = 0.001


def main() -> int:
    """Print the overhead for each model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=1001)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--slow", type=float, default=0.0, metavar="US")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # what torch says of its own code
    print(describe_setting())
    names = {"our CNN": ("convnet", 32), "ResNet-18": ("torchvision:resnet18", 224)}
    passed = True
    for label, (name, size) in list(names.items())[: 1 if args.quick else None]:
        model = build_model(ModelConfig(name=name, image_size=size), num_classes=10)
        with tempfile.TemporaryDirectory() as folder:
            bare, ours = _pair(model, size, Path(folder) / "b", slow_s=args.slow * 1e-6)
        passed &= _compare(f"{label} {size}x{size}", bare, ours, 401 if args.quick else args.rounds)
    return 0 if passed else 1


def _pair(
    model: nn.Module, size: int, path: Path, *, slow_s: float
) -> tuple[Callable[[], object], Callable[[], object]]:
    """Return what runs a model by ONNX Runtime alone, and by our runner."""
    randomize(model, images(8, size, seed=0))
    rng = np.random.default_rng(0)
    request = ExportRequest(
        name="model",
        target="onnxruntime-x86",
        labels=tuple(f"class {i}" for i in range(10)),
        preprocessing=Preprocessing(size, size, "stretch", 1.0, (0.5,) * 3, (0.25,) * 3),
        golden_images=[
            encode_png(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)) for _ in range(64)
        ],
    )
    export_bundle(model, path, request=request)
    bundle = open_bundle(path)
    batch = bundle.array(bundle.manifest.golden.preprocessed)[:1]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    file = bundle.read(bundle.manifest.variants["fp32"].file)
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    outputs, feed = [bundle.manifest.outputs[0].name], {bundle.manifest.inputs[0].name: batch}
    runner = OrtRunner(bundle, "fp32", 1)

    def ours() -> object:
        end = time.perf_counter() + slow_s
        answer, end = runner(batch), time.perf_counter() + slow_s
        while time.perf_counter() < end:
            pass
        return answer

    if not np.array_equal(session.run(outputs, feed)[0], runner(batch)):
        raise SystemExit("error: the two do not compute the same")
    return lambda: session.run(outputs, feed), ours if slow_s else lambda: runner(batch)


def _compare(
    name: str, bare: Callable[[], object], ours: Callable[[], object], rounds: int
) -> bool:
    start = time.perf_counter()
    for _ in range(10):
        bare()
    count = max(1, int(_ROUND_S / ((time.perf_counter() - start) / 10)))

    def repeat(run: Callable[[], object]) -> Callable[[], None]:
        def calls() -> None:
            for _ in range(count):
                run()

        return calls

    ones, others = in_turns([repeat(bare), repeat(ours)], rounds)
    added = [(other - one) / count for one, other in zip(ones, others, strict=True)]
    low, high = median_interval(added, confidence=0.95) or (min(added), max(added))
    bare_s, added_s = statistics.median(ones) / count, statistics.median(added)
    passed = added_s <= max(_WANTED_RATIO * bare_s, _WANTED_S)
    print(
        f"{name}: {1e6 * added_s:+.1f} us [{1e6 * low:+.1f}, {1e6 * high:+.1f}], "
        f"{added_s / bare_s:+.1%} of {1e6 * bare_s:.0f} us, n = {rounds} rounds of {count}; "
        f"wanted at most {_WANTED_RATIO:.0%} or {1e6 * _WANTED_S:.0f} us: "
        f"{'yes' if passed else 'NO'}"
    )
    return passed


if __name__ == "__main__":
    sys.exit(main())
