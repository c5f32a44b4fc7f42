"""Power rails and throttle events.

The INA3221 measures voltage and current of three rails, the INA238 of Thor those of the input. NVML
knows nothing of either on a Tegra.

Sources: NVIDIA's Jetson Linux Developer Guide, "Platform Power and Performance"; for Thor's INA238
rbonghi/jetson_stats pull request 900; for AGX Orin's rails energymon's list of what adds up.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from deploy.board.files import natural_order, read_int, read_text

__all__ = ["EVENT_MEANINGS", "Rail", "read_rails", "throttle_events", "total_power_mw"]

EVENT_MEANINGS = {
    "oc1": "the supply's voltage fell",
    "oc2": "the average current was too high",
    "oc3": "the momentary current was too high",
}
"""What makes the hardware slow down at once, by the name of its counter on Orin and Thor."""

_TOTALS = ("VDD_IN", "POM_5V_IN", "VIN")
_CHANNELS = ("1", "2", "3")
_WITHIN_ANOTHER = ("VDDQ_VDD2_1V8AO",)  # AGX Orin's is fed by its VIN_SYS_5V0


@dataclass(frozen=True)
class Rail:
    """One measured supply; power in mW."""

    name: str
    power_mw: float


def read_rails(root: Path) -> tuple[Rail, ...]:
    """Every rail that answers; empty where there is no power monitor."""
    return (*_ina3221(root), *_ina238(root))


def total_power_mw(rails: Sequence[Rail]) -> float | None:
    """The whole board's power: the rail that feeds it, else the sum; None without rails."""
    for rail in rails:
        if rail.name in _TOTALS or "SYSTEM" in rail.name.upper():
            return rail.power_mw
    apart = [rail.power_mw for rail in rails if rail.name not in _WITHIN_ANOTHER]
    return sum(apart) if apart else None


def throttle_events(root: Path) -> dict[str, int]:
    """How often since the start each over-current alarm throttled: {"oc1": 0, ...}.

    A counter's key has its monitor's folder before it if another monitor has one of this name.
    """
    events: dict[str, int] = {}
    pattern = "sys/class/hwmon/hwmon*/oc[0-9]*_event_cnt"
    for path in sorted(root.glob(pattern), key=natural_order):
        count, name = read_int(path), path.name.partition("_")[0]
        if count is not None:
            events[f"{path.parent.name}/{name}" if name in events else name] = count
    return events


def _ina3221(root: Path) -> Iterator[Rail]:
    for driver in ("ina3221", "ina3221x"):
        pattern = f"sys/bus/i2c/drivers/{driver}/*/hwmon/hwmon*/in[0-9]*_label"
        for label in sorted(root.glob(pattern), key=natural_order):
            name = read_text(label) or ""
            channel = label.name.removeprefix("in").removesuffix("_label")
            voltage_mv = read_int(label.with_name(f"in{channel}_input"))
            current_ma = read_int(label.with_name(f"curr{channel}_input"))
            if (
                channel not in _CHANNELS
                or name in ("", "NC")
                or voltage_mv is None
                or current_ma is None
            ):
                continue  # channel 7 is the sum of the shunts; NC is not connected
            yield Rail(name, voltage_mv * current_ma / 1e3)


def _ina238(root: Path) -> Iterator[Rail]:
    for path in sorted(root.glob("sys/bus/i2c/drivers/ina238/*/hwmon/hwmon*/power1_input")):
        power_uw = read_int(path)
        if power_uw is not None:
            yield Rail("VIN", power_uw / 1e3)
