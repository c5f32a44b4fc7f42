"""Small real bundles for the tests of deploy/: a classifier and an encoder, both linear."""

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from deploy.bundle.manifest import (
    FORMAT_VERSION,
    Accuracy,
    Conformance,
    EmbeddingTolerance,
    Golden,
    Holdout,
    Index,
    Manifest,
    TensorSpec,
    Tolerance,
    Variant,
)
from deploy.bundle.read import Bundle, open_bundle
from deploy.bundle.write import write_bundle
from deploy.runtime.decode import encode_png
from deploy.runtime.preprocess import Preprocessing, preprocess

SIZE, LABELS, COUNT = 8, ("red", "green", "blue"), 6
SPEC = Preprocessing(SIZE, SIZE, "stretch", 1.0, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
FP32 = Tolerance(1e-5, 1.0, "float32 sums in another order")
FP32_EMBEDDING = EmbeddingTolerance(1e-5, 0.999999, 1.0, "float32 sums in another order")
REFERENCES = 9


def golden_pixels(count=COUNT, size=SIZE, seed=0):
    """(size, size, 3) uint8 images in which each class in turn prevails."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 100, (count, size, size, 3), dtype=np.uint8)
    for i, image in enumerate(images):
        image[:, :, i % 3] += 100
    return list(images)


def linear_onnx(weight, *, name="images", size=SIZE, output="logits"):
    """output = the mean over the image's pixels @ weight (3, classes)."""
    nodes = [
        helper.make_node("GlobalAveragePool", [name], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weight"], [output]),
    ]
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 3, size, size])],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["batch", weight.shape[1]])],
        [numpy_helper.from_array(weight.astype(np.float32), "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def bundle_parts(*, encode=encode_png, suffix="png", tolerance=FP32):
    """A manifest without files, and the contents."""
    weight = np.eye(3, dtype=np.float32) + 0.1
    encoded = [encode(image) for image in golden_pixels()]
    inputs = preprocess(golden_pixels(), SPEC)
    names = tuple(f"golden/{i}.{suffix}" for i in range(COUNT))
    contents = {
        "model.fp32.onnx": linear_onnx(weight),
        "golden/preprocessed.npy": npy(inputs),
        "golden/outputs.npy": npy(inputs.mean(axis=(2, 3)) @ weight),
        "golden/labels.npy": npy(np.arange(COUNT) % 3),
        **dict(zip(names, encoded, strict=True)),
    }
    accepted = Conformance("none", "not required", "onnxruntime runs it")
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        name="colours",
        task="classification",
        max_batch=16,
        target={"name": "onnxruntime-x86", "opset": 20},
        inputs=(TensorSpec("images", "float32", ("batch", 3, SIZE, SIZE)),),
        outputs=(TensorSpec("logits", "float32", ("batch", 3)),),
        preprocessing=SPEC,
        labels=LABELS,
        variants={"fp32": Variant("model.fp32.onnx", "fp32", tolerance, accepted, None)},
        golden=Golden(
            COUNT, names, "golden/labels.npy", "golden/preprocessed.npy", "golden/outputs.npy"
        ),
        provenance={"seed": 0},
        files=(),
    )
    return manifest, contents


def embedding_parts():
    """The manifest and contents of an encoder: the mean colour, with references of three labels."""
    manifest, contents = bundle_parts()
    weight, pixels = np.eye(3) + 0.1, golden_pixels(REFERENCES, seed=1)
    rows = preprocess(pixels, SPEC).mean(axis=(2, 3)) @ weight
    units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    names = [f"{LABELS[i % 3]}/{i}.png" for i in range(REFERENCES)]
    contents |= {
        "model.fp32.onnx": linear_onnx(weight, output="embedding"),
        "index/embeddings.npy": npy(units.astype(np.float32)),
        "index/names.json": json.dumps(names).encode(),
        "index/labels.npy": npy(np.arange(REFERENCES) % 3),
    }
    variant = dataclasses.replace(manifest.variants["fp32"], tolerance=FP32_EMBEDDING)
    manifest = dataclasses.replace(
        manifest,
        task="embedding",
        outputs=(TensorSpec("embedding", "float32", ("batch", 3)),),
        variants={"fp32": variant},
        index=Index(REFERENCES, "index/embeddings.npy", "index/names.json", "index/labels.npy"),
    )
    return manifest, contents


def write_embedding_bundle(path: Path, **changes) -> Bundle:
    """Write the encoder's with some contents replaced, and open it."""
    manifest, contents = embedding_parts()
    write_bundle(path, manifest, contents | changes)
    return open_bundle(path)


def write_small_bundle(path: Path, **changes) -> Bundle:
    """Write it with some contents replaced, and open it."""
    manifest, contents = bundle_parts()
    write_bundle(path, manifest, contents | changes)
    return open_bundle(path)


def labelled_parts(*, count=30, encode=encode_png, suffix="png", net_lost=0, gate=0.0):
    """The small classifier with a labelled sample, of which the reference gets all right."""
    manifest, contents = bundle_parts(encode=encode, suffix=suffix)
    pixels = golden_pixels(count, seed=2)
    labels = np.arange(count) % 3
    names = tuple(f"holdout/{i:04d}.{suffix}" for i in range(count))
    contents |= dict(zip(names, map(encode, pixels), strict=True))
    logits = preprocess(pixels, SPEC).mean(axis=(2, 3)) @ (np.eye(3) + 0.1)
    contents |= {
        "holdout/labels.npy": npy(labels),
        "holdout/outputs.npy": npy(logits.astype(np.float32)),
    }
    accuracy = Accuracy(1.0, 1.0, count, 0, 0, (-0.2, 0.2), gate, False, False)
    variant = dataclasses.replace(manifest.variants["fp32"], accuracy=accuracy)
    sample = Holdout(count, names, "holdout/labels.npy", "holdout/outputs.npy", {"fp32": net_lost})
    return dataclasses.replace(manifest, variants={"fp32": variant}, holdout=sample), contents


def write_labelled_bundle(path: Path, *, changes=None, **options) -> Bundle:
    """Write it with some contents replaced, and open it."""
    manifest, contents = labelled_parts(**options)
    write_bundle(path, manifest, contents | (changes or {}))
    return open_bundle(path)
