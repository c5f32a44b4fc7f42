"""TensorRT, CUDA, ONNX Runtime, numpy, Pillow: which one is used, from where, and does it work."""

import re
from collections.abc import Iterator
from pathlib import Path

from deploy.board.files import read_text
from deploy.board.releases import is_version_of
from deploy.doctor.machine import Finding, Machine, Package

__all__ = ["check_cuda", "check_numpy", "check_onnxruntime", "check_pillow", "check_tensorrt"]

_SYSTEM_PACKAGES = re.compile(r"/usr/lib/python3[\d.]*/dist-packages/")
_GPU_PROVIDERS = ("CUDAExecutionProvider", "TensorrtExecutionProvider")
_LEAST_NUMPY, _LEAST_PILLOW = (1, 26), (10, 3)
_ORT_FOR_NUMPY_2 = (1, 19)  # the first release that was built for it


def check_tensorrt(machine: Machine) -> Iterator[Finding]:
    """Which TensorRT `import tensorrt` gives, and whether it is JetPack's."""
    libraries = _library_versions(machine.root, "usr/lib/*-linux-gnu/libnvinfer.so.*")
    library = libraries[-1] if libraries else None
    if not machine.is_jetson:
        yield _tensorrt_elsewhere(machine.installed_package("tensorrt"))
        return
    release = machine.release
    if library is None:
        yield Finding(
            "TensorRT",
            "no libnvinfer",
            "error",
            "use an image that holds TensorRT"
            if machine.container
            else "sudo apt install nvidia-jetpack",
        )
    elif release is not None and not any(is_version_of(library, v) for v in release.tensorrt):
        yield Finding(
            "TensorRT",
            f"libnvinfer {library}; JetPack {release.name} has {' or '.join(release.tensorrt)}",
            "warning",
            "bundles were judged for JetPack's; run `edgereg verify` before you trust this one",
        )
    else:
        yield Finding("TensorRT", f"libnvinfer {library}")
    if machine.probe is not None:
        yield _binding(machine, library)


def check_cuda(machine: Machine) -> Iterator[Finding]:
    """Whether the driver sees a GPU, and whether CUDA's runtime is JetPack's."""
    driver = machine.probe.driver if machine.probe is not None else None
    if driver is not None and not driver.problem:
        found = f"for CUDA up to {driver.version}, GPU of compute capability"
        yield Finding("driver", f"{found} {driver.compute_capability}")
    elif driver is not None and machine.is_jetson:
        yield Finding(
            "driver",
            driver.problem,
            "error",
            "check the group of /dev/nvmap (`sudo usermod -aG video,render $USER`, then log in "
            "again); in a container, --runtime nvidia",
        )
    elif driver is not None and driver.version:
        yield Finding("driver", driver.problem, "warning", "reinstall NVIDIA's driver, or reboot")
    elif driver is not None:
        yield Finding("driver", "none of NVIDIA: the CPU computes")
    if not machine.is_jetson:
        return
    version, release = _cuda_version(machine.root), machine.release
    if version is None:
        yield Finding("CUDA", "no libcudart", "error", "sudo apt install nvidia-jetpack")
    elif release is not None and not is_version_of(version, release.cuda):
        yield Finding(
            "CUDA",
            f"{version}; JetPack {release.name} has {release.cuda}",
            "warning",
            f"use /usr/local/cuda-{release.cuda}: TensorRT was built against it",
        )
    else:
        yield Finding("CUDA", version)


def check_onnxruntime(machine: Machine) -> Iterator[Finding]:
    """Whether each provider that ONNX Runtime claims computes a tiny graph."""
    if machine.probe is None:
        return
    package, installed = machine.installed_package("onnxruntime"), machine.probe.distributions
    if package is None:
        yield Finding(
            "ONNX Runtime",
            "not installed: --backend onnxruntime has nothing to run",
            "warning",
            "pip install 'edgereg[ort]'",
        )
        return
    if package.problem:
        remedy = f"pip install --force-reinstall {' '.join(installed[:1]) or 'onnxruntime'}"
        yield Finding("ONNX Runtime", package.problem, "error", remedy)
        return
    yield Finding("ONNX Runtime", f"{package.version}, {package.path}")
    if len([name for name in installed if name.startswith("onnxruntime")]) > 1:
        yield Finding(
            "ONNX Runtime",
            f"{' and '.join(installed)} write into the same folder",
            "warning",
            f"pip uninstall {' '.join(installed)}, then install one",
        )
    for provider in machine.probe.providers:
        is_needed = provider.name == "CPUExecutionProvider" or (
            machine.is_jetson and provider.name in _GPU_PROVIDERS
        )
        if not provider.problem:
            yield Finding(provider.name, "ran a tiny graph")
            continue
        remedy = "pip install --force-reinstall onnxruntime"
        if provider.name in _GPU_PROVIDERS and machine.is_jetson:
            remedy = (
                "no wheel of PyPI has kernels for a Jetson: use --backend tensorrt, or "
                "`pip uninstall onnxruntime-gpu && pip install onnxruntime` for the CPU"
            )
        elif provider.name in _GPU_PROVIDERS:
            remedy = "install the CUDA and TensorRT that this build wants, or plain onnxruntime"
        yield Finding(
            provider.name,
            f"is listed and does not run: {provider.problem}",
            "error" if is_needed else "warning",
            remedy,
        )


def check_numpy(machine: Machine) -> Iterator[Finding]:
    """Whether numpy is there, new enough, and not too new for the rest."""
    if machine.probe is None:
        return
    numpy, runtime = machine.installed_package("numpy"), machine.installed_package("onnxruntime")
    remedy = "pip install 'numpy>=1.26'"
    if numpy is None:
        yield Finding("numpy", "not installed", "error", remedy)
    elif numpy.problem:
        yield Finding("numpy", numpy.problem, "error", f"{remedy} --force-reinstall")
    elif _numbers(numpy.version) < _LEAST_NUMPY:
        yield Finding("numpy", f"{numpy.version}, {numpy.path}: too old", "error", remedy)
    elif (
        _numbers(numpy.version) >= (2,)
        and runtime is not None
        and runtime.version
        and _numbers(runtime.version) < _ORT_FOR_NUMPY_2
    ):
        yield Finding(
            "numpy",
            f"{numpy.version}: too new for onnxruntime {runtime.version}, built for numpy 1",
            "error",
            "pip install 'onnxruntime>=1.19', or 'numpy<2'",
        )
    else:
        yield Finding("numpy", f"{numpy.version}, {numpy.path}")


def check_pillow(machine: Machine) -> Iterator[Finding]:
    """Whether images can be decoded."""
    if machine.probe is None:
        return
    pillow, remedy = machine.installed_package("PIL"), "pip install 'edgereg[image]'"
    if pillow is None:
        found = "not installed: no image can be decoded"
        yield Finding("Pillow", found, "warning", remedy)
    elif pillow.problem:
        yield Finding("Pillow", pillow.problem, "error", remedy)
    elif _numbers(pillow.version) < _LEAST_PILLOW:
        found = f"{pillow.version}, {pillow.path}: older than 10.3"
        yield Finding("Pillow", found, "warning", remedy)
    else:
        yield Finding("Pillow", pillow.version)


def _binding(machine: Machine, library: str | None) -> Finding:
    """Judge the module that `import tensorrt` finds on a Jetson."""
    package = machine.installed_package("tensorrt")
    probe = machine.probe
    if package is None or (package.problem and not package.path and not package.version):
        found = package.problem if package is not None else "`import tensorrt` finds nothing"
        remedy = "sudo apt install python3-libnvinfer"
        if probe is not None and probe.is_isolated:
            found = f"{found}; this virtual environment hides the system's packages"
            remedy = "make it anew: python3 -m venv --system-site-packages DIR"
        return Finding("TensorRT in Python", found, "error", remedy)
    found = f"{package.version}, {package.path or 'not importable'}"
    if package.problem:
        remedy = (
            "pip uninstall tensorrt; JetPack's comes from `sudo apt install python3-libnvinfer`"
        )
        return Finding("TensorRT in Python", f"{found}: {package.problem}", "error", remedy)
    is_system = _SYSTEM_PACKAGES.match(package.path) is not None
    is_same = library is None or _numbers(package.version)[:3] == _numbers(library)[:3]
    if not is_same or not is_system:
        return Finding(
            "TensorRT in Python",
            f"{found} hides JetPack's {library}" if not is_system else f"{found}, not {library}",
            "warning" if is_same else "error",
            "sudo apt install --reinstall python3-libnvinfer"
            if is_system
            else "pip uninstall tensorrt tensorrt-bindings tensorrt-libs",
        )
    return Finding("TensorRT in Python", found)


def _tensorrt_elsewhere(package: Package | None) -> Finding:
    if package is None:
        return Finding("TensorRT", "not installed: an engine is built where it runs")
    if package.problem:
        return Finding(
            "TensorRT", package.problem, "warning", "pip uninstall tensorrt, or repair it"
        )
    return Finding("TensorRT", f"{package.version}, {package.path}")


def _cuda_version(root: Path) -> str | None:
    """The toolkit's own word, else the newest runtime library's name."""
    for path in root.glob("usr/local/cuda/version.json"):
        found = re.search(r'"cuda"\s*:\s*{[^}]*"version"\s*:\s*"([\d.]+)"', read_text(path) or "")
        if found:
            return found[1]
    folders = ("usr/local/cuda*/targets/*/lib", "usr/local/cuda*/lib64")
    versions = [v for f in folders for v in _library_versions(root, f"{f}/libcudart.so.*")]
    return max(versions, key=_numbers, default=None)


def _library_versions(root: Path, pattern: str) -> list[str]:
    """The full versions, three numbers or more, in the names of a library's files, in order."""
    names = (path.name.partition(".so.")[2] for path in root.glob(pattern))
    return sorted({v for v in names if re.fullmatch(r"\d+(\.\d+){2,}", v)}, key=_numbers)


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: (1, 26, 4) of "1.26.4rc1"."""
    return tuple(int(part) for part in re.findall(r"(?:^|\.)(\d+)", version))
