"""A share of a data set's labels, class by class, to see how few suffice."""

import numpy as np

from edgereg.data.images import Images, Subset, labels_of
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
    labels = labels_of(images)
    if share == 1:
        return images
    rng = np.random.default_rng(seed)
    chosen = []
    for label in range(len(images.class_names)):
        members = rng.permutation(np.flatnonzero(labels == label))
        chosen.append(members[: max(1, round(share * len(members)))])
    indices = np.sort(np.concatenate(chosen))
    return Subset(images, indices, name=f"{images.name} ({100 * share:g}% of the labels)")
