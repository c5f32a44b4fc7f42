"""The bundle loses no more right answers here than its gate allows."""

from collections.abc import Callable

import pytest

from deploy.measure.verify import VerifyReport


def test_the_net_loss_on_held_out_images_is_within_the_gate(
    verified: VerifyReport, record_property: Callable[[str, object], None]
) -> None:
    """By the labelled sample that the bundle carries."""
    if verified.holdout is None:
        pytest.skip("; ".join(verified.not_checked[1:]) or "the bundle carries no labelled sample")
    for name, value in verified.holdout.to_json().items():
        record_property(name, value)
    if not verified.holdout.passed:
        pytest.fail(str(verified.holdout), pytrace=False)
