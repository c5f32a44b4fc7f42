"""Time the augmentation chain against torchvision's transforms v2 applied to one image at a time.

    python benchmarks/augment_speed.py [--quick] [--json FILE]

Both sides take a batch of uint8 images in memory, each image with random parameters of its own, to
a float32 batch in [0, 1], on one thread. torchvision draws one set of parameters a call, so a user
who wants each image changed by itself calls it once an image and stacks the results; here on uint8,
its fast path, with bilinear interpolation. Two chains:

    a   flip, affine, brightness/contrast/saturation
    b   antialiased random resized crop, then a

On our side a batch goes through in pieces that fit a cache, moves that follow one another resample
once, and a crop out of an image that already has the model's size only enlarges it, where an
antialiasing filter is the identity. So torchvision, too, is given images of that size; a crop out
of larger originals is another task, which our side does not offer.

The two sides take turns within a round. A row's figure is the median over the rounds of
torchvision's time / ours, with a 95 % interval by order statistics. The full form fails (exit 1)
below 3 at 32 pixels and, for chain a, below 1 at 224; --quick fails below half of that. The last
line holds the four figures.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torchvision
from torch import Tensor
from torchvision.transforms import v2

from edgereg.augment.chain import build_chain
from edgereg.augment.draws import Draws

MEAN = (0.5, 0.5, 0.5)
BATCHES = {32: 128, 224: 32}
WANTED = {(32, "a"): 3.0, (32, "b"): 3.0, (224, "a"): 1.0, (224, "b"): None}
OURS = {
    "a": [
        {"flip": {}},
        {"affine": {"degrees": 15, "translate": 0.1, "scale": [0.9, 1.1], "shear": 5}},
        {"colour_jitter": {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4}},
    ],
}
OURS["b"] = [{"resized_crop": {"area": [0.08, 1.0]}}, *OURS["a"]]


@dataclass(frozen=True)
class Row:
    """A comparison: how many times as fast, with its 95 % interval.

    Args:
        name: What was compared.
        ratio: Median of the rounds' ratios.
        low: Lower end of the interval.
        high: Upper end.
        wanted: The least ratio wanted, or None.
        ours_ms: Median time of a batch.
        theirs_ms: Likewise.
        n: Rounds.
    """

    name: str
    ratio: float
    low: float
    high: float
    wanted: float | None
    ours_ms: float
    theirs_ms: float
    n: int


def theirs(name: str, size: int) -> v2.Compose:
    """Return torchvision's chain for one image."""
    crop = [v2.RandomResizedCrop(size, scale=(0.08, 1.0), antialias=True)] if name == "b" else []
    return v2.Compose(
        [
            *crop,
            v2.RandomHorizontalFlip(),
            v2.RandomAffine(
                15,
                translate=(0.1, 0.1),
                scale=(0.9, 1.1),
                shear=5,
                interpolation=v2.InterpolationMode.BILINEAR,
            ),
            v2.ColorJitter(0.4, 0.4, 0.4),
            v2.ToDtype(torch.float32, scale=True),
        ]
    )


def compare(name: str, size: int, rounds: int) -> Row:
    """Time both sides of chain `name` in turns."""
    count = BATCHES[size]
    pixels = torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8)
    served = pixels.permute(0, 3, 1, 2)  # as the trainer has them in memory
    images = served.contiguous()  # as torchvision likes them
    chain, other = build_chain(OURS[name], MEAN, key=name), theirs(name, size)
    epoch = iter(range(1_000_000))

    def run_ours() -> Tensor:
        return chain(served, Draws(0, next(epoch), torch.arange(count)))

    def run_theirs() -> Tensor:
        return torch.stack([other(image) for image in images])

    for run in (run_ours, run_theirs):  # also the warm-up
        check(run(), images)
    mine, its = in_turns([run_ours, run_theirs], rounds)
    ratios = sorted(t / m for m, t in zip(mine, its, strict=True))
    low, high = interval(ratios)
    return Row(
        name=f"({name}) {size}x{size}, batch {count}",
        ratio=statistics.median(ratios),
        low=low,
        high=high,
        wanted=WANTED[size, name],
        ours_ms=1e3 * statistics.median(mine),
        theirs_ms=1e3 * statistics.median(its),
        n=rounds,
    )


def check(out: Tensor, images: Tensor) -> None:
    """Stop unless each image was changed into floats of its own."""
    if out.shape != images.shape or out.dtype != torch.float32:
        sys.exit(f"error: a batch became {tuple(out.shape)} {out.dtype}")
    if out.min() < 0 or out.max() > 1:
        sys.exit("error: values outside [0, 1]")
    if any(torch.equal(one, image / 255) for one, image in zip(out, images, strict=True)):
        sys.exit("error: an image was left as it is")


def in_turns(runs: Sequence[Callable[[], object]], rounds: int) -> list[list[float]]:
    """Return the seconds of each run in each round; what disturbs a round disturbs all its runs."""
    seconds: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for run, times in zip(runs, seconds, strict=True):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
    return seconds


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return a 95 % interval for the median of sorted values, by order statistics.

    The number of values below the median is binomial (n, 1/2): between the k-th value from below
    and the k-th from above it lies with probability 1 - 2 P(X < k).
    """
    n = len(values)
    k, below, probability = 0, 0.0, 0.5**n
    while below + probability <= 0.025 and k < n // 2:
        below += probability
        probability *= (n - k) / (k + 1)
        k += 1
    return values[max(k - 1, 0)], values[n - max(k, 1)]


def machine() -> dict[str, str | int]:
    """Return what the figures were measured on."""
    return {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }


def cpu_name() -> str:
    """Return the processor's name, as the system gives it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> int:
    """Measure, print, and judge."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a minute; lower floors")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rounds = {32: 15, 224: 9} if options.quick else {32: 101, 224: 61}
    rows = [compare(name, size, rounds[size]) for size in BATCHES for name in ("a", "b")]
    ease = 0.5 if options.quick else 1.0
    misses = [row for row in rows if row.wanted is not None and row.ratio < ease * row.wanted]
    for row in rows:
        wanted = "reported" if row.wanted is None else f"wanted >= {ease * row.wanted:g}"
        print(
            f"{row.name}: {row.ratio:.2f}x [{row.low:.2f}, {row.high:.2f}], n = {row.n}, "
            f"{row.ours_ms:.1f} ms against {row.theirs_ms:.1f} ms; {wanted}"
        )
    if options.json:
        report = {
            "command": "python benchmarks/augment_speed.py" + " --quick" * options.quick,
            "machine": machine(),
            "rows": [asdict(row) for row in rows],
        }
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    verdict = "missed: " + ", ".join(row.name for row in misses) if misses else "all floors kept"
    print("augment speed: " + ", ".join(f"{row.name} {row.ratio:.2f}x" for row in rows), verdict)
    return 1 if misses else 0


if __name__ == "__main__":
    sys.exit(main())
