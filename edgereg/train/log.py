"""The log of a run: one JSON object a line, and TensorBoard's files where it is installed.

    {"event": "start", "time_s": 0.0, "cpu_s": 0.0, "tensorboard": false, ...}
    {"event": "step", "time_s": 1.2, "cpu_s": 2.3, "step": 17, "epoch": 0, "loss": 1.9, "lr": 0.003}
    {"event": "epoch", ...}   what the epoch came to
    {"event": "skip", ...}    a step that was skipped because something was no number
    {"event": "resume", ...}  another process goes on; what came after its state is cut off

cpu_s is the processor's time, of all threads of this process; what other jobs take from it is not
in it. A value that is no finite number is null, and its name is listed under "nonfinite".
"""

import json
import math
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Any

__all__ = ["RunLog"]


class RunLog:
    """Writes events.

    Args:
        path: The file; TensorBoard's files lie in `tensorboard/` beside it.
        resume_at: Bytes to keep of what an earlier process wrote; None starts anew.
    """

    def __init__(self, path: Path, *, resume_at: int | None = None) -> None:
        self._file = path.open("a" if resume_at is not None else "w", encoding="utf-8")
        if resume_at is not None:
            os.truncate(path, resume_at)
        self._started, self._cpu_started = time.monotonic(), time.process_time()
        self._board = _tensorboard(path.parent / "tensorboard")

    def write(self, event: str, **values: Any) -> None:
        """Write an event with its values, which are JSON values."""
        line: dict[str, Any] = {
            "event": event,
            "time_s": round(time.monotonic() - self._started, 3),
            "cpu_s": round(time.process_time() - self._cpu_started, 3),
        }
        if event in ("start", "resume"):
            line["tensorboard"] = self._board is not None
        line |= values
        if nonfinite := [
            k for k, v in line.items() if isinstance(v, float) and not math.isfinite(v)
        ]:
            line |= dict.fromkeys(nonfinite) | {"nonfinite": nonfinite}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        if event != "step":
            self._file.flush()
        if self._board is not None:
            for name in ("loss", "lr", "top1"):
                if isinstance(values.get(name), float):
                    self._board.add_scalar(f"{event}/{name}", values[name], values["step"])

    def offset(self) -> int:
        """Return the number of bytes written so far, all of them handed to the system."""
        self._file.flush()
        return os.fstat(self._file.fileno()).st_size

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the files."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def _tensorboard(path: Path) -> Any | None:
    """Return TensorBoard's writer, or None where it is not installed; the log's first line says."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError:
        return None
    return SummaryWriter(str(path))
