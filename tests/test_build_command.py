import json
from types import SimpleNamespace

import pytest
from engine_models import fp32_onnx, write_engine_bundle
from fake_device import put_device
from fake_tensorrt import STYLES

from deploy.errors import BadInputError, CheckFailedError
from deploy.measure import engines
from deploy.measure.engines import fastest
from deploy.measure.statistics import Ratio
from deploy.runtime import cudart
from deploy.runtime.cudart import open_cuda
from deploy.runtime.engine_cache import EngineCache
from deploy.runtime.runner import open_runner
from deploy.runtime.trt_versions import load_tensorrt
from edgereg.cli import main


def build(capsys, *arguments):
    """The exit code and the JSON document of a build."""
    code = main(["build", *map(str, arguments), "--json"])
    return code, json.loads(capsys.readouterr().out)


def speed(median, low, high, failures=()):
    ratio = Ratio(median, (low, high), 20)
    return SimpleNamespace(
        ratios={"infer": ratio}, failures=failures, to_json=lambda: {"median": median}
    )


def time_as(monkeypatch, **speeds):
    """Let the engines take such times, of fp32's, instead of measuring."""
    monkeypatch.setattr(
        engines, "compare_speed", lambda variant, fp32, **_: speeds[variant[1].precision]
    )


def assert_every_variant_is_built_and_run(bundle, capsys):
    code, document = build(capsys, bundle)
    assert code == 0 and document["failures"] == {}
    assert list(document["engines"]) == ["fp32", "fp16", "int8"]
    for precision, engine in document["engines"].items():
        assert engine["reasons"] == ["there is none yet"]
        assert engine["sidecar"]["layers"][precision] > 0
        assert engine["verified"]["passed"]
        assert engine["verified"]["backend"].startswith("tensorrt ")
        assert set(engine["stages_s"]) == {"start", "parse", "build", "inspect"}
        backend = ["--backend", "tensorrt", "--precision", precision]
        assert main(["verify", str(bundle), *backend]) == 0
    assert "verified" in capsys.readouterr().out
    assert document["chosen"] in document["engines"]
    assert document["speeds"].keys() == {"fp16", "int8"}


@pytest.mark.parametrize("style", STYLES)
def test_every_variant_is_built_verified_timed_and_run(style, monkeypatch, tmp_path, capsys):
    put_device(monkeypatch, tmp_path, style)
    bundle = write_engine_bundle(tmp_path / "b").path
    assert_every_variant_is_built_and_run(bundle, capsys)


@pytest.mark.gpu
def test_every_variant_is_built_verified_timed_and_run_on_a_real_gpu(monkeypatch, tmp_path, capsys):
    try:
        open_cuda()
        load_tensorrt()
    except BadInputError as error:
        pytest.skip(f"no TensorRT on a GPU: {error.found}")
    monkeypatch.setenv("EDGEREG_CACHE", str(tmp_path / "engines"))
    bundle = write_engine_bundle(tmp_path / "b").path
    assert_every_variant_is_built_and_run(bundle, capsys)


def test_what_fits_is_kept_and_what_changed_is_named_and_built_again(monkeypatch, tmp_path, capsys):
    put_device(monkeypatch, tmp_path)
    bundle = write_engine_bundle(tmp_path / "b").path
    arguments = (bundle, "--precision", "fp32")
    _, first = build(capsys, *arguments)
    _, again = build(capsys, *arguments)
    assert not again["engines"]["fp32"]["is_new"] and again["engines"]["fp32"]["reasons"] == []
    _, tf32 = build(capsys, *arguments, "--tf32", "--batch", "4")
    assert tf32["engines"]["fp32"]["reasons"] == [
        "profile: built with 1, 1, 16, here 1, 4, 16",
        "flags: built with STRONGLY_TYPED, here STRONGLY_TYPED, TF32",
    ]
    _, forced = build(capsys, *arguments, "--tf32", "--batch", "4", "--force")
    assert forced["engines"]["fp32"]["reasons"] == ["it was asked for"]
    put_device(monkeypatch, tmp_path, "11", gpu="Thor")
    _, moved = build(capsys, *arguments)
    assert moved["engines"]["fp32"]["reasons"][:2] == [
        "tensorrt: built with 10.3.0, here 11.4.0",
        "gpu: built with Orin (fake), here Thor",
    ]
    hashes = [run["engines"]["fp32"]["sidecar"]["sha256"] for run in (first, again, moved)]
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"flips": ("logits",)}, "answers as the bundle's reference"),
        ({"ignores": ("stem/Conv",)}, "computes in it"),
    ],
)
def test_an_engine_that_fails_a_check_is_not_kept_and_the_older_one_stays(
    monkeypatch, tmp_path, capsys, options, found
):
    put_device(monkeypatch, tmp_path)
    bundle = write_engine_bundle(tmp_path / "b").path
    _, before = build(capsys, bundle, "--precision", "fp16")
    put_device(monkeypatch, tmp_path, **options)
    code, after = build(capsys, bundle, "--precision", "fp16", "--force")
    assert code == 1 and found in after["failures"]["fp16"]["rule"]
    assert after["engines"] == {}
    put_device(monkeypatch, tmp_path)
    _, kept = build(capsys, bundle, "--precision", "fp16")
    assert not kept["engines"]["fp16"]["is_new"]
    assert kept["engines"]["fp16"]["sidecar"] == before["engines"]["fp16"]["sidecar"]


def test_an_fp32_file_under_the_name_of_fp16_is_found_out(monkeypatch, tmp_path, capsys):
    put_device(monkeypatch, tmp_path)
    bundle = write_engine_bundle(tmp_path / "b", models={"fp16": fp32_onnx()}).path
    code, document = build(capsys, bundle, "--precision", "fp32,fp16")
    assert code == 1 and list(document["engines"]) == ["fp32"]
    assert document["failures"]["fp16"]["found"].startswith("no layer of 5 shows fp16")


@pytest.mark.parametrize(
    ("speeds", "chosen"),
    [
        ({}, "fp32"),
        ({"fp16": speed(0.5, 0.4, 0.6), "int8": speed(0.4, 0.3, 0.5)}, "int8"),
        ({"fp16": speed(0.5, 0.4, 0.6), "int8": speed(1.2, 1.1, 1.3)}, "fp16"),
        ({"fp16": speed(1.2, 1.1, 1.3), "int8": speed(1.1, 1.0, 1.2)}, "fp32"),
        ({"fp16": speed(0.9, 0.7, 1.1)}, "fp32"),
        ({"fp16": speed(0.5, 0.4, 0.6, failures=("throttled",))}, "fp32"),
    ],
)
def test_only_what_is_surely_faster_than_fp32_is_chosen(speeds, chosen):
    assert fastest(speeds) == chosen


def test_the_choice_is_run_where_no_precision_is_asked_for(monkeypatch, tmp_path, capsys):
    put_device(monkeypatch, tmp_path)
    bundle = write_engine_bundle(tmp_path / "b")
    with pytest.raises(BadInputError, match="there is none yet"):
        open_runner(bundle, backend="tensorrt", precision=None)
    time_as(monkeypatch, fp16=speed(0.5, 0.4, 0.6), int8=speed(1.2, 1.1, 1.3))
    assert main(["build", str(bundle.path)]) == 0
    shown = capsys.readouterr().out
    assert "chosen, where no precision is asked for: fp16" in shown
    assert "int8: 1.200 [1.100, 1.300] of fp32's time, n = 20, 95 %: not faster" in shown
    assert open_runner(bundle, backend="tensorrt", precision=None).precision == "fp16"
    assert open_runner(bundle, backend="tensorrt", precision="int8").precision == "int8"
    monkeypatch.setattr(cudart, "load_cudart", lambda: None)
    assert open_runner(bundle, backend="onnxruntime", precision=None).precision == "fp32"


def test_what_was_built_before_is_compared_too(monkeypatch, tmp_path, capsys):
    put_device(monkeypatch, tmp_path)
    bundle = write_engine_bundle(tmp_path / "b").path
    time_as(monkeypatch, fp16=speed(0.5, 0.4, 0.6), int8=speed(0.3, 0.2, 0.4))
    assert build(capsys, bundle, "--precision", "fp32,int8")[1]["chosen"] == "int8"
    _, document = build(capsys, bundle, "--precision", "fp16")
    assert document["chosen"] == "int8" and document["speeds"].keys() == {"fp16", "int8"}


def test_without_an_fp32_engine_nothing_is_chosen(monkeypatch, tmp_path, capsys):
    put_device(monkeypatch, tmp_path)
    bundle = write_engine_bundle(tmp_path / "b")
    assert main(["build", str(bundle.path), "--precision", "fp16"]) == 0
    assert "no choice: without an fp32 engine" in capsys.readouterr().out
    with pytest.raises(BadInputError, match="name one with --precision"):
        open_runner(bundle, backend="tensorrt", precision=None)


def test_a_runner_refuses_an_engine_of_another_model_or_machine_and_names_the_field(
    monkeypatch, tmp_path, capsys
):
    put_device(monkeypatch, tmp_path)
    write_engine_bundle(tmp_path / "b")
    build(capsys, tmp_path / "b", "--precision", "fp16")
    other = write_engine_bundle(tmp_path / "c")
    assert open_runner(other, backend="tensorrt", precision="fp16").precision == "fp16"
    changed = write_engine_bundle(tmp_path / "d", models={"fp16": fp32_onnx()})
    with pytest.raises(BadInputError, match=r"onnx_sha256: built with .*edgereg build d"):
        open_runner(changed, backend="tensorrt", precision="fp16")
    put_device(monkeypatch, tmp_path, gpu="Thor")
    with pytest.raises(BadInputError, match=r"gpu: built with Orin \(fake\), here Thor"):
        open_runner(other, backend="tensorrt", precision="fp16")


def test_a_tampered_plan_reaches_no_parser_and_is_built_again(monkeypatch, tmp_path, capsys):
    _, trt = put_device(monkeypatch, tmp_path)
    bundle = write_engine_bundle(tmp_path / "b")
    build(capsys, bundle.path, "--precision", "fp32")
    (plan,) = EngineCache().folder.glob("*.plan")
    plan.write_bytes(plan.read_bytes()[:-1] + b"!")
    monkeypatch.setattr(trt.Runtime, "deserialize_cuda_engine", None)
    with pytest.raises(CheckFailedError, match="has another sha256"):
        open_runner(bundle, backend="tensorrt", precision="fp32")
    put_device(monkeypatch, tmp_path)
    _, document = build(capsys, bundle.path, "--precision", "fp32")
    assert document["engines"]["fp32"]["reasons"] == [f"'{plan.name}' has another sha256"]


def test_what_was_timed_is_kept_for_the_next_build(monkeypatch, tmp_path, capsys):
    put_device(monkeypatch, tmp_path)
    bundle = write_engine_bundle(tmp_path / "b").path
    for expected in (b"+", b"++"):
        build(capsys, bundle, "--precision", "fp32", "--force")
        (path,) = EngineCache().folder.glob("*.timing")
        assert path.read_bytes()[32:] == expected


def test_a_dla_takes_all_variants_but_fp32_and_names_what_it_cannot(monkeypatch, tmp_path, capsys):
    put_device(monkeypatch, tmp_path, dla_cores=1)
    bundle = write_engine_bundle(tmp_path / "b", batch=1)
    code, document = build(capsys, bundle.path, "--dla", "0")
    assert code == 0 and list(document["engines"]) == ["fp16", "int8"]
    runner = open_runner(bundle, backend="tensorrt", precision="fp16")
    assert "DLA 0" in runner.name and runner.uses_graph


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (("--precision", "fp8"), "'fp8'; bundle 'b' has fp32, fp16, int8"),
        (("--batch", "17"), "--batch 17"),
        (("--dla", "0"), "a profile of 1 to 16"),
    ],
)
def test_what_cannot_be_built_is_refused(monkeypatch, tmp_path, capsys, arguments, found):
    put_device(monkeypatch, tmp_path)
    bundle = write_engine_bundle(tmp_path / "b").path
    assert main(["build", str(bundle), *arguments]) == 2
    assert found in capsys.readouterr().err


def test_threads_are_not_for_the_gpu(monkeypatch, tmp_path):
    put_device(monkeypatch, tmp_path)
    bundle = write_engine_bundle(tmp_path / "b")
    with pytest.raises(BadInputError, match="4 CPU threads asked for"):
        open_runner(bundle, backend="tensorrt", precision="fp32", threads=4)
