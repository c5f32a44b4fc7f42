"""A run that was stopped and resumed is the uninterrupted one, bit for bit."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from edgereg.checkpoint import Checkpoint, save_checkpoint
from edgereg.data.emoji10 import Emoji10
from edgereg.data.images import FewLabels
from edgereg.errors import CheckpointError, RecipeError, StoppedError
from edgereg.models.zoo import build_model
from edgereg.progress import progress
from edgereg.recipe import load_recipe, recipe_from_json
from edgereg.train.loop import Loop
from edgereg.train.prepared import RunOptions
from edgereg.train.pretrain import METHODS
from edgereg.train.pretrain_run import pretrain_run
from edgereg.train.run import train_run

ROOT = Path(__file__).parent.parent
FEW = FewLabels(Emoji10(vendor="twitter", split="train"), 0.04, seed=0)
VAL = FewLabels(Emoji10(vendor="google", split="test"), 0.08, seed=0)
PLAIN = """
epochs: 3
batch_size: 10
optim: {lr: 5.0e-3}
"""
EVERYTHING = """
epochs: 3
batch_size: 10
label_smoothing: 0.1
compute: {precision: bf16, accumulate: 2}
optim: {name: sgd, lr: 0.05, clip: 1.0, schedule: onecycle}
augment:
  - flip: {alternate: true}
  - affine: {degrees: 10}
  - rgb_shift: {}
  - noise: {}
  - cutout: {}
progressive: {smallest: 16, step: 8, whole_from: 0.6}
mix: {mixup: 0.2, cutmix: 1.0, probability: 0.8}
regularize:
  - dropout: {rate: 0.2, where: head}
  - stochastic_depth: {rate: 0.2, where: residual}
batchnorm: {recompute: 2}
ema: {decay: 0.9}
stop: {patience: 5}
"""
SHARPNESS = PLAIN + "sam: {rho: 0.05}\nema: {decay: 0.9}\n"
LARS = PLAIN.replace("{lr: 5.0e-3}", "{name: lars, lr: 0.1}")


def recipe_of(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return load_recipe(path)


def outcome(result):
    """All that a resume must not change: weights, metrics and history, without the times."""
    history = [
        {k: v for k, v in epoch.items() if k != "images_per_second"}
        for epoch in result.to_json()["history"]
    ]
    return (result.path / "model.safetensors").read_bytes(), result.checkpoint.metrics, history


class StopAfter:
    """A progress bar that sends this process SIGTERM after some steps of training."""

    def __init__(self, step):
        self.step = step

    def __call__(self, description, total):
        bar = progress(description, total)
        if not description.startswith(("train", "pretrain")):
            return bar
        outer, sent = self, []

        class Bar:
            def __enter__(self):
                report = bar.__enter__()

                def stop(done, text):
                    report(done, text)
                    if done >= outer.step and not sent:
                        sent.append(True)
                        os.kill(os.getpid(), signal.SIGTERM)

                return stop

            def __exit__(self, *error):
                return bar.__exit__(*error)

        return Bar()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "text", [PLAIN, EVERYTHING, SHARPNESS, LARS], ids=["plain", "everything", "sharpness", "lars"]
)
def test_a_stopped_and_resumed_training_is_the_uninterrupted_one(tmp_path, text, workers):
    recipe = recipe_of(tmp_path, text)
    whole = train_run(FEW, tmp_path / "whole", recipe, bar=progress, val=VAL)
    cut, stops = tmp_path / "cut", 0
    for step in (2, 6, 9):  # in an epoch, in the next, and in the last
        with pytest.raises(StoppedError, match=r"SIGTERM after step \d+ of 12.*--resume"):
            train_run(
                FEW,
                cut,
                recipe,
                bar=StopAfter(step),
                val=VAL,
                options=RunOptions(resume=True, workers=workers),
            )
        stops += 1
    result = train_run(
        FEW, cut, recipe, bar=progress, val=VAL, options=RunOptions(resume=True, workers=workers)
    )
    assert stops == 3 and outcome(result) == outcome(whole)
    assert not list((tmp_path / "cut.run").glob("state-*"))


def test_a_resume_that_forgot_the_moments_would_be_seen(tmp_path, monkeypatch):
    """The negative control of the test above."""
    recipe = recipe_of(tmp_path, PLAIN)
    whole = train_run(FEW, tmp_path / "whole", recipe, bar=progress)
    with pytest.raises(StoppedError):
        train_run(FEW, tmp_path / "cut", recipe, bar=StopAfter(6))
    monkeypatch.setattr("edgereg.train.loop.load_optimizer", lambda optimizer, tensors: None)
    result = train_run(FEW, tmp_path / "cut", recipe, bar=progress, options=RunOptions(resume=True))
    assert outcome(result)[0] != outcome(whole)[0]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    recipe = recipe_from_json({"model": {"width": 4}})
    backbone = build_model(recipe.model, num_classes=1, seed=1).backbone
    path = tmp_path_factory.mktemp("teacher") / "teacher"
    save_checkpoint(path, backbone, Checkpoint("encoder", recipe, (), {}, {}))
    return path


def pretraining(tmp_path, method, teacher):
    return recipe_of(
        tmp_path,
        PLAIN
        + f"method: {method}\nmodel: {{width: 4}}\ncompute: {{accumulate: 2}}\n"
        + "ema: {decay: 0.9}\naugment: [{flip: {}}, {rgb_shift: {}}]\n"
        + "pirl: {negatives: 8, loss: nce}\ncolorization: {width: 8}\n"
        + f"distill: {{teacher: {teacher}, queue: 25}}\n",
    )


@pytest.mark.parametrize("method", METHODS)
def test_a_stopped_and_resumed_pretraining_is_the_uninterrupted_one(tmp_path, method, teacher):
    recipe = pretraining(tmp_path, method, teacher)
    whole = pretrain_run(FEW, tmp_path / "whole", recipe, bar=progress)
    with pytest.raises(StoppedError):
        pretrain_run(FEW, tmp_path / "cut", recipe, bar=StopAfter(5))
    result = pretrain_run(
        FEW, tmp_path / "cut", recipe, bar=progress, options=RunOptions(resume=True)
    )
    assert outcome(result) == outcome(whole)


@pytest.mark.parametrize(
    ("method", "forgotten"),
    [("pirl", "bank.rows"), ("pirl", "normaliser"), ("distill", "queue"), ("distill", "filled")],
)
def test_a_resume_that_forgot_a_memory_would_be_seen(
    tmp_path, method, forgotten, teacher, monkeypatch
):
    """The negative control of the test above."""
    recipe = pretraining(tmp_path, method, teacher)
    whole = pretrain_run(FEW, tmp_path / "whole", recipe, bar=progress)
    with pytest.raises(StoppedError):
        pretrain_run(FEW, tmp_path / "cut", recipe, bar=StopAfter(5))
    load = Loop.load

    def forgetful(loop, state):
        name = f"objective.method.{forgotten}"
        before = dict(loop.state().tensors)[name].clone()
        load(loop, replace(state, tensors={**state.tensors, name: before}))

    monkeypatch.setattr(Loop, "load", forgetful)
    result = pretrain_run(
        FEW, tmp_path / "cut", recipe, bar=progress, options=RunOptions(resume=True)
    )
    assert outcome(result)[0] != outcome(whole)[0]


def test_another_teacher_is_another_run(tmp_path, teacher):
    recipe = pretraining(tmp_path, "distill", tmp_path / "own")
    shutil.copytree(teacher, tmp_path / "own")
    with pytest.raises(StoppedError):
        pretrain_run(FEW, tmp_path / "cut", recipe, bar=StopAfter(2))
    other = build_model(recipe.model, num_classes=1, seed=2).backbone
    save_checkpoint(tmp_path / "own", other, Checkpoint("encoder", recipe, (), {}, {}), force=True)
    with pytest.raises(CheckpointError, match="another init"):
        pretrain_run(FEW, tmp_path / "cut", recipe, bar=progress, options=RunOptions(resume=True))


def test_the_log_of_a_resumed_run_tells_each_step_once(tmp_path):
    recipe = recipe_of(tmp_path, PLAIN)
    with pytest.raises(StoppedError):
        train_run(FEW, tmp_path / "cut", recipe, bar=StopAfter(5))
    train_run(FEW, tmp_path / "cut", recipe, bar=progress, options=RunOptions(resume=True))
    lines = [json.loads(x) for x in (tmp_path / "cut.run" / "log.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines if x["event"] == "step"] == list(range(12))
    assert [x["event"] for x in lines if x["event"] in ("start", "resume")] == ["start", "resume"]


def test_a_finished_run_is_not_run_again(tmp_path):
    recipe = recipe_of(tmp_path, PLAIN)
    first = train_run(FEW, tmp_path / "c", recipe, bar=progress)
    again = train_run(FEW, tmp_path / "c", recipe, bar=progress, options=RunOptions(resume=True))
    assert again.history == () and again.checkpoint == first.checkpoint
    other = recipe_of(tmp_path, PLAIN + "seed: 1\n")
    with pytest.raises(RecipeError, match="finished with another recipe"):
        train_run(FEW, tmp_path / "c", other, bar=progress, options=RunOptions(resume=True))


def test_a_stopped_run_goes_on_only_with_its_own_recipe(tmp_path):
    with pytest.raises(StoppedError):
        train_run(FEW, tmp_path / "c", recipe_of(tmp_path, PLAIN), bar=StopAfter(2))
    other = recipe_of(tmp_path, PLAIN.replace("5.0e-3", "6.0e-3"))
    with pytest.raises(CheckpointError, match=r"another recipe\.optim\.lr"):
        train_run(FEW, tmp_path / "c", other, bar=progress, options=RunOptions(resume=True))
    with pytest.raises(CheckpointError, match="--resume to go on"):
        train_run(FEW, tmp_path / "c", other, bar=progress)


def test_a_kill_loses_at_most_what_came_after_the_last_state(tmp_path):
    """The command itself and SIGKILL; benchmarks/resume.py does it at random, and often."""
    (tmp_path / "recipe.yaml").write_text("epochs: 8\nbatch_size: 16\nema: {decay: 0.9}\n")
    command = [sys.executable, "-c", "from edgereg.cli import main; import sys; sys.exit(main())"]
    command += ["train", "--data", "emoji-10:google:test", "--recipe", "recipe.yaml"]
    command += ["--device", "cpu", "--threads", "1", "--snapshot-minutes", "0", "--resume"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}

    def run(out, **options):
        return subprocess.Popen([*command, "--out", out], cwd=tmp_path, env=environment, **options)

    assert run("whole", stdout=subprocess.DEVNULL).wait() == 0
    killed = run("cut", stdout=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while len(list(tmp_path.glob("cut.run/state-*[2-9]"))) < 1 and time.monotonic() < until:
        time.sleep(0.01)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL and not (tmp_path / "cut").exists()
    assert run("cut", stdout=subprocess.DEVNULL).wait() == 0
    read = [(tmp_path / out / "model.safetensors").read_bytes() for out in ("whole", "cut")]
    assert read[0] == read[1]


def test_sigterm_ends_the_command_with_75(tmp_path):
    command = [sys.executable, "-c", "from edgereg.cli import main; import sys; sys.exit(main())"]
    command += ["train", "--data", "emoji-10:google:test", "--epochs", "500", "--out", "c"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [*command, "--device", "cpu", "--threads", "1"],
        cwd=tmp_path,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    log, until = tmp_path / "c.run" / "log.jsonl", time.monotonic() + 60
    while not (log.exists() and log.read_text().count("\n") > 2) and time.monotonic() < until:
        time.sleep(0.05)
    process.terminate()
    _, shown = process.communicate()
    assert process.returncode == 75
    assert "found:  SIGTERM after step" in shown and "go on with --resume" in shown
    assert len(list(tmp_path.glob("c.run/state-*"))) == 1 and not (tmp_path / "c").exists()
