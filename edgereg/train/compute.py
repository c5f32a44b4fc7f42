"""How the arithmetic of a step is done."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch

from edgereg.errors import RecipeError, check_settings

__all__ = ["ComputeConfig", "autocast"]

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class ComputeConfig:
    """How the arithmetic of a step is done; but for `accumulate` it changes no more than rounding.

    Args:
        precision: Of the network's products: "fp32", or autocast to "bf16" or "fp16" (Micikevicius
            et al., 1710.03740). Weights, losses and evaluation stay in float32; fp16 scales its
            loss and needs a GPU.
        accumulate: Parts into which a batch is cut; their gradients are summed before a step. What
            looks at a batch as a whole, BatchNorm and the losses that compare images, sees a part.
        channels_last: Whether tensors lie as NHWC in memory, which convolutions like.
        compile: Whether torch.compile translates the network first; not in pre-training.
    """

    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    accumulate: int = 1
    channels_last: bool = True
    compile: bool = False

    def __post_init__(self) -> None:
        check_settings(self, "compute.", {"accumulate": ("1 or more", self.accumulate >= 1)})

    def check_device(self, device: str) -> None:
        """Refuse a precision that a device does not offer.

        Raises:
            RecipeError: fp16 on a CPU, which has no fast arithmetic for it.
        """
        if self.precision == "fp16" and not device.startswith("cuda"):
            raise RecipeError(
                "fp16 needs a GPU", found=f"compute.precision: fp16 on {device}", remedy="use bf16"
            )


def autocast(config: ComputeConfig, device: torch.device) -> AbstractContextManager[object]:
    """Return the context in which the network runs."""
    if config.precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, _DTYPES[config.precision])
