"""What every runner asks of the arrays that it is handed."""

from typing import Any

from numpy.typing import NDArray

from deploy.bundle.manifest import TensorSpec
from deploy.errors import BadInputError

__all__ = ["batch_shape", "check_batch", "check_out", "same_shape", "shown_shape"]


def check_batch(batch: NDArray[Any], spec: TensorSpec, *, most: int | None = None) -> None:
    """Refuse a batch of another type or shape than the manifest's input, or of too many images.

    Raises:
        BadInputError: It is.
    """
    fits = len(batch.shape) == len(spec.shape) and all(
        a == b or isinstance(b, str) for a, b in zip(batch.shape, spec.shape, strict=True)
    )
    if batch.dtype != spec.dtype or not fits:
        raise BadInputError(
            f"the input '{spec.name}' must be {spec.dtype} {shown_shape(spec.shape)}",
            found=f"{batch.dtype} {shown_shape(batch.shape)}",
            remedy="pre-process images as the bundle's manifest says",
        )
    if most is not None and not 1 <= len(batch) <= most:
        raise BadInputError(
            f"a batch must hold 1 to {most} images", found=str(len(batch)), remedy="split it"
        )


def check_out(out: NDArray[Any], spec: TensorSpec, count: int) -> None:
    """Refuse an array that cannot take the outputs of `count` images.

    Raises:
        BadInputError: It has another type or shape, or its elements do not lie in a row.
    """
    shape = batch_shape(spec, count)
    if out.dtype != spec.dtype or out.shape != shape or not out.flags.c_contiguous:
        raise BadInputError(
            f"`out` must be {spec.dtype} {shown_shape(shape)}, contiguous",
            found=f"{out.dtype} {shown_shape(out.shape)}",
            remedy="make it by numpy.empty",
        )


def batch_shape(spec: TensorSpec, count: int) -> tuple[int, ...]:
    """The shape of so many rows of a tensor of which only the first dimension may be free."""
    return (count, *(int(n) for n in spec.shape[1:]))


def same_shape(found: tuple[Any, ...], expected: tuple[int | str, ...]) -> bool:
    """Whether fixed dimensions agree and free ones are free; a free one's name does not matter."""
    return len(found) == len(expected) and all(
        a == b if isinstance(b, int) else not isinstance(a, int)
        for a, b in zip(found, expected, strict=True)
    )


def shown_shape(shape: tuple[Any, ...]) -> str:
    """A shape for people: "(batch, 3, 8, 8)"."""
    return "(" + ", ".join(map(str, shape)) + ")"
