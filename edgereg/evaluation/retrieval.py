"""A picture of what an encoder finds alike: query images, each with its nearest neighbours."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploy.publish import check_new_file, publish_bytes
from deploy.runtime.decode import encode_png, load_pillow
from edgereg.data.images import evenly
from edgereg.data.pixels import Pixels
from edgereg.evaluation.neighbours import nearest

__all__ = ["Gallery", "RetrievalResult", "write_retrieval"]

_TILE = 72  # least side of a picture, in pixels
_FRAME = 4
_GAP = 12
_MARGIN = 16
_FONT = 12
_LINE = 18
_PAGE = "#eeeeee"  # not white, which many an image has at its border
_RIGHT, _WRONG = "#2f6fb0", "#d9822b"  # blue and orange: told apart by the colour-blind, too


@dataclass(frozen=True)
class Gallery:
    """Labelled images and their features.

    Args:
        name: What the user calls them.
        pixels: N images, as the encoder is shown them.
        features: (N, D) float32.
        labels: (N,) int64.
    """

    name: str
    pixels: Pixels
    features: NDArray[np.float32]
    labels: NDArray[np.int64]


@dataclass(frozen=True)
class RetrievalResult:
    """What was drawn, and where.

    Args:
        path: The PNG file.
        queries: (Q,) indices into the queries' gallery, one a row.
        neighbours: (Q, k) indices into the bank, the nearest first.
        right: Share of the drawn neighbours that are of their query's class.
    """

    path: Path
    queries: NDArray[np.int64]
    neighbours: NDArray[np.int64]
    right: float

    def to_json(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        return {
            "picture": str(self.path),
            "queries": self.queries.tolist(),
            "neighbours": self.neighbours.tolist(),
            "right": self.right,
        }


@dataclass(frozen=True)
class _Tile:
    """A picture (H, W, 3), its caption, and the colour of its frame."""

    picture: NDArray[np.uint8]
    caption: str
    colour: str


def write_retrieval(
    queries: Gallery,
    bank: Gallery,
    out: Path,
    *,
    class_names: tuple[str, ...],
    rows: int = 10,
    columns: int = 8,
    seed: int = 0,
    force: bool = False,
) -> RetrievalResult:
    """Draw some queries, from each class in turn, each with its nearest images in a bank.

    Args:
        queries: Where the queries are drawn from.
        bank: Where the neighbours are looked for.
        out: The PNG file to write.
        class_names: Of both galleries' labels.
        rows: Queries; all, if there are fewer.
        columns: Neighbours of each; all of the bank, if there are fewer.
        seed: Decides which are the queries.
        force: Whether an earlier file may be replaced.

    Raises:
        BadInputError: `out` exists, or Pillow is missing.
        DataError: The features do not go together, or are not finite.
    """
    check_new_file(out, what="a picture", force=force)
    order = np.random.default_rng(seed).permutation(len(queries.labels))
    chosen = order[evenly(queries.labels[order], rows)]
    chosen = chosen[np.argsort(queries.labels[chosen], kind="stable")]
    cosines, found = nearest(
        queries.features[chosen], bank.features, k=min(columns, len(bank.features))
    )
    is_right = bank.labels[found] == queries.labels[chosen, np.newaxis]
    grid = []
    for row, query in enumerate(chosen):
        tiles = [
            _Tile(picture, class_names[queries.labels[query]], "black")
            for picture in queries.pixels.fitted(chosen[[row]])
        ]
        pictures = bank.pixels.fitted(found[row])
        for place, picture in enumerate(pictures):
            name = class_names[bank.labels[found[row, place]]]
            colour = _RIGHT if is_right[row, place] else _WRONG
            tiles.append(_Tile(picture, f"{cosines[row, place]:.3f} {name}", colour))
        grid.append(tiles)
    right = float(is_right.mean())
    heading = [
        f"left: queries from {queries.name}; right: the nearest in {bank.name}, with their cosine",
        f"blue: the query's class ({right:.0%} of these); orange: another",
    ]
    publish_bytes(out, _draw(heading, grid))
    return RetrievalResult(out, chosen, found, right)


def _draw(heading: list[str], grid: list[list[_Tile]]) -> bytes:
    """Return a PNG file: the heading, and a row of framed pictures for each query."""
    load_pillow()  # which says what to install
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(_FONT)
    height, width = grid[0][0].picture.shape[:2]
    scale = math.ceil(_TILE / min(height, width))
    height, width = height * scale, width * scale
    across, down = width + 2 * _FRAME + _GAP, height + 2 * _FRAME + _LINE + _GAP
    top = _MARGIN + len(heading) * _LINE + _GAP
    total = max(
        len(grid[0]) * across + _GAP, math.ceil(max(font.getlength(line) for line in heading))
    )
    page = Image.new("RGB", (total + 2 * _MARGIN, top + len(grid) * down + _MARGIN - _GAP), _PAGE)
    pen = ImageDraw.Draw(page)
    for number, line in enumerate(heading):
        pen.text((_MARGIN, _MARGIN + number * _LINE), line, "black", font)
    for row, tiles in enumerate(grid):
        for column, tile in enumerate(tiles):
            # a wider gap after the query
            left, above = _MARGIN + column * across + (_GAP if column else 0), top + row * down
            corner = (left + width + 2 * _FRAME - 1, above + height + 2 * _FRAME - 1)
            pen.rectangle(((left, above), corner), fill=tile.colour)
            picture = Image.fromarray(tile.picture).resize(
                (width, height), Image.Resampling.NEAREST
            )
            page.paste(picture, (left + _FRAME, above + _FRAME))
            caption = tile.caption
            while font.getlength(caption) > width + 2 * _FRAME:
                caption = caption[:-2] + "…"
            pen.text((left, above + height + 2 * _FRAME + 2), caption, tile.colour, font)
    return encode_png(np.asarray(page))
