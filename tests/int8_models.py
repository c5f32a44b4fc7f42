"""A small classifier of emoji, fitted in a second, for what int8 does to accuracy."""

from functools import cache

import numpy as np
import torch
from export_models import randomized
from numpy.typing import NDArray
from torch import Tensor, nn

from edgereg.data.emoji10 import Emoji10
from export.onnx_file.to_onnx import to_onnx
from export.passes.simplify import simplify
from export.targets import TARGETS


def emoji(split: str, count: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return pre-processed images (count, 3, 32, 32) and their labels, in a fixed random order."""
    data = Emoji10(vendor="both", split=split)
    assert data.labels is not None
    order = np.random.default_rng(0).permutation(len(data))[:count]
    pixels = np.stack([data.load(int(i)) for i in order]).astype(np.float32).transpose(0, 3, 1, 2)
    return (pixels / 255 - 0.5) / 0.25, data.labels[order]


def residual_block(channels: int) -> nn.Module:
    """Return a block whose input is read twice."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
            self.bn1 = nn.BatchNorm2d(channels)
            self.relu1 = nn.ReLU()
            self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
            self.bn2 = nn.BatchNorm2d(channels)
            self.relu2 = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            y = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
            out: Tensor = self.relu2(x + 0.5 * y)
            return out

    return Block()


class Classifier(nn.Module):
    """A residual network with random filters."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.relu = nn.ReLU()
        self.block = residual_block(16)
        self.down = nn.Conv2d(16, 48, 3, stride=2, padding=1)
        self.relu2 = nn.ReLU()
        self.last = nn.Conv2d(48, 48, 3, stride=2, padding=1)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.head = nn.Linear(48 * 4, 10)

    def features(self, x: Tensor) -> Tensor:
        """Return (N, 192)."""
        x = self.relu2(self.down(self.block(self.relu(self.stem(x)))))
        pooled: Tensor = self.pool(self.last(x).relu())
        return pooled.flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, 10) logits."""
        logits: Tensor = self.head(self.features(x))
        return logits


@cache
def fitted_classifier() -> Classifier:
    """Return the network with its last layer fitted to the training images, by least squares."""
    torch.manual_seed(0)
    model = Classifier()
    randomized(model)
    images, labels = emoji("train", 1500)
    with torch.no_grad():
        features = torch.cat([model.features(torch.from_numpy(images)), torch.ones(1500, 1)], 1)
        target = nn.functional.one_hot(torch.from_numpy(labels), 10).float()
        gram = features.T @ features
        ridge = 1e-3 * gram.trace() / len(gram) * torch.eye(len(gram))
        solution = torch.linalg.solve(gram + ridge, features.T @ target)
        model.head.weight.copy_(solution[:-1].T)
        model.head.bias.copy_(solution[-1])
    return model


def exported(model: nn.Module, *, target: str = "onnxruntime-x86", max_batch: int = 16) -> bytes:
    """Return a model simplified and as ONNX."""
    x = torch.from_numpy(emoji("train", 2)[0])
    simple = simplify(model, (x,)).model
    return to_onnx(simple, (x,), target=TARGETS[target], max_batch=max_batch)


@cache
def classifier_file() -> bytes:
    """Return the fitted network as ONNX."""
    return exported(fitted_classifier())
