"""Trace a model into one flat graph of ATen operators, through torch.export.

At this level a module, a functional call and a tensor method look alike, a shared module is called
twice, and Python's control flow is gone: a pass handles few kinds of node and sees every use. The
graph may hold in-place operators (`relu_`): a pass must not assume that a node's value still is
what the node returned, unless the node has a single user.
"""

import copy
import io
import logging
import operator as python
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from deploy.errors import BadInputError

__all__ = ["first_line", "floating_dtype", "frozen_copy", "trace"]


def frozen_copy(model: nn.Module) -> nn.Module:
    """Return a deep copy of a model on the CPU, in evaluation mode, without gradients.

    Raises:
        BadInputError: The model cannot be copied, holds NaN or infinity, or mixes floating-point
            types.
    """
    try:
        frozen = copy.deepcopy(model).cpu().eval().requires_grad_(False)
    except (RuntimeError, TypeError) as error:
        raise BadInputError(
            "a model must be copyable, so that the one handed in is never changed",
            found=f"copy.deepcopy fails: {first_line(error)}",
            remedy="keep no hooks, locks or tensors with a gradient as attributes of the model",
        ) from error
    _refuse_non_finite(frozen)
    floating_dtype(frozen)
    return frozen


def floating_dtype(module: nn.Module) -> torch.dtype:
    """Return the one floating-point type of a module's parameters and buffers.

    Raises:
        BadInputError: There are several.
    """
    names: dict[torch.dtype, str] = {}
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.is_floating_point():
            names.setdefault(tensor.dtype, name)
    if len(names) > 1:
        found = ", ".join(f"{name} is {dtype}" for dtype, name in names.items())
        raise BadInputError(
            "a model's parameters and buffers share one floating-point type",
            found=found,
            remedy="call model.float() before the export; the target's precision is chosen there",
        )
    return next(iter(names), torch.float32)


def trace(model: nn.Module, example_inputs: tuple[Tensor, ...]) -> GraphModule:
    """Trace a model in evaluation mode, with a symbolic batch size in dimension 0 of every input.

    The parameters are shared with the model, not copied.

    Raises:
        BadInputError: The model is in training mode, its inputs are no batches of one size, or its
            computation depends on values or on the batch size.
    """
    if model.training:
        raise BadInputError(
            "a model is traced in evaluation mode",
            found="a model in training mode",
            remedy="call model.eval() first",
        )
    batch = torch.export.Dim("batch", min=1)
    try:
        with torch.no_grad(), _quiet_torch(), _plain_attention_modules():
            program = torch.export.export(
                model,
                tuple(_two_samples(example_inputs)),
                dynamic_shapes=tuple({0: batch} for _ in example_inputs),
            )
    except Exception as error:  # torch raises some twenty unrelated types here
        raise BadInputError(
            "a model can be traced by torch.export, for every batch size",
            found=f"{type(error).__name__}: {first_line(error)}",
            remedy="remove if, int(), .item(), .numpy() on values, and fixed batch sizes in views",
        ) from error
    unlifted = program.module(check_guards=False)
    # A plain module of the same graph: torch's own carries an input-checking hook, and train() and
    # eval() that raise.
    traced = GraphModule(unlifted, unlifted.graph, class_name=type(model).__name__)
    traced.eval()
    _inline_modes(traced)
    traced.graph.eliminate_dead_code()
    traced.recompile()
    _refuse_free_sizes(traced)
    return traced


def first_line(error: Exception) -> str:
    """Return the first lines of an error that say something."""
    lines = [line.strip(" -") for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) if lines else type(error).__name__


def _two_samples(example_inputs: tuple[Tensor, ...]) -> Iterator[Tensor]:
    """Yield the inputs with a batch of at least two: torch.export bakes 0 and 1 into the graph."""
    sizes = {x.shape[0] if x.ndim else 0 for x in example_inputs}
    if len(sizes) != 1 or 0 in sizes:
        raise BadInputError(
            "example inputs are batches of one size, at least 1",
            found=f"shapes {[tuple(x.shape) for x in example_inputs]}",
            remedy="give every input the same first dimension",
        )
    for x in example_inputs:
        yield x.repeat(2, *[1] * (x.ndim - 1)) if x.shape[0] == 1 else x


def _inline_modes(module: GraphModule) -> None:
    """Put the inside of `with torch.enable_grad():` and of autocast switched off in its place.

    Neither means anything in evaluation, and the passes see into no nested graph.
    """
    wrappers = {
        torch.ops.higher_order.wrap_with_set_grad_enabled: 1,  # the arguments before the graph
        torch.ops.higher_order.wrap_with_autocast: 4,
    }
    graph = module.graph
    for node in list(graph.nodes):
        number = wrappers.get(node.target)
        if number is None or (number == 4 and node.args[2]):  # its third argument: enabled
            continue
        inside, inputs = node.args[number], node.args[number + 1 :]
        nested = module.get_submodule(inside.target)
        assert isinstance(nested, GraphModule)
        places = [inner for inner in nested.graph.nodes if inner.op == "placeholder"]
        values = dict(zip(places, inputs, strict=True))
        with graph.inserting_before(node):
            results = graph.graph_copy(nested.graph, values)
        for user in list(node.users):
            if user.target is python.getitem and isinstance(results, (tuple, list)):
                user.replace_all_uses_with(results[user.args[1]])
                graph.erase_node(user)
        if node.users:
            node.replace_all_uses_with(results)
        graph.erase_node(node)
        if not inside.users:
            graph.erase_node(inside)
            module.delete_submodule(inside.target)


def _refuse_free_sizes(module: GraphModule) -> None:
    """Refuse sizes that depend on values: `x[x > 0]` has as many as there are."""
    for node in module.graph.nodes:
        value = node.meta.get("val")
        sizes = value.shape if isinstance(value, Tensor) else [value]
        if any(isinstance(size, torch.SymInt) and not size.node.has_hint() for size in sizes):
            raise BadInputError(
                "only a model's batch size is free",
                found=f"ValueError: {node.name} has a size that depends on values",
                remedy="replace boolean indexing and nonzero by a mask or torch.where",
            )


def _refuse_non_finite(model: nn.Module) -> None:
    """Refuse a parameter with NaN or infinity, and a buffer with NaN: a mask may be infinite."""
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise _not_finite(f"parameter '{name}' holds NaN or infinity")
    for name, buffer in model.named_buffers():
        if buffer.isnan().any():
            raise _not_finite(f"buffer '{name}' holds NaN")


def _not_finite(found: str) -> BadInputError:
    return BadInputError(
        "a model to be exported is finite",
        found=found,
        remedy="go back to a checkpoint from before the training diverged",
    )


@contextmanager
def _plain_attention_modules() -> Iterator[None]:
    """Keep nn.MultiheadAttention and nn.TransformerEncoder off their fused "fast path".

    Those operators are torch's own: no exporter knows them, and no pass could look inside.
    """
    was_enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was_enabled)


@contextmanager
def _quiet_torch() -> Iterator[None]:
    """Silence what torch logs and prints (the partial graph) before it raises."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
