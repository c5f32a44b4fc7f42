"""What changes from day to day: power mode, clocks, heat, throttling, memory, disk."""

import re
import time
from collections.abc import Iterator

from deploy.board.clocks import Clock
from deploy.board.files import read_text
from deploy.board.identity import power_mode
from deploy.board.power import EVENT_MEANINGS
from deploy.board.state import read_state
from deploy.doctor.machine import Finding, Machine

__all__ = ["check_clocks", "check_disk", "check_memory", "check_power_mode", "check_sensors"]

_HOT_C = 85.0  # Orin and Thor slow down from 99 on; a run adds some 10 degrees
_CAPPED, _LYING = 0.98, 0.8
_LOOKS, _LOOK_AGAIN_S = 3, 0.05
_MIB = 1 << 20
_LEAST_MEMORY, _LEAST_DISK = 512 * _MIB, 100 * _MIB  # below, not even a small model runs
_SCARCE_MEMORY, _SCARCE_DISK = 1536 * _MIB, 1024 * _MIB
_SMALL_BOARD = 9 * 1024 * _MIB  # "8 GB" boards


def check_power_mode(machine: Machine) -> Iterator[Finding]:
    """Whether the board may use all that it has."""
    if not machine.is_jetson:
        return
    mode = power_mode(machine.root)
    if mode is None:
        yield Finding(
            "power mode",
            "not told: no /var/lib/nvpmodel/status",
            "warning",
            "mount /var/lib/nvpmodel and /etc/nvpmodel.conf into the container"
            if machine.container
            else "sudo nvpmodel -q; then note it beside every figure",
        )
    elif mode.unconstrained not in (None, mode.number):
        best = mode.unconstrained
        yield Finding(
            "power mode",
            f"{mode} of {', '.join(mode.choices.values())}",
            "warning",
            f"if this budget is not meant: sudo nvpmodel -m {best} ({mode.choices[best or 0]})",
        )
    else:
        yield Finding("power mode", str(mode))


def check_clocks(machine: Machine) -> Iterator[Finding]:
    """Whether a clock is held below what the hardware has, or is not what it claims to be."""
    clocks = read_state(machine.root, time_s=0.0).clocks
    if not clocks:
        return
    capped = [clock for clock in clocks if _is_capped(clock)]
    lying = _lying_clocks(machine, clocks)
    if machine.is_jetson and capped:
        yield Finding(
            "clocks",
            f"held down: {', '.join(map(_shown_cap, capped))}",
            "warning",
            "the power mode or heat holds them: see those; else `sudo jetson_clocks --show`",
        )
    if machine.is_jetson and lying:
        shown = (
            f"{c.name} {c.current_hz / 1e6:.0f} MHz, said {c.requested_hz / 1e6:.0f}" for c in lying
        )
        yield Finding(
            "clocks",
            f"slower than the governor says: {', '.join(shown)}",
            "warning",
            "reboot, and look at the power supply: this follows over-current events",
        )
    if not machine.is_jetson or (not capped and not lying):
        shown = (
            f"{c.name} {c.current_hz / 1e6:.0f} of {(c.limit_hz or 0) / 1e6:.0f} MHz"
            for c in (*clocks[:1], *(c for c in clocks[1:] if c.is_gpu))
        )
        yield Finding("clocks", ", ".join(shown))


def check_sensors(machine: Machine) -> Iterator[Finding]:
    """Heat, throttle events, power; and whether a run could be watched at all."""
    state = read_state(machine.root, time_s=0.0)
    if state.hottest is not None:
        name, celsius = state.hottest
        is_hot = celsius >= _HOT_C
        yield Finding(
            "temperature",
            f"{celsius:.1f} degrees C ({name})",
            "warning" if is_hot else "ok",
            "let it cool, and check fan and heat sink" if is_hot else "",
        )
    happened = {name: count for name, count in state.events.items() if count > 0}
    if happened:
        shown = (
            f"{name} {count} ({EVENT_MEANINGS.get(name, 'throttled')})"
            for name, count in happened.items()
        )
        yield Finding(
            "throttle events",
            f"since the start: {', '.join(shown)}",
            "warning",
            "use a supply that the board's guide names, or a lower power mode; then reboot",
        )
    elif state.events:
        yield Finding("throttle events", "none since the start")
    if state.power_mw is not None:
        yield Finding("power", f"{state.power_mw / 1e3:.2f} W now")
    if not machine.is_jetson:
        return
    kinds = ("clocks", "temperatures", "throttle events", "power")
    blind = [kind for kind in kinds if kind not in state.watched]
    if blind:
        yield Finding(
            "sensors",
            f"cannot be read: {', '.join(blind)}",
            "warning",
            "check the permissions of /sys (in a container, mount it with -v /sys:/sys:ro); "
            "without them `edgereg bench` cannot tell a throttled run",
        )


def check_memory(machine: Machine) -> Iterator[Finding]:
    """Whether a model, and the build of an engine, would fit."""
    pairs = re.findall(r"(\w+):\s+(\d+) kB", read_text(machine.root / "proc/meminfo") or "")
    size = {name: int(kib) << 10 for name, kib in pairs}
    if not {"MemTotal", "MemAvailable"} <= size.keys():
        remedy = "record the tree with `edgereg doctor --record DIR`"
        yield Finding("memory", "/proc/meminfo does not say", "warning", remedy)
        return
    free, swap = size["MemAvailable"], size.get("SwapTotal", 0)
    found = (
        f"{free / _MIB:,.0f} of {size['MemTotal'] / _MIB:,.0f} MiB available, "
        f"{swap / _MIB:,.0f} MiB of swap"
    )
    add_swap = "add swap: sudo fallocate -l 8G /swap && sudo mkswap /swap && sudo swapon /swap"
    if free < _LEAST_MEMORY:
        yield Finding("memory", found, "error", "stop other programs, the desktop among them")
    elif machine.is_jetson and swap == 0 and size["MemTotal"] < _SMALL_BOARD:
        found = f"{found}: the build of an engine may be killed"
        yield Finding("memory", found, "warning", add_swap)
    elif free + swap < _SCARCE_MEMORY:
        yield Finding("memory", found, "warning", "stop other programs, or add swap")
    else:
        yield Finding("memory", found)


def check_disk(machine: Machine) -> Iterator[Finding]:
    """Whether bundles and engines can be written."""
    for disk in machine.probe.disks if machine.probe is not None else ():
        found = f"{disk.free_bytes / _MIB:,.0f} MiB free ({disk.purpose})"
        remedy = "delete what is not needed; an engine is as large as its model, or larger"
        if disk.free_bytes < _SCARCE_DISK:
            is_full = disk.free_bytes < _LEAST_DISK
            yield Finding("disk", found, "error" if is_full else "warning", remedy)
        else:
            yield Finding("disk", found)


def _lying_clocks(machine: Machine, clocks: tuple[Clock, ...]) -> list[Clock]:
    """Those that stay slower than was asked for: for a moment, any clock is while it changes."""
    lying = [clock for clock in clocks if clock.current_hz < _LYING * clock.requested_hz]
    for _ in range(_LOOKS - 1):
        if lying:
            time.sleep(_LOOK_AGAIN_S)
            later = {c.name: c for c in read_state(machine.root, time_s=0.0).clocks}
            again = (later.get(clock.name, clock) for clock in lying)
            lying = [clock for clock in again if clock.current_hz < _LYING * clock.requested_hz]
    return lying


def _is_capped(clock: Clock) -> bool:
    known = clock.limit_hz is not None and clock.max_hz is not None
    return known and (clock.limit_hz or 0) < _CAPPED * (clock.max_hz or 0)


def _shown_cap(clock: Clock) -> str:
    limit, best = (clock.limit_hz or 0) / 1e6, (clock.max_hz or 0) / 1e6
    return f"{clock.name} at {limit:.0f} of {best:.0f} MHz"
