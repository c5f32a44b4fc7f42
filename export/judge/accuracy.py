"""Whether a variant may be shipped: its net loss of accuracy against a gate.

    fp32  no answer differs, but where the reference itself hardly prefers one
    fp16  a net loss of at most 0.1 points on 2,000 images or more; on fewer, none
    int8  a net loss of at most 0.5 points, or 1 % of the reference's accuracy if that is more

The gate is on the net loss that was measured. Whether so many images are enough to say so is
another question: a variant is certified if the interval of its net loss ends within the gate, or
within 0.1 points where the gate is narrower: no number of images shows that nothing is lost.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from deploy.errors import BadInputError
from deploy.measure.paired import PairedAccuracy, count_needed
from export.targets import Precision

__all__ = ["GateVerdict", "judge_accuracy", "parse_gates"]

_FP16_LIMIT, _FP16_COUNT = 0.001, 2000
_INT8_LIMIT, _INT8_SHARE = 0.005, 0.01
_ROUNDING = 1e-9  # of a limit: 0.01 * 0.7 is less than 7 / 1000 in float64


@dataclass(frozen=True)
class GateVerdict:
    """What a gate says of a variant.

    Attributes:
        precision: Of the variant.
        limit: The largest net loss, as a share of the images, that passes.
        is_overridden: Whether the limit was given by hand.
        passed: Whether the measured net loss is within it.
        certified: Whether the whole interval is, or within 0.1 points.
        text: All of it in a line.
    """

    precision: Precision
    limit: float
    is_overridden: bool
    passed: bool
    certified: bool
    text: str

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return dataclasses.asdict(self)


def judge_accuracy(
    precision: Precision,
    paired: PairedAccuracy,
    *,
    override: float | None = None,
    measure: str = "top-1",
) -> GateVerdict:
    """Judge a variant's answers by the gate of its precision, or by another limit.

    Args:
        precision: Of the variant.
        paired: Its answers beside the reference's.
        override: The largest net loss, as a share of the images, in place of the gate. It takes the
            place of fp32's rule about single answers, too.
        measure: What to call the accuracy.
    """
    limit = _limit(precision, paired) if override is None else override
    passed, rule = _passes(precision, paired, override, limit)
    # Fewer images than it takes to see 0.1 points must show no loss; to certify is to see them.
    goal = max(limit, _FP16_LIMIT)
    certified = passed and paired.interval[1] <= goal
    low, high = (100 * end for end in paired.interval)
    text = (
        f"{precision}: {measure} {paired.top1:.2%} (reference {paired.reference_top1:.2%}) on "
        f"{paired.count:,} images, {paired.lost} lost, {paired.gained} gained, {paired.ties} ties; "
        f"net loss {100 * paired.net_loss:.2f} points [{low:.2f}, {high:.2f}]; {rule}; "
        f"{_word(paired, goal, passed=passed, certified=certified)}"
    )
    return GateVerdict(precision, limit, override is not None, passed, certified, text)


def _passes(
    precision: Precision, paired: PairedAccuracy, override: float | None, limit: float
) -> tuple[bool, str]:
    """Apply the rule, and say it."""
    if precision == "fp32" and override is None:
        differing = paired.flips - paired.ties
        return differing == 0, f"no answer may differ but ties: {differing} do"
    by_hand = "" if override is None else " (set by hand)"
    passed = paired.net_loss <= limit * (1 + _ROUNDING)
    return passed, f"at most {100 * limit:.2f} points{by_hand}"


def _word(paired: PairedAccuracy, goal: float, *, passed: bool, certified: bool) -> str:
    points = f"{100 * goal:.2f} points"
    if not passed:
        return "FAILED"
    if certified:
        return f"certified within {points}"
    needed = count_needed(goal, discordant=(paired.lost + paired.gained) / paired.count)
    if needed > paired.count:
        return f"n too small to certify {points} (about {needed:,} images do, at no net loss)"
    # So many would do at no net loss: it is the loss that leaves the interval no room.
    return f"not certified: the interval ends beyond {points}"


def _limit(precision: Precision, paired: PairedAccuracy) -> float:
    if precision == "int8":
        return max(_INT8_LIMIT, _INT8_SHARE * paired.reference_top1)
    if precision == "fp16" and paired.count >= _FP16_COUNT:
        return _FP16_LIMIT
    return 0.0


def parse_gates(text: str) -> Mapping[Precision, float]:
    """Read limits such as "int8=0.01,fp16=0.002", as shares of the images.

    Raises:
        BadInputError: A part is no such limit, or a precision is named twice.
    """
    gates: dict[Precision, float] = {}
    known: tuple[Precision, ...] = get_args(Precision)
    for part in text.split(","):
        name, _, number = (piece.strip() for piece in part.partition("="))
        precision = next((each for each in known if each == name), None)
        limit = _share(number)
        if precision is None or precision in gates or limit is None:
            nearest = difflib.get_close_matches(name, known, n=1) if precision is None else []
            raise BadInputError(
                f"a gate is {'|'.join(known)}=SHARE, each once, with a share from 0 to 1",
                found=f"'{part}'" + (", the second of its precision" if precision in gates else ""),
                remedy=(f"did you mean {nearest[0]}? " if nearest else "")
                + "such as --gate int8=0.01 for a net loss of at most one point",
            )
        gates[precision] = limit
    return gates


def _share(text: str) -> float | None:
    try:
        share = float(text)
    except ValueError:
        return None
    return share if 0 <= share <= 1 else None
