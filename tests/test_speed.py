import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from deploy.errors import CheckFailedError
from export.judge.speed import Speed, assert_not_slower, compare_speed


def products(count: int) -> bytes:
    """Return a model that multiplies by a matrix so many times."""
    nodes = [
        helper.make_node("MatMul", [f"x{i}", "w"], [f"x{i + 1}"], f"{i}/MatMul")
        for i in range(count)
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "g",
        [value("x0", TensorProto.FLOAT, [1, 256])],
        [value(f"x{count}", TensorProto.FLOAT, [1, 256])],
        [numpy_helper.from_array(np.eye(256, dtype=np.float32), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def test_ten_times_the_work_is_found_slower_and_refused_and_the_reverse_is_not():
    image = np.ones((1, 256), np.float32)
    slow = compare_speed(products(40), products(4), image)
    assert slow.interval[0] > 2 and slow.ratio > slow.interval[0] and slow.ms > slow.fp32_ms
    with pytest.raises(CheckFailedError, match=r"int8: .* n = 41"):
        assert_not_slower("int8", slow)
    assert_not_slower("int8", compare_speed(products(4), products(40), image))


def test_an_interval_that_reaches_one_is_no_evidence():
    assert_not_slower("int8", Speed(1.02, (0.99, 1.05), 1.0, 1.0, 41))
