"""The device that a command computes on."""

from edgereg.errors import EdgeregError

__all__ = ["choose_device"]


def choose_device(name: str | None) -> str:
    """Return "cpu" or "cuda": the one that is named, else cuda where there is one.

    Raises:
        EdgeregError: torch does not find it here.
    """
    import torch

    device = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise EdgeregError(
            "the device must be one that torch finds here",
            found=f"'{device}': {str(error).splitlines()[0]}",
            remedy="leave --device out, or give cpu",
        ) from error
    return device
