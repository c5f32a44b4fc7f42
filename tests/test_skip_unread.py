import math
from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torchvision
from export_models import noise, randomized
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from deploy.errors import CheckFailedError
from edgereg.models.vit import Block
from export.onnx_file.run_onnx import open_session
from export.onnx_file.to_onnx import to_onnx
from export.passes import skip_unread as the_pass
from export.passes.rows import COSTLY, Rows
from export.passes.simplify import SIMPLIFY_PASSES, simplify
from export.passes.skip_unread import skip_unread
from export.precision.calibrate import collect_histograms
from export.precision.quantize import observed_tensors, write_int8
from export.precision.ranges import find_ranges
from export.targets import TARGETS
from export.traced.graph import operator, shape

WITHOUT = tuple(one for one in SIMPLIFY_PASSES if one is not skip_unread)
CPU = TARGETS["onnxruntime-x86"]
PRODUCTS = {"aten.linear", "aten.matmul"}
DIM, TOKENS = 8, 6


class Transformer(nn.Module):
    """Blocks over tokens, and a head over what `read` takes of them."""

    def __init__(self, read, *, block=lambda: Block(DIM, heads=2), depth=1, width=DIM):
        super().__init__()
        self.blocks = nn.Sequential(*(block() for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(DIM), nn.Linear(width, 3)
        self.read = read

    def forward(self, x):
        return self.head(self.read(self.norm(self.blocks(x))))


def outputs(result, operators=COSTLY):
    """Return how many numbers a simplified module's operators put out, for a batch of two."""
    nodes = [node for node in result.model.graph.nodes if operator(node) in operators]
    return sum(math.prod(shape(node)) for node in nodes)


def multiply_adds(result):
    """Return the multiplications of a simplified module's products, for one image."""
    nodes = [node for node in result.model.graph.nodes if operator(node) in PRODUCTS]
    return sum(math.prod(shape(node)) * shape(node.args[0])[-1] for node in nodes) // 2


def changes(result):
    return result.report.passes["skip_unread"].changed


def saved_by_last_block(kept, *, perceptron=4 * DIM):
    """Return the multiplications that the last block of a Transformer is spared, for one image."""
    a_token = 2 * DIM * DIM + 2 * DIM * TOKENS + 2 * DIM * perceptron
    return (TOKENS - kept) * a_token


@pytest.mark.parametrize(
    ("read", "kept", "width"),
    [
        (lambda x: x[:, 0], 1, DIM),
        (lambda x: x[:, -1], 1, DIM),
        (lambda x: x[:, 2:3].flatten(1), 1, DIM),
        (lambda x: x[:, :3].mean(1), 3, DIM),
        (lambda x: x[:, ::2].mean(1), 3, DIM),
        (lambda x: torch.cat([x[:, 0], x[:, 4]], 1), 2, 2 * DIM),
        (lambda x: torch.cat([x[:, 0], x[:, 1], x[:, 5]], 1), 3, 3 * DIM),
        (lambda x: x.narrow(1, 1, 2).select(1, 1), 1, DIM),
        (lambda x: x.transpose(1, 2)[:, :, 0], 1, DIM),
    ],
)
def test_the_last_block_computes_only_the_tokens_that_are_read(read, kept, width):
    model, x = randomized(Transformer(read, width=width)), noise(2, TOKENS, DIM)
    old, new = (simplify(model, (x,), passes=passes) for passes in (WITHOUT, SIMPLIFY_PASSES))
    assert new.report.model_error < 1e-13
    assert multiply_adds(old) - multiply_adds(new) == saved_by_last_block(kept)
    torch.testing.assert_close(new.model(x[:1]), model(x[:1]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.mean(1),
        lambda x: x[:, 1:].mean(1),  # more than half
        lambda x: x[:, 0] + x.amax(1),  # another reader
        lambda x: torch.cat([x[:, 0], x[:, 1:].mean(1)], 1)[:, :DIM],
        lambda x: torch.cat([x[:, :, 0], x[:, :, 1]], 1)[:, :DIM],  # features
        lambda x: x.flatten(1)[:, :DIM],
        lambda x: x.roll(1, 1)[:, :4].mean(1),
    ],
)
def test_where_all_tokens_are_read_nothing_happens(read):
    model, x = randomized(Transformer(read)), noise(2, TOKENS, DIM)
    old, new = (simplify(model, (x,), passes=passes) for passes in (WITHOUT, SIMPLIFY_PASSES))
    assert not changes(new)
    assert [*map(str, new.model.graph.nodes)] == [*map(str, old.model.graph.nodes)]


def apply(forward, x, layer=None):
    """Return the simplification of a function that may call a layer."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer or nn.Linear(x.shape[-1], x.shape[-1])

        def forward(self, x):
            return forward(self.layer, x)

    return simplify(randomized(Model()), (x,))


@pytest.mark.parametrize(
    "forward",
    [
        lambda f, x: F.layer_norm(f(x), (6, 4))[:, 0],  # over the tokens, too
        lambda f, x: f(x).softmax(1)[:, 0],
        lambda f, x: f(x).cumsum(1)[:, 0],
        lambda f, x: f(x)[:, :, 0],  # what a layer's outputs are is no row
        lambda f, x: (f(x) @ f(x).mT)[:, :, 0].softmax(1),  # rows of the right side are columns
        lambda f, x: x.relu()[:, 0],  # nothing there that would be worth it
        lambda f, x: f(x).relu_()[:1],  # of the batch
    ],
)
def test_what_needs_all_rows_or_gains_nothing_stays(forward):
    assert not changes(apply(forward, noise(2, 6, 4)))


def test_a_selection_behind_a_convolution_and_its_activation_does_not_part_them():
    result = apply(lambda f, x: f(x).relu()[:, :, ::2], noise(2, 3, 8, 8), nn.Conv2d(3, 4, 1))
    assert not changes(result)


def test_of_a_value_that_others_read_the_rows_are_taken_and_not_computed_again():
    def forward(layer, x):
        y = layer(x)
        return torch.cat([layer(y.relu())[:, 0], y.sum(1)], 1)

    result = apply(forward, noise(2, 6, 4))
    assert changes(result)
    assert outputs(result, {"aten.linear"}) == 2 * (6 * 4 + 1 * 4)


def test_a_gate_that_is_the_same_for_all_tokens_and_a_position_are_followed():
    position = noise(6, 4)

    def forward(layer, x):
        return (layer(x) * x.mean(1, keepdim=True) + position.to(x))[:, 0]

    result = apply(forward, noise(2, 6, 4))
    assert outputs(result, {"aten.linear"}) == 2 * 4
    assert result.report.model_error < 1e-14


class SequenceFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(DIM, 2, 16, norm_first=True)

    def forward(self, x):
        return self.layer(x.transpose(0, 1)).transpose(0, 1)


class Gated(nn.Module):
    """A perceptron whose first layer is cut in two, and queries with a norm of their own."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(DIM, 24), nn.Linear(12, DIM)
        self.qkv = nn.Linear(DIM, 3 * DIM)
        self.norm = nn.LayerNorm(4)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        z = F.scaled_dot_product_attention(self.norm(q), k, v)
        x = x + z.transpose(1, 2).flatten(2)
        a, b = self.first(x).chunk(2, -1)
        return x + self.second(a * F.silu(b))


@pytest.mark.parametrize(
    ("block", "of_a_token"),  # what its products put out: query, scores, context and others
    [(SequenceFirst, 8 + 2 * TOKENS + 8 + 8 + 16 + 8), (Gated, 8 + 2 * TOKENS + 8 + 24 + 8)],
)
def test_other_layouts_and_other_blocks_are_followed_as_well(block, of_a_token):
    model, x = randomized(Transformer(lambda x: x[:, 0], block=block)), noise(2, TOKENS, DIM)
    old, new = (simplify(model, (x,), passes=passes) for passes in (WITHOUT, SIMPLIFY_PASSES))
    assert new.report.model_error < 1e-13
    saved = outputs(old, PRODUCTS) - outputs(new, PRODUCTS)
    assert saved == 2 * (TOKENS - 1) * of_a_token


def test_a_selection_from_a_selection_is_followed_to_its_end():
    def forward(layer, x):
        y = layer(x)[:, :4]
        return layer(y.relu())[:, :2].sum(1) + y[:, 0]

    result = apply(forward, noise(2, 8, 4))
    assert result.report.model_error < 1e-14
    assert outputs(result, {"aten.linear"}) == 2 * (2 * 4 + 2 * 4)


OPERATORS = ("norm", "linear", "gelu", "attention", "residual", "gate", "turn", "position", "heads")


@st.composite
def networks(draw):
    """Draw a network of tokens, of operators in any order, and what is read of it at the end."""
    tokens = draw(st.integers(4, 7))
    names = draw(st.lists(st.sampled_from(OPERATORS), min_size=1, max_size=7))
    start = draw(st.integers(0, tokens - 1))
    stop = draw(st.integers(start + 1, tokens))
    reads_all = draw(st.sampled_from([False, False, False, True]))
    is_select = draw(st.booleans())

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 12 if n == "attention" else 4) for n in names)
            self.register_buffer("position", noise(tokens, 4))

        def forward(self, x):
            first = x
            for name, layer in zip(names, self.layers, strict=True):
                if name == "norm":
                    x = F.layer_norm(x, (4,))
                elif name == "linear":
                    x = layer(x)
                elif name == "gelu":
                    x = F.gelu(x)
                elif name == "attention":
                    q, k, v = layer(x).unflatten(2, (3, 2, 2)).permute(2, 0, 3, 1, 4)
                    x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
                elif name == "residual":
                    x, first = x + first, x
                elif name == "gate":
                    x = x * first[..., :1].sigmoid()
                elif name == "turn":
                    x = layer(x.transpose(0, 1)).transpose(0, 1)
                elif name == "position":
                    x = x + self.position
                else:
                    x = x.unflatten(2, (2, 2)).transpose(1, 2).tanh().transpose(1, 2).flatten(2)
            read = x[:, start] if is_select else x[:, start:stop]
            return (read, x.amax(1)) if reads_all else read

    kept = 1 if is_select else stop - start
    costly = {"norm", "linear", "attention", "turn"}.intersection(names)
    may_change = not reads_all and 2 * kept <= tokens and bool(costly)
    return randomized(Network(), seed=draw(st.integers(0, 9))), noise(2, tokens, 4), may_change


@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(networks())
def test_any_network_of_tokens_keeps_its_function_and_computes_no_more(drawn):
    model, x, may_change = drawn
    old, new = (simplify(model, (x,), passes=passes) for passes in (WITHOUT, SIMPLIFY_PASSES))
    assert new.report.model_error < 1e-12
    assert may_change or not changes(new)
    assert (outputs(new) < outputs(old)) if changes(new) else (outputs(new) == outputs(old))
    torch.testing.assert_close(new.model(x[:1]), old.model(x[:1]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wrong", ["another token", "another token of the query"])
def test_a_wrong_row_is_caught_by_the_proof(wrong, monkeypatch):
    right = the_pass._insert
    calls = []

    def shifted(module, source, rows, before):
        calls.append(rows)
        is_wrong = wrong == "another token" or len(calls) == 1
        return right(module, source, Rows(rows.dim, (rows.kept[0] + is_wrong,)), before)

    monkeypatch.setattr(the_pass, "_insert", shifted)
    model = randomized(Transformer(lambda x: x[:, 0]))
    with pytest.raises(CheckFailedError, match="moves no value"):
        simplify(model, (noise(2, TOKENS, DIM),))
    assert len(calls) == 2


def vision_transformer():
    return randomized(torchvision.models.VisionTransformer(32, 8, 2, 2, 24, 48, num_classes=5))


def timm_vit(name, **options):
    timm = pytest.importorskip("timm")
    return randomized(timm.create_model(name, img_size=32, depth=2, num_classes=5, **options))


MODELS = {
    "torchvision": vision_transformer,
    "timm, class token": lambda: timm_vit("vit_tiny_patch16_224"),
    "timm, two tokens": lambda: timm_vit("deit_tiny_distilled_patch16_224"),
}


@pytest.mark.filterwarnings("ignore")  # timm's and torch's exporter's own
@pytest.mark.parametrize("name", MODELS)
def test_a_vit_answers_alike_for_every_batch_size_with_fewer_products(name):
    model, x = MODELS[name](), noise(3, 3, 32, 32)
    old, new = (simplify(model, (x,), passes=passes) for passes in (WITHOUT, SIMPLIFY_PASSES))
    assert changes(new)
    assert outputs(new, PRODUCTS) < 0.8 * outputs(old, PRODUCTS)
    sessions = [
        open_session(to_onnx(one.model, (x,), target=CPU, max_batch=3)) for one in (old, new)
    ]
    for images in (x[:1], x):
        answers = [session.run(None, {"images": images.numpy()})[0] for session in sessions]
        np.testing.assert_allclose(*answers, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(answers[1], model(images).detach(), rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_a_vit_that_pools_its_tokens_is_left_as_it_is():
    result = simplify(timm_vit("vit_tiny_patch16_224", global_pool="avg"), (noise(2, 3, 32, 32),))
    assert not changes(result)


@pytest.mark.parametrize("target", ["jetpack6.0", "jetpack6.2"])
def test_tensorrt_is_given_operators_that_it_knows(target):
    x = noise(2, 3, 32, 32)
    result = simplify(vision_transformer(), (x,))
    file = to_onnx(result.model, (x,), target=TARGETS[target])
    found = {node.op_type for node in onnx.load_model_from_string(file).graph.node}
    assert "Slice" in found and found <= TARGETS[target].operators


def test_in_int8_the_products_of_single_rows_run_in_integers(tmp_path):
    x = noise(2, 3, 32, 32)
    file = to_onnx(simplify(vision_transformer(), (x,)).model, (x,), target=CPU)
    ranges = find_ranges(
        collect_histograms(file, [x.numpy()[:1]], observed_tensors(file, "u8s8")), "minmax"
    )
    model = write_int8(file, ranges, scheme="u8s8")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "a.onnx"), 3
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    kernels = Counter(n.op_type for n in onnx.load_model(tmp_path / "a.onnx").graph.node)
    # qkv, projection and two of the perceptron, and in the last block one more, for the query
    assert kernels["MatMulIntegerToFloat"] == 4 + 5
    assert kernels["MatMul"] + kernels["FusedMatMul"] == 4  # of two activations
    expected = open_session(file).run(None, {"images": x.numpy()[:1]})[0]
    (actual,) = session.run(None, {"images": x.numpy()[:1]})
    assert np.abs(actual - expected).max() < 0.1 * np.ptp(expected)
