"""One remembered vector for each image (Wu et al., 1805.01978; PIRL, 1912.01991, section 2.3)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgereg.ssl.gather import gather

__all__ = ["MemoryBank"]


class MemoryBank(nn.Module):
    """Rows m_I, one an image, unit length, moved by an exponential mean.

    Where there are several processes each of them keeps the whole bank, and all move it alike.
    A step's updates can be taken back until `end_step`.

    Args:
        size: Images N in the data set.
        dim: Width of a vector.
        momentum: Share of the old row that is kept, in [0, 1]; the paper's is 0.5.
    """

    rows: Tensor

    def __init__(self, size: int, dim: int, *, momentum: float = 0.5) -> None:
        super().__init__()
        self.momentum = momentum
        rows = torch.rand(size, dim) - 0.5
        self.register_buffer("rows", F.normalize(rows, dim=1))
        self._before: list[tuple[Tensor, Tensor]] = []  # of this step: indices, and their rows

    @torch.no_grad()
    def update(self, indices: Tensor, embeddings: Tensor) -> None:
        """Move the rows of a batch: m <- normalize(momentum * m + (1 - momentum) * f(v_I)).

        Args:
            indices: (B,) int64, distinct, also from those of the other processes.
            embeddings: (B, dim) float32, unit length.
        """
        indices, embeddings = gather(indices), gather(embeddings)
        before = self.rows[indices]
        self._before.append((indices, before))
        self.rows[indices] = F.normalize(torch.lerp(embeddings, before, self.momentum), dim=1)

    def end_step(self, *, taken: bool) -> None:
        """Keep the updates since the last step's end, or take them back; see Method."""
        if not taken:
            for indices, before in self._before:
                self.rows[indices] = before
        self._before.clear()

    def draw(self, count: int) -> Tensor:
        """Return (K,) int64: rows drawn uniformly from all, with replacement."""
        return torch.randint(len(self.rows), (count,)).to(self.rows.device)
