"""What is installed on a device stays small, the embedded data included."""

import io
import zipfile
from pathlib import Path

import numpy as np

import deploy

ROOT = Path(deploy.__file__).parent.parent
PACKAGES = ("edgereg", "export", "deploy")  # as [tool.hatch.build.targets.wheel] has them
MOST_BYTES = 5_000_000


def packed_bytes(*folders):
    """What a wheel of them takes: a zip archive, deflated as hatchling does."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for folder in folders:
            for path in sorted(folder.rglob("*")):
                if path.is_file() and "__pycache__" not in path.parts:
                    file.write(path)
    return len(archive.getvalue())


def test_the_wheel_takes_five_megabytes_at_most():
    packages = [ROOT / name for name in PACKAGES]
    assert str(list(PACKAGES)).replace("'", '"') in (ROOT / "pyproject.toml").read_text("utf-8")
    assert 1_000_000 < packed_bytes(*packages) <= MOST_BYTES  # the images alone take more than one


def test_data_that_would_not_fit_is_seen(tmp_path):
    (tmp_path / "data.bin").write_bytes(np.random.default_rng(0).bytes(MOST_BYTES))
    assert packed_bytes(tmp_path) > MOST_BYTES
