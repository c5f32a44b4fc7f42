"""The bundle is fast enough here, and the figures are those of right answers on a steady board."""

from collections.abc import Callable

import pytest

from deploy.measure.bench import END_TO_END, BenchResult
from deploy.measure.statistics import minimum_samples

Record = Callable[[str, object], None]


def test_timed_outputs_are_right(timed: BenchResult) -> None:
    """A sample of what was timed is what the same images give again, and that is as the reference.

    The one to the bit; the other by the variant's own tolerance, on all golden images.
    """
    if not timed.check.passed:
        pytest.fail("; ".join(timed.check.reasons), pytrace=False)


def test_the_board_kept_its_pace(timed: BenchResult) -> None:
    """Clocks, heat and throttling while the images were timed."""
    if timed.validity.verdict == "not watched":
        pytest.skip(str(timed.validity))
    if timed.validity.verdict == "invalid":
        pytest.fail(str(timed.validity), pytrace=False)


def test_the_99th_percentile_is_within_its_limit(
    timed: BenchResult, request: pytest.FixtureRequest, record_property: Record
) -> None:
    """End to end, one image at a time; of too few images there is no 99th percentile."""
    summary = timed.summaries_ms()[END_TO_END]
    for name, value in summary.percentiles.items():
        record_property(f"{name}_ms", value)
    record_property("count", summary.count)
    record_property("not_timed", ", ".join(timed.not_timed) or "nothing")  # without Pillow
    limit: float | None = request.config.getoption("max_p99_ms")
    if limit is None:
        pytest.skip("no --max-p99-ms was given")
    found = summary.percentiles["p99"]
    if found is None:
        needed = minimum_samples(99)
        pytest.fail(
            f"n too small: {summary.count} images were timed, a p99 needs {needed}: "
            "give more --timed-seconds",
            pytrace=False,
        )
    if found > limit:
        pytest.fail(f"p99 {found:.3f} ms > {limit:g} ms, n = {summary.count}", pytrace=False)
