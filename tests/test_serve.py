import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from deploy_bundle import SIZE, SPEC, golden_pixels, linear_onnx, write_small_bundle

import deploy
from deploy.errors import BadInputError, CheckFailedError
from deploy.runtime.preprocess import preprocess
from deploy.runtime.runner import open_runner
from deploy.service.batcher import Batcher, ClosedError, FullError, LateError
from deploy.service.metrics import Metrics
from deploy.service.notify import notify, watchdog_interval_s
from deploy.service.serve import Limits, Service, body_limit

ROOT = Path(deploy.__file__).parent.parent
INFER = "/v2/models/colours/infer"


class SlowRunner:
    """A runner that waits for leave, and remembers its batches."""

    name, precision, threads = "slow 1 CPU", "fp32", 1

    def __init__(self, inner):
        self._inner, self.leave, self.sizes = inner, threading.Event(), []
        self.entered = threading.Event()
        self.leave.set()

    def hold(self):
        """Let nothing through, from here on."""
        self.leave.clear()
        self.entered.clear()

    def __call__(self, batch, *, out=None):
        self.entered.set()
        self.leave.wait(20)
        self.sizes.append(len(batch))
        return self._inner(batch)

    def close(self):
        self._inner.close()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return write_small_bundle(tmp_path_factory.mktemp("serve") / "b")


@contextlib.contextmanager
def service_of(bundle, *, load=True, max_body_bytes=None, **limits):
    limits = Limits(**({"deadline_s": 2.0, "drain_s": 5.0} | limits))
    size = body_limit(bundle) if max_body_bytes is None else max_body_bytes
    service = Service(("127.0.0.1", 0), limits=limits, max_body_bytes=size)
    service.runner = SlowRunner(open_runner(bundle, backend="onnxruntime", precision="fp32"))
    try:
        if load:
            service.load(lambda: (bundle, service.runner))
        yield service
    finally:
        service.runner.leave.set()
        service.stop()


@pytest.fixture(scope="module")
def service(bundle):
    with service_of(bundle) as running:
        yield running


def ask(service, method, path, body=None, headers=None):
    host, _, port = service.url.removeprefix("http://").partition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=20)
    try:
        connection.request(method, path, body=body, headers=headers or {})
        response = connection.getresponse()
        return response.status, dict(response.headers), response.read()
    finally:
        connection.close()


def raw(service, data, *, hang_up=True):
    """Everything that the server says to some bytes, until it closes."""
    host, _, port = service.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        said = b""
        with contextlib.suppress(OSError):  # it may have refused, and gone, before all was sent
            connection.sendall(data)
            if hang_up:
                connection.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionResetError):
            while part := connection.recv(65536):
                said += part
        return said


def request_body(count=1):
    inputs = preprocess(golden_pixels(count), SPEC)
    tensor = {"name": "images", "datatype": "FP32", "shape": list(inputs.shape)}
    return json.dumps({"inputs": [tensor | {"data": inputs.ravel().tolist()}]}).encode()


def test_it_lives_before_it_is_ready_and_answers_when_it_is(bundle):
    with service_of(bundle, load=False) as service:
        assert ask(service, "GET", "/v2/health/live")[0] == 200
        assert ask(service, "GET", "/v2/health/ready")[0] == 503
        assert ask(service, "POST", INFER, request_body())[0] == 503
        assert ask(service, "GET", "/metrics")[0] == 200
        service.load(lambda: (bundle, service.runner))
        assert service.runner.sizes == [1, 16]  # warm at both ends
        assert ask(service, "GET", "/v2/health/ready")[0] == 200
        assert ask(service, "GET", "/v2/models/colours/versions/1/ready")[0] == 200


def test_an_answer_is_the_models(service, bundle):
    status, _, data = ask(service, "POST", INFER, request_body(6))
    (output,) = json.loads(data)["outputs"]
    assert status == 200 and output["shape"] == [6, 3]
    expected = bundle.array("golden/outputs.npy")
    np.testing.assert_allclose(np.reshape(output["data"], (6, 3)), expected, rtol=1e-5)


def test_metadata_name_the_server_and_the_model(service):
    server = json.loads(ask(service, "GET", "/v2")[2])
    assert "binary_tensor_data" in server["extensions"]
    model = json.loads(ask(service, "GET", "/v2/models/colours")[2])
    assert model["inputs"][0]["shape"] == [-1, 3, SIZE, SIZE] and model["versions"] == ["1"]
    assert ask(service, "HEAD", "/v2/models/colours")[2] == b""


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/v2/models", 404),
        ("GET", "/v2/models/other", 404),
        ("GET", "/v2/models/colours/versions/2", 404),
        ("POST", "/v2/models/other/infer", 404),
        ("GET", INFER, 405),
        ("POST", "/v2/health/live", 405),
        ("DELETE", "/v2", 405),
        ("POST", INFER, 400),
    ],
)
def test_what_is_not_there_is_refused_in_json(service, method, path, status):
    found, headers, body = ask(service, method, path, b"" if method == "POST" else None)
    assert found == status and headers["Content-Type"] == "application/json"
    assert json.loads(body)["error"]


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET /v2\r\n\r\n", 400),
        (b"\r\nGET /v2 HTTP/1.0\r\n\r\n", 200),
        (b"\n\r\n", 400),
        (b"GET /v2 HTTP/3.0\r\n\r\n", 505),
        (b"GET /v2 HTTP/x\r\n\r\n", 400),
        (b"GET /" + b"x" * 70000 + b" HTTP/1.1\r\n\r\n", 414),
        (b"GET /v2 HTTP/1.1\r\n" + b"a: b\r\n" * 200 + b"\r\n", 431),
        (b"GET /v2 HTTP/1.1\r\na: " + b"x" * 70000 + b"\r\n\r\n", 431),
        (b"POST /v2 HTTP/1.1\r\n\r\n", 411),
        (b"POST /v2 HTTP/1.1\r\nContent-Length: x\r\n\r\n", 400),
        (b"POST /v2 HTTP/1.1\r\nContent-Length: -1\r\n\r\n", 400),
        (b"POST /v2 HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab", 400),
        (b"POST /v2 HTTP/1.1\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n", 413),
        (b"POST /v2 HTTP/1.1\r\nContent-Length: 99\r\n\r\nab", 400),
        (b"POST /v2 HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 415),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
    ],
    ids=range(17),
)
def test_every_request_is_answered_with_a_status_line(service, data, status):
    said = raw(service, data)
    head = re.match(rb"HTTP/1.1 (\d+) [^\r]*\r\n", said)
    assert head and int(head[1]) == status and b"Connection: close" in said


def test_a_body_too_large_is_refused_before_it_is_read(bundle):
    with service_of(bundle, max_body_bytes=1000) as service:
        status, _, body = ask(service, "POST", INFER, b"x" * 200_000)
        assert status == 413 and b"at most 1000 bytes" in body


def test_a_client_that_sends_too_slowly_is_told_so_and_let_go(bundle):
    with service_of(bundle, deadline_s=0.3) as service:
        started = time.monotonic()
        said = raw(service, b"POST /v2 HTTP/1.1\r\nContent-Length: 9\r\n\r\na", hang_up=False)
        assert said.startswith(b"HTTP/1.1 408 ")
        assert raw(service, b"", hang_up=False) == b""  # nothing was asked
        assert time.monotonic() - started < 10


def test_a_connection_is_kept_and_one_too_many_refused(bundle):
    with service_of(bundle, max_connections=1) as service:
        host, _, port = service.url.removeprefix("http://").partition(":")
        kept = http.client.HTTPConnection(host, int(port), timeout=20)
        for _ in range(3):
            kept.request("GET", "/v2")
            assert kept.getresponse().read()
        assert raw(service, b"").startswith(b"HTTP/1.1 503 ")
        kept.close()
        until = time.monotonic() + 10
        while raw(service, b"GET /v2 HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 503"):
            assert time.monotonic() < until


def in_threads(count, function):
    results = [None] * count
    threads = [
        threading.Thread(target=lambda i=i: results.__setitem__(i, function(i)))
        for i in range(count)
    ]
    for thread in threads:
        thread.start()
    return threads, results


def wait_for(holds, seconds=10):
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.005)


def test_requests_together_share_a_batch_and_one_too_many_is_refused(bundle):
    with service_of(bundle, queue_size=4) as service:
        service.runner.hold()
        batcher = service._model.batcher
        first, _ = in_threads(1, lambda _: ask(service, "POST", INFER, request_body()))
        assert service.runner.entered.wait(10)
        others, results = in_threads(4, lambda _: ask(service, "POST", INFER, request_body()))
        wait_for(lambda: batcher.depth == 4)
        status, headers, _ = ask(service, "POST", INFER, request_body())
        assert status == 503 and headers["Retry-After"] == "1"
        service.runner.leave.set()
        for thread in (*first, *others):
            thread.join()
        assert [status for status, _, _ in results] == [200] * 4
        assert service.runner.sizes == [1, 16, 1, 4]
        text = ask(service, "GET", "/metrics")[2].decode()
        assert 'edgereg_requests_total{code="503"} 1' in text
        assert "edgereg_images_total 5" in text and "edgereg_batch_size_sum 5" in text


def test_a_stop_answers_what_was_taken_and_takes_nothing_more(bundle):
    with service_of(bundle) as service:
        service.runner.hold()
        taken, results = in_threads(1, lambda _: ask(service, "POST", INFER, request_body()))
        assert service.runner.entered.wait(10)
        stopping, drained = in_threads(1, lambda _: service.stop())
        wait_for(lambda: service._is_stopping)
        assert not service.is_ready
        service.runner.leave.set()
        for thread in (*taken, *stopping):
            thread.join()
        assert drained == [True] and results[0][0] == 200
        with pytest.raises(OSError):
            ask(service, "GET", "/v2/health/live")


def test_a_stop_that_cannot_wait_says_so(bundle):
    with service_of(bundle, drain_s=0.2) as service:
        service.runner.hold()
        in_threads(1, lambda _: ask(service, "POST", INFER, request_body()))
        assert service.runner.entered.wait(10)
        assert service.stop() is False


def test_a_model_that_is_not_finite_is_never_ready(tmp_path):
    broken = write_small_bundle(
        tmp_path / "nan", **{"model.fp32.onnx": linear_onnx(np.full((3, 3), np.nan))}
    )
    with service_of(broken, load=False) as service:
        with pytest.raises(CheckFailedError, match="must be finite"):
            service.load(lambda: (broken, service.runner))
        assert not service.is_ready


@pytest.fixture
def batcher():
    made = []

    def make(run, **options):
        options = {"max_batch": 4, "max_wait_s": 0.0, "queue_size": 8} | options
        made.append(Batcher(run, metrics=Metrics(), **options))
        return made[-1]

    yield make
    for each in made:
        each.close(timeout_s=5)


def test_a_batch_that_fails_leaves_the_next_one_alone(batcher):
    def run(batch):
        if batch[0] < 0:
            raise RuntimeError("negative")
        return batch + 1

    work = batcher(run)
    with pytest.raises(RuntimeError, match="negative"):
        work.infer(np.array([-1]), timeout_s=5)
    assert work.infer(np.array([1, 2]), timeout_s=5).tolist() == [2, 3]


def test_batches_are_never_too_large_and_every_row_comes_back_to_who_sent_it(batcher):
    sizes = []

    def run(batch):
        sizes.append(len(batch))
        return batch * 10

    work = batcher(run, max_wait_s=0.01, queue_size=99)
    sent = [np.arange(i, i + 1 + i % 4) for i in range(30)]
    threads, results = in_threads(30, lambda i: work.infer(sent[i], timeout_s=10))
    for thread in threads:
        thread.join()
    assert all(np.array_equal(r, s * 10) for r, s in zip(results, sent, strict=True))
    assert max(sizes) <= 4 and sum(sizes) == sum(map(len, sent)) and len(sizes) < 30


def test_an_answer_that_comes_too_late_is_not_waited_for_nor_computed(batcher):
    entered, leave, seen = threading.Event(), threading.Event(), []

    def run(batch):
        entered.set()
        leave.wait(10)
        seen.append(len(batch))
        return batch

    work = batcher(run, max_batch=1)
    threads, _ = in_threads(1, lambda _: work.infer(np.zeros(1), timeout_s=10))
    assert entered.wait(10)
    with pytest.raises(LateError):
        work.infer(np.zeros(1), timeout_s=0.05)
    leave.set()
    threads[0].join()
    work.close(timeout_s=5)
    assert seen == [1]
    with pytest.raises(ClosedError):
        work.infer(np.zeros(1), timeout_s=1)


def test_a_full_queue_refuses_at_once(batcher):
    entered, leave = threading.Event(), threading.Event()

    def run(batch):
        entered.set()
        leave.wait(10)
        return batch

    work = batcher(run, queue_size=1, max_batch=1)
    threads, _ = in_threads(1, lambda _: work.infer(np.zeros(1), timeout_s=10))
    assert entered.wait(10)
    more, _ = in_threads(1, lambda _: work.infer(np.zeros(1), timeout_s=10))
    wait_for(lambda: work.depth == 1)
    with pytest.raises(FullError):
        work.infer(np.zeros(1), timeout_s=10)
    leave.set()
    for thread in (*threads, *more):
        thread.join()


def test_metrics_are_prometheus_text():
    metrics = Metrics()
    metrics.answered(200, 0.003)
    metrics.answered(404)
    metrics.computed(3, 0.002)
    text = metrics.to_text(is_ready=True, queue_depth=2)
    line = r"(# (HELP|TYPE) \w+ .+|\w+(\{\w+=\"[^\"]+\"\})? [0-9.e+-]+)"
    assert all(re.fullmatch(line, each) for each in text.splitlines()) and text.endswith("\n")
    assert 'edgereg_request_seconds_bucket{le="0.0025"} 0' in text
    assert 'edgereg_request_seconds_bucket{le="0.005"} 1' in text
    assert 'edgereg_batch_size_bucket{le="2"} 0' in text and "edgereg_queue_depth 2" in text
    assert 'edgereg_requests_total{code="404"} 1' in text and "edgereg_ready 1" in text


@pytest.mark.parametrize("is_abstract", [True, False])
def test_systemd_hears_what_is_said(tmp_path, is_abstract):
    name = f"@edgereg-test-{os.getpid()}" if is_abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind("\0" + name[1:] if is_abstract else name)
        assert notify("READY=1", environment={"NOTIFY_SOCKET": name}) is True
        assert listener.recv(100) == b"READY=1"
    assert notify("READY=1", environment={}) is False
    with pytest.raises(OSError):
        notify("READY=1", environment={"NOTIFY_SOCKET": name})


def test_the_watchdog_is_told_twice_in_its_time():
    mine = str(os.getpid())
    assert watchdog_interval_s(environment={}) is None
    assert watchdog_interval_s(environment={"WATCHDOG_USEC": "3000000"}) == 1.5
    ours = {"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": mine}
    assert watchdog_interval_s(environment=ours) == 1.5
    assert watchdog_interval_s(environment=ours | {"WATCHDOG_PID": "1"}) is None
    for wrong in ("x", "0", "-5"):
        with pytest.raises(BadInputError, match="number of microseconds"):
            watchdog_interval_s(environment={"WATCHDOG_USEC": wrong})


def test_the_command_serves_is_watched_and_stops_with_0(bundle, tmp_path):
    address = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(address)
        listener.settimeout(60)
        environment = dict(os.environ, NOTIFY_SOCKET=address, WATCHDOG_USEC="200000")
        code = "import sys; from edgereg.cli import main; sys.exit(main(sys.argv[1:]))"
        command = [sys.executable, "-c", code, "serve", str(bundle.path), "--port", "0", "--json"]
        child = subprocess.Popen(
            command, stdout=subprocess.PIPE, cwd=ROOT, env=environment, text=True
        )
        try:
            url = json.loads(child.stdout.readline())["url"]
            assert [listener.recv(100) for _ in range(3)] == [b"READY=1", *[b"WATCHDOG=1"] * 2]

            class At:
                pass

            At.url = url
            assert url.startswith("http://127.0.0.1:")
            assert ask(At, "POST", INFER, request_body())[0] == 200
            child.send_signal(signal.SIGTERM)
            assert child.wait(30) == 0
            said = []
            while not said or said[-1] != b"STOPPING=1":
                said.append(listener.recv(100))
        finally:
            child.kill()
            child.wait()
            child.stdout.close()


def test_an_address_that_cannot_be_had_is_refused(bundle):
    from test_deploy_commands import run

    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        try:
            with pytest.raises(BadInputError, match="must be free"):
                run("serve", bundle.path, "--port", port)
            with pytest.raises(BadInputError, match="must be free"):
                run("serve", bundle.path, "--port", 70000)
        finally:
            for number, handler in zip((signal.SIGTERM, signal.SIGINT), before, strict=True):
                signal.signal(number, handler)
