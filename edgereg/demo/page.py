"""The report: one self-contained HTML file."""

from collections.abc import Iterable, Sequence
from html import escape

from deploy.measure.verify import StageReport
from edgereg.demo.charts import accuracy_bars, latency_histogram, loss_curves
from edgereg.demo.pictures import Pictures
from edgereg.demo.result import OTHER, SAME, DemoResult
from edgereg.report.page import document

__all__ = ["render"]

_NAMES = {
    "cnn-plain": "CNN, plain",
    "cnn-regularized": "CNN, regularized",
    "vit-plain": "transformer, plain",
    "vit-regularized": "transformer, regularized",
    "few-scratch": "CNN, 10 % of labels",
    "few-pirl": "the same, from PIRL",
}


def render(result: DemoResult, pictures: Pictures) -> str:
    """Return the whole page; every figure on it was measured in this run."""
    sections = (
        _head(result),
        _data(pictures),
        _augmentation(pictures),
        _accuracy(result),
        _pretraining(result, pictures),
        _simplify(result),
        _parity(result),
        _latency(result),
        _inference(result),
        _limits(result),
    )
    return document("edgereg demo", "\n".join(sections))


def _head(result: DemoResult) -> str:
    gain = 100 * (result.top1("cnn-regularized", OTHER) - result.top1("cnn-plain", OTHER))
    verdict = (
        '<span class="pass">all bundles verified</span>'
        if result.passed
        else '<span class="fail">a bundle is not verified</span>'
    )
    warning = (
        '<p class="warning">A quick run: the CNNs were trained for half of their epochs or less, everything else for '
        "a tenth. The machinery is real; of the accuracies only the direction of the first pair means something.</p>"
        if result.quick
        else ""
    )
    machine = ", ".join(f"{key} {value}" for key, value in result.machine.items())
    return (
        "<h1>From images to a proved model, in one command</h1>\n"
        f"<p>Trained on one vendor's emoji and tested on another's, regularization moved the CNN by "
        f"<b>{gain:+.1f} points</b>. Exported for jetpack6.2 ({_judged(result)} by NVIDIA's parser and builder), verified and timed: "
        f"{verdict}.</p>\n{warning}"
        f'<p class="note">{escape(machine)}. {sum(result.seconds.values()):.0f} s in all: '
        + ", ".join(f"{escape(stage)} {s:.1f} s" for stage, s in result.seconds.items())
        + ".</p>"
    )


def _data(pictures: Pictures) -> str:
    return (
        "<h2>The images</h2>\n<p>emoji-10: 1,243 emoji in ten classes. The upper row is Twitter's hand, on which the "
        "classifiers were trained; the lower row is Google's, whose labels they never saw. A fifth of the glyphs is held out, the "
        "same for both.</p>\n"
        + _picture(pictures.samples, "one glyph of each class by two vendors")
    )


def _augmentation(pictures: Pictures) -> str:
    return (
        "<h2>Augmentation and mixing</h2>\n<p>First row: the images. Below, what the regularized CNN was shown of them "
        "in four epochs: flips, affine maps, RGB shift, colour jitter, Cutout.</p>\n"
        + _picture(pictures.augmented, "augmented images")
        + "<p>Cutout alone:</p>\n"
        + _picture(pictures.cutout, "Cutout")
        + "<p>Rows: an image, its partner, Mixup (60 : 40), CutMix.</p>\n"
        + _picture(pictures.mixed, "Mixup and CutMix")
    )


def _accuracy(result: DemoResult) -> str:
    names = ["cnn-plain", "cnn-regularized", "vit-plain", "vit-regularized"]
    splits = {
        "training images": [_train_top1(result, name) for name in names],
        "same vendor, held out": [result.top1(name, SAME) for name in names],
        "other vendor, held out": [result.top1(name, OTHER) for name in names],
    }
    count = result.training[names[0]].figures["tests"][OTHER]["count"]
    chart = accuracy_bars([_NAMES[name] for name in names], splits)
    return (
        "<h2>What regularization is worth</h2>\n<p>Plain: no augmentation, no weight decay, no dropout. Regularized: "
        "weight decay (not on norms and biases), dropout, augmentation, Mixup and CutMix. One seed; "
        f"n = {count} on each held-out set.</p>\n{chart}"
        + _table(
            ("model", *splits, "training"),
            (
                (
                    _NAMES[name],
                    *(f"{values[i]:.1%}" for values in splits.values()),
                    f"{result.training[name].seconds:.0f} s",
                )
                for i, name in enumerate(names)
            ),
        )
    )


def _pretraining(result: DemoResult, pictures: Pictures) -> str:
    history = [epoch["loss"] for epoch in result.training["pirl"].figures["history"]]
    figures = result.training["few-pirl"].figures["data"]
    return (
        "<h2>Pre-training without labels: PIRL</h2>\n<p>The encoder learned to give an image and its nine shuffled "
        "patches the same meaning. Left: the image; right: a random part of it, cut into 3x3 cells, a smaller patch "
        "from each at a random place, recoloured one by one and shuffled.</p>\n"
        + _picture(pictures.jigsaw, "jigsaw views")
        + loss_curves({"PIRL, both vendors' training glyphs, no labels": history})
        + f"<p>Then both nets below saw a tenth of the labels ({figures['count']} images), with the same "
        "regularization; one started from random weights, one from PIRL's, which has seen the other vendor's training glyphs too, without labels.</p>\n"
        + _table(
            ("model", "same vendor, held out", "other vendor, held out"),
            (
                (_NAMES[name], f"{result.top1(name, SAME):.1%}", f"{result.top1(name, OTHER):.1%}")
                for name in ("few-scratch", "few-pirl")
            ),
        )
    )


def _simplify(result: DemoResult) -> str:
    rows = []
    for job in result.exports.values():
        figures = job.figures
        if figures["target"] != "jetpack6.2":
            continue
        before, after = figures["before"], figures["after"]
        rows.append(
            (
                _NAMES[figures["checkpoint"]],
                *(
                    f"{before[key]:,} → {after[key]:,}"
                    for key in ("batchnorms", "dropouts", "nodes", "parameters")
                ),
                str(len(figures["skipped"])),
                f"{figures['float64_error']:.1e}",
            )
        )
    return (
        "<h2>Folded and stripped, proved in float64</h2>\n<p>BatchNorm went into the convolution before it, dropout "
        "away. The last column is the largest difference between the outputs before and after, relative to the "
        "output's size, in float64.</p>\n"
        + _table(("model", "BatchNorm", "dropout", "nodes", "parameters", "left", "error"), rows)
    )


def _parity(result: DemoResult) -> str:
    rows = []
    for name, report in result.verified.items():
        figures = result.exports[name].figures
        rows += [
            (
                name if place == 0 else "",
                stage.name,
                f"{stage.comparison.count}",
                *_compared(stage),
                _verdict(stage.comparison.passed),
                figures["verdict"] if place == 0 else "",
            )
            for place, stage in enumerate(report.stages)
        ]
    judges = sorted(
        {
            f"{r.figures['target']}: {r.figures['judge']}, {r.figures['detail']}"
            for r in result.exports.values()
            if r.figures["verdict"] != "not required"
        }
    )
    return (
        "<h2>Parity: does the bundle answer as the model did?</h2>\n<p>The golden images go through each stage here; "
        "the reference is the PyTorch model before folding, in float64. The error is the largest difference, scaled to "
        "the reference's range.</p>\n"
        + _table(
            (
                "bundle",
                "stage",
                "n",
                "error",
                "allowed",
                "top-1 agreement",
                "result",
                "NVIDIA's builder",
            ),
            rows,
            raw=6,
        )
        + "".join(f'<p class="note">{escape(judge)}</p>\n' for judge in judges)
    )


def _judged(result: DemoResult) -> str:
    verdicts = {r.figures["verdict"] for r in result.exports.values()} - {"not required"}
    return ", ".join(sorted(verdicts))


def _compared(stage: StageReport) -> tuple[str, str, str]:
    agreement = stage.comparison.top1_agreement
    return (
        f"{stage.comparison.max_scaled_error:.1e}",
        f"{stage.tolerance.max_scaled_error:.0e}",
        "" if agreement is None else f"{agreement:.1%}",
    )


def _latency(result: DemoResult) -> str:
    rows = []
    for name, measured in result.benched.items():
        for stage, summary in measured.summaries_ms().items():
            values = (
                "n too small" if value is None else f"{value:.3f}"
                for value in summary.percentiles.values()
            )
            rows.append((name, stage, *values))
    first = next(iter(result.benched.values()))
    percentiles = next(iter(first.summaries_ms().values())).percentiles
    samples = {name: r.samples_ms["end to end"] for name, r in result.benched.items()}
    return (
        f"<h2>Latency on this machine</h2>\n<p>ONNX Runtime, {first.threads} thread, batch 1, fp32, "
        f"n = {first.count} after {first.warmup} of warm-up, in ms an image. A percentile is given only where the samples "
        "suffice for it. On a shared machine these are noisy; no Jetson was measured.</p>\n"
        + latency_histogram(samples)
        + _table(("bundle", "stage", *percentiles), rows)
    )


def _inference(result: DemoResult) -> str:
    figures = "".join(
        f'<figure><img src="{uri}" alt=""><br>{escape(label)}<br>'
        f'<span class="{"pass" if answer.startswith(label) else "fail"}">{escape(answer)}</span></figure>'
        for uri, label, answer in result.predictions
    )
    return (
        "<h2>Run</h2>\n<p>One held-out glyph of each class in the other vendor's hand, as an encoded file through the "
        f'bundle: the true class, and the answer.</p>\n<div class="answers">{figures}</div>'
    )


def _limits(result: DemoResult) -> str:
    return (
        "<h2>What was not run</h2>\n<p>No Jetson and no TensorRT proper: engines are built on the device. NVIDIA's "
        f"own ONNX parser and builder (TensorRT-RTX, on the CPU) said of the jetpack6.2 bundles: {_judged(result)}. ONNX Runtime's CPU "
        "provider computed the parity, the latencies and the answers above, PyTorch on the CPU the accuracies.</p>\n"
        "<p>Go on with <code>edgereg verify</code>, <code>bench</code> and <code>infer</code> on:</p>\n<ul>"
        + "".join(
            f"<li><code>{escape(str(result.out / 'bundles' / f'{name}.bundle'))}</code></li>"
            for name in result.exports
        )
        + "</ul>"
    )


def _train_top1(result: DemoResult, name: str) -> float:
    value: float = result.training[name].figures["metrics"]["train"]["top1"]
    return value


def _picture(uri: str, alt: str) -> str:
    return f'<img class="pixels" src="{uri}" alt="{escape(alt)}">\n'


def _verdict(passed: bool) -> str:
    return '<span class="pass">pass</span>' if passed else '<span class="fail">FAIL</span>'


def _table(heading: Sequence[str], rows: Iterable[Sequence[str]], *, raw: int | None = None) -> str:
    """Return a table; the column `raw` holds HTML of ours, all others are escaped."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in heading)
    body = "".join(
        "<tr>"
        + "".join(
            f"<td>{cell if place == raw else escape(cell)}</td>" for place, cell in enumerate(row)
        )
        + "</tr>\n"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>\n'
