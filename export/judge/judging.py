"""Put a variant through all checks: structure, NVIDIA's judge, golden images, accuracy, speed."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from deploy.bundle.manifest import Conformance
from deploy.bundle.tolerance import AnyTolerance
from deploy.errors import CheckFailedError
from deploy.measure.compare import Comparison, compare
from deploy.measure.paired import PairedAccuracy, compare_answers
from deploy.runtime.neighbours import ReferenceIndex
from export.judge.accuracy import GateVerdict, judge_accuracy
from export.judge.holdout import Holdout, as_float
from export.judge.reference import embed_references, image_outputs, reference_outputs
from export.judge.resize_ablation import ResizeAblation, measure_resize
from export.judge.speed import Speed, assert_not_slower, compare_speed
from export.onnx_file.conformance import judge
from export.onnx_file.gates import assert_exportable
from export.onnx_file.run_onnx import Run
from export.precision.variants import EMBEDDING_TOLERANCES, TOLERANCES, Made, is_host, open_variant
from export.request import ExportRequest
from export.targets import Precision, Target

__all__ = ["Judging", "VariantResult", "neighbours_text"]


@dataclass(frozen=True)
class VariantResult:
    """What was found of one precision.

    Attributes:
        size: Of the file, in bytes.
        conformance: What the judge of the target said.
        comparison: Its answers to the golden images beside those of the model in float64.
        paired: Its accuracy on the held-out images beside the model's; None without such images.
        verdict: What the gate said of that; None likewise.
        net_lost: Of the held-out images that the bundle carries, those lost less those gained; None
            if it carries none.
        speed: Its time beside fp32's; None for fp32, and where this host is not the target.
        details: How it was made: islands, calibration, layers left in float.
        seconds: To make and judge it.
    """

    size: int
    conformance: Conformance
    comparison: Comparison
    paired: PairedAccuracy | None
    verdict: GateVerdict | None
    net_lost: int | None
    speed: Speed | None
    details: dict[str, Any]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "size": self.size,
            "conformance": dataclasses.asdict(self.conformance),
            "golden": self.comparison.to_json(),
            "accuracy": None if self.paired is None else self.paired.to_json(),
            "gate": None if self.verdict is None else self.verdict.to_json(),
            "sample_net_lost": self.net_lost,
            "speed": None if self.speed is None else self.speed.to_json(),
            "details": self.details,
            "seconds": self.seconds,
        }


class Judging:
    """What every variant is held against: the model's answers, the target, the gates.

    Attributes:
        golden_outputs: The model's, in float64, to the golden images.
        sample_outputs: Likewise to the held-out images that the bundle carries, if it carries any.
        index: Of an encoder: its reference images.
        tolerances: Of the task.
        measure: What its accuracy is called.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: NDArray[Any],
        request: ExportRequest,
        target: Target,
        on_stage: Callable[[str], None],
    ) -> None:
        self.inputs, self.request, self.target = inputs, request, target
        self.on_stage = on_stage
        self.golden_outputs = reference_outputs(model, as_float(inputs, request.preprocessing))
        self.index: ReferenceIndex | None = None
        self.tolerances: Mapping[Precision, AnyTolerance] = TOLERANCES
        self.measure = "top-1"
        if request.references is not None:
            on_stage(f"embedding {len(request.references.images)} reference images in float64")
            self.index = embed_references(
                model, request.references, request.preprocessing, class_names=request.labels
            )
            self.tolerances, self.measure = EMBEDDING_TOLERANCES, "vote of the nearest"
        self.holdout: Holdout | None = None
        if request.holdout is not None:
            images, labels = request.holdout
            on_stage(f"asking the model for its answers to {len(labels)} held-out images")
            voting = {} if self.index is None else {"as_logits": self.index.vote_logits}
            self.holdout = Holdout(model, images, labels, request.preprocessing, **voting)
        self.sample_outputs: NDArray[np.float32] | None = None
        if request.holdout is not None and request.sample:
            on_stage(
                f"asking it in float64 about the {len(request.sample)} that the bundle carries"
            )
            images = [request.holdout[0][place] for place in sorted(request.sample)]
            self.sample_outputs = image_outputs(model, images, request.preprocessing)
        self._logits: dict[bytes, NDArray[np.float32]] = {}

    def judge(
        self, precision: Precision, made: Made, *, fp32: bytes, begun: float
    ) -> VariantResult:
        """Put a variant through all checks."""
        assert_exportable(made.file, self.target, max_batch=self.request.max_batch)
        self.on_stage(f"judging {precision} for {self.target.name}")
        conformance = judge(made.file, self.target, max_batch=self.request.max_batch)
        self.on_stage(
            f"{precision}: {conformance.verdict} ({conformance.judge}: {conformance.detail})"
        )
        run = open_variant(precision, made.file, self.target)
        answers = run(self.inputs)
        comparison = self._compare(precision, answers)
        if not comparison.passed:
            raise CheckFailedError(
                f"an exported {precision} file answers as the model does, within its tolerance",
                found=f"{'; '.join(comparison.reasons)}, on {comparison.count} golden images",
                remedy="`edgereg export --bisect` names the module at which they part",
            )
        self._check_batches(precision, run, answers)
        paired = self._accuracy(precision, made.file)
        verdict = None if paired is None else self._gate(precision, paired)
        if comparison.neighbour_agreement is not None:
            self.on_stage(f"{precision}: {neighbours_text(comparison, verdict)}")
        if verdict is not None:
            self.on_stage(verdict.text)
            if not verdict.passed:
                raise CheckFailedError(
                    "a variant is shipped if its net loss of accuracy is within its gate",
                    found=verdict.text,
                    remedy=f"`edgereg export --bisect` shows where it is lost; or set --gate "
                    f"{precision}=SHARE",
                )
        speed = None
        if precision != "fp32" and is_host(self.target):
            speed = compare_speed(made.file, fp32, self.inputs[:1])
            self.on_stage(f"{precision}: {speed.to_text()}")
            if not self.request.allow_slower:
                assert_not_slower(precision, speed)
        return VariantResult(
            size=len(made.file),
            conformance=conformance,
            comparison=comparison,
            paired=paired,
            verdict=verdict,
            net_lost=self._net_lost(precision, made.file),
            speed=speed,
            details=made.details,
            seconds=time.perf_counter() - begun,
        )

    def _compare(self, precision: Precision, answers: NDArray[np.float32]) -> Comparison:
        references = None if self.index is None else self.index.embeddings
        tolerance = self.tolerances[precision]
        return compare(answers, self.golden_outputs, tolerance, index=references)

    def _check_batches(self, precision: Precision, run: Run, answers: NDArray[np.float32]) -> None:
        """Run the file at both ends of its batch range and halfway: each image answers alike."""
        largest = self.request.max_batch
        for size in sorted({1, (1 + largest) // 2, largest}):
            some = run(np.resize(self.inputs, (size, *self.inputs.shape[1:])))
            error = np.abs(some - np.resize(answers, some.shape)).max() / np.ptp(answers)
            if not error <= self.tolerances[precision].max_scaled_error:
                raise CheckFailedError(
                    "a file gives an image the same answer in a batch of any size",
                    found=f"{precision}: scaled error {error:.1e} in a batch of {size}",
                    remedy="export with a static shape, or report it with the model's code",
                )

    def resize_ablation(self, fp32: bytes) -> ResizeAblation | None:
        """Measure what another resize would cost; None without held-out images."""
        if self.holdout is None:
            return None
        run = open_variant("fp32", fp32, self.target)
        ablation = measure_resize(self.holdout, run, self.request.preprocessing)
        self.on_stage(ablation.to_text())
        return ablation

    def is_good_int8(self, file: bytes) -> bool:
        """Say whether a file passes the gate of int8; without held-out images, any does.

        An encoder's file must answer the golden images within its tolerance, too: without labels
        there is no other judge.
        """
        if self.index is not None:
            run = open_variant("int8", file, self.target)
            if not self._compare("int8", run(self.inputs)).passed:
                return False
        paired = self._accuracy("int8", file)
        return paired is None or self._gate("int8", paired).passed

    def _gate(self, precision: Precision, paired: PairedAccuracy) -> GateVerdict:
        override = self.request.gates.get(precision)
        return judge_accuracy(precision, paired, override=override, measure=self.measure)

    def _accuracy(self, precision: Precision, file: bytes) -> PairedAccuracy | None:
        if self.holdout is None:
            return None
        return self.holdout.judge(self._answers(self.holdout, precision, file))

    def _net_lost(self, precision: Precision, file: bytes) -> int | None:
        """Return how many of the bundle's own held-out images are lost, less those gained."""
        if self.holdout is None or self.sample_outputs is None:
            return None
        outputs, places = self.sample_outputs, sorted(self.request.sample)
        reference = outputs if self.index is None else self.index.vote_logits(outputs)
        logits = self._answers(self.holdout, precision, file)[places]
        paired = compare_answers(logits, reference, self.holdout.labels[places])
        return paired.lost - paired.gained

    def _answers(self, holdout: Holdout, precision: Precision, file: bytes) -> NDArray[np.float32]:
        if file not in self._logits:
            run = open_variant(precision, file, self.target)
            self._logits = {file: holdout.answers(run)}  # the last only: files are large
        return self._logits[file]


def neighbours_text(comparison: Comparison, verdict: GateVerdict | None) -> str:
    """Say how an encoder's golden images went, and whether there is another judge."""
    text = (
        f"smallest cosine similarity {comparison.min_cosine:.6f}, the same nearest reference for "
        f"{comparison.neighbour_agreement:.2%} of {comparison.count} golden images"
    )
    return text if verdict is not None else f"{text}; no labels: judged by these alone"
