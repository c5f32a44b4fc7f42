"""What the comparison of a file's tensors with a model's modules came to: as JSON, as a table."""

import math
from dataclasses import dataclass
from typing import Any

from deploy.terminal import table

__all__ = ["ModuleDiff", "ModuleRow"]


@dataclass(frozen=True)
class ModuleRow:
    """One call of a module.

    Attributes:
        module: Its name, with #2 and so on when it is called again.
        kind: Its class.
        tensor: The tensor of the file that carries its output; None if there is none.
        error: Largest difference over the range of the output; infinite if the file's is not
            finite; None if nothing was compared.
        peak: The largest magnitude of the output in PyTorch.
        is_lost: Whether the simplified graph has the output, and the file should have it as well.
    """

    module: str
    kind: str
    tensor: str | None
    error: float | None
    peak: float
    is_lost: bool


@dataclass(frozen=True)
class ModuleDiff:
    """Every module's output beside that of a file, in the order of the computation.

    Attributes:
        rows: One for each call of a module.
        limit: The scaled error at which they part.
        output_error: Of the model's own output.
    """

    rows: tuple[ModuleRow, ...]
    limit: float
    output_error: float

    @property
    def parting(self) -> ModuleRow | None:
        """The first module at which model and file part; None if the outputs agree."""
        if self.output_error <= self.limit:
            return None
        return next((row for row in self.rows if row.is_lost or _exceeds(row, self.limit)), None)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; an infinite error is None beside "is_finite": false."""
        parting = self.parting
        return {
            "limit": self.limit,
            "output_error": _finite(self.output_error),
            "parting": None if parting is None else parting.module,
            "modules": [
                {
                    "module": row.module,
                    "kind": row.kind,
                    "tensor": row.tensor,
                    "error": None if row.error is None else _finite(row.error),
                    "is_finite": row.error != math.inf,
                    "peak": row.peak,
                    "is_lost": row.is_lost,
                }
                for row in self.rows
            ],
        }

    def to_text(self) -> str:
        """Return a table, and the verdict as its last line."""
        cells = [("module", "class", "peak", "error")]
        for row in self.rows:
            error = "not in the file" if row.error is None else _shown(row.error)
            if row.is_lost:
                error = "LOST"
            cells.append((row.module, row.kind, f"{row.peak:.3g}", error))
        return f"{table(cells, left=2)}\n{self._verdict()}"

    def _verdict(self) -> str:
        errors = [row.error for row in self.rows if row.error is not None]
        if self.output_error <= self.limit:
            worst = _shown(max(errors, default=0.0))
            return (
                f"they do not part: output error {_shown(self.output_error)}, at most {worst} at "
                f"{len(errors)} modules (limit {self.limit:g})"
            )
        parting = self.parting
        if parting is None:
            return (
                f"they part after the last module, in the model's own code: output error "
                f"{_shown(self.output_error)} (limit {self.limit:g})"
            )
        before = self.rows[: self.rows.index(parting)]
        agreed = max((row.error for row in before if row.error is not None), default=0.0)
        what = (
            "no tensor of the file has its output"
            if parting.error is None
            else f"scaled error {_shown(parting.error)}"
        )
        return (
            f"they part at {parting.module} ({parting.kind}): {what} (limit {self.limit:g}); the "
            f"modules before it agree within {_shown(agreed)}"
        )


def _exceeds(row: ModuleRow, limit: float) -> bool:
    return row.error is not None and row.error > limit


def _shown(error: float) -> str:
    return f"{error:.1e}" if math.isfinite(error) else "not finite"


def _finite(error: float) -> float | None:
    return error if math.isfinite(error) else None
