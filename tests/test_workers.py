import contextlib
import multiprocessing
import os
import signal
import subprocess
import time

import numpy as np
import pytest
import torch

from deploy.errors import BadInputError
from edgereg.data.workers import in_order
from edgereg.errors import DataError

BAD = BadInputError("a rule", found="7.png", remedy="a remedy")


def slow_first(number):
    """Take longer for early arguments, so that the answers are ready in another order."""
    time.sleep(0.02 if number % 4 == 0 else 0)
    return number, os.getpid()


def fail_at_7(number):
    if number == 7:
        raise BAD
    return number


def assert_gone(pids, within_s=5.0):
    end = time.monotonic() + within_s
    while any(is_alive(pid) for pid in pids) and time.monotonic() < end:
        time.sleep(0.01)
    assert not [pid for pid in pids if is_alive(pid)]
    assert not multiprocessing.active_children()


def is_alive(pid):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_answers_come_in_order(workers):
    answers = list(in_order(slow_first, range(20), workers=workers))
    assert [number for number, _ in answers] == list(range(20))
    pids = {pid for _, pid in answers}
    assert (pids == {os.getpid()}) if workers == 0 else (len(pids - {os.getpid()}) == workers)
    assert_gone(pids - {os.getpid()})


@pytest.mark.parametrize("workers", [0, 2])
def test_arrays_come_back_as_arrays(workers):
    (answer,) = in_order(lambda at: (at, np.full(3, at)), [5], workers=workers)
    assert answer[0] == 5 and isinstance(answer[1], np.ndarray) and answer[1].tolist() == [5] * 3


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "error", [BAD, DataError("r", found="f", remedy="m"), FileNotFoundError(2, "gone", "x.png")]
)
def test_an_error_is_raised_as_it_is_at_the_place_of_its_answer(workers, error):
    def fail(number):
        if number == 3:
            raise error
        return number

    seen = []
    with pytest.raises(type(error)) as caught:
        for number in in_order(fail, range(8), workers=workers):
            seen.append(number)
    assert seen == [0, 1, 2]
    assert str(caught.value) == str(error) and caught.value.args == error.args
    assert not multiprocessing.active_children()


def test_the_workers_stop_while_the_error_is_still_held():
    answers = in_order(fail_at_7, range(20), workers=2)
    try:
        list(answers)
    except BadInputError:
        assert not multiprocessing.active_children()


@pytest.mark.parametrize("leave", ["close", "drop"])
def test_an_abandoned_iterator_stops_its_workers(leave):
    answers = in_order(slow_first, iter(range(10**9)), workers=2)
    pids = {next(answers)[1] for _ in range(8)}
    assert all(map(is_alive, pids))
    if leave == "close":
        answers.close()
    del answers
    assert_gone(pids)


def test_arguments_are_drawn_a_few_ahead_only():
    drawn = []

    def arguments():
        for number in range(1000):
            drawn.append(number)
            yield number

    with contextlib.closing(in_order(slow_first, arguments(), workers=2)) as answers:
        for _ in range(10):
            next(answers)
        assert 10 <= len(drawn) <= 20


@pytest.mark.parametrize("workers", [0, 2])
def test_the_global_random_state_is_left_alone(workers):
    torch.manual_seed(3)
    np.random.seed(3)
    before, before_numpy = torch.get_rng_state(), np.random.get_state()[1].copy()
    list(in_order(slow_first, range(8), workers=workers))
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], before_numpy)


def test_workers_survive_a_sigterm_to_all_processes_and_heed_their_parents():
    with contextlib.closing(in_order(slow_first, range(10**6), workers=1)) as answers:
        pid = next(answers)[1]
        subprocess.run(["sh", "-c", f"kill -TERM {pid}"], check=True)
        answered = [next(answers) for _ in range(40)]
        assert {other for _, other in answered} == {pid}
    child = multiprocessing.get_context("fork").Process(target=_term_own_worker)
    child.start()
    child.join(20)
    assert child.exitcode == 0


def _term_own_worker():
    """Exit with 0 if the worker ends on its parent's SIGTERM."""
    answers = in_order(slow_first, range(10**6), workers=1)
    pid = next(answers)[1]
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's would raise here
    os.kill(pid, signal.SIGTERM)
    os.waitpid(pid, 0)
    os._exit(0)
