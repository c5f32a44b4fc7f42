"""The errors of the training side; torch-free, so that the command line can name them at no cost.

    EdgeregError            anything that a user can act on; exit 2
    ├── DataError           a data set that is empty, damaged or does not match
    ├── RecipeError         an unknown or impossible setting, named by its key
    ├── CheckpointError     a checkpoint that cannot be read or belongs to another model
    ├── TrainingError       exit 1: the training went wrong, though its input was fine
    ├── CollapsedError      exit 1: pre-training came to features that no longer differ
    └── StoppedError        exit 75: told to stop, and the state was written

An error states the rule, what was found and the remedy, in this order.
"""

import difflib
from collections.abc import Iterable, Mapping

from deploy.errors import ExplainedError

__all__ = [
    "CheckpointError",
    "CollapsedError",
    "DataError",
    "EdgeregError",
    "RecipeError",
    "StoppedError",
    "TrainingError",
    "check_settings",
    "nearest",
]


class EdgeregError(ExplainedError):
    """Anything on the training side that a user can act on."""


class DataError(EdgeregError):
    """A data set that is empty, damaged or does not match."""


class RecipeError(EdgeregError):
    """An unknown or impossible setting."""


class CheckpointError(EdgeregError):
    """A checkpoint that cannot be read or belongs to another model."""


class TrainingError(EdgeregError):
    """The training went wrong, though its input was fine."""

    exit_code = 1


class CollapsedError(EdgeregError):
    """Pre-training came to features that no longer tell images apart."""

    exit_code = 1


class StoppedError(EdgeregError):
    """A run was told to stop, and its state was written; 75 is sysexits.h's "try again later"."""

    exit_code = 75


def nearest(word: str, known: Iterable[str]) -> str:
    """Return the remedy for an unknown word: the nearest known one, or all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"choose one of: {', '.join(known)}"


def check_settings(config: object, prefix: str, rules: Mapping[str, tuple[str, bool]]) -> None:
    """Refuse a configuration of which a setting is out of its range.

    Args:
        config: Has the settings as attributes.
        prefix: Stands before a setting's name in a recipe, such as "optim.".
        rules: For each setting its range, in words, and whether it is kept.

    Raises:
        RecipeError: The first that is not.
    """
    for key, (allowed, is_kept) in rules.items():
        if not is_kept:
            raise RecipeError(
                f"{prefix}{key} is {allowed}",
                found=f"{prefix}{key}: {getattr(config, key)}",
                remedy="change it; docs/recipes.md names every setting",
            )
