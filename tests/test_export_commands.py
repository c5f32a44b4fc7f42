import json

import pytest

from edgereg.checkpoint import Checkpoint, save_checkpoint
from edgereg.cli import main
from edgereg.data.emoji10 import Emoji10
from edgereg.models.zoo import ModelConfig, build_model
from edgereg.recipe import Recipe

VAL, CALIB = "emoji-10:twitter:test", "emoji-10:google:train"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A checkpoint with random weights, and a bundle of it."""
    folder = tmp_path_factory.mktemp("commands")
    names = Emoji10(vendor="twitter", split="test").class_names
    config = ModelConfig(name="resnet", image_size=32)
    said = Checkpoint(
        "classifier", Recipe(model=config), names, {"name": "d", "count": 4, "sha256": "0" * 64}, {}
    )
    save_checkpoint(folder / "model", build_model(config, num_classes=10), said)
    command = ["export", folder / "model", "--target", "onnxruntime-x86", "--data", VAL]
    assert run(*command, "--out", folder / "m.bundle") == 0
    return folder


def run(*words) -> int:
    return main([str(word) for word in words])


def refused(capsys, *words, found, remedy):
    capsys.readouterr()
    assert run(*words) == 2
    said = capsys.readouterr().err
    assert found in said and remedy in said


def test_an_export_writes_its_reports_beside_the_bundle(root, capsys):
    assert sorted(path.name for path in root.iterdir()) == [
        "m.bundle",
        "m.report.html",
        "m.report.json",
        "model",
    ]
    document = json.loads((root / "m.report.json").read_text())
    fp32 = document["variants"]["fp32"]
    assert fp32["gate"]["passed"] and fp32["accuracy"]["flips"] == fp32["accuracy"]["ties"]
    assert document["resize_ablation"]["count"] == fp32["accuracy"]["count"] == 248
    page = (root / "m.report.html").read_text()
    for text in ("Accuracy on held-out images", "With another resize", "Nothing here was run on a"):
        assert text in page
    assert str(root) not in page


def test_an_earlier_report_is_kept_without_force(root, capsys):
    (root / "n.report.json").write_text("somebody's")
    refused(
        capsys,
        *("export", root / "model", "--target", "onnxruntime-x86", "--data", VAL),
        *("--out", root / "n.bundle"),
        found="n.report.json",
        remedy="--force",
    )
    assert (root / "n.report.json").read_text() == "somebody's"
    (root / "n.report.json").unlink()


def test_a_bundle_and_its_checkpoint_are_compared_module_by_module(root, capsys):
    assert run("inspect", root / "m.bundle", "--diff", root / "model") == 0
    out = capsys.readouterr().out
    assert "backbone.blocks.0" in out and "they do not part: output error" in out
    assert run("inspect", root / "m.bundle", "--diff", root / "model", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["fp32"]["parting"] is None and len(document["fp32"]["modules"]) > 20


def test_a_bundle_of_other_weights_parts_at_the_first_module(root, capsys):
    config = ModelConfig(name="resnet", image_size=32)
    names = Emoji10(vendor="twitter", split="test").class_names
    said = Checkpoint(
        "classifier", Recipe(model=config), names, {"name": "d", "count": 4, "sha256": "0" * 64}, {}
    )
    other = build_model(config, num_classes=10, seed=1)
    save_checkpoint(root / "other", other, said, force=True)
    assert run("inspect", root / "m.bundle", "--diff", root / "other") == 1
    assert "they part at backbone.stem.0 (Conv2d)" in capsys.readouterr().out


def test_bisect_makes_the_variants_and_writes_nothing(root, capsys):
    before = sorted(root.rglob("*"))
    command = ("export", root / "model", "--target", "jetpack6.2", "--data", VAL, "--bisect")
    assert run(*command, "--precision", "fp16,int8", "--calib", CALIB) == 0
    out = capsys.readouterr().out
    assert out.count("they do not part") == 2 and out.startswith("fp16\n")
    assert sorted(root.rglob("*")) == before
    refused(capsys, *command, "--precision", "int8", found="found:  0", remedy="--calib")


def test_a_bundle_is_handed_over_to_triton(root, tmp_path, capsys):
    assert run("export", root / "m.bundle", "--to", "triton", "--out", tmp_path / "t") == 0
    assert (tmp_path / "t/model/config.pbtxt").is_file()
    refused(
        capsys,
        *("export", root / "m.bundle", "--to", "triton", "--bisect"),
        found="--bisect",
        remedy="--out",
    )


@pytest.mark.parametrize(
    ("words", "found", "remedy"),
    [
        (["--precision", "fp61"], "'fp61'", "did you mean 'fp16'?"),
        (["--precision", "int8"], "found:  0", "--calib"),
        (["--index", "x.index"], "--index without --calib", "leave it out"),
        (["--gate", "int9=0.1"], "'int9=0.1'", "int8"),
        (["--calib", VAL, "--precision", "int8"], "images in both", "edgereg data check --against"),
    ],
)
def test_wrong_use_says_rule_found_and_remedy(words, found, remedy, root, tmp_path, capsys):
    command = ("export", root / "model", "--target", "jetpack6.2", "--data", VAL)
    refused(capsys, *command, "--out", tmp_path / "x", *words, found=found, remedy=remedy)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_needs_a_target_and_images(root, tmp_path, capsys):
    refused(
        capsys,
        *("export", root / "model", "--out", tmp_path / "x"),
        found="no --target",
        remedy="--data VAL",
    )
