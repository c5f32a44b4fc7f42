"""manifest.json: what a bundle holds and how it is to be run.

History of the format:
    1  The first: classification, variants by precision, golden data, a hash of each file.
    2  A static batch of one image, or any up to `max_batch`; the accuracy of each variant beside
       the reference's, and the gate that it passed; an input of float32 or of uint8 pixels.
"""

import re
from dataclasses import dataclass
from typing import Any, Literal

from deploy import strict_json
from deploy.errors import BadInputError
from deploy.runtime.preprocess import Preprocessing

__all__ = [
    "DIGEST_NAME",
    "FORMAT_VERSION",
    "MANIFEST_NAME",
    "Accuracy",
    "Conformance",
    "FileEntry",
    "Golden",
    "Manifest",
    "TensorSpec",
    "Tolerance",
    "Variant",
    "check_file_names",
    "manifest_from_bytes",
    "manifest_to_bytes",
]

FORMAT_VERSION = 2
MANIFEST_NAME = "manifest.json"
DIGEST_NAME = "manifest.json.sha256"  # in the format of sha256sum, so that `sha256sum -c` reads it
MAX_FILES = 4096
MAX_FILE_BYTES = 2 << 30  # protobuf's own limit for an ONNX file

_FILE_NAME_PART = re.compile(r"[a-z0-9._-]+")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")


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
class Tolerance:
    """How far a variant's outputs may be from the reference's, and why this far.

    Attributes:
        max_scaled_error: Largest absolute error over the reference's range.
        min_top1_agreement: Smallest share of images with the same top-1 class, in [0, 1].
        reason: Where the numbers come from.
    """

    max_scaled_error: float
    min_top1_agreement: float
    reason: str


@dataclass(frozen=True)
class Conformance:
    """What a judge of the target's own parser and builder said of a variant."""

    judge: str
    verdict: Literal["accepted", "not judged", "not required"]
    detail: str


@dataclass(frozen=True)
class Accuracy:
    """Top-1 accuracy on held-out images, measured at export; shares in [0, 1].

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
    tolerance: Tolerance
    conformance: Conformance
    accuracy: Accuracy | None


@dataclass(frozen=True)
class Golden:
    """The reference at each stage: encoded images, labels, pre-processed tensor, logits.

    Attributes:
        count: How many images.
        images: Their files, encoded, in order.
        labels: File of an (N,) integer array, if the labels are known.
        preprocessed: File of the input, of the shape and type that the model takes.
        outputs: File of the (N, classes) float32 logits of the model before export, from float64.
    """

    count: int
    images: tuple[str, ...]
    labels: str | None
    preprocessed: str
    outputs: str


@dataclass(frozen=True)
class Manifest:
    """The whole of manifest.json; `variants` are keyed by precision, `files` sorted by path.

    Attributes:
        max_batch: 1 for a model of static shape that takes one image at a time; more, and the first
            dimension of input and output is called "batch" and is 1 to this.
    """

    format_version: int
    name: str
    task: Literal["classification"]
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


def manifest_to_bytes(manifest: Manifest) -> bytes:
    """Write a manifest; equal manifests give equal bytes.

    Raises:
        BadInputError: The manifest would be refused when it is read.
    """
    try:
        data = strict_json.dump(manifest)
    except (TypeError, ValueError) as error:
        raise BadInputError(
            "a manifest must hold plain JSON values only",
            found=str(error),
            remedy="convert arrays, NaN and other objects before export",
        ) from error
    if manifest_from_bytes(data, bundle=manifest.name) != manifest:
        raise BadInputError(
            "a manifest must read back as it was written",
            found="a value that JSON changes: a key that is no string, or a tuple for a list",
            remedy="use string keys; lists inside `target` and `provenance`, tuples elsewhere",
        )
    return data


def manifest_from_bytes(data: bytes, *, bundle: str) -> Manifest:
    """Read a manifest.

    Args:
        data: The content of manifest.json.
        bundle: The bundle's name, for errors.

    Raises:
        BadInputError: It is not strict JSON of this format, or says something that cannot be.
    """
    source = f"{MANIFEST_NAME} of bundle '{bundle}'"
    document = strict_json.parse(data, source=source)
    version = document.get("format_version") if isinstance(document, dict) else None
    # Before the keys: another format may have other keys.
    if type(version) is int and version != FORMAT_VERSION:
        raise BadInputError(
            "a bundle must have a format that this edgereg reads",
            found=f"bundle '{bundle}' has format {version}; this edgereg reads {FORMAT_VERSION}",
            remedy="export it again or upgrade edgereg",
        )
    manifest = strict_json.decode(Manifest, document, source=source)
    problem = _first_problem(manifest)
    if problem is not None:
        raise BadInputError(
            f"{source} must describe a bundle that can exist",
            found=problem,
            remedy="export the bundle again",
        )
    return manifest


def check_file_names(names: list[str]) -> None:
    """Refuse file names that could leave the bundle, or that not every file system can hold.

    Raises:
        BadInputError: A name is not made of [a-z0-9._-] parts, holds '..', is reserved or repeated,
            or is also the folder of another.
    """
    problem = _file_name_problem(names)
    if problem is not None:
        raise BadInputError(
            "a bundle's file names must be distinct relative paths of [a-z0-9._-] without '..'",
            found=problem,
            remedy="rename the file",
        )


def _file_name_problem(names: list[str]) -> str | None:
    folders = {name[:i] for name in names for i, letter in enumerate(name) if letter == "/"}
    for name in names:
        parts = name.split("/")
        if (
            not all(_FILE_NAME_PART.fullmatch(part) and part != "." for part in parts)
            or ".." in name
        ):
            return f"the file name {name!r}"
        if name in (MANIFEST_NAME, DIGEST_NAME):
            return f"the reserved file name {name!r}"
        if len(name) > 255:
            return f"a file name of {len(name)} characters"
        if name in folders:
            return f"{name!r} as a file and as a folder"
    if len(set(names)) < len(names):
        return f"{sorted(name for name in names if names.count(name) > 1)[0]!r} twice"
    if len(names) > MAX_FILES:
        return f"{len(names)} files; the limit is {MAX_FILES}"
    return None


def _first_problem(manifest: Manifest) -> str | None:
    """What in a well-typed manifest contradicts itself."""
    golden, spec = manifest.golden, manifest.preprocessing
    takes_pixels = spec.layout == "nhwc-uint8"
    image = (spec.height, spec.width, 3) if takes_pixels else (3, spec.height, spec.width)
    dtype = "uint8" if takes_pixels else "float32"
    variants, classes = manifest.variants, len(manifest.labels)
    tolerances = [variant.tolerance for variant in variants.values()]
    accuracies = [variant.accuracy for variant in variants.values() if variant.accuracy is not None]
    used = {golden.preprocessed, golden.outputs, *golden.images}
    used |= {variant.file for variant in variants.values()}
    used |= {golden.labels} if golden.labels is not None else set()
    listed = [entry.path for entry in manifest.files]
    checks = (
        (_NAME.fullmatch(manifest.name), f"the name {manifest.name!r}, not of [A-Za-z0-9._-]"),
        (0 < classes == len(set(manifest.labels)), "no labels, or one twice"),
        (len(manifest.inputs) == len(manifest.outputs) == 1, "not one input and one output"),
        (
            all(
                tensor.shape[:1] == ((1,) if manifest.max_batch == 1 else ("batch",))
                for tensor in (*manifest.inputs, *manifest.outputs)
            ),
            f"a first dimension that does not fit max_batch {manifest.max_batch}",
        ),
        (manifest.max_batch >= 1, f"max_batch {manifest.max_batch}"),
        (
            all(tensor.shape[1:] == image for tensor in manifest.inputs),
            f"an input that is not {('batch', *image)}, as the pre-processing gives it",
        ),
        (
            all(tensor.shape[1:] == (classes,) for tensor in manifest.outputs),
            "an output that is not (batch, one for each label)",
        ),
        (
            all(tensor.dtype == dtype for tensor in manifest.inputs)
            and all(tensor.dtype == "float32" for tensor in manifest.outputs),
            f"an input that is not {dtype}, or an output that is not float32",
        ),
        (variants, "no variants"),
        (
            all(key == variant.precision for key, variant in variants.items()),
            "a variant under the key of another precision",
        ),
        (
            0 < golden.count == len(golden.images),
            f"golden.count {golden.count} for {len(golden.images)} golden images",
        ),
        (
            all(
                0 <= t.max_scaled_error <= 1 and 0 <= t.min_top1_agreement <= 1 for t in tolerances
            ),
            "a tolerance outside 0 to 1",
        ),
        (all(t.reason for t in tolerances), "a tolerance without a reason"),
        (
            all(0 <= a.top1 <= 1 and a.count > 0 for a in accuracies),
            "an accuracy outside 0 to 1, or of no images",
        ),
        (
            all(min(a.lost, a.gained) >= 0 and a.lost + a.gained <= a.count for a in accuracies),
            "an accuracy that counts more answers than images",
        ),
        (
            all(
                0 <= a.reference_top1 <= 1
                and 0 <= a.gate <= 1
                and a.interval[0] <= (a.lost - a.gained) / a.count <= a.interval[1]
                and abs((a.reference_top1 - a.top1) * a.count - (a.lost - a.gained)) < 0.5
                for a in accuracies
                if a.count > 0
            ),
            "a net loss that is not that of its accuracies, or outside its interval",
        ),
        (listed == sorted(listed), "files that are not sorted by path"),
        (
            all(_SHA256.fullmatch(entry.sha256) for entry in manifest.files),
            "a sha256 that is not 64 lower-case hexadecimal digits",
        ),
        (
            all(0 <= entry.size <= MAX_FILE_BYTES for entry in manifest.files),
            f"a file's size outside 0 to {MAX_FILE_BYTES}",
        ),
        (
            not listed or used <= set(listed),  # a manifest that is yet to be written lists none
            f"use of files that are not listed: {sorted(used - set(listed))}",
        ),
    )
    broken = (problem for holds, problem in checks if not holds)
    return next(broken, None) or _file_name_problem(listed or sorted(used))
