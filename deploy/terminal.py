"""Plain text for people: aligned tables, and a progress line on a terminal."""

import sys
import time
from collections.abc import Sequence
from types import TracebackType

__all__ = ["Progress", "printable", "table"]

_PATIENCE_S = 2.0
_REDRAW_S = 0.2


def printable(text: str) -> str:
    """Escape what a terminal would obey or cannot encode, as in the names of strangers' files."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )


def table(rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Align rows of equal length in columns.

    Args:
        rows: The first is the heading.
        left: So many columns are aligned to the left, the others to the right.
    """
    cells = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = (
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    )
    return "\n".join(line.rstrip() for line in lines)


class Progress:
    """One line on stderr, redrawn, once the work takes more than two seconds; silent in a pipe."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._next_s = time.monotonic() + _PATIENCE_S
        self._drawn = False

    def __call__(self, status: str) -> None:
        """Show how far the work is."""
        if time.monotonic() >= self._next_s and sys.stderr.isatty():
            sys.stderr.write(f"\r\x1b[K{self._label}: {printable(status)}")
            sys.stderr.flush()
            self._next_s = time.monotonic() + _REDRAW_S
            self._drawn = True

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._drawn:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
