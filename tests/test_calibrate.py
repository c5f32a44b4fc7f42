import hashlib
import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from deploy.errors import BadInputError
from export.precision.calibrate import (
    BINS,
    Histogram,
    assert_disjoint,
    calibration_provenance,
    collect_histograms,
)
from export.precision.ranges import METHODS, _divergence, find_range


def histogram_of(*parts) -> Histogram:
    histogram = Histogram()
    for part in parts:
        histogram.add(np.asarray(part, np.float32))
    return histogram


def model_of(*nodes, shape, weights=()) -> bytes:
    """Return a model from `images` to `logits`."""
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "g",
        [value("images", TensorProto.FLOAT, shape)],
        [value("logits", TensorProto.FLOAT, None)],
        list(weights),
    )
    opsets = [helper.make_opsetid("", 20)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def cnn(batch="batch") -> bytes:
    generator = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array(generator.normal(0, 0.2, size).astype(np.float32), name)
        for name, size in (("w1", (8, 3, 3, 3)), ("w2", (4, 8, 3, 3)))
    ]
    return model_of(
        helper.make_node("Conv", ["images", "w1"], ["a"], "one/Conv"),
        helper.make_node("Relu", ["a"], ["b"], "one/Relu"),
        helper.make_node("Conv", ["b", "w2"], ["c"], "two/Conv"),
        helper.make_node("GlobalAveragePool", ["c"], ["logits"], "pool/GlobalAveragePool"),
        shape=[batch, 3, 16, 16],
        weights=weights,
    )


def images(count, *, seed=0):
    return np.random.default_rng(seed).normal(0, 1, (count, 3, 16, 16)).astype(np.float32)


def test_each_image_of_a_calibration_set_is_known_by_its_hash():
    found = calibration_provenance(iter([b"one", b"two"]))
    assert found.sha256 == (hashlib.sha256(b"one").hexdigest(), hashlib.sha256(b"two").hexdigest())
    assert found.to_json() == {"count": 2, "sha256": found.digest}
    assert found.digest != calibration_provenance([b"two", b"one"]).digest
    assert found.digest != calibration_provenance([b"one"]).digest


def test_an_empty_calibration_set_is_refused():
    with pytest.raises(BadInputError, match="found: none"):
        calibration_provenance([])


def test_images_that_are_calibrated_and_measured_on_are_counted_and_the_first_is_named():
    a, b, c = calibration_provenance([b"a", b"b", b"c"]).sha256
    assert_disjoint([a, b], [c])
    with pytest.raises(BadInputError, match=rf"2 images in both, first .* 1 \({b[:12]}\)"):
        assert_disjoint([a, b, c], [c, b])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.lists(st.floats(-1e6, 1e6, width=32, allow_subnormal=False), min_size=1, max_size=20),
        min_size=1,
        max_size=5,
    ),
    st.randoms(use_true_random=False),
)
def test_a_histogram_is_the_same_however_its_values_are_dealt_out(parts, random):
    whole = histogram_of([value for part in parts for value in part])
    random.shuffle(parts)
    dealt = histogram_of(*parts)
    assert np.array_equal(whole.counts, dealt.counts)
    assert (whole.exponent, whole.lowest, whole.highest) == (
        dealt.exponent,
        dealt.lowest,
        dealt.highest,
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6, width=32, allow_subnormal=False), min_size=1, max_size=40))
def test_a_histogram_counts_what_numpy_does(values):
    histogram = histogram_of(values)
    span = 2.0**histogram.exponent
    expected, _ = np.histogram(np.float32(values), np.linspace(-span, span, 2 * BINS + 1))
    assert np.array_equal(histogram.counts, expected)
    assert histogram.highest == max(np.float32(values))


def test_minmax_clips_nothing_and_percentile_clips_the_share_that_it_names():
    values = np.random.default_rng(0).normal(0, 1, 200_000).astype(np.float32)
    values[0], values[1] = -50, 80
    histogram = histogram_of(values)
    assert find_range(histogram, "minmax") == (-50, 80)
    low, high = find_range(histogram, "percentile")
    expected = np.quantile(values, [0.00005, 0.99995])
    np.testing.assert_allclose([low, high], expected, atol=2 * histogram.bin_width)


def test_entropy_clips_lonely_outliers_and_keeps_a_distribution_without_any():
    generator = np.random.default_rng(0)
    values = generator.normal(0, 1, 200_000).astype(np.float32)
    low, high = find_range(histogram_of(values, [50.0]), "entropy")
    assert -8 < low < -2 and 2 < high < 8
    even = generator.uniform(-1, 1, 200_000).astype(np.float32)
    assert find_range(histogram_of(even), "entropy")[1] > 0.95


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("values", [[0.0], [0.0, 0.0, 3.0], [-2.0], [1e-30, 1e30], [5.0] * 9])
def test_a_range_lies_within_what_was_seen(values, method):
    low, high = find_range(histogram_of(values), method)
    assert min(values) <= low <= max(values) or low == pytest.approx(min(values))
    assert low <= high <= np.float32(max(values))


@pytest.mark.parametrize("method", METHODS)
def test_a_relus_range_begins_at_zero(method):
    values = np.maximum(np.random.default_rng(1).normal(0, 1, 10_000), 0)
    assert find_range(histogram_of(values), method)[0] == 0


def reference_divergence(counts, size, levels=128):
    """The loop of Migacz' slides, for a size that the levels divide."""
    p = [float(count) for count in counts[:size]]
    p[-1] += float(sum(counts[size:]))
    q = [0.0] * size
    for start in range(0, size, size // levels):
        group = range(start, start + size // levels)
        occupied = [i for i in group if p[i] > 0]
        for i in occupied:
            q[i] = sum(counts[j] for j in group) / len(occupied)
    pairs = [(a / sum(p), b / sum(q)) for a, b in zip(p, q, strict=True) if a > 0]
    if any(b == 0 for _, b in pairs):
        return math.inf
    return sum(a * math.log(a / b) for a, b in pairs)


@pytest.mark.parametrize("size", [128, 256, 1024, 2048])
@pytest.mark.parametrize("sparse", [False, True])
def test_the_divergence_is_that_of_the_source(size, sparse):
    values = np.random.default_rng(3).laplace(0, 1, 300 if sparse else 30_000)
    counts, _ = np.histogram(np.abs(values), BINS, (0, 12))
    expected = reference_divergence(counts.tolist(), size)
    assert _divergence(counts, size) == pytest.approx(expected, rel=1e-9)


def test_a_tensor_of_zeros_or_of_few_values_keeps_its_range():
    assert find_range(histogram_of(np.zeros(100_000)), "entropy") == (0, 0)
    assert find_range(histogram_of(np.ones(500), [9]), "entropy") == (1, 9)


def test_the_histograms_of_a_model_hold_every_activation_once():
    x, tensors = images(6), ("images", "a", "b", "c")
    whole = collect_histograms(cnn(), [x], tensors)
    assert [whole[tensor].counts.sum() for tensor in tensors] == [4608, 9408, 9408, 3456]
    assert (whole["images"].lowest, whole["images"].highest) == (x.min(), x.max())
    assert whole["b"].lowest == 0 and whole["b"].highest == whole["a"].highest
    for parts in (iter([x[:1], x[1:]]), [x[3:], x[:3]]):
        dealt = collect_histograms(cnn(batch=1), parts, tensors)
        assert np.array_equal(dealt["images"].counts, whole["images"].counts)
        assert dealt["c"].highest == pytest.approx(whole["c"].highest, rel=1e-5)


def test_a_model_is_not_calibrated_on_nothing():
    with pytest.raises(BadInputError, match="found: none"):
        collect_histograms(cnn(), [], ["images"])


def test_values_that_are_not_finite_are_refused_by_the_name_of_the_tensor():
    x = images(2)
    x[1, 0, 0, 0] = np.inf
    with pytest.raises(BadInputError, match="1 others in tensor 'images'"):
        collect_histograms(cnn(), [x], ["images", "a"])
    grows = model_of(
        helper.make_node("Exp", ["images"], ["large"], "a/Exp"),
        helper.make_node("Relu", ["large"], ["logits"], "b/Relu"),
        shape=[1, 3],
    )
    with pytest.raises(BadInputError, match="3 others in tensor 'large'"):
        collect_histograms(grows, [np.full((1, 3), 200, "f4")], ["large"])


def test_activations_are_not_kept_in_memory():
    x = images(64)
    collect_histograms(cnn(), [x[:8]], ["images", "a", "b", "c"])  # what is loaded once
    tracemalloc.start()
    collect_histograms(cnn(), (x[i : i + 8] for i in range(0, 64, 8)), ["images", "a", "b", "c"])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    one_image = 4 * (3 * 16 * 16 + 2 * 8 * 14 * 14 + 4 * 12 * 12)
    assert peak < 64 * one_image / 2


def test_an_image_that_leaves_a_tensor_at_zero_does_not_widen_its_histogram():
    histogram = Histogram()
    histogram.add(np.full(8, 1e-3, np.float32))
    width = histogram.bin_width
    histogram.add(np.zeros(8, np.float32))
    assert histogram.bin_width == width and histogram.counts.sum() == 16
