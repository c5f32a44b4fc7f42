"""From an encoder's checkpoint to a bundle that finds neighbours, on the embedded emoji."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from torch import nn

from deploy.bundle.index import read_index
from deploy.bundle.read import open_bundle
from deploy.errors import BadInputError, CheckFailedError
from deploy.measure.verify import verify
from deploy.runtime.decode import encode_png
from deploy.runtime.preprocess import Preprocessing, preprocess
from deploy.runtime.runner import open_runner
from edgereg.checkpoint import Checkpoint, load_backbone, save_checkpoint
from edgereg.cli import main
from edgereg.data.emoji10 import Emoji10
from edgereg.data.images import Subset, open_images
from edgereg.errors import DataError
from edgereg.models.zoo import ModelConfig, build_model
from edgereg.recipe import Recipe
from edgereg.subject import encoder
from export.exporter import export_bundle
from export.request import ExportRequest, References

VAL, TRAIN, CALIB = "emoji-10:twitter:test", "emoji-10:twitter:train", "emoji-10:google:train"
ALL = ("--precision", "fp32,fp16,int8", "--calib", CALIB, "--gate", "int8=0.05,fp16=0.02")


def run(*words) -> int:
    return main([str(word) for word in words])


def refused(capsys, *words, found, remedy, code=2):
    capsys.readouterr()
    assert run(*words) == code
    said = capsys.readouterr().err
    assert found in said and remedy in said


def files_of(root):
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def save(path, config, kind="encoder"):
    """A checkpoint with random weights; a random backbone tells emoji apart well enough."""
    names = Emoji10(vendor="twitter", split="test").class_names if kind == "classifier" else ()
    said = Checkpoint(
        kind, Recipe(model=config), names, {"name": "d", "count": 4, "sha256": "0" * 64}, {}
    )
    model = build_model(config, num_classes=10)
    save_checkpoint(path, model if kind == "classifier" else model.backbone, said)
    return path


def write_references(folder):
    """Twenty emoji of each class: CLASS/INDEX.png."""
    images = open_images(TRAIN)
    for label, name in enumerate(images.class_names):
        (folder / name).mkdir(parents=True)
        for i in np.flatnonzero(images.labels == label)[:20]:
            (folder / name / f"{i}.png").write_bytes(images.encoded(int(i)))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """References, an encoder, a transformer's classifier, and a bundle of each."""
    folder = tmp_path_factory.mktemp("encoders")
    write_references(folder / "references")
    for name, kind in (("resnet", "encoder"), ("vit", "classifier")):
        checkpoint = save(folder / name, ModelConfig(name=name, image_size=32), kind)
        command = ("export", checkpoint, "--encoder", "--target", "jetpack6.2", "--data", VAL)
        out = folder / f"{name}.bundle"
        assert run(*command, "--reference", folder / "references", *ALL, "--out", out) == 0
    return folder


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_every_precision_verifies_and_is_judged_by_the_vote_and_by_neighbours(name, root):
    bundle = open_bundle(root / f"{name}.bundle")
    manifest = bundle.manifest
    assert manifest.task == "embedding" and [*manifest.variants] == ["fp16", "fp32", "int8"]
    for precision, variant in manifest.variants.items():
        report = verify(bundle, open_runner(bundle, backend="onnxruntime", precision=precision))
        assert report.passed
        assert variant.accuracy.count == 248 and variant.accuracy.reference_top1 > 0.3
        assert variant.conformance.verdict in ("accepted", "not judged")
    assert (manifest.variants["fp32"].accuracy.lost, manifest.outputs[0].shape) == (0, (1, 64))
    document = json.loads((root / f"{name}.report.json").read_text())
    for precision, found in document["variants"].items():
        assert found["golden"]["neighbour_agreement"] >= 0.7, precision
        assert found["gate"]["text"].startswith(f"{precision}: vote of the nearest ")


def test_the_embedding_is_the_backbones_own_in_float64_not_normalised(root):
    bundle = open_bundle(root / "resnet.bundle")
    model, width, _ = load_backbone(root / "resnet")
    inputs = torch.from_numpy(bundle.array("golden/preprocessed.npy")).double()
    with torch.no_grad():
        expected = model.double()(inputs).float().numpy()
    np.testing.assert_array_equal(bundle.array("golden/embedding.npy"), expected)
    lengths = np.linalg.norm(expected, axis=1)
    assert expected.shape == (64, width) and np.ptp(lengths) > 0.1


def test_the_index_is_the_models_view_of_the_reference_images(root):
    index = read_index(open_bundle(root / "resnet.bundle"))
    images = open_images(TRAIN)
    model, _, checkpoint = load_backbone(root / "resnet")
    assert index.names[0].startswith(f"{index.class_names[0]}/")
    assert sorted(index.class_names) == list(index.class_names) != list(images.class_names)
    places = [int(name.partition("/")[2].removesuffix(".png")) for name in index.names]
    assert 190 < len(places) <= 200
    names = [images.class_names[label] for label in images.labels[places]]
    assert [index.class_names[label] for label in index.labels] == names
    some = preprocess([images.load(i) for i in places[:5]], checkpoint.recipe.preprocessing())
    with torch.no_grad():
        rows = model.double()(torch.from_numpy(some).double()).numpy()
    np.testing.assert_allclose(
        index.embeddings[:5], rows / np.linalg.norm(rows, axis=1, keepdims=True), atol=1e-7
    )


def test_the_vote_that_was_measured_is_that_of_infer(root, capsys, tmp_path):
    images, bundle = open_images(VAL), root / "resnet.bundle"
    for i in range(0, 248, 4):
        (tmp_path / f"{i:03}.png").write_bytes(images.encoded(i))
    assert run("infer", bundle, tmp_path, "--json", "--top-k", 1) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    right = np.mean(
        [
            answer["vote"][0]["label"] == images.class_names[images.labels[i]]
            for answer, i in zip(answers, range(0, 248, 4), strict=True)
        ]
    )
    measured = open_bundle(bundle).manifest.variants["fp32"].accuracy.top1
    assert right == pytest.approx(measured, abs=0.15)  # a quarter of the images


def test_the_same_encoder_gives_the_same_bytes_and_names_no_machine(root, tmp_path):
    command = ("export", root / "resnet", "--encoder", "--target", "jetpack6.2", "--data", VAL)
    references = ("--reference", root / "references")
    assert run(*command, *references, *ALL, "--out", tmp_path / "resnet.bundle") == 0
    first, second = files_of(root / "resnet.bundle"), files_of(tmp_path / "resnet.bundle")
    assert first == second
    for name, data in first.items():
        assert str(tmp_path).encode() not in data and b"site-packages" not in data, name


def test_the_report_and_the_model_card_speak_of_embeddings(root):
    card = (root / "resnet.bundle/readme.md").read_text()
    for text in ("embedding, not normalised", "by the vote of the nearest", "`embedding` float32"):
        assert text in card
    page = (root / "resnet.report.html").read_text()
    for text in ("embeddings of 64 numbers", "nearest reference images vote", "smallest cosine"):
        assert text in page
    assert "top-1 class" not in card and "same top-1" not in page


def test_a_bundle_is_inspected_and_compared_with_its_backbone(root, capsys):
    assert run("inspect", root / "resnet.bundle") == 0
    assert "fold_batchnorm" in capsys.readouterr().out
    assert run("inspect", root / "resnet.bundle", "--diff", root / "resnet") == 0
    assert capsys.readouterr().out.count("they do not part") == 3
    command = ("export", root / "resnet", "--encoder", "--target", "jetpack6.2", "--data", VAL)
    assert run(*command, "--bisect") == 0
    assert "they do not part" in capsys.readouterr().out


def test_a_bundle_is_not_compared_with_an_encoder_of_another_width(root, tmp_path, capsys):
    config = ModelConfig(name="resnet", image_size=32, width=8)
    other = save(tmp_path / "other", config)
    words = ("inspect", root / "resnet.bundle", "--diff", other)
    refused(capsys, *words, found="64 numbers an image in the bundle, 32", remedy="was exported")


def test_triton_is_given_the_embedding_and_deepstream_refuses_it(root, tmp_path, capsys):
    assert run("export", root / "vit.bundle", "--to", "triton", "--out", tmp_path / "t") == 0
    config = (tmp_path / "t/vit/config.pbtxt").read_text()
    assert '"embedding"' in config and "labels" not in config
    assert not (tmp_path / "t/vit/labels.txt").exists()
    words = ("export", root / "vit.bundle", "--to", "deepstream", "--out", tmp_path / "d")
    refused(capsys, *words, found="the bundle of an encoder", remedy="--to triton")


def test_images_without_labels_are_enough_and_it_is_said_what_they_do_not_show(
    root, tmp_path, capsys
):
    images, folder = open_images(VAL), tmp_path / "photos"
    folder.mkdir()
    for i in range(160):
        (folder / f"{i:03}.png").write_bytes(images.encoded(i))
    command = ("export", root / "resnet", "--encoder", "--target", "jetpack6.2", "--data", folder)
    out = tmp_path / "m.bundle"
    assert run(*command, "--precision", "fp32,int8", "--calib", CALIB, "--out", out) == 0
    shown = capsys.readouterr()
    assert "no labels: judged by these alone" in shown.out
    assert "no accuracy is measured" in shown.err
    manifest = open_bundle(out).manifest
    assert manifest.labels == () and manifest.index.labels is None
    assert manifest.variants["int8"].accuracy is None and not (out / "labels.txt").exists()
    assert "judged by the golden images alone" in (out / "readme.md").read_text()
    assert run("infer", out, folder / "000.png") == 0
    shown = capsys.readouterr().out
    assert "%" not in shown and shown.count(".png") == 4
    gated = (*command, "--gate", "fp32=0.1", "--out", tmp_path / "x.bundle")
    refused(capsys, *gated, found="fp32 and no such images", remedy="leave --gate out")


def test_without_references_half_of_the_images_are_and_none_is_judged_too(root):
    whole, said = open_images("emoji-10:both:test"), []
    subject = encoder(root / "resnet", whole, None, on_stage=said.append)
    judged = {subject.images.encoded(i) for i in range(len(subject.images))}
    references = {encode_png(image) for image in subject.references.images}
    assert not judged & references
    assert len(subject.images) == 248 and 230 < len(subject.references.images) <= 248
    assert ("left out" in " ".join(said)) == (len(subject.references.images) < 248)
    counts = np.bincount(subject.references.labels)
    assert len(counts) == 10 and counts.min() > 15


def test_a_reference_that_is_judged_on_as_well_is_left_out_and_that_is_said(root):
    said: list[str] = []
    both = open_images("emoji-10:both:test")
    subject = encoder(root / "resnet", open_images(VAL), both, on_stage=said.append)
    assert len(subject.references.images) == 496 - 248 and "248 reference images" in said[0]
    with pytest.raises(DataError, match="all 248 of"):
        encoder(root / "resnet", open_images(VAL), open_images(VAL), on_stage=said.append)


def test_too_few_images_and_a_class_that_no_reference_has_are_refused(root):
    images, said = open_images(VAL), []
    with pytest.raises(DataError, match=r"64 at least are judged; found: .* has 127"):
        encoder(root / "resnet", Subset(images, np.arange(127)), None, on_stage=said.append)
    some = Subset(images, np.flatnonzero(images.labels > 0))
    some.class_names = ("absent", *images.class_names[1:])
    present = encoder(root / "resnet", some, open_images(TRAIN), on_stage=said.append)
    assert present.labels.tolist() == some.labels.tolist()
    some.class_names = (*images.class_names[:9], "absent")
    with pytest.raises(DataError, match="has absent, and"):
        encoder(root / "resnet", some, open_images(TRAIN), on_stage=said.append)


@pytest.mark.parametrize(
    ("words", "found", "remedy"),
    [
        (("--data", VAL), "without a head", "edgereg export --encoder"),
        (("--data", VAL, "--reference", TRAIN), "--reference without", "--encoder"),
        (("--data", VAL, "--encoder", "--reference", VAL), "are the same", "--reference"),
    ],
)
def test_wrong_use_says_rule_found_and_remedy(words, found, remedy, root, tmp_path, capsys):
    command = ("export", root / "resnet", "--target", "jetpack6.2", *words)
    refused(capsys, *command, "--out", tmp_path / "x", found=found, remedy=remedy)
    assert list(tmp_path.iterdir()) == []


# The Python API, on a model that is quick to export.


class Colours(nn.Module):
    """The mean colour, with its square, of each half of the image."""

    def forward(self, images):
        halves = torch.cat([images[:, :, :, :8], images[:, :, :, 8:]], dim=1).mean((2, 3))
        return torch.cat([halves, halves * halves], dim=1)


class Constant(Colours):
    def forward(self, images):
        return 0 * super().forward(images) + torch.arange(1.0, 13)


def pictures(count, *, seed):
    rng = np.random.default_rng(seed)
    noise = rng.normal(rng.uniform(30, 220, (count, 1, 1, 3)), 30, (count, 16, 16, 3))
    return [*np.clip(noise, 0, 255).astype(np.uint8)]


@pytest.fixture(scope="module")
def request_():
    return ExportRequest(
        name="colours",
        target="onnxruntime-x86",
        labels=("a", "b"),
        preprocessing=Preprocessing(16, 16, "stretch", 1.0, (0.5,) * 3, (0.25,) * 3),
        golden_images=[encode_png(image) for image in pictures(64, seed=0)],
        holdout=(pictures(10, seed=1), [0, 1] * 5),
        references=References(pictures(40, seed=2), [f"{i}" for i in range(40)], [0, 1] * 20),
    )


def test_a_model_without_a_checkpoint_is_exported_as_an_encoder(request_, tmp_path):
    result = export_bundle(Colours().eval(), tmp_path / "x.bundle", request=request_)
    assert result.manifest.outputs[0].shape == (1, 12) and result.manifest.index.count == 40
    assert result.variants["fp32"].comparison.neighbour_agreement == 1.0


@pytest.mark.parametrize(
    ("model", "change", "error", "match"),
    [
        (Constant, {}, BadInputError, "40 embeddings of the same direction"),
        (Colours, {"labels": (), "holdout": None}, BadInputError, "each reference image has a"),
        (Colours, {"references": References([], [], None)}, BadInputError, "0 images, 0 names"),
        (
            Colours,
            {"references": References(pictures(2, seed=2), ["a", "b"], None)},
            BadInputError,
            "reference images without labels, and classes",
        ),
        (nn.Identity, {}, BadInputError, r"\(2, 3, 16, 16\) for a batch of 2"),
    ],
)
def test_what_cannot_be_an_encoders_bundle_is_refused(
    model, change, error, match, request_, tmp_path
):
    request = dataclasses.replace(request_, **change)
    with pytest.raises(error, match=match):
        export_bundle(model().eval(), tmp_path / "x.bundle", request=request)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_turns_the_embedding_is_not_exported(request_, tmp_path, monkeypatch):
    """The control: the same numbers, each in its neighbour's place."""
    import export.judge.judging

    real = export.judge.judging.open_variant

    def turned(precision, file, target):
        run = real(precision, file, target)
        return lambda inputs: np.roll(run(inputs), 1, axis=1)

    monkeypatch.setattr(export.judge.judging, "open_variant", turned)
    with pytest.raises(CheckFailedError, match=r"cosine similarity .*neighbour agreement"):
        export_bundle(Colours().eval(), tmp_path / "x.bundle", request=request_)
    assert list(tmp_path.iterdir()) == []
