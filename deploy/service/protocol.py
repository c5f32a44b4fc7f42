"""The Open Inference Protocol v2 over REST: what a request says, and how an answer is written.

Tensors travel in JSON, or as bytes after it (the binary tensor extension: the header
`Inference-Header-Content-Length` tells where the JSON ends, `binary_data_size` how many bytes each
tensor has; little-endian, row-major). Whatever a request says wrongly is a `ProtocolError` with a
status from 400 on; nothing is guessed.

Source: KServe, open-inference-protocol, specification/protocol/inference_rest.md; Triton's
extension_binary_data.md.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploy.bundle.manifest import Manifest, TensorSpec

__all__ = [
    "HEADER_LENGTH",
    "InferRequest",
    "ProtocolError",
    "infer_response",
    "model_metadata",
    "parse_infer",
]

HEADER_LENGTH = "Inference-Header-Content-Length"
MAX_ID_LENGTH = 1024

_DATATYPES = {"float32": "FP32", "uint8": "UINT8"}


class ProtocolError(Exception):
    """A request that is not answered.

    Args:
        status: The HTTP status.
        message: What must hold, and what was found.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class InferRequest:
    """A request that the model can answer.

    Attributes:
        batch: (N, ...) of the model's input type and shape, N from 1 to its largest batch.
        request_id: Given back with the answer; None if there was none.
        wants_binary: Whether the output is wanted as bytes.
    """

    batch: NDArray[Any]
    request_id: str | None
    wants_binary: bool


def model_metadata(manifest: Manifest, *, precision: str, backend: str) -> dict[str, Any]:
    """Return what `GET v2/models/NAME` says."""
    return {
        "name": manifest.name,
        "versions": ["1"],
        "platform": f"{backend.partition(' ')[0]}_{precision}",
        "inputs": [_tensor_metadata(spec) for spec in manifest.inputs],
        "outputs": [_tensor_metadata(spec) for spec in manifest.outputs],
    }


def parse_infer(body: bytes, *, header_length: str | None, manifest: Manifest) -> InferRequest:
    """Read the body of `POST v2/models/NAME/infer`.

    Args:
        body: As it came.
        header_length: The header of this name, where it was sent.
        manifest: Of the model.

    Raises:
        ProtocolError: It is no request that this model can answer.
    """
    document, binary = _split(body, header_length)
    request_id = document.get("id")
    if request_id is not None and (
        not isinstance(request_id, str) or len(request_id) > MAX_ID_LENGTH
    ):
        raise ProtocolError(400, f"an id is a string of at most {MAX_ID_LENGTH} characters")
    (spec,), inputs = manifest.inputs, document.get("inputs")
    if not isinstance(inputs, list) or len(inputs) != 1 or not isinstance(inputs[0], dict):
        raise ProtocolError(400, f"inputs must be a list of one tensor, '{spec.name}'")
    return InferRequest(
        batch=_tensor(inputs[0], binary, spec, most=manifest.max_batch),
        request_id=request_id,
        wants_binary=_wants_binary(document, manifest.outputs[0]),
    )


def infer_response(
    outputs: NDArray[np.float32], request: InferRequest, *, manifest: Manifest
) -> tuple[dict[str, str], bytes]:
    """Return the headers and the body of an answer.

    Args:
        outputs: (N, ...) of the model, finite.
        request: What is answered.
        manifest: Of the model.
    """
    (spec,) = manifest.outputs
    tensor: dict[str, Any] = {
        "name": spec.name,
        "datatype": _DATATYPES[spec.dtype],
        "shape": list(outputs.shape),
    }
    document: dict[str, Any] = {"model_name": manifest.name, "model_version": "1"}
    document |= {} if request.request_id is None else {"id": request.request_id}
    document["outputs"] = [tensor]
    if not request.wants_binary:
        tensor["data"] = outputs.ravel().tolist()
        return {"Content-Type": "application/json"}, json.dumps(document).encode()
    data = outputs.astype("<f4").tobytes()
    tensor["parameters"] = {"binary_data_size": len(data)}
    header = json.dumps(document).encode()
    headers = {"Content-Type": "application/octet-stream", HEADER_LENGTH: str(len(header))}
    return headers, header + data


def _tensor_metadata(spec: TensorSpec) -> dict[str, Any]:
    shape = [n if isinstance(n, int) else -1 for n in spec.shape]
    return {"name": spec.name, "datatype": _DATATYPES[spec.dtype], "shape": shape}


def _split(body: bytes, header_length: str | None) -> tuple[dict[str, Any], bytes]:
    """Return the parsed JSON and the bytes after it."""
    end = len(body)
    if header_length is not None:
        if not header_length.isascii() or not header_length.isdigit() or len(header_length) > 12:
            raise ProtocolError(400, f"{HEADER_LENGTH} must be a number of bytes")
        end = int(header_length)
        if end > len(body):
            raise ProtocolError(400, f"{HEADER_LENGTH} is {end}; the body has {len(body)} bytes")
    try:
        document = json.loads(body[:end].decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(400, f"the body must be JSON: {error}") from error
    if not isinstance(document, dict):
        raise ProtocolError(400, "the body must be a JSON object")
    return document, body[end:]


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _tensor(
    tensor: Mapping[str, Any], binary: bytes, spec: TensorSpec, *, most: int
) -> NDArray[Any]:
    datatype, shape = _DATATYPES[spec.dtype], tensor.get("shape")
    if tensor.get("name") != spec.name:
        raise ProtocolError(400, f"the input is called '{spec.name}'")
    if tensor.get("datatype") != datatype:
        raise ProtocolError(400, f"the input '{spec.name}' is {datatype}")
    if (
        not isinstance(shape, list)
        or not all(type(n) is int for n in shape)
        or shape[1:] != list(spec.shape[1:])
        or not 1 <= shape[0] <= most
    ):
        rest = ", ".join(map(str, spec.shape[1:]))
        raise ProtocolError(400, f"the shape of '{spec.name}' is [1 to {most}, {rest}]")
    parameters = _parameters(tensor)
    if "binary_data_size" not in parameters:
        if binary:
            raise ProtocolError(400, f"{len(binary)} bytes after the JSON belong to no tensor")
        return _from_json(tensor.get("data"), tuple(shape), spec)
    if "data" in tensor:
        raise ProtocolError(400, f"'{spec.name}' has data and binary_data_size")
    dtype = np.dtype(spec.dtype).newbyteorder("<")
    size, expected = parameters["binary_data_size"], math.prod(shape) * dtype.itemsize
    if type(size) is not int or size != expected or len(binary) != expected:
        raise ProtocolError(
            400, f"'{spec.name}' of this shape has {expected} bytes after the JSON, and no others"
        )
    return _finite(np.frombuffer(binary, dtype).astype(spec.dtype).reshape(shape), spec)


def _from_json(data: Any, shape: tuple[int, ...], spec: TensorSpec) -> NDArray[Any]:
    """Return an array of JSON numbers, nested as the shape says or in a single row."""
    if not isinstance(data, list):
        raise ProtocolError(400, f"'{spec.name}' has no list of data, and no binary_data_size")
    try:
        numbers = np.array(data)
    except (ValueError, OverflowError) as error:  # of lists that are not as long as each other
        raise ProtocolError(400, f"the data of '{spec.name}' is no array: {error}") from error
    whole = spec.dtype == "uint8"
    if numbers.dtype.kind not in ("iu" if whole else "iuf"):
        kind = "whole numbers" if whole else "numbers"
        raise ProtocolError(400, f"the data of '{spec.name}' must be {kind}")
    if numbers.shape not in (shape, (math.prod(shape),)):
        raise ProtocolError(
            400, f"the data of '{spec.name}' has shape {list(numbers.shape)}, not {list(shape)}"
        )
    if whole and (numbers.min() < 0 or numbers.max() > 255):
        raise ProtocolError(400, f"the data of '{spec.name}' must be 0 to 255")
    with np.errstate(over="ignore"):
        return _finite(numbers.astype(spec.dtype).reshape(shape), spec)


def _finite(batch: NDArray[Any], spec: TensorSpec) -> NDArray[Any]:
    if not np.isfinite(batch).all():
        raise ProtocolError(400, f"the data of '{spec.name}' must be finite {spec.dtype} numbers")
    return batch


def _wants_binary(document: Mapping[str, Any], spec: TensorSpec) -> bool:
    """Say how the output is wanted: what is asked of it alone goes before what is asked of all."""
    wanted = _flag(_parameters(document), "binary_data_output", default=False)
    outputs = document.get("outputs")
    if outputs is None or outputs == []:
        return wanted
    if (
        not isinstance(outputs, list)
        or len(outputs) != 1
        or not isinstance(outputs[0], dict)
        or outputs[0].get("name") != spec.name
    ):
        raise ProtocolError(400, f"outputs must be a list of one, '{spec.name}'")
    return _flag(_parameters(outputs[0]), "binary_data", default=wanted)


def _parameters(of: Mapping[str, Any]) -> dict[str, Any]:
    parameters = of.get("parameters", {})
    if not isinstance(parameters, dict):
        raise ProtocolError(400, "parameters must be an object")
    return parameters


def _flag(parameters: Mapping[str, Any], name: str, *, default: bool) -> bool:
    flag = parameters.get(name, default)
    if not isinstance(flag, bool):
        raise ProtocolError(400, f"{name} must be true or false")
    return flag
