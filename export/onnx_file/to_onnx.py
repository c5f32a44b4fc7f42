"""Write a simplified module as one ONNX file, and check that the file says what was asked for.

The same module gives the same bytes: whatever records the machine or the run (stack traces, paths,
torch's build) is removed.
"""

import ast
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from deploy.bundle.manifest import Tolerance
from deploy.errors import CheckFailedError
from deploy.measure.compare import compare
from export.onnx_file.opset17 import to_opset_17
from export.onnx_file.run_onnx import open_session
from export.targets import Target
from export.traced.trace import first_line

__all__ = ["to_onnx"]

_OLDEST_OPSET = 18  # that torch's exporter writes; asked for an older one it writes this
_SCOPES = "pkg.torch.onnx.name_scopes"
_SAME = Tolerance(
    max_scaled_error=1e-3,
    min_top1_agreement=0.0,
    reason="one float32 graph run by two libraries that add in different orders: 1e-6 is usual, "
    "1e-4 was seen in deep models; a baked batch size is off by the answer itself",
)


def to_onnx(
    module: nn.Module,
    example_inputs: tuple[Tensor, ...],
    *,
    target: Target,
    max_batch: int = 1,
    input_names: Sequence[str] = ("images",),
    output_names: Sequence[str] = ("logits",),
) -> bytes:
    """Return a module as a serialised ONNX model.

    Args:
        module: A simplified module in evaluation mode.
        example_inputs: A batch of at least 2.
        target: Gives the opset.
        max_batch: 1 for a static shape of one sample; more, and the batch size is free from 1 on,
            and is checked at 1, at this one and halfway.
        input_names: Of the graph, in the order of the arguments.
        output_names: Of the graph, in the order of the outputs.

    Raises:
        CheckFailedError: The file has another opset, or does not compute what the module does.
    """
    batch = torch.export.Dim("batch", min=1)
    is_free = max_batch > 1
    try:
        program = torch.onnx.export(
            module,
            example_inputs if is_free else tuple(x[:1] for x in example_inputs),
            dynamo=True,
            opset_version=max(target.opset, _OLDEST_OPSET),
            dynamic_shapes=tuple({0: batch} for _ in example_inputs) if is_free else None,
            input_names=input_names,
            output_names=output_names,
            external_data=False,
            verbose=False,
        )
    except Exception as error:  # torch raises some twenty unrelated types here
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        raise CheckFailedError(
            "torch's exporter writes a simplified model as ONNX",
            found=f"{type(cause).__name__}: {first_line(cause)}",
            remedy="replace this operation in the model's code by one that has an ONNX form",
        ) from error
    assert program is not None
    proto = program.model_proto
    _name_nodes(proto.graph)
    _strip_provenance(proto)
    _check_opset(proto, max(target.opset, _OLDEST_OPSET))
    if target.opset < _OLDEST_OPSET:
        to_opset_17(proto)
        _check_opset(proto, target.opset)
    model = bytes(proto.SerializeToString(deterministic=True))
    _check_batches(model, module, example_inputs, max_batch=max_batch, input_names=input_names)
    return model


def _check_opset(proto: onnx.ModelProto, opset: int) -> None:
    """Read the opset back: torch silently takes another if it cannot write the one asked for."""
    opsets = {entry.domain or "ai.onnx": entry.version for entry in proto.opset_import}
    if opsets != {"ai.onnx": opset}:
        raise CheckFailedError(
            f"a model for opset {opset} is written in it and in no other",
            found=f"torch {torch.__version__} wrote {opsets}",
            remedy="export for another target, or with another torch",
        )


def _check_batches(
    model: bytes,
    module: nn.Module,
    example_inputs: tuple[Tensor, ...],
    *,
    max_batch: int,
    input_names: Sequence[str],
) -> None:
    """Run file and module at the ends and between; exporters bake in a size (pytorch #157621)."""
    session = None
    for inputs in _batches(example_inputs, max_batch):
        with torch.no_grad():
            expected = [output.numpy() for output in tree_leaves(module(*inputs))]
        feeds = {name: x.numpy() for name, x in zip(input_names, inputs, strict=True)}
        try:
            session = session or open_session(model)  # opening may fail as running may
            problem = _difference(session.run(None, feeds), expected)
        except Exception as error:  # ONNX Runtime's exceptions share no documented base
            problem = f"ONNX Runtime says: {' '.join(str(error).split())}"
        if problem:
            raise CheckFailedError(
                "an exported file computes what the module does, for every batch size",
                found=f"at batch size {len(inputs[0])}: {problem}",
                remedy="report it together with the model's code; nothing was exported",
            )


def _difference(actual: list[NDArray[Any]], expected: list[NDArray[Any]]) -> str:
    """Say how two lists of outputs differ, or return nothing."""
    if [a.shape for a in actual] != [e.shape for e in expected]:
        return f"shapes {[a.shape for a in actual]} instead of {[e.shape for e in expected]}"
    comparisons = (compare(a, e, _SAME) for a, e in zip(actual, expected, strict=True))
    return "; ".join(reason for comparison in comparisons for reason in comparison.reasons)


def _batches(example_inputs: tuple[Tensor, ...], max_batch: int) -> Iterator[tuple[Tensor, ...]]:
    """Yield the samples one by one, and as batches of half the largest size and of that size."""
    for i in range(2):
        yield tuple(x[i : i + 1] for x in example_inputs)
    for size in sorted({(1 + max_batch) // 2, max_batch} - {1}):
        repeats = -(-size // len(example_inputs[0]))
        yield tuple(torch.cat([x] * repeats)[:size] for x in example_inputs)


def _name_nodes(graph: onnx.GraphProto) -> None:
    """Name every node MODULE/OPERATOR, so that a parser's refusal points into the model's code."""
    seen: Counter[str] = Counter()
    for node in graph.node:
        scopes = {entry.key: entry.value for entry in node.metadata_props}.get(_SCOPES, "[]")
        module = [*ast.literal_eval(scopes)][-2:-1]  # the last one is the operator's own
        path = module[0] if module and not module[0].startswith("_empty_nn") else ""
        name = f"{path}/{node.op_type}"
        seen[name] += 1
        node.name = name if seen[name] == 1 else f"{name}_{seen[name]}"


def _strip_provenance(proto: onnx.ModelProto) -> None:
    """Remove stack traces, torch's own notes, inferred shapes, and opsets that no node uses."""
    graph = proto.graph
    for part in (proto, graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        part.ClearField("doc_string")
        part.ClearField("metadata_props")
    graph.ClearField("value_info")
    proto.producer_name, proto.producer_version = "edgereg", ""
    used = {node.domain for node in graph.node}
    kept = [entry for entry in proto.opset_import if entry.domain in used]
    proto.ClearField("opset_import")
    proto.opset_import.extend(kept)
