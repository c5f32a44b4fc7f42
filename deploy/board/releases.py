"""What each JetPack brings: one row a release, found by the version of L4T.

Sources: NVIDIA's JetPack archive and the recipes of OE4T/meta-tegra. None of these was run here.
"""

from dataclasses import dataclass

__all__ = ["RELEASES", "JetPack", "find_release", "is_version_of"]


@dataclass(frozen=True)
class JetPack:
    """One release.

    Attributes:
        name: "6.2".
        l4t: The versions of L4T, or their beginnings: "36.4" is every 36.4.x.
        python: Of the system, for which TensorRT's bindings are built.
        cuda: Its version.
        tensorrt: Its versions: 7.2.2 and later exchanged TensorRT, within the same L4T 39.2.
        is_supported: Whether edgereg can run on it.
    """

    name: str
    l4t: tuple[str, ...]
    python: str
    cuda: str
    tensorrt: tuple[str, ...]
    is_supported: bool = True


RELEASES = (
    JetPack("5", ("34", "35"), "3.8", "11.4", ("8.5.2",), is_supported=False),
    JetPack("6.0", ("36.2", "36.3"), "3.10", "12.2", ("8.6.2",)),
    JetPack("6.1", ("36.4.0",), "3.10", "12.6", ("10.3.0",)),
    JetPack("6.2", ("36.4", "36.5"), "3.10", "12.6", ("10.3.0",)),
    JetPack("7.0", ("38.2",), "3.12", "13.0", ("10.13.3",)),
    JetPack("7.1", ("38.4",), "3.12", "13.0", ("10.13.3",)),
    JetPack("7.2", ("39.2",), "3.12", "13.2", ("10.16.2", "11.4.1")),
)


def find_release(l4t: str) -> JetPack | None:
    """The first release of RELEASES that has this L4T, such as "36.4.3"; None if none has."""
    for release in RELEASES:
        if any(is_version_of(l4t, prefix) for prefix in release.l4t):
            return release
    return None


def is_version_of(version: str, prefix: str) -> bool:
    """Whether "10.3.0.30" is of "10.3.0", as "10.30.0" is not of "10.3"."""
    return version.split(".")[: prefix.count(".") + 1] == prefix.split(".")
