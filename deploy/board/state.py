"""Everything that moves while a board works, read at one moment."""

from dataclasses import dataclass
from pathlib import Path

from deploy.board.clocks import Clock, read_clocks
from deploy.board.files import natural_order, read_int, read_text
from deploy.board.power import Rail, read_rails, throttle_events, total_power_mw

__all__ = ["BoardState", "read_state", "temperatures"]


@dataclass(frozen=True)
class BoardState:
    """The board at one moment.

    Attributes:
        time_s: When, on the clock of time.perf_counter.
        temperatures_c: By the thermal zone's name, in degrees Celsius.
        clocks: Of CPU and GPU.
        rails: Power by rail.
        events: Throttle events since the start, by counter.
    """

    time_s: float
    temperatures_c: dict[str, float]
    clocks: tuple[Clock, ...]
    rails: tuple[Rail, ...]
    events: dict[str, int]

    @property
    def watched(self) -> tuple[str, ...]:
        """What could be read."""
        kinds = {
            "clocks": self.clocks,
            "temperatures": self.temperatures_c,
            "throttle events": self.events,
            "power": self.rails,
        }
        return tuple(kind for kind, values in kinds.items() if values)

    @property
    def power_mw(self) -> float | None:
        """The whole board's power, if it is measured."""
        return total_power_mw(self.rails)

    @property
    def hottest(self) -> tuple[str, float] | None:
        """The zone with the highest temperature, and this."""
        return max(self.temperatures_c.items(), key=lambda zone: zone[1], default=None)


def read_state(root: Path, *, time_s: float) -> BoardState:
    """Read all that can be read now."""
    return BoardState(
        time_s=time_s,
        temperatures_c=temperatures(root),
        clocks=read_clocks(root),
        rails=read_rails(root),
        events=throttle_events(root),
    )


def temperatures(root: Path) -> dict[str, float]:
    """Degrees Celsius of each thermal zone that answers; one that is switched off does not."""
    zones: dict[str, float] = {}
    for folder in sorted(root.glob("sys/class/thermal/thermal_zone*"), key=natural_order):
        millidegrees, kind = read_int(folder / "temp"), read_text(folder / "type")
        if millidegrees is None or not -40_000 <= millidegrees <= 150_000:
            continue  # an off zone of older kernels says -256 degrees
        name = kind or folder.name
        zones[f"{name} ({folder.name})" if name in zones else name] = millidegrees / 1e3
    return zones
