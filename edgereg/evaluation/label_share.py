"""A share of a data set's labels, class by class, to see how few suffice."""

from edgereg.data.images import FewLabels, Images, labels_of
from edgereg.errors import DataError

__all__ = ["label_share"]


def label_share(images: Images, share: float, *, seed: int) -> Images:
    """Return a share of the images of each class, at least one; the whole if the share is 1.

    With one seed the images of a share are among those of every larger share, so that what they
    are worth can be compared.

    Args:
        images: Labelled.
        share: Above 0, up to 1.
        seed: Decides which.

    Raises:
        DataError: `share` is out of its range, or there are no labels.
    """
    if not 0 < share <= 1:
        raise DataError(
            "a share of the labels is above 0, and 1 at most",
            found=f"{share:g}",
            remedy="write 0.01 for 1 %, for instance",
        )
    labels_of(images)
    return images if share == 1 else FewLabels(images, share, seed=seed, least=1)
