"""Find the BatchNorm and dropout sites of a module, plain or traced, and insist that none is left.

A traced graph has no BatchNorm modules, only operators, so counting modules there would always find
none: both are counted.
"""

from dataclasses import dataclass

from torch import nn
from torch.fx import GraphModule, Node
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from deploy.errors import CheckFailedError
from export.traced.graph import arguments, module_path, operator
from export.traced.report import Counts

__all__ = [
    "DROPOUT_OPERATORS",
    "Sites",
    "assert_simplified",
    "count",
    "find_sites",
    "is_batchnorm",
    "is_dropout",
    "site_names",
]

_BATCHNORMS = {
    "aten.batch_norm",
    "aten.native_batch_norm",
    "aten._native_batch_norm_legit",
    "aten._native_batch_norm_legit_no_training",
}
DROPOUT_OPERATORS = {
    "aten.dropout",
    "aten.dropout_",
    "aten.feature_dropout",
    "aten.feature_dropout_",
    "aten.alpha_dropout",
    "aten.alpha_dropout_",
    "aten.feature_alpha_dropout",
    "aten.feature_alpha_dropout_",
}


@dataclass(frozen=True)
class Sites:
    """The names of the BatchNorms and dropouts that a module holds."""

    batchnorms: tuple[str, ...]
    dropouts: tuple[str, ...]


def is_batchnorm(node: Node) -> bool:
    """Say whether a node is a batch normalisation."""
    return operator(node) in _BATCHNORMS


def is_dropout(node: Node) -> bool:
    """Say whether a node drops values out, or is dropout at rest; attention can drop out, too."""
    if operator(node) == "aten.scaled_dot_product_attention":
        return bool(arguments(node)["dropout_p"] > 0)
    return operator(node) in DROPOUT_OPERATORS | {"aten.native_dropout"}


def site_names(module: GraphModule) -> dict[Node, str]:
    """Name every site of a traced module by its module, and by its node where that is not enough.

    A functional call has no module of its own, and a module called twice makes two sites of one
    name.
    """
    sites = [node for node in module.graph.nodes if is_batchnorm(node) or is_dropout(node)]
    paths = {node: module_path(node) for node in sites}
    taken = list(paths.values())
    return {
        node: path if path and taken.count(path) == 1 else f"{path}.{node.name}".lstrip(".")
        for node, path in paths.items()
    }


def find_sites(module: nn.Module) -> Sites:
    """Find a module's sites: modules by their type, operators in every traced graph inside it."""
    batchnorms, dropouts = [], []
    for path, child in module.named_modules():
        if isinstance(child, _BatchNorm):
            batchnorms.append(path)
        elif isinstance(child, _DropoutNd):
            dropouts.append(path)
        elif isinstance(child, GraphModule):
            for node, name in site_names(child).items():
                (batchnorms if is_batchnorm(node) else dropouts).append(name)
    return Sites(tuple(batchnorms), tuple(dropouts))


def count(module: GraphModule) -> Counts:
    """Count what a traced module holds."""
    sites = find_sites(module)
    return Counts(
        nodes=sum(node.op == "call_function" for node in module.graph.nodes),
        parameters=sum(parameter.numel() for parameter in module.parameters()),
        batchnorms=len(sites.batchnorms),
        dropouts=len(sites.dropouts),
    )


def assert_simplified(module: nn.Module, *, skipped: dict[str, str]) -> None:
    """Insist that a module holds no BatchNorm and no dropout.

    Args:
        module: The simplified module.
        skipped: Why the simplification left a site as it was, for the message.

    Raises:
        CheckFailedError: Some are left, named.
    """
    sites = find_sites(module)
    left = [f"BatchNorm {name}" for name in sites.batchnorms]
    left += [f"dropout {name}" for name in sites.dropouts]
    if left:
        found = {*sites.batchnorms, *sites.dropouts}
        reasons = [f"{site}: {reason}" for site, reason in skipped.items() if site in found]
        raise CheckFailedError(
            "a module to be exported holds no BatchNorm and no dropout",
            found=f"{len(left)} left ({', '.join(left)})" + "".join(f"; {r}" for r in reasons),
            remedy="let each BatchNorm directly follow the one layer whose output it normalises",
        )
