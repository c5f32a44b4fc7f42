import json
from pathlib import Path

import pytest

import edgereg.demo
from deploy.errors import DeployError
from edgereg.errors import RecipeError
from edgereg.recipe import Recipe, load_recipe, recipe_from_json

PACKAGED = sorted((Path(edgereg.demo.__file__).parent / "recipes").glob("*.yaml"))


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_without_a_file_every_setting_has_its_default():
    assert load_recipe(None) == Recipe()


def test_an_empty_file_is_the_defaults(write):
    assert load_recipe(write("# nothing\n")) == Recipe()


def test_a_file_sets_what_it_names_and_nothing_else(write):
    recipe = load_recipe(write("epochs: 3\noptim: {lr: 0.5}\nmodel: {name: vit}\n"))
    assert (recipe.epochs, recipe.optim.lr, recipe.model.name) == (3, 0.5, "vit")
    assert recipe.optim.weight_decay == Recipe().optim.weight_decay
    assert recipe.batch_size == Recipe().batch_size


def test_flags_win_over_the_file(write):
    path = write("epochs: 3\noptim: {lr: 0.5, momentum: 0.1}\n")
    recipe = load_recipe(path, ["--epochs", "7", "--optim.lr=1e-3", "--model.name", "vit"])
    assert (recipe.epochs, recipe.optim.lr, recipe.model.name) == (7, 1e-3, "vit")
    assert recipe.optim.momentum == 0.1


def test_a_list_can_be_given_as_a_flag():
    recipe = load_recipe(None, ["--augment", "[{flip: {probability: 0.25}}]"])
    assert recipe.augment == [{"flip": {"probability": 0.25}}]


@pytest.mark.parametrize(
    ("text", "flags", "match"),
    [
        ("epoch: 3", [], r"found: 'epoch'; remedy: did you mean 'epochs'\?"),
        ("optim: {lrr: 3}", [], r"found: 'optim\.lrr'; remedy: did you mean 'optim\.lr'\?"),
        (
            "pirl: {temprature: 3}",
            [],
            r"'pirl\.temprature'; remedy: did you mean 'pirl\.temperature'",
        ),
        ("model: {nmae: vit}", [], r"'model\.nmae'; remedy: did you mean 'model\.name'"),
        ("3: 4", [], r"found: '3'"),
        ("", ["--epoch", "3"], r"found: 'epoch'; remedy: did you mean 'epochs'\?"),
        ("", ["--optim.lrr=3"], r"found: 'optim\.lrr'; remedy: did you mean 'optim\.lr'\?"),
        ("", ["--mixx.mixup", "1"], r"'mixx'; remedy: did you mean 'mix'"),
        ("augment: [{flop: {}}]", [], r"augment\[0\]: 'flop'; remedy: did you mean 'flip'"),
    ],
)
def test_an_unknown_key_is_refused_and_the_nearest_named(write, text, flags, match):
    with pytest.raises(RecipeError, match=match):
        load_recipe(write(text), flags)


@pytest.mark.parametrize(
    ("text", "flags", "match"),
    [
        ("epochs: ten", [], "epochs"),
        ("epochs: 1.5", [], "epochs"),
        ("optim: {lr: fast}", [], r"optim\.lr|lr"),
        ("optim: {name: adam}", [], "adamw"),
        ("input: {mean: [0.5, 0.5]}", [], "mean"),
        ("augment: flip", [], "augment"),
        ("", ["--epochs", "ten"], "epochs"),
        ("", ["--epochs"], "epochs"),
        ("", ["7"], "7"),
    ],
)
def test_a_value_of_another_type_is_refused_and_its_key_named(write, text, flags, match):
    with pytest.raises(RecipeError, match=rf"of its type; found: .*({match})"):
        load_recipe(write(text), flags)


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--epochs", "0"], "epochs: 0"),
        (["--batch_size", "1"], "batch_size: 1"),
        (["--label_smoothing", "1"], r"label_smoothing: 1"),
        (["--seed=-1"], "seed: -1"),
        (["--optim.lr=-1"], r"optim\.lr: -1"),
        (["--frozen_stages", "-1"], r"frozen_stages: -1"),
        (["--pirl.temperature", "0"], r"pirl\.temperature: 0"),
        (["--mix.mixup=-1"], r"mix\.mixup: -1"),
        (["--input.std", "[0, 1, 1]"], "std must be three positive numbers"),
        (["--augment", "[{flip: {probability: 2}}]"], r"augment\[0\]\.flip\.probability: 2"),
    ],
)
def test_an_impossible_value_is_refused_and_its_key_named(flags, match):
    with pytest.raises((RecipeError, DeployError), match=match):
        load_recipe(None, flags)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("epochs: [1", "a YAML file; found: .*recipe.yaml"),
        ("!!python/object:os.system {}", "a YAML file"),
        ("optim: 3", "optim is a mapping; found: optim: 3"),
        ("model:", "model is a mapping; found: model: None"),
        ("- epochs", "a mapping; found: list"),
        ("epochs", "a mapping; found: str"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(write, text, match):
    with pytest.raises(RecipeError, match=match):
        load_recipe(write(text))


def test_a_missing_or_binary_file_is_named(tmp_path):
    with pytest.raises(RecipeError, match=r"no\.yaml"):
        load_recipe(tmp_path / "no.yaml")
    (tmp_path / "bin.yaml").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(RecipeError, match=r"bin\.yaml"):
        load_recipe(tmp_path / "bin.yaml")


@pytest.mark.parametrize("path", [None, *PACKAGED], ids=lambda p: p.stem if p else "defaults")
def test_a_recipe_survives_json(path):
    recipe = load_recipe(path)
    text = json.dumps(recipe.to_json(), allow_nan=False)
    assert recipe_from_json(json.loads(text)) == recipe
    assert json.dumps(recipe_from_json(json.loads(text)).to_json()) == text


def test_the_packaged_recipes_are_those_of_the_demo():
    names = {path.stem for path in PACKAGED}
    assert names >= {"cnn-plain", "cnn-regularized", "vit-plain", "vit-regularized", "pirl"}
    assert load_recipe(PACKAGED[0].parent / "cnn-regularized.yaml").chain().steps
