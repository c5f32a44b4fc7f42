"""What benchmarks/start.py measures and judges, on processes that take nothing."""

import dataclasses
import os
import resource
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

import start

ANSWER = "print('{0}', flush=True)"
SLOW = "import time; time.sleep(0.3); print('a.jpg  {0}   99.0%', flush=True)"
LARGE = "x = b'1' * {1}; print('a.jpg  {0}   99.0%', flush=True)"


def measure(bare, ours):
    commands = ([sys.executable, "-S", "-c", code] for code in (bare, ours))
    return start.measure("x", tuple(commands), dict(os.environ), rounds=3, wanted=(1.5, 30.0))


def test_a_slow_start_and_a_large_one_are_told_apart_from_a_good_one():
    slow = measure(ANSWER.format("cat"), SLOW.format("cat"))
    # a child is counted with at least the memory of what started it
    here = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    large = measure(ANSWER.format("cat"), LARGE.format("cat", here + (60 << 20)))
    assert slow.row.ratio > 2 and not slow.passed and abs(slow.added_megabytes) < 30
    assert large.added_megabytes > 40 and not large.passed
    assert dataclasses.replace(large, most_megabytes=100.0, row=passing(large.row)).passed


def passing(row):
    return dataclasses.replace(row, ratio=1.0)


def test_another_answer_is_an_error():
    with pytest.raises(SystemExit, match="the script says cat, edgereg"):
        measure(ANSWER.format("cat"), ANSWER.format("a.jpg  dog   99.0%"))


def test_a_process_that_fails_or_says_nothing_is_an_error():
    for code in ("raise SystemExit(3)", "pass"):
        with pytest.raises(SystemExit, match="ended with"):
            start.start([sys.executable, "-S", "-c", code], dict(os.environ))
