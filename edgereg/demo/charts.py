"""The report's charts, as inline SVG."""

from collections.abc import Mapping, Sequence

from matplotlib.ticker import MaxNLocator

from edgereg.report.figure import COLOURS, figure_of, svg_of

__all__ = ["accuracy_bars", "latency_histogram", "loss_curves"]


def accuracy_bars(models: Sequence[str], splits: Mapping[str, Sequence[float]]) -> str:
    """Draw a group of bars for each model, a bar for each data set.

    Args:
        models: The groups' names.
        splits: For each data set, the accuracy of each model, in [0, 1].
    """
    figure, axes = figure_of(height=3.6)
    width = 0.8 / len(splits)
    for place, (name, values) in enumerate(splits.items()):
        positions = [
            model + (place - (len(splits) - 1) / 2) * width for model in range(len(models))
        ]
        bars = axes.bar(
            positions, [100 * v for v in values], width * 0.94, label=name, color=COLOURS[place]
        )
        axes.bar_label(bars, fmt="%.0f", fontsize=8, padding=1)
    axes.set_xticks(range(len(models)), models)
    axes.set_ylabel("top-1, %")
    axes.set_ylim(0, 108)
    axes.legend(ncols=len(splits), loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    return svg_of(figure)


def loss_curves(curves: Mapping[str, Sequence[float]]) -> str:
    """Draw the loss of each run over its epochs."""
    figure, axes = figure_of(height=2.8)
    for place, (name, losses) in enumerate(curves.items()):
        axes.plot(range(1, len(losses) + 1), losses, label=name, color=COLOURS[place % 4])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("epoch")
    axes.set_ylabel("loss")
    axes.legend(frameon=False)
    return svg_of(figure)


def latency_histogram(samples_ms: Mapping[str, Sequence[float]]) -> str:
    """Draw how long single images took, end to end.

    Args:
        samples_ms: For each bundle, the samples. Those beyond the 99th percentile are left out of
            the picture.
    """
    figure, axes = figure_of(height=2.8)
    for place, (name, samples) in enumerate(samples_ms.items()):
        shown = sorted(samples)[: max(1, round(0.99 * len(samples)))]
        axes.hist(
            shown, bins=60, histtype="stepfilled", alpha=0.7, label=name, color=COLOURS[place + 1]
        )
    axes.set_xlabel("ms an image, end to end")
    axes.set_ylabel("images")
    axes.legend(frameon=False)
    return svg_of(figure)
