"""Find the operators that draw at random, and insist that none is left.

A batch of answers cannot be proved, nor compared with an engine's, if the model throws dice.
"""

import torch
from torch.fx import GraphModule, Node

from deploy.errors import BadInputError
from export.traced.graph import arguments, module_path, operator
from export.traced.sites import is_dropout

__all__ = ["assert_deterministic", "is_random"]

# By the names that a schema gives them: each, if false or zero, puts the operator at rest.
_SWITCHES = ("train", "training", "dropout_p")


def is_random(node: Node) -> bool:
    """Say whether an operator draws at random; dropout and the like at rest do not."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    given = arguments(node)
    return all(given[switch] for switch in _SWITCHES if switch in given)


def assert_deterministic(module: GraphModule) -> None:
    """Insist that a simplified module draws nothing at random; dropout is `assert_simplified`'s.

    Raises:
        BadInputError: It does; the first operator is named with its module.
    """
    graphs = [(path, graph) for path, graph in module.named_modules() if _is_traced(graph)]
    left = [
        f"{operator(node)} in {module_path(node) or path or 'the model itself'}"
        for path, graph in graphs
        for node in graph.graph.nodes
        if is_random(node) and not is_dropout(node)
    ]
    if left:
        more = f", and {len(left) - 1} more" if len(left) > 1 else ""
        raise BadInputError(
            "a model in evaluation mode answers the same images in the same way every time",
            found=f"{left[0]}{more}",
            remedy="let it draw only `if self.training`, and hand training=self.training to "
            "functions such as drop_path and drop_block2d",
        )


def _is_traced(module: object) -> bool:
    return isinstance(module, GraphModule)
