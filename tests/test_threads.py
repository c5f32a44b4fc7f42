import threading

import pytest

from deploy.threads import beside


def test_a_call_runs_beside_the_block_and_leaves_its_result():
    called, answered = threading.Event(), threading.Event()

    def call():
        called.set()
        assert answered.wait(10)
        return threading.current_thread()

    with beside(call) as results:
        assert called.wait(10)  # the call runs already
        assert results == []
        answered.set()
    assert results[0] is not threading.current_thread() and not results[0].is_alive()


def test_the_error_of_the_call_is_raised_at_the_end_of_the_block():
    went_on = []
    with pytest.raises(ValueError, match="of the call"), beside(lambda: int("of the call")):
        went_on.append(1)
    assert went_on == [1]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_the_blocks_own_error_goes_first_and_the_call_has_ended(error):
    thread = []

    def call():
        thread.append(threading.current_thread())
        raise OSError

    with pytest.raises(error), beside(call):
        raise error
    assert not thread[0].is_alive()
