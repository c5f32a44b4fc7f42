"""Try which nodes of a graph stay fp32, and measure what that does to the answers.

A trial writes the graph, emulates it and runs a few images: about 3 s for a ViT-S on one core. So
each choice is run once on each image, and the trials are counted.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any, NoReturn

import numpy as np
import onnx
from numpy.typing import NDArray

from deploy.bundle.manifest import Tolerance
from deploy.errors import CheckFailedError
from deploy.measure.compare import compare
from export.onnx_file.run_onnx import run_batches
from export.precision.emulate_fp16 import emulate_fp16, locate_nonfinite
from export.precision.half import convertible, write_fp16

__all__ = ["Trials", "fewest", "refuse_nonfinite"]

_SEARCHED_ON = 4  # images; what is found there is judged on all
_MOST = 16  # trials; what has begun is finished
_MEASURED = Tolerance(max_scaled_error=1.0, min_top1_agreement=0.0, reason="measured, not judged")


class Trials:
    """What a graph answers, emulated, with some nodes in fp32.

    Args:
        model: An fp32 ONNX file.
        inputs: (N, ...) real images, as the graph takes them.

    Raises:
        CheckFailedError: The fp32 graph's answers are not finite.
    """

    def __init__(self, model: bytes, inputs: NDArray[Any]) -> None:
        self.proto = onnx.load_model_from_string(model)
        self.candidates = convertible(self.proto)
        self.inputs, self._reference = inputs, run_batches(model, inputs)
        self._answers: dict[frozenset[str], dict[int, NDArray[np.float32]]] = {}
        if not np.isfinite(self._reference).all():
            refuse_nonfinite(locate_nonfinite(model, inputs) or "", "fp32")

    @property
    def are_spent(self) -> bool:
        """Whether no more choices should be tried."""
        return len(self._answers) >= _MOST

    def in_order(self, names: Collection[str]) -> list[str]:
        """Return the names of nodes in the graph's order."""
        return [name for name in self.candidates if name in names]

    def write(self, single: Collection[str]) -> bytes:
        """Return the file in which these nodes stay fp32."""
        half = [name for name in self.candidates if name not in single]
        return bytes(write_fp16(self.proto, half).SerializeToString(deterministic=True))

    def error(self, single: frozenset[str], images: Collection[int] | None = None) -> float:
        """Return the scaled error; infinite if an answer is not finite.

        Args:
            single: The nodes that stay fp32.
            images: The images that are asked; None for all. The error is scaled to the range of
                the answers on all in any case.

        Raises:
            BadInputError: The fp32 graph's answers are all the same number.
        """
        asked = range(len(self.inputs)) if images is None else images
        known = self._answers.setdefault(single, {})
        missing = [i for i in asked if i not in known]
        if missing:
            answers = run_batches(emulate_fp16(self.write(single)), self.inputs[missing])
            known |= dict(zip(missing, answers, strict=True))
        actual = self._reference.copy()
        for i in asked:
            actual[i] = known[i]
        return compare(actual, self._reference, _MEASURED).max_scaled_error

    def worst_images(self, single: frozenset[str]) -> list[int]:
        """Return the few images with the largest errors, those that are not finite first."""
        self.error(single)
        errors = [
            np.nan_to_num(abs(self._answers[single][i] - reference).max(), nan=np.inf)
            for i, reference in enumerate(self._reference)
        ]
        return sorted(range(len(errors)), key=lambda i: -errors[i])[:_SEARCHED_ON]


def fewest(names: Sequence[str], is_enough: Callable[[frozenset[str]], bool]) -> frozenset[str]:
    """Return a small part of the names that is enough; all of them are.

    Halves are left out while what remains is enough, then quarters, and so on to single ones
    (delta debugging): about 2 log n trials when few matter, and up to 2 n when most do.
    """
    kept, size = list(names), len(names) // 2
    while size:
        start = 0
        while start < len(kept):
            rest = kept[:start] + kept[start + size :]
            if rest and is_enough(frozenset(rest)):
                kept = rest
            else:
                start += size
        size //= 2
    return frozenset(kept)


def refuse_nonfinite(node: str, precision: str) -> NoReturn:
    """Raise a CheckFailedError that names a node."""
    raise CheckFailedError(
        f"a model answers with finite numbers in {precision}",
        found=f"the first that is not finite comes from '{node}'",
        remedy="look at this module's weights and activations; or export fp32 only",
    )
