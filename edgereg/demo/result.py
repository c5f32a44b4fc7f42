"""Everything that the demo measured, and how it is told in words and in JSON."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deploy.measure.bench import BenchResult
from deploy.measure.verify import VerifyReport
from edgereg.demo.jobs import JobResult

__all__ = ["OTHER", "SAME", "DemoResult"]

SAME, OTHER = "emoji-10:twitter:test", "emoji-10:google:test"


@dataclass(frozen=True)
class DemoResult:
    """Everything that the report shows.

    Args:
        out: Where it was written.
        quick: Whether the runs were cut short: then only the direction of the two CNNs counts.
        training: The training jobs' results by name.
        exports: The export jobs' results by bundle name.
        verified: Each bundle's verification.
        benched: The timings of the bundles for this kind of machine.
        predictions: A few images and what the CNN's bundle said, as (data URI, true class, answer).
        machine: Processor, cores and versions.
        seconds: How long each stage took.
    """

    out: Path
    quick: bool
    training: dict[str, JobResult]
    exports: dict[str, JobResult]
    verified: dict[str, VerifyReport]
    benched: dict[str, BenchResult]
    predictions: tuple[tuple[str, str, str], ...]
    machine: dict[str, str]
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether every bundle answers as its model does, in the timed runs too."""
        return all(report.passed for report in self.verified.values()) and all(
            result.check.passed for result in self.benched.values()
        )

    def top1(self, job: str, data: str) -> float:
        """Return a trained model's accuracy on a data set, in [0, 1]."""
        value: float = self.training[job].figures["tests"][data]["top1"]
        return value

    def to_json(self) -> dict[str, Any]:
        """Return the figures as JSON values."""
        return {
            "report": str(self.out / "report.html"),
            "passed": self.passed,
            "quick": self.quick,
            "training": {n: _without_history(r.figures) for n, r in self.training.items()},
            "exports": {name: result.figures for name, result in self.exports.items()},
            "verified": {name: report.passed for name, report in self.verified.items()},
            "median_ms": {
                name: result.summaries_ms()["end to end"].percentiles["p50"]
                for name, result in self.benched.items()
            },
            "machine": self.machine,
            "seconds": self.seconds,
        }

    def to_text(self) -> str:
        """Return the figures that a person looks for first."""
        lines = [f"{'':18} {'same vendor':>12} {'other vendor':>13}   (top-1 on held-out glyphs)"]
        lines += [
            f"{name:18} {self.top1(name, SAME):>12.1%} {self.top1(name, OTHER):>13.1%}"
            for name, result in sorted(self.training.items())
            if "tests" in result.figures
        ]
        gain = self.top1("cnn-regularized", OTHER) - self.top1("cnn-plain", OTHER)
        lines.append(f"regularization: {100 * gain:+.1f} points on the other vendor's drawings")
        lines += [
            f"{name:22} {'verified' if report.passed else 'NOT VERIFIED'}; "
            f"parser and builder: {self.exports[name].figures['verdict']}"
            for name, report in self.verified.items()
        ]
        if self.quick:
            lines.append("a quick run: only the direction of the two CNNs means something")
        lines.append(f"{sum(self.seconds.values()):.0f} s in all; open {self.out / 'report.html'}")
        return "\n".join(lines)


def _without_history(figures: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in figures.items() if key not in ("history", "checkpoint")}
