"""deploy/ is what a device installs: numpy and the standard library, and each extra in one file."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import deploy

ROOT = Path(deploy.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
EXTRAS = {
    "PIL": ("runtime/decode.py", "report/annotate.py"),
    "onnxruntime": ("runtime/ort_runner.py",),
    "tensorrt": ("runtime/trt_versions.py",),
    "cuda": ("runtime/cudart.py",),
    "av": ("service/video.py",),
}
BLOCKED = {"torch", "onnx", *EXTRAS}
SUITE = {file for file in FILES if file.parent == ROOT / "suite"}  # is pytest's, as a whole
ALLOWED = {*sys.stdlib_module_names, "numpy", "deploy"}


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the direction"
            yield node.module


def foreign_modules(source):
    return {name.partition(".")[0] for name in imported(ast.parse(source))} - ALLOWED


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.relative_to(ROOT).as_posix())
def test_a_file_imports_only_what_a_device_has(file):
    extras = {extra for extra, owners in EXTRAS.items() if file in {ROOT / o for o in owners}}
    extras |= {"pytest"} if file in SUITE else set()
    assert foreign_modules(file.read_text(encoding="utf-8")) <= extras


@pytest.mark.parametrize("line", ["import torch", "from edgereg.data import x", "import export.a"])
def test_the_check_on_imports_finds_a_foreign_one(line):
    assert foreign_modules(f"def f():\n    {line}")


def test_every_module_can_be_imported_where_no_extra_is_installed():
    modules = [
        ".".join(("deploy", *file.relative_to(ROOT).with_suffix("").parts)).removesuffix(
            ".__init__"
        )
        for file in FILES
        if file not in SUITE
    ]
    code = f"""
import importlib, importlib.abc, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BLOCKED!r}:
            raise ImportError(f"{{name}} is blocked")

sys.meta_path.insert(0, Blocker())
for name in {modules!r}:
    importlib.import_module(name)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.relative_to(ROOT).as_posix())
def test_a_file_says_what_it_is_for(file):
    assert ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    "module", [f for f in FILES if "__all__" in f.read_text()], ids=lambda f: f.stem
)
def test_public_names_exist(module):
    name = ".".join(("deploy", *module.relative_to(ROOT).with_suffix("").parts))
    namespace = __import__(name, fromlist=["__all__"])
    assert all(hasattr(namespace, public) for public in namespace.__all__)
