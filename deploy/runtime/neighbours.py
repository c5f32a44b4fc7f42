"""From an embedding to an answer: the nearest reference images, and what they vote for.

Each of the k nearest votes for its class with the weight exp(s / t), s its cosine similarity and t
the temperature (Wu et al., arXiv:1805.01978, section 3.4); k and t are those of `edgereg eval`. The
model's graph does not normalise: it stays the backbone, module by module, and a sum of squares can
leave fp16's range. Here it is one line.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploy.errors import CheckFailedError
from deploy.runtime.postprocess import Guess, check_finite

__all__ = ["Neighbour", "ReferenceIndex", "cosines", "unit_rows"]

NEIGHBOURS = 20
TEMPERATURE = 0.1

_CHUNK = 256  # embeddings at a time: their similarities to all references are in memory
_LEAST_SHARE = 1e-6  # of the votes, so that a class without one has a logarithm


@dataclass(frozen=True)
class Neighbour:
    """A reference image, its class if it is known, and its cosine similarity, -1 to 1."""

    name: str
    label: str | None
    cosine: float


@dataclass(frozen=True)
class ReferenceIndex:
    """Reference images, as the model sees them.

    Attributes:
        embeddings: (R, D) float32, each row of length 1.
        names: R of them.
        labels: (R,) int64 into `class_names`, or None where the classes are not known.
        class_names: Empty where there are none.
    """

    embeddings: NDArray[np.float32]
    names: tuple[str, ...]
    labels: NDArray[np.int64] | None
    class_names: tuple[str, ...]

    def nearest(
        self, embedding: NDArray[np.float32], *, k: int
    ) -> tuple[tuple[Neighbour, ...], tuple[Guess, ...]]:
        """Return the nearest references of one image and the shares of the vote, best first.

        Args:
            embedding: (D,), of any length.
            k: How many neighbours, and how many classes: those with a vote. It does not change who
                votes.

        Raises:
            CheckFailedError: The embedding is not finite, or zero, which has no direction.
        """
        check_finite(embedding)
        if not embedding.any():
            raise CheckFailedError(
                "an embedding must have a direction",
                found=f"{embedding.size} zeros",
                remedy="run `edgereg verify` on the bundle; a backbone may answer so to such an "
                "image, too",
            )
        similar = cosines(embedding[None], self.embeddings)[0]
        found = tuple(
            self._neighbour(i, similar[i]) for i in np.argsort(-similar, kind="stable")[:k]
        )
        if self.labels is None:
            return found, ()
        shares = self._shares(similar[None])[0]
        best = [i for i in np.argsort(-shares, kind="stable")[:k] if shares[i] > 0]
        return found, tuple((self.class_names[i], float(shares[i])) for i in best)

    def vote_logits(self, embeddings: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the logarithms of the shares of the votes, (N, C): a softmax gives the shares.

        Args:
            embeddings: (N, D), of any length; one that is not finite gives a row that is not.
        """
        chunks = (embeddings[i : i + _CHUNK] for i in range(0, len(embeddings), _CHUNK))
        shares = [self._shares(cosines(chunk, self.embeddings)) for chunk in chunks]
        return np.log(np.maximum(np.concatenate(shares), _LEAST_SHARE)).astype(np.float32)

    def _neighbour(self, place: int, cosine: float) -> Neighbour:
        label = None if self.labels is None else self.class_names[self.labels[place]]
        return Neighbour(self.names[place], label, float(cosine))

    def _shares(self, similar: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return (N, C) shares of the votes from (N, R) similarities."""
        assert self.labels is not None
        shares = np.zeros((len(similar), len(self.class_names)))
        for row, own in zip(shares, similar, strict=True):
            voters = np.argsort(-own, kind="stable")[:NEIGHBOURS]
            # less the largest, of which the shares do not depend
            weights = np.exp((own[voters] - own[voters[0]]).astype(np.float64) / TEMPERATURE)
            row += np.bincount(self.labels[voters], weights, minlength=len(row)) / weights.sum()
        return shares


def cosines(
    embeddings: NDArray[np.floating[Any]], units: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Return (N, R) cosine similarities of (N, D) embeddings and (R, D) vectors of length 1."""
    similar: NDArray[np.float32] = unit_rows(embeddings) @ units.T
    return similar


def unit_rows(embeddings: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
    """Scale each row to length 1; zeros stay, and what is not finite gives NaN."""
    rows = embeddings.astype(np.float64)
    lengths = np.sqrt(np.sum(rows**2, axis=1, keepdims=True))
    with np.errstate(invalid="ignore"):
        return (rows / np.where(lengths > 0, lengths, 1)).astype(np.float32)
