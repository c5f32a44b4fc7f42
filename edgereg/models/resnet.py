"""A small residual network (He et al., 1512.03385), with BatchNorm after every convolution."""

from torch import Tensor, nn

__all__ = ["SmallResNet"]


class SmallResNet(nn.Module):
    """Turn images into one vector each.

    Args:
        width: Channels of the first stage; each further stage doubles them.
        blocks: Residual blocks in each stage.
        stem: "small" keeps the resolution (32x32 images, and the small patches of PIRL); "large"
            divides it by four first (224x224).
    """

    def __init__(
        self, *, width: int = 16, blocks: tuple[int, ...] = (1, 1, 1), stem: str = "small"
    ) -> None:
        super().__init__()
        if stem == "small":
            self.stem = nn.Sequential(*_convolution(3, width, 3), nn.ReLU())
        else:
            self.stem = nn.Sequential(
                *_convolution(3, width, 7, stride=2),
                nn.ReLU(),
                nn.MaxPool2d(3, stride=2, padding=1),
            )
        stages: list[nn.Module] = []
        ends: list[int] = []
        channels = width
        for stage, count in enumerate(blocks):
            for block in range(count):
                stride = 2 if stage > 0 and block == 0 else 1
                stages.append(Block(channels, width * 2**stage, stride=stride))
                channels = width * 2**stage
            ends.append(len(stages) - 1)
        self.stage_ends = tuple(ends)  # each stage's last block in `blocks`
        self.blocks = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.feature_dim = channels

    def forward(self, images: Tensor) -> Tensor:
        """Return (B, D) from images (B, 3, H, W) of any size, normalized."""
        features: Tensor = self.pool(self.blocks(self.stem(images))).flatten(1)
        return features


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    def __init__(self, channels: int, out_channels: int, *, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(
            *_convolution(channels, out_channels, 3, stride=stride), nn.ReLU()
        )
        self.second = nn.Sequential(*_convolution(out_channels, out_channels, 3))
        changes = stride != 1 or channels != out_channels
        self.shortcut = (
            nn.Sequential(*_convolution(channels, out_channels, 1, stride=stride))
            if changes
            else nn.Identity()
        )
        self.activation = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, out_channels, H / stride, W / stride)."""
        result: Tensor = self.activation(self.second(self.first(x)) + self.shortcut(x))
        return result


def _convolution(
    channels: int, out_channels: int, size: int, *, stride: int = 1
) -> tuple[nn.Module, ...]:
    """BatchNorm's shift makes the convolution's bias superfluous."""
    convolution = nn.Conv2d(
        channels, out_channels, size, stride=stride, padding=size // 2, bias=False
    )
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return convolution, nn.BatchNorm2d(out_channels)
