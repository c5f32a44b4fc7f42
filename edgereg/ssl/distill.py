"""Distillation: a small student learns how a large teacher sees similarities, without labels.

Student and teacher see the same mixed image. s is the student's embedding, mapped to the teacher's
width, t the teacher's; Q holds the last K teacher embeddings; all have unit length:

    L = KL( softmax(t . Q / tau) || softmax(s . Q / tau) )

This is SEED's objective (Fang et al., 2101.04731, eq. 3 and 4) with one temperature, on images that
are mixed by lambda ~ U(0, 1) (Mixup, 1710.09412). It serves small encoders better than contrast
does: on ImageNet SEED lifts a MobileNetV3-L from 36.3 to 68.2 % (linear probe, their tables).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgereg.errors import check_settings
from edgereg.ssl.gather import gather
from edgereg.ssl.method import Method, Setup, View, full_precision

__all__ = ["Distill", "DistillConfig", "distillation_loss", "queue_size"]


@dataclass(frozen=True)
class DistillConfig:
    """The method's constants.

    Args:
        teacher: An encoder's or a classifier's checkpoint.
        temperature: tau.
        queue: K, teacher embeddings that are kept; 0 is the size that suits the data set.
        mixes: Whether images are mixed in pairs.
    """

    teacher: str = ""
    temperature: float = 0.07
    queue: int = 0
    mixes: bool = True

    def __post_init__(self) -> None:
        check_settings(
            self,
            "distill.",
            {
                "temperature": ("above 0", self.temperature > 0),
                "queue": ("not negative", self.queue >= 0),
            },
        )


class Distill(Method):
    """The student, the map to the teacher's width, the queue and the loss; see Method.

    Args:
        setup: Its backbone is the student.
        config: The method's constants.
        teacher: Maps views in [0, 1], (B, 3, H, W), to (B, teacher_dim). It is not trained, and no
            part of the state.
        teacher_dim: Width of its output.
    """

    queue: Tensor
    filled: Tensor

    def __init__(
        self,
        setup: Setup,
        config: DistillConfig,
        *,
        teacher: Callable[[Tensor], Tensor],
        teacher_dim: int,
    ) -> None:
        super().__init__()
        self._setup, self._config = setup, config
        self._teacher = teacher
        self.backbone = setup.backbone
        self.head = nn.Linear(setup.feature_dim, teacher_dim)
        size = config.queue or queue_size(setup.size)
        self.register_buffer("queue", torch.zeros(size, teacher_dim))  # the newest first
        self.register_buffer("filled", torch.tensor(0))
        self._before: tuple[Tensor, Tensor] | None = None  # both, as this step found them

    def views(self, images: Tensor, view: View) -> tuple[Tensor, ...]:
        """Return what the student sees (B, 3, H, W), and what the teacher makes of it (B, D)."""
        shown = self._setup.chain(images, view(0))
        if self._config.mixes:
            draws = view(1)
            share = draws.uniform("share")[:, :, None, None]
            shown = torch.lerp(shown, shown.flip(0), share)
        with torch.no_grad():
            told = F.normalize(self._teacher(shown).float(), dim=1)
        return self._setup.normalize(shown), told

    def project(self, features: Tensor) -> Tensor:
        """Return (B, D) from (B, feature_dim)."""
        projected: Tensor = self.head(features)
        return projected

    def forward(self, views: tuple[Tensor, ...], indices: Tensor) -> Tensor:
        """Return the divergence from the teacher, a scalar, and remember the batch."""
        shown, told = views
        answer = F.normalize(self.project(self.backbone(shown)).float(), dim=1)
        self._remember(gather(told))
        known = self.queue[: int(self.filled)]
        with full_precision(answer.device):
            return distillation_loss(answer, told, known, temperature=self._config.temperature)

    def end_step(self, *, taken: bool) -> None:
        """Keep or take back what the step's batches left in the queue; see Method."""
        if self._before is not None and not taken:
            self.queue, self.filled = self._before
        self._before = None

    def _remember(self, told: Tensor) -> None:
        self._before = self._before or (self.queue, self.filled)
        size = len(self.queue)
        self.queue = torch.cat([told, self.queue])[:size]
        self.filled = (self.filled + len(told)).clamp(max=size)


def distillation_loss(
    student: Tensor, teacher: Tensor, known: Tensor, *, temperature: float
) -> Tensor:
    """Return the mean Kullback-Leibler divergence of the student's similarities.

    Args:
        student: (B, D) of unit length.
        teacher: (B, D) of unit length.
        known: (K, D) of unit length.
        temperature: tau.
    """
    target = F.log_softmax(teacher @ known.T / temperature, dim=1)
    answer = F.log_softmax(student @ known.T / temperature, dim=1)
    return F.kl_div(answer, target, log_target=True, reduction="batchmean")


def queue_size(images: int) -> int:
    """Return the length of the queue that suits a data set, as in LightlyTrain's documentation."""
    for limit, size in ((1_000, 256), (10_000, 2_048), (20_000, 4_096)):
        if images <= limit:
            return size
    return 8_192
