"""The index of reference images in a bundle: written once, and doubted whenever it is read."""

import io
import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploy import strict_json
from deploy.bundle.manifest import Index
from deploy.bundle.read import Bundle
from deploy.errors import BadInputError
from deploy.runtime.neighbours import ReferenceIndex

__all__ = ["describe_index", "index_contents", "read_index"]

_EMBEDDINGS, _NAMES, _LABELS = "index/embeddings.npy", "index/names.json", "index/labels.npy"
_LENGTH_ERROR = 1e-5  # that float32 may leave of a length of 1


def describe_index(index: ReferenceIndex) -> Index:
    """Return what the manifest says of an index."""
    return Index(
        count=len(index.names),
        embeddings=_EMBEDDINGS,
        names=_NAMES,
        labels=None if index.labels is None else _LABELS,
    )


def index_contents(index: ReferenceIndex) -> dict[str, bytes]:
    """Return the files of an index.

    Raises:
        BadInputError: The names are too long to be read again.
    """
    names = (json.dumps(list(index.names), indent=0) + "\n").encode()
    if len(names) > strict_json.MAX_BYTES:
        raise BadInputError(
            f"the names of reference images take {strict_json.MAX_BYTES} bytes at most",
            found=f"{len(names)} bytes for {len(index.names)} names",
            remedy="give fewer reference images, or shorter file names",
        )
    contents = {_EMBEDDINGS: _npy(index.embeddings), _NAMES: names}
    return contents if index.labels is None else contents | {_LABELS: _npy(index.labels)}


def read_index(bundle: Bundle) -> ReferenceIndex | None:
    """Read the index of a bundle; None of a classifier's, which has none.

    Raises:
        TamperedBundleError: A file is no longer what it was.
        BadInputError: A file cannot be what the manifest says, or what an index is.
    """
    index, width = bundle.manifest.index, bundle.manifest.outputs[0].shape[-1]
    if index is None:
        return None
    embeddings = bundle.array(index.embeddings)
    if embeddings.dtype != np.float32 or embeddings.shape != (index.count, width):
        found = f"'{index.embeddings}' is {embeddings.dtype} {embeddings.shape}"
        raise _refusal(bundle, f"{found}, not float32 ({index.count}, {width})")
    if not np.isfinite(embeddings).all():
        raise _refusal(bundle, f"'{index.embeddings}' holds values that are not finite")
    lengths = np.linalg.norm(embeddings.astype(np.float64), axis=1)
    if np.abs(lengths - 1).max() > _LENGTH_ERROR:
        found = f"lengths from {lengths.min():.6g} to {lengths.max():.6g}"
        raise _refusal(bundle, f"'{index.embeddings}' has rows of {found}, not 1")
    names = strict_json.parse(bundle.read(index.names), source=f"'{index.names}'")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise _refusal(bundle, f"'{index.names}' is no list of names")
    if len(names) != index.count:
        raise _refusal(bundle, f"'{index.names}' names {len(names)} images, not {index.count}")
    labels = None if index.labels is None else _labels(bundle, index.labels, index.count)
    return ReferenceIndex(embeddings, tuple(names), labels, bundle.labels)


def _labels(bundle: Bundle, file: str, count: int) -> NDArray[np.int64]:
    labels = bundle.array(file)
    if labels.dtype.kind not in "iu" or labels.shape != (count,):
        raise _refusal(bundle, f"'{file}' is {labels.dtype} {labels.shape}, not integer ({count},)")
    if labels.min() < 0 or labels.max() >= len(bundle.labels):
        raise _refusal(
            bundle,
            f"'{file}' has classes from {labels.min()} to {labels.max()}; "
            f"there are {len(bundle.labels)}",
        )
    return labels.astype(np.int64)


def _refusal(bundle: Bundle, found: str) -> BadInputError:
    return BadInputError(
        f"the reference index of bundle '{bundle.path.name}' must be what its manifest says",
        found=found,
        remedy="export the bundle again",
    )


def _npy(array: NDArray[Any]) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()
