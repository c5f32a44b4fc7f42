"""The service: a bundle behind HTTP, from the first byte to the last answer.

    listen -> load -> warm up -> ready ... SIGTERM -> not ready -> answer what was taken -> exit 0

It listens before the model is loaded, so that "live" can be told from "ready".
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from deploy.bundle.read import Bundle
from deploy.errors import ExplainedError
from deploy.runtime.postprocess import check_finite
from deploy.runtime.runner import Runner
from deploy.service.batcher import Batcher, ClosedError, FullError, LateError
from deploy.service.http import Reply, Request, Server, json_reply
from deploy.service.metrics import CONTENT_TYPE, Metrics
from deploy.service.notify import notify, watchdog_interval_s
from deploy.service.protocol import (
    HEADER_LENGTH,
    ProtocolError,
    infer_response,
    model_metadata,
    parse_infer,
)

__all__ = ["Limits", "Service", "body_limit"]

_JSON_DIGITS = 32  # characters of a number and what is between two: generous
_STUCK_S = 30.0  # a model that computes for longer does not answer any more


@dataclass(frozen=True)
class Limits:
    """What a service takes.

    Attributes:
        queue_size: Requests that may wait for the model.
        max_wait_s: How long the first image of a batch waits for others.
        max_connections: More are refused.
        deadline_s: For the bytes of a request.
        answer_s: For the answer.
        drain_s: After SIGTERM, for what was taken.
    """

    queue_size: int = 64
    max_wait_s: float = 0.002
    max_connections: int = 256
    deadline_s: float = 10.0
    answer_s: float = 30.0
    drain_s: float = 20.0


@dataclass(frozen=True)
class _Model:
    """A loaded, warm model.

    Attributes:
        bundle: What it is of.
        runner: What computes it.
        batcher: Its thread.
        places: One for each request that may be read, wait or be computed. Without them those that
            are still being parsed would be a second queue, as long as there are connections.
    """

    bundle: Bundle
    runner: Runner
    batcher: Batcher
    places: threading.Semaphore


class Service:
    """A bundle behind HTTP; it listens from the start, and is ready after `load`.

    Args:
        address: Host and port; port 0 takes a free one.
        limits: What it takes.
        max_body_bytes: Of a request.

    Raises:
        OSError: The address cannot be had.
    """

    def __init__(self, address: tuple[str, int], *, limits: Limits, max_body_bytes: int) -> None:
        self.limits, self.metrics = limits, Metrics()
        self._model: _Model | None = None
        self._is_stopping = False
        self._server = Server(
            address,
            self._answer,
            on_refused=self.metrics.answered,
            max_body_bytes=max_body_bytes,
            max_connections=limits.max_connections,
            deadline_s=limits.deadline_s,
        )
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True
        )
        self._thread.start()

    @property
    def url(self) -> str:
        """Where it listens."""
        host, port = self._server.server_address[:2]
        return f"http://{host!s}:{port}"

    @property
    def is_ready(self) -> bool:
        """Whether it answers to images: warm, not stopping, and not stuck."""
        model = self._model
        return model is not None and not self._is_stopping and model.batcher.silence_s < _STUCK_S

    def load(self, open_model: Callable[[], tuple[Bundle, Runner]]) -> None:
        """Open a model, warm it up at its smallest and its largest batch, and be ready.

        Raises:
            DeployError: It cannot be opened, or what it computes is not finite.
        """
        bundle, runner = open_model()
        most = bundle.manifest.max_batch
        stored = bundle.array(bundle.manifest.golden.preprocessed)
        for size in sorted({1, most}):
            inputs = np.resize(stored, (size, *stored.shape[1:]))
            check_finite(runner(inputs))
        batcher = Batcher(
            runner,
            max_batch=most,
            max_wait_s=self.limits.max_wait_s,
            queue_size=self.limits.queue_size,
            metrics=self.metrics,
        )
        places = threading.Semaphore(self.limits.queue_size + most)
        self._model = _Model(bundle, runner, batcher, places)
        notify("READY=1")

    def wait(self, stop: threading.Event) -> None:
        """Keep systemd's watchdog quiet while the model answers, until it is time to stop."""
        interval_s = watchdog_interval_s()
        while not stop.wait(interval_s):
            if self.is_ready:
                notify("WATCHDOG=1")

    def stop(self) -> bool:
        """Take nothing more, answer what was taken, and close.

        Returns:
            Whether all of it was answered in time.
        """
        self._is_stopping = self._server.is_closing = True
        notify("STOPPING=1")
        until = time.monotonic() + self.limits.drain_s
        self._server.shutdown()
        self._server.server_close()
        answered = self._server.drain(timeout_s=self.limits.drain_s)
        if self._model is None:
            return answered
        left = max(0.0, until - time.monotonic())
        if not self._model.batcher.close(timeout_s=left):
            return False  # the model still computes: freeing it now would pull it from under that
        self._model.runner.close()
        return answered

    def _answer(self, request: Request) -> Reply:
        started = time.monotonic()
        is_inference = request.path.partition("?")[0].endswith("/infer")
        try:
            reply = self._route(request)
        except ProtocolError as error:
            reply = json_reply(error.status, {"error": str(error)})
        took = time.monotonic() - started
        is_answered = is_inference and reply.status == 200
        self.metrics.answered(reply.status, took if is_answered else None)
        return reply

    def _route(self, request: Request) -> Reply:
        path = request.path.partition("?")[0]
        parts = [part for part in path.split("/") if part]
        if parts[-1:] == ["infer"] and parts[:2] == ["v2", "models"]:
            _check_method(request, "POST")
            return self._infer(self._named(parts[2:-1]), request)
        _check_method(request, "GET")
        if parts == ["metrics"]:
            depth = 0 if self._model is None else self._model.batcher.depth
            text = self.metrics.to_text(is_ready=self.is_ready, queue_depth=depth)
            return Reply(200, text.encode(), {"Content-Type": CONTENT_TYPE})
        if parts == ["v2"]:
            return json_reply(200, _server_metadata())
        if parts == ["v2", "health", "live"]:
            return json_reply(200, {"live": True})
        if parts == ["v2", "health", "ready"]:
            return json_reply(200 if self.is_ready else 503, {"ready": self.is_ready})
        if parts[:2] == ["v2", "models"] and parts[-1] == "ready":
            model = self._named(parts[2:-1])
            said = {"name": model.bundle.manifest.name, "ready": self.is_ready}
            return json_reply(200 if self.is_ready else 503, said)
        if parts[:2] == ["v2", "models"]:
            model = self._named(parts[2:])
            manifest, runner = model.bundle.manifest, model.runner
            return json_reply(
                200, model_metadata(manifest, precision=runner.precision, backend=runner.name)
            )
        raise ProtocolError(404, "there is no such path; see the Open Inference Protocol v2")

    def _named(self, parts: list[str]) -> _Model:
        """Return the model that a path names: NAME, or NAME/versions/1."""
        model = self._model
        if model is None:
            raise ProtocolError(503, "the model is being loaded")
        name = model.bundle.manifest.name
        if parts not in ([name], [name, "versions", "1"]):
            raise ProtocolError(404, f"the model is called '{name}', and its only version 1")
        return model

    def _infer(self, model: _Model, request: Request) -> Reply:
        if self._is_stopping:
            return _unavailable("the service is stopping")
        if not model.places.acquire(blocking=False):
            return _unavailable(f"{self.limits.queue_size} requests wait already")
        try:
            return self._computed(model, request)
        finally:
            model.places.release()

    def _computed(self, model: _Model, request: Request) -> Reply:
        manifest = model.bundle.manifest
        asked = parse_infer(
            request.body,
            header_length=request.headers.get(HEADER_LENGTH.lower()),
            manifest=manifest,
        )
        try:
            outputs = model.batcher.infer(asked.batch, timeout_s=self.limits.answer_s)
            check_finite(outputs)
        except FullError:
            return _unavailable(f"{self.limits.queue_size} requests wait already")
        except ClosedError:
            return _unavailable("the service is stopping")
        except LateError:
            raise ProtocolError(504, "the model did not answer in time") from None
        except ExplainedError as error:
            raise ProtocolError(500, f"{error.rule}; found: {error.found}") from error
        headers, body = infer_response(outputs, asked, manifest=manifest)
        return Reply(200, body, headers)


def body_limit(bundle: Bundle) -> int:
    """Return how many bytes the largest sensible request has: a full batch of JSON numbers."""
    manifest = bundle.manifest
    numbers = manifest.max_batch * int(np.prod(manifest.preprocessing.input_shape))
    return (1 << 20) + _JSON_DIGITS * numbers


def _server_metadata() -> dict[str, Any]:
    try:
        found = version("edgereg")
    except PackageNotFoundError:  # run from a checkout
        found = "not installed"
    return {"name": "edgereg", "version": found, "extensions": ["binary_tensor_data"]}


def _unavailable(message: str) -> Reply:
    return json_reply(503, {"error": message}, Retry_After="1")


def _check_method(request: Request, method: str) -> None:
    if request.method not in (method, "HEAD" if method == "GET" else method):
        raise ProtocolError(405, f"{request.path[:80]} is asked for by {method}")
