"""Go through every check, on the running machine or on a recorded tree."""

from collections.abc import Callable, Iterable
from pathlib import Path

from deploy import strict_json
from deploy.doctor.machine import Finding, Machine, Probe
from deploy.doctor.platform_checks import check_board, check_container, check_python
from deploy.doctor.probe import probe_here
from deploy.doctor.record import PROBE_NAME
from deploy.doctor.software_checks import (
    check_cuda,
    check_numpy,
    check_onnxruntime,
    check_pillow,
    check_tensorrt,
)
from deploy.doctor.state_checks import (
    check_clocks,
    check_disk,
    check_memory,
    check_power_mode,
    check_sensors,
)
from deploy.errors import BadInputError

__all__ = ["CHECKS", "diagnose", "examine"]

CHECKS: tuple[Callable[[Machine], Iterable[Finding]], ...] = (
    check_board,
    check_container,
    check_python,
    check_tensorrt,
    check_cuda,
    check_onnxruntime,
    check_numpy,
    check_pillow,
    check_power_mode,
    check_clocks,
    check_sensors,
    check_memory,
    check_disk,
)


def examine(root: Path = Path("/")) -> Machine:
    """Take the running machine, which is probed, or a recorded tree.

    Raises:
        BadInputError: The tree is no directory, or its probe is not one.
    """
    if root.resolve() == Path("/"):
        return Machine(Path("/"), probe_here())
    if not root.is_dir():
        raise BadInputError(
            "a recorded tree is a directory",
            found=f"'{root}' is none",
            remedy="unpack it, or record one with `edgereg doctor --record DIR`",
        )
    recorded = root / PROBE_NAME
    if not recorded.is_file():
        return Machine(root, None)
    document = strict_json.parse(recorded.read_bytes(), source=PROBE_NAME)
    return Machine(root, strict_json.decode(Probe, document, source=PROBE_NAME))


def diagnose(machine: Machine) -> tuple[Finding, ...]:
    """Every finding, fine ones too, in the order of CHECKS."""
    return tuple(finding for check in CHECKS for finding in check(machine))
