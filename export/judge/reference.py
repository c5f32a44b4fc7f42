"""What the model itself answers, in float64 and rounded once: what every variant is held against.

float64, so that the same model gives the same bytes whatever machine and number of threads.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from deploy.errors import BadInputError
from deploy.runtime.neighbours import ReferenceIndex, cosines, unit_rows
from deploy.runtime.preprocess import Preprocessing, preprocess
from export.judge.holdout import as_float
from export.request import References
from export.traced.float64 import evaluate
from export.traced.trace import frozen_copy

__all__ = ["embed_references", "image_outputs", "reference_outputs"]

_BATCH = 16
_ALIKE = 1e-5  # of a cosine: below it, neighbours are in no order


def reference_outputs(model: nn.Module, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return (N, D) of a model for (N, 3, H, W)."""
    return _Reference(model)(inputs)


def image_outputs(
    model: nn.Module, images: Sequence[NDArray[np.uint8]], preprocessing: Preprocessing
) -> NDArray[np.float32]:
    """Return (N, D) of a model for decoded images, which are taken a few at a time."""
    run, rows = _Reference(model), []
    for start in range(0, len(images), _BATCH):
        inputs = preprocess(images[start : start + _BATCH], preprocessing)
        rows.append(run(as_float(inputs, preprocessing)))
    return np.concatenate(rows)


def embed_references(
    model: nn.Module,
    references: References,
    preprocessing: Preprocessing,
    *,
    class_names: tuple[str, ...],
) -> ReferenceIndex:
    """Return the index of an encoder's reference images.

    Args:
        model: The encoder.
        references: The images.
        preprocessing: From an image to the model's input.
        class_names: Of their labels, if they have any.

    Raises:
        BadInputError: An embedding has no direction, or all have the same one: neighbours would
            then say nothing, and nothing could be wrong with them.
    """
    count = len(references.images)
    embeddings = image_outputs(model, references.images, preprocessing)
    is_bad = ~(np.isfinite(embeddings).all(axis=1) & embeddings.any(axis=1))
    if is_bad.any():
        raise BadInputError(
            "an encoder gives each reference image a finite embedding that is not zero",
            found=f"{int(is_bad.sum())} of {count} are not, first '"
            f"{references.names[int(is_bad.argmax())]}'",
            remedy="check the encoder, or give other reference images",
        )
    units = unit_rows(embeddings)
    if cosines(units[:1], units).min() > 1 - _ALIKE:
        raise BadInputError(
            "an encoder tells its reference images apart",
            found=f"{count} embeddings of the same direction",
            remedy="give more reference images, or train the encoder longer: it has collapsed",
        )
    labels = None if references.labels is None else np.asarray(references.labels, np.int64)
    return ReferenceIndex(units, tuple(references.names), labels, class_names)


class _Reference:
    """A model in float64, a few images at a time."""

    def __init__(self, model: nn.Module) -> None:
        self._model = frozen_copy(model).double()

    def __call__(self, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
        batches = (
            torch.from_numpy(inputs[i : i + _BATCH]).double() for i in range(0, len(inputs), _BATCH)
        )
        outputs = torch.cat([evaluate(self._model, (batch,))[0] for batch in batches])
        return outputs.float().numpy()
