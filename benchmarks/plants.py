"""Plant a wrong fold into a simplification: what a proof is worth shows when something is wrong."""

from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.nn.modules.batchnorm import _BatchNorm

from deploy.errors import CheckFailedError
from export.passes.simplify import SIMPLIFY_PASSES, Pass, simplify
from export.traced.report import PassReport

__all__ = ["Planted", "forget_eps", "move_a_weight", "plant"]

_MOVED = 1e-6
_EPS = 7  # batch_norm's argument, as aten counts them
_MEAN = 3
_WEIGHT = 1  # of a convolution and of a linear layer


@dataclass(frozen=True)
class Planted:
    """A wrong fold, and what the proof said.

    Args:
        what: What is wrong.
        is_caught: Whether CheckFailedError was raised.
        found: What it found; else, what happened instead.
    """

    what: str
    is_caught: bool
    found: str


def plant(model: nn.Module, example_inputs: tuple[Tensor, ...]) -> Planted:
    """Simplify a model with one wrong pass among the right ones.

    With a BatchNorm, the fold of the first one forgets eps. Without, half of the channels of the
    first layer that is left at the end come out wrong by one in a million.
    """
    passes: tuple[Pass, ...]
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if norms:
        what, passes = f"eps = {norms[0].eps:g} forgotten", (forget_eps, *SIMPLIFY_PASSES)
    else:
        what, passes = f"a weight moved by {_MOVED:g}", (*SIMPLIFY_PASSES, move_a_weight)
    try:
        report = simplify(model, example_inputs, passes=passes).report
    except CheckFailedError as error:
        return Planted(what, True, error.found)
    except Exception as error:  # a row says it, nothing stops
        return Planted(what, False, f"{type(error).__name__}: {error}"[:300])
    return Planted(what, False, f"nothing, at an error of {report.model_error:.1g}")


def forget_eps(module: GraphModule) -> tuple[GraphModule, PassReport]:
    """Set the eps of the first BatchNorm with running statistics to zero."""
    for node in _calls(module, "batch_norm"):
        if node.args[_MEAN] is not None:
            node.args = (*node.args[:_EPS], 0.0, *node.args[_EPS + 1 :])
            break
    return module, PassReport()


def move_a_weight(module: GraphModule) -> tuple[GraphModule, PassReport]:
    """Scale every other output channel of the first layer: a LayerNorm would undo it for all."""
    for node in _calls(module, "conv2d", "conv1d", "linear"):
        weight: Any = node.args[_WEIGHT]
        if weight.op == "get_attr":
            attrgetter(str(weight.target))(module).data[::2] *= 1 + _MOVED
            break
    return module, PassReport()


def _calls(module: GraphModule, *operators: str) -> Iterator[Node]:
    for node in module.graph.nodes:
        if str(getattr(node.target, "overloadpacket", "")) in {
            f"aten.{name}" for name in operators
        }:
            yield node
