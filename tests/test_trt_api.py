"""Every name of TensorRT that deploy uses, against the surface of each version that it supports.

In the files that speak to TensorRT a variable's name says its class (CLASSES). A name may be used
if every version has it, or inside an `if` that asks `hasattr` for it first. The names in the table
of dialects must be there in the versions of their row.
"""

import ast
import json
from pathlib import Path

import pytest

import deploy.runtime
from deploy.runtime.trt_versions import DIALECTS

API = json.loads((Path(__file__).parent / "data" / "tensorrt_api.json").read_text("utf-8"))
FILES = sorted(Path(deploy.runtime.__file__).parent.glob("trt_*.py"))
CLASSES = {
    "builder": "Builder",
    "cache": "ITimingCache",
    "cast": "ICastLayer",
    "config": "IBuilderConfig",
    "context": "IExecutionContext",
    "datatype": "DataType",
    "engine": "ICudaEngine",
    "error": "ParserError",
    "inspector": "EngineInspector",
    "layer": "ILayer",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "profile": "IOptimizationProfile",
    "runtime": "Runtime",
    "tensor": "ITensor",
}


def chain(node):
    """`trt.DataType.HALF` as ["trt", "DataType", "HALF"]; a leading `self._` is dropped."""
    if isinstance(node, ast.Name):
        return [node.id]
    if isinstance(node, ast.Attribute):
        before = chain(node.value)
        if before == ["self"]:
            return [node.attr.removeprefix("_")]
        return before and [*before, node.attr]
    return []


class Names(ast.NodeVisitor):
    """Collects (class, name) as used, but for those that an `if hasattr` around them asks for."""

    def __init__(self):
        self.used, self.guarded, self.unseen, self._guards = [], [], [], []

    def visit_If(self, node):
        is_and = isinstance(node.test, ast.BoolOp) and isinstance(node.test.op, ast.And)
        asked = {
            (*chain(call.args[0]), call.args[1].value)
            for call in (node.test.values if is_and else [node.test])
            if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "hasattr"
        }
        self.visit(node.test)
        self._guards.append(asked)
        for child in node.body:
            self.visit(child)
        self._guards.pop()
        for child in node.orelse:
            self.visit(child)

    def visit_Attribute(self, node):
        names = chain(node)
        if isinstance(node.value, ast.Call):
            called = chain(node.value.func)
            if called and called[0] in {*CLASSES, "trt"}:  # a result without a name of its own
                self.unseen.append(ast.unparse(node))
        if names and names[0] == "trt" and len(names) > 1:
            self._note(names, (names[1], names[2]) if len(names) > 2 else (names[1], None))
        elif len(names) == 2 and names[0] in CLASSES:
            self._note(names, (CLASSES[names[0]], names[1]))
        self.generic_visit(node)

    def visit_ClassDef(self, node):
        for base in node.bases:
            if chain(base)[:1] == ["trt"]:
                own = [item for item in node.body if isinstance(item, ast.FunctionDef)]
                methods = [item.name for item in own if not item.name.startswith("_")]
                self.used += [(chain(base)[1], name) for name in methods]
        self.generic_visit(node)

    def _note(self, names, use):
        if names[-1].startswith("__"):  # Python's own
            return
        is_guarded = any(tuple(names) in guard for guard in self._guards)
        (self.guarded if is_guarded else self.used).append(use)


def names_in(source):
    names = Names()
    names.visit(ast.parse(source))
    return names


def missing(uses, surface):
    """The names that a version lacks."""
    return sorted(
        {
            f"{kind}.{name}" if name else kind
            for kind, name in uses
            if kind not in surface or (name is not None and name not in surface[kind])
        }
    )


# A monitor is made only where `trt.IProgressMonitor` was asked for, by whoever calls `_monitor`.
ONLY_WHERE_ASKED = {
    ("IProgressMonitor", None),
    ("IProgressMonitor", "phase_start"),
    ("IProgressMonitor", "step_complete"),
    ("IProgressMonitor", "phase_finish"),
}


@pytest.mark.parametrize("version", API)
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_name_is_there_in_every_version(file, version):
    uses = set(names_in(file.read_text("utf-8")).used) - ONLY_WHERE_ASKED
    assert missing(uses, API[version]) == []


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_nothing_is_used_without_a_variable_whose_name_says_its_class(file):
    assert names_in(file.read_text("utf-8")).unseen == []
    assert names_in("config.get_timing_cache().serialize()").unseen


def test_names_that_only_some_versions_have_are_asked_for():
    guarded = {use for file in FILES for use in names_in(file.read_text("utf-8")).guarded}
    versions_with = {
        use: [version for version in API if missing([use], API[version]) == []] for use in guarded
    }
    assert ("ILayer", "precision") in guarded and ("ParserError", "node_name") in guarded
    ours = {("IBuilderConfig", "num_compute_capabilities"), ("ComputeCapability", None)}
    ours |= {("IBuilderConfig", "set_compute_capability")}  # of TensorRT-RTX alone
    for use, versions in versions_with.items():
        assert (use in ours) == (not versions), f"{use} is in no version"
        assert len(versions) < len(API), f"{use} is in every version and need not be asked for"


def test_a_monitor_is_made_only_where_it_was_asked_for():
    source = next(file for file in FILES if file.name == "trt_builder.py").read_text("utf-8")
    (call,) = (
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.If) and "_monitor(trt" in ast.unparse(node.body)
    )
    assert "hasattr(trt, 'IProgressMonitor')" in ast.unparse(call.test)
    for version, surface in API.items():
        has = "IProgressMonitor" in surface
        assert has == (not version.startswith("8.")), version


def versions_of(library, version):
    return [name for name in API if library == "tensorrt" and name.startswith(f"{version}.")]


@pytest.mark.parametrize("row", DIALECTS, ids="-".join)
def test_every_flag_of_a_dialect_is_there_in_the_versions_of_its_row(row):
    for dialect in filter(None, DIALECTS[row]):
        for version in versions_of(*row):
            surface = API[version]
            flags = {flag for flags in dialect.precision_flags.values() for flag in flags}
            assert flags <= surface["BuilderFlag"].keys()
            assert set(dialect.network_flags) <= surface["NetworkDefinitionCreationFlag"].keys()
            if dialect.constrains_layers:
                assert {"precision", "set_output_type"} <= set(surface["ILayer"])


def test_every_version_has_a_row():
    covered = {version for row in DIALECTS for version in versions_of(*row)}
    assert covered == set(API)


def test_names_that_are_given_as_text_are_there_in_every_version():
    from deploy.runtime import trt_layers

    for surface in API.values():
        layers = {*trt_layers._STATES_ITS_TYPE, *trt_layers._WEIGHTED}
        assert layers <= surface["LayerType"].keys()
        assert trt_layers._FLOATS.keys() <= surface["DataType"].keys()


@pytest.mark.parametrize(
    ("line", "lacking"),
    [
        ("builder.build_engine(network, config)", "Builder.build_engine"),
        ("config.max_workspace_size = 1", "IBuilderConfig.max_workspace_size"),
        ("trt.BuilderFlag.FP16", "BuilderFlag.FP16"),
        ("layer.precision = 1", "ILayer.precision"),
        ("self._context.execute_async_v2(bindings)", "IExecutionContext.execute_async_v2"),
        ("self._engine.num_bindings", "ICudaEngine.num_bindings"),
        ("trt.nptype", "nptype"),
        ("if hasattr(layer, 'precision'):\n    layer.set_output_type(0, 1)", "set_output_type"),
        (
            "if hasattr(layer, 'precision'):\n    pass\nelse:\n    layer.precision",
            "ILayer.precision",
        ),
        ("if not hasattr(layer, 'precision'):\n    layer.precision", "ILayer.precision"),
        ("if hasattr(layer, 'precision') or x:\n    layer.precision", "ILayer.precision"),
    ],
)
def test_a_name_that_a_version_lacks_is_found(line, lacking):
    found = [name for surface in API.values() for name in missing(names_in(line).used, surface)]
    assert any(lacking in name for name in found)


def test_a_name_that_was_asked_for_is_not_found():
    asked = "if hasattr(layer, 'precision'):\n    layer.precision = 1"
    assert (names_in(asked).used, names_in(asked).guarded) == ([], [("ILayer", "precision")])


def test_the_names_are_really_collected():
    used = {use for file in FILES for use in names_in(file.read_text("utf-8")).used}
    assert {
        ("Builder", "build_serialized_network"),
        ("IBuilderConfig", "set_memory_pool_limit"),
        ("OnnxParser", "parse"),
        ("ICudaEngine", "create_execution_context"),
        ("IExecutionContext", "execute_async_v3"),
        ("IExecutionContext", "set_tensor_address"),
        ("EngineInspector", "get_engine_information"),
        ("Runtime", "deserialize_cuda_engine"),
        ("ITimingCache", "serialize"),
        ("INetworkDefinition", "get_layer"),
        ("ITensor", "dtype"),
        ("IOptimizationProfile", "set_shape"),
        ("ICastLayer", "to_type"),
        ("DataType", "HALF"),
    } <= used
    assert {kind for kind, _ in used} >= set(CLASSES.values())
