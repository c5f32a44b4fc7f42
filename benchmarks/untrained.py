"""JPEGs, a checkpoint and a bundle of a net that nobody trained: to time what is around it.

python benchmarks/untrained.py FOLDER MODEL SIZE COUNT
"""

import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from randomize import images as noise
from randomize import randomize

from edgereg.checkpoint import Checkpoint, save_checkpoint
from edgereg.data.emoji10 import Emoji10
from edgereg.data.images import open_images
from edgereg.models.zoo import ModelConfig, build_model
from edgereg.recipe import Recipe
from edgereg.ship import ship

__all__ = ["write_bundle", "write_checkpoint", "write_jpegs"]


def write_jpegs(folder: Path, count: int, *, side: int, source: Path | None = None) -> Path:
    """Write so many JPEGs, in sub-folders of ten classes.

    Args:
        folder: To be made.
        count: Ten at least.
        side: Height and width in pixels, of those that are drawn.
        source: A folder with CLASS/*.jpg to copy from, over and over; the first ten classes.
            Without it emoji-10's training images are scaled, each with a grey level of its own, so
            that no two are alike.

    Raises:
        SystemExit: A class of the source has no image.
    """
    emoji = Emoji10(vendor="both", split="train")
    classes = list(emoji.class_names)
    if source is not None:
        classes = sorted(path.name for path in source.iterdir() if path.is_dir())[: len(classes)]
    for name in classes:
        (folder / name).mkdir(parents=True)
    found = [] if source is None else [sorted((source / name).glob("*.jpg")) for name in classes]
    empty = [name for name, paths in zip(classes, found, strict=False) if not paths]
    if empty:
        raise SystemExit(f"error: each folder of {source} holds *.jpg; found: none in '{empty[0]}'")
    by_class = [np.flatnonzero(emoji.labels == label) for label in range(len(emoji.class_names))]
    for place in range(count):
        label, round_ = place % len(classes), place // len(classes)
        path = folder / classes[label] / f"{round_:05d}.jpg"
        if source is not None:
            shutil.copyfile(found[label][round_ % len(found[label])], path)
            continue
        chosen = by_class[label]
        pixels = emoji.load(int(chosen[round_ % len(chosen)])).astype(np.int16)
        shade = np.clip(pixels - round_ // len(chosen), 0, 255).astype(np.uint8)
        Image.fromarray(shade).resize((side, side)).save(path, quality=90)
    return folder


def write_checkpoint(path: Path, config: ModelConfig, classes: tuple[str, ...]) -> Path:
    """Write a classifier of random weights on which its answers depend."""
    model = build_model(config, num_classes=len(classes))
    randomize(model, noise(8, config.image_size, seed=0))
    recipe, data = Recipe(model=config), {"name": "none", "images": 0, "sha256": ""}
    save_checkpoint(path, model, Checkpoint("classifier", recipe, classes, data, {}))
    return path


def write_bundle(folder: Path, config: ModelConfig, *, count: int) -> None:
    """Export such a net as `edgereg export` does, with JPEGs of one and a half times its size.

    Args:
        folder: For images, checkpoint and b.bundle; to be made.
        config: Of the net.
        count: Of the images; up to 256 of them go into the bundle, beside 64 golden ones.
    """
    side = 3 * config.image_size // 2
    images = open_images(str(write_jpegs(folder / "images", count, side=side)))
    write_checkpoint(folder / "checkpoint", config, images.class_names)
    ship(folder / "checkpoint", images, folder / "b.bundle", target="onnxruntime-x86")


def main() -> None:
    """Write a bundle: a process of its own, as torch takes more memory than what is measured."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # what torch says of its own code
    folder, model, size, count = sys.argv[1:]
    write_bundle(Path(folder), ModelConfig(model, image_size=int(size)), count=int(count))


if __name__ == "__main__":
    main()
