"""What `edgereg serve` does with malformed requests, many good ones, and ten times too many.

    python benchmarks/serve.py            10,000 malformed, 50,000 good, 60 s of overload
    python benchmarks/serve.py --quick    500 malformed, 2,000 good, 5 s of overload

A service of a small linear model is started as a process of its own; for the overload, one of some
convolutions, so that the clients can offer ten times what it computes. Exits with 1 where a
malformed request is answered by anything but a 4xx or 5xx, or hangs; where a good one fails; where
memory grows by 5 % or more over the good ones after the first tenth; or where the 99th percentile
of the answers under overload is longer than twice what the queue before an answer explains.
"""

import argparse
import collections
import contextlib
import http.client
import io
import json
import random
import select
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from setting import describe_setting

from deploy.bundle.manifest import (
    FORMAT_VERSION,
    Conformance,
    Golden,
    Manifest,
    TensorSpec,
    Tolerance,
    Variant,
)
from deploy.bundle.write import write_bundle
from deploy.runtime.preprocess import Preprocessing
from deploy.service.protocol import HEADER_LENGTH

SIZE, QUEUE, BATCH, LAYERS = 32, 32, 8, 6
INFER = "/v2/models/linear/infer"
HANG_S = 20.0


def main() -> int:
    """Print what was found; return 1 if a promise was broken."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--malformed", type=int)
    parser.add_argument("--good", type=int)
    parser.add_argument("--overload-s", type=float)
    args = parser.parse_args()
    malformed = args.malformed or (500 if args.quick else 10_000)
    good = args.good or (2000 if args.quick else 50_000)
    overload_s = args.overload_s or (5.0 if args.quick else 60.0)
    print(describe_setting())
    with tempfile.TemporaryDirectory() as folder:
        with _service(Path(folder) / "linear.bundle", layers=0) as (port, pid):
            passed = _send_malformed(port, malformed)
            passed &= _send_good(port, good, pid)
        with _service(Path(folder) / "convolutions.bundle", layers=LAYERS) as (port, _):
            passed &= _overload(port, overload_s)
    return 0 if passed else 1


@contextlib.contextmanager
def _service(path: Path, *, layers: int) -> Iterator[tuple[int, int]]:
    """A service's port and process; it must stop with 0."""
    child, port = _start(_write_bundle(path, layers=layers))
    try:
        yield port, child.pid
    finally:
        child.send_signal(signal.SIGTERM)
        code = child.wait(60)
        assert child.stdout is not None
        child.stdout.close()
    assert code == 0, f"exit code {code} after SIGTERM"


def _send_malformed(port: int, count: int) -> bool:
    draw = random.Random(0)
    statuses: collections.Counter[str] = collections.Counter()
    for _ in range(count):
        data = _malformed(draw)
        try:
            with _connect(port) as connection:
                connection.sendall(data)
                connection.shutdown(socket.SHUT_WR)
                said = b""
                while part := connection.recv(65536):
                    said += part
            status = said.split(b" ", 2)[1].decode() if said.startswith(b"HTTP/1.1 ") else "none"
        except TimeoutError:
            status = "hang"
        except OSError as error:
            status = type(error).__name__
        statuses[status] += 1
    print(f"{count} malformed requests: {dict(sorted(statuses.items()))}")
    return all(status[0] in "45" for status in statuses)


def _malformed(draw: random.Random) -> bytes:
    """A good request with one thing broken: in the tensor, the JSON, the headers or the bytes."""
    document = json.loads(_good_body(draw))
    tensor = document["inputs"][0]
    broken = draw.choice(list(_BREAKS))
    if broken in ("json", "tail", "bit"):
        body = bytearray(json.dumps(document).encode())
        if broken == "json":
            del body[draw.randrange(len(body) // 2) :]
        elif broken == "tail":
            body += b"}"
        else:
            body[draw.randrange(10)] ^= 0x80  # no UTF-8 any more
        return _post(bytes(body))
    if broken == "length":
        wrong = draw.choice(["-1", "1e3", "x", "", "99999999999999999999", "1, 2"])
        return _post(b"{}", f"Content-Length: {wrong}")
    if broken == "short":
        return _post(b"{}", "Content-Length: 4000")
    if broken == "chunked":
        return _post(b"0\r\n\r\n", "Transfer-Encoding: chunked")
    if broken == "binary":
        return _post(json.dumps(document).encode() + b"xyz", extra=f"{HEADER_LENGTH}: 10")
    if broken == "line":
        return bytes(draw.randrange(256) for _ in range(draw.randrange(1, 300))) + b"\r\n\r\n"
    if broken == "path":
        return _post(json.dumps(document).encode(), path="/v2/models/" + "x" * draw.randrange(99))
    value = draw.choice([None, -1, True, [], {}, "x", 1e300, [[[]]], [None], ["1"]])
    tensor[broken] = value
    return _post(json.dumps(document).encode())


_BREAKS = (
    *("json", "tail", "bit", "length", "short", "chunked", "binary", "line", "path"),
    *("name", "datatype", "shape", "data"),
)


def _post(body: bytes, length: str | None = None, *, extra: str = "", path: str = INFER) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: x", length or f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, *([extra] if extra else []), "", ""]).encode() + body


def _good_body(draw: random.Random) -> bytes:
    data = [round(draw.random(), 3) for _ in range(3 * SIZE * SIZE)]
    tensor = {"name": "images", "shape": [1, 3, SIZE, SIZE], "datatype": "FP32", "data": data}
    return json.dumps({"inputs": [tensor]}).encode()


def _binary_body() -> tuple[bytes, dict[str, str]]:
    data = np.random.default_rng(0).random((1, 3, SIZE, SIZE), np.float32).tobytes()
    tensor = {"name": "images", "shape": [1, 3, SIZE, SIZE], "datatype": "FP32"}
    head = json.dumps({"inputs": [tensor | {"parameters": {"binary_data_size": len(data)}}]})
    return head.encode() + data, {HEADER_LENGTH: str(len(head))}


def _send_good(port: int, count: int, pid: int) -> bool:
    """Send good requests over two kept connections: half as JSON, half as bytes."""
    binary, headers = _binary_body()
    body = _good_body(random.Random(1))
    connections = [http.client.HTTPConnection("127.0.0.1", port, timeout=HANG_S) for _ in "ab"]
    failed, early, times = 0, 0, []
    for place in range(count):
        if place == count // 10:
            early = _memory_bytes(pid)
        connection, started = connections[place % 2], time.perf_counter()
        data, head = (body, {}) if place % 4 < 2 else (binary, headers)
        connection.request("POST", INFER, body=data, headers=head)
        response = connection.getresponse()
        response.read()
        failed += response.status != 200
        times.append(time.perf_counter() - started)
    for connection in connections:
        connection.close()
    late = _memory_bytes(pid)
    growth = late / early - 1
    print(
        f"{count} good requests: {failed} failed; {count / sum(times):.0f} a second, one after the "
        f"other, p50 {1e3 * _percentile(times, 50):.2f} ms, p99 {1e3 * _percentile(times, 99):.2f} "
        f"ms; memory {early / 2**20:.1f} -> {late / 2**20:.1f} MiB ({growth:+.1%})"
    )
    return failed == 0 and growth < 0.05


def _overload(port: int, seconds: float) -> bool:
    """Find out what the service can do, and offer ten times as much at even distances."""
    _, times = _offer(port, seconds=5.0, distance_s=0.0, clients=2 * BATCH)
    capacity = len(times) / 5.0
    statuses, times = _offer(
        port, seconds=seconds, distance_s=0.1 / capacity, clients=3 * (QUEUE + BATCH)
    )
    sent, answered = sum(statuses.values()) / seconds, len(times) / seconds
    bound = (QUEUE + 2 * BATCH) / answered  # the queue, the batch before it and one's own
    p99 = _percentile(times, 99)
    print(
        f"{capacity:.0f} a second is what it computes; {sent:.0f} a second for {seconds:g} s: "
        f"{dict(sorted(statuses.items()))}; {answered:.0f} answers a second, p50 "
        f"{1e3 * _percentile(times, 50):.0f} ms, p99 {1e3 * p99:.0f} ms; the queue explains "
        f"{1e3 * bound:.0f} ms"
    )
    return set(statuses) <= {200, 503} and statuses[503] > 0 and p99 <= 2 * bound


def _offer(
    port: int, *, seconds: float, distance_s: float, clients: int
) -> tuple[collections.Counter[int], list[float]]:
    """Send requests at even distances, each over a connection that is free.

    In one thread: a hundred threads would wait for each other, and that be taken for the service.
    """
    body, headers = _binary_body()
    request = _post(body, extra=f"{HEADER_LENGTH}: {headers[HEADER_LENGTH]}")
    free = collections.deque(_connect(port) for _ in range(clients))
    statuses: collections.Counter[int] = collections.Counter()
    times: list[float] = []
    begun, sent = time.monotonic(), 0
    with selectors.DefaultSelector() as busy:
        while time.monotonic() - begun < seconds or busy.get_map():
            now = time.monotonic()
            while free and now - begun < seconds and now >= begun + sent * distance_s:
                connection = _open_again(free.popleft(), port)
                connection.sendall(request)
                busy.register(connection, selectors.EVENT_READ, time.monotonic())
                sent += 1
            for key, _ in busy.select(timeout=0.001):
                said = key.fileobj.recv(65536)  # an answer is short, and sent in one piece
                status = int(said.split(b" ", 2)[1]) if said.startswith(b"HTTP/1.1 ") else 0
                statuses[status] += 1
                if status == 200:
                    times.append(time.monotonic() - key.data)
                busy.unregister(key.fileobj)
                free.append(key.fileobj)
    for connection in free:
        connection.close()
    return statuses, times


def _connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=HANG_S)


def _open_again(connection: socket.socket, port: int) -> socket.socket:
    """A kept connection, or a new one if the service has closed it, as it may what lies idle."""
    if not select.select([connection], [], [], 0)[0]:  # nothing to be read, not even an end
        return connection
    connection.close()
    return _connect(port)


def _percentile(times: list[float], q: float) -> float:
    return sorted(times)[min(len(times) - 1, int(len(times) * q / 100))]


def _memory_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) << 10
    raise OSError(f"no VmRSS of process {pid}")


def _start(bundle: Path) -> tuple[subprocess.Popen[str], int]:
    code = "import sys; from edgereg.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "serve", str(bundle), "--port", "0", "--json"]
    command += ["--queue", str(QUEUE)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    return child, int(json.loads(child.stdout.readline())["url"].rpartition(":")[2])


def _write_bundle(path: Path, *, layers: int) -> Path:
    """A linear model of the mean colour, behind some convolutions; nothing in it was trained."""
    spec = Preprocessing(SIZE, SIZE, "stretch", 1.0, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    weight = np.eye(3, dtype=np.float32)
    tensors = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (("images", ["batch", 3, SIZE, SIZE]), ("logits", ["batch", 3]))
    ]
    rng = np.random.default_rng(1)
    nodes, weights, taken = [], [numpy_helper.from_array(weight, "weight")], "images"
    for layer in range(layers):
        kernel = rng.normal(0, 0.04, (3 if layer == layers - 1 else 64, 64, 3, 3))
        kernel = kernel if layer else rng.normal(0, 0.2, (64, 3, 3, 3))
        weights.append(numpy_helper.from_array(kernel.astype(np.float32), f"kernel{layer}"))
        inputs_of = [taken, f"kernel{layer}"]
        taken = f"features{layer}"
        nodes.append(helper.make_node("Conv", inputs_of, [taken], pads=[1] * 4))
    nodes += [
        helper.make_node("GlobalAveragePool", [taken], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weight"], ["logits"]),
    ]
    graph = helper.make_graph(nodes, "linear", tensors[:1], tensors[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    inputs = np.random.default_rng(0).normal(size=(BATCH, 3, SIZE, SIZE)).astype(np.float32)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        name="linear",
        task="classification",
        max_batch=BATCH,
        target={"name": "onnxruntime-x86", "opset": 20},
        inputs=(TensorSpec("images", "float32", ("batch", 3, SIZE, SIZE)),),
        outputs=(TensorSpec("logits", "float32", ("batch", 3)),),
        preprocessing=spec,
        labels=("red", "green", "blue"),
        variants={
            "fp32": Variant(
                "model.fp32.onnx",
                "fp32",
                Tolerance(1e-5, 1.0, "a benchmark"),
                Conformance("none", "not required", "a benchmark"),
                None,
            )
        },
        golden=Golden(
            BATCH,
            tuple(f"golden/{i}.png" for i in range(BATCH)),
            None,
            "golden/preprocessed.npy",
            "golden/outputs.npy",
        ),
        provenance={},
        files=(),
    )
    contents = {f"golden/{i}.png": b"not decoded here" for i in range(BATCH)}
    contents |= {"model.fp32.onnx": model.SerializeToString()}
    contents |= {
        "golden/preprocessed.npy": _npy(inputs),
        "golden/outputs.npy": _npy(inputs.mean(axis=(2, 3)) @ weight),
    }
    write_bundle(path, manifest, contents)
    return path


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


if __name__ == "__main__":
    sys.exit(main())
