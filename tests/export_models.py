"""Models for the tests of export/, every parameter and statistic random: no error can hide."""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def randomized(model: nn.Module, *, seed: int = 0) -> nn.Module:
    """Give a model random weights of gain 1 and random statistics; return it in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = max(parameter[0].numel(), 1) if parameter.ndim > 1 else 4
            parameter.normal_(0, fan_in**-0.5, generator=generator)
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                if module.affine:
                    module.weight.uniform_(0.5, 1.5, generator=generator)
                    module.bias.normal_(0, 0.3, generator=generator)
                if module.running_mean is not None:
                    module.running_mean.normal_(0, 0.3, generator=generator)
                    module.running_var.uniform_(0.3, 3.0, generator=generator)
    return model.eval()


def noise(*shape: int, seed: int = 1) -> Tensor:
    """Return reproducible normal noise."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Chain(nn.Sequential):
    """Layers in a row, then the mean over all but batch and channels: a small image network."""

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, C)."""
        x = super().forward(x)
        return x.flatten(2).mean(2) if x.ndim > 2 else x


def small_cnn(*, classes: int = 4) -> nn.Module:
    """Return a network with BatchNorm and dropout, for images of any size."""
    return Chain(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Dropout2d(0.1),
        nn.Conv2d(8, classes, 3, padding=1, bias=False),
        nn.BatchNorm2d(classes),
        nn.Dropout(0.1),
    )


class AttentionBlock(nn.Module):
    """One transformer block over the patches of an image, and a head."""

    def __init__(self, *, classes: int = 4, width: int = 16) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.block = nn.TransformerEncoderLayer(width, 2, 32, activation="gelu", batch_first=True)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, classes)."""
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        return self.head(self.block(tokens).mean(1))
