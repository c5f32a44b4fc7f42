"""What an engine depends on: it may be used only where all of this is as it was at its build."""

import dataclasses
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

__all__ = ["PLACE", "EngineKey", "changed_fields", "jetpack_release"]

PLACE = ("onnx_sha256", "tensorrt", "gpu", "sm", "jetpack", "precision")
"""The fields that say for what and where an engine was built; the others say how."""


@dataclass(frozen=True)
class EngineKey:
    """All that an engine depends on.

    Attributes:
        onnx_sha256: Of the variant's ONNX file.
        tensorrt: TensorRT's version.
        gpu: The GPU's name.
        sm: Its compute capability: "8.7".
        jetpack: The release of Jetson Linux, "R36.4.3", or "none".
        precision: The bundle's variant.
        profile: The smallest, the usual and the largest batch.
        flags: The builder's flags and other choices, sorted.
    """

    onnx_sha256: str
    tensorrt: str
    gpu: str
    sm: str
    jetpack: str
    precision: str
    profile: tuple[int, int, int]
    flags: tuple[str, ...]


def changed_fields(
    built: EngineKey, wanted: EngineKey, *, fields: Iterable[str] | None = None
) -> tuple[str, ...]:
    """Return a phrase for each field that differs: "tensorrt: built with 10.3.0, here 10.13.3".

    Args:
        built: The key of an engine.
        wanted: The key that it would need.
        fields: Compare only these.
    """
    names = [field.name for field in dataclasses.fields(EngineKey)] if fields is None else fields
    pairs = ((name, getattr(built, name), getattr(wanted, name)) for name in names)
    return tuple(
        f"{name}: built with {_shown(old)}, here {_shown(new)}"
        for name, old, new in pairs
        if old != new
    )


def jetpack_release(root: Path = Path("/")) -> str:
    """Return the release of Jetson Linux, "R36.4.3", or "none" where there is none.

    Source: /etc/nv_tegra_release, whose first line is "# R36 (release), REVISION: 4.3, ...".
    """
    try:
        text = (root / "etc/nv_tegra_release").read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return "none"
    found = re.match(r"# (R\d+) \(release\), REVISION: ([\d.]+)", text)
    # An unknown form is no reason to stop, and still another release if it changes.
    return f"{found[1]}.{found[2]}" if found else text.strip()[:80]


def _shown(value: object) -> str:
    return (", ".join(map(str, value)) or "none") if isinstance(value, tuple) else str(value)
