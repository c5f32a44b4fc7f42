import json
import re

import numpy as np
import pytest
import torch

from edgereg import evaluate_encoder as module
from edgereg.checkpoint import (
    Checkpoint,
    load_backbone,
    load_checkpoint,
    load_classifier,
    save_checkpoint,
)
from edgereg.cli import main
from edgereg.data.images import Subset, open_images
from edgereg.data.pixels import Pixels
from edgereg.errors import StoppedError
from edgereg.evaluate_encoder import Plan
from edgereg.evaluation.knn import knn_predict
from edgereg.models.zoo import build_model
from edgereg.progress import progress
from edgereg.recipe import recipe_from_json
from edgereg.train.evaluate import predict

TEST, TRAIN = "emoji-10:twitter:test", "emoji-10:twitter:train"
TINY = recipe_from_json({"model": {"name": "resnet", "width": 8}})
ON = ["--data", TEST, "--train", TRAIN, "--device", "cpu"]
FEW = ["--finetune", "0.02", "--epochs", "1", "--batch_size", "8"]


def written(path, *, kind):
    """Write a checkpoint with random weights, which tell colours apart well enough."""
    model = build_model(TINY.model, num_classes=10, seed=1).eval()
    names = open_images(TRAIN).class_names if kind == "classifier" else ()
    module = model if kind == "classifier" else model.backbone
    save_checkpoint(path, module, Checkpoint(kind, TINY, names, {}, {}))
    return path


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return written(tmp_path_factory.mktemp("encoder") / "encoder", kind="encoder")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return written(tmp_path_factory.mktemp("classifier") / "classifier", kind="classifier")


def document(capsys, *arguments):
    assert main(["eval", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def measured(found):
    return {m["name"]: m for m in found["measurements"]}


def assert_refused(capsys, *arguments, rule, found, remedy):
    assert main(["eval", *map(str, arguments)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    for pattern, line in zip((rule, found, remedy), lines, strict=True):
        assert re.search(pattern, line)


def test_from_pretraining_to_its_evaluation(tmp_path, capsys):
    flags = ["--epochs", "1", "--model.width", "4", "--device", "cpu"]
    assert main(["pretrain", "--data", TRAIN, "--out", str(tmp_path / "e"), *flags]) == 0
    capsys.readouterr()
    found = document(capsys, tmp_path / "e", *ON)
    assert set(measured(found)) == {"knn", "linear"}, "which are done where none is named"
    assert found["kind"] == "encoder" and found["feature_dim"] == 16
    assert all(m["top1"] > 0.35 for m in found["measurements"])  # the largest class has 26 %


def test_the_neighbours_vote_on_features_of_the_devices_own_preprocessing(encoder, capsys):
    found = document(capsys, encoder, *ON, "--knn")
    backbone, _, checkpoint = load_backbone(encoder)
    spec = checkpoint.recipe.preprocessing()
    train, test = open_images(TRAIN), open_images(TEST)
    bank, features = (predict(backbone, Pixels(i, spec), spec) for i in (train, test))
    answers = knn_predict(features, bank, train.labels, num_classes=10, k=20)
    (knn,) = found["measurements"]
    assert knn["top1"] == np.mean(answers == test.labels) and knn["count"] == len(test)
    assert knn["labels"] == len(train) and knn["settings"]["k"] == 20
    for label, (name, share) in enumerate(knn["per_class"].items()):
        of_class = test.labels == label
        assert name == test.class_names[label]
        assert share == np.mean(answers[of_class] == label)
        assert found["counts"][name] == of_class.sum()


def test_a_table_has_a_line_for_each_measurement_and_class(encoder, capsys):
    assert main(["eval", str(encoder), *ON, "--knn", *FEW]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = document(capsys, encoder, *ON, "--knn", *FEW)
    for name, m in measured(found).items():
        (line,) = (line for line in lines if line.startswith(f"{name} "))
        shown = line.removeprefix(name).split()[:3]
        assert shown == [str(m["labels"]), "248", f"{m['top1']:.1%}"]
    for name, count in found["counts"].items():
        (line,) = (line for line in lines if line.startswith(f"{name} "))
        shares = [f"{m['per_class'][name]:.1%}" for m in found["measurements"]]
        assert line.split()[1:] == [str(count), *shares]
    assert "5 of 248 test images are training images, too" in lines


def test_a_class_without_a_test_image_has_no_accuracy(encoder):
    test = open_images(TEST)
    some = Subset(test, np.flatnonzero(test.labels != 3))
    result = module.evaluate_encoder(
        encoder, some, open_images(TRAIN), plan=Plan(linear=False), recipe=TINY, bar=progress
    )
    (knn,) = result.to_json()["measurements"]
    assert [name for name, share in knn["per_class"].items() if share is None] == ["food"]
    json.dumps(result.to_json(), allow_nan=False)
    assert re.search(r"^food +0 +no image$", result.to_text(), re.MULTILINE)


def test_fine_tuning_starts_from_the_encoder_and_scratch_does_not(encoder, capsys, monkeypatch):
    runs, train = [], module.train_run

    def spy(images, out, recipe, **options):
        init = options["init"]
        runs.append((len(images), recipe, init and load_backbone(init)[0].state_dict()))
        return train(images, out, recipe, **options)

    monkeypatch.setattr(module, "train_run", spy)
    found = measured(document(capsys, encoder, *ON, *FEW, "--scratch"))
    assert list(found) == ["finetune 2%", "scratch 2%"]
    (few, recipe, start), (same, other, nothing) = runs
    assert few == same == found["finetune 2%"]["labels"]
    assert few == sum(round(0.02 * n) for n in np.bincount(open_images(TRAIN).labels))
    assert recipe == other and recipe.model == TINY.model and recipe.epochs == 1
    for name, tensor in load_backbone(encoder)[0].state_dict().items():
        assert torch.equal(start[name], tensor)
    assert nothing is None
    assert found["finetune 2%"]["per_class"] != found["scratch 2%"]["per_class"]


def test_a_classifiers_head_is_not_looked_at(classifier, encoder, capsys, monkeypatch):
    kinds, train = [], module.train_run

    def spy(images, out, recipe, **options):
        kinds.append(load_checkpoint(options["init"]).kind)
        return train(images, out, recipe, **options)

    monkeypatch.setattr(module, "train_run", spy)
    theirs, ours = (document(capsys, path, *ON, "--knn", *FEW) for path in (classifier, encoder))
    assert theirs["kind"] == "classifier" and kinds == ["encoder", "encoder"]
    assert theirs["measurements"] == ours["measurements"]


def test_the_seed_decides_which_labels_are_used(encoder, capsys):
    first, again, other = (
        measured(document(capsys, encoder, *ON, *FEW, "--seed", seed)) for seed in (1, 1, 2)
    )
    assert first == again != other


def test_a_picture_of_the_neighbours_is_drawn(encoder, tmp_path, capsys):
    out = tmp_path / "neighbours.png"
    assert main(["eval", str(encoder), *ON, "--knn", "--retrieval", str(out)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"wrote {out}"
    assert out.read_bytes().startswith(b"\x89PNG")
    assert_refused(
        capsys,
        *(encoder, *ON, "--retrieval", out),
        rule="a picture is written to a new file",
        found="exists",
        remedy="--force",
    )


def test_a_classifier_without_training_images_is_measured_as_it_is(classifier, capsys):
    found = document(capsys, classifier, "--data", TEST)
    model, checkpoint = load_classifier(classifier)
    spec, test = checkpoint.recipe.preprocessing(), open_images(TEST)
    answers = predict(model, Pixels(test, spec), spec).argmax(axis=1)
    assert found["top1"] == np.mean(answers == test.labels)


def test_an_encoder_without_training_images_is_refused(encoder, capsys):
    assert_refused(
        capsys,
        *(encoder, "--data", TEST),
        rule="an encoder has no head",
        found="is an encoder, and no --train",
        remedy="name them with --train",
    )


@pytest.mark.parametrize("flag", [["--knn"], ["--linear"], FEW, ["--retrieval", "a.png"]])
def test_a_measurement_of_features_without_training_images_is_refused(flag, classifier, capsys):
    assert_refused(
        capsys,
        *(classifier, "--data", TEST, *flag),
        rule="with labelled images to learn from",
        found=f"{flag[0]} without --train",
        remedy="--train",
    )


def test_training_images_are_no_test_images(encoder, capsys):
    assert_refused(
        capsys,
        *(encoder, "--data", TRAIN, "--train", TRAIN),
        rule="images that were not trained on",
        found="all 995 images",
        remedy="--data",
    )


def test_other_classes_are_refused(encoder, tmp_path, capsys):
    images = np.zeros((4, 32, 32, 3), np.uint8)
    images[:, 0, 0, 0] = range(4)
    np.savez(tmp_path / "two.npz", images=images, labels=[0, 1, 0, 1])
    assert_refused(
        capsys,
        *(encoder, "--data", TEST, "--train", tmp_path / "two.npz"),
        rule="the classes of the data",
        found="lacks",
        remedy="rename",
    )


@pytest.mark.parametrize(
    "arguments",
    [
        "--epochs 3",
        "--recipe r.yaml",
        "--scratch",
        "--finetune 0",
        "--finetune 1.5",
        "--finetune few",
        "--finetune",
    ],
)
def test_wrong_use_exits_2_with_the_usage(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["eval", "x", "--data", "y", "--train", "z", *arguments.split()])
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("usage: edgereg eval")


def test_a_stopped_fine_tuning_promises_no_state(encoder, capsys, monkeypatch):
    def stopped(*args, **options):
        raise StoppedError("a rule", found="SIGTERM after step 3", remedy="go on with --resume")

    monkeypatch.setattr(module, "train_run", stopped)
    assert main(["eval", str(encoder), *ON, *FEW]) == 75
    shown = capsys.readouterr().err
    assert "SIGTERM after step 3" in shown and "run `edgereg eval` again" in shown
