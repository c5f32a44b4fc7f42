import io
import json
import platform

import numpy as np
import pytest
from deploy_bundle import COUNT, bundle_parts, linear_onnx, npy, write_small_bundle

from deploy.bundle.read import open_bundle
from deploy.bundle.tolerance import Tolerance
from deploy.bundle.write import write_bundle
from deploy.errors import BadInputError
from deploy.measure.bench import STAGES, bench, cpu_model
from deploy.runtime.runner import open_runner


class CountingRunner:
    """Runs the bundle, counts its calls, and is wrong from a given call on, until another."""

    def __init__(self, bundle, wrong_from=10**9, wrong_until=10**9):
        self._runner = open_runner(bundle, backend="onnxruntime", precision="fp32")
        self.name, self.precision, self.threads = self._runner.name, "fp32", 1
        self.calls, self._wrong = 0, range(wrong_from + 1, wrong_until + 1)

    def __call__(self, batch):
        self.calls += 1
        logits = self._runner(batch)
        return logits[:, ::-1] if self.calls in self._wrong else logits

    def close(self):
        self._runner.close()


@pytest.fixture
def bundle(tmp_path):
    return write_small_bundle(tmp_path / "b")


def test_a_counted_run_keeps_every_sample_and_leaves_the_warm_up_out(bundle):
    runner, told = CountingRunner(bundle), []
    result = bench(bundle, runner, count=30, warmup=7, on_progress=told.append)
    assert runner.calls == 37 + COUNT  # which are not timed, but checked
    assert result.count == 30
    assert {stage: len(samples) for stage, samples in result.samples_ms.items()} == {
        **dict.fromkeys(STAGES, 30),
        "end to end": 30,
    }
    assert len(told) == 30 and told[-1].startswith("30 images in")


def test_the_stages_add_up_to_the_end_to_end_time(bundle):
    result = bench(bundle, CountingRunner(bundle), count=20)
    total = np.sum([result.samples_ms[stage] for stage in STAGES], axis=0)
    np.testing.assert_allclose(total, result.samples_ms["end to end"])
    assert result.images_per_second == pytest.approx(1e3 / total.mean())


def test_a_run_ends_when_its_time_has_passed(bundle):
    result = bench(bundle, CountingRunner(bundle), duration_s=0.05, warmup=0)
    assert 10 <= sum(result.samples_ms["end to end"]) < 1000


def test_one_in_a_hundred_outputs_is_checked(bundle):
    result = bench(bundle, CountingRunner(bundle), count=2000, warmup=0)
    assert 10 <= result.check.count <= 30
    assert result.check.passed


def test_outputs_that_go_wrong_during_the_run_are_found(bundle):
    runner = CountingRunner(bundle, wrong_from=500)
    result = bench(bundle, runner, count=1500, warmup=COUNT)
    assert not result.check.passed


def test_outputs_that_were_wrong_only_while_they_were_timed_are_found(bundle):
    runner = CountingRunner(bundle, wrong_from=500, wrong_until=1000)
    check = bench(bundle, runner, count=1500, warmup=0).check
    assert check.golden.passed and not check.passed
    assert 0 < check.changed < check.count and "not those of the same images" in check.reasons[0]


def flipping(path, images):
    """A bundle that answers the first images otherwise than its reference; it may do so for 2."""
    manifest, contents = bundle_parts(tolerance=Tolerance(1.0, 4 / COUNT, "a test"))
    reference = np.load(io.BytesIO(contents["golden/outputs.npy"]))
    for row in reference[:images]:
        row[row.argmin()] = row.max() + 1e-3
    write_bundle(path, manifest, contents | {"golden/outputs.npy": npy(reference)})
    return open_bundle(path)


@pytest.mark.parametrize("warmup", range(COUNT))  # by which the image changes that is kept
@pytest.mark.parametrize(("images", "passed"), [(2, True), (3, False)])
def test_whichever_images_are_kept_the_tolerance_is_held_against_all(
    tmp_path, images, passed, warmup
):
    bundle = flipping(tmp_path / "b", images)
    check = bench(bundle, CountingRunner(bundle), count=1, warmup=warmup).check
    assert (check.count, check.changed, check.passed) == (1, 0, passed)
    assert check.golden.top1_agreement == pytest.approx(1 - images / COUNT)
    assert check.golden.count == COUNT


def test_a_wrong_model_is_found_in_the_shortest_run(tmp_path):
    bundle = write_small_bundle(tmp_path / "w", **{"model.fp32.onnx": linear_onnx(-np.eye(3))})
    assert not bench(bundle, CountingRunner(bundle), count=1).check.passed


def test_a_result_is_plain_json_with_raw_samples(bundle):
    result = bench(bundle, CountingRunner(bundle), count=70)
    document = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert document["count"] == 70 and document["threads"] == 1 and document["batch"] == 1
    assert document["validity"]["verdict"] in ("valid", "invalid", "not watched")
    assert len(document["samples_ms"]["infer"]) == 70
    percentiles = document["summaries_ms"]["end to end"]["percentiles"]
    assert percentiles["p90"] > 0 and percentiles["p99"] is None


def test_a_batch_is_one_sample_of_several_images(bundle):
    runner = CountingRunner(bundle)
    result = bench(bundle, runner, count=50, warmup=5, batch=4)
    assert (result.count, result.batch, result.warmup) == (13, 4, 8)
    assert runner.calls == 13 + 2 + 3  # of 6 images, four in turn: 3 batches until all is as before
    total_s = sum(result.samples_ms["end to end"]) / 1e3
    assert result.images_per_second == pytest.approx(52 / total_s)
    assert result.check.passed and result.check.count % 4 == 0


def test_a_wrong_row_in_a_batch_is_found(bundle):
    runner = CountingRunner(bundle, wrong_from=2)
    assert not bench(bundle, runner, count=600, warmup=0, batch=3).check.passed


@pytest.mark.parametrize("batch", [0, 17])
def test_a_batch_that_the_model_does_not_take_is_refused(bundle, batch):
    with pytest.raises(BadInputError, match="takes 16"):
        bench(bundle, CountingRunner(bundle), count=1, batch=batch)


@pytest.mark.parametrize("options", [{"count": 0}, {"duration_s": 0.0}, {"warmup": -1}])
def test_a_run_that_times_nothing_is_refused(bundle, options):
    with pytest.raises(BadInputError, match="must time an image"):
        bench(bundle, CountingRunner(bundle), **options)


def test_the_processor_is_read_where_it_is_named(tmp_path):
    assert cpu_model(tmp_path) == platform.machine()
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text("processor\t: 0\nmodel name\t: Big: Chip 3\n")
    assert cpu_model(tmp_path) == "Big: Chip 3"
