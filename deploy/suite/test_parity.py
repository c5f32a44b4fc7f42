"""The bundle answers here as it did where it was exported."""

from collections.abc import Callable

import numpy as np
import pytest

from deploy.bundle.read import Bundle
from deploy.measure.verify import DECODING, STAGES, VerifyReport
from deploy.runtime.runner import Runner

Record = Callable[[str, object], None]


@pytest.mark.parametrize("stage", STAGES)
def test_golden_images_come_out_as_the_reference(
    stage: str, verified: VerifyReport, record_property: Record
) -> None:
    """Each stage on its own, by `edgereg verify`'s comparator."""
    found = {report.name: report for report in verified.stages}
    if stage in DECODING and stage not in found:
        pytest.skip("; ".join(verified.not_checked))
    comparison = found[stage].comparison
    for name, value in comparison.to_json().items():
        record_property(name, value)
    if not comparison.passed:
        reasons = "; ".join(comparison.reasons)
        pytest.fail(f"{stage}: {reasons} (n = {comparison.count})", pytrace=False)


def test_a_batch_answers_as_its_images_do_one_by_one(bundle: Bundle, runner: Runner) -> None:
    """Within the variant's tolerance: kernels for another batch size sum in another order."""
    size = min(bundle.manifest.max_batch, bundle.manifest.golden.count)
    if size == 1:
        pytest.skip("the bundle takes one image at a time")
    inputs = bundle.array(bundle.manifest.golden.preprocessed)[:size]
    together = runner(inputs)
    alone = np.concatenate([runner(inputs[i : i + 1]) for i in range(size)])
    error = float(np.abs(together - alone).max() / np.ptp(alone))
    allowed = bundle.manifest.variants[runner.precision].tolerance.max_scaled_error
    if not error <= allowed:  # NaN is not
        pytest.fail(f"scaled error {error:.3g} > {allowed:.3g} in a batch of {size}", pytrace=False)


def test_an_image_gives_the_same_answer_twice(bundle: Bundle, runner: Runner) -> None:
    """The first golden image, before and after another one went through."""
    inputs = bundle.array(bundle.manifest.golden.preprocessed)
    first = runner(inputs[:1])
    runner(inputs[-1:])
    if not np.array_equal(first, runner(inputs[:1])):
        pytest.fail("the same input gave another output", pytrace=False)
