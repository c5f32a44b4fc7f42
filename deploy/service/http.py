"""HTTP/1.1 of the standard library, with limits: on connections, on time, and on what may be sent.

Every answer is whole, with a status line and a length; every request has a deadline for all of its
bytes, so that a client who sends one at a time holds a connection no longer than another.
"""

import contextlib
import io
import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from socketserver import ThreadingTCPServer
from typing import Any

__all__ = ["Reply", "Request", "Server", "json_reply"]

_LINGER_S = 1.0
_BUSY = b'{"error": "too many connections"}'


@dataclass(frozen=True)
class Request:
    """What a client asks; header names are in lower case."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True)
class Reply:
    """What it is told."""

    status: int
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)


def json_reply(status: int, document: Mapping[str, Any], **headers: str) -> Reply:
    """Return a reply of JSON."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Reply(
        status, json.dumps(document).encode(), {"Content-Type": "application/json", **named}
    )


class Server(ThreadingTCPServer):  # HTTPServer asks the network for its own name
    """A thread for each connection.

    Args:
        address: Host and port; port 0 takes a free one.
        answer: From a request to a reply; called by many threads.
        on_refused: Told the status of what was refused before it became a request.
        max_body_bytes: A larger body is refused before it is read.
        max_connections: More are refused at once.
        deadline_s: For all bytes of a request, and for how long a connection may lie idle.

    Raises:
        OSError: The address cannot be had.
    """

    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(
        self,
        address: tuple[str, int],
        answer: Callable[[Request], Reply],
        *,
        on_refused: Callable[[int], None],
        max_body_bytes: int,
        max_connections: int,
        deadline_s: float,
    ) -> None:
        self.answer, self.on_refused = answer, on_refused
        self.max_body_bytes, self.deadline_s = max_body_bytes, deadline_s
        self.is_closing = False
        self._free = threading.Semaphore(max_connections)
        self._active = 0
        self._changed = threading.Condition()
        super().__init__(address, _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start a connection's thread, or refuse the connection."""
        if self._free.acquire(blocking=False):
            try:
                super().process_request(request, client_address)
            except BaseException:  # no thread could be started
                self._free.release()
                raise
            return
        self.on_refused(503)
        head = f"HTTP/1.1 503 Service Unavailable\r\nContent-Length: {len(_BUSY)}\r\n"
        head += "Content-Type: application/json\r\nRetry-After: 1\r\nConnection: close\r\n\r\n"
        request.setblocking(False)  # it fits the socket's buffer, and must not keep the others
        with contextlib.suppress(OSError):
            request.send(head.encode() + _BUSY)
        self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve a connection until it ends."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone is no error; anything else is ours, and goes to the journal."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)

    @contextlib.contextmanager
    def answering(self) -> Any:
        """Count a request as being answered."""
        with self._changed:
            self._active += 1
        try:
            yield
        finally:
            with self._changed:
                self._active -= 1
                self._changed.notify_all()

    def drain(self, *, timeout_s: float) -> bool:
        """Wait until no request is being answered; whether that came in time."""
        with self._changed:
            return self._changed.wait_for(lambda: self._active == 0, timeout_s)


class _RefusedError(Exception):
    """What came is no request."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class _DeadlineReader(io.RawIOBase):
    """A socket that is read until a moment, however few bytes come at a time."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection, self.until_s = connection, 0.0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self.until_s - time.monotonic()
        if left <= 0:
            raise TimeoutError("the request's deadline has passed")
        self._connection.settimeout(left)
        return self._connection.recv_into(buffer)


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: Server
    protocol_version = "HTTP/1.1"
    default_request_version = "HTTP/1.1"  # a refusal of a line that names none has a status line
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        self.command, self.raw_requestline = "", b""
        self._reader = _DeadlineReader(self.connection)
        self.rfile = io.BufferedReader(self._reader)

    def handle_one_request(self) -> None:
        self._reader.until_s = time.monotonic() + self.server.deadline_s
        self.close_connection, self.raw_requestline = True, b""
        try:
            line = self.rfile.readline(65537)
            if line in (b"\r\n", b"\n"):  # one is passed over: RFC 9112, section 2.2
                line = self.rfile.readline(65537)
            if not line:
                return
            self.raw_requestline = line
            if len(line) > 65536:
                raise _RefusedError(414, "the request line is too long")
            if len(line.split()) != 3:
                raise _RefusedError(400, "the request line has three words")
            if self.parse_request():  # else it has refused
                self._answer()
        except _RefusedError as error:
            self._refuse(error.status, str(error))
        except TimeoutError:
            if self.raw_requestline:
                self._refuse(408, "the request did not come in time")

    def _answer(self) -> None:
        with self.server.answering():
            keep = not self.close_connection and not self.server.is_closing
            headers = {name.lower(): value for name, value in self.headers.items()}
            request = Request(self.command, self.path, headers, self._body())
            try:
                reply = self.server.answer(request)
            except Exception as error:  # ours; the client is told, and the others are served
                self.log_error("%s", error)
                reply = json_reply(500, {"error": "the server failed"})
            self._send(reply, keep=keep and not self.server.is_closing)

    def _body(self) -> bytes:
        lengths = self.headers.get_all("Content-Length", [])
        if "Transfer-Encoding" in self.headers or "Content-Encoding" in self.headers:
            raise _RefusedError(415, "a body is sent as it is, with a Content-Length")
        if not lengths:
            if self.command == "POST":
                raise _RefusedError(411, "a body has a Content-Length")
            return b""
        text = lengths[0]
        if len(lengths) > 1 or not (text.isascii() and text.isdigit()):
            raise _RefusedError(400, "a request has one Content-Length, a number")
        # Of a number with thousands of digits int() may refuse to know.
        length = int(text) if len(text) < 18 else self.server.max_body_bytes + 1
        if length > self.server.max_body_bytes:
            raise _RefusedError(413, f"a body has at most {self.server.max_body_bytes} bytes")
        body = self.rfile.read(length)
        if len(body) < length:
            raise _RefusedError(400, f"the body ended after {len(body)} of {length} bytes")
        return body

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Refuse as the rest of the server does; the standard library's parser calls this."""
        self._refuse(int(code), explain or message or "no such request")

    def _refuse(self, status: int, message: str) -> None:
        """Say why, and read for a moment what may still come: else the client may not hear it."""
        self.server.on_refused(status)
        self.close_connection = True
        self._send(json_reply(status, {"error": message}), keep=False)
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            self._reader.until_s = time.monotonic() + _LINGER_S
            while self.rfile.read1(1 << 16):
                pass

    def _send(self, reply: Reply, *, keep: bool) -> None:
        self.close_connection = not keep
        headers = {**reply.headers, "Content-Length": str(len(reply.body))}
        headers |= {} if keep else {"Connection": "close"}
        phrase = self.responses.get(reply.status, ("Unknown", ""))[0]
        lines = [f"HTTP/1.1 {reply.status} {phrase}", *(f"{k}: {v}" for k, v in headers.items())]
        head = ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")
        body = b"" if self.command == "HEAD" else reply.body
        self.connection.settimeout(self.server.deadline_s)
        try:
            self.connection.sendall(head + body)  # in one piece: two would wait for an ack between
        except OSError:  # the client has gone, or does not read
            self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing of each request: the metrics count them."""

    def log_error(self, format: str, *args: Any) -> None:
        """A failure of ours goes to the journal."""
        BaseHTTPRequestHandler.log_message(self, "failed: " + format, *args)
