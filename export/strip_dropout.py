"""Remove dropout, and the operators that return their very argument.

    Given   y = dropout(x, p)                in evaluation mode, where dropout(x, p) = x
    Result  y = x

Source: Srivastava et al., "Dropout", JMLR 15 (2014), section 10: nothing is dropped at test time;
torch scales while training ("inverted dropout"), so that nothing is left to scale here.

A functional dropout whose training flag is stuck at True (`F.dropout(x)`) drops values even in
evaluation mode, so that the model answers at random. It is removed as well, and named: its
reference is the model with that dropout at rest.
"""

from torch.fx import GraphModule, Node

from export.float64 import attention_at_rest
from export.graph import arguments, bypass, operator
from export.report import Change, PassReport
from export.sites import is_dropout, site_names

__all__ = ["strip_dropout"]

_IDENTITIES = {"aten.alias", "aten.detach", "aten.detach_"}


def strip_dropout(module: GraphModule) -> tuple[GraphModule, PassReport]:
    """Strip a traced module's dropouts, in place."""
    changed, skipped = [], {}
    names = site_names(module)
    for node in list(module.graph.nodes):
        if operator(node) in _IDENTITIES:
            bypass(node)
        elif not is_dropout(node):
            continue
        elif operator(node) == "aten.scaled_dot_product_attention":
            node.args, node.kwargs = attention_at_rest(node.args, node.kwargs)
            changed.append(_change(names[node], node, node, live=True))
        elif operator(node) == "aten.native_dropout":
            skipped[names[node]] = "its mask is an output as well"
        else:
            live = bool(arguments(node)["train"])
            changed.append(_change(names[node], node, bypass(node), live=live))
    return module, PassReport(tuple(changed), skipped)


def _change(site: str, before: Node, after: Node, *, live: bool) -> Change:
    what = "stripped; it was live in evaluation mode" if live else "stripped"
    return Change(site, what, before.name, after.name)
