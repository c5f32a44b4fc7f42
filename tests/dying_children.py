"""What a child may do instead of loading a model; named to `ask_child` in the place of ours."""

import ctypes
import time
from typing import Any


def crash(*_: Any) -> None:
    """Read address zero."""
    ctypes.string_at(0)


def hang(*_: Any) -> None:
    """Never end."""
    time.sleep(600)
