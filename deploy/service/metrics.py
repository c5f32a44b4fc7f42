"""Counters of a service, in the text format that Prometheus reads (version 0.0.4)."""

import threading
from collections import Counter
from collections.abc import Iterable, Sequence

__all__ = ["CONTENT_TYPE", "Metrics"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """What a service has done since it started; any thread may tell it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._codes: Counter[int] = Counter()
        self._images = 0
        self._request_s = _Histogram(_SECONDS)
        self._batch_s = _Histogram(_SECONDS)
        self._batch_size = _Histogram(_SIZES)

    def answered(self, status: int, seconds: float | None = None) -> None:
        """Count an answer; of one to an inference also how long it took."""
        with self._lock:
            self._codes[status] += 1
            if seconds is not None:
                self._request_s.add(seconds)

    def computed(self, size: int, seconds: float) -> None:
        """Count a batch that the model computed."""
        with self._lock:
            self._images += size
            self._batch_size.add(size)
            self._batch_s.add(seconds)

    def to_text(self, *, is_ready: bool, queue_depth: int) -> str:
        """Return all of it."""
        with self._lock:
            lines = [
                *_head("edgereg_ready", "gauge", "Whether the model is warm and takes requests."),
                f"edgereg_ready {int(is_ready)}",
                *_head("edgereg_queue_depth", "gauge", "Requests that wait for the model."),
                f"edgereg_queue_depth {queue_depth}",
                *_head("edgereg_images_total", "counter", "Images that the model computed."),
                f"edgereg_images_total {self._images}",
                *_head("edgereg_requests_total", "counter", "HTTP answers by their status."),
                *(
                    f'edgereg_requests_total{{code="{code}"}} {count}'
                    for code, count in sorted(self._codes.items())
                ),
                *_head("edgereg_request_seconds", "histogram", "An inference, from its body on."),
                *self._request_s.lines("edgereg_request_seconds"),
                *_head("edgereg_batch_seconds", "histogram", "A batch in the model."),
                *self._batch_s.lines("edgereg_batch_seconds"),
                *_head("edgereg_batch_size", "histogram", "Images in a batch."),
                *self._batch_size.lines("edgereg_batch_size"),
            ]
        return "\n".join(lines) + "\n"


class _Histogram:
    """How many values are at most each bound."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds, self._counts = bounds, [0] * len(bounds)
        self._total, self._sum = 0, 0.0

    def add(self, value: float) -> None:
        self._total += 1
        self._sum += value
        for place, bound in enumerate(self._bounds):
            self._counts[place] += value <= bound

    def lines(self, name: str) -> Iterable[str]:
        for bound, count in zip(self._bounds, self._counts, strict=True):
            yield f'{name}_bucket{{le="{bound:g}"}} {count}'
        yield f'{name}_bucket{{le="+Inf"}} {self._total}'
        yield f"{name}_sum {self._sum:.9g}"
        yield f"{name}_count {self._total}"


def _head(name: str, kind: str, what: str) -> tuple[str, str]:
    return f"# HELP {name} {what}", f"# TYPE {name} {kind}"
