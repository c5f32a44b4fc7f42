"""Four kinds of dropout, as a recipe writes them; placement.py puts them into a model.

    dropout            each value on its own             Srivastava et al., JMLR 15, 2014
    spatial_dropout    whole channels of a map           Tompson et al., 1411.4280, section 3.2
    drop_block         squares of a map                  Ghiasi et al., 1810.12890, algorithm 1
    stochastic_depth   a sample's whole residual branch  Huang et al., 1603.09382, section 3

All scale what they keep, so that the mean is kept and nothing is left to do in evaluation.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_type_hints

from torch import nn

from edgereg.augment.options import checked
from edgereg.errors import RecipeError, check_settings, nearest

__all__ = [
    "REGULARIZERS",
    "DropBlock",
    "Dropout",
    "Regularizer",
    "Schedule",
    "SpatialDropout",
    "StochasticDepth",
    "build_regularizers",
]

Schedule = Literal["constant", "linear", "early", "late"]


@dataclass(frozen=True)
class Regularizer:
    """What the kinds have in common.

    Args:
        rate: Share that is dropped, in [0, 1).
        where: A named place of the model; see placement.py.
        schedule: The rate's course over the run: "constant"; "linear", from 0 at the start to the
            rate at the end (1810.12890, section 3); "early", the rate and then 0, against
            underfitting, or "late", 0 and then the rate (both Liu et al., 2303.01500).
        until: Share of the run after which "early" ends or "late" begins, in (0, 1).
    """

    rate: float
    where: str = "head"
    schedule: Schedule = "constant"
    until: float = 0.5

    def __post_init__(self) -> None:
        check_settings(
            self,
            "",
            {
                "rate": ("in [0, 1)", 0 <= self.rate < 1),
                "until": ("in (0, 1)", 0 < self.until < 1),
            },
        )

    def rate_at(self, share: float) -> float:
        """Return the rate when a share of the run is done, in [0, 1]."""
        if self.schedule == "linear":
            return self.rate * share
        is_on = {"constant": True, "early": share < self.until, "late": share >= self.until}
        return self.rate if is_on[self.schedule] else 0.0

    def part(self, block: int, blocks: int) -> float:
        """Return the part of the rate, in [0, 1], that one of several blocks gets.

        Args:
            block: From 1.
            blocks: How many.
        """
        return 1.0

    def build(self) -> nn.Module:
        """Return a module that drops at the rate `p`, which is 0 at first."""
        return nn.Dropout(0.0)


@dataclass(frozen=True)
class Dropout(Regularizer):
    """Drop each value on its own: y = x m / (1 - p), m ~ Bernoulli(1 - p)."""


@dataclass(frozen=True)
class SpatialDropout(Regularizer):
    """Drop whole channels of a map, whose values are too alike to be dropped one by one."""

    where: str = "stages"

    def build(self) -> nn.Module:
        """Return a module for (B, C, H, W)."""
        return nn.Dropout2d(0.0)


@dataclass(frozen=True)
class DropBlock(Regularizer):
    """Drop squares of a map, each channel its own.

    Args:
        block: Side of a square, odd, in places of the map; on a smaller map, the largest odd side
            that fits.
    """

    where: str = "last_stages"
    schedule: Schedule = "linear"
    block: int = 7

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(self, "", {"block": ("odd", self.block % 2 == 1)})

    def build(self) -> nn.Module:
        """Return a module for (B, C, H, W)."""
        from edgereg.regularize.squares import DropSquares  # torchvision takes 1 s to import

        return DropSquares(self.block)


@dataclass(frozen=True)
class StochasticDepth(Regularizer):
    """Drop a residual branch, for each sample on its own.

    Args:
        rule: "linear", p_l = l / L * rate for block l of L (1603.09382, eq. 4), or "uniform".
    """

    where: str = "residual"
    rule: Literal["linear", "uniform"] = "linear"

    def part(self, block: int, blocks: int) -> float:
        """Return l / L, or 1."""
        return block / blocks if self.rule == "linear" else 1.0

    def build(self) -> nn.Module:
        """Return a module for (B, ...)."""
        from torchvision import ops  # 1 s to import

        drop: nn.Module = ops.StochasticDepth(0.0, "row")
        return drop


REGULARIZERS: dict[str, type[Regularizer]] = {
    "dropout": Dropout,
    "spatial_dropout": SpatialDropout,
    "drop_block": DropBlock,
    "stochastic_depth": StochasticDepth,
}


def build_regularizers(steps: Any, *, key: str = "regularize") -> tuple[Regularizer, ...]:
    """Build the list of a recipe, such as `[{dropout: {rate: 0.2, where: head}}]`.

    Args:
        steps: One mapping a step: the kind's name to its options.
        key: The recipe's key, for the error.

    Raises:
        RecipeError: An unknown name or option (the nearest is given), or a value that cannot be.
    """
    if not isinstance(steps, Sequence) or isinstance(steps, str):
        raise RecipeError(
            "the regularizers are a list",
            found=f"{key}: {steps!r}",
            remedy="write `- dropout: {rate: 0.2}` below it, for instance",
        )
    return tuple(_build(step, f"{key}[{n}]") for n, step in enumerate(steps))


def _build(step: Any, key: str) -> Regularizer:
    if not isinstance(step, Mapping) or len(step) != 1:
        raise RecipeError(
            "a step is one kind of dropout's name and its options",
            found=f"{key}: {step!r}",
            remedy="write `- dropout: {rate: 0.2, where: head}`, for instance",
        )
    ((name, options),) = step.items()
    if name not in REGULARIZERS:
        raise RecipeError(
            "a kind of dropout must be known",
            found=f"{key}: '{name}'",
            remedy=nearest(str(name), REGULARIZERS),
        )
    kind, key = REGULARIZERS[name], f"{key}.{name}"
    if not isinstance(options, Mapping) or "rate" not in options:
        raise RecipeError(
            f"{name} needs a rate",
            found=f"{key}: {options!r}",
            remedy=f"write `- {name}: {{rate: 0.1}}`",
        )
    types = get_type_hints(kind)
    known = [field.name for field in dataclasses.fields(kind)]
    for option in options:
        if option not in known:
            raise RecipeError(
                f"an option of {name} must be known",
                found=f"{key}.{option}",
                remedy=nearest(str(option), known),
            )
    values = {o: checked(value, types[o], f"{key}.{o}") for o, value in options.items()}
    try:
        return kind(**values)
    except RecipeError as error:
        raise RecipeError(error.rule, found=f"{key}.{error.found}", remedy=error.remedy) from None
