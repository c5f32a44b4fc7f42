"""One thread that owns the model, and the queue before it.

Requests that come within a few milliseconds share a batch. The queue is bounded: a request too many
is refused at once, which tells a client more than an answer that comes too late; so nobody waits
longer than the queue is long. A request that nobody waits for any more is not computed.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploy.service.metrics import Metrics

__all__ = ["Batcher", "ClosedError", "FullError", "LateError"]

_BEAT_S = 0.5


class FullError(Exception):
    """As many requests wait as may."""


class ClosedError(Exception):
    """No requests are taken any more."""


class LateError(Exception):
    """The answer did not come in time."""


@dataclass(eq=False)
class _Ticket:
    """A request on its way; `done` is set when either output or error is."""

    batch: NDArray[Any]
    done: threading.Event = field(default_factory=threading.Event)
    output: NDArray[Any] | None = None
    error: Exception | None = None
    is_abandoned: bool = False


class Batcher:
    """The model's thread.

    Args:
        run: From (N, ...) inputs to (N, ...) outputs; only ever called by this thread.
        max_batch: The largest N.
        max_wait_s: How long the first of a batch waits for others.
        queue_size: How many requests may wait.
        metrics: Told of each batch.
    """

    def __init__(
        self,
        run: Callable[[NDArray[Any]], NDArray[Any]],
        *,
        max_batch: int,
        max_wait_s: float,
        queue_size: int,
        metrics: Metrics,
    ) -> None:
        self._run, self._max_batch, self._queue_size = run, max_batch, queue_size
        self._max_wait_s = max_wait_s if max_batch > 1 else 0.0
        self._metrics = metrics
        self._waiting: deque[_Ticket] = deque()
        self._changed = threading.Condition()
        self._is_closed = False
        self._beat_s = time.monotonic()
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self._thread.start()

    @property
    def depth(self) -> int:
        """How many requests wait."""
        return len(self._waiting)

    @property
    def silence_s(self) -> float:
        """How long the model's thread has not been heard of: it is idle twice a second."""
        return time.monotonic() - self._beat_s

    def infer(self, batch: NDArray[Any], *, timeout_s: float) -> NDArray[Any]:
        """Compute a request's outputs; any thread may call.

        Args:
            batch: (N, ...) of the model's input, N at most `max_batch`.
            timeout_s: How long to wait.

        Raises:
            FullError, ClosedError, LateError: There is no answer.
            Exception: What the model raised.
        """
        ticket = _Ticket(batch)
        with self._changed:
            if self._is_closed:
                raise ClosedError
            if len(self._waiting) >= self._queue_size:
                raise FullError
            self._waiting.append(ticket)
            self._changed.notify()
        if not ticket.done.wait(timeout_s):
            ticket.is_abandoned = True
            raise LateError
        if ticket.error is not None:
            raise ticket.error
        assert ticket.output is not None
        return ticket.output

    def close(self, *, timeout_s: float) -> bool:
        """Take no more requests, and compute those that wait.

        Returns:
            Whether all were, in time.
        """
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while True:
            self._beat_s = time.monotonic()
            tickets = self._next()
            if tickets is None:
                return
            if tickets:
                self._compute(tickets)

    def _next(self) -> list[_Ticket] | None:
        """Return the tickets of the next batch: none after a beat, None when all is over."""
        with self._changed:
            if not self._waiting and not self._is_closed:
                self._changed.wait(_BEAT_S)
            if not self._waiting:
                return None if self._is_closed else []
            taken, size = [], 0
            until = time.monotonic() + self._max_wait_s
            while True:
                while self._waiting and size + len(self._waiting[0].batch) <= self._max_batch:
                    ticket = self._waiting.popleft()
                    if not ticket.is_abandoned:
                        taken.append(ticket)
                        size += len(ticket.batch)
                left = until - time.monotonic()
                if size >= self._max_batch or self._waiting or self._is_closed or left <= 0:
                    return taken
                self._changed.wait(left)

    def _compute(self, tickets: list[_Ticket]) -> None:
        batches = [ticket.batch for ticket in tickets]
        started = time.monotonic()
        try:
            outputs = self._run(batches[0] if len(batches) == 1 else np.concatenate(batches))
        except Exception as error:  # it is the requests' that asked; the next batch may be fine
            for ticket in tickets:
                ticket.error = error
                ticket.done.set()
            return
        self._metrics.computed(len(outputs), time.monotonic() - started)
        first = 0
        for ticket in tickets:
            ticket.output = outputs[first : first + len(ticket.batch)]
            first += len(ticket.batch)
            ticket.done.set()
