"""The held-out images: what the model itself answers on them, and what a variant does.

The reference is the PyTorch model that was handed in, in float32 as it was trained: not the
simplified one, and not the fp32 file. Images go through a few at a time; of the answers only the
logits are kept.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from deploy.measure.paired import PairedAccuracy, compare_answers
from deploy.runtime.preprocess import Preprocessing, normalize, preprocess
from export.onnx_file.run_onnx import Run
from export.traced.float64 import at_rest
from export.traced.trace import frozen_copy

__all__ = ["Holdout", "as_float"]

Alter = Callable[[NDArray[np.uint8]], NDArray[np.uint8]]
_BATCH = 16  # photographs of a usual size fill the memory


def as_float(inputs: NDArray[Any], spec: Preprocessing) -> NDArray[np.float32]:
    """Return what a model in PyTorch takes, (N, 3, H, W), of inputs in either layout."""
    return normalize(inputs, spec) if spec.layout == "nhwc-uint8" else inputs


class Holdout:
    """Labelled images with the reference's answers.

    Args:
        model: The PyTorch model, float32, in evaluation mode.
        images: Decoded (h, w, 3) uint8; taken a few at a time.
        labels: Their classes.
        preprocessing: From an image to the model's input.
        as_logits: From (N, D) outputs to (N, classes) logits, where they are none.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Sequence[NDArray[np.uint8]],
        labels: Sequence[int],
        preprocessing: Preprocessing,
        *,
        as_logits: Run = lambda outputs: outputs,
    ) -> None:
        self._images, self._preprocessing, self._as_logits = images, preprocessing, as_logits
        self.labels: NDArray[np.int64] = np.asarray(labels, np.int64)
        frozen = frozen_copy(model)

        def run(inputs: NDArray[Any]) -> NDArray[np.float32]:
            images = torch.from_numpy(as_float(inputs, preprocessing))
            with at_rest():
                logits: NDArray[np.float32] = frozen(images).numpy()
            return logits

        self.reference = self.answers(run)

    def answers(self, run: Run, alter: Alter = lambda image: image) -> NDArray[np.float32]:
        """Return the (N, classes) logits that a model gives, to altered images if it is asked."""
        return np.concatenate([self._as_logits(run(inputs)) for inputs in self._batches(alter)])

    def compare(self, run: Run, *, alter: Alter = lambda image: image) -> PairedAccuracy:
        """Compare a model's answers, to altered images perhaps, with the reference's."""
        return self.judge(self.answers(run, alter))

    def judge(self, logits: NDArray[np.float32]) -> PairedAccuracy:
        """Compare (N, classes) logits with the reference's."""
        return compare_answers(logits, self.reference, self.labels)

    def _batches(self, alter: Alter) -> Iterator[NDArray[Any]]:
        for start in range(0, len(self.labels), _BATCH):
            these = range(start, min(start + _BATCH, len(self.labels)))
            yield preprocess([alter(self._images[index]) for index in these], self._preprocessing)
