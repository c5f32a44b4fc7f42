"""A bundle's golden images on their way through decoding, pre-processing, model and answer, timed.

One of every hundred outputs is kept and compared with the golden ones: a fast wrong answer is no
result. Without Pillow there are no images: the stored tensors go through, and two stages are left.
"""

import random
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploy.bundle.index import read_index
from deploy.bundle.read import Bundle
from deploy.errors import BadInputError
from deploy.measure.compare import Comparison, compare
from deploy.measure.verify import end_to_end_tolerance, golden_images
from deploy.runtime.decode import decode, has_pillow
from deploy.runtime.postprocess import top_k
from deploy.runtime.preprocess import preprocess
from deploy.runtime.runner import Runner

__all__ = ["DECODING", "END_TO_END", "STAGES", "Pipeline"]

STAGES = ("decode", "preprocess", "infer", "postprocess")
DECODING = STAGES[:2]
"""Those of STAGES that are left out where Pillow is missing."""
END_TO_END = "end to end"
_CHECKED_SHARE = 0.01


class Pipeline:
    """A bundle and a runner of it, fed with the golden images in turn.

    Args:
        bundle: The opened bundle.
        runner: One of its variants, loaded.
        batch: How many images go through at a time.

    Attributes:
        stages: Those of STAGES that are run here.

    Raises:
        BadInputError: The bundle's model does not take so many.
    """

    def __init__(self, bundle: Bundle, runner: Runner, *, batch: int = 1) -> None:
        if not 1 <= batch <= bundle.manifest.max_batch:
            raise BadInputError(
                "a batch holds 1 image or more, and as many as the bundle's model takes at most",
                found=f"a batch of {batch}; '{bundle.path.name}' takes {bundle.manifest.max_batch}",
                remedy="choose a smaller one, or export with --max-batch",
            )
        self.bundle, self.runner, self.batch = bundle, runner, batch
        self.encoded = golden_images(bundle)
        self.stages = STAGES if has_pillow() else STAGES[len(DECODING) :]
        self._stored = bundle.array(bundle.manifest.golden.preprocessed)
        self._index = read_index(bundle)
        self._next = 0
        self._checked: list[int] = []
        self._outputs: list[NDArray[np.float32]] = []
        self._draw = random.Random(0)  # a fixed stride could always meet the same image

    def run(self) -> None:
        """Send a batch through, not counted and not checked."""
        self._time(self._indices())

    def timed(self) -> tuple[float, ...]:
        """Send the next batch through: the ms of each of `stages`, in order.

        Raises:
            CheckFailedError: An output is not finite.
        """
        indices = self._indices()
        times, output = self._time(indices)
        if not self._checked or self._draw.random() < _CHECKED_SHARE:
            self._checked += indices
            self._outputs.append(output.copy())
        return tuple((end - begin) / 1e6 for begin, end in pairwise(times))

    def check(self) -> Comparison:
        """Compare the kept outputs of `timed` with the golden ones."""
        manifest = self.bundle.manifest
        allowed = manifest.variants[self.runner.precision].tolerance
        return compare(
            np.concatenate(self._outputs),
            self.bundle.array(manifest.golden.outputs)[self._checked],
            end_to_end_tolerance(allowed, self.encoded),
            index=None if self._index is None else self._index.embeddings,
        )

    def _indices(self) -> list[int]:
        first = self._next
        self._next = first + self.batch
        return [i % len(self.encoded) for i in range(first, self._next)]

    def _time(self, indices: Sequence[int]) -> tuple[list[int], NDArray[Any]]:
        """The times in ns before, between and after the stages, and the model's outputs."""
        if self.stages == STAGES:
            files = [self.encoded[i] for i in indices]
            times = [time.perf_counter_ns()]
            images = [decode(data, name="a golden image") for data in files]
            times.append(time.perf_counter_ns())
            batch = preprocess(images, self.bundle.manifest.preprocessing)
        else:
            batch, times = self._stored[indices], []
        times.append(time.perf_counter_ns())
        outputs = self.runner(batch)
        times.append(time.perf_counter_ns())
        for output in outputs:
            if self._index is None:
                top_k(output, self.bundle.labels, k=5)
            else:
                self._index.nearest(output, k=5)
        times.append(time.perf_counter_ns())
        return times, outputs
