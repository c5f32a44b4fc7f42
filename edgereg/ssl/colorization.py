"""Colorful Image Colorization: give grey images their colours back (Zhang et al., 1603.08511).

The backbone is shown a lightness L alone. From its last feature map a decoder, which is dropped in
the end, answers at a quarter of the resolution: for each pixel a distribution z over 313 colours,
since one thing may have several. With Z the soft encoding of the true colour, q* its largest bin:

    loss = -mean v(q*) sum_q Z_q log z_q,   v ~ 1 / ((1 - lambda) p + lambda / 313)       (eq. 2-4)

where p is how common colours are in the data; the weights v make rare ones count. The loss of one
answer that is simply right on average, "l2", is offered beside it; it learns that what may be red
or green is grey.

Released code and this: true colours are every fourth pixel's, not a mean, and images without
colour are left out. There, v scales the gradient and not the loss that is printed; here both.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgereg.errors import DataError, check_settings
from edgereg.ssl.ab_bins import AbBins, anneal, rebalance
from edgereg.ssl.feature_map import evaluating, find_feature_map
from edgereg.ssl.gather import mean_over_processes
from edgereg.ssl.lab import grey_of, lab_to_rgb, rgb_to_lab
from edgereg.ssl.method import Method, Setup, View

__all__ = ["Colorization", "ColorizationConfig", "is_coloured", "soft_cross_entropy"]

_STRIDE = 4  # of the answer
_RANGE = 110.0  # of a and b: what "l2" answers is in these units
_COLOURLESS = 5.0  # |a| and |b| up to which a pixel counts as grey, as released
_PIECE = 256  # images of the sample at a time


@dataclass(frozen=True)
class ColorizationConfig:
    """The method's constants; the defaults are the paper's, but for a narrower decoder.

    Args:
        loss: "classification", or "l2", the mean of squares.
        neighbours: Bins that a true colour is spread over: the paper's 5, or 10 as released.
        rebalance: lambda in (0, 1]: 1 weighs all colours alike.
        temperature: T of the colours that are shown; learning does not depend on it.
        width: Channels of the decoder.
        skip_grey: Whether images without colour are left out of the loss.
    """

    loss: Literal["classification", "l2"] = "classification"
    neighbours: Literal[5, 10] = 5
    rebalance: float = 0.5
    temperature: float = 0.38
    width: int = 128
    skip_grey: bool = True

    def __post_init__(self) -> None:
        check_settings(
            self,
            "colorization.",
            {
                "loss": ("classification or l2", self.loss in ("classification", "l2")),
                "neighbours": ("5 or 10", self.neighbours in (5, 10)),
                "rebalance": ("above 0, and 1 at most", 0 < self.rebalance <= 1),
                "temperature": ("above 0", self.temperature > 0),
                "width": ("1 or more", self.width >= 1),
            },
        )


class Colorization(Method):
    """The decoder and the loss around a backbone; see Method.

    Of a transformer it trains the tokens that have a place, and a class token only as their helper.

    Raises:
        DataError: There is no colour in the sample.
        RecipeError: The backbone has no feature map.
    """

    prior: Tensor

    def __init__(self, setup: Setup, config: ColorizationConfig) -> None:
        super().__init__()
        self._setup, self._config = setup, config
        self.backbone = setup.backbone
        self._map = find_feature_map(setup.backbone, setup.image_size, what="the backbone")
        self.has_unused_parameters = bool(self._map.unused)
        self.bins = AbBins(neighbours=config.neighbours)
        answers = len(self.bins.centres) if config.loss == "classification" else 2
        self.decoder = _decoder(
            self._map.channels,
            self._map.side,
            width=config.width,
            goal=-(-setup.image_size // _STRIDE),
            answers=answers,
        )
        colours = _colours(setup.sample)
        _check_colour(colours)
        self.register_buffer("prior", self.bins.prior(colours))

    def views(self, images: Tensor, view: View) -> tuple[Tensor, ...]:
        """Return the grey images, normalized, and the colours a, b (B, 2, H/4, W/4)."""
        pixels = self._setup.chain(images, view(0))
        return self._setup.normalize(grey_of(pixels)), _subsampled(pixels)

    def forward(self, views: tuple[Tensor, ...], indices: Tensor) -> Tensor:
        """Return the mean loss over the pixels of the images that have colour."""
        grey, colours = views
        answers = self._answer(grey)
        if self._config.loss == "classification":
            bins, shares = self.bins.encode(colours)
            weights = rebalance(self.prior, self._config.rebalance)[bins[:, 0]]
            losses = weights * soft_cross_entropy(answers, bins, shares)
        else:
            losses = 0.5 * ((answers - colours / _RANGE) ** 2).sum(dim=1)
        if not self._config.skip_grey:
            return losses.mean()
        counts = is_coloured(colours)
        # where processes have unlike numbers of them, the mean of their losses is the batch's yet
        count = mean_over_processes(counts.sum().float())
        return (losses.mean(dim=(1, 2)) * counts).sum() / torch.where(count > 0, count, 1)

    @torch.no_grad()
    def predict_ab(self, images: Tensor) -> Tensor:
        """Return the colours a, b (B, 2, H, W) that the model gives to images.

        Args:
            images: (B, 3, H, W) float in [0, 1]; only their lightness is looked at.
        """
        answers = self._resting_answer(images)
        if self._config.loss == "classification":
            colours = self.bins.decode(anneal(answers, self._config.temperature))
        else:
            colours = answers * _RANGE
        return _enlarged(colours, images.shape[2], images.shape[3])

    def paint(self, images: Tensor) -> Tensor:
        """Return the images (B, 3, H, W) in [0, 1] with their lightness and the model's colours.

        Args:
            images: (B, 3, H, W) float in [0, 1].
        """
        return lab_to_rgb(torch.cat([rgb_to_lab(images)[:, :1], self.predict_ab(images)], dim=1))

    @torch.no_grad()
    def divergence(self, images: Tensor) -> Tensor | None:
        """Return KL(Z || z) in nats, (B,), the mean over each image; None where there is no z.

        Unlike the loss it is 0 for a perfect answer, and common colours count as often as they are.

        Args:
            images: (B, 3, H, W) float in [0, 1].
        """
        if self._config.loss == "l2":
            return None
        bins, shares = self.bins.encode(_subsampled(images))
        answers = soft_cross_entropy(self._resting_answer(images), bins, shares)
        return (answers + torch.xlogy(shares, shares).sum(dim=1)).mean(dim=(1, 2))

    def _resting_answer(self, images: Tensor) -> Tensor:
        with evaluating(self):
            return self._answer(self._setup.normalize(grey_of(images)))

    def _answer(self, grey: Tensor) -> Tensor:
        """Return the decoder's answer (B, 313 or 2, H/4, W/4) float32."""
        answers: Tensor = self.decoder(self._map.of(self.backbone, grey))
        return answers.float()


def soft_cross_entropy(logits: Tensor, bins: Tensor, shares: Tensor) -> Tensor:
    """Return -sum_q Z_q log z_q of each pixel, (B, h, w); its least is the entropy of Z.

    Args:
        logits: (B, Q, h, w) float32.
        bins: (B, k, h, w) int64, where Z is not zero.
        shares: (B, k, h, w), Z there.
    """
    return -(shares * torch.log_softmax(logits, dim=1).gather(1, bins)).sum(dim=1)


def is_coloured(ab: Tensor) -> Tensor:
    """Return (B,) bool: whether any |a| or |b| of an image (B, 2, h, w) is above 5."""
    return (ab.abs() > _COLOURLESS).flatten(1).any(dim=1)


def _decoder(channels: int, side: int, *, width: int, goal: int, answers: int) -> nn.Sequential:
    """Double a map's side until it is the goal's, with two convolutions at least."""
    layers: list[nn.Module] = []
    count = 0
    while side != goal or count < 2:
        if side != goal:
            side = min(2 * side, goal)
            # the nearest, as a smooth one's gradient on a GPU differs from run to run
            layers.append(nn.Upsample(size=(side, side), mode="nearest"))
        layers += [
            nn.Conv2d(channels, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        ]
        channels, count = width, count + 1
    return nn.Sequential(*layers, nn.Conv2d(channels, answers, 1))


def _subsampled(pixels: Tensor) -> Tensor:
    """Return a, b of every fourth pixel, (B, 2, H/4, W/4)."""
    return rgb_to_lab(pixels[:, :, ::_STRIDE, ::_STRIDE])[:, 1:]


def _enlarged(colours: Tensor, height: int, width: int) -> Tensor:
    """Return colours (B, 2, H, W) between which those of every fourth pixel stay where they are."""
    h, w = colours.shape[2:]
    padded = F.pad(colours, (0, 1, 0, 1), mode="replicate")
    size = (_STRIDE * h + 1, _STRIDE * w + 1)
    larger = F.interpolate(padded, size=size, mode="bilinear", align_corners=True)
    return larger[:, :, :height, :width]


def _colours(sample: Tensor) -> Tensor:
    """Return a, b (M, 2, H/4, W/4) of images (M, 3, H, W) uint8."""
    return torch.cat([_subsampled(piece.float() / 255) for piece in torch.split(sample, _PIECE)])


def _check_colour(colours: Tensor) -> None:
    if not is_coloured(colours).any():
        raise DataError(
            "colorization learns from images in colour, of which some |a| or |b| is above "
            f"{_COLOURLESS:g}",
            found=f"{len(colours)} images of the data set, all of them grey",
            remedy="choose another method, pirl for instance, or images in colour",
        )
