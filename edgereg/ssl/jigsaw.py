"""The transformed view of PIRL: nine patches of an image, shuffled (1912.01991, supplement A.1).

A random part of the image, of at least 60 % of its area and independent of the other view, is cut
into 3x3 cells. From each cell a smaller patch is taken at a random place, so that edges that run
on from patch to patch give nothing away. Each patch is recoloured by itself, and the nine are
permuted: all 9! = 362,880 orders occur. The paper's sizes at 224 pixels are 255 -> 85 -> 64;
others keep these proportions, but below 64 pixels the crop is as large as the image: enlarging
it so little would only blur it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from edgereg.augment.chain import Chain
from edgereg.augment.draws import Draws
from edgereg.augment.geometric import ResizedCrop, warp

__all__ = ["GRID", "JigsawSizes", "cut_patches", "jigsaw_sizes", "jigsaw_views"]

GRID = 3
_CROP = ResizedCrop(area=(0.6, 1.0))


@dataclass(frozen=True)
class JigsawSizes:
    """Side of the crop, of a cell and of a patch, in pixels."""

    crop: int
    cell: int
    patch: int


def jigsaw_sizes(image_size: int) -> JigsawSizes:
    """Return the paper's proportions: 224 gives 255, 85, 64; 32 gives 33, 11, 8."""
    cell = round(image_size * 255 / 224 / GRID) if image_size >= 64 else round(image_size / GRID)
    return JigsawSizes(crop=GRID * cell, cell=cell, patch=round(cell * 64 / 85))


def jigsaw_views(images: Tensor, draws: Draws, recolour: Chain) -> tuple[Tensor, Tensor]:
    """Return each image's patches and the order they were put in.

    Args:
        images: (B, 3, H, H) float in [0, 1].
        draws: The draws of these images.
        recolour: Applied to each patch with draws of its own.

    Returns:
        Patches (B, 9, 3, p, p), and the permutation (B, 9) int64: patch k was cut from cell
        permutation[k].
    """
    sizes = jigsaw_sizes(images.shape[2])
    matrices = _CROP.matrices(draws, images.shape[2], images.shape[3])
    crops = warp(images, matrices, size=(sizes.crop, sizes.crop))
    # one place less than there is room for (0..20 at 224 pixels): neighbours never touch
    offsets = draws.integers("patch", sizes.cell - sizes.patch, count=2 * GRID**2)
    patches = cut_patches(crops, sizes, offsets)
    patches = recolour(patches.flatten(0, 1), draws.split(GRID**2)).reshape(patches.shape)
    order = draws.permutations("order", GRID**2)
    return patches[torch.arange(len(order), device=order.device)[:, None], order], order


def cut_patches(crops: Tensor, sizes: JigsawSizes, offsets: Tensor) -> Tensor:
    """Cut one patch from each cell.

    Args:
        crops: (B, 3, crop, crop).
        sizes: Of the crop, the cells and the patches.
        offsets: (B, 18) int64 in 0..cell-patch: nine rows, then nine columns, within the cells.

    Returns:
        (B, 9, 3, patch, patch), cell by cell in reading order.
    """
    cell = torch.arange(GRID**2, device=crops.device)
    within = torch.arange(sizes.patch, device=crops.device)
    rows = (cell // GRID * sizes.cell + offsets[:, : GRID**2])[:, :, None] + within
    columns = (cell % GRID * sizes.cell + offsets[:, GRID**2 :])[:, :, None] + within
    sample = torch.arange(len(crops), device=crops.device)[:, None, None, None]
    # indexing with a slice between index tensors puts the channels last
    picked = crops[sample, :, rows[:, :, :, None], columns[:, :, None, :]]
    return picked.permute(0, 1, 4, 2, 3)
