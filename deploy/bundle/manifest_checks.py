"""What in a well-typed manifest contradicts itself."""

import re
from collections.abc import Iterator

from deploy.bundle.file_names import file_name_problem
from deploy.bundle.manifest import Manifest
from deploy.bundle.tolerance import EmbeddingTolerance, Tolerance

__all__ = ["first_problem"]

MAX_FILE_BYTES = 2 << 30  # protobuf's own limit for an ONNX file

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")

_Check = tuple[object, str]
"""What must hold, and what to say if it does not."""


def first_problem(manifest: Manifest) -> str | None:
    """Say what contradicts itself, or nothing."""
    groups = (_task, _tensors, _variants, _accuracies, _holdout, _files)
    broken = (said for group in groups for holds, said in group(manifest) if not holds)
    listed = [entry.path for entry in manifest.files]
    return next(broken, None) or file_name_problem(listed or sorted(_used(manifest)))


def _task(manifest: Manifest) -> Iterator[_Check]:
    labels, index = manifest.labels, manifest.index
    is_embedding = manifest.task == "embedding"
    yield _NAME.fullmatch(manifest.name), f"the name {manifest.name!r}, not of [A-Za-z0-9._-]"
    yield (
        is_embedding == (index is not None) and (manifest.format_version > 2 or not is_embedding),
        f"the task {manifest.task} {'without' if index is None else 'with'} an index of reference "
        f"images, in format {manifest.format_version}",
    )
    if index is None:
        yield 0 < len(labels) == len(set(labels)), "no labels, or one twice"
        return
    yield index.count > 0, f"an index of {index.count} images"
    yield (
        (len(labels) > 0) == (index.labels is not None) and len(labels) == len(set(labels)),
        "labels without those of the index or the reverse, or one twice",
    )


def _tensors(manifest: Manifest) -> Iterator[_Check]:
    spec, tensors = manifest.preprocessing, (*manifest.inputs, *manifest.outputs)
    first = 1 if manifest.max_batch == 1 else "batch"
    yield len(manifest.inputs) == len(manifest.outputs) == 1, "not one input and one output"
    yield (
        all(tensor.shape[:1] == (first,) for tensor in tensors),
        f"a first dimension that does not fit max_batch {manifest.max_batch}",
    )
    yield manifest.max_batch >= 1, f"max_batch {manifest.max_batch}"
    yield (
        all(tensor.shape[1:] == spec.input_shape for tensor in manifest.inputs),
        f"an input that is not {('batch', *spec.input_shape)}, as the pre-processing gives it",
    )
    if manifest.task == "classification":
        yield (
            all(tensor.shape[1:] == (len(manifest.labels),) for tensor in manifest.outputs),
            "an output that is not (batch, one for each label)",
        )
    else:
        yield (
            all(
                len(tensor.shape) == 2 and isinstance(tensor.shape[1], int) and tensor.shape[1] > 0
                for tensor in manifest.outputs
            ),
            "an output that is not (batch, a number)",
        )
    yield (
        all(tensor.dtype == spec.input_dtype for tensor in manifest.inputs)
        and all(tensor.dtype == "float32" for tensor in manifest.outputs),
        f"an input that is not {spec.input_dtype}, or an output that is not float32",
    )


def _variants(manifest: Manifest) -> Iterator[_Check]:
    variants, golden = manifest.variants, manifest.golden
    tolerances = [variant.tolerance for variant in variants.values()]
    kind = Tolerance if manifest.task == "classification" else EmbeddingTolerance
    yield variants, "no variants"
    yield (
        all(key == variant.precision for key, variant in variants.items()),
        "a variant under the key of another precision",
    )
    yield (
        0 < golden.count == len(golden.images),
        f"golden.count {golden.count} for {len(golden.images)} golden images",
    )
    yield all(isinstance(t, kind) for t in tolerances), "a tolerance that is another task's"
    yield (
        all(0 <= limit <= 1 for t in tolerances for limit in _limits(t)),
        "a tolerance outside 0 to 1",
    )
    yield all(t.reason for t in tolerances), "a tolerance without a reason"


def _limits(tolerance: Tolerance | EmbeddingTolerance) -> tuple[float, ...]:
    if isinstance(tolerance, Tolerance):
        return tolerance.max_scaled_error, tolerance.min_top1_agreement
    return tolerance.max_scaled_error, tolerance.min_cosine, tolerance.min_neighbour_agreement


def _accuracies(manifest: Manifest) -> Iterator[_Check]:
    measured = [v.accuracy for v in manifest.variants.values() if v.accuracy is not None]
    yield (
        all(0 <= a.top1 <= 1 and a.count > 0 for a in measured),
        "an accuracy outside 0 to 1, or of no images",
    )
    yield (
        all(min(a.lost, a.gained) >= 0 and a.lost + a.gained <= a.count for a in measured),
        "an accuracy that counts more answers than images",
    )
    yield (
        all(
            0 <= a.reference_top1 <= 1
            and 0 <= a.gate <= 1
            and a.interval[0] <= (a.lost - a.gained) / a.count <= a.interval[1]
            and abs((a.reference_top1 - a.top1) * a.count - (a.lost - a.gained)) < 0.5
            for a in measured
            if a.count > 0
        ),
        "a net loss that is not that of its accuracies, or outside its interval",
    )


def _holdout(manifest: Manifest) -> Iterator[_Check]:
    holdout, variants = manifest.holdout, manifest.variants
    if holdout is None:
        return
    yield (
        0 < holdout.count == len(holdout.images),
        f"holdout.count {holdout.count} for {len(holdout.images)} held-out images",
    )
    yield (
        holdout.net_lost.keys() == variants.keys()
        and all(abs(net) <= holdout.count for net in holdout.net_lost.values()),
        f"net_lost {holdout.net_lost} for {holdout.count} held-out images",
    )
    yield (
        len(manifest.labels) > 0 and all(v.accuracy is not None for v in variants.values()),
        "a labelled sample, and a variant whose accuracy was not measured",
    )


def _files(manifest: Manifest) -> Iterator[_Check]:
    listed, used = [entry.path for entry in manifest.files], _used(manifest)
    yield listed == sorted(listed), "files that are not sorted by path"
    yield (
        all(_SHA256.fullmatch(entry.sha256) for entry in manifest.files),
        "a sha256 that is not 64 lower-case hexadecimal digits",
    )
    yield (
        all(0 <= entry.size <= MAX_FILE_BYTES for entry in manifest.files),
        f"a file's size outside 0 to {MAX_FILE_BYTES}",
    )
    yield (
        not listed or used <= set(listed),  # a manifest that is yet to be written lists none
        f"use of files that are not listed: {sorted(used - set(listed))}",
    )


def _used(manifest: Manifest) -> set[str]:
    golden, index, holdout = manifest.golden, manifest.index, manifest.holdout
    used = {golden.preprocessed, golden.outputs, golden.labels, *golden.images}
    used |= {variant.file for variant in manifest.variants.values()}
    used |= set() if index is None else {index.embeddings, index.names, index.labels}
    used |= set() if holdout is None else {holdout.labels, holdout.outputs, *holdout.images}
    return {name for name in used if name is not None}
