"""Folders of JPEGs of several sizes and a checkpoint of random weights, for scale.py.

python benchmarks/scale_images.py FOLDER 10,100,1000 [DIR]

A process of its own: what scale.py starts is counted with at least scale.py's own memory, and this
needs torch.
"""

import sys
from pathlib import Path

import torch
from untrained import write_checkpoint, write_jpegs

from edgereg.models.zoo import ModelConfig

SIDE = 48


def main() -> None:
    """Write them."""
    torch.set_num_threads(1)
    folder, sizes, *source = sys.argv[1:]
    for size in map(int, sizes.split(",")):
        made = write_jpegs(
            Path(folder) / f"images-{size}",
            size,
            side=SIDE,
            source=Path(source[0]) if source else None,
        )
    classes = tuple(sorted(path.name for path in made.iterdir()))
    write_checkpoint(Path(folder) / "checkpoint", ModelConfig("convnet"), classes)


if __name__ == "__main__":
    main()
