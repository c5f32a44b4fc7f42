"""Reading the small files of /sys and /proc, any of which may be absent or refuse."""

import re
from pathlib import Path

__all__ = ["natural_order", "read_int", "read_text"]

_MAX_BYTES = 1 << 20


def read_text(path: Path) -> str | None:
    """The content without white space and NULs around it; None if it is absent or refuses.

    A sensor of a part that is switched off exists and answers with an error: on Orin the thermal
    zones of the CV engines do.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES)
    except OSError:
        return None
    return data.decode("utf-8", errors="replace").strip(" \t\r\n\0")


def read_int(path: Path) -> int | None:
    """The content as a whole number; None if there is none."""
    text = read_text(path)
    return int(text) if text is not None and re.fullmatch(r"-?\d+", text) else None


def natural_order(path: Path) -> list[tuple[str, int]]:
    """A key that sorts cpu10 after cpu9."""
    parts = re.findall(r"(\D*)(\d*)", str(path))
    return [(text, int(digits or -1)) for text, digits in parts]
