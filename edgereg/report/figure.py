"""Charts as inline SVG, alike in every report."""

import io
from typing import Any

import matplotlib
from matplotlib.figure import Figure

__all__ = ["COLOURS", "figure_of", "svg_of"]

COLOURS = ("#9aa5b1", "#2f6fb0", "#d9822b", "#3f9142")


def figure_of(*, height: float) -> tuple[Figure, Any]:
    """Return a figure of the page's width and its axes.

    Args:
        height: In inches; the width is 8.4.
    """
    figure = Figure(figsize=(8.4, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def svg_of(figure: Figure) -> str:
    """Return a figure as an <svg> element; the same figure is the same text."""
    # a fixed salt: the ids inside depend on nothing but the drawing
    with matplotlib.rc_context(
        {"svg.hashsalt": "edgereg", "svg.fonttype": "none", "font.family": "sans-serif"}
    ):
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
