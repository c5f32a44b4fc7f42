import json

import pytest
import torch

from deploy.errors import BadInputError
from edgereg.checkpoint import (
    Checkpoint,
    load_checkpoint,
    load_classifier,
    load_start,
    save_checkpoint,
)
from edgereg.errors import CheckpointError
from edgereg.models.zoo import ModelConfig, build_model
from edgereg.recipe import Recipe

RECIPE = Recipe(epochs=3, augment=[{"affine": {"scale": [0.9, 1.1]}}])
OTHERS = ("one", "two")  # not the classes of the checkpoint
DATA = {"name": "d", "count": 4, "sha256": "0" * 64}


def classifier(recipe=RECIPE, *, seed=1):
    return build_model(recipe.model, num_classes=2, seed=seed)


def said(kind="classifier", recipe=RECIPE):
    names = ("cat", "dog") if kind == "classifier" else ()
    return Checkpoint(kind, recipe, names, DATA, {"train": {"top1": 0.5}})


@pytest.fixture
def path(tmp_path):
    save_checkpoint(tmp_path / "c", classifier(), said())
    return tmp_path / "c"


@pytest.fixture
def encoder(tmp_path):
    save_checkpoint(tmp_path / "e", classifier().backbone, said("encoder"))
    return tmp_path / "e"


def assert_same_bits(module, other):
    state, expected = module.state_dict(), other.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)


def rewrite(path, **changes):
    marker = path / "checkpoint.json"
    marker.write_text(json.dumps(json.loads(marker.read_text()) | changes))


def test_a_classifier_comes_back_bit_by_bit_and_in_eval_mode(path):
    model, checkpoint = load_classifier(path)
    assert_same_bits(model, classifier())
    assert not any(module.training for module in model.modules())
    assert checkpoint == load_checkpoint(path) == said()


def test_a_checkpoint_is_two_files(path):
    assert {p.name for p in path.iterdir()} == {"checkpoint.json", "model.safetensors"}


def test_a_changed_byte_is_refused(path):
    weights = path / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-7] ^= 1
    weights.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model\.safetensors' has another SHA-256"):
        load_classifier(path)


def test_missing_weights_are_refused(path):
    (path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"holds model\.safetensors"):
        load_classifier(path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", "\udc80"])
def test_what_is_no_checkpoint_is_refused(path, text):
    (path / "checkpoint.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError, match=r"with checkpoint\.json and model\.safetensors"):
        load_checkpoint(path)


def test_a_missing_directory_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no-such"):
        load_classifier(tmp_path / "no-such")


@pytest.mark.parametrize("key", ["kind", "recipe", "class_names", "weights_sha256"])
def test_a_missing_key_is_named(path, key):
    marker = path / "checkpoint.json"
    described = json.loads(marker.read_text())
    del described[key]
    marker.write_text(json.dumps(described))
    with pytest.raises(CheckpointError, match=key):
        load_classifier(path)


def test_another_format_is_refused_with_both_versions(path):
    rewrite(path, format_version=2)
    with pytest.raises(CheckpointError, match=r"format 1; found: .* has format 2"):
        load_checkpoint(path)


def test_weights_of_another_shape_are_refused_and_named(path):
    rewrite(path, class_names=["cat", "cow", "dog"])
    with pytest.raises(CheckpointError, match=r"head\.bias is \(2,\), the model has \(3,\)"):
        load_classifier(path)


def test_a_checkpoint_of_another_model_is_refused_with_both_names(path):
    config = ModelConfig("vit")
    model = build_model(config, num_classes=2)
    with pytest.raises(CheckpointError, match=r"has model\.name resnet, the recipe vit"):
        load_start(path, model, config, class_names=OTHERS)


def test_a_convolutional_backbone_serves_another_image_size(path):
    config = ModelConfig(image_size=64)
    model = build_model(config, num_classes=2, seed=9)
    load_start(path, model, config, class_names=OTHERS)
    theirs, _ = load_classifier(path)
    for name, tensor in theirs.backbone.state_dict().items():
        assert torch.equal(model.backbone.state_dict()[name], tensor)


def test_a_backbone_whose_tensors_differ_at_another_size_is_refused(path):
    config = ModelConfig(image_size=224)
    model = build_model(config, num_classes=2)
    with pytest.raises(CheckpointError, match=r"is .*, the model has"):
        load_start(path, model, config, class_names=OTHERS)


@pytest.mark.parametrize("kind", ["path", "encoder"])
def test_a_backbone_comes_from_a_classifier_or_an_encoder_and_the_head_stays(kind, request):
    model, before = classifier(seed=9), classifier(seed=9)
    load_start(request.getfixturevalue(kind), model, RECIPE.model, class_names=OTHERS)
    assert_same_bits(model.backbone, classifier().backbone)
    assert_same_bits(model.head, before.head)


def test_the_head_comes_along_where_the_classes_are_the_same(path):
    model = classifier(seed=9)
    load_start(path, model, RECIPE.model, class_names=load_checkpoint(path).class_names)
    assert_same_bits(model, classifier())


def test_an_encoder_is_no_classifier(encoder):
    assert load_checkpoint(encoder).kind == "encoder"
    with pytest.raises(CheckpointError, match=r"is an encoder, without a head; .*--init"):
        load_classifier(encoder)


def test_an_existing_directory_is_refused_and_replaced_only_with_force(path):
    with pytest.raises(BadInputError, match="replace it with --force"):
        save_checkpoint(path, classifier(seed=2), said())
    assert_same_bits(load_classifier(path)[0], classifier())
    save_checkpoint(path, classifier(seed=2), said(), force=True)
    assert_same_bits(load_classifier(path)[0], classifier(seed=2))


def test_somebodys_directory_is_refused_even_with_force(tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.tex").write_text("x")
    with pytest.raises(BadInputError, match="replaces only an earlier result"):
        save_checkpoint(tmp_path / "theirs", classifier(), said(), force=True)
    assert [p.name for p in tmp_path.rglob("*")] == ["theirs", "thesis.tex"]
