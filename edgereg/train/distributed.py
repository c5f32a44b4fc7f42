"""One process or several, started by torchrun; everything else asks a World.

Each process takes its part of every batch, and DistributedDataParallel averages the gradients (Li
et al., "PyTorch Distributed", VLDB 2020). As the parts are of one size, the average of the parts'
mean losses is the batch's, so that N processes descend the same loss as one.
"""

import gc
import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from edgereg.errors import EdgeregError, RecipeError

__all__ = ["World", "join_world"]


@dataclass(frozen=True)
class World:
    """Which of how many processes this is.

    Args:
        rank: 0 writes and reports.
        size: Number of processes.
        device: Of this process, as torch names it.
    """

    rank: int = 0
    size: int = 1
    device: str = "cpu"

    @property
    def is_first(self) -> bool:
        """Return whether this process writes and reports."""
        return self.rank == 0

    def check_batch(self, batch_size: int, accumulate: int, *, size: int) -> None:
        """Refuse a batch that cannot be cut into equal parts.

        Args:
            batch_size: Of all processes together.
            accumulate: Parts of a process's share.
            size: Images in the data set.

        Raises:
            RecipeError: A part would be larger than another, and its images would count less; or a
                process would have none.
        """
        if size < self.size:
            raise RecipeError(
                "each process has an image of every batch",
                found=f"{self.size} processes, and {size} images",
                remedy="start fewer processes",
            )
        if batch_size % (self.size * accumulate):
            raise RecipeError(
                "batch_size is a multiple of the processes times compute.accumulate",
                found=f"batch_size: {batch_size}, {self.size} processes, "
                f"compute.accumulate: {accumulate}",
                remedy="change one of them",
            )

    def part(self, batch: NDArray[np.int64], parts: int = 1) -> list[NDArray[np.int64]]:
        """Return this process's share of a batch, cut into equal parts.

        A data set smaller than the batch is cut as evenly as it goes.
        """
        share = len(batch) // self.size
        mine = batch[self.rank * share : (self.rank + 1) * share] if self.size > 1 else batch
        parts = min(parts, len(mine))
        return [mine[len(mine) * p // parts : len(mine) * (p + 1) // parts] for p in range(parts)]

    def wrap(self, module: nn.Module, *, has_unused: bool = False) -> nn.Module:
        """Return a module whose gradients are averaged over the processes.

        Args:
            module: Answers with a loss.
            has_unused: Whether the loss may not depend on some of its parameters.
        """
        if self.size == 1:
            return module
        wrapper = nn.parallel.DistributedDataParallel
        # Buffers are left alone in each step: a memory bank is no statistic, and BatchNorm has a
        # setting of its own. The option has another name from torch 2.13 on.
        names = inspect.signature(wrapper).parameters
        option = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
        options: dict[str, Any] = {option: False, "find_unused_parameters": has_unused}
        return wrapper(module, **options)

    def total(self, values: Tensor) -> Tensor:
        """Return the sum over the processes."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def from_first(self, value: object) -> object:
        """Return the first process's value."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]

    @torch.no_grad()
    def average_statistics(self, module: nn.Module) -> None:
        """Give every process the mean of all processes' BatchNorm statistics."""
        if self.size == 1:
            return
        for name, buffer in module.named_buffers():
            if name.rpartition(".")[2] in ("running_mean", "running_var"):
                dist.all_reduce(buffer)
                buffer.div_(self.size)


@contextmanager
def join_world(device: str) -> Iterator[World]:
    """Join the processes that torchrun started, if it did.

    Args:
        device: "cpu" or "cuda"; on "cuda" each process takes the GPU of its local rank.

    Raises:
        EdgeregError: The processes did not find each other.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World(device=device)
        return
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    try:
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    except (RuntimeError, ValueError) as error:
        raise EdgeregError(
            "torchrun's processes must reach each other",
            found=str(error).splitlines()[0],
            remedy="start them with torchrun --nproc-per-node N --no-python edgereg train ...",
        ) from error
    try:
        yield World(rank=dist.get_rank(), size=size, device=device)
    finally:
        dist.destroy_process_group()
        # DistributedDataParallel keeps the group in a cycle; threads of gloo that outlive the
        # interpreter abort the process (in 2 of 6 runs, with torch 2.14)
        gc.collect()
