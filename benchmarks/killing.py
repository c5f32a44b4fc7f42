"""Kill a writer at random moments, and count in which state its result is."""

import os
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

__all__ = ["Check", "Write", "kill_writers", "leftovers"]

Write = Callable[[], None]
Check = Callable[[], str]

_KILLED, _DONE, _FAILED = "killed", "done before the kill", "failed before the kill"


def leftovers(folder: Path) -> int:
    """How many staging files and directories lie in a folder."""
    return sum(path.name.startswith(".staging-") for path in folder.iterdir())


def kill_writers(
    write: Write,
    check: Check,
    start: Write,
    *,
    folder: Path,
    count: int,
    seed: int,
    left_over: Callable[[Path], int] = leftovers,
) -> Counter[str]:
    """Kill a writer at a random moment of the time that it takes, again and again.

    Args:
        write: Replaces the result; runs in a fork.
        check: Says "whole", "absent" or what else the result is.
        start: What the next start of a writer does first; runs in a fork, too.
        folder: Where leftovers would be.
        count: How many to kill.
        seed: Of the moments.
        left_over: Counts what is left over in the folder.

    Raises:
        RuntimeError: Writers fail without being killed.
    """
    rng = np.random.default_rng(seed)
    ends = [_run(write, None) for _ in range(5)]
    if {end for end, _ in ends} != {_DONE}:
        raise RuntimeError("a writer that is not killed must come to its end")
    took_s = np.median([seconds for _, seconds in ends])
    tally: Counter[str] = Counter()
    for _ in range(count):
        end, _ = _run(write, float(rng.uniform(0, took_s)))
        tally[end] += 1
        tally[check()] += 1
        tally[f"left over: {left_over(folder)}"] += 1
        end, _ = _run(start, None)
        if end != _DONE:
            tally["the next start failed"] += 1
        tally[f"after the next start: {check()}"] += 1
        tally[f"after the next start, left over: {left_over(folder)}"] += 1
    return tally


def _run(write: Write, kill_after_s: float | None) -> tuple[str, float]:
    """Write in a fork; the time runs from the moment that it begins."""
    began, begin = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.write(begin, b"x")
            write()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(begin)
    os.read(began, 1)
    os.close(began)
    start = time.monotonic()
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    seconds = time.monotonic() - start
    if os.WIFSIGNALED(status):
        return _KILLED, seconds
    return (_FAILED if os.WEXITSTATUS(status) else _DONE), seconds
