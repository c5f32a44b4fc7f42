"""What a checkpoint's backbone is worth: neighbours, a linear probe, fine-tuning on few labels."""

import dataclasses
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray
from torch import nn

from deploy.publish import check_new_file
from deploy.runtime.preprocess import Preprocessing
from edgereg.checkpoint import load_backbone, save_checkpoint
from edgereg.data.images import Images, check_classes, labels_of
from edgereg.errors import DataError, StoppedError
from edgereg.evaluation.collapse import spread
from edgereg.evaluation.knn import knn_predict, usual_k
from edgereg.evaluation.label_share import label_share
from edgereg.evaluation.linear_probe import linear_probe
from edgereg.evaluation.result import EncoderEvaluation, Measurement
from edgereg.evaluation.retrieval import Gallery, write_retrieval
from edgereg.models.zoo import ModelConfig
from edgereg.recipe import InputConfig, Recipe
from edgereg.train.evaluate import predict
from edgereg.train.prepared import Bar, RunOptions, read_pixels
from edgereg.train.run import eval_run, train_run

__all__ = ["Plan", "evaluate_encoder"]

_TEMPERATURE = 0.1
_CHUNK = 1024  # images between two reports of progress


@dataclass(frozen=True)
class Plan:
    """What is to be measured.

    Args:
        knn: Weighted nearest neighbours.
        linear: A linear classifier on the frozen features.
        shares: Of the training labels, each in (0, 1], that the whole model is fine-tuned with.
        scratch: Whether each fine-tuning is done from random weights, too.
        retrieval: A PNG file to draw neighbours into.
    """

    knn: bool = True
    linear: bool = True
    shares: tuple[float, ...] = ()
    scratch: bool = False
    retrieval: Path | None = None


def evaluate_encoder(
    path: Path,
    test: Images,
    train: Images,
    *,
    plan: Plan,
    recipe: Recipe,
    bar: Bar,
    options: RunOptions | None = None,
) -> EncoderEvaluation:
    """Measure what the backbone of a checkpoint is worth on labelled data.

    Features come from the backbone in eval mode, through the device's own pre-processing.

    Args:
        path: An encoder's checkpoint, or a classifier's, of which the head is not looked at.
        test: Labelled; only measured on.
        train: Labelled with the same classes.
        plan: What to measure.
        recipe: Of fine-tuning; where its model and input are the default ones, they are the
            checkpoint's. Its seed decides everything that is drawn.
        bar: Shows how far it is.
        options: `force` is for the picture, `resume` and `snapshot_every_s` are not used.

    Raises:
        BadInputError, EdgeregError: The input is at fault.
        TrainingError, StoppedError: In fine-tuning.
    """
    options = options or RunOptions()
    if plan.retrieval is not None:
        check_new_file(plan.retrieval, what="a picture", force=options.force)
    backbone, feature_dim, checkpoint = load_backbone(path)
    for images in (test, train):
        labels_of(images)
    classes = train.class_names
    check_classes(test, classes)
    seen = _seen(test, train)
    spec = checkpoint.recipe.preprocessing()
    backbone = backbone.to(options.device)
    bank, queries = (_gallery(backbone, images, spec, bar, options) for images in (train, test))
    varied = spread(bank.features)
    measurements = [
        *_frozen(queries, bank, plan, num_classes=len(classes), seed=recipe.seed),
        *_fine_tuned(path, test, train, plan=plan, recipe=recipe, bar=bar, options=options),
    ]
    picture = None
    if plan.retrieval is not None:
        picture = write_retrieval(
            queries,
            bank,
            plan.retrieval,
            class_names=classes,
            seed=recipe.seed,
            force=options.force,
        )
    return EncoderEvaluation(
        path=path,
        kind=checkpoint.kind,
        data=test.name,
        train=train.name,
        class_names=classes,
        counts=tuple(np.bincount(labels_of(test), minlength=len(classes)).tolist()),
        feature_dim=feature_dim,
        seen=seen,
        spread=varied,
        measurements=tuple(measurements),
        retrieval=picture,
    )


def _seen(test: Images, train: Images) -> int:
    """Return how many test images are training images.

    Raises:
        DataError: All are; it would be the training set that is measured.
    """
    known = {hashlib.sha256(train.content(at)).digest() for at in range(len(train))}
    seen = sum(hashlib.sha256(test.content(at)).digest() in known for at in range(len(test)))
    if seen == len(test):
        raise DataError(
            "what is measured are images that were not trained on",
            found=f"all {seen} images of '{test.name}' are in '{train.name}'",
            remedy="name other images with --data",
        )
    return seen


def _gallery(
    backbone: nn.Module, images: Images, spec: Preprocessing, bar: Bar, options: RunOptions
) -> Gallery:
    pixels = read_pixels(images, spec, bar, workers=options.workers)
    features = []
    with bar(f"features of {images.name}", len(images)) as report:
        for start in range(0, len(images), _CHUNK):
            indices = np.arange(start, min(start + _CHUNK, len(images)))
            features.append(predict(backbone, pixels, spec, indices=indices))
            report(int(indices[-1]) + 1, "")
    return Gallery(images.name, pixels, np.concatenate(features), labels_of(images))


def _frozen(
    queries: Gallery, bank: Gallery, plan: Plan, *, num_classes: int, seed: int
) -> Iterator[Measurement]:
    """Measure what can be told from the features as they are."""
    truth = queries.labels

    def measured(name: str, answers: NDArray[np.int64], **settings: float) -> Measurement:
        counts, hits = (
            np.bincount(labels, minlength=num_classes)
            for labels in (truth, truth[answers == truth])
        )
        with np.errstate(invalid="ignore"):  # 0 / 0 is NaN
            per_class = tuple((hits / counts).tolist())
        top1 = float(hits.sum() / counts.sum())
        return Measurement(name, len(bank.labels), top1, per_class, settings)

    if plan.knn:
        k = usual_k(len(bank.labels))
        answers = knn_predict(
            queries.features,
            bank.features,
            bank.labels,
            num_classes=num_classes,
            k=k,
            temperature=_TEMPERATURE,
        )
        yield measured("knn", answers, k=k, temperature=_TEMPERATURE)
    if plan.linear:
        probe = linear_probe(
            bank.features, bank.labels, queries.features, num_classes=num_classes, seed=seed
        )
        yield measured("linear", probe.predictions, l2=probe.l2, gradient=probe.gradient)


def _fine_tuned(
    path: Path,
    test: Images,
    train: Images,
    *,
    plan: Plan,
    recipe: Recipe,
    bar: Bar,
    options: RunOptions,
) -> Iterator[Measurement]:
    """Measure classifiers that start from the backbone, and, if wanted, from random weights."""
    backbone, _, checkpoint = load_backbone(path)
    theirs = checkpoint.recipe
    recipe = dataclasses.replace(
        recipe,
        model=theirs.model if recipe.model == ModelConfig() else recipe.model,
        input=theirs.input if recipe.input == InputConfig() else recipe.input,
    )
    options = dataclasses.replace(options, resume=False, force=False)
    for share in plan.shares:
        few = label_share(train, share, seed=recipe.seed)
        with TemporaryDirectory() as folder:
            start = path
            if checkpoint.kind == "classifier":  # its head has seen all the labels
                start = Path(folder) / "backbone"
                bare = dataclasses.replace(checkpoint, kind="encoder", class_names=())
                save_checkpoint(start, backbone, bare)
            for what, init in (("finetune", start), ("scratch", None))[: 1 + plan.scratch]:
                out = Path(folder) / what
                try:
                    result = train_run(few, out, recipe, bar=bar, init=init, options=options)
                except StoppedError as error:
                    raise StoppedError(
                        "an evaluation leaves nothing to go on from",
                        found=error.found,
                        remedy="run `edgereg eval` again",
                    ) from error
                _, measured = eval_run(out, test, bar=bar)
                yield Measurement(
                    name=f"{what} {100 * share:g}%",
                    labels=len(few),
                    top1=measured.top1,
                    per_class=measured.per_class,
                    settings={"epochs": len(result.history)},
                )
