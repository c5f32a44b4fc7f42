"""Find the module at which an export parts from its model, and say so by name.

The model runs in float64, the file with every tensor laid open, both on the same images. Which
tensor carries which module's value is looked up in a sound file, the fp32 export, whose names the
fp16 and the int8 file keep. Without one it is looked up in the file itself, and the names end where
the file goes wrong: that is then the answer.

A module is judged by the error scaled to its value's range. Errors add up on the way, so it is the
first one beyond a limit that tells, not the largest.
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from torch import Tensor, nn

from deploy.bundle.manifest import Tolerance
from deploy.errors import BadInputError
from deploy.measure.compare import compare
from deploy.terminal import printable, table
from export.counterparts import (
    Call,
    Counterpart,
    Lookup,
    computed_floats,
    find_counterparts,
    module_values,
    tensor_values,
)
from export.emulate_fp16 import locate_nonfinite
from export.targets import Precision

__all__ = ["LIMITS", "ModuleDiff", "ModuleError", "Parting", "compare_modules"]

LIMITS: dict[Precision, float] = {"fp32": 1e-3, "fp16": 0.02, "int8": 0.1}


@dataclass(frozen=True)
class ModuleError:
    """How far one module's value is from the model's.

    Attributes:
        module: Its name; with `(call 2)` or `[1]` for a further call or output of it.
        kind: Its class.
        node: The node of the file that makes the value, MODULE/OPERATOR; None where there is none.
        note: Why there is none: folded into another module, constant, not in the graph.
        scaled_error: max |file - model| / range of the model's, the largest of all images; infinite
            if a value is not finite, None where nothing is compared.
        max_abs: max |value| in the model.
        finite: Whether every value in the file is finite; None where nothing is compared.
    """

    module: str
    kind: str
    node: str | None
    note: str
    scaled_error: float | None
    max_abs: float
    finite: bool | None


@dataclass(frozen=True)
class Parting:
    """Where file and model part.

    Attributes:
        module: The first module whose value is wrong.
        node: The node that makes it. Its name may be that of a module that was folded.
        scaled_error: Of the value; None if the value was not found in the file.
        before: The largest scaled error among the modules before.
    """

    module: str
    node: str
    scaled_error: float | None
    before: float


@dataclass(frozen=True)
class ModuleDiff:
    """A file beside its model, module by module.

    Attributes:
        modules: Every call of every module, in the order in which the calls end.
        parting: Where they part; None if they do not.
        first_nonfinite: The first node that makes NaN or infinity; None if none does.
        limit: The scaled error beyond which they are said to part.
        count: How many images were compared.
    """

    modules: tuple[ModuleError, ...]
    parting: Parting | None
    first_nonfinite: str | None
    limit: float
    count: int

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; an infinite error is None."""
        return {
            "parting": None if self.parting is None else _plain(self.parting),
            "first_nonfinite": self.first_nonfinite,
            "limit": self.limit,
            "count": self.count,
            "modules": [_plain(module) for module in self.modules],
        }

    def to_text(self) -> str:
        """Return a table of the modules, then where they part, as a sentence."""
        rows = [("module", "kind", "in the file", "scaled error", "max |value|")]
        rows += [
            (m.module, m.kind, m.node or m.note, _error(m.scaled_error), f"{m.max_abs:.3g}")
            for m in self.modules
        ]
        return "\n".join([table(rows, left=3), *map(printable, self._verdict())])

    def _verdict(self) -> Iterator[str]:
        if self.first_nonfinite is not None:
            yield f"the first that is not finite comes from {self.first_nonfinite}"
        if self.parting is None:
            worst = max((m.scaled_error for m in self.modules if m.scaled_error), default=0.0)
            yield (
                f"they do not part: every module agrees within {worst:.2g} (limit {self.limit:g}), "
                f"on {self.count} images"
            )
            return
        parting = self.parting
        error = (
            "from there on the file has none of the model's values"
            if parting.scaled_error is None
            else f"scaled error {_error(parting.scaled_error)} (limit {self.limit:g})"
        )
        yield (
            f"they part at {parting.module} ({parting.node}): {error}; "
            f"the modules before it agree within {parting.before:.2g}"
        )


def compare_modules(
    model: nn.Module,
    file: bytes,
    inputs: Tensor,
    *,
    precision: Precision,
    sound: bytes | None = None,
    limit: float | None = None,
) -> ModuleDiff:
    """Compare an exported file with its model, module by module.

    Args:
        model: A classifier as it was before the simplification. It is not changed.
        file: An ONNX file of it; fp16 is emulated, int8 computed as Q/DQ say.
        inputs: (N, 3, H, W) images, pre-processed, at least two different ones; a few suffice.
        precision: Of the file; gives the limit.
        sound: An fp32 file with the same names, in which the modules' values are looked up; None to
            look them up in `file`, where what is not within the limit is then not found.
        limit: The scaled error beyond which a module is said to part; None for that of LIMITS.

    Raises:
        BadInputError: There are no two different images, or the sound file does not answer as the
            model does.
    """
    _check_images(inputs)
    limit = LIMITS[precision] if limit is None else limit
    if sound is None:
        lookup = find_counterparts(model, file, inputs[:2], tolerance=limit)
    else:
        lookup = find_counterparts(model, sound, inputs[:2])
        if lookup.stray is not None:
            raise BadInputError(
                "modules are looked up in a file that answers as the model does",
                found=f"a sound file that is wrong from {lookup.stray} on",
                remedy="give the fp32 export of this model and these weights",
            )
    rows = _rows(model, file, inputs, lookup, sound=sound or file)
    return ModuleDiff(
        modules=rows,
        parting=_parting(rows, lookup, limit),
        first_nonfinite=locate_nonfinite(file, inputs.cpu().float().numpy()),
        limit=limit,
        count=len(inputs),
    )


def _rows(
    model: nn.Module, file: bytes, inputs: Tensor, lookup: Lookup, *, sound: bytes
) -> tuple[ModuleError, ...]:
    """Compare every call with its counterpart, image by image, and keep the worst."""
    protos = onnx.load_model_from_string(sound), onnx.load_model_from_string(file)
    in_file = {*computed_floats(protos[1])}
    outputs = {value.name for value in protos[1].graph.output}
    wanted = {counterpart.tensor for counterpart in lookup.found.values()}
    names = sorted(in_file.intersection(wanted | outputs))
    rows: dict[Call, ModuleError] = {}
    images = zip(
        module_values(model, inputs),
        tensor_values(protos[0], inputs, names),
        tensor_values(protos[1], inputs, names),
        strict=True,
    )
    for values, originals, tensors in images:
        for call, value in values.items():
            counterpart, note = lookup.found.get(call), lookup.missing.get(call, "")
            if counterpart is not None and counterpart.tensor not in in_file:
                counterpart, note = None, "not in this file"
            row = ModuleError(
                module=str(call),
                kind=call.kind,
                node=counterpart and counterpart.node,
                note=note,
                scaled_error=None,
                max_abs=float(np.abs(value).max()),
                finite=None,
            )
            if counterpart is not None:
                original = originals[counterpart.tensor]
                row = _judged(row, tensors[counterpart.tensor], value, original, counterpart)
            rows[call] = _worse(rows.get(call, row), row)
    return tuple(rows.values())


def _judged(
    row: ModuleError,
    actual: NDArray[Any],
    value: NDArray[np.float64],
    original: NDArray[Any],
    counterpart: Counterpart,
) -> ModuleError:
    """Compare a value with a tensor, paired as the numbers of the sound file's tensor are."""
    actual, value = actual.ravel(), value.ravel()
    if counterpart.is_permuted:
        actual = actual[np.argsort(original, axis=None, kind="stable")]
        value = np.sort(value)
    if not np.ptp(value) > 0:  # on another image than those of the lookup
        return row
    found = compare(actual, value, _ANY)
    return dataclasses.replace(row, scaled_error=found.max_scaled_error, finite=found.finite)


_ANY = Tolerance(max_scaled_error=1.0, min_top1_agreement=0.0, reason="measured, not judged")


def _worse(row: ModuleError, other: ModuleError) -> ModuleError:
    errors = [e for e in (row.scaled_error, other.scaled_error) if e is not None]
    flags = [f for f in (row.finite, other.finite) if f is not None]
    return dataclasses.replace(
        row,
        scaled_error=max(errors, default=None),
        max_abs=max(row.max_abs, other.max_abs),
        finite=all(flags) if flags else None,
    )


def _parting(rows: tuple[ModuleError, ...], lookup: Lookup, limit: float) -> Parting | None:
    before = 0.0
    for row in rows:
        if row.node is None or row.scaled_error is None:
            continue
        if row.scaled_error > limit:
            return Parting(row.module, row.node, row.scaled_error, before)
        before = max(before, row.scaled_error)
    if lookup.stray is None:
        return None
    module = lookup.stray.rpartition("/")[0] or "the model itself"
    return Parting(module, lookup.stray, None, before)


def _check_images(inputs: Tensor) -> None:
    if len(inputs) < 2 or bool((inputs[0] == inputs[1]).all()):
        raise BadInputError(
            "the modules' values are looked up on two different images",
            found=f"{len(inputs)} images, of which the first two are equal"
            if len(inputs) > 1
            else f"{len(inputs)} images",
            remedy="give at least two images, different ones first",
        )


def _error(error: float | None) -> str:
    if error is None:
        return ""
    return f"{error:.2g}" if math.isfinite(error) else "not finite"


def _plain(value: ModuleError | Parting) -> dict[str, Any]:
    return {
        key: None if isinstance(item, float) and not math.isfinite(item) else item
        for key, item in dataclasses.asdict(value).items()
    }
