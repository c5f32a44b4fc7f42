"""manifest.json: what a bundle holds and how it is to be run.

History of the format:
    1  The first: classification, variants by precision, golden data, a hash of each file.
    2  A static batch of one image, or any up to `max_batch`; the accuracy of each variant beside
       the reference's, and the gate that it passed; an input of float32 or of uint8 pixels.
    3  A task "embedding", with an index of reference images and tolerances of its own; optionally
       a labelled sample. That of a classification is as it was, so that 2 is still read.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from deploy import strict_json
from deploy.bundle.file_names import DIGEST_NAME, MANIFEST_NAME, check_file_names
from deploy.bundle.preprocessing import Preprocessing
from deploy.bundle.tolerance import AnyTolerance, EmbeddingTolerance, Tolerance

__all__ = [
    "DIGEST_NAME",
    "FORMAT_VERSION",
    "MANIFEST_NAME",
    "READ_VERSIONS",
    "Accuracy",
    "AnyTolerance",
    "Conformance",
    "EmbeddingTolerance",
    "FileEntry",
    "Golden",
    "Holdout",
    "Index",
    "Manifest",
    "TensorSpec",
    "Tolerance",
    "Variant",
    "check_file_names",
]

FORMAT_VERSION = 3
READ_VERSIONS = (2, 3)


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of the model; a dimension that is not fixed is a name: ("batch", 10)."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class FileEntry:
    """One file of the bundle; `size` in bytes."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Conformance:
    """What a judge of the target's own parser and builder said of a variant."""

    judge: str
    verdict: Literal["accepted", "not judged", "not required"]
    detail: str


@dataclass(frozen=True)
class Accuracy:
    """Top-1 accuracy on held-out images, measured at export; shares in [0, 1].

    Of an embedding it is that of the weighted vote of an image's nearest references.

    Attributes:
        top1: The variant's accuracy.
        reference_top1: That of the PyTorch model on the same images.
        count: How many images.
        lost: Those that the reference got right and the variant did not.
        gained: The reverse.
        interval: 95 % interval of the net loss, (lost - gained) / count.
        gate: The largest net loss that was allowed.
        is_overridden: Whether the gate was set by hand.
        is_certified: Whether the whole interval is within the gate, or within 0.1 points.
    """

    top1: float
    reference_top1: float
    count: int
    lost: int
    gained: int
    interval: tuple[float, float]
    gate: float
    is_overridden: bool
    is_certified: bool


@dataclass(frozen=True)
class Variant:
    """One precision of the model."""

    file: str
    precision: str
    tolerance: AnyTolerance
    conformance: Conformance
    accuracy: Accuracy | None


@dataclass(frozen=True)
class Golden:
    """The reference at each stage: encoded images, labels, pre-processed tensor, outputs.

    Attributes:
        count: How many images.
        images: Their files, encoded, in order.
        labels: File of an (N,) integer array, if the labels are known.
        preprocessed: File of the input, of the shape and type that the model takes.
        outputs: File of the (N, classes) logits or (N, D) embeddings, float32, of the model before
            export, from float64.
    """

    count: int
    images: tuple[str, ...]
    labels: str | None
    preprocessed: str
    outputs: str


@dataclass(frozen=True)
class Holdout:
    """A labelled sample of the images on which the accuracy was measured at export.

    Attributes:
        count: How many images.
        images: Their files, encoded, in order.
        labels: File of a (count,) integer array.
        outputs: File of the (count, classes) logits or (count, D) embeddings, float32, of the model
            before export, from float64.
        net_lost: By precision: how many of these images the variant lost at export, less those that
            it gained.
    """

    count: int
    images: tuple[str, ...]
    labels: str
    outputs: str
    net_lost: dict[str, int]


@dataclass(frozen=True)
class Index:
    """The reference images among which an embedding's neighbours are found.

    Attributes:
        count: How many.
        embeddings: File of their (count, D) float32 embeddings by the model before export, from
            float64, each of length 1.
        names: File of a JSON list of their names.
        labels: File of a (count,) integer array, if their classes are known.
    """

    count: int
    embeddings: str
    names: str
    labels: str | None


@dataclass(frozen=True)
class Manifest:
    """The whole of manifest.json; `variants` are keyed by precision, `files` sorted by path.

    Attributes:
        labels: The classes in the order of the logits; of an embedding those of the index, if any.
        index: Of an embedding.
        holdout: None where no images were labelled, or none were wanted.
        max_batch: 1 for a model of static shape that takes one image at a time; more, and the first
            dimension of input and output is called "batch" and is 1 to this.
    """

    format_version: int
    name: str
    task: Literal["classification", "embedding"]
    max_batch: int
    target: dict[str, Any]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    preprocessing: Preprocessing
    labels: tuple[str, ...]
    variants: dict[str, Variant]
    golden: Golden
    provenance: dict[str, Any]
    files: tuple[FileEntry, ...]
    index: Index | None = field(default=None, metadata=strict_json.OPTIONAL)
    holdout: Holdout | None = field(default=None, metadata=strict_json.OPTIONAL)
