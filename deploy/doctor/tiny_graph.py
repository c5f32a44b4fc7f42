"""The smallest ONNX model that shows whether a provider computes: y = x + x, of two floats.

Written as protobuf by hand, for `onnx` is not on the device. Source: field numbers of onnx.proto.
"""

__all__ = ["tiny_model"]

_FLOAT, _IR_VERSION, _OPSET = 1, 8, 13


def tiny_model() -> bytes:
    """A ModelProto with the input x and the output y, both (2,) float32."""
    node = _field(1, b"x") + _field(1, b"x") + _field(2, b"y") + _field(4, b"Add")
    shape = _field(1, _field(1, 2))
    tensor = _field(1, _field(1, _FLOAT) + _field(2, shape))
    inputs = _field(11, _field(1, b"x") + _field(2, tensor))
    outputs = _field(12, _field(1, b"y") + _field(2, tensor))
    graph = _field(1, node) + _field(2, b"tiny") + inputs + outputs
    return _field(1, _IR_VERSION) + _field(8, _field(2, _OPSET)) + _field(7, graph)


def _field(number: int, value: int | bytes) -> bytes:
    """A field of protobuf: numbers and lengths here are below 128, and so are one byte."""
    if isinstance(value, int):
        return bytes((number << 3, value))
    return bytes((number << 3 | 2, len(value))) + value
