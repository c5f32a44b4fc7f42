import importlib.util
import json
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from engine_models import MODELS, fp16_onnx, fp32_onnx, int8_onnx
from fake_cudart import FakeCudart
from fake_device import put_device
from fake_tensorrt import API, STYLES, make

from deploy.errors import BadInputError, CheckFailedError
from deploy.runtime import engine_build
from deploy.runtime.engine_build import Limits, available_bytes, build_engine, workspace_bytes
from deploy.runtime.trt_builder import BuildRequest, build_plan, engine_flags, inspect_plan
from deploy.runtime.trt_layers import BuiltLayer, constrain, judge_types, read_layers, wanted_types
from deploy.runtime.trt_versions import DIALECTS, dialect_of, error_log, load_tensorrt

MIB = 1 << 20
FLAGS = {
    "8.6": {
        "fp32": ("EXPLICIT_BATCH",),
        "fp16": ("EXPLICIT_BATCH", "FP16", "OBEY_PRECISION_CONSTRAINTS"),
        "int8": ("EXPLICIT_BATCH", "INT8"),
    },
    "10": dict.fromkeys(MODELS, ("STRONGLY_TYPED",)),
    "11": dict.fromkeys(MODELS, ()),
}
ISLAND = ("pool/GlobalAveragePool", "pool/Flatten")

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason="TensorRT-RTX is not installed: pip install 'edgereg[conformance]'",
)


def fake(style="10", **options):
    cuda = FakeCudart()
    cuda.call("cudaGetDeviceCount")
    return make(STYLES.get(style, style), cuda, **options)


def build(trt, precision, *, batch="batch", model=None, **request):
    profile = (1, 1, 16) if batch == "batch" else (1, 1, 1)
    request = BuildRequest(precision, profile, **request)
    model = model or MODELS[precision](batch=batch)
    return build_plan(trt, model, request, workspace_bytes=64 * MIB), request


def judged(trt, precision, **options):
    """What was built, as the engine's own layer information tells it."""
    built, request = build(trt, precision, **options)
    layers = read_layers(inspect_plan(trt, built.plan, request))
    return judge_types(precision, built.wanted, layers, is_constrained=request.dla is None)


# --- TensorRT-RTX: NVIDIA's parser and builder, on the CPU ---


@pytest.fixture(scope="module")
def rtx():
    return pytest.importorskip("tensorrt_rtx")


@needs_rtx
@pytest.mark.parametrize("batch", [1, "batch"])
@pytest.mark.parametrize("precision", MODELS)
@pytest.mark.parametrize("proxy", ["SM86", "SM120"])
def test_nvidias_own_builder_builds_every_variant(rtx, precision, batch, proxy):
    stages = []
    profile = (1, 1, 16) if batch == "batch" else (1, 1, 1)
    built = build_plan(
        rtx,
        MODELS[precision](batch=batch),
        BuildRequest(precision, profile, compute_capability=proxy),
        workspace_bytes=64 * MIB,
        on_stage=stages.append,
    )
    assert len(built.plan) > 1000
    assert stages[:2] == ["parse", "build"] and any(stage.startswith("build: ") for stage in stages)


@needs_rtx
@pytest.mark.parametrize("precision", MODELS)
def test_the_types_that_we_read_are_those_that_nvidias_parser_reports(rtx, precision):
    """Strongly typed, a tensor says its type; ours come from the sources alone, as for 8.6."""
    log = error_log(rtx)
    builder = rtx.Builder(log)
    network = builder.create_network(1 << int(rtx.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = rtx.OnnxParser(network, log)
    assert parser.parse(MODELS[precision]())
    wanted = wanted_types(rtx, network)
    names = {rtx.DataType.FLOAT: "fp32", rtx.DataType.HALF: "fp16"}
    compared = 0
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        reported = names.get(layer.get_output(0).dtype)
        ours = wanted.get(layer.name)
        if ours in names.values():
            assert ours == reported
            compared += 1
        elif ours == "int8":
            assert layer.type == rtx.LayerType.CONVOLUTION
        else:
            assert ours == "own" or reported is None
    assert compared >= 3
    assert ("int8" in wanted.values()) == (precision == "int8")
    assert {wanted[name] for name in ISLAND} == {"fp32"}
    assert wanted["head/MatMul"] == ("fp16" if precision == "fp16" else "fp32")


@needs_rtx
def test_nvidias_parser_names_the_node_that_it_refuses(rtx):
    with pytest.raises(BadInputError, match=r"node 'stem/Unique' \(Unique\)"):
        build(rtx, "fp32", model=with_operator("Unique"), compute_capability="SM86")


@needs_rtx
def test_nvidias_builder_says_why_it_builds_none(rtx):
    too_small = BuildRequest("fp32", (2, 1, 0), compute_capability="SM86")
    with pytest.raises((CheckFailedError, RuntimeError), match=r"(?i)profile|kMIN|min"):
        build_plan(rtx, fp32_onnx(), too_small, workspace_bytes=64 * MIB)


@needs_rtx
def test_the_child_process_builds_with_nvidias_builder(monkeypatch, tmp_path):
    monkeypatch.setattr(engine_build, "_TENSORRT", "tensorrt_rtx")
    request = BuildRequest("fp16", (1, 1, 16), compute_capability="SM86")
    outcome = build_engine(
        fp16_onnx(), request, folder=tmp_path, limits=Limits(workspace_bytes=64 * MIB)
    )
    assert len(outcome.plan) > 1000 and outcome.types is None
    assert outcome.stages_s.keys() == {"start", "parse", "build"}


def with_operator(operator):
    """The network with its activation replaced."""
    model = onnx.load_from_string(fp32_onnx())
    (node,) = (node for node in model.graph.node if node.op_type == "Relu")
    node.op_type, node.name = operator, f"stem/{operator}"
    return model.SerializeToString()


# --- Doubles in the styles of 8.6, 10 and 11 ---


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("precision", MODELS)
def test_each_version_is_told_the_precision_in_its_own_way(style, precision):
    assert engine_flags(fake(style), BuildRequest(precision)) == FLAGS[style][precision]


@pytest.mark.parametrize("version", API)
@pytest.mark.parametrize("precision", MODELS)
def test_the_precision_built_is_the_precision_asked_for(version, precision):
    types = judged(fake(version), precision)
    assert types.problems == () and types.notes == ()
    assert types.layers[precision] > 0


@pytest.mark.parametrize("style", STYLES)
def test_islands_of_fp32_stay(style):
    built, request = build(fake(style), "fp16")
    layers = read_layers(inspect_plan(fake(style), built.plan, request))
    types = {layer.name: layer.types for layer in layers}
    assert [types[name] for name in ISLAND] == [{"fp32"}] * 2
    assert types["stem/Conv"] == types["head/MatMul"] == {"fp16"}


def test_without_constraints_version_8_6_would_lose_the_islands(monkeypatch):
    monkeypatch.setattr("deploy.runtime.trt_builder.constrain", lambda *_: None)
    types = judged(fake("8.6"), "fp16")
    assert any("'pool/Flatten' is to be fp32 and is fp16" in text for text in types.problems)


def test_without_its_flag_version_8_6_would_build_fp32(monkeypatch):
    weak = DIALECTS["tensorrt", "8.6"]
    monkeypatch.setitem(DIALECTS, ("tensorrt", "8.6"), (DIALECTS["tensorrt", "11"][0], weak[1]))
    monkeypatch.setattr("deploy.runtime.trt_builder._bits", lambda *_: 1)
    types = judged(fake("8.6"), "fp16")
    assert types.problems[0] == "no layer of 5 shows fp16"


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_a_layer_that_was_silently_built_in_fp32_is_named(style, precision):
    types = judged(fake(style, ignores=("stem/Conv",)), precision)
    text = " ".join((*types.problems, *types.notes))
    assert "'stem/Conv' " in text and "is fp32" in text
    assert bool(types.problems)


def test_constraints_are_set_on_every_layer_that_computes_and_on_no_other():
    trt = fake("8.6")
    network = trt.Builder(trt.ILogger()).create_network(1)
    assert trt.OnnxParser(network, None).parse(fp16_onnx())
    wanted = wanted_types(trt, network)
    constrain(trt, network, wanted)
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        kind = {"fp32": trt.DataType.FLOAT, "fp16": trt.DataType.HALF}.get(wanted[layer.name])
        assert layer.precision == layer._output_type == kind
    assert {"own", "fp32", "fp16"} == set(wanted.values())


def configs_of(trt):
    """The configurations that a module's builders are given, in order."""
    seen, build_it = [], trt.Builder.build_serialized_network
    trt.Builder.build_serialized_network = lambda self, network, config: (
        seen.append(config) or build_it(self, network, config)
    )
    return seen


@pytest.mark.parametrize("style", STYLES)
def test_a_constant_takes_the_type_of_what_it_is_combined_with(style):
    """In a weakly typed network a constant of fp16 may say that it is fp32."""
    model = onnx.load_from_string(fp16_onnx())
    relu = next(node for node in model.graph.node if node.op_type == "Relu")
    index = list(model.graph.node).index(relu)
    relu.output[0] = "before"
    product = onnx.helper.make_node("Mul", ["factor", "before"], ["r16"], "stem/Mul")
    model.graph.node.insert(index + 1, product)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.float16([0.5]), "factor"))
    built, _ = build(fake(style), "fp16", model=model.SerializeToString())
    assert built.wanted["stem/Mul"] == "fp16"


@pytest.mark.parametrize("allows", [False, True])
@pytest.mark.parametrize("style", STYLES)
def test_tf32_is_off_unless_it_is_asked_for(style, allows):
    trt = fake(style)
    configs = configs_of(trt)
    _, request = build(trt, "fp32", allows_tf32=allows)
    assert ("TF32" in {flag.name for flag in configs[0]._flags}) == allows
    assert ("TF32" in engine_flags(trt, request)) == allows


def test_the_workspace_and_the_profile_reach_the_builder():
    trt = fake()
    configs = configs_of(trt)
    request = BuildRequest("fp32", (1, 4, 16))
    build_plan(trt, fp32_onnx(), request, workspace_bytes=12345)
    assert configs[0]._pools == {trt.MemoryPoolType.WORKSPACE: 12345}
    assert configs[0]._profile._shapes == {"images": [[n, 3, 8, 8] for n in (1, 4, 16)]}


def test_what_was_timed_is_given_to_the_next_build():
    trt = fake()
    first = build_plan(trt, fp32_onnx(), BuildRequest("fp32", (1, 1, 16)), workspace_bytes=MIB)
    again = build_plan(
        trt,
        fp32_onnx(),
        BuildRequest("fp32", (1, 1, 16)),
        workspace_bytes=MIB,
        timing_cache=first.timing_cache,
    )
    assert again.timing_cache == first.timing_cache + b"+"


def test_timings_that_tensorrt_refuses_are_begun_anew():
    request = BuildRequest("fp32", (1, 1, 16))
    built = build_plan(fake(), fp32_onnx(), request, workspace_bytes=MIB, timing_cache=b"corrupt")
    assert built.timing_cache == b"+"


@pytest.mark.parametrize(
    ("style", "found"),
    [("8.6", "node 1: No importer"), ("10", r"node 'stem/Unique' \(Unique\): No importer")],
)
def test_a_node_that_the_parser_does_not_know_is_named_as_the_version_can(style, found):
    with pytest.raises(BadInputError, match=found):
        build(fake(style), "fp32", model=with_operator("Unique"))


def test_only_tensorrt_rtx_builds_for_a_gpu_that_is_not_here():
    with pytest.raises(BadInputError, match="SM86 asked for"):
        build(fake(), "fp32", compute_capability="SM86")


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_a_dla_gets_what_it_can_compute_and_the_rest_is_named(style, precision):
    trt = fake(style, dla_cores=2)
    model = with_softmax(MODELS[precision](batch=1))
    built, request = build(trt, precision, batch=1, dla=1, model=model)
    assert built.gpu_layers == ("end/Softmax",)
    assert "DLA core 1" in engine_flags(trt, request)
    assert "GPU_FALLBACK" in engine_flags(trt, request)
    assert judged(trt, precision, batch=1, dla=1, model=model).problems == ()


def with_softmax(data):
    model = onnx.load_from_string(data)
    model.graph.node[-1].output[0] = "before"
    model.graph.node.append(
        onnx.helper.make_node("Softmax", ["before"], ["logits"], "end/Softmax", axis=1)
    )
    return model.SerializeToString()


@pytest.mark.parametrize(
    ("request_", "found"),
    [
        (BuildRequest("fp16", dla=0), "core 0; it has 0"),
        (BuildRequest("fp32", dla=0), "found: fp32"),
        (BuildRequest("fp16", (1, 1, 16), dla=0), "a profile of 1 to 16"),
    ],
)
def test_what_a_dla_cannot_do_is_refused(request_, found):
    with pytest.raises(BadInputError, match=found):
        build_plan(fake(), fp16_onnx(batch=1), request_, workspace_bytes=MIB)


def test_a_version_that_is_not_in_the_table_is_refused(monkeypatch):
    for version in ("8.5.2", "7.1.3", "9.3.0", "12.0.0", "unknown"):
        with pytest.raises(BadInputError, match=r"8\.6, 10, 11; found: " + version):
            dialect_of(SimpleNamespace(__name__="tensorrt", __version__=version))


def test_without_tensorrt_it_is_said_where_it_comes_from(monkeypatch):
    monkeypatch.setitem(importlib.import_module("sys").modules, "tensorrt", None)
    with pytest.raises(BadInputError, match="python3-libnvinfer"):
        load_tensorrt()


# --- The layer information ---


def information(*layers):
    return json.dumps({"Layers": list(layers), "Bindings": []})


def entry(name, *shown, **more):
    return {"Name": name, "Inputs": [{"Format/Datatype": s} for s in shown], "Outputs": [], **more}


@pytest.mark.parametrize(
    ("shown", "kind"),
    [
        ("Float", "fp32"),
        ("Half", "fp16"),
        ("Int8", "int8"),
        ("BFloat16", "bf16"),
        ("FP8", "fp8"),
        ("Row major linear FP32", "fp32"),
        ("Channel major FP16 format where channel % 8 == 0", "fp16"),
        ("Thirty-two wide channel vectorized row major Int8 format", "int8"),
        ("Half(64,1:8,8)", "fp16"),
        ("N/A due to dynamic shapes", None),
        ("Int32", None),
        ("UInt8", None),
        ("Bool", None),
    ],
)
def test_a_type_is_read_in_the_words_of_each_version(shown, kind):
    (layer,) = read_layers(information(entry("a", shown)))
    assert layer.types == ({kind} if kind else set())


def test_a_type_is_read_from_the_weights_too():
    weights = {"Type": "Half", "Count": 9}
    (layer,) = read_layers(information(entry("a", "N/A due to dynamic shapes", Weights=weights)))
    assert layer.types == {"fp16"}


def test_the_parts_of_a_fused_layer_are_found_in_its_name_and_in_its_metadata():
    metadata = "[ONNX Layer: d/Mul]\x1f[ONNX Layer: e/Add]"
    fused = entry("a/Conv + PWN(b/Relu, c/Add)", "Half", Metadata=metadata)
    (layer,) = read_layers(information(fused))
    assert {"a/Conv", "b/Relu", "c/Add", "d/Mul", "e/Add"} <= layer.parts


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"Layers": ["a name only"]}', '{"Layers": 3}'])
def test_information_without_types_is_refused(text):
    with pytest.raises(CheckFailedError, match="lists its layers with their types"):
        read_layers(text)


def layer(parts, *types):
    return BuiltLayer(" + ".join(parts), frozenset(parts), frozenset(types))


WANTED = {"a": "fp16", "b": "fp16", "island": "fp32", "cast": "own", "conv": "int8"}


@pytest.mark.parametrize(
    ("precision", "layers", "problem"),
    [
        ("fp16", [layer("ab", "fp16")], None),
        ("fp16", [layer("ab", "fp32"), layer("x", "fp16")], "'a + b' is to be fp16 and is fp32"),
        ("fp16", [layer("a", "fp16"), layer(["island"], "fp16")], "'island' is to be fp32"),
        ("fp16", [layer(["a", "cast", "island"], "fp16")], None),
        ("fp16", [layer("a", "fp16", "fp32")], None),
        ("fp16", [layer("x", "fp32")], "no layer of 1 shows fp16"),
        ("fp16", [layer("a", "fp16"), layer("x", "int8")], "'x' computes in int8"),
        ("fp16", [layer("a", "bf16"), layer("b", "fp16")], "'a' computes in bf16"),
        ("fp32", [layer(["island"], "fp32")], None),
        ("fp32", [layer(["island"], "fp32"), layer("x", "fp16")], "'x' computes in fp16"),
        ("int8", [layer(["conv"], "int8")], None),
        ("int8", [layer(["island"], "fp32")], "no layer of 1 shows int8"),
        ("int8", [], "no layer of 0 shows int8"),
    ],
)
def test_what_was_built_is_judged_layer_by_layer(precision, layers, problem):
    found = judge_types(precision, WANTED, layers).problems
    assert len(found) == (problem is not None)
    assert problem is None or problem in found[0]


def test_a_product_that_is_not_int8_is_noted_and_no_failure():
    layers = [layer(["conv"], "fp32"), layer("x", "int8")]
    types = judge_types("int8", WANTED, layers)
    assert types.problems == () and types.notes == ("'conv' could be int8 and is fp32",)


# --- The process around it ---


def outcome_of(folder, *, precision="fp32", limits=None, on_stage=lambda stage: None):
    folder.mkdir(exist_ok=True)
    request = BuildRequest(precision, (1, 1, 16))
    model = MODELS[precision]()
    return build_engine(model, request, folder=folder, limits=limits or Limits(), on_stage=on_stage)


def test_a_child_builds_inspects_and_takes_half_of_what_is_free(monkeypatch, tmp_path):
    put_device(monkeypatch, tmp_path, "11")
    stages = []
    outcome = outcome_of(tmp_path / "w", precision="int8", on_stage=stages.append)
    assert outcome.types.layers["int8"] == 1 and outcome.types.problems == ()
    assert outcome.workspace_bytes == (1 << 30) // 2  # of the double's GiB
    assert set(outcome.stages_s) == {"start", "parse", "build", "inspect"}
    assert all(stage.endswith(" s") for stage in stages) and stages


@pytest.mark.parametrize(
    ("child", "limits", "found"),
    [
        ("import os; os.kill(os.getpid(), 11)", Limits(), "it ended with status -11"),
        ("import os; os.kill(os.getpid(), 9)", Limits(), "killed, most likely for want of memory"),
        ("raise MemoryError('too much')", Limits(), "MemoryError: too much"),
        ("import time; time.sleep(60)", Limits(time_s=0.3), r"nothing after 0\.3 s, during: start"),
        (
            "x = b'x' * (200 << 20); import time; time.sleep(60)",
            Limits(memory_bytes=100 * MIB),
            r"out of memory: \d+ MiB during: start; 100 MiB cap",
        ),
    ],
)
def test_a_build_that_crashes_hangs_or_grows_is_stopped_and_it_is_said_why(
    monkeypatch, tmp_path, child, limits, found
):
    monkeypatch.setattr(engine_build, "_CHILD", child)
    with pytest.raises(CheckFailedError, match=found):
        outcome_of(tmp_path / "w", limits=limits)


def test_a_machine_that_runs_out_of_memory_stops_the_build(monkeypatch, tmp_path):
    monkeypatch.setattr(engine_build, "_CHILD", "import time; time.sleep(60)")
    monkeypatch.setattr(engine_build, "available_bytes", lambda: 63 * MIB)
    with pytest.raises(CheckFailedError, match="the machine has 63 MiB left, during: start"):
        outcome_of(tmp_path / "w")


def test_an_error_of_the_child_is_the_parents(monkeypatch, tmp_path):
    put_device(monkeypatch, tmp_path)
    request = BuildRequest("fp32", (1, 1, 16))
    with pytest.raises(BadInputError, match=r"node 'stem/Unique' \(Unique\)"):
        build_engine(with_operator("Unique"), request, folder=tmp_path, limits=Limits())


def test_half_of_the_free_memory_is_the_workspace_and_a_shared_one_counts_once():
    assert workspace_bytes(100, 60, is_integrated=False) == 50
    assert workspace_bytes(100, 60, is_integrated=True) == 30
    assert workspace_bytes(40, 60, is_integrated=True) == 20


def test_the_available_memory_is_read(tmp_path):
    (tmp_path / "proc").mkdir()
    text = "MemTotal: 8000 kB\nMemFree: 100 kB\nMemAvailable: 4096 kB\n"
    (tmp_path / "proc/meminfo").write_text(text, "ascii")
    assert available_bytes(tmp_path) == 4 * MIB
    assert available_bytes() > MIB


def test_the_networks_of_these_tests_are_what_onnx_runtime_computes():
    import onnxruntime
    from engine_models import TOLERANCES, reference

    images = np.random.default_rng(0).normal(size=(4, 3, 8, 8)).astype(np.float32)
    wanted = reference(images)
    for precision, make_model in (("fp32", fp32_onnx), ("fp16", fp16_onnx), ("int8", int8_onnx)):
        session = onnxruntime.InferenceSession(make_model(), providers=["CPUExecutionProvider"])
        (found,) = session.run(None, {"images": images})
        error = np.abs(found - wanted).max() / np.abs(wanted).max()
        assert error < TOLERANCES[precision].max_scaled_error
