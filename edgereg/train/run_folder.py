"""OUT.run, beside the checkpoint OUT: the log of a run, and the state from which it goes on.

    OUT.run/
      run.json          what the run depends on: verb, recipe, data; a resume must be of the same
      log.jsonl         see log.py
      last-good/        a checkpoint, where a run was given up
      state-00001200/   all that changes from step to step, after step 1200; safetensors and JSON

A state appears whole or not at all, and the older one goes only when the newer one is on the
disk, so that a kill at any moment leaves a state to go on from. A lock keeps a second process
out.
"""

import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from deploy.publish import publish_directory, publish_text
from edgereg.errors import CheckpointError, EdgeregError

__all__ = ["RunFolder", "State", "open_run_folder", "run_folder_of"]

FORMAT_VERSION = 1
_LOCK, _RUN, _LOG = "lock", "run.json", "log.jsonl"
_STATE = "state-"
_MEMBERS = ("state.safetensors", "state.json")


@dataclass(frozen=True)
class State:
    """All of a run that changes from step to step.

    Args:
        tensors: Weights, buffers, the optimizer's moments, averages.
        facts: Counters and histories, as JSON values; floats keep every bit.
    """

    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]


class RunFolder:
    """The folder of one run, while this process holds its lock.

    Args:
        path: The folder, which exists.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.log = path / _LOG
        self.last_good = path / "last-good"
        self.colours = path / "colours.png"  # for the report

    def write(self, step: int, state: State) -> None:
        """Write the state after `step` steps, then remove the older ones."""
        destination = self.path / f"{_STATE}{step:08}"
        if destination.exists():
            return  # the state after a step is always the same
        weights = save_tensors(
            {
                name: tensor.detach().cpu().contiguous().clone()
                for name, tensor in state.tensors.items()
            }
        )
        described = {"sha256": hashlib.sha256(weights).hexdigest(), "facts": dict(state.facts)}
        older = self._states()
        with publish_directory(destination, members=_MEMBERS) as staging:
            (staging / _MEMBERS[0]).write_bytes(weights)
            (staging / _MEMBERS[1]).write_text(json.dumps(described))
        for path in older:
            shutil.rmtree(path)

    def latest(self) -> State | None:
        """Return the newest state, or None where there is none yet.

        Raises:
            CheckpointError: It is damaged.
        """
        if not (states := self._states()):
            return None
        try:
            described = json.loads((states[-1] / _MEMBERS[1]).read_text())
            data = (states[-1] / _MEMBERS[0]).read_bytes()
            if hashlib.sha256(data).hexdigest() != described["sha256"]:
                raise ValueError("another SHA-256 than was written")
            return State(load_tensors(data), described["facts"])
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise CheckpointError(
                "a run goes on from the state that it wrote",
                found=f"'{states[-1]}': {error}",
                remedy="start anew with --force",
            ) from error

    def clear(self) -> None:
        """Remove the states: the run is finished. The log stays."""
        for path in self._states():
            shutil.rmtree(path)

    def _states(self) -> list[Path]:
        return sorted(self.path.glob(f"{_STATE}*"))


def run_folder_of(out: Path) -> Path:
    """Return the run folder of a checkpoint."""
    return out.absolute().with_name(out.absolute().name + ".run")


@contextmanager
def open_run_folder(
    out: Path, identity: Mapping[str, Any], *, resume: bool, force: bool
) -> Iterator[RunFolder]:
    """Open the run folder of a checkpoint that is to be written, and lock it.

    Args:
        out: The checkpoint.
        identity: What the run depends on, as JSON values.
        resume: Whether to go on from a state, if there is one.
        force: Whether a state may be thrown away.

    Raises:
        CheckpointError: There is a state and neither `resume` nor `force`, or it is of another run.
        EdgeregError: Another process is training here.
    """
    path = run_folder_of(out)
    path.mkdir(parents=True, exist_ok=True)
    with (path / _LOCK).open("w") as lock:
        try:
            # a record lock: unlike flock's it is not inherited by workers that outlive a kill
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise EdgeregError(
                "one process trains a checkpoint at a time",
                found=f"another one holds '{path / _LOCK}'",
                remedy="wait for it, or name another --out",
            ) from error
        folder = RunFolder(path)
        for leftover in path.glob(".staging-*"):  # of a process that was killed while it wrote
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        _settle(folder, identity, resume=resume, force=force)
        yield folder


def _settle(folder: RunFolder, identity: Mapping[str, Any], *, resume: bool, force: bool) -> None:
    """Decide whether to go on or to start anew, and note down what the run depends on."""
    described = {"format_version": FORMAT_VERSION, **identity}
    if folder.latest() is not None:
        if resume:
            _check_same(folder.path / _RUN, described)
            return
        if not force:
            raise CheckpointError(
                "a run that was stopped goes on, or is thrown away on purpose",
                found=f"'{folder.path}' holds a state",
                remedy="add --resume to go on, or --force to start anew",
            )
        folder.clear()
    folder.log.unlink(missing_ok=True)
    publish_text(folder.path / _RUN, json.dumps(described, indent=1, sort_keys=True) + "\n")


def _check_same(path: Path, described: Mapping[str, Any]) -> None:
    try:
        before = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            "a run folder says what its run depends on",
            found=f"'{path}': {error}",
            remedy="start anew with --force",
        ) from error
    now = json.loads(json.dumps(described))
    if different := sorted(_differences(before, now)):
        raise CheckpointError(
            "a run goes on with the same recipe and data",
            found=f"'{path.parent}' was started with another {different[0]}",
            remedy="give the same recipe and data, or start anew with --force",
        )


def _differences(before: Any, now: Any, prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys in which two JSON mappings differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in {*before, *now}:
            yield from _differences(before.get(key), now.get(key), f"{prefix}.{key}".lstrip("."))
    elif before != now:
        yield prefix
