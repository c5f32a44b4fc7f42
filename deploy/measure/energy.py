"""The energy of one image: power over time, with what the board takes anyway taken off.

    joules = (integral of P dt - P_idle T) / images,    P by the trapezoid rule between readings

The rail of the whole board is taken: what a battery gives, not what one chip of it takes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from deploy.board.state import BoardState

__all__ = ["Energy", "measure_energy"]


@dataclass(frozen=True)
class Energy:
    """Power in mW, energy in J.

    Attributes:
        idle_mw: Mean power with the model loaded and nothing running.
        run_mw: Mean power in the timed run.
        joules_per_image: The difference, for one image.
        readings: How many of the run the mean is made of.
    """

    idle_mw: float
    run_mw: float
    joules_per_image: float
    readings: int

    def __str__(self) -> str:
        return (
            f"{1e3 * self.joules_per_image:.3f} mJ per image: {self.run_mw / 1e3:.2f} W, "
            f"less {self.idle_mw / 1e3:.2f} W when idle, {self.readings} readings"
        )


def measure_energy(
    idle: Sequence[BoardState], run: Sequence[BoardState], *, images: int
) -> Energy | None:
    """Compare a run with idleness; None unless both have power at two moments or more."""
    idle_power = [(s.time_s, s.power_mw) for s in idle if s.power_mw is not None]
    run_power = [(s.time_s, s.power_mw) for s in run if s.power_mw is not None]
    if len(idle_power) < 2 or len(run_power) < 2:
        return None
    idle_mw, _ = _mean(idle_power)
    run_mw, seconds = _mean(run_power)
    joules = (run_mw - idle_mw) / 1e3 * seconds
    return Energy(idle_mw, run_mw, joules / images, len(run_power))


def _mean(power: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The mean over time, and the time."""
    area = sum((t1 - t0) * (p0 + p1) / 2 for (t0, p0), (t1, p1) in pairwise(power))
    seconds = power[-1][0] - power[0][0]
    return area / seconds, seconds
