"""The options of the suite, and when its tests are collected: only where they are asked for.

    pytest --pyargs deploy.suite --bundle photos.bundle --max-p99-ms 10 --junitxml report.xml

pytest loads this by its entry point, in every run of a machine that has edgereg: so it defines
options, and imports nothing of edgereg.
"""

import math
from pathlib import Path

import pytest

__all__ = ["SUITE"]

SUITE = Path(__file__).parent


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of `pytest --pyargs deploy.suite`."""
    group = parser.getgroup("edgereg", "a bundle on this device: pytest --pyargs deploy.suite")
    group.addoption("--bundle", type=Path, metavar="DIR", help="the bundle that is tested")
    group.addoption(
        "--backend",
        choices=("onnxruntime", "tensorrt"),
        default="onnxruntime",
        help="what runs it (default: onnxruntime)",
    )
    group.addoption(
        "--precision",
        help="its variant (default: fp32; with --backend tensorrt the fastest of `edgereg build`)",
    )
    group.addoption(
        "--max-p99-ms",
        type=_positive,
        metavar="MS",
        help="the 99th percentile of an image, end to end, that passes (default: it is not judged)",
    )
    group.addoption(
        "--timed-seconds",
        type=_positive,
        default=20.0,
        metavar="S",
        help="how long images are timed (default: 20)",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Refuse a run of the suite that names no bundle.

    Raises:
        pytest.UsageError: So it is.
    """
    asked = any(str(argument).startswith("deploy.suite") for argument in config.args)
    if asked and config.getoption("bundle") is None:
        raise pytest.UsageError(
            "the suite tests a bundle; found: no --bundle; "
            "remedy: pytest --pyargs deploy.suite --bundle DIR"
        )


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave the suite out of a run that names no bundle, such as edgereg's own tests."""
    is_ours = SUITE in (collection_path, *collection_path.parents)
    return True if is_ours and config.getoption("bundle") is None else None


def _positive(text: str) -> float:
    number = float(text)
    if not 0 < number < math.inf:
        raise ValueError(f"{text} is not a positive number")
    return number
