"""Some of what benchmarks/serve.py sends by the ten thousand, and that it would notice."""

import http.server
import random
import select
import socket
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

import serve


@contextmanager
def answering(status, *, after=None):
    """The port of a server that gives every request the same answer, or none before an event."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            if after is not None:
                after.wait(10)
            self.send_response(status)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def test_malformed_requests_are_refused_and_good_ones_answered(tmp_path, capsys):
    with serve._service(tmp_path / "b", layers=0) as (port, pid):
        assert serve._send_malformed(port, 150)
        serve._send_good(port, 60, pid)  # too few to judge the memory
    assert "60 good requests: 0 failed" in capsys.readouterr().out


def test_a_service_that_takes_what_is_malformed_is_noticed(capsys):
    with answering(200) as port:
        assert not serve._send_malformed(port, 20)


def test_a_service_that_hangs_is_noticed(capsys, monkeypatch):
    monkeypatch.setattr(serve, "HANG_S", 0.1)
    done = threading.Event()
    with answering(400, after=done) as port:
        assert not serve._send_malformed(port, 3)
        done.set()
    assert "hang" in capsys.readouterr().out


def test_a_kept_connection_that_the_service_has_closed_is_opened_again():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        kept = serve._connect(port)
        with listener.accept()[0]:
            assert serve._open_again(kept, port) is kept
        assert select.select([kept], [], [], 10)[0]
        with serve._open_again(kept, port) as other:
            assert other is not kept and kept.fileno() == -1


@pytest.mark.parametrize("seed", range(3))
def test_every_malformed_request_differs_from_a_good_one(seed):
    draw = random.Random(seed)
    good = serve._post(serve._good_body(random.Random(seed)))
    assert all(serve._malformed(draw) != good for _ in range(50))
