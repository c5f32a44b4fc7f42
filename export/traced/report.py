"""What a pass, and the whole simplification, did: plain data, a bundle's `simplify.json`."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["Change", "Counts", "PassReport", "SimplifyReport", "order_above"]


def order_above(error: float) -> float:
    """Return the smallest power of ten that an error does not exceed; 0 for 0."""
    return float(f"1e{math.ceil(math.log10(error))}") if error else 0.0


@dataclass(frozen=True)
class Change:
    """One site that a pass rewrote, with the promise that makes it provable.

    Args:
        site: The site's module name, or its node's name where it is a functional call.
        what: What was done, as a phrase: "folded into conv1".
        before: A node of the graph before the change.
        after: The node of the graph after it that must have the same value.
        moved: The nodes that the change leaves in the graph with another value than they had,
            beside `after`.
        also: Further nodes whose values must be the same before and after it.
    """

    site: str
    what: str
    before: str
    after: str
    moved: tuple[str, ...] = ()
    also: tuple[str, ...] = ()


@dataclass(frozen=True)
class PassReport:
    """What one pass did.

    Args:
        changed: The sites that it rewrote.
        skipped: Each site that it left as it was, with the reason.
        replaced: Nodes that are no sites, each with the node that has exactly its value now: itself
            where only its operator is another. The proof keeps book of them, nobody reads them.
    """

    changed: tuple[Change, ...] = ()
    skipped: dict[str, str] = field(default_factory=dict)
    replaced: tuple[tuple[str, str], ...] = ()

    @property
    def promises(self) -> tuple[Change, ...]:
        """All that the proof needs, in order; what was replaced has no site's name."""
        return (*(Change("", "", *pair) for pair in self.replaced), *self.changed)


@dataclass(frozen=True)
class Counts:
    """The size of a traced module: nodes that compute, parameter elements, and sites."""

    nodes: int
    parameters: int
    batchnorms: int
    dropouts: int


@dataclass(frozen=True)
class SimplifyReport:
    """What a simplification did, and the float64 evidence that it changed nothing.

    Every error is relative, max|actual - reference| / max|reference|, in float64.

    Args:
        passes: Each pass' report by the pass' name, in the order in which they ran.
        site_errors: The error at each rewritten site, simplified against traced.
        model_error: The error at the outputs, simplified against traced.
        trace_error: The error at the outputs, traced against the model that was handed in.
        batch_sizes: The batch sizes at which the outputs were compared.
        before: The traced module's counts.
        after: The simplified module's counts.
    """

    passes: dict[str, PassReport]
    site_errors: dict[str, float]
    model_error: float
    trace_error: float
    batch_sizes: tuple[int, ...]
    before: Counts
    after: Counts

    @property
    def skipped(self) -> dict[str, str]:
        """Every site that some pass left as it was, with the reason, or the reasons."""
        return _joined(pair for report in self.passes.values() for pair in report.skipped.items())

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values; errors as the power of ten above them.

        The digits of a rounding error depend on the machine and its number of threads, and the same
        model is to give the same file.
        """
        return {
            "passes": {
                name: {
                    "changed": _joined((c.site, c.what) for c in report.changed),
                    "skipped": report.skipped,
                }
                for name, report in self.passes.items()
            },
            "float64_relative_error_below": {
                "sites": {site: order_above(error) for site, error in self.site_errors.items()},
                "model": order_above(self.model_error),
                "trace": order_above(self.trace_error),
                "batch_sizes": list(self.batch_sizes),
            },
            "before": asdict(self.before),
            "after": asdict(self.after),
        }


def _joined(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return what is said of each site; a site can be met by several passes, or twice by one."""
    said: dict[str, list[str]] = {}
    for site, text in pairs:
        texts = said.setdefault(site, [])
        if text not in texts:
            texts.append(text)
    return {site: "; ".join(texts) for site, texts in said.items()}
