import onnx
import pytest
import torch
from export_models import noise, randomized
from torch import nn

from export.onnx_file.to_onnx import to_onnx
from export.passes.class_token import pad_class_token
from export.passes.functional import make_functional
from export.passes.simplify import simplify
from export.targets import TARGETS
from export.traced.dead_code import remove_dead_code
from export.traced.graph import operator

PASSES = (make_functional, pad_class_token, remove_dead_code)


class Tokens(nn.Module):
    def __init__(self, join):
        super().__init__()
        self.join = join
        self.first = nn.Parameter(torch.zeros(1, 1, 6))
        self.others = nn.Parameter(torch.zeros(2, 6))
        self.position = nn.Parameter(torch.zeros(1, 5, 6))
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        return self.join(self, self.layer(x)).relu()


def expand(token, x):
    return token.expand(x.shape[0], -1, -1)


@pytest.mark.parametrize(
    "join",
    [
        lambda m, x: torch.cat([expand(m.first, x), x], 1),
        lambda m, x: torch.cat([m.first.repeat(x.shape[0], 1, 1), x], 1),
        lambda m, x: torch.cat([expand(m.first, x), x], 1) + m.position,
        lambda m, x: torch.cat([x, expand(m.first, x)], dim=1) + m.position,
        lambda m, x: torch.cat([expand(m.first, x), x[:, :2], expand(m.others, x)], 1),
    ],
)
def test_a_class_token_is_added_to_padded_tokens(join):
    x = noise(2, 4, 6)
    model = randomized(Tokens(join))
    result = simplify(model, (x,), passes=PASSES, finishing=())
    found = [operator(node) for node in result.model.graph.nodes]
    assert (found.count("aten.constant_pad_nd"), found.count("aten.add")) == (1, 1)
    assert not {"aten.cat", "aten.expand", "aten.repeat"} & {*found}
    assert result.report.model_error < 1e-14


def test_the_file_of_a_class_token_asks_for_no_batch_size():
    x = noise(2, 4, 6)
    model = randomized(Tokens(lambda m, x: torch.cat([expand(m.first, x), x], 1) + m.position))
    result = simplify(model, (x,), passes=PASSES, finishing=())
    file = to_onnx(result.model, (x,), target=TARGETS["onnxruntime-x86"], max_batch=8)
    nodes = [node.op_type for node in onnx.load_model_from_string(file).graph.node]
    assert nodes == ["MatMul", "Add", "Pad", "Add", "Relu"]


def test_the_padding_binds_the_batch_size_of_nothing_that_is_still_to_be_simplified():
    x = noise(2, 4, 6)
    model = randomized(Tokens(lambda m, x: torch.cat([expand(m.first, x), x], 1) + m.position))
    result = simplify(model, (x,), passes=PASSES, finishing=())
    computed = [node.meta["val"] for node in result.model.graph.nodes if operator(node)]
    assert not [value.shape for value in computed if isinstance(value.shape[0], int)]


@pytest.mark.parametrize(
    "join",
    [
        lambda m, x: torch.cat([x, x], 1),
        lambda m, x: torch.cat([expand(m.first, x), x.sigmoid(), x], 1),
        lambda m, x: torch.cat([m.first.expand(2 * x.shape[0], 4, -1), x], 0),
    ],
)
def test_what_is_not_a_stored_token_beside_one_value_stays(join):
    result = simplify(randomized(Tokens(join)), (noise(2, 4, 6),), passes=PASSES, finishing=())
    assert "aten.cat" in [operator(node) for node in result.model.graph.nodes]
