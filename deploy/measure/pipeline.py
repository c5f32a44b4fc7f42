"""A bundle's golden images on their way through decoding, pre-processing, model and answer, timed.

A fast wrong answer is no result: one of every hundred outputs is kept, and must be, bit for bit,
what the same images give afterwards, when nothing is timed; and what all of them give then must be
within the variant's tolerance of the golden outputs. The kept ones are not held against it
themselves: a share of few images drawn by chance may fall below a limit that holds for all.

Without Pillow there are no images: the stored tensors go through, and two stages are left.
"""

import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
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

__all__ = ["DECODING", "END_TO_END", "STAGES", "OutputCheck", "Pipeline"]

STAGES = ("decode", "preprocess", "infer", "postprocess")
DECODING = STAGES[:2]
"""Those of STAGES that are left out where Pillow is missing."""
END_TO_END = "end to end"
_CHECKED_SHARE = 0.01


@dataclass(frozen=True)
class OutputCheck:
    """Whether what was timed was right.

    Attributes:
        count: Outputs, one an image, that were kept while they were timed.
        changed: How many of them are not what the same images give when nothing is timed.
        golden: What all golden images give then, each as often, against the reference.
    """

    count: int
    changed: int
    golden: Comparison

    @property
    def passed(self) -> bool:
        """Whether there is no reason against it."""
        return not self.reasons

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why not, one sentence for each."""
        again = (
            f"{self.changed} of {self.count} timed outputs are not those of the same images again"
        )
        return (*([again] if self.changed else []), *self.golden.reasons)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "passed": self.passed,
            "reasons": list(self.reasons),
            "count": self.count,
            "changed": self.changed,
            "golden": self.golden.to_json(),
        }


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
        self._kept: list[tuple[int, NDArray[np.float32]]] = []  # of which first image
        self._draw = random.Random(0)  # a fixed stride could always meet the same image

    def run(self) -> None:
        """Send a batch through, not counted and not checked."""
        self._time(self._indices(self._turn()))

    def timed(self) -> tuple[float, ...]:
        """Send the next batch through: the ms of each of `stages`, in order.

        Raises:
            CheckFailedError: An output is not finite.
        """
        first = self._turn()
        times, output = self._time(self._indices(first))
        if not self._kept or self._draw.random() < _CHECKED_SHARE:
            self._kept.append((first, output.copy()))
        return tuple((end - begin) / 1e6 for begin, end in pairwise(times))

    def check(self) -> OutputCheck:
        """Send every batch through again, and compare with the kept outputs and the golden ones.

        Raises:
            CheckFailedError: An output is not finite.
        """
        turns = range(0, math.lcm(len(self.encoded), self.batch), self.batch)
        again = {
            first: self._time(self._indices(first))[1].copy()
            for first in (turn % len(self.encoded) for turn in turns)
        }
        indices = [i for first in again for i in self._indices(first)]
        manifest = self.bundle.manifest
        allowed = manifest.variants[self.runner.precision].tolerance
        decodes = self.stages == STAGES
        return OutputCheck(
            count=len(self._kept) * self.batch,
            changed=sum(_differing(output, again[first]) for first, output in self._kept),
            golden=compare(
                np.concatenate(list(again.values())),
                self.bundle.array(manifest.golden.outputs)[indices],
                end_to_end_tolerance(allowed, self.encoded) if decodes else allowed,
                index=None if self._index is None else self._index.embeddings,
            ),
        )

    def _turn(self) -> int:
        """The first image of the next batch."""
        first = self._next
        self._next = (first + self.batch) % len(self.encoded)
        return first

    def _indices(self, first: int) -> list[int]:
        return [i % len(self.encoded) for i in range(first, first + self.batch)]

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


def _differing(outputs: NDArray[Any], others: NDArray[Any]) -> int:
    """How many rows are not the same, bit for bit."""
    return int((outputs != others).reshape(len(outputs), -1).any(axis=1).sum())
