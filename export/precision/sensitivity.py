"""Int8 for as many layers as an accuracy allows: the method and the layers are found by measuring.

First the method: each is tried on all layers, and that with the best SQNR of the logits is taken.
If the accuracy then fails, the layers are ranked, by the SQNR with that one layer alone in int8,
and the worst are left in float: one, two, four and so on until the accuracy holds, then fewer again
by bisection. The rank, not the number, is what the SQNR decides: only the accuracy says when to
stop.

Source: Wu et al., "Integer quantization for deep learning inference", arXiv:2004.09602, section 6.
"""

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deploy.errors import CheckFailedError
from export.precision.calibrate import collect_histograms
from export.precision.emulate_int8 import run_emulated, sqnr_db
from export.precision.quantize import layers_of, observed_tensors, write_int8
from export.precision.ranges import METHODS, Method, find_ranges
from export.targets import Scheme

__all__ = ["Quantized", "Trial", "quantize_until"]

_RANKED_ON = 8  # images: layers differ by decibels, images by tenths


@dataclass(frozen=True)
class Trial:
    """One int8 model that was measured.

    Attributes:
        method: How its ranges were chosen.
        left: How many layers were left in float.
        sqnr_db: Of its logits against the float model's, on the held-back images.
        is_good: What the accuracy gate said; None where it was not asked.
    """

    method: Method
    left: int
    sqnr_db: float
    is_good: bool | None


@dataclass(frozen=True)
class Quantized:
    """An int8 model that passed its gate, and how it was found.

    Attributes:
        model: The ONNX file.
        method: How its ranges were chosen.
        layers: How many layers have weights.
        left: The layers in float, the most sensitive first, each with the reason; then those that
            were in float from the start.
        sqnr_db: Of its logits, on the held-back images.
        tried: Every model that was measured, in order.
    """

    model: bytes
    method: Method
    layers: int
    left: dict[str, str]
    sqnr_db: float
    tried: tuple[Trial, ...]


def quantize_until(
    model: bytes,
    batches: Iterable[NDArray[np.float32]],
    *,
    scheme: Scheme,
    held_back: NDArray[np.float32],
    is_good: Callable[[bytes], bool],
    in_float: Mapping[str, str] | None = None,
    methods: Sequence[Method] = METHODS,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> Quantized:
    """Return an int8 model that is good, with as few layers in float as the ranking finds.

    With L layers this writes at most len(methods) + L + 2 log2(L) + 2 models, and asks the gate
    2 log2(L) + 2 times at most; the L only where the gate refuses all layers in int8.

    Args:
        model: A simplified float32 ONNX file, its nodes named MODULE/OPERATOR.
        batches: (N, 3, H, W) pre-processed calibration images; read once, one batch at a time.
        scheme: A key of SCHEMES.
        held_back: (M, 3, H, W) images that no range is fitted to and no accuracy measured on. The
            more, the surer the choice; 16 to 64 will do.
        is_good: The accuracy gate, on validation data. It must not run a graph for a GPU or for
            Arm by the integer kernels of an x86: `run_emulated` does not.
        in_float: Layers that are never in int8, each with the reason; not all of them.
        methods: Those to choose from.
        on_stage: Is told, in a phrase, what was measured.

    Raises:
        BadInputError: The images cannot be used.
        CheckFailedError: No model was good, with all layers but one in float; or the float model
            is not.
    """
    search = _Search(
        model,
        batches,
        scheme=scheme,
        held_back=held_back,
        in_float=in_float or {},
        methods=methods,
        on_stage=on_stage,
    )
    scores = {method: search.measure(method) for method in methods}
    best = max(scores, key=lambda method: scores[method])  # the first of equals
    good = search.ask(best, {}, is_good)
    if good is not None:
        return good

    ranking = search.rank(best)
    limit = len(ranking) - 1  # one layer at least is in int8
    fewest, most = 0, min(1, limit)  # so many are too few; so many are asked about next
    while most > fewest:
        good = search.ask(best, _first(ranking, most), is_good)
        if good is not None:
            break
        fewest, most = most, min(2 * most, limit)
    if good is None:
        raise _failure(search.tried, float_is_good=is_good(model))
    while most - fewest > 1:
        middle = (fewest + most) // 2
        better = search.ask(best, _first(ranking, middle), is_good)
        fewest, most = (middle, most) if better is None else (fewest, middle)
        good = better or good
    return dataclasses.replace(good, tried=tuple(search.tried))


class _Search:
    """What the trials share: the ranges, the float model's logits, the list of the trials."""

    def __init__(
        self,
        model: bytes,
        batches: Iterable[NDArray[np.float32]],
        *,
        scheme: Scheme,
        held_back: NDArray[np.float32],
        in_float: Mapping[str, str],
        methods: Sequence[Method],
        on_stage: Callable[[str], None],
    ) -> None:
        self.model, self.scheme, self.held_back, self.on_stage = model, scheme, held_back, on_stage
        self.in_float = dict(in_float)
        self.total = len(layers_of(model))
        self.layers = tuple(name for name in layers_of(model) if name not in in_float)
        self.tried: list[Trial] = []
        histograms = collect_histograms(model, batches, observed_tensors(model, scheme))
        self.ranges = {method: find_ranges(histograms, method) for method in methods}
        self.reference = run_emulated(model, held_back)

    def write(self, method: Method, left: Collection[str]) -> bytes:
        exclude = {*left, *self.in_float}
        return write_int8(self.model, self.ranges[method], scheme=self.scheme, exclude=exclude)

    def measure(self, method: Method) -> float:
        """Return the SQNR of a method with all layers in int8 that may be."""
        sqnr = sqnr_db(run_emulated(self.write(method, ()), self.held_back), self.reference)
        self.tried.append(Trial(method, len(self.in_float), sqnr, None))
        self.on_stage(f"int8, {method}: {sqnr:.1f} dB")
        return sqnr

    def rank(self, method: Method) -> dict[str, float]:
        """Return the SQNR with each layer alone in int8, the smallest first."""
        images, reference = self.held_back[:_RANKED_ON], self.reference[:_RANKED_ON]
        found = {}
        for i, layer in enumerate(self.layers):
            if i % 10 == 0:
                self.on_stage(f"ranking layer {i + 1} of {len(self.layers)}")
            alone = self.write(method, set(self.layers) - {layer})
            found[layer] = sqnr_db(run_emulated(alone, images), reference)
        ranking = dict(sorted(found.items(), key=lambda item: item[1]))
        first = next(iter(ranking))
        self.on_stage(f"ranked {len(ranking)} layers; alone, {first} gives {ranking[first]:.1f} dB")
        return ranking

    def ask(
        self, method: Method, left: dict[str, float], is_good: Callable[[bytes], bool]
    ) -> Quantized | None:
        """Write, measure and judge one model; return it if it is good."""
        model = self.write(method, left)
        sqnr = sqnr_db(run_emulated(model, self.held_back), self.reference)
        count = len(left) + len(self.in_float)
        trial = Trial(method, count, sqnr, is_good(model))
        self.tried.append(trial)
        verdict = "good" if trial.is_good else "not good"
        self.on_stage(f"int8, {method}, {count} layers in float: {sqnr:.1f} dB, {verdict}")
        reasons = {
            layer: f"alone in int8 it leaves the logits {alone:.1f} dB above the noise"
            for layer, alone in left.items()
        }
        reasons |= self.in_float
        found = Quantized(model, method, self.total, reasons, sqnr, tuple(self.tried))
        return found if trial.is_good else None


def _first(ranking: dict[str, float], count: int) -> dict[str, float]:
    return dict(list(ranking.items())[:count])


def _failure(tried: Sequence[Trial], *, float_is_good: bool) -> CheckFailedError:
    asked = [trial for trial in tried if trial.is_good is not None]
    models = ", ".join(f"{trial.left} in float: {trial.sqnr_db:.1f} dB" for trial in asked)
    return CheckFailedError(
        "a model in int8 passes its accuracy gate, with at least one layer in int8",
        found=f"none of {len(asked)} that were tried with '{asked[0].method}' does ({models})"
        + ("" if float_is_good else "; nor does the float model"),
        remedy="calibrate on more images like those of the gate, train the model with its "
        "quantization, or export it in fp16"
        if float_is_good
        else "the gate asks for more than the model can do: lower it",
    )
