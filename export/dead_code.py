"""Remove what no output depends on: nodes, and then the parameters and buffers that no node reads.

    Given   y = f(x, a)    and    z = g(x, b), with z unused
    Result  y = f(x, a)

Source: Aho et al., "Compilers", 2nd edition, section 9.1.6.
"""

from torch.fx import GraphModule

from export.report import PassReport

__all__ = ["remove_dead_code"]


def remove_dead_code(module: GraphModule) -> tuple[GraphModule, PassReport]:
    """Return the module without dead nodes, parameters and buffers.

    A node that changes a tensor in place lives, whoever uses its result.
    """
    module.graph.eliminate_dead_code()
    # A new GraphModule takes along only what its graph reads.
    live = GraphModule(module, module.graph, class_name=type(module).__name__)
    return live.eval(), PassReport()
