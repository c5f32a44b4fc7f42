import pytest
import torch
import torch.nn.functional as F

from edgereg.models.attention import SelfAttention


def attention(dim=12, heads=3):
    torch.manual_seed(0)
    return SelfAttention(dim, heads=heads).double().eval()


def tokens(count=5, dim=12):
    return torch.randn(2, count, dim, generator=torch.Generator().manual_seed(1)).double()


@pytest.mark.parametrize(("dim", "heads"), [(12, 1), (12, 3), (12, 12), (8, 2)])
def test_it_is_scaled_dot_product_attention_of_the_same_projections(dim, heads):
    module, x = attention(dim, heads), tokens(dim=dim)
    q, k, v = (
        f(x).reshape(2, 5, heads, dim // heads).transpose(1, 2)
        for f in (module.query, module.key, module.value)
    )
    z = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 5, dim)
    assert (module(x) - module.output(z)).abs().max() < 1e-12


def test_each_tokens_weights_sum_to_one():
    _, weights = attention().attend(tokens())
    assert weights.shape == (2, 3, 5, 5)
    assert weights.min() > 0 and (weights.sum(dim=3) - 1).abs().max() < 1e-12
    assert weights.std() > 0.01, "uniform weights would hide a sum over the wrong axis"


def test_without_positions_the_order_of_tokens_only_reorders_the_answer():
    module, x, order = attention(), tokens(), torch.tensor([3, 0, 4, 1, 2])
    assert (module(x[:, order]) - module(x)[:, order]).abs().max() < 1e-12
    assert (module(x[:, order]) - module(x)).abs().max() > 1e-3


def test_one_token_attends_to_itself_alone():
    module, x = attention(), tokens(count=1)
    assert (module(x) - module.output(module.value(x))).abs().max() < 1e-12


@pytest.mark.parametrize("heads", [5, 7, 13])
def test_heads_must_divide_the_width(heads):
    with pytest.raises(ValueError, match=f"12 % {heads} ="):
        SelfAttention(12, heads=heads)


def test_dropout_acts_in_training_only_and_not_on_the_weights_that_are_shown():
    module, x = attention(), tokens()
    module.weights_dropout.p = module.output_dropout.p = 0.5
    assert torch.equal(module(x), module(x))
    module.train()
    assert not torch.equal(module(x), module(x))
    assert (module.attend(x)[1].sum(dim=3) - 1).abs().max() < 1e-12
