"""Which machine this is: the board's name, L4T, the power mode."""

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from deploy.board.files import read_text

__all__ = ["PowerMode", "board_model", "is_jetson", "l4t_version", "power_mode"]

_RELEASE = re.compile(r"R(\d+) \(release\), REVISION: (\d+(?:\.\d+)*)")
_MODE = re.compile(r"^<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+)", re.MULTILINE)


@dataclass(frozen=True)
class PowerMode:
    """nvpmodel's mode: clocks and cores that a power budget allows.

    Attributes:
        number: Its ID, which says nothing of its rank: 0 is the lowest but one on Orin Nano.
        name: Such as "MAXN" or "15W"; "" if no configuration names it.
        choices: Every mode's name by its ID.
    """

    number: int
    name: str
    choices: dict[int, str]

    @property
    def unconstrained(self) -> int | None:
        """The ID of the mode without a budget, MAXN or MAXN_SUPER; None if there is none."""
        names = {name: number for number, name in sorted(self.choices.items())}
        return names.get("MAXN_SUPER", names.get("MAXN"))

    def __str__(self) -> str:
        return f"{self.name} (mode {self.number})" if self.name else f"mode {self.number}"


def board_model(root: Path) -> str | None:
    """The name in the device tree, "NVIDIA Jetson Orin Nano Developer Kit"; None on a PC."""
    return read_text(root / "proc/device-tree/model") or read_text(
        root / "sys/firmware/devicetree/base/model"
    )


def l4t_version(root: Path) -> str | None:
    """The version of NVIDIA's Linux for Tegra, "36.4.3"; None where it is not told."""
    found = _RELEASE.search(read_text(root / "etc/nv_tegra_release") or "")
    return f"{found[1]}.{found[2]}" if found else None


def is_jetson(root: Path) -> bool:
    """Whether the device tree, or the release file, is that of a Tegra."""
    parts = read_text(root / "proc/device-tree/compatible") or ""
    named = "Jetson" in (board_model(root) or "") or "nvidia,tegra" in parts
    return named or (root / "etc/nv_tegra_release").exists()


def power_mode(root: Path) -> PowerMode | None:
    """The mode that nvpmodel wrote down, or, on the running system, says; None if it does not."""
    choices = {
        int(number): name
        for number, name in _MODE.findall(read_text(root / "etc/nvpmodel.conf") or "")
    }
    written = re.search(r"pmode:(\d+)", read_text(root / "var/lib/nvpmodel/status") or "")
    if written is not None:
        number = int(written[1])
        return PowerMode(number, choices.get(number, ""), choices)
    return _ask_nvpmodel(choices) if root == Path("/") else None


def _ask_nvpmodel(choices: dict[int, str]) -> PowerMode | None:
    program = shutil.which("nvpmodel")
    if program is None:
        return None
    try:
        answer = subprocess.run([program, "-q"], capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"NV Power Mode:\s*(\S+)\s+(\d+)", answer.stdout)
    return PowerMode(int(found[2]), found[1], choices) if found else None
