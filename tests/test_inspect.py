import json
import subprocess
import sys
from pathlib import Path

import pytest
from deploy_bundle import write_small_bundle
from torch import nn

from deploy.inspection import Inspection
from edgereg.checkpoint import Checkpoint, save_checkpoint
from edgereg.cli import main
from edgereg.inspection import _usual_size
from edgereg.models.zoo import MODELS, ModelConfig, build_model
from edgereg.recipe import Recipe
from export.traced.report import Change, Counts, PassReport, SimplifyReport

ROOT = Path(__file__).parent.parent
FEW = PassReport(
    (Change("bn1", "folded into conv1", "b", "c"), Change("bn2", "folded into conv2", "b", "c")),
    {"norm3": "it follows aten.cat, not a convolution or linear layer"},
)
SMALL = ModelConfig("resnet", image_size=16, width=4, blocks=(1, 1))


def report(passes=None, **errors):
    """What an export would store, of a simplification with these passes."""
    passes = passes or {"strip_dropout": PassReport(), "fold_batchnorm": FEW}
    known = {"bn1": 3e-16, "bn2": 0.0} | errors
    before, after = Counts(32, 78_042, 3, 1), Counts(22, 77_706, 1, 0)
    return SimplifyReport(passes, known, 4e-15, 0.0, (6, 1), before, after).to_json()


def text(passes, *, show_all=False, **errors):
    document = report(passes, **errors)
    return Inspection("b", "bundle", "x", (8, 8), document).to_text(show_all=show_all)


def many(count=14, *, prefix="layer"):
    return tuple(
        Change(f"{prefix}{i}.bn", f"folded into {prefix}{i}.conv", "b", "c") for i in range(count)
    )


def bundle_of(path, document):
    return write_small_bundle(path, **{"simplify.json": json.dumps(document).encode()}).path


@pytest.fixture
def bundle(tmp_path):
    return bundle_of(tmp_path / "colours.bundle", report())


def save(path, kind, config=SMALL):
    model = build_model(config, num_classes=2)
    said = Checkpoint(
        kind,
        Recipe(model=config),
        ("cat", "dog") if kind == "classifier" else (),
        {"name": "d", "count": 4, "sha256": "0" * 64},
        {},
    )
    save_checkpoint(path, model if kind == "classifier" else model.backbone, said)
    return path


def assert_refused(capsys, *arguments, found, remedy, code=2):
    assert main(["inspect", *map(str, arguments)]) == code
    shown = capsys.readouterr()
    lines = [line for line in shown.err.splitlines() if not line.startswith("... ")]
    assert len(lines) == 3 and shown.out == ""
    assert lines[0].startswith("edgereg: error: ")
    assert found in lines[1] and remedy in lines[2]


def test_the_report_of_a_bundle_is_shown_as_a_table(bundle, capsys):
    assert main(["inspect", str(bundle)]) == 0
    assert (
        capsys.readouterr().out
        == f"""\
{bundle}: exported for onnxruntime-x86, images of 8x8
strip_dropout: 0 changed
fold_batchnorm: 2 changed, 1 skipped
  site  what               float64 error
  bn1   folded into conv1  <=1e-15
  bn2   folded into conv2  0
  skipped norm3: it follows aten.cat, not a convolution or linear layer
nodes               32 ->        22
parameters      78,042 ->    77,706
BatchNorm            3 ->         1
dropout              1 ->         0
float64 relative error of the outputs, in batches of 6 and 1
  simplified against traced  <=1e-14
  traced against the model   0
"""
    )


def test_the_report_of_a_bundle_is_printed_as_json(bundle, capsys):
    assert main(["inspect", str(bundle), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "name": str(bundle),
        "kind": "bundle",
        "detail": "exported for onnxruntime-x86",
        "image_size": [8, 8],
        "random_weights": False,
        "simplify": report(),
    }


def test_a_bundle_is_inspected_where_there_is_no_torch(bundle):
    code = f"""
import importlib.abc, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {{"torch", "torchvision", "safetensors", "onnx", "yaml"}}:
            raise ImportError(f"{{name}} is blocked")

sys.meta_path.insert(0, Blocker())
from edgereg.cli import main
assert main(["inspect", {str(bundle)!r}]) == 0
sys.exit(main(["inspect", {str(bundle.parent)!r}]))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "fold_batchnorm: 2 changed" in result.stdout, result.stderr
    assert result.returncode == 2 and "holds neither manifest.json" in result.stderr


def test_a_tampered_bundle_exits_1_and_nothing_of_it_is_shown(bundle, capsys):
    file = bundle / "simplify.json"
    file.write_text(file.read_text().replace("3", "4"))
    assert_refused(capsys, bundle, found="'simplify.json'", remedy="again", code=1)
    (bundle / "golden/0.png").write_bytes(b"x")
    assert_refused(capsys, bundle, found="'golden/0.png'", remedy="again", code=1)


def test_a_bundle_without_a_report_is_refused(tmp_path, capsys):
    path = write_small_bundle(tmp_path / "b").path
    assert_refused(capsys, path, found="has none", remedy="edgereg export")


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"before": {"nodes": "many"}}, "before.nodes is 'many'"),
        ({"passes": {"fold": {"changed": []}}}, "no key 'skipped'"),
        ({"passes": []}, "passes is []"),
        ({"float64_relative_error_below": 0}, "float64_relative_error_below is 0"),
    ],
)
def test_a_report_of_another_form_is_refused_and_the_key_named(tmp_path, capsys, change, found):
    path = bundle_of(tmp_path / "b", report() | change)
    assert_refused(capsys, path, found=found, remedy="again")
    path = bundle_of(tmp_path / "c", {})
    assert_refused(capsys, path, found="no key 'passes'", remedy="again")


def test_a_report_may_hold_more_than_is_shown(tmp_path, capsys):
    document = report() | {"seconds": 3}
    document["passes"]["fold_batchnorm"]["notes"] = ["new"]
    document["float64_relative_error_below"]["seed"] = 0
    assert main(["inspect", str(bundle_of(tmp_path / "b", document))]) == 0
    assert "bn2   folded into conv2" in capsys.readouterr().out


def test_a_name_in_a_report_cannot_command_the_terminal():
    escape = "\x1b[2J\n"
    passes = {escape: PassReport((Change(escape, escape, "b", "c"),), {escape + "2": escape})}
    assert text(passes).count("\\x1b[2J\\n") == 5


def test_many_sites_of_one_kind_share_a_line_unless_all_are_asked_for():
    passes = {
        "strip_dropout": PassReport(
            tuple(Change(f"block{i}.drop", "stripped", "b", "c") for i in range(13))
        ),
        "fold": PassReport((*many(), Change("bn", "folded into the head", "b", "c"))),
    }
    lines = text(passes, **{"layer3.bn": 2e-12, "layer4.bn": 0.0}).splitlines()
    assert lines[1:8] == [
        "strip_dropout: 13 changed",
        "  sites  what      float64 error  first of them",
        "     13  stripped                 block0.drop, block1.drop, block2.drop, block3.drop, ...",
        "fold: 15 changed",
        "  sites  what                  float64 error  first of them",
        "     14  folded into ...       <=1e-11        layer0.bn, layer1.bn, layer2.bn, "
        "layer3.bn, ...",
        "      1  folded into the head                 bn",
    ]
    shown = text(passes, show_all=True, **{"layer3.bn": 2e-12})
    assert "  block12.drop  stripped" in shown and "  layer13.bn  folded into layer13.conv" in shown
    assert "  layer3.bn   folded into layer3.conv   <=1e-11" in shown


@pytest.mark.parametrize(
    ("phrases", "kind"),
    [
        (("stripped; it was live",) * 2, "stripped; it was live"),
        (("folded into a.b",) * 2, "folded into a.b"),
        (("folded into linear, linear_1 and head.fc", "folded into conv2d_3"), "folded into ..."),
        (
            ("folded into a.b, shift kept", "folded into c.d, shift kept"),
            "folded into ..., shift kept",
        ),
        (("folded into linear", "folded into linear_1"), "folded into ..."),
        (("joined 3 heads", "joined 12 heads"), "joined ... heads"),
    ],
)
def test_phrases_that_differ_in_names_and_numbers_are_of_one_kind(phrases, kind):
    changes = tuple(Change(f"s{i}", phrases[i % 2], "b", "c") for i in range(14))
    lines = text({"fold": PassReport(changes)}).splitlines()
    assert lines[3].startswith(f"     14  {kind}  ")


@pytest.mark.parametrize("show_all", [False, True])
def test_every_skipped_site_is_shown_with_its_reason(show_all):
    cat, others = "it follows aten.cat", "the output of conv has 2 consumers"
    sites = [f"denseblock{i}.denselayer{i}.norm1" for i in range(40)]
    skipped = dict.fromkeys(sites, cat) | {"stem.norm": others}
    shown = text({"fold_batchnorm": PassReport((), skipped)}, show_all=show_all)
    assert "fold_batchnorm: 41 skipped\n" in shown
    assert f"  skipped stem.norm: {others}" in shown
    if show_all:
        assert all(f"  skipped {site}: {cat}\n" in shown for site in sites)
    else:
        assert f"  skipped 40: {cat}\n" in shown
        assert set(sites) <= set(shown.replace(",", "").split())


def test_no_line_is_longer_than_100_columns():
    long = many(prefix="backbone.features.denseblock1.denselayer")
    reason = "the output of conv has 2 consumers, " * 4
    shown = text({"fold_batchnorm": PassReport(long, {c.site + "2": reason for c in long})})
    assert max(map(len, shown.splitlines())) <= 100


def test_a_classifier_s_checkpoint_is_simplified_and_shown(tmp_path, capsys):
    path = save(tmp_path / "c", "classifier")
    assert main(["inspect", str(path)]) == 0
    shown = capsys.readouterr()
    title, *lines = shown.out.splitlines()
    assert title == f"{path}: classifier, resnet, images of 16x16"
    assert "strip_dropout: 1 changed" in lines
    assert any("folded into backbone." in line and "<=1e-1" in line for line in lines)
    assert any(line.startswith("BatchNorm ") and line.endswith("->         0") for line in lines)
    assert "random weights" not in shown.out and "proving it in float64" in shown.err


def test_an_encoder_s_checkpoint_is_simplified_without_a_head(tmp_path, capsys):
    path = save(tmp_path / "e", "encoder")
    assert main(["inspect", str(path), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["kind"], document["detail"]) == ("checkpoint", "encoder, resnet")
    assert document["simplify"]["passes"]["strip_dropout"]["changed"] == {}
    assert document["simplify"]["after"]["batchnorms"] == 0


def test_a_damaged_checkpoint_is_refused(tmp_path, capsys):
    path = save(tmp_path / "c", "classifier")
    (path / "model.safetensors").write_bytes(b"x")
    assert_refused(capsys, path, found="another SHA-256", remedy="again")


def test_a_model_of_torchvision_is_built_with_random_weights(capsys):
    name = "torchvision:resnet18"
    assert main(["inspect", name, "--image-size", "32", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["random_weights"] is True and document["image_size"] == [32, 32]
    simplified = document["simplify"]
    assert simplified["before"]["batchnorms"] == 20 and simplified["after"]["batchnorms"] == 0
    assert simplified["before"]["parameters"] == 11_689_512  # torchvision's own count
    assert 0 < simplified["float64_relative_error_below"]["model"] <= 1e-12
    shown = Inspection(name, "model", "1000 classes", (32, 32), simplified).to_text()
    title, note, *lines = shown.splitlines()
    assert title == f"{name}: 1000 classes, images of 32x32"
    assert note.startswith("random weights")
    assert any(line.startswith("     20  folded into ...  <=1e-1") for line in lines)


class Branching(nn.Module):
    def forward(self, x):
        return x.flatten(1) if x.sum() >= 0 else x.flatten(1) + 1


def test_a_model_that_cannot_be_traced_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(MODELS, "convnet", lambda config: Branching())
    path = save(tmp_path / "c", "classifier", ModelConfig("convnet", image_size=16))
    assert_refused(capsys, path, found="data-dependent", remedy="remove if")


@pytest.mark.parametrize(
    ("subject", "remedy"),
    [
        ("torchvision:resnet81", "'resnet18'"),
        ("timm:vit_tiny_patch16_223", "'vit_tiny_patch16_224'"),
        ("torchvison:resnet18", "'torchvision:resnet18'"),
        ("resnet18", "torchvision:NAME or timm:NAME"),
    ],
)
def test_an_unknown_name_is_refused_and_the_nearest_named(subject, remedy, capsys):
    if subject.startswith("timm:"):
        pytest.importorskip("timm", reason="the extra `timm` is not installed")
    assert_refused(capsys, subject, found=f"'{subject}'", remedy=remedy)


def test_a_path_that_is_neither_is_refused(tmp_path, capsys):
    assert_refused(capsys, tmp_path, found="holds neither", remedy="edgereg train")
    (tmp_path / "f").write_text("x")
    assert_refused(capsys, tmp_path / "f", found="is no directory", remedy="edgereg train")
    assert_refused(capsys, tmp_path / "no", found="is no directory", remedy="edgereg train")


def test_an_image_size_is_for_models_that_take_it(bundle, capsys):
    assert_refused(capsys, bundle, "--image-size", "64", found="64", remedy="leave it out")
    model = "torchvision:vit_b_16"
    assert_refused(capsys, model, "--image-size", "100", found="100x100", remedy="another size")


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("torchvision:resnet18", 224),
        ("torchvision:efficientnet_b1", 240),
        ("torchvision:inception_v3", 300),  # 299 is no multiple of 4
        ("torchvision:vit_h_14", 224),  # 518 is none, either; it has weights for 224, too
        ("torchvision:no-such", 224),
        ("timm:vit_base_patch16_384", 384),
        ("timm:no-such", 224),
    ],
)
def test_the_usual_size_is_that_of_a_library_s_weights(name, size):
    if name.startswith("timm:"):
        pytest.importorskip("timm", reason="the extra `timm` is not installed")
    assert _usual_size(name) == size
