"""The most that this machine computes: the best GEMM of each type that any library here reaches.

    python benchmarks/peak.py [--threads N]

A network's share of it says how much room there is, whoever runs it. A GEMM of a good size is the
best case: no layer of small channels, no memory traffic, no activation between.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper
from peers import Kind
from setting import describe_setting

__all__ = ["Peak", "measure_peaks"]

_SIZES = (512, 1024, 1536)
_REPEATS = 7


@dataclass(frozen=True)
class Peak:
    """The best GEMM of a type.

    Args:
        kind: Of its inputs.
        gflops: 2 n^3 operations for n x n matrices, in 1e9 / s, in the fastest of the repeats.
        by: The library that reached it.
        size: n.
    """

    kind: Kind
    gflops: float
    by: str
    size: int


def measure_peaks(threads: int) -> dict[Kind, Peak]:
    """Time every library's GEMM, and return the best of each type.

    Args:
        threads: That may compute; torch's are the caller's to set.
    """
    best: dict[Kind, Peak] = {}
    for size in _SIZES:
        for kind, by, run in _gemms(size, threads):
            peak = Peak(kind, 2 * size**3 / _fastest(run) / 1e9, by, size)
            if kind not in best or peak.gflops > best[kind].gflops:
                best[kind] = peak
    return best


def _fastest(run: Callable[[], object]) -> float:
    run()
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def _gemms(n: int, threads: int) -> Iterator[tuple[Kind, str, Callable[[], object]]]:
    """Give the GEMMs that there are here; a library without one of them is left out."""
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((n, n), dtype=np.float32) for _ in range(2))
    x, y = torch.from_numpy(a), torch.from_numpy(b)
    low_x, low_y = x.bfloat16(), y.bfloat16()
    int_x, int_y = ((10 * each).clamp(-127, 127).to(torch.int8) for each in (x, y))
    u8, s8 = (int_x.numpy().view(np.uint8), int_y.numpy())
    yield "fp32", "torch", lambda: torch.mm(x, y)
    yield "bf16", "torch", lambda: torch.mm(low_x, low_y)
    yield "int8", "torch", lambda: torch._int_mm(int_x, int_y)
    for kind, operator, left, right in (
        ("fp32", "MatMul", a, b),
        ("int8", "MatMulInteger", u8, s8),
    ):
        file = _one_node(operator, left, right)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        feed = {"a": left}
        yield kind, "onnxruntime", lambda s=session, f=feed: s.run(None, f)  # type: ignore[misc]
    try:
        import openvino
    except ImportError:
        return
    core: Any = openvino.Core()
    for kind, hint in (("fp32", "f32"), ("bf16", "bf16")):
        settings = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": threads}
        compiled = core.compile_model(
            core.read_model(_one_node("MatMul", a, b)),
            "CPU",
            settings | {"ENABLE_CPU_PINNING": False},
        )
        if hint not in str(compiled.get_property("INFERENCE_PRECISION_HINT")).replace("float", "f"):
            continue
        request = compiled.create_infer_request()
        yield kind, "openvino", lambda r=request: r.infer([a], share_inputs=True)  # type: ignore[misc]


def _one_node(operator: str, a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> bytes:
    """Return a model of a product with a constant matrix, as a layer's is."""
    types = {"float32": TensorProto.FLOAT, "uint8": TensorProto.UINT8}
    out = TensorProto.FLOAT if operator == "MatMul" else TensorProto.INT32
    graph = helper.make_graph(
        [helper.make_node(operator, ["a", "b"], ["c"])],
        "gemm",
        [helper.make_tensor_value_info("a", types[str(a.dtype)], a.shape)],
        [helper.make_tensor_value_info("c", out, (len(a), b.shape[1]))],
        [onnx.numpy_helper.from_array(b, "b")],
    )
    opset = [helper.make_opsetid("", 20)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=9)
    return bytes(model.SerializeToString())


def main() -> int:
    """Print the peaks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(describe_setting())
    for peak in measure_peaks(args.threads).values():
        print(f"{peak.kind}: {peak.gflops:.0f} GFLOP/s by {peak.by}, n = {peak.size}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
