"""The clocks of CPU cores and GPU: what they are, what they may be, what they could be."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from deploy.board.files import natural_order, read_int, read_text

__all__ = ["Clock", "read_clocks"]

_GPUS = ("*.gpu", "*.ga10b", "*.gv11b", "gpu-gpc-*")  # Orin, its older name, Xavier, Thor


@dataclass(frozen=True)
class Clock:
    """One clock, in Hz.

    Attributes:
        name: "cpu0", or the GPU's name in devfreq.
        is_gpu: Or a CPU core's.
        current_hz: What the hardware says.
        requested_hz: What the governor asked for. After an over-current event on Thor the two
            differed: the second is then a wish.
        limit_hz: The highest that is allowed now: by the power mode, the user, or for heat.
        max_hz: The highest that the hardware has.
        load: Share of the time in which the unit was busy, in [0, 1]; None if it is not told.
    """

    name: str
    is_gpu: bool
    current_hz: int
    requested_hz: int
    limit_hz: int | None
    max_hz: int | None
    load: float | None = None


def read_clocks(root: Path) -> tuple[Clock, ...]:
    """Every clock that can be read; empty in most virtual machines."""
    return (*_cpu(root), *_gpu(root))


def _cpu(root: Path) -> Iterator[Clock]:
    pattern = "sys/devices/system/cpu/cpu[0-9]*/cpufreq"
    for folder in sorted(root.glob(pattern), key=natural_order):
        requested = _from_khz(folder / "scaling_cur_freq")
        if requested is None:
            continue
        current = _from_khz(folder / "cpuinfo_cur_freq")  # on many systems for root only
        yield Clock(
            name=folder.parent.name,
            is_gpu=False,
            current_hz=requested if current is None else current,
            requested_hz=requested,
            limit_hz=_from_khz(folder / "scaling_max_freq"),
            max_hz=_from_khz(folder / "cpuinfo_max_freq"),
        )


def _gpu(root: Path) -> Iterator[Clock]:
    folders = {f for name in _GPUS for f in root.glob(f"sys/class/devfreq/{name}")}
    for folder in sorted(folders, key=natural_order):
        current = read_int(folder / "cur_freq")
        if current is None:
            continue
        steps = (read_text(folder / "available_frequencies") or "").split()
        per_mille = read_int(folder / "device/load")
        yield Clock(
            name=folder.name,
            is_gpu=True,
            current_hz=current,
            requested_hz=current,
            limit_hz=read_int(folder / "max_freq"),
            max_hz=max((int(step) for step in steps if step.isdecimal()), default=None),
            load=None if per_mille is None else per_mille / 1e3,
        )


def _from_khz(path: Path) -> int | None:
    khz = read_int(path)
    return None if khz is None else khz * 1000
