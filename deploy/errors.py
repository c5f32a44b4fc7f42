"""The errors of export and deploy.

    DeployError                 anything that a user can act on
    ├── BadInputError           exit 2: wrong use, or an input that cannot be read
    └── CheckFailedError        exit 1: the input was fine, a check on it failed
        └── TamperedBundleError a file of a bundle is not the one that was written

An error states the rule, what was found and the remedy, in this order. A failed check is not a
wrong argument: scripts tell them apart by the exit code.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

__all__ = [
    "BadInputError",
    "CheckFailedError",
    "DeployError",
    "ExplainedError",
    "TamperedBundleError",
]


class ExplainedError(Exception):
    """The root that this tree shares with the training side's: a rule, what was found, a remedy.

    Args:
        rule: What must hold, as a sentence without a full stop.
        found: What was found instead.
        remedy: What the user can do about it.
    """

    exit_code = 2

    def __init__(self, rule: str, *, found: str, remedy: str) -> None:
        self.rule, self.found, self.remedy = rule, found, remedy
        super().__init__(f"{rule}; found: {found}; remedy: {remedy}")

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        """Cross a process boundary whole: by default only positional arguments do."""
        return partial(type(self), found=self.found, remedy=self.remedy), (self.rule,)


class DeployError(ExplainedError):
    """Anything in export or deploy that a user can act on."""


class BadInputError(DeployError):
    """Wrong use, or an input that cannot be read."""

    exit_code = 2


class CheckFailedError(DeployError):
    """A check on a readable input failed."""

    exit_code = 1


class TamperedBundleError(CheckFailedError):
    """A bundle's file is missing, unlisted, or differs from the one that was written."""
