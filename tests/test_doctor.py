import argparse
import dataclasses
import json
import sys

import numpy as np
import pytest
from board_trees import (
    CPU0,
    GIB,
    INA,
    OC,
    ORIN_GPU,
    desktop,
    meminfo,
    orin,
    probe,
    thor,
    thor_probe,
    without,
    write,
)

from deploy.children import ask_child
from deploy.commands import add_commands
from deploy.doctor import probe as probing
from deploy.doctor.diagnose import CHECKS, diagnose, examine
from deploy.doctor.machine import Disk, Driver, Machine, Package, Provider
from deploy.doctor.record import PROBE_NAME, record_tree
from deploy.doctor.tiny_graph import tiny_model
from deploy.errors import BadInputError

SITE = "/home/user/.local/lib/python3.10/site-packages"
NO_KERNEL = "no kernel image is available for execution on the device"
LIB = "usr/lib/aarch64-linux-gnu"


def run(*arguments):
    parser = argparse.ArgumentParser(prog="edgereg")
    add_commands(parser.add_subparsers(required=True))
    args = parser.parse_args(["doctor", *map(str, arguments)])
    return args.handler(args)


def packages(**changes):
    return probe().packages | changes


# A broken set-up: files that differ from the healthy Orin's, a probe that does, what must be found.
BROKEN = {
    "onnxruntime-gpu without a provider that runs": (
        {},
        {
            "distributions": ("onnxruntime-gpu",),
            "providers": (
                Provider("CUDAExecutionProvider", NO_KERNEL),
                Provider("CPUExecutionProvider", ""),
            ),
        },
        ("CUDAExecutionProvider", "error", NO_KERNEL, "--backend tensorrt"),
    ),
    "onnxruntime twice in one folder": (
        {},
        {"distributions": ("onnxruntime", "onnxruntime-gpu")},
        ("ONNX Runtime", "warning", "same folder", "pip uninstall onnxruntime onnxruntime-gpu"),
    ),
    "onnxruntime that cannot be imported": (
        {},
        {"packages": packages(onnxruntime=Package("1.23.2", "", "ImportError: no libonnx.so"))},
        ("ONNX Runtime", "error", "no libonnx.so", "--force-reinstall onnxruntime"),
    ),
    "a CPU provider that miscomputes": (
        {},
        {"providers": (Provider("CPUExecutionProvider", "it computed [2.0, 5.0]"),)},
        ("CPUExecutionProvider", "error", "[2.0, 5.0]", "--force-reinstall"),
    ),
    "no onnxruntime": (
        {},
        {"packages": without("onnxruntime"), "distributions": (), "providers": ()},
        ("ONNX Runtime", "warning", "not installed", "edgereg[ort]"),
    ),
    "TensorRT of pip in front of JetPack's": (
        {},
        {"packages": packages(tensorrt=Package("10.13.0.35", f"{SITE}/tensorrt/__init__.py", ""))},
        ("TensorRT in Python", "error", "hides JetPack's 10.3.0", "pip uninstall tensorrt"),
    ),
    "TensorRT of pip in the same version": (
        {},
        {"packages": packages(tensorrt=Package("10.3.0", f"{SITE}/tensorrt/__init__.py", ""))},
        ("TensorRT in Python", "warning", "hides JetPack's", "pip uninstall tensorrt"),
    ),
    "bindings of another TensorRT than the library's": (
        {f"{LIB}/libnvinfer.so.10.3.0": None, f"{LIB}/libnvinfer.so.10.7.0": ""},
        {},
        ("TensorRT in Python", "error", "not 10.7.0", "--reinstall python3-libnvinfer"),
    ),
    "a TensorRT that is not this JetPack's": (
        {f"{LIB}/libnvinfer.so.10.3.0": None, f"{LIB}/libnvinfer.so.10.7.0": ""},
        {},
        ("TensorRT", "warning", "JetPack 6.2 has 10.3.0", "edgereg verify"),
    ),
    "no TensorRT": (
        {f"{LIB}/libnvinfer.so.10": None, f"{LIB}/libnvinfer.so.10.3.0": None},
        {},
        ("TensorRT", "error", "no libnvinfer", "apt install nvidia-jetpack"),
    ),
    "no bindings of TensorRT": (
        {},
        {"packages": without("tensorrt")},
        ("TensorRT in Python", "error", "finds nothing", "apt install python3-libnvinfer"),
    ),
    "a virtual environment that hides JetPack's packages": (
        {},
        {"packages": without("tensorrt"), "is_isolated": True},
        ("TensorRT in Python", "error", "hides the system's", "--system-site-packages"),
    ),
    "a placeholder of TensorRT from pip": (
        {},
        {"packages": packages(tensorrt=Package("10.9.0", "", "ImportError: libnvinfer.so.10"))},
        ("TensorRT in Python", "error", "ImportError", "pip uninstall tensorrt"),
    ),
    "Python of another minor version": (
        {},
        {"python": "3.12.3"},
        ("python", "error", "JetPack 6.2 are for 3.10", "--system-site-packages"),
    ),
    "Python too old for edgereg": (
        {},
        {"python": "3.8.10"},
        ("python", "error", "3.8.10", "3.10 or later"),
    ),
    "no L4T": (
        {"etc/nv_tegra_release": None},
        {},
        ("board", "error", "no version of L4T", "nvidia-l4t-core"),
    ),
    "an L4T of the future": (
        {"etc/nv_tegra_release": "# R41 (release), REVISION: 1.0"},
        {},
        ("board", "warning", "L4T 41.1.0", "upgrade edgereg"),
    ),
    "JetPack 5": (
        {"etc/nv_tegra_release": "# R35 (release), REVISION: 6.0"},
        {},
        ("board", "error", "JetPack 5", "flash JetPack 6.0"),
    ),
    "a low power mode": (
        {"var/lib/nvpmodel/status": "pmode:0000"},
        {},
        ("power mode", "warning", "15W (mode 0) of 15W, 25W, MAXN_SUPER", "nvpmodel -m 2"),
    ),
    "a power mode that is not told": (
        {"var/lib/nvpmodel/status": None},
        {},
        ("power mode", "warning", "not told", "nvpmodel -q"),
    ),
    "a GPU clock held down": (
        {f"{ORIN_GPU}/max_freq": 612000000},
        {},
        ("clocks", "warning", "17000000.gpu at 612 of 1020 MHz", "jetson_clocks"),
    ),
    "a CPU clock that is not what it says": (
        {f"{CPU0}/cpuinfo_cur_freq": 729600},
        {},
        ("clocks", "warning", "cpu0 730 MHz, said 1728", "over-current"),
    ),
    "over-current events": (
        {f"{OC}/oc3_event_cnt": 27390},
        {},
        ("throttle events", "warning", "oc3 27390 (the momentary current", "supply"),
    ),
    "heat": (
        {"sys/class/thermal/thermal_zone2/temp": 91000},
        {},
        ("temperature", "warning", "91.0 degrees C (tj-thermal)", "cool"),
    ),
    "sensors that cannot be read": (
        {**{f"{OC}/oc{i}_event_cnt": None for i in (1, 2, 3)}, INA: None},
        {},
        ("sensors", "warning", "cannot be read: throttle events, power", "/sys"),
    ),
    "a small board without swap": (
        {"proc/meminfo": meminfo(total=7.4 * GIB, available=5 * GIB, swap=0)},
        {},
        ("memory", "warning", "0 MiB of swap", "swapon"),
    ),
    "hardly any memory": (
        {"proc/meminfo": meminfo(total=7.4 * GIB, available=0.3 * GIB, swap=4 * GIB)},
        {},
        ("memory", "error", "307 of 7,578 MiB", "stop other programs"),
    ),
    "a full disk": (
        {},
        {"disks": (Disk("home", 20 * GIB), Disk("temporary files", 5 << 20))},
        ("disk", "error", "5 MiB free (temporary files)", "delete"),
    ),
    "a disk that is nearly full": (
        {},
        {"disks": (Disk("home", 500 << 20),)},
        ("disk", "warning", "500 MiB free", "delete"),
    ),
    "a container without the runtime's devices": (
        {".dockerenv": "", "dev/nvmap": None, "dev/nvhost-gpu": None},
        {},
        ("container", "error", "no GPU device", "--runtime nvidia"),
    ),
    "a container without the driver": (
        {".dockerenv": "", f"{LIB}/nvidia": None},
        {},
        ("container", "error", "no libcuda.so.1", "--runtime nvidia"),
    ),
    "a container that does not see the release": (
        {".dockerenv": "", "etc/nv_tegra_release": None},
        {},
        ("board", "error", "no version of L4T", "mount the host's /etc/nv_tegra_release"),
    ),
    "no CUDA": (
        {"usr/local/cuda": None},
        {},
        ("CUDA", "error", "no libcudart", "apt install nvidia-jetpack"),
    ),
    "a CUDA that is not this JetPack's": (
        {"usr/local/cuda/version.json": json.dumps({"cuda": {"version": "13.0.1"}})},
        {},
        ("CUDA", "warning", "13.0.1; JetPack 6.2 has 12.6", "/usr/local/cuda-12.6"),
    ),
    "a GPU that this user may not open": (
        {},
        {"driver": Driver("cuInit says CUDA_ERROR_NO_DEVICE", "12.6", "")},
        ("driver", "error", "CUDA_ERROR_NO_DEVICE", "usermod -aG video"),
    ),
    "a numpy that is too old": (
        {},
        {"packages": packages(numpy=Package("1.21.5", "/usr/lib/python3/numpy", ""))},
        ("numpy", "error", "1.21.5", "numpy>=1.26"),
    ),
    "a numpy that is too new": (
        {},
        {"packages": packages(onnxruntime=Package("1.18.0", f"{SITE}/onnxruntime", ""))},
        ("numpy", "error", "too new for onnxruntime 1.18.0", "numpy<2"),
    ),
    "no numpy": (
        {},
        {"packages": without("numpy")},
        ("numpy", "error", "not installed", "numpy>=1.26"),
    ),
    "the Pillow of Ubuntu": (
        {},
        {"packages": packages(PIL=Package("9.0.1", "/usr/lib/python3/dist-packages/PIL", ""))},
        ("Pillow", "warning", "9.0.1", "edgereg[image]"),
    ),
    "no Pillow": (
        {},
        {"packages": without("PIL")},
        ("Pillow", "warning", "no image can be decoded", "edgereg[image]"),
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_set_up_is_diagnosed_with_its_remedy(tmp_path, name):
    files, changes, (check, status, found, remedy) = BROKEN[name]
    findings = diagnose(Machine(write(orin(tmp_path), files), probe(**changes)))
    matching = [f for f in findings if f.check == check and f.status == status]
    assert any(found in f.found and remedy in f.remedy for f in matching), findings


@pytest.mark.parametrize("name", BROKEN)
def test_every_fault_has_a_remedy_and_nothing_fine_has_one(tmp_path, name):
    files, changes, _ = BROKEN[name]
    findings = diagnose(Machine(write(orin(tmp_path), files), probe(**changes)))
    assert all((f.status == "ok") == (f.remedy == "") for f in findings)


def test_a_healthy_orin_has_no_fault(tmp_path):
    findings = diagnose(Machine(orin(tmp_path), probe()))
    assert [f for f in findings if f.status != "ok"] == []
    shown = {f.check: f.found for f in findings}
    assert shown["board"] == "NVIDIA Jetson Orin Nano Developer Kit, JetPack 6.2 (L4T 36.4.3)"
    assert shown["power mode"] == "MAXN_SUPER (mode 2)" and shown["power"] == "5.00 W now"
    assert shown["TensorRT"] == "libnvinfer 10.3.0" and shown["CUDA"] == "12.6.11"
    assert "17000000.gpu 1020 of 1020 MHz" in shown["clocks"]


def test_a_healthy_thor_has_no_fault(tmp_path):
    findings = diagnose(Machine(thor(tmp_path), thor_probe()))
    assert [f for f in findings if f.status != "ok"] == []
    assert {f.check: f.found for f in findings}["board"].endswith("JetPack 7.0 (L4T 38.2.0)")


def test_a_healthy_orin_is_fine_in_a_container_of_the_runtime(tmp_path):
    findings = diagnose(Machine(write(orin(tmp_path), {".dockerenv": ""}), probe()))
    assert all(f.status == "ok" for f in findings)
    assert "with the GPU's devices" in {f.check: f.found for f in findings}["container"]


@pytest.mark.parametrize(
    ("mark", "kind"),
    [
        (".dockerenv", "Docker"),
        ("run/.containerenv", "Podman"),
        ("run/secrets/kubernetes.io/x", "Kubernetes"),
    ],
)
def test_a_container_is_named(tmp_path, mark, kind):
    assert Machine(write(orin(tmp_path), {mark: ""}), None).container == kind


def test_a_clock_that_is_about_to_change_does_not_lie(tmp_path, monkeypatch):
    root = write(orin(tmp_path), {f"{CPU0}/cpuinfo_cur_freq": 729600})
    arrives = {f"{CPU0}/cpuinfo_cur_freq": 1728000}
    monkeypatch.setattr("time.sleep", lambda seconds: write(root, arrives))
    assert {f.status for f in diagnose(Machine(root, probe())) if f.check == "clocks"} == {"ok"}


def test_a_desktop_is_no_faulty_jetson(tmp_path):
    answers = probe(
        python="3.13.1",
        machine="x86_64",
        packages=without("tensorrt"),
        driver=Driver("no libcuda.so.1", "", ""),
    )
    findings = diagnose(Machine(desktop(tmp_path), answers))
    assert [f for f in findings if f.status != "ok"] == []
    assert findings[0].found == "no Jetson: x86_64"


def test_a_desktop_with_a_driver_that_finds_no_gpu_is_warned(tmp_path):
    answers = probe(driver=Driver("cuInit says CUDA_ERROR_NO_DEVICE", "13.0", ""))
    findings = {f.check: f for f in diagnose(Machine(desktop(tmp_path), answers))}
    assert findings["driver"].status == "warning"


def test_the_running_machine_is_examined_without_an_error():
    findings = diagnose(examine())
    errors = {f.check for f in findings if f.status == "error"}
    assert errors <= {"memory", "disk"}  # which a busy machine may lack
    shown = {f.check: f.found for f in findings}
    assert shown["CPUExecutionProvider"] == "ran a tiny graph"
    assert sys.executable in shown["python"] and np.__version__ in shown["numpy"]


def test_a_tree_without_a_probe_says_what_is_missing_and_is_judged_by_its_files(tmp_path):
    findings = diagnose(examine(write(orin(tmp_path), {"var/lib/nvpmodel/status": "pmode:0001"})))
    shown = {f.check: f for f in findings}
    assert "--record" in shown["probe"].remedy and shown["power mode"].status == "warning"


def test_a_recorded_tree_gives_the_same_findings_elsewhere(tmp_path):
    files, changes, _ = BROKEN["onnxruntime-gpu without a provider that runs"]
    root = write(orin(tmp_path / "board"), files | {"home/secret": "x"})
    count = record_tree(tmp_path / "copy", probe(**changes), root=root)
    assert count == sum(path.is_file() for path in (tmp_path / "copy").rglob("*"))
    assert not (tmp_path / "copy/home").exists()
    assert diagnose(examine(tmp_path / "copy")) == diagnose(Machine(root, probe(**changes)))


def test_a_probe_that_is_none_is_refused(tmp_path):
    with pytest.raises(BadInputError, match="no key"):
        examine(write(orin(tmp_path), {PROBE_NAME: "{}"}))
    with pytest.raises(BadInputError, match="is a directory"):
        examine(tmp_path / "no-such")


def test_the_command_exits_1_on_an_error_only_and_prints_the_remedy(tmp_path, capsys):
    orin(tmp_path / "a")
    record_tree(tmp_path / "fine", probe(), root=tmp_path / "a")
    record_tree(tmp_path / "full", probe(disks=(Disk("home", 0),)), root=tmp_path / "a")
    assert run("--root", tmp_path / "fine") == 0
    assert "0 errors, 0 warnings" in capsys.readouterr().out
    assert run("--root", tmp_path / "full") == 1
    shown = capsys.readouterr().out
    assert "1 errors, 0 warnings" in shown and "remedy: delete" in shown
    assert run("--root", tmp_path / "full", "--json") == 1
    document = json.loads(capsys.readouterr().out)
    assert document["errors"] == 1 and document["findings"][-1]["status"] == "error"


def test_the_command_records_what_it_sees(tmp_path, capsys):
    assert run("--record", tmp_path / "tree") == 0
    here = capsys.readouterr().out.splitlines()
    assert here[-1] == f"wrote {tmp_path / 'tree'}"
    run("--root", tmp_path / "tree")
    there = capsys.readouterr().out.splitlines()
    assert len(there) == len(here) - 1 and there[0] == here[0]


def test_every_check_survives_an_empty_tree(tmp_path):
    machine = Machine(tmp_path, None)
    assert all(isinstance(list(check(machine)), list) for check in CHECKS)
    assert {f.check for f in diagnose(machine)} == {"board", "probe", "TensorRT", "memory"}


def test_the_tiny_graph_is_valid_onnx_and_adds():
    import onnx
    from onnx.reference import ReferenceEvaluator

    model = onnx.load_from_string(tiny_model())
    onnx.checker.check_model(model, full_check=True)
    (y,) = ReferenceEvaluator(model).run(None, {"x": np.array([1, 2], np.float32)})
    assert y.tolist() == [2.0, 4.0]


def test_a_provider_is_not_taken_for_running_because_the_cpu_runs_instead():
    assert probing.run_provider("CPUExecutionProvider") == ""
    with pytest.warns(UserWarning, match="not in available provider names"):
        assert "fallback" in probing.run_provider("CUDAExecutionProvider")


@pytest.mark.skipif(
    "AzureExecutionProvider" not in probing.list_providers(),
    reason="this build has no provider that loads and has no kernel",
)
def test_a_provider_without_a_kernel_does_not_pass_by_the_cpus():
    assert "fallback" in probing.run_provider("AzureExecutionProvider")


def test_a_provider_that_computes_something_else_is_found(monkeypatch):
    tripled = tiny_model().replace(b"Add", b"Mul")
    monkeypatch.setattr(probing, "tiny_model", lambda: tripled)
    assert "it computed [1.0, 4.0]" in probing.run_provider("CPUExecutionProvider")


def test_a_package_that_is_absent_is_none_and_one_that_breaks_says_why(tmp_path, monkeypatch):
    assert probing.describe_package("no_such_package") is None
    broken = tmp_path / "broken_package.py"
    broken.write_text("import no_such_dependency")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        probing.describe_package("broken_package")


def test_a_child_that_crashes_or_hangs_is_an_answer():
    assert ask_child("operator", "add", 2, 3) == (5, "")
    value, problem = ask_child("os", "abort")
    assert value is None and "killed by signal 6" in problem
    value, problem = ask_child("operator", "truediv", 1, 0)
    assert value is None and "ZeroDivisionError" in problem
    value, problem = ask_child("time", "sleep", 30, timeout_s=0.3)
    assert value is None and "no answer within 0.3 s" in problem


def test_a_probe_survives_its_own_json(tmp_path):
    record_tree(tmp_path / "t", probe(), root=orin(tmp_path / "o"))
    assert dataclasses.asdict(examine(tmp_path / "t").probe) == dataclasses.asdict(probe())
