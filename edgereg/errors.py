"""The errors of the training side; torch-free, so that the command line can name them at no cost.

    EdgeregError            anything that a user can act on; exit 2
    ├── DataError           a data set that is empty, damaged or does not match
    ├── RecipeError         an unknown or impossible setting, named by its key
    ├── CheckpointError     a checkpoint that cannot be read or belongs to another model
    └── TrainingError       exit 1: the training went wrong, though its input was fine

An error states the rule, what was found and the remedy, in this order.
"""

import difflib
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

__all__ = [
    "CheckpointError",
    "DataError",
    "EdgeregError",
    "RecipeError",
    "TrainingError",
    "nearest",
]


class EdgeregError(Exception):
    """An error with a rule, what was found, and a remedy."""

    exit_code = 2

    def __init__(self, rule: str, *, found: str, remedy: str) -> None:
        self.rule, self.found, self.remedy = rule, found, remedy
        super().__init__(f"{rule}; found: {found}; remedy: {remedy}")

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        """Cross a process boundary whole: by default only positional arguments do."""
        return partial(type(self), found=self.found, remedy=self.remedy), (self.rule,)


class DataError(EdgeregError):
    """A data set that is empty, damaged or does not match."""


class RecipeError(EdgeregError):
    """An unknown or impossible setting."""


class CheckpointError(EdgeregError):
    """A checkpoint that cannot be read or belongs to another model."""


class TrainingError(EdgeregError):
    """The training went wrong, though its input was fine."""

    exit_code = 1


def nearest(word: str, known: Iterable[str]) -> str:
    """Return the remedy for an unknown word: the nearest known one, or all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"choose one of: {', '.join(known)}"
