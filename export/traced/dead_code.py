"""Remove what no output depends on: nodes, and then the parameters and buffers that no node reads.

    Given   y = f(x, a)    and    z = g(x, b), with z unused
    Result  y = f(x, a)

Source: Aho et al., "Compilers", 2nd edition, section 9.1.6.
"""

from torch.fx import GraphModule

from export.traced.report import PassReport

__all__ = ["remove_dead_code"]


def remove_dead_code(module: GraphModule) -> tuple[GraphModule, PassReport]:
    """Remove dead nodes, parameters and buffers from a traced module, in place.

    A node that changes a tensor in place lives, whoever uses its result.
    """
    module.graph.eliminate_dead_code()
    read = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    stored = [
        name
        for named in (module.named_parameters, module.named_buffers)
        for name, _ in named(remove_duplicate=False)
    ]
    for name in stored:
        # Of a nested graph all is kept that is stored in it.
        if name not in read and not any(name.startswith(f"{owner}.") for owner in read):
            prefix, _, leaf = name.rpartition(".")
            delattr(module.get_submodule(prefix), leaf)
    return module, PassReport()
