from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from export_models import AttentionBlock, noise, randomized
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from deploy.errors import CheckFailedError
from edgereg.models.attention import SelfAttention
from edgereg.models.vit import SmallViT
from export.onnx_file.run_onnx import open_session
from export.onnx_file.to_onnx import to_onnx
from export.passes import fold_attention_scale as scale_pass
from export.passes.class_token import pad_class_token
from export.passes.fold_attention_scale import fold_attention_scale
from export.passes.fold_constants import fold_constants
from export.passes.functional import make_functional
from export.passes.pack_attention import pack_attention
from export.passes.plain_attention import plain_attention
from export.passes.plain_shapes import plain_shapes
from export.passes.simplify import Simplified, simplify
from export.passes.strip_dropout import strip_dropout
from export.targets import TARGETS
from export.traced.dead_code import remove_dead_code
from export.traced.graph import arguments, operator, tensor
from export.traced.trace import trace

PASSES = (
    strip_dropout,
    make_functional,
    fold_constants,
    plain_attention,
    fold_attention_scale,
    pack_attention,
    plain_shapes,
    pad_class_token,
    remove_dead_code,
)
SPLITTERS = {"select", "slice", "squeeze", "unsqueeze", "unbind", "chunk", "split", "narrow"}


def simplified(model: nn.Module, *inputs: torch.Tensor, passes=PASSES) -> Simplified:
    result = simplify(randomized(model), inputs, passes=passes, finishing=())
    assert result.report.model_error < 1e-12
    torch.testing.assert_close(result.model(*inputs), model(*inputs), rtol=1e-4, atol=1e-5)
    return result


def operators(result: Simplified) -> Counter[str]:
    found = (operator(node) for node in result.model.graph.nodes)
    return Counter(name.removeprefix("aten.") for name in found if name)


def assert_plain(result: Simplified, *, linears: int, splits: int = 1, shapes: int = 4) -> None:
    """Insist on linear, reshape, permute, split, transpose, two products, permute and reshape."""
    counts = operators(result)
    assert not result.report.skipped
    assert counts["matmul"] == 2 * counts["softmax"] == 2
    assert (counts["linear"], counts["split_with_sizes"]) == (linears, splits)
    assert not counts.keys() & (SPLITTERS | {"mul", "div", "bmm", "scaled_dot_product_attention"})
    moves = sum(counts[name] for name in ("reshape", "flatten", "unflatten", "permute"))
    assert moves + counts["transpose"] - 1 == shapes


class Multihead(nn.Module):
    """nn.MultiheadAttention, whatever its layout, from (B, T, D) to (B, T, D)."""

    def __init__(self, *, need_weights=False, mask=None, swaps=False, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 3, **options)
        self.need_weights = need_weights
        self.swaps = swaps
        self.register_buffer("mask", mask)

    def forward(self, x, y=None):
        y = x if y is None else y
        if self.swaps:
            x, y = x.transpose(0, 1), y.transpose(0, 1)
        z, weights = self.attention(x, y, y, need_weights=self.need_weights, attn_mask=self.mask)
        if self.swaps:
            z = z.transpose(0, 1)
        return (z, weights) if self.need_weights else z


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_multihead_attention_becomes_plain_whatever_its_layout(batch_first, bias, need_weights):
    model = Multihead(
        batch_first=batch_first, swaps=not batch_first, bias=bias, need_weights=need_weights
    )
    result = simplify(randomized(model), (noise(2, 5, 12),), passes=PASSES, finishing=())
    assert result.report.model_error < 1e-12
    assert_plain(result, linears=2)
    (change,) = result.report.passes["fold_attention_scale"].changed
    assert change.what == "scale 0.5 folded into attention"


def test_cross_attention_packs_key_and_value():
    result = simplified(Multihead(batch_first=True), noise(2, 5, 12), noise(2, 7, 12, seed=2))
    assert_plain(result, linears=3, shapes=6)
    result = simplified(
        Multihead(batch_first=True, kdim=8, vdim=8), noise(2, 5, 12), noise(2, 7, 8, seed=2)
    )
    assert_plain(result, linears=3, shapes=6)


@pytest.mark.parametrize("need_weights", [False, True])
def test_a_stored_mask_of_multihead_attention_is_added_to_the_scores(need_weights):
    mask = torch.ones(5, 5).tril().log()  # 0 where a token may look, else minus infinity
    result = simplify(
        randomized(Multihead(batch_first=True, need_weights=need_weights, mask=mask)),
        (noise(2, 5, 12),),
        passes=PASSES,
        finishing=(),
    )
    counts = operators(result)
    assert (counts["softmax"], counts["matmul"], counts["baddbmm"]) == (1, 2, 0)


class Fused(nn.Module):
    """timm's attention: one packed projection, and torch's fused operator."""

    def __init__(self, *, mask=None, **options):
        super().__init__()
        self.qkv = nn.Linear(12, 36)
        self.options = options
        self.register_buffer("mask", mask)

    def forward(self, x):
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, 3, 4).permute(2, 0, 3, 1, 4).unbind(0)
        z = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, **self.options)
        return z.transpose(1, 2).flatten(2)


ALLOWED = torch.tensor([[1, 0, 1], [1, 1, 0], [0, 1, 1]], dtype=torch.bool)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale": 0.3},
        {"scale": 1.0},
        {"is_causal": True},
        {"mask": ALLOWED},
        {"mask": noise(3, 3, 3)},
        {"mask": ALLOWED.float().log()},
    ],
)
def test_fused_attention_becomes_plain_with_mask_and_scale(options):
    assert_plain(simplified(Fused(**options), noise(2, 3, 12)), linears=1)


class Blinded(Fused):
    def forward(self, x):
        mask = x.new_zeros(3, 3, dtype=torch.bool).logical_not() & (x[:, None, :, :1] < 2)
        self.options = {}
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, 3, 4).permute(2, 0, 3, 1, 4).unbind(0)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class Grouped(nn.Module):
    def forward(self, x):
        q, k = x.unflatten(2, (4, 3)).transpose(1, 2), x[..., :6].unflatten(2, (2, 3))
        return F.scaled_dot_product_attention(
            q, k.transpose(1, 2), k.transpose(1, 2), enable_gqa=True
        )


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Blinded(), "its mask is computed in the graph and might leave a token nothing"),
        (Fused(mask=ALLOWED & ALLOWED[0]), "its mask leaves a token nothing to attend to"),
        (Grouped(), "its queries and its keys have different numbers of heads"),
    ],
)
def test_what_is_not_plainly_the_same_stays_torchs_operator(model, reason):
    if isinstance(model, Fused) and model.mask is not None:
        model.mask[0] = False
    result = simplify(randomized(model), (noise(2, 3, 12),), passes=PASSES, finishing=())
    assert operators(result)["scaled_dot_product_attention"] == 1
    assert any(text.startswith(reason) for text in result.report.skipped.values())


def test_separate_projections_are_packed_and_named():
    result = simplified(SelfAttention(12, heads=3), noise(2, 5, 12))
    assert_plain(result, linears=2)
    assert {name for name, _ in result.model.named_parameters()} == {
        *("query_key_value.weight", "query_key_value.bias"),
        *("output.weight", "output.bias"),
    }


def test_a_small_vit_ends_with_one_split_a_block():
    model = SmallViT(image_size=16, patch_size=4, dim=12, depth=2, heads=3)
    result = simplified(model, noise(2, 3, 16, 16))
    counts = operators(result)
    assert (counts["split_with_sizes"], counts["linear"]) == (2, 8)
    assert not counts.keys() & (SPLITTERS | {"mul", "div"})


class Hand(nn.Module):
    """Attention written by hand; `also` says what else is done with q, k and v."""

    def __init__(self, also=lambda q, k, v: 0, *, where="q", projections=None):
        super().__init__()
        self.qkv = projections or nn.ModuleList(nn.Linear(12, 12, bias=i < 2) for i in range(3))
        self.also, self.where = also, where

    def forward(self, x):
        q, k, v = (f(x).unflatten(2, (3, 4)).transpose(1, 2) for f in self.qkv)
        also = self.also(q, k, v)
        q, k = q * 0.3 if "q" in self.where else q, k / 2 if "k" in self.where else k
        scores = q @ k.mT
        for _ in range(self.where.count("s")):
            scores = 0.7 * scores
        return torch.softmax(scores, -1) @ v + also


@pytest.mark.parametrize("where", ["", "q", "k", "s", "qkss"])
def test_the_scale_is_folded_wherever_it_stands(where):
    result = simplified(Hand(where=where), noise(2, 5, 12))
    counts = operators(result)
    assert not counts["mul"] + counts["div"]
    assert (counts["linear"], counts["split_with_sizes"]) == (1, 1)


def test_a_query_that_something_else_reads_is_not_scaled_but_the_key_is():
    result = simplified(Hand(lambda q, k, v: q.relu()), noise(2, 5, 12))
    (change,) = result.report.passes["fold_attention_scale"].changed
    assert change.what == "scale 0.3 folded into qkv.1"


def test_a_scale_stays_where_something_else_reads_query_and_key():
    result = simplified(Hand(lambda q, k, v: q.relu() + k.relu()), noise(2, 5, 12))
    assert operators(result)["mul"] == 1
    (reason,) = result.report.passes["fold_attention_scale"].skipped.values()
    assert reason == "the query: relu reads it, too; the key: relu_1 reads it, too"


def test_a_scale_stays_where_query_and_key_are_one():
    shared = nn.Linear(12, 12)
    model = Hand(where="s", projections=nn.ModuleList([shared, shared, nn.Linear(12, 12)]))
    simplified(model, noise(2, 5, 12))

    class Same(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            q = self.layer(x)
            return torch.softmax(q @ q.mT * 0.5, -1) @ x

    result = simplified(Same(), noise(2, 5, 4))
    assert operators(result)["mul"] == 1
    assert "reads it, too" in next(iter(result.report.skipped.values()))


def test_the_scale_goes_into_an_affine_norm_of_the_query():
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(12, 36)
            self.q_norm, self.k_norm = nn.LayerNorm(4), nn.RMSNorm(4)

        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(2, (3, 3, 4)).permute(2, 0, 3, 1, 4)
            return F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)

    result = simplified(Normed(), noise(2, 5, 12))
    (change,) = result.report.passes["fold_attention_scale"].changed
    assert change.what == "scale 0.5 folded into q_norm"
    assert not operators(result).keys() & (SPLITTERS | {"mul"})


def test_an_attention_called_twice_is_packed_and_scaled_at_each_call():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = SelfAttention(12, heads=3)

        def forward(self, x):
            return self.attention(self.attention(x).relu())

    result = simplified(Twice(), noise(2, 5, 12))
    assert operators(result)["split_with_sizes"] == 2
    assert not operators(result)["div"]
    assert not result.report.skipped


@pytest.mark.parametrize("fixed", [1, 0])  # none: the slice before the rotated ones is empty
def test_a_rotation_of_some_tokens_only_does_not_keep_the_split_away(fixed):
    class Rotated(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(12, 36)
            self.register_buffer("angle", noise(5 - fixed, 2))

        def rotate(self, x):
            a, b = x[:, :, fixed:, ::2], x[:, :, fixed:, 1::2]
            cos, sin = self.angle.cos(), self.angle.sin()
            turned = torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(3)
            return torch.cat([x[:, :, :fixed], turned], 2)

        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(2, (3, 3, 4)).permute(2, 0, 3, 1, 4).unbind(0)
            return F.scaled_dot_product_attention(self.rotate(q), self.rotate(k), v)

    counts = operators(simplified(Rotated(), noise(2, 5, 12)))
    assert (counts["split_with_sizes"], counts["unbind"], counts["select"]) == (1, 0, 0)


def test_features_that_nothing_reads_are_left_out_of_the_packed_projection():
    class Unread(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.qkv = nn.Linear(12, 12), nn.Linear(12, 36)

        def forward(self, x):
            _, k, v = self.qkv(x).unflatten(2, (9, 4)).transpose(1, 2).split((3, 3, 3), 1)
            q = self.q(x[:, :1]).unflatten(2, (3, 4)).transpose(1, 2)
            return F.scaled_dot_product_attention(q, k, v)

    result = simplified(Unread(), noise(2, 5, 12))
    layers = [n for n in result.model.graph.nodes if operator(n) == "aten.linear"]
    assert sorted(layer.meta["val"].shape[-1] for layer in layers) == [12, 24]
    assert operators(result)["split_with_sizes"] == 1


def test_heads_of_different_widths_are_left_apart_with_the_reason():
    class Uneven(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = nn.Linear(12, 6), nn.Linear(12, 6), nn.Linear(12, 12)

        def forward(self, x):
            q, k, v = (f(x).unflatten(2, (3, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
            return torch.softmax(q @ k.mT, -1) @ v

    result = simplified(Uneven(), noise(2, 5, 12))
    assert list(result.report.skipped.values()) == ["its heads are of different widths"]


@st.composite
def packings(draw):
    """Draw an attention of any sizes that is packed in any order and taken apart in any way."""
    heads, width, tokens = (draw(st.integers(1, 4)) for _ in range(3))
    order = draw(st.permutations(["three", "heads", "width"]))
    taken = draw(st.sampled_from(["unbind", "select", "slice", "chunk"]))
    places = [order.index(name) + 2 for name in ("three", "heads", "width")]
    is_batch_first, is_fused = draw(st.booleans()), draw(st.booleans())

    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(5, 3 * heads * width, bias=draw(st.booleans()))

        def forward(self, x):
            sizes = {"three": 3, "heads": heads, "width": width}
            x = self.qkv(x if is_batch_first else x.transpose(0, 1))
            x = x.unflatten(2, [sizes[name] for name in order])
            batch, token = (0, 1) if is_batch_first else (1, 0)
            x = x.permute(places[0], batch, places[1], token, places[2])
            if taken == "unbind":
                q, k, v = x.unbind(0)
            elif taken == "select":
                q, k, v = x[0], x[1], x[2]
            elif taken == "slice":
                q, k, v = x[:1].squeeze(0), x[1:2].squeeze(0), x[2:].squeeze(0)
            else:
                q, k, v = (part.flatten(0, 1) for part in x.chunk(3))
            if is_fused:
                return F.scaled_dot_product_attention(q, k, v)
            return torch.softmax(q @ k.transpose(2, 3) / 3, 3) @ v

    return randomized(Packed(), seed=draw(st.integers(0, 9))), noise(2, tokens, 5)


@settings(max_examples=10, deadline=None, derandomize=True, database=None)
@given(packings())
def test_any_packing_is_split_in_one_step_exactly(packing):
    model, x = packing
    result = simplify(model, (x,), passes=PASSES, finishing=())  # raises above 1e-9
    counts = operators(result)
    assert result.report.model_error < 1e-12
    assert (counts["linear"], counts["split_with_sizes"]) == (1, 1)
    assert not counts.keys() & {"unbind", "select", "slice", "mul", "div"}


def scales_all_that_is_packed(module):
    def all_features(way):
        return torch.arange(way[-1].meta["val"].shape[-1])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scale_pass, "features_read", all_features)
        patch.setattr(scale_pass, "_why_not", lambda way, product: None)
        return fold_attention_scale(module)


def packs_in_another_order(module):
    module, report = pack_attention(module)
    for change in report.changed:
        (split,) = (n for n in module.graph.nodes if operator(n) == "aten.split_with_sizes")
        layer = split.args[0].args[0].args[0]
        weight = tensor(module, arguments(layer)["weight"])
        weight.copy_(weight.roll(4, 0))
        assert change.site == "attention"
    return module, report


@pytest.mark.parametrize("wrong", [scales_all_that_is_packed, packs_in_another_order])
def test_a_wrong_fold_or_packing_is_caught_by_the_proof(wrong):
    model, x = randomized(Multihead(batch_first=True)), noise(2, 5, 12)
    right = fold_attention_scale if wrong is scales_all_that_is_packed else pack_attention
    passes = tuple(wrong if one is right else one for one in PASSES)
    with pytest.raises(CheckFailedError, match="at attention"):
        simplify(model, (x,), passes=passes, finishing=())


def test_tracing_leaves_the_fast_path_as_it_was():
    for enabled in (True, False):
        torch.backends.mha.set_fastpath_enabled(enabled)
        try:
            trace(AttentionBlock().eval().requires_grad_(False), (noise(2, 3, 8, 8),))
            assert torch.backends.mha.get_fastpath_enabled() is enabled
        finally:
            torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.filterwarnings("ignore")  # timm's and torch's exporter's own
def test_the_file_of_a_timm_vit_holds_one_split_a_block_and_nothing_superfluous():
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=7)
    x = noise(3, 3, 32, 32)
    file = to_onnx(simplified(model, x).model, (x,), target=TARGETS["onnxruntime-x86"], max_batch=3)
    nodes = onnx.load_model_from_string(file).graph.node
    counts = Counter(node.op_type for node in nodes)
    block = {"LayerNormalization": 2, "Add": 6, "Reshape": 2, "Transpose": 3, "MatMul": 6}
    block |= {"Softmax": 1, "Split": 1, "Gelu": 1}
    outside = {"Conv": 1, "Reshape": 1, "Transpose": 1, "Pad": 1, "Add": 1}
    outside |= {"LayerNormalization": 1, "Gather": 1, "Gemm": 1}
    assert counts == Counter(block) + Counter(block) + Counter(outside)
    session = open_session(file)
    for batch in (x[:1], x):
        (logits,) = session.run(None, {"images": batch.numpy()})
        np.testing.assert_allclose(logits, model(batch).detach(), rtol=1e-3, atol=1e-4)
