import json

import pytest
from engine_models import fp32_onnx, write_engine_bundle
from fake_device import put_device
from fake_tensorrt import STYLES

from deploy.runtime import engine_build
from deploy.runtime.cudart import Cuda
from deploy.runtime.engine_cache import EngineCache
from deploy.runtime.trt_runner import TrtRunner
from edgereg.cli import main


def build(capsys, *arguments):
    """The exit code and the JSON document of a build."""
    code = main(["build", *map(str, arguments), "--json"])
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("style", STYLES)
def test_every_variant_is_built_verified_and_run(style, monkeypatch, tmp_path, capsys):
    put_device(monkeypatch, tmp_path, style)
    bundle = write_engine_bundle(tmp_path / "b").path
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
