"""A function over many arguments, in worker processes, with the answers in order.

The processes are torch's DataLoader's, which end by themselves when their parent is killed. Three
things are added: an error reaches the caller as the error that it is, the caller's random state is
left alone, and a SIGTERM sent to all processes of a job, as a cluster's scheduler does, does not
take the workers from under a run that is about to write its state.
"""

import os
import signal
import threading
import warnings
from collections.abc import Callable, Generator, Iterable
from typing import Any, Generic, TypeVar

from deploy.errors import ExplainedError

__all__ = ["in_order"]

_Argument = TypeVar("_Argument")
_Answer = TypeVar("_Answer")


def in_order(
    function: Callable[[_Argument], _Answer], arguments: Iterable[_Argument], *, workers: int
) -> Generator[_Answer, None, None]:
    """Yield function(argument) for each argument.

    The workers stop when the generator is exhausted, closed or dropped, or raises.

    Args:
        function: Not pickled: the workers are forked. It should start no thread and touch no GPU.
        arguments: Drawn in this process, a few ahead of the answers.
        workers: Processes; 0 computes each answer here, when it is asked for.

    Raises:
        ExplainedError, OSError: What the function raised, at the place of its answer.
    """
    if workers == 0:
        for argument in arguments:
            yield function(argument)
        return
    answers = _start(_Work(function), arguments, workers)
    try:
        for answer in answers:
            if isinstance(answer, _Failure):
                raise answer.error
            yield answer
    finally:
        del answers  # or the traceback of an error would hold on to it, and it to the workers


class _Failure:
    """An error on its way out of a worker; DataLoader would raise it anew, from its text alone."""

    def __init__(self, error: Exception) -> None:
        self.error = error


class _Work(Generic[_Argument, _Answer]):
    """The function, as what DataLoader takes for a data set."""

    def __init__(self, function: Callable[[_Argument], _Answer]) -> None:
        self._function = function

    def __getitem__(self, argument: _Argument) -> _Answer | _Failure:
        try:
            return self._function(argument)
        except (ExplainedError, OSError) as error:
            return _Failure(error)


def _start(work: Any, arguments: Iterable[Any], workers: int) -> Any:
    import torch
    from torch.utils.data import DataLoader

    with warnings.catch_warnings():
        # Of more workers than cores, which the user asked for; and, from Python 3.12 on, of a fork
        # beside other threads: a worker takes no lock that such a thread could hold.
        warnings.simplefilter("ignore")
        return iter(
            DataLoader(
                work,
                batch_size=None,
                sampler=arguments,
                num_workers=workers,
                multiprocessing_context="fork",
                # numpy arrays, as they are: tensors would go through /dev/shm, which in a
                # container has often no room for a few batches
                collate_fn=_as_it_is,
                worker_init_fn=_heed_the_parent,
                generator=torch.Generator(),  # else a seed is drawn from the global one
            )
        )


def _as_it_is(answer: Any) -> Any:
    return answer


def _heed_the_parent(worker: int) -> None:
    """End this process on SIGTERM if its parent sent it, and on nobody else's."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        parent = os.getppid()
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
