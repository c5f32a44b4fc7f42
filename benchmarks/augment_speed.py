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

suite_overhead.py adds what the whole suite costs a training step. The two sides take turns within a
round. A row's figure is the median over the rounds of the second side's time / the first's, with a
95 % interval by order statistics. The full form fails (exit 1) where torchvision / ours is below 3
at 32 pixels or, for chain a, below 1 at 224, and where a step with the suite takes more than 1.25
times (32 pixels) or 1.10 times (224) as long as without. --quick halves the floors, and doubles
the share that the suite may add.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from setting import describe_setting
from suite_overhead import compare_steps
from timing import Row, compare
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


def compare_chains(name: str, size: int, rounds: int, ease: float) -> Row:
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
    wanted = WANTED[size, name]
    return compare(
        f"torchvision / ours, ({name}) {size}x{size}, batch {count}",
        run_ours,
        run_theirs,
        rounds=rounds,
        wanted=None if wanted is None else ease * wanted,
    )


def check(out: Tensor, images: Tensor) -> None:
    """Stop unless each image was changed into floats of its own."""
    if out.shape != images.shape or out.dtype != torch.float32:
        sys.exit(f"error: a batch became {tuple(out.shape)} {out.dtype}")
    if out.min() < 0 or out.max() > 1:
        sys.exit("error: values outside [0, 1]")
    if any(torch.equal(one, image / 255) for one, image in zip(out, images, strict=True)):
        sys.exit("error: an image was left as it is")


def main() -> int:
    """Measure, print, and judge."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a minute; lower floors")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rounds = {32: 15, 224: 9} if options.quick else {32: 101, 224: 61}
    ease = 0.5 if options.quick else 1.0
    rows = [
        *(
            compare_chains(name, size, rounds[size], ease)
            for size in BATCHES
            for name in ("a", "b")
        ),
        *compare_steps(quick=options.quick),
    ]
    for row in rows:
        print(row.to_text())
    if options.json:
        report = {
            **describe_setting(),
            "threads": torch.get_num_threads(),
            "rows": [asdict(row) for row in rows],
        }
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    missed = [row.name for row in rows if not row.passed]
    print("augment speed: missed: " + "; ".join(missed) if missed else "augment speed: all kept")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
