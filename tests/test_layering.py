"""One way down: edgereg -> export -> deploy; see test_deploy_layering.py for deploy's part."""

import ast
from pathlib import Path

import pytest

import edgereg
import export

ROOTS = {module.__name__: Path(module.__file__).parent for module in (edgereg, export)}
FILES = [(name, f) for name, root in ROOTS.items() for f in sorted(root.rglob("*.py"))]
each_file = pytest.mark.parametrize(
    ("package", "file"), FILES, ids=[f"{n}/{f.relative_to(ROOTS[n])}" for n, f in FILES]
)
NEVER = {"pickle", "cPickle", "dill", "joblib", "shelve", "marshal"}
ABOVE = {"edgereg": {"tests"}, "export": {"edgereg", "tests"}}
STEPS = {  # of an export, and the earlier ones that each builds on
    "traced": set(),
    "passes": {"traced"},
    "onnx_file": {"traced"},
    "precision": {"onnx_file"},
    "judge": {"traced", "onnx_file", "precision"},
}


def tree_of(file):
    return ast.parse(file.read_text(encoding="utf-8"))


def imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the direction"
            yield node.module.partition(".")[0]


def unpickles(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if (node.value.id, node.attr) in {("torch", "load"), ("torch", "save")}:
                yield f"{node.value.id}.{node.attr}"
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            yield from () if ast.unparse(node.value) == "False" else ("allow_pickle",)


@each_file
def test_a_file_imports_nothing_from_above(package, file):
    assert not set(imports(tree_of(file))) & ABOVE[package]


def steps_imported(tree):
    modules = (node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom))
    parts = (module.split(".") for module in modules)
    return {step for root, step, *_ in (p for p in parts if len(p) > 1) if root == "export"}


@pytest.mark.parametrize("step", STEPS)
def test_a_step_of_an_export_builds_on_earlier_ones(step):
    files = sorted((ROOTS["export"] / step).glob("*.py"))
    found = set().union(*(steps_imported(tree_of(file)) for file in files))
    assert len(files) > 5 and found & STEPS.keys() <= STEPS[step] | {step}


def test_every_folder_of_an_export_is_a_step():
    assert {folder.parent.name for folder in ROOTS["export"].glob("*/__init__.py")} == {*STEPS}


@each_file
def test_a_file_pickles_nothing(package, file):
    tree = tree_of(file)
    assert not set(imports(tree)) & NEVER
    assert not list(unpickles(tree))


@each_file
def test_a_file_says_what_it_is_for(package, file):
    assert ast.get_docstring(tree_of(file))


def test_the_checks_find_what_they_look_for():
    tree = ast.parse(
        "def f():\n    import pickle\n    from edgereg.data import x\n    torch.load(1)"
    )
    assert set(imports(tree)) == {"pickle", "edgereg"} and list(unpickles(tree)) == ["torch.load"]
    assert steps_imported(ast.parse("from export.judge.speed import x")) == {"judge"}
    assert list(unpickles(ast.parse("np.load(f, allow_pickle=True)"))) == ["allow_pickle"]


def test_importing_edgereg_imports_nothing():
    assert list(imports(tree_of(ROOTS["edgereg"] / "__init__.py"))) == []


@pytest.mark.parametrize("file", ["cli.py", "commands.py", "errors.py", "progress.py"])
def test_what_runs_before_a_command_imports_only_the_standard_library_at_its_top(file):
    heavy = {"torch", "numpy", "torchvision", "yaml", "rich", "jsonargparse", "onnx", "safetensors"}
    top = [
        n
        for n in tree_of(ROOTS["edgereg"] / file).body
        if isinstance(n, ast.Import | ast.ImportFrom)
    ]
    assert not set(imports(ast.Module(top, []))) & heavy


@pytest.mark.parametrize(
    "module",
    [(n, f) for n, f in FILES if "__all__" in f.read_text() and f.name != "page.py"],
    ids=lambda m: f"{m[0]}/{m[1].stem}",
)
def test_public_names_exist(module):
    package, file = module
    name = ".".join((package, *file.relative_to(ROOTS[package]).with_suffix("").parts))
    namespace = __import__(name, fromlist=["__all__"])
    assert all(hasattr(namespace, public) for public in namespace.__all__)
