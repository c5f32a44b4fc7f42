"""Exports of networks of a few kilobytes, of every kind that there is: what is mutated and killed.

python benchmarks/tiny_bundles.py FOLDER
"""

import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from randomize import images, randomize
from torch import Tensor, nn

from deploy.runtime.decode import encode_png
from deploy.runtime.preprocess import Preprocessing
from export.exporter import ExportRequest, export_bundle
from export.request import References

__all__ = ["TinyNet", "TinyTransformer", "tiny_request"]

_SIZE = 16
_LABELS = ("circle", "square", "star", "none")


class TinyNet(nn.Sequential):
    """Two convolutions with BatchNorm, and their mean."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3, stride=2, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 4, 3, padding=1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )


class TinyTransformer(nn.Module):
    """One block of attention over patches."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, stride=4)
        self.block = nn.TransformerEncoderLayer(16, 2, 32, activation="gelu", batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, 4)."""
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        logits: Tensor = self.head(self.block(tokens).mean(1))
        return logits


def tiny_request(target: str, **options: Any) -> ExportRequest:
    """What an export of such a net is made of; as random as its weights."""
    spec = Preprocessing(
        _SIZE,
        _SIZE,
        "stretch",
        1.0,
        (0.5, 0.5, 0.5),
        (0.25, 0.25, 0.25),
        layout=options.pop("layout", "nchw-float32"),
    )
    return ExportRequest(
        name="tiny",
        target=target,
        preprocessing=spec,
        golden_images=[encode_png(image) for image in _images(64, seed=0)],
        **{"labels": _LABELS, "golden_labels": [i % 4 for i in range(64)]} | options,
    )


def _images(count: int, *, seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    shape = (count, _SIZE, _SIZE, 3)
    means = rng.uniform(30, 220, (count, 1, 1, 3))
    return list(np.clip(rng.normal(means, 40, shape), 0, 255).astype(np.uint8))


def main() -> None:
    """Export each."""
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    calibration = [encode_png(image) for image in _images(32, seed=1)]
    judged = {
        "holdout": (_images(16, seed=3), [i % 4 for i in range(16)]),
        "gates": {"fp16": 1.0, "int8": 1.0},  # weights are random, and so are the labels
        "max_batch": 8,
    }
    references = References(_images(12, seed=2), [f"{i}.png" for i in range(12)], None)
    exports: dict[str, tuple[nn.Module, ExportRequest]] = {
        "cnn": (
            TinyNet(),
            tiny_request(
                "onnxruntime-x86",
                precisions=("fp32", "int8"),
                calibration=calibration,
                allow_slower=True,
                **judged,
            ),
        ),
        "transformer": (
            TinyTransformer(),
            tiny_request("jetpack6.2", precisions=("fp32", "fp16"), **judged),
        ),
        "old": (TinyTransformer(), tiny_request("jetpack6.0")),
        "pixels": (TinyNet(), tiny_request("onnxruntime-arm", layout="nhwc-uint8")),
        "encoder": (
            TinyNet(),
            tiny_request("onnxruntime-x86", references=references, labels=(), golden_labels=None),
        ),
    }
    for name, (model, request) in exports.items():
        randomize(model, images(4, _SIZE, seed=0))
        export_bundle(model, folder / f"{name}.bundle", request=request)


if __name__ == "__main__":
    main()
