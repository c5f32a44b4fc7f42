"""Rules for an exported ONNX file, checked before anybody else reads it.

The target's own come first. Then the device's reader must take the file, onnx's checker, and our
checks by schema: what is written here is not refused there.
"""

import onnx

from deploy.bundle.onnx_structure import structural_problem
from deploy.errors import CheckFailedError
from export.onnx_file.schema_checks import schema_problems
from export.targets import Target

__all__ = ["assert_exportable"]

_FORBIDDEN = {"BatchNormalization", "Dropout"}


def assert_exportable(model: bytes, target: Target, *, max_batch: int = 1) -> None:
    """Insist that a model is one self-contained file that the target can read.

    Args:
        model: The ONNX file. Its nodes are called MODULE/OPERATOR.
        target: Gives the opset and the operators.
        max_batch: 1 if the file has a static shape, more if its batch size is free.

    Raises:
        CheckFailedError: A rule is broken; every broken one is named.
    """
    proto = onnx.load_model_from_string(model)
    broken = [text for text in _violations(proto, target, max_batch) if text]
    if not broken:
        broken = [text for text in [structural_problem(model), _checker_complaint(proto)] if text]
    if not broken:
        broken = schema_problems(proto, max_batch=max_batch)
    if broken:
        raise CheckFailedError(
            f"an ONNX file for {target.name} is self-contained, of opset {target.opset} and of "
            f"operators that {target.runtime} knows, used as their schemas say, and nothing but "
            "its batch size may be free",
            found="; ".join(broken),
            remedy="report it together with the model's code; nothing was exported",
        )


def _violations(proto: onnx.ModelProto, target: Target, max_batch: int) -> list[str]:
    graph = proto.graph
    opsets = {entry.domain: entry.version for entry in proto.opset_import}
    external = [t.name for t in graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    subgraphs = [node.name for node in graph.node if any(a.HasField("g") for a in node.attribute)]
    forbidden = [node.name for node in graph.node if node.op_type in _FORBIDDEN]
    foreign = [node.name for node in graph.node if node.domain]
    unknown = [
        f"{node.name} ({node.op_type})"
        for node in graph.node
        if target.operators is not None and node.op_type not in target.operators
    ]
    wanted = 1 if max_batch == 1 else "batch"
    return [
        f"opsets {opsets}" if opsets != {"": target.opset} else "",
        f"{len(proto.functions)} local functions" if proto.functions else "",
        f"weights outside the file: {external}" if external else "",
        f"control flow: {subgraphs}" if subgraphs else "",
        f"sites left by the simplification: {forbidden}" if forbidden else "",
        f"operators of other domains: {foreign}" if foreign else "",
        f"operators that {target.runtime} lacks: {', '.join(unknown)}" if unknown else "",
        *(_shape_violation(value, wanted) for value in [*graph.input, *graph.output]),
    ]


def _checker_complaint(proto: onnx.ModelProto) -> str:
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        return f"onnx's checker says: {str(error).splitlines()[0]}"
    return ""


def _shape_violation(value: onnx.ValueInfoProto, wanted: int | str) -> str:
    """Say what is wrong with an input's or output's shape, which must be (wanted, number, ...)."""
    dimensions = [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
    batch, *others = dimensions or [0]
    fine = batch == wanted and all(isinstance(size, int) and size > 0 for size in others)
    return "" if fine else f"'{value.name}' has shape {dimensions}; its first must be {wanted}"
