"""Record what doctor looks at, so that a machine far away can be examined.

The files of /sys and /proc cannot be archived as they are (their sizes lie, some block), so the few
that are read are copied one by one. Of libraries and devices only the name is kept.
"""

from pathlib import Path

from deploy import strict_json
from deploy.board.files import read_text
from deploy.doctor.machine import Probe
from deploy.publish import publish_directory

__all__ = ["PROBE_NAME", "record_tree"]

PROBE_NAME = "edgereg-probe.json"

_CONTENTS = (
    "etc/nv_tegra_release",
    "etc/nvpmodel.conf",
    "var/lib/nvpmodel/status",
    "proc/meminfo",
    "proc/device-tree/model",
    "proc/device-tree/compatible",
    "sys/class/thermal/thermal_zone*/type",
    "sys/class/thermal/thermal_zone*/temp",
    "sys/class/hwmon/hwmon*/oc[0-9]*_event_cnt",
    "sys/bus/i2c/drivers/ina*/*/hwmon/hwmon*/in*_label",
    "sys/bus/i2c/drivers/ina*/*/hwmon/hwmon*/in*_input",
    "sys/bus/i2c/drivers/ina*/*/hwmon/hwmon*/curr*_input",
    "sys/bus/i2c/drivers/ina*/*/hwmon/hwmon*/power1_input",
    "sys/class/devfreq/*/*_freq",
    "sys/class/devfreq/*/available_frequencies",
    "sys/class/devfreq/*/device/load",
    "sys/devices/system/cpu/cpu[0-9]*/cpufreq/*_freq",
    "usr/local/cuda/version.json",
)
_NAMES = (
    ".dockerenv",
    "run/.containerenv",
    "run/secrets/kubernetes.io",
    "dev/nvmap",
    "dev/nvhost-gpu",
    "dev/nvgpu",
    "dev/nvidia0",
    "usr/lib/*-linux-gnu/libnvinfer.so.*",
    "usr/lib/*-linux-gnu/**/libcuda.so.1*",
    "usr/local/cuda*/targets/*/lib/libcudart.so.*",
    "usr/local/cuda*/lib64/libcudart.so.*",
)


def record_tree(destination: Path, probe: Probe, *, root: Path = Path("/")) -> int:
    """Write a tree for `edgereg doctor --root`.

    Args:
        destination: A directory that does not exist yet.
        probe: What was learned by running things.
        root: Where the files are read.

    Returns:
        How many files were written.

    Raises:
        BadInputError: The destination exists.
    """
    contents = {path: "" for pattern in _NAMES for path in root.glob(pattern)}
    for pattern in _CONTENTS:
        for path in root.glob(pattern):
            text = read_text(path)
            if text is not None:  # one that refuses here will be absent there, which reads the same
                contents[path] = f"{text}\n"
    with publish_directory(destination, members=()) as staging:
        for path, text in contents.items():
            copy = staging / path.relative_to(root)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(text, encoding="utf-8")
        (staging / PROBE_NAME).write_bytes(strict_json.dump(probe))
    return len(contents) + 1
