"""What the zoo's rows add up to, and what is wanted of them."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from zoo_row import NOT_RUN, STATUSES

__all__ = ["RESNET50", "Row", "Summary", "gates", "summarize"]

Row = Mapping[str, Any]

RESNET50 = "torchvision/resnet50 at 224 px"
_RESNET50_S = 5.0
_SIMPLIFIED = 0.99
_ARCHITECTURES, _FAMILIES, _ONNX_FAMILIES = 300, 60, 60


@dataclass(frozen=True)
class Summary:
    """What the rows add up to.

    Args:
        counts: Architectures by status.
        timm: Architectures of timm that ran.
        timm_families: Their families.
        planted: Families with a planted wrong fold.
        caught: Those where the proof found it.
        exported: Families with an ONNX file.
        same: Those whose files all give the same answers, and have no BatchNormalization that the
            report does not name.
        resnet50_s: Seconds for ResNet-50, None if it was not timed.
    """

    counts: Mapping[str, int]
    timm: int
    timm_families: int
    planted: int
    caught: int
    exported: int
    same: int
    resnet50_s: float | None

    @property
    def run(self) -> int:
        """How many architectures ran: all but those for which memory or time did not suffice."""
        return sum(n for status, n in self.counts.items() if status not in NOT_RUN)

    @property
    def simplified(self) -> float:
        """The share of them that was simplified."""
        return self.counts["simplified"] / self.run if self.run else 0.0

    def to_text(self) -> str:
        """Return the figure as a line."""
        counts = ", ".join(f"{self.counts[status]} {status}" for status in STATUSES)
        time = "" if self.resnet50_s is None else f"; ResNet-50 {self.resnet50_s:.1f} s on one core"
        return (
            f"{self.simplified:.1%} of {self.run} simplified ({counts}); planted wrong folds "
            f"caught in {self.caught} of {self.planted} families; ONNX the same in {self.same} of "
            f"{self.exported}{time}"
        )


def summarize(rows: Iterable[Row]) -> Summary:
    """Add the rows up."""
    rows = list(rows)
    timed = [row for row in rows if row["name"] == RESNET50 and row["status"] == "simplified"]
    table = [row for row in rows if row["name"] != RESNET50]
    timm = [row for row in table if row["family"].startswith("timm/")]
    timm = [row for row in timm if row["status"] not in NOT_RUN]
    planted = _by_family(table, "plant")
    exported = _by_family(table, "onnx")
    return Summary(
        counts=Counter(row["status"] for row in table),
        timm=len(timm),
        timm_families=len({row["family"] for row in timm}),
        planted=len(planted),
        caught=sum(all(plant["is_caught"] for plant in plants) for plants in planted.values()),
        exported=len(exported),
        same=sum(not any(file["problem"] for file in files) for files in exported.values()),
        resnet50_s=timed[0]["seconds"] if timed else None,
    )


def gates(summary: Summary, *, families: int | None) -> dict[str, bool]:
    """Return what is wanted, and whether it is so.

    Args:
        summary: Of the rows.
        families: How many there are; None where only a part was asked for, of which no number of
            architectures is wanted, and no time.
    """
    counts = summary.counts
    wanted = {
        "0 wrong": counts["wrong"] == 0,
        "0 crashed": counts["crashed"] == 0,
        "0 vacuous": counts["vacuous"] == 0,
        f">= {_SIMPLIFIED:.0%} simplified": summary.simplified >= _SIMPLIFIED,
        "every planted wrong fold is caught": summary.caught == summary.planted,
        "every ONNX file gives the same answers": summary.same == summary.exported,
    }
    if families is not None:
        time = summary.resnet50_s
        wanted |= {
            f">= {_ARCHITECTURES} timm architectures": summary.timm >= _ARCHITECTURES,
            f">= {_FAMILIES} timm families": summary.timm_families >= _FAMILIES,
            f"a wrong fold planted in each of {families} families": summary.planted == families,
            f">= {_ONNX_FAMILIES} families as ONNX": summary.exported >= _ONNX_FAMILIES,
            f"ResNet-50 <= {_RESNET50_S:g} s": time is not None and time <= _RESNET50_S,
        }
    return wanted


def _by_family(rows: Iterable[Row], key: str) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for row in rows:
        if key in row:
            found.setdefault(row["family"], []).append(row[key])
    return found
