"""One run of self_supervised.py, in a process of its own."""

import dataclasses
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Job", "run"]

RECIPES = Path(__file__).parent.parent / "recipes"
# on top of recipes/ssl-cifar10.yaml; what each takes in about ten minutes on one core
FLAGS: dict[str, list[str]] = {
    "pirl": ["--pirl.temperature", "0.1", "--pirl.heads", "mlp", "--epochs", "28"],
    "simclr": ["--simclr.temperature", "0.2"],
    "vicreg": [],
    "lejepa": [],
    "colorization": ["--augment", "[{flip: {}}, {crop: {padding: 4}}]"],  # true colours
    "distill": [],
}
LONGER = ["--epochs", "24", "--optim.lr", "6e-3"]  # what is fine-tuned with few labels
FEW_LABELS = ["--augment", "[{flip: {}}, {crop: {padding: 4}}]", "--mix.probability", "0"]
# each start has the rate that is best for it, as measured on a tenth of the training images: a rate
# that suits the encoder alone would flatter it
RATES = {"random": "4.8e-2"}
RATE = "2.4e-2"
TEACHER = ["--model.width", "32", "--simclr.temperature", "0.2", "--epochs", "5"]


@dataclass(frozen=True)
class Job:
    """A run.

    Args:
        part: Of the benchmark.
        net: A name of the zoo.
        method: Of pre-training, or "random" for none.
        seed: Of everything.
        cifar: Folder of CIFAR-10's images, where they are needed.
    """

    part: str
    net: str
    method: str
    seed: int
    cifar: str = ""

    @property
    def name(self) -> str:
        """Return a name for files."""
        return f"{self.part}-{self.net}-{self.method}-{self.seed}"

    def result(self, out: Path) -> Path:
        """Return where the result goes."""
        return out / f"run-{self.name}.json"


def run(arguments: tuple[Job, Path, float]) -> str:
    """Run a job and write its result."""
    job, out, until = arguments
    if time.monotonic() > until:
        return f"{job.name}: left for the next sitting"
    import torch

    torch.set_num_threads(1)
    parts = {"labels": _labels, "recipe": _labels, "emoji": _emoji, "quick": _quick}
    figures = parts.get(job.part, _cifar)(job, out)
    result = {**dataclasses.asdict(job), **figures}
    path = job.result(out)
    path.with_suffix(".part").write_text(json.dumps(result))
    path.with_suffix(".part").rename(path)
    return f"{job.name}: {json.dumps(figures)}"


def _cifar(job: Job, out: Path) -> dict[str, Any]:
    flags = ["--model.name", job.net]
    if job.part == "teacher":
        flags += TEACHER
    elif job.part == "longer":
        flags += LONGER
    elif job.method == "distill":
        flags += ["--distill.teacher", str(out / "teacher-resnet-simclr-0")]
    flags += FLAGS.get(job.method, []) if job.part == "methods" else []
    flags += ["--epochs", "6"] if job.net == "vit" else []
    encoder, minutes = _pretrain(job, out, f"{job.cifar}/train", "ssl-cifar10.yaml", flags)
    if job.method == "distill":
        minutes += json.loads((out / "run-teacher-resnet-simclr-0.json").read_text())["minutes"]
    return {"minutes": minutes} | _neighbours(encoder, f"{job.cifar}/train", f"{job.cifar}/test")


def _labels(job: Job, out: Path) -> dict[str, Any]:
    """Fine-tune with a tenth of CIFAR-10's labels, from an encoder or from random weights.

    "labels" has each start's best settings, "recipe" those of recipes/train.yaml.
    """
    from edgereg.data.images import open_images
    from edgereg.evaluate_encoder import Plan, evaluate_encoder
    from edgereg.recipe import load_recipe

    part = "methods" if job.method == "random" else "longer"
    source = out / f"{part}-{job.net}-{job.method}-0"
    flags = ["--seed", str(job.seed), "--compute.precision", "bf16", "--model.name", job.net]
    if job.part == "labels":
        flags += [*FEW_LABELS, "--optim.lr", RATES.get(job.method, RATE)]
    recipe = load_recipe(RECIPES / "train.yaml", flags)
    found = evaluate_encoder(
        source,
        open_images(f"{job.cifar}/test"),
        open_images(f"{job.cifar}/train"),
        plan=Plan(knn=False, linear=False, shares=(0.1,)),
        recipe=recipe,
        bar=_no_bar,
    )
    (measured,) = found.measurements
    return {"top1": measured.top1, "labels": measured.labels}


def _emoji(job: Job, out: Path) -> dict[str, Any]:
    """Pre-train on both vendors, learn a tenth of one's labels, be tested on the other's glyphs."""
    from edgereg.data.images import open_images
    from edgereg.evaluation.label_share import label_share
    from edgereg.recipe import load_recipe
    from edgereg.train.prepared import RunOptions
    from edgereg.train.run import eval_run, train_run

    recipes = Path(__file__).parent.parent / "edgereg" / "demo" / "recipes"
    flags = ["--epochs", "60", "--compute.precision", "bf16", "--seed", str(job.seed)]
    encoder, minutes = _pretrain(job, out, "emoji-10:both:train", recipes / "pirl.yaml", flags)
    recipe = load_recipe(recipes / "few-labels.yaml", ["--seed", str(job.seed)])
    top1: dict[str, list[float]] = {"from_scratch": [], "from_encoder": []}
    for vendor, other in (("twitter", "google"), ("google", "twitter")):
        few = label_share(open_images(f"emoji-10:{vendor}:train"), 0.1, seed=job.seed)
        for key, init in (("from_scratch", None), ("from_encoder", encoder)):
            checkpoint = out / f"{job.name}-{vendor}-{key}"
            options = RunOptions(resume=True)
            train_run(few, checkpoint, recipe, bar=_no_bar, init=init, options=options)
            _, measured = eval_run(checkpoint, open_images(f"emoji-10:{other}:test"), bar=_no_bar)
            top1[key].append(measured.top1)
    return {key: sum(values) / len(values) for key, values in top1.items()} | {"minutes": minutes}


def _quick(job: Job, out: Path) -> dict[str, Any]:
    recipe = Path(__file__).parent.parent / "edgereg" / "demo" / "recipes" / "pirl.yaml"
    flags = ["--epochs", "6", "--compute.precision", "bf16"]
    encoder, minutes = _pretrain(job, out, "emoji-10:both:train", recipe, flags)
    found = _neighbours(encoder, "emoji-10:twitter:train", "emoji-10:google:test")
    return {"minutes": minutes} | found


def _pretrain(
    job: Job, out: Path, data: str, recipe: str | Path, flags: list[str]
) -> tuple[Path, float]:
    """Pre-train, or write random weights; return the checkpoint and the processor's minutes."""
    from edgereg.checkpoint import Checkpoint, save_checkpoint
    from edgereg.data.images import open_images
    from edgereg.models.zoo import build_model
    from edgereg.recipe import load_recipe
    from edgereg.train.prepared import RunOptions
    from edgereg.train.pretrain_run import pretrain_run

    encoder, is_random = out / job.name, job.method == "random"
    method = [] if is_random else ["--method", job.method]
    settings = load_recipe(RECIPES / recipe, [*method, "--seed", str(job.seed), *flags])
    images = open_images(data)
    if is_random:
        model = build_model(settings.model, num_classes=1, seed=settings.seed)
        described = Checkpoint("encoder", settings, (), {"name": "none", "count": 0}, {})
        save_checkpoint(encoder, model.backbone, described, force=True)
        return encoder, 0.0
    began = time.process_time()
    pretrain_run(images, encoder, settings, bar=_no_bar, options=RunOptions(force=True))
    return encoder, (time.process_time() - began) / 60


def _neighbours(encoder: Path, train: str, test: str) -> dict[str, Any]:
    from edgereg.data.images import open_images
    from edgereg.evaluate_encoder import Plan, evaluate_encoder
    from edgereg.recipe import Recipe

    found = evaluate_encoder(
        encoder, open_images(test), open_images(train), plan=Plan(), recipe=Recipe(), bar=_no_bar
    )
    top1 = {m.name.partition(" ")[0]: m.top1 for m in found.measurements}
    return {"knn": top1["knn"], "linear": top1["linear"], "count": sum(found.counts)}


@contextmanager
def _no_bar(description: str, total: int) -> Iterator[Any]:
    yield lambda done, text: None
