"""Trees of the files that a board shows, as the tests' boards: a healthy Orin and Thor, a desktop.

The names of the files are those that NVIDIA documents; no board was at hand to record one.
"""

import dataclasses
import json
import shutil
from pathlib import Path

from deploy.doctor.machine import Disk, Driver, Package, Probe, Provider

GIB = 1 << 30
ORIN_GPU = "sys/class/devfreq/17000000.gpu"
CPU0 = "sys/devices/system/cpu/cpu0/cpufreq"
OC = "sys/class/hwmon/hwmon1"
INA = "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon3"
MODES = {0: "15W", 1: "25W", 2: "MAXN_SUPER"}


def write(root, files):
    """Write files below root; None removes one, with all that is below it."""
    for name, content in files.items():
        path = Path(root) / name
        if content is None:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(content) + "\n", encoding="utf-8")
    return Path(root)


def meminfo(*, total, available, swap):
    kib = {"MemTotal": total, "MemAvailable": available, "SwapTotal": swap}
    return "\n".join(f"{name}:  {int(size) >> 10} kB" for name, size in kib.items())


def orin(root):
    """An Orin Nano with JetPack 6.2, at its best."""
    modes = "\n".join(
        f"< POWER_MODEL ID={i} NAME={name} >\nCPU_ONLINE CORE_0 1" for i, name in MODES.items()
    )
    files = {
        "proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit\0",
        "proc/device-tree/compatible": "nvidia,p3768-0000+p3767-0005-super\0nvidia,tegra234\0",
        "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic",
        "etc/nvpmodel.conf": modes,
        "var/lib/nvpmodel/status": "pmode:0002",
        "proc/meminfo": meminfo(total=7.4 * GIB, available=5 * GIB, swap=3.7 * GIB),
        "dev/nvmap": "",
        "dev/nvhost-gpu": "",
        "usr/lib/aarch64-linux-gnu/nvidia/libcuda.so.1.1": "",
        "usr/lib/aarch64-linux-gnu/libnvinfer.so.10": "",
        "usr/lib/aarch64-linux-gnu/libnvinfer.so.10.3.0": "",
        "usr/local/cuda/version.json": json.dumps({"cuda": {"name": "SDK", "version": "12.6.11"}}),
        f"{ORIN_GPU}/cur_freq": 1020000000,
        f"{ORIN_GPU}/max_freq": 1020000000,
        f"{ORIN_GPU}/available_frequencies": "306000000 612000000 1020000000",
        f"{ORIN_GPU}/device/load": 900,
        **{f"{OC}/oc{i}_event_cnt": 0 for i in (1, 2, 3)},
        f"{INA}/in7_label": "sum of shunt voltages",
    }
    zones = {"cpu-thermal": 48500, "gpu-thermal": 47250, "tj-thermal": 49125}
    for i, (kind, millidegrees) in enumerate(zones.items()):
        files |= {
            f"sys/class/thermal/thermal_zone{i}/type": kind,
            f"sys/class/thermal/thermal_zone{i}/temp": millidegrees,
        }
    # Its unit is off: it has a type, and reading the temperature fails.
    files["sys/class/thermal/thermal_zone9/type"] = "cv0-thermal"
    for i, (rail, mw) in enumerate({"VDD_IN": 5000, "VDD_CPU_GPU_CV": 1000, "NC": 0}.items(), 1):
        files |= {
            f"{INA}/in{i}_label": rail,
            f"{INA}/in{i}_input": 5000,
            f"{INA}/curr{i}_input": mw // 5,
        }
    for i in range(6):
        folder = f"sys/devices/system/cpu/cpu{i}/cpufreq"
        names = ("scaling_cur_freq", "cpuinfo_cur_freq", "scaling_max_freq", "cpuinfo_max_freq")
        files |= {f"{folder}/{name}": 1728000 for name in names}
    return write(root, files)


def thor(root):
    """An AGX Thor with JetPack 7.0, at its best."""
    orin(root)
    (Path(root) / "usr/lib/aarch64-linux-gnu/libnvinfer.so.10.3.0").unlink()
    gpu = "sys/class/devfreq/gpu-gpc-0"
    ina238 = "sys/bus/i2c/drivers/ina238/2-0044/hwmon/hwmon4"
    return write(
        root,
        {
            ORIN_GPU: None,
            "dev/nvhost-gpu": None,
            "dev/nvidia0": "",
            "proc/device-tree/model": "NVIDIA Jetson AGX Thor Developer Kit\0",
            "proc/device-tree/compatible": "nvidia,p4071-0000+p3834-0008\0nvidia,tegra264\0",
            "etc/nv_tegra_release": "# R38 (release), REVISION: 2.0, GCID: 41844464",
            "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=MAXN >\n< POWER_MODEL ID=1 NAME=120W >",
            "var/lib/nvpmodel/status": "pmode:0000",
            "proc/meminfo": meminfo(total=122 * GIB, available=110 * GIB, swap=0),
            "usr/lib/aarch64-linux-gnu/libnvinfer.so.10.13.3": "",
            "usr/local/cuda/version.json": json.dumps({"cuda": {"version": "13.0.0"}}),
            f"{gpu}/cur_freq": 1575000000,
            f"{gpu}/max_freq": 1575000000,
            f"{gpu}/available_frequencies": "315000000 1575000000",
            f"{INA}/in1_label": "VDD_GPU",
            f"{INA}/in2_label": "VDD_CPU_SOC_MSS",
            f"{ina238}/power1_input": 31500000,
        },
    )


def desktop(root):
    """A PC: no device tree, no power monitor, a temperature and clocks."""
    folder = "sys/devices/system/cpu/cpu0/cpufreq"
    return write(
        root,
        {
            "proc/meminfo": meminfo(total=16 * GIB, available=9 * GIB, swap=0),
            "proc/cpuinfo": "processor : 0\nmodel name : A Chip",
            "sys/class/thermal/thermal_zone0/type": "x86_pkg_temp",
            "sys/class/thermal/thermal_zone0/temp": 51000,
            f"{folder}/scaling_cur_freq": 2100000,
            f"{folder}/scaling_max_freq": 3000000,
            f"{folder}/cpuinfo_max_freq": 4500000,
        },
    )


def probe(**changes):
    """What a healthy Orin's Python answers."""
    site = "/home/user/.local/lib/python3.10/site-packages"
    healthy = Probe(
        python="3.10.12",
        executable="/usr/bin/python3",
        is_isolated=False,
        machine="aarch64",
        packages={
            "numpy": Package("2.2.6", f"{site}/numpy/__init__.py", ""),
            "PIL": Package("12.3.0", f"{site}/PIL/__init__.py", ""),
            "onnxruntime": Package("1.23.2", f"{site}/onnxruntime/__init__.py", ""),
            "tensorrt": Package(
                "10.3.0", "/usr/lib/python3.10/dist-packages/tensorrt/__init__.py", ""
            ),
        },
        distributions=("onnxruntime",),
        providers=(Provider("CPUExecutionProvider", ""),),
        driver=Driver("", "12.6", "8.7"),
        disks=(Disk("home", 20 * GIB),),
    )
    return dataclasses.replace(healthy, **changes)


def thor_probe():
    """What a healthy Thor's Python answers."""
    healthy = probe(python="3.12.3", driver=Driver("", "13.0", "11.0"))
    path = "/usr/lib/python3.12/dist-packages/tensorrt/__init__.py"
    return dataclasses.replace(
        healthy, packages=healthy.packages | {"tensorrt": Package("10.13.3.9", path, "")}
    )


def without(name):
    """The probed packages but one."""
    return {key: package for key, package in probe().packages.items() if key != name}
