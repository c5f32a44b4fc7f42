import argparse
import json
import subprocess
import sys

import numpy as np
import pytest
from deploy_bundle import linear_onnx, write_small_bundle
from fake_cudart import FakeCudart

from deploy.commands import add_commands
from deploy.errors import BadInputError, TamperedBundleError
from deploy.runtime import cudart

VERBS = ("verify", "bench", "infer")


def parser():
    parser = argparse.ArgumentParser(prog="edgereg")
    add_commands(parser.add_subparsers(required=True))
    return parser


def run(*arguments):
    args = parser().parse_args([str(argument) for argument in arguments])
    return args.handler(args)


@pytest.fixture
def path(tmp_path):
    return write_small_bundle(tmp_path / "b").path


@pytest.fixture
def wrong(tmp_path):
    model = linear_onnx(-np.eye(3))
    return write_small_bundle(tmp_path / "wrong", **{"model.fp32.onnx": model}).path


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_has_help(verb, capsys):
    with pytest.raises(SystemExit) as caught:
        run(verb, "--help")
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert all(flag in shown for flag in ("--json", "--backend", "--precision", "--threads"))


def test_verify_prints_every_stage_and_exits_0(path, capsys):
    assert run("verify", path) == 0
    shown = capsys.readouterr().out
    assert shown.count("pass") == 3
    assert "PNG decodes exactly" in shown
    assert shown.rstrip().endswith("verified")


def test_verify_of_a_wrong_model_exits_1_and_says_why(wrong, capsys):
    assert run("verify", wrong) == 1
    shown = capsys.readouterr().out
    assert shown.count("FAIL") == 2
    assert "scaled error" in shown and shown.rstrip().endswith("NOT verified")


def test_verify_prints_one_json_document(wrong, capsys):
    assert run("verify", wrong, "--json") == 1
    assert json.loads(capsys.readouterr().out)["passed"] is False


def test_verify_of_a_tampered_bundle_names_the_file(path):
    (path / "golden/0.png").write_bytes(b"x")
    with pytest.raises(TamperedBundleError, match=r"'golden/0\.png'"):
        run("verify", path)


@pytest.mark.parametrize("verb", VERBS)
def test_tensorrt_without_a_gpu_is_refused(verb, path, monkeypatch):
    monkeypatch.setattr(cudart, "load_cudart", lambda: FakeCudart(devices=0))
    rest = [path / "golden"] if verb == "infer" else []
    with pytest.raises(BadInputError, match="needs an NVIDIA GPU and its driver"):
        run(verb, path, *rest, "--backend", "tensorrt")


def test_bench_prints_a_table_and_says_what_the_sample_cannot(path, capsys):
    assert run("bench", path, "--count", 70) == 0
    shown = capsys.readouterr().out
    assert "n too small" in shown and "n = 70" in shown and "threads 1" in shown
    assert "timed outputs were checked and match the golden ones" in shown


def test_bench_writes_the_document_that_it_prints(path, tmp_path, capsys):
    out = tmp_path / "new" / "bench.json"
    assert run("bench", path, "--count", 5, "--json", "--out", out) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["runs"][0]["count"] == 5
    assert json.loads(out.read_text()) == document


def test_bench_of_a_wrong_model_exits_1(wrong, capsys):
    assert run("bench", wrong, "--count", 3) == 1
    assert "are WRONG" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags",
    [
        ("--duration", "0"),
        ("--duration", "nan"),
        ("--count", "0"),
        ("--count", "3", "--duration", "3"),
        ("--warmup", "-1"),
        ("--threads", "0"),
        ("--threads", "x"),
    ],
)
def test_bench_refuses_numbers_that_make_no_sense(path, flags, capsys):
    with pytest.raises(SystemExit) as caught:
        run("bench", path, *flags)
    assert caught.value.code == 2
    assert flags[0] in capsys.readouterr().err


def test_infer_prints_a_line_for_each_image(path, capsys):
    assert run("infer", path, path / "golden", "--top-k", 2) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert "red" in lines[0] and lines[0].count("%") == 2


def test_infer_exits_2_after_an_unreadable_image_and_loses_nothing(path, tmp_path, capsys):
    assert run("infer", path, tmp_path / "no.png", path / "golden") == 2
    shown = capsys.readouterr()
    assert len(shown.out.splitlines()) == 6
    assert "no.png" in shown.err and "1 of 7 could not be read" in shown.err


def test_infer_prints_json_lines_errors_among_them(path, tmp_path, capsys):
    assert run("infer", path, path / "golden/0.png", tmp_path / "no.png", "--json") == 2
    good, bad = map(json.loads, capsys.readouterr().out.splitlines())
    assert good["top"][0]["label"] == "red" and 0 < good["top"][0]["probability"] < 1
    assert good["path"].endswith("0.png")
    assert set(bad) == {"path", "error"}


def test_a_file_name_cannot_command_the_terminal(path, tmp_path, capsys):
    odd = tmp_path / "\x1b[2J\udcff.png"
    odd.write_bytes((path / "golden/0.png").read_bytes())
    assert run("infer", path, odd) == 0
    assert "\\x1b[2J\\udcff.png" in capsys.readouterr().out


def test_making_the_parsers_imports_neither_numpy_nor_a_backend():
    code = (
        "import sys; import deploy.commands as c; import argparse;"
        "c.add_commands(argparse.ArgumentParser().add_subparsers());"
        "print([m for m in ('numpy', 'PIL', 'onnxruntime', 'torch') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr
