"""Pictures for the report: what augmentation, mixing and the jigsaw do to real images."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from deploy.runtime.decode import encode_png
from edgereg.augment.draws import Draws
from edgereg.augment.erasing import Cutout
from edgereg.augment.mixing import cutmix, mixup
from edgereg.data.images import Images, evenly, labels_of
from edgereg.data.pixels import Pixels
from edgereg.recipe import Recipe, load_recipe
from edgereg.ssl.jigsaw import GRID, jigsaw_views

__all__ = ["Pictures", "draw_pictures", "png_uri"]

_GAP = 2  # pixels between pictures


@dataclass(frozen=True)
class Pictures:
    """The report's pictures as data URIs.

    Args:
        samples: One glyph of each class: first row one vendor's, second row the other's.
        augmented: The originals in the first row, the recipe's augmentations of them below.
        mixed: Rows: an image, its partner, Mixup, CutMix.
        cutout: Cutout alone.
        jigsaw: Left the image, right its nine patches, shuffled.
    """

    samples: str
    augmented: str
    mixed: str
    cutout: str
    jigsaw: str


def draw_pictures(
    images: Images, other_hand: Images, recipe_path: Path, pirl_path: Path
) -> Pictures:
    """Draw all pictures from one image of each class.

    Args:
        images: Labelled.
        other_hand: The same glyphs in the same order, drawn by another vendor.
        recipe_path: The recipe whose augmentation to show.
        pirl_path: The recipe whose jigsaw views to show.
    """
    recipe, pirl = load_recipe(recipe_path), load_recipe(pirl_path)
    count = len(images.class_names)
    chosen = evenly(labels_of(images), count)
    originals = Pixels(images, recipe.preprocessing()).batch(chosen).float() / 255
    theirs = Pixels(other_hand, recipe.preprocessing()).batch(chosen).float() / 255
    indices = torch.from_numpy(chosen)
    rows = [recipe.chain()(originals, Draws(recipe.seed, epoch, indices)) for epoch in range(4)]
    return Pictures(
        samples=_grid([originals, theirs]),
        augmented=_grid([originals, *rows]),
        mixed=_grid(_mixed(originals)),
        cutout=_grid([_cutout(originals, indices, recipe)]),
        jigsaw=_jigsaw(originals[:6], Draws(pirl.seed, 0, indices[:6]), pirl),
    )


def png_uri(image: NDArray[np.uint8]) -> str:
    """Return an image (h, w, 3) as a data URI."""
    return "data:image/png;base64," + base64.b64encode(encode_png(image)).decode()


def _mixed(originals: Tensor) -> list[Tensor]:
    targets = torch.eye(len(originals))
    partner = torch.arange(len(originals)).roll(1)
    blended, _ = mixup(originals, targets, partner, torch.tensor([0.6]))
    pasted, _ = cutmix(originals, targets, partner, torch.tensor([0.7]), torch.tensor([[0.6, 0.4]]))
    return [originals, originals[partner], blended, pasted]


def _cutout(originals: Tensor, indices: Tensor, recipe: Recipe) -> Tensor:
    return Cutout(size=12).erase(
        originals, Draws(recipe.seed, 0, indices), torch.tensor(recipe.input.mean)
    )


def _jigsaw(originals: Tensor, draws: Draws, pirl: Recipe) -> str:
    patches, _ = jigsaw_views(originals, draws, pirl.chain().colour_steps())
    tiles = F.pad(patches, (0, 1, 0, 1), value=1.0)
    side = tiles.shape[-1]
    joined = tiles.reshape(-1, GRID, GRID, 3, side, side).permute(0, 3, 1, 4, 2, 5)
    boards = joined.reshape(len(patches), 3, GRID * side, GRID * side)
    padded = F.pad(originals, (0, 0, 0, boards.shape[2] - originals.shape[2]), value=1.0)
    return _grid([torch.cat([padded, torch.ones_like(padded[..., :2]), boards], dim=3)])


def _grid(rows: Sequence[Tensor]) -> str:
    """Lay rows of images (N, 3, H, W) in [0, 1] out on white."""
    framed = [F.pad(row, (0, _GAP, 0, _GAP), value=1.0) for row in rows]
    lines = [torch.cat(list(row), dim=2) for row in framed]
    page = (torch.cat(lines, dim=1).permute(1, 2, 0) * 255).round().to(torch.uint8)
    return png_uri(page.numpy())
