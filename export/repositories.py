"""Hand a bundle's model to another server: Triton, KServe, DeepStream.

Each is told the model's name, types, shapes and labels. What happens to an image before it is not
the same everywhere: Triton takes the pre-processed tensor, so that whoever asks pre-processes, as
preprocessing.json says; an encoder's index stays in the bundle. DeepStream's nvinfer pre-processes
itself, by one formula:

    y = net-scale-factor * (x - offset)       one factor for all channels, and the image stretched

What that cannot say is refused. Sources: Triton's model_config.proto; KServe's v1beta1
InferenceService; the property table of DeepStream's Gst-nvinfer.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

from deploy.bundle.read import Bundle
from deploy.errors import BadInputError
from deploy.publish import check_free, publish_directory

__all__ = ["KINDS", "Kind", "write_repository"]

Kind = Literal["triton", "kserve", "deepstream"]
_NETWORK_MODES = {"fp32": 0, "int8": 1, "fp16": 2}


def write_repository(
    bundle: Bundle,
    destination: Path,
    *,
    kind: Kind,
    precision: str,
    storage_uri: str | None = None,
    force: bool = False,
) -> None:
    """Write what a server needs to run one variant of a bundle, or nothing.

    Args:
        bundle: The opened bundle.
        destination: The directory to appear.
        kind: Which server.
        precision: Which variant.
        storage_uri: For KServe: where the written directory will be found, such as
            "s3://models/emoji".
        force: Whether an earlier result may be replaced.

    Raises:
        BadInputError: There is no such variant, the destination is taken, or the server cannot do
            what the bundle asks for.
    """
    variants = bundle.manifest.variants
    if precision not in variants:
        raise BadInputError(
            "the precision is one of the bundle's variants",
            found=f"'{precision}'; '{bundle.path.name}' has {', '.join(sorted(variants))}",
            remedy="choose one with --precision, or export this one too",
        )
    files = KINDS[kind](bundle, precision, storage_uri)
    members = {name.partition("/")[0] for name in files}
    check_free(destination, force=force, members=members)
    with publish_directory(destination, members=members, force=force) as staging:
        for name, data in files.items():
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            (staging / name).write_bytes(data)


def _triton(bundle: Bundle, precision: str, storage_uri: str | None) -> Mapping[str, bytes]:
    """A model repository: NAME/config.pbtxt, NAME/1/model.onnx."""
    manifest = bundle.manifest
    (taken,), (given,) = manifest.inputs, manifest.outputs
    # 0: the batch is one of the dimensions, and fixed.
    has_batches = manifest.max_batch > 1
    first = 1 if has_batches else 0
    is_classifier = manifest.task == "classification"  # an embedding's numbers have no labels
    labelled = ' label_filename: "labels.txt"' if is_classifier else ""
    accelerator = ""
    if manifest.target["name"].startswith("jetpack"):
        accelerator = (
            "optimization {\n  execution_accelerators {\n"
            '    gpu_execution_accelerator: [{ name: "tensorrt" }]\n  }\n}\n'
        )
    config = (
        f"name: {json.dumps(manifest.name)}\n"
        'platform: "onnxruntime_onnx"\n'
        f"max_batch_size: {manifest.max_batch if has_batches else 0}\n"
        f"input [{{ name: {json.dumps(taken.name)} data_type: "
        f"{'TYPE_UINT8' if taken.dtype == 'uint8' else 'TYPE_FP32'} "
        f"dims: {list(taken.shape[first:])} }}]\n"
        f"output [{{ name: {json.dumps(given.name)} data_type: TYPE_FP32 "
        f"dims: {list(given.shape[first:])}{labelled} }}]\n"
        f"{accelerator}"
    )
    root = manifest.name
    files = {
        f"{root}/config.pbtxt": config.encode(),
        f"{root}/1/model.onnx": bundle.read(manifest.variants[precision].file),
        f"{root}/preprocessing.json": _preprocessing(bundle),
    }
    if is_classifier:
        labels = "".join(f"{label}\n" for label in bundle.labels)
        files[f"{root}/labels.txt"] = labels.encode()
    return files


def _kserve(bundle: Bundle, precision: str, storage_uri: str | None) -> Mapping[str, bytes]:
    """A Triton repository, and the InferenceService that serves it."""
    if storage_uri is None or not re.fullmatch(r"[a-z0-9]+://\S+", storage_uri):
        raise BadInputError(
            "KServe is told where the model repository is stored",
            found=repr(storage_uri),
            remedy="such as --storage-uri s3://models/emoji, and copy the directory there",
        )
    name = re.sub(r"[^a-z0-9]+", "-", bundle.manifest.name.lower()).strip("-")[:63].strip("-")
    service = (
        "apiVersion: serving.kserve.io/v1beta1\n"
        "kind: InferenceService\n"
        f"metadata:\n  name: {json.dumps(name)}\n"
        "spec:\n"
        "  predictor:\n"
        "    model:\n"
        "      modelFormat:\n        name: triton\n"
        "      protocolVersion: v2\n"
        "      runtime: kserve-tritonserver\n"
        f"      storageUri: {json.dumps(storage_uri)}\n"
    )
    return {**_triton(bundle, precision, storage_uri), "inferenceservice.yaml": service.encode()}


def _deepstream(bundle: Bundle, precision: str, storage_uri: str | None) -> Mapping[str, bytes]:
    """The configuration of nvinfer as a classifier of whole frames."""
    manifest = bundle.manifest
    spec = manifest.preprocessing
    if not manifest.target["name"].startswith("jetpack"):
        raise BadInputError(
            "DeepStream runs on NVIDIA's boards",
            found=f"a bundle for {manifest.target['name']}",
            remedy="export for the board's JetPack",
        )
    if manifest.task != "classification":
        raise BadInputError(
            "nvinfer is configured as a classifier here",
            found="the bundle of an encoder",
            remedy="use --to triton, which hands out the embedding",
        )
    if spec.resize != "stretch":
        raise BadInputError(
            "nvinfer scales a frame to the model's input by stretching it",
            found=f"a bundle that resizes by '{spec.resize}' and crops {spec.crop_fraction:g}",
            remedy="train with preprocessing.resize: stretch, or use --to triton",
        )
    if spec.layout != "nchw-float32":
        raise BadInputError(
            "nvinfer gives a model float32 (N, 3, H, W)",
            found="a bundle that takes uint8 pixels",
            remedy="export it with --input float",
        )
    if len(set(spec.std)) > 1:
        raise BadInputError(
            "nvinfer multiplies all channels by one factor",
            found=f"standard deviations {', '.join(map(str, spec.std))}",
            remedy="train with the same standard deviation for each channel, or use --to triton",
        )
    labels = ";".join(bundle.labels)
    if any(";" in label for label in bundle.labels):
        raise BadInputError(
            "nvinfer separates labels by ';'",
            found=f"{next(label for label in bundle.labels if ';' in label)!r}",
            remedy="rename the class",
        )
    (taken,), (given,) = manifest.inputs, manifest.outputs
    offsets = ";".join(f"{255 * mean:.9g}" for mean in spec.mean)
    properties = {
        "gpu-id": 0,
        "onnx-file": "model.onnx",
        "labelfile-path": "labels.txt",
        "batch-size": manifest.max_batch,
        "network-mode": _NETWORK_MODES[precision],
        "network-type": 1,
        "process-mode": 1,
        "model-color-format": 0,
        "infer-dims": f"3;{spec.height};{spec.width}",
        "net-scale-factor": f"{1 / (255 * spec.std[0]):.9g}",
        "offsets": offsets,
        "maintain-aspect-ratio": 0,
        "scaling-filter": 1,
        "output-blob-names": given.name,
        "gie-unique-id": 1,
        "classifier-threshold": -1e9,
    }
    lines = "".join(f"{key}={value}\n" for key, value in properties.items())
    comment = (
        f"# {manifest.name}, {precision}; the input is '{taken.name}'.\n"
        "# The output is logits: nvinfer takes the largest, whatever it is; it is no probability.\n"
        "# nvinfer's bilinear filter does not antialias, as the model's own pre-processing does:\n"
        "# the report of the export says what that costs.\n"
    )
    return {
        "nvinfer.txt": f"{comment}[property]\n{lines}".encode(),
        "model.onnx": bundle.read(manifest.variants[precision].file),
        "labels.txt": f"{labels}\n".encode(),
    }


def _preprocessing(bundle: Bundle) -> bytes:
    spec = bundle.manifest.preprocessing
    return (json.dumps(spec.to_json(), indent=1, sort_keys=True) + "\n").encode()


KINDS: dict[Kind, Callable[[Bundle, str, str | None], Mapping[str, bytes]]] = {
    "triton": _triton,
    "kserve": _kserve,
    "deepstream": _deepstream,
}
