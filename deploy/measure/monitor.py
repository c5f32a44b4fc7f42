"""Watch the board while something is measured, and judge whether the figures can be trusted.

A run is invalid if a clock fell, the hardware throttled, or the temperature ran away: another run
would then give other figures. Where nothing can be watched, as in most virtual machines, the run is
neither valid nor invalid, and says so.
"""

import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal

from deploy.board.clocks import Clock
from deploy.board.power import EVENT_MEANINGS
from deploy.board.state import BoardState, read_state

__all__ = ["Monitor", "Validity", "judge_states", "watch_idle"]

_INTERVAL_S = 0.5
_IDLE_INTERVAL_S = 0.1
_CLOCK_FALL, _LIMIT_FALL = 0.9, 0.98
_IDLE_GPU = 0.1
_MAX_C, _MAX_RISE_C = 95.0, 30.0  # Orin slows down from 99 on


@dataclass(frozen=True)
class Validity:
    """Whether a run's figures can be trusted.

    Attributes:
        watched: What was watched: "clocks", "temperatures", "throttle events", "power".
        reasons: Why it is invalid; empty if nothing was seen that makes it so.
    """

    watched: tuple[str, ...]
    reasons: tuple[str, ...]

    @property
    def verdict(self) -> Literal["valid", "invalid", "not watched"]:
        """In a word; power alone tells nothing."""
        if self.reasons:
            return "invalid"
        return "valid" if set(self.watched) - {"power"} else "not watched"

    def __str__(self) -> str:
        if self.reasons:
            return f"INVALID: {'; '.join(self.reasons)}"
        if self.verdict == "not watched":
            return "not watched: no clocks, throttle events or temperatures can be read here"
        return f"valid: {', '.join(self.watched)} were watched"


class Monitor:
    """Reads the board before, during and after a `with` block.

    During it a thread reads some dozens of small files every half second, if there are any.

    Args:
        root: The tree of files.
        interval_s: Between two readings.
    """

    def __init__(self, root: Path = Path("/"), *, interval_s: float = _INTERVAL_S) -> None:
        self._root, self._interval_s = root, interval_s
        self._states: list[BoardState] = []
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def states(self) -> tuple[BoardState, ...]:
        """Every reading in order of time: the first before the block, the last after it."""
        return tuple(self._states)

    def __enter__(self) -> "Monitor":
        self._read()
        if self._states[0].watched:
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._done.set()
        if self._thread is not None:
            self._thread.join()
        self._read()

    def _watch(self) -> None:
        while not self._done.wait(self._interval_s):
            self._read()

    def _read(self) -> None:
        self._states.append(read_state(self._root, time_s=time.perf_counter()))


def watch_idle(root: Path, *, duration_s: float) -> tuple[BoardState, ...]:
    """Read the board while nothing runs; nothing, and at once, where no power is measured."""
    states = [read_state(root, time_s=time.perf_counter())]
    if not states[0].rails:
        return ()
    end_s = time.perf_counter() + duration_s
    while time.perf_counter() < end_s:
        time.sleep(_IDLE_INTERVAL_S)
        states.append(read_state(root, time_s=time.perf_counter()))
    return tuple(states)


def judge_states(states: Sequence[BoardState]) -> Validity:
    """Judge a run by what was read in it.

    Args:
        states: Two or more, in order of time.
    """
    reasons = (*_fallen_clocks(states), *_risen_events(states), *_heat(states))
    return Validity(states[0].watched, reasons)


def _fallen_clocks(states: Sequence[BoardState]) -> Iterator[str]:
    """The CPU's fastest core is the one that works; a GPU that does nothing may slow down."""
    series: dict[str, list[Clock]] = {}
    for state in states:
        cores = [clock for clock in state.clocks if not clock.is_gpu]
        if cores:
            fastest = max(cores, key=lambda core: core.current_hz)
            series.setdefault("the CPU", []).append(fastest)
        for clock in state.clocks:
            if clock.is_gpu:
                series.setdefault(clock.name, []).append(clock)
    for name, clocks in series.items():
        loads = [clock.load for clock in clocks if clock.load is not None]
        if loads and statistics.median(loads) < _IDLE_GPU:
            continue
        thirds = [clocks[len(clocks) * i // 3 : len(clocks) * (i + 1) // 3] for i in range(3)]
        first, *later = [
            statistics.median(c.current_hz for c in third) for third in thirds if third
        ]
        slowest = min(later, default=first)
        if slowest < _CLOCK_FALL * first:
            yield f"the clock of {name} fell from {first / 1e6:.0f} to {slowest / 1e6:.0f} MHz"
        limits = [clock.limit_hz for clock in clocks if clock.limit_hz is not None]
        before, lowest = limits[0] if limits else 0, min(limits, default=0)
        if lowest < _LIMIT_FALL * before:
            yield f"the limit of {name} fell from {before / 1e6:.0f} to {lowest / 1e6:.0f} MHz"


def _risen_events(states: Sequence[BoardState]) -> Iterator[str]:
    begin = states[0]
    for name, before in begin.events.items():
        counts = [(state.time_s, state.events.get(name, before)) for state in states]
        rises = [time_s - begin.time_s for time_s, count in counts if count > before]
        if rises:
            meaning = EVENT_MEANINGS.get(name.rpartition("/")[2], "throttled")
            yield (
                f"{counts[-1][1] - before} throttle events {name} ({meaning}), "
                f"the first seen after {rises[0]:.1f} s"
            )


def _heat(states: Sequence[BoardState]) -> Iterator[str]:
    for zone, before in states[0].temperatures_c.items():
        hottest = max(state.temperatures_c.get(zone, before) for state in states)
        if hottest >= _MAX_C or hottest - before > _MAX_RISE_C:
            yield f"{zone} ran away, from {before:.1f} to {hottest:.1f} degrees C"
