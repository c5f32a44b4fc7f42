import time

import numpy as np
import pytest
from deploy_bundle import COUNT, linear_onnx, write_small_bundle
from test_bench import CountingRunner

from deploy.errors import BadInputError
from deploy.measure.interleaved import LEAST_ALTERNATIONS, compare_speed
from deploy.measure.repeated_input import check_repeated_input


class SlowRunner(CountingRunner):
    """Sleeps, before each call or only before those with a new input."""

    def __init__(self, bundle, sleep_s, *, remembers=0):
        super().__init__(bundle)
        self._sleep_s, self._remembers, self._seen = sleep_s, remembers, []

    def __call__(self, batch):
        content = batch.tobytes()
        if content not in self._seen:
            time.sleep(self._sleep_s)
        self._seen = [*self._seen, content][-self._remembers :] if self._remembers else []
        return super().__call__(batch)


@pytest.fixture
def bundle(tmp_path):
    return write_small_bundle(tmp_path / "b")


def pair(bundle, first, second, **options):
    return compare_speed((bundle, first), (bundle, second), **options)


def test_a_runner_against_itself_is_not_found_different(bundle):
    # A 95 % interval misses 1 in one of 20; in three, two of them hold it but for 1 in 140.
    holds = []
    for _ in range(3):
        runner = CountingRunner(bundle)
        low, high = pair(bundle, runner, runner, alternations=40).ratios["end to end"].interval
        holds.append(low <= 1 <= high)
    assert sum(holds) >= 2


def test_a_runner_against_itself_with_a_sleep_is_found_faster(bundle):
    result = pair(bundle, CountingRunner(bundle), SlowRunner(bundle, 0.001), alternations=20)
    assert all(ratio.interval[1] < 1 for ratio in result.ratios.values())
    assert result.first.median_ms < result.second.median_ms
    reverse = pair(bundle, SlowRunner(bundle, 0.001), CountingRunner(bundle), alternations=20)
    assert all(ratio.interval[0] > 1 for ratio in reverse.ratios.values())


def test_each_begins_every_second_alternation(bundle):
    order = []

    class Named(CountingRunner):
        def __call__(self, batch):
            order.append(self.label)
            return super().__call__(batch)

    first, second = Named(bundle), Named(bundle)
    first.label, second.label = "A", "B"
    pair(bundle, first, second, alternations=20, warmup=0)
    assert "".join(order) == "AAAAABBBBBBBBBBAAAAA" * 10 + "A" * COUNT + "B" * COUNT  # the check


def test_a_short_run_still_has_twenty_alternations(bundle):
    runner = CountingRunner(bundle)
    result = pair(bundle, runner, runner, duration_s=1e-6, warmup=0)
    assert result.alternations == LEAST_ALTERNATIONS == 20
    assert runner.calls == 2 * (20 * 5 + COUNT)
    with pytest.raises(BadInputError, match="20 alternations or more"):
        pair(bundle, runner, runner, alternations=19)


def test_a_long_run_goes_on_until_its_time_has_passed(bundle):
    runner, started = CountingRunner(bundle), time.perf_counter()
    assert pair(bundle, runner, runner, duration_s=0.5).alternations > 20
    assert time.perf_counter() - started >= 0.5


def test_a_fast_wrong_contender_is_no_result(bundle, tmp_path):
    wrong = write_small_bundle(tmp_path / "w", **{"model.fp32.onnx": linear_onnx(-np.eye(3))})
    result = compare_speed(
        (bundle, CountingRunner(bundle)), (wrong, CountingRunner(wrong)), alternations=20
    )
    assert result.first.check.passed and not result.second.check.passed
    assert any("outputs of w fp32 are wrong" in reason for reason in result.failures)


def test_a_model_that_computes_each_time_passes(bundle):
    result = check_repeated_input(bundle, SlowRunner(bundle, 0.001))
    assert result.passed and "no cache" in str(result)
    assert result.ratio.rounds >= 11


@pytest.mark.parametrize("remembers", [1, 1000])
def test_a_cache_of_one_input_or_of_many_is_found(bundle, remembers):
    result = check_repeated_input(bundle, SlowRunner(bundle, 0.002, remembers=remembers))
    assert not result.passed and "a cache was measured" in str(result)


def test_an_input_that_is_new_has_never_been_there(bundle):
    seen = []

    class Recording(CountingRunner):
        def __call__(self, batch):
            seen.append(batch.tobytes())
            return super().__call__(batch)

    check_repeated_input(bundle, Recording(bundle))
    assert seen[0::2] == seen[1::2] and len(set(seen)) == len(seen) / 2
    stored = bundle.array("golden/preprocessed.npy")
    assert not {row[np.newaxis].tobytes() for row in stored} & set(seen)
