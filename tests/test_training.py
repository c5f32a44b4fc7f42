import dataclasses
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import nn

from deploy.errors import BadInputError
from deploy.runtime.decode import encode_png
from deploy.runtime.preprocess import preprocess
from edgereg.augment.mixing import MixConfig
from edgereg.checkpoint import load_classifier
from edgereg.data.emoji10 import Emoji10
from edgereg.data.folder import Folder
from edgereg.data.images import FewLabels, epoch_order
from edgereg.data.pixels import Pixels
from edgereg.errors import DataError, RecipeError, TrainingError
from edgereg.models.zoo import ModelConfig
from edgereg.progress import progress
from edgereg.recipe import InputConfig, Recipe
from edgereg.regularize.ema import EmaConfig
from edgereg.train import run as run_module
from edgereg.train.batches import epoch_batches
from edgereg.train.evaluate import evaluate, predict
from edgereg.train.normalize import Normalize
from edgereg.train.optim import OptimConfig
from edgereg.train.pretrain_run import pretrain_run
from edgereg.train.run import eval_run, train_run
from edgereg.train.stopping import StopConfig

VAL = FewLabels(Emoji10(vendor="google", split="test"), 0.01, seed=0)
FEW = FewLabels(Emoji10(vendor="twitter", split="train"), 0.04, seed=0)  # 40 images
PLAIN = Recipe(epochs=3, batch_size=10, optim=OptimConfig(lr=5e-3))
REGULARIZED = Recipe(
    epochs=2,
    batch_size=10,
    label_smoothing=0.05,
    regularize=[{"dropout": {"rate": 0.1}}],
    augment=[{"flip": {}}, {"affine": {"degrees": 10}}, {"rgb_shift": {}}, {"cutout": {}}],
    mix=MixConfig(mixup=0.2, cutmix=1.0, probability=0.5),
)


def train(out, recipe=PLAIN, **options):
    return train_run(FEW, out, recipe, bar=progress, **options)


def weights(path):
    return (path / "model.safetensors").read_bytes()


def test_a_few_epochs_lower_the_loss_and_write_a_checkpoint(tmp_path):
    result = train(tmp_path / "c")
    losses = [epoch.loss for epoch in result.history]
    assert len(losses) == 3 and losses[-1] < 0.85 * losses[0] < 0.85 * 3
    model, checkpoint = load_classifier(tmp_path / "c")
    assert checkpoint == result.checkpoint and checkpoint.recipe == PLAIN
    assert checkpoint.data["count"] == len(FEW)
    _, measured = eval_run(tmp_path / "c", FEW, bar=progress)
    assert measured.top1 == checkpoint.metrics["train"]["top1"] > 0.15
    assert not model.training


def test_the_same_run_twice_is_the_same_to_the_bit_and_another_seed_is_not(tmp_path):
    first = train(tmp_path / "a", REGULARIZED)
    torch.rand(5)
    second = train(tmp_path / "b", REGULARIZED)
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    assert [e.loss for e in first.history] == [e.loss for e in second.history]
    train(tmp_path / "c", Recipe(**vars(REGULARIZED) | {"seed": 1}))
    assert weights(tmp_path / "a") != weights(tmp_path / "c")


def test_steps_that_are_no_numbers_are_counted_and_the_last_good_weights_kept(tmp_path):
    exploding = Recipe(epochs=2, batch_size=10, optim=OptimConfig(lr=1e15, warmup=0))
    with pytest.raises(
        TrainingError, match=r"found: none in epoch 1;.*edgereg train --init .*last-good"
    ):
        train(tmp_path / "c", exploding)
    assert not (tmp_path / "c").exists()
    model, _ = load_classifier(tmp_path / "c.run" / "last-good")
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


def test_too_many_skipped_steps_in_a_row_stop_the_run(tmp_path):
    stop = StopConfig(max_skipped=1)
    exploding = Recipe(epochs=9, batch_size=10, optim=OptimConfig(lr=1e15, warmup=0), stop=stop)
    with pytest.raises(TrainingError, match=r"at most 1 steps.*no number in 2 steps"):
        train(tmp_path / "c", exploding)


def test_weights_that_are_no_numbers_are_never_written(tmp_path):
    optim = OptimConfig("sgd", lr=3e38, weight_decay=1e3, warmup=0)
    one_step = Recipe(epochs=1, batch_size=100, optim=optim)
    with pytest.raises(TrainingError, match="finite") as caught:
        train(tmp_path / "c", one_step)
    assert "--init" not in caught.value.remedy and not list(tmp_path.rglob("*.safetensors"))


def test_a_run_stops_early_and_keeps_the_best_epoch(tmp_path, monkeypatch):
    """The measured values are planted; the rest is a run."""
    planted, seen = iter([0.2, 0.5, 0.3, 0.4, 0.1, 0.9]), []

    def measure(model, pixels, labels, spec, **options):
        result = evaluate(model, pixels, labels, spec, **options)
        if len(pixels) == len(VAL):
            seen.append(model.state_dict()["head.weight"].clone())
            result = dataclasses.replace(result, top1=next(planted))
        return result

    monkeypatch.setattr(run_module, "evaluate", measure)
    recipe = Recipe(epochs=9, batch_size=10, stop=StopConfig(patience=3))
    result = train(tmp_path / "c", recipe, val=VAL)
    assert [epoch.val["top1"] for epoch in result.history] == [0.2, 0.5, 0.3, 0.4, 0.1]
    model, _ = load_classifier(tmp_path / "c")
    assert torch.equal(model.head.weight, seen[1]) and not torch.equal(seen[1], seen[4])


def test_early_stopping_needs_a_validation_set(tmp_path):
    with pytest.raises(RecipeError, match=r"stop\.patience: 3, and no validation set"):
        train(tmp_path / "c", Recipe(epochs=1, stop=StopConfig(patience=3)))


def test_frozen_stages_stay_as_they_were(tmp_path):
    train(tmp_path / "start")
    recipe = Recipe(epochs=1, batch_size=10, frozen_stages=2)
    train(tmp_path / "c", recipe, init=tmp_path / "start")
    before, after = (load_classifier(tmp_path / n)[0].state_dict() for n in ("start", "c"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert "head.weight" in moved and "backbone.blocks.2.second.0.weight" in moved
    assert not any(name.startswith(("backbone.stem", "backbone.blocks.0.")) for name in moved)


def test_the_average_is_what_is_written(tmp_path):
    plain = train(tmp_path / "a")
    averaged = train(tmp_path / "b", dataclasses.replace(PLAIN, ema=EmaConfig(decay=0.9)))
    assert [e.loss for e in plain.history] == [e.loss for e in averaged.history]
    assert weights(tmp_path / "a") != weights(tmp_path / "b")


def test_an_existing_directory_is_refused_before_the_first_image_is_read(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")

    class Unread:
        def __getattr__(self, name):
            raise AssertionError("looked at")

    with pytest.raises(BadInputError, match="exists and is not empty"):
        train_run(Unread(), tmp_path, PLAIN, bar=progress)


def test_the_accuracy_on_held_out_images_is_written_down(tmp_path):
    result = train(tmp_path / "c", val=VAL)
    _, measured = eval_run(tmp_path / "c", VAL, bar=progress)
    said = {"top1": measured.top1, "loss": pytest.approx(measured.loss), "count": 20}
    assert result.checkpoint.metrics["val"] == said | {"data": VAL.name}
    assert result.history[-1].val["top1"] == measured.top1


def test_the_model_that_is_measured_is_in_eval_mode_and_knows_every_running_mean(
    tmp_path, monkeypatch
):
    modes = []

    def spy(model, *args, **options):
        modes.append({module.training for module in model.modules()})
        return evaluate(model, *args, **options)

    monkeypatch.setattr(run_module, "evaluate", spy)
    train(tmp_path / "c", REGULARIZED)
    eval_run(tmp_path / "c", FEW, bar=progress)
    assert modes == [{False}, {False}]


class Recorder(nn.Module):
    """Answers with the index of its input, and remembers the input."""

    def __init__(self):
        super().__init__()
        self.anchor, self.seen = nn.Parameter(torch.zeros(1)), []

    def forward(self, x):
        self.seen.append(x.numpy().copy())
        return nn.functional.one_hot(torch.arange(len(x)) % 3, 3).float()


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for index, name in enumerate(["a", "a", "b", "b", "c"]):
        (tmp_path / "data" / name).mkdir(parents=True, exist_ok=True)
        image = rng.integers(0, 256, (30 + 7 * index, 50 - 5 * index, 3), dtype=np.uint8)
        (tmp_path / "data" / name / f"{index}.png").write_bytes(encode_png(image))
    return Folder(tmp_path / "data")


@pytest.mark.parametrize("resize", ["cover", "stretch"])
def test_evaluation_sees_exactly_what_the_device_computes(folder, resize):
    spec = Recipe(input=InputConfig(resize=resize)).preprocessing()
    model = Recorder()
    predict(model, Pixels(folder, spec), spec, batch_size=2)
    expected = preprocess([folder.load(i) for i in range(5)], spec)
    assert [len(x) for x in model.seen] == [2, 2, 1]
    assert np.array_equal(np.concatenate(model.seen), expected)


def test_training_normalizes_as_the_device_does(folder):
    spec = Recipe().preprocessing()
    pixels = Pixels(folder, spec)
    found = Normalize(spec)(pixels.batch(np.arange(5)).float() / 255).numpy()
    expected = preprocess([folder.load(i) for i in range(5)], spec)
    assert np.abs(found - expected).max() < 1e-6


def test_accuracy_is_counted_by_class(folder):
    spec = Recipe().preprocessing()
    # the recorder says 0 1 2 0 1
    labels = np.array([0, 0, 2, 2, 2])
    result = evaluate(Recorder(), Pixels(folder, spec), labels, spec, num_classes=3)
    assert result.top1 == pytest.approx(2 / 5) and result.count == 5
    assert result.per_class[0] == 1 / 2 and result.per_class[2] == pytest.approx(1 / 3)
    assert np.isnan(result.per_class[1])


def test_pre_training_is_deterministic_and_a_classifier_can_start_from_it(tmp_path):
    recipe = Recipe(epochs=2, batch_size=10, augment=[{"resized_crop": {}}, {"rgb_shift": {}}])
    first, second = (pretrain_run(FEW, tmp_path / n, recipe, bar=progress) for n in "ab")
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    assert first.checkpoint.metrics == second.checkpoint.metrics
    assert first.history[-1].loss < first.history[0].loss
    train(tmp_path / "c", init=tmp_path / "a")
    train(tmp_path / "d")
    assert weights(tmp_path / "c") != weights(tmp_path / "d")


def test_pre_training_refuses_a_backbone_of_one_size(tmp_path):
    model = ModelConfig("timm:vit_tiny_patch16_224", image_size=64)
    expected = r"PIRL's patches.*found: timm:\S+ does not take 18x18.*pirl\.transform to rotation"
    with pytest.raises(RecipeError, match=expected):
        pretrain_run(FEW, tmp_path / "e", Recipe(model=model), bar=progress)
    assert list(tmp_path.iterdir()) == []


def test_a_run_needs_two_images(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.png").write_bytes(encode_png(np.zeros((4, 4, 3), np.uint8)))
    with pytest.raises(DataError, match=r"at least two images; found: .* has 1"):
        pretrain_run(Folder(tmp_path / "data"), tmp_path / "e", PLAIN, bar=progress)


def test_a_classifier_needs_two_classes(tmp_path):
    (tmp_path / "data" / "only").mkdir(parents=True)
    for name in ("a.png", "b.png"):
        (tmp_path / "data/only" / name).write_bytes(encode_png(np.zeros((4, 4, 3), np.uint8)))
    with pytest.raises(DataError, match=r"two classes; found: 'data' has one, only"):
        train_run(Folder(tmp_path / "data"), tmp_path / "c", PLAIN, bar=progress)


def test_every_image_is_seen_at_most_once_an_epoch_and_others_are_left_out_each_time():
    data = FewLabels(FEW, 0.01, seed=0)  # two of each class
    orders = [epoch_order(data, seed=0, epoch=epoch) for epoch in range(6)]
    epochs = [list(epoch_batches(order, 6)) for order in orders]
    for batches in epochs:
        assert [len(batch) for batch in batches] == [6, 6, 6]
        assert len(set(np.concatenate(batches).tolist())) == 18
    left_out = [frozenset(range(20)) - set(np.concatenate(b).tolist()) for b in epochs]
    assert len(set(left_out)) > 3
    assert np.array_equal(epoch_order(data, seed=0, epoch=2), orders[2])
    assert [len(b) for b in epoch_batches(np.arange(3), 5)] == [3]


def test_the_bar_is_told_of_every_step(tmp_path):
    seen = {}

    @contextmanager
    def bar(description, total):
        steps = seen.setdefault(description, [total])
        yield lambda done, text: steps.append(done)

    train_run(FEW, tmp_path / "c", PLAIN, bar=bar)
    (read, *steps) = seen[f"read {FEW.name}"], *(seen["train resnet"],)
    assert read[-1] == read[0] == len(FEW)
    total, *done = steps[0]
    assert done == list(range(1, total + 1))
