"""A picture of what a recipe does to real images: what the model is shown, epoch by epoch."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from deploy.publish import check_new_file, publish_bytes
from deploy.runtime.decode import encode_png, load_pillow
from edgereg.augment.draws import Draws
from edgereg.augment.foreign import import_callables
from edgereg.augment.mixing import mix
from edgereg.augment.progressive import window, window_size
from edgereg.data.images import Images, Subset, evenly
from edgereg.data.pixels import Pixels
from edgereg.errors import DataError
from edgereg.recipe import Recipe

__all__ = ["PreviewResult", "write_preview"]

_MIXES = 3  # steps shown: with Mixup and CutMix both on, three in four show either
_TILE = 96  # least side of a picture, in pixels
_GAP = 8
_MARGIN = 16
_FONT = 12
_LINE = 18
_PAGE_GREY = 238  # not white, which many an image has at its border
_PAGE = (_PAGE_GREY,) * 3


@dataclass(frozen=True)
class PreviewResult:
    """What was drawn, and where.

    Args:
        path: The PNG file.
        images: The names of the images, one a row.
        draws: Pictures of each after augmentation.
        mixes: Pictures of each after mixing.
    """

    path: Path
    images: tuple[str, ...]
    draws: int
    mixes: int

    def to_json(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        return {
            "preview": str(self.path),
            "images": list(self.images),
            "draws": self.draws,
            "mixes": self.mixes,
        }


@dataclass(frozen=True)
class _Column:
    """A title, pictures (B, H, W, 3) and a caption under each."""

    title: str
    pictures: NDArray[np.uint8]
    captions: Sequence[str]


def write_preview(
    images: Images,
    recipe: Recipe,
    out: Path,
    *,
    rows: int = 8,
    columns: int = 6,
    force: bool = False,
) -> PreviewResult:
    """Draw images as they are, in some epochs of a training, and mixed with one another.

    The draws are those of a training on the same data: of the epochs 0, 1, ... for each image.
    What is mixed are the rows of the first epoch, as if they were the batch of steps 0, 1 and 2.

    Args:
        images: The data set; from each class in turn if it has labels.
        recipe: Gives seed, input size, augmentation and mixing.
        out: The PNG file to write.
        rows: How many images; all, if there are fewer.
        columns: Epochs, 1 or more.
        force: Whether an earlier file may be replaced.

    Raises:
        BadInputError: `out` exists, Pillow is missing, or an image is damaged.
        DataError: There is nothing to draw.
    """
    check_new_file(out, what="a preview", force=force)
    import_callables(recipe.chain(), key="augment")
    if min(rows, columns, len(images)) < 1:
        raise DataError(
            "a preview shows an image and an epoch at least",
            found=f"{rows} rows of {len(images)} images, {columns} columns",
            remedy="ask for more",
        )
    chosen = _choose(images, rows)
    publish_bytes(out, _draw(_heading(recipe), _columns(images, recipe, chosen, columns)))
    names = tuple(images.image_name(int(index)) for index in chosen)
    return PreviewResult(out, names, columns, _MIXES if _mixes(recipe) else 0)


def _choose(images: Images, count: int) -> NDArray[np.int64]:
    if images.labels is not None:
        return evenly(images.labels, count)
    count = min(count, len(images))
    return np.arange(count) * len(images) // count


def _mixes(recipe: Recipe) -> bool:
    return recipe.mix.mixup > 0 or recipe.mix.cutmix > 0


def _columns(
    images: Images, recipe: Recipe, chosen: NDArray[np.int64], epochs: int
) -> list[_Column]:
    subset, chain = Subset(images, chosen), recipe.chain()
    originals = Pixels(subset, recipe.preprocessing()).batch(np.arange(len(chosen)))
    indices = torch.from_numpy(chosen)
    numbers = [str(row) for row in range(1, len(chosen) + 1)]
    if images.labels is not None:
        kinds = [images.class_names[label] for label in images.labels[chosen]]
        numbers = [f"{row}  {kind}" for row, kind in zip(numbers, kinds, strict=True)]
    columns = [_Column("original", _bytes(originals / 255), numbers)]
    whole = recipe.model.image_size
    shown = []
    for epoch in range(epochs):
        draws = Draws(recipe.seed, epoch, indices)
        size = window_size(recipe.progressive, epoch, epochs=recipe.epochs, whole=whole)
        shown.append(window(chain(originals, draws), size, draws))
        pictures = _framed(shown[-1], whole)
        columns.append(_Column(f"epoch {epoch}", _bytes(pictures), [""] * len(chosen)))
    for step in range(_MIXES if _mixes(recipe) else 0):
        own = torch.eye(len(chosen))
        mixed, targets = mix(shown[0], own, recipe.mix, seed=recipe.seed, step=step)
        pictures = _framed(mixed, whole)
        columns.append(_Column(f"mixed, step {step}", _bytes(pictures), _shares(targets)))
    return columns


def _framed(windows: Tensor, side: int) -> Tensor:
    """Put windows (B, C, h, h) into the middle of pictures (B, C, side, side) of the page."""
    missing = side - windows.shape[-1]
    before, after = missing // 2, missing - missing // 2
    return F.pad(windows, (before, after, before, after), value=_PAGE_GREY / 255)


def _bytes(images: Tensor) -> NDArray[np.uint8]:
    pixels: NDArray[np.uint8] = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return pixels


def _shares(targets: Tensor) -> list[str]:
    """Return what each row consists of; `targets` (B, B) are the shares of the rows."""
    captions = []
    for row, shares in enumerate(targets):
        own = round(100 * shares[row].item())
        others = shares.clone()
        others[row] = 0
        partner = int(others.argmax()) + 1
        captions.append(f"{own} % + {100 - own} % of {partner}" if others.any() else "by itself")
    return captions


def _heading(recipe: Recipe) -> list[str]:
    """Return what the recipe says of augmentation and of mixing."""
    steps = ", ".join(_described(step) for step in recipe.augment) or "none"
    lines = [f"augment: {steps}"]
    windows = recipe.progressive
    if windows.smallest:
        lines.append(
            f"progressive: windows from {windows.smallest} pixels on, whole images after "
            f"{windows.whole_from:.0%} of {recipe.epochs} epochs"
        )
    if _mixes(recipe):
        amounts = [f"{kind} {getattr(recipe.mix, kind):g}" for kind in ("mixup", "cutmix")]
        each = ", each image by itself" if recipe.mix.per_sample else ""
        lines.append(f"mix: {', '.join(amounts)}, probability {recipe.mix.probability:g}{each}")
    else:
        lines.append("mix: none")
    return lines


def _described(value: Any) -> str:
    """Return a step, or an option of one, in few words."""
    if isinstance(value, Mapping):
        return ", ".join(_named(name, inner) for name, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_described, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _named(name: str, value: Any) -> str:
    if not isinstance(value, Mapping | list | tuple):
        return name if value is None else f"{name} {_described(value)}"
    return f"{name} ({_described(value)})" if value else name


def _draw(heading: Sequence[str], columns: Sequence[_Column]) -> bytes:
    """Return a PNG file: the heading, the columns' titles, and their pictures."""
    load_pillow()  # which says what to install
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(_FONT)
    height, width = columns[0].pictures.shape[1:3]
    scale = math.ceil(_TILE / min(height, width))
    height, width = height * scale, width * scale
    across = len(columns) * (width + _GAP) - _GAP
    lines = [
        line for text in heading for line in _wrapped(text, lambda t: font.getlength(t) <= across)
    ]
    top = _MARGIN + (len(lines) + 1) * _LINE + _GAP
    down = len(columns[0].pictures) * (height + _LINE + _GAP) - _GAP
    page = Image.new("RGB", (across + 2 * _MARGIN, top + down + _MARGIN), _PAGE)
    pen = ImageDraw.Draw(page)
    for number, line in enumerate(lines):
        pen.text((_MARGIN, _MARGIN + number * _LINE), line, "black", font)
    for place, column in enumerate(columns):
        left = _MARGIN + place * (width + _GAP)
        pen.text((left, top - _LINE), column.title, "black", font)
        for row, (picture, caption) in enumerate(
            zip(column.pictures, column.captions, strict=True)
        ):
            above = top + row * (height + _LINE + _GAP)
            tile = Image.fromarray(picture).resize((width, height), Image.Resampling.NEAREST)
            page.paste(tile, (left, above))
            while font.getlength(caption) > width:
                caption = caption[:-2] + "…"
            pen.text((left, above + height + 2), caption, "dimgrey", font)
    return encode_png(np.asarray(page))


def _wrapped(text: str, fits: Callable[[str], bool]) -> list[str]:
    lines = [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}".lstrip()
        if lines[-1] and not fits(longer):
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
