"""Run a model as mathematics: in float64 and with nothing at random, whatever its code says.

`model.double()` alone does not suffice: code says `x.float()` and `torch.zeros(3,
dtype=torch.float32)`, a plain tensor attribute stays float32, and a functional dropout may be live
in evaluation mode. Dropout is put at rest; a Bernoulli draw gives its mean, so that stochastic
depth, x * bernoulli(p) / p, is at rest as well.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from export.traced.graph import operator_name
from export.traced.sites import DROPOUT_OPERATORS

__all__ = ["at_rest", "attention_at_rest", "evaluate", "mathematics"]

_ROUNDED = {torch.float32, torch.float16, torch.bfloat16}
_DROPOUTS = {
    F.dropout,
    F.dropout1d,
    F.dropout2d,
    F.dropout3d,
    F.alpha_dropout,
    F.feature_alpha_dropout,
    torch.dropout,
    torch.feature_dropout,
    torch.alpha_dropout,
    torch.feature_alpha_dropout,
}
_BERNOULLIS = {torch.bernoulli, Tensor.bernoulli, Tensor.bernoulli_}
_BERNOULLI_OPERATORS = {"aten.bernoulli", "aten.bernoulli_"}
_ATTENTIONS = {F.scaled_dot_product_attention, torch.ops.aten.scaled_dot_product_attention.default}


def evaluate(
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    *,
    on_value: Callable[[str, Tensor], None] | None = None,
) -> list[Tensor]:
    """Return a module's output tensors, computed in float64 with dropout at rest.

    Args:
        module: A model or a traced graph.
        inputs: Its positional arguments.
        on_value: Of a traced graph: is told each node's name and value as soon as it is there.
    """
    inputs = tuple(x.clone() for x in inputs)  # the model may change them in place
    with mathematics():
        if on_value is None:
            result = module(*inputs)
        else:
            assert isinstance(module, GraphModule)
            result = _Recorder(module, on_value).run(*inputs)
        return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]


def attention_at_rest(args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Return the arguments of scaled_dot_product_attention with dropout_p, its fifth, at zero."""
    if len(args) > 4:
        return (*args[:4], 0.0, *args[5:]), kwargs
    return args, {**kwargs, "dropout_p": 0.0}


class _Recorder(Interpreter):
    """Runs a graph and tells of every tensor on the way."""

    def __init__(self, module: GraphModule, on_value: Callable[[str, Tensor], None]) -> None:
        super().__init__(module)
        self.on_value = on_value

    def run_node(self, node: Node) -> Any:
        value = super().run_node(node)
        if isinstance(value, Tensor):
            self.on_value(node.name, value)
        return value


class _AtRest(TorchFunctionMode):
    """Switches off what is random, dropout that is live in evaluation mode too."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in _DROPOUTS or operator_name(function) in DROPOUT_OPERATORS:
            return args[0] if args else kwargs["input"]
        if function in _ATTENTIONS:
            args, kwargs = attention_at_rest(args, kwargs)
        if function in _BERNOULLIS or operator_name(function) in _BERNOULLI_OPERATORS:
            return _mean(function, *args, **kwargs)
        return function(*args, **kwargs)


class _Float64(_AtRest):
    """Turns every lower precision, of a tensor or asked for by name, into float64, too."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = tree_map(_widen, (args, kwargs or {}))
        if function is Tensor.float or function is Tensor.half or function is Tensor.bfloat16:
            return args[0].double()
        return super().__torch_function__(function, types, args, kwargs)


def _mean(function: Any, draw: Tensor, p: Any = None, **_: Any) -> Tensor:
    """Return the mean of a Bernoulli draw; of `torch.bernoulli(x)`, whose x are the means."""
    is_in_place = operator_name(function).endswith("_") or function is Tensor.bernoulli_
    if p is None:
        if not is_in_place:
            return draw.clone()
        p = 0.5
    value = draw if is_in_place else torch.empty_like(draw)
    return value.copy_(p) if isinstance(p, Tensor) else value.fill_(p)


def _widen(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.dtype in _ROUNDED else value
    return torch.float64 if isinstance(value, torch.dtype) and value in _ROUNDED else value


@contextmanager
def at_rest() -> Iterator[None]:
    """Compute in the precision that is given, with nothing at random."""
    with torch.no_grad(), _AtRest():
        yield


@contextmanager
def mathematics() -> Iterator[None]:
    """Compute in float64 and with nothing at random."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # of tensors made without a dtype
    try:
        with torch.no_grad(), _Float64():
            yield
    finally:
        torch.set_default_dtype(default)
