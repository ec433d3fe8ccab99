"""The report's figures: drawn with matplotlib's objects, as inline SVG in the page's own colours, light or dark."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from markupsafe import Markup, escape
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mates.engine.evaluate.contents import Curve, Fit, Point, Selection
from mates.engine.layout import SHARED

Axes = Any  # matplotlib has no stubs here
Floats = npt.NDArray[np.float64]
Draw = Callable[[Axes], None]

PANEL_INCHES = (4.0, 2.8)  # small enough that labels stay readable at the width of a phone
RASTER_POINTS = 1500  # above this many points a picture is smaller than their outlines
BINS = 40
UNITS = ((1e21, "ZFLOP"), (1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"))

# Stand-ins that are written into the SVG and then exchanged for the page's colours. Rasterised points keep theirs,
# which therefore have to be readable on light and on dark ground.
INK, GRID = "#010101", "#020202"
SERIES = ("#7c8594", "#e8590c", "#1c7ed6", "#2f9e44", "#9c36b5", "#c99700", "#0c8599", "#c2255c", "#8d5a3b")
COLOURS = {INK: "currentColor", GRID: "var(--grid)"} | {colour: f"var(--series-{number})" for number, colour in enumerate(SERIES)}
STYLE = {
    "svg.fonttype": "none",  # text stays text: it takes the page's font and can be searched
    "font.size": 9,
    "axes.titlesize": 9.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GRID,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.8,
    "axes.formatter.useoffset": False,
}


def series_number(methods: Sequence[str], arm: str) -> int:
    """Which of the page's series colours an arm has: random and the shared stage are grey."""
    others = [method for method in methods if method not in ("random", SHARED)]
    return 1 + others.index(arm) % (len(SERIES) - 1) if arm in others else 0


def panel(name: str, title: str, draw: Draw) -> Markup:
    """One figure as an ``<svg>`` element. The same drawing gives the same bytes.

    Args:
        name: unique in the page, letters, digits and '-': ids inside the figure start with it.
        title: what a screen reader says.
        draw: draws on the axes.
    """
    with mpl.rc_context():
        mpl.rcdefaults()  # a reader's own matplotlibrc must not change the report
        mpl.rcParams.update(STYLE | {"svg.hashsalt": name})
        figure = Figure(figsize=PANEL_INCHES, layout="constrained")
        draw(figure.subplots())
        buffer = io.StringIO()
        none = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=none, dpi=144)
    return _inline(buffer.getvalue(), name, title)


def _inline(document: str, name: str, title: str) -> Markup:
    """The ``<svg>`` element of a document: ids made unique, fixed size dropped, colours handed to the page."""
    svg = document[document.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", svg)
    head, body = svg.split(">", 1)
    head = re.sub(r'\s(width|height|version)="[^"]*"', "", head)
    for colour, page_colour in COLOURS.items():
        body = body.replace(colour, page_colour)
    return Markup(f'{head} role="img" aria-label="{escape(title)}">{body}')  # matplotlib has escaped the texts


def signed(value: float) -> str:
    """Three digits with their sign."""
    return f"{value:+#.3g}".rstrip(".").replace("-", "\N{MINUS SIGN}")


def flops_unit(largest: float) -> tuple[float, str]:
    """The unit that suits numbers up to ``largest``: its size in FLOPs and its name."""
    return next((unit for unit in UNITS if largest >= unit[0]), (1.0, "FLOP"))


# --- training loss -------------------------------------------------------------------------------------------------


def smoothed(losses: Floats, window: int) -> Floats:
    """Centred running mean over ``window`` steps, over fewer at both ends: [n] → [n]."""
    kernel = np.ones(min(max(1, window), len(losses)))
    return np.convolve(losses, kernel, "same") / np.convolve(np.ones(len(losses)), kernel, "same")


def loss_figure(name: str, curves: Sequence[Curve], methods: Sequence[str], *, steps_per_stage: int, window: int) -> Markup:
    """Training loss against optimizer steps: each step faintly, the running mean on top, dots between stages."""

    def draw(axes: Axes) -> None:
        for curve in curves:
            colour = SERIES[series_number(methods, curve.arm)]
            steps = curve.first_step + 1 + np.arange(len(curve.losses))
            mean = smoothed(curve.losses, window)
            if window > 1:
                axes.plot(steps, curve.losses, color=colour, lw=0.7, alpha=0.3, rasterized=len(steps) > RASTER_POINTS)
            shown = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), 600)).astype(int))
            style = "--" if curve.arm == SHARED else "-"
            axes.plot(steps[shown], mean[shown], style, color=colour, label=_arm_label(curve.arm))
        first = min(curve.first_step for curve in curves)
        last = max(curve.first_step + len(curve.losses) for curve in curves)
        for boundary in range(first + steps_per_stage, last, steps_per_stage):
            axes.axvline(boundary + 0.5, color=INK, lw=0.8, ls=":", alpha=0.6)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.set(xlabel="optimizer step", ylabel="training loss (nats per token)")
        axes.legend()

    return panel(name, "Training loss against optimizer steps", draw)


def _arm_label(arm: str) -> str:
    return "stage 0 (shared)" if arm == SHARED else arm


# --- evaluation ----------------------------------------------------------------------------------------------------


def evaluation_figure(
    name: str,
    points: Mapping[str, Sequence[Point]],
    metric: str,
    label: str,
    methods: Sequence[str],
    *,
    percent: bool = False,
) -> Markup:
    """A metric against the FLOPs of pretraining and selection, one point a stage, one line a method."""
    unit, unit_name = flops_unit(max(point.flops for line in points.values() for point in line))
    scale = 100.0 if percent else 1.0

    def draw(axes: Axes) -> None:
        for method, line in points.items():
            number = series_number(methods, method)
            flops = [point.flops / unit for point in line]
            values = [scale * point.metrics[metric] for point in line]
            axes.plot(flops, values, color=SERIES[number], marker="os^DvPX*h"[number], ms=5, label=method, clip_on=False)
        axes.set_xlim(left=0)
        if percent:
            axes.set_ylim(bottom=0, top=max(1.0, axes.get_ylim()[1]))
        axes.set(xlabel=f"total compute, selection included ({unit_name})", ylabel=label)
        axes.legend()

    return panel(name, f"{label} against total compute", draw)


# --- selection -----------------------------------------------------------------------------------------------------


def influence_figure(name: str, influence_nats: Floats, series: int) -> Markup:
    """Histogram of oracle influences, with a line at their mean and one at 0 where some help and some harm."""

    def draw(axes: Axes) -> None:
        exponent = _thousands_exponent(influence_nats)
        values = influence_nats / 10.0**exponent
        axes.hist(values, bins=_edges(values), color=SERIES[series], alpha=0.75)
        mean = float(values.mean())
        axes.axvline(mean, color=INK, lw=1.4, label=f"mean {signed(mean)}")
        if values.min() <= 0 <= values.max():  # a line far off would squeeze the histogram
            axes.axvline(0, color=INK, lw=1, ls=":", label="no influence")
        power = f" (10{_superscript(exponent)} nats)" if exponent else " (nats)"
        axes.set(xlabel="oracle influence" + power + ", lower helps more", ylabel="probed samples")
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.margins(y=0.2)  # room for the legend
        axes.legend(loc="upper left")

    return panel(name, "Distribution of oracle influences", draw)


def agreement_figure(name: str, fit: Fit, series: int) -> Markup:
    """Predicted against oracle influence of the test part, with the line of perfect prediction."""

    def draw(axes: Axes) -> None:
        many = len(fit.oracle_sd) > RASTER_POINTS
        axes.scatter(
            fit.oracle_sd,
            fit.predicted_sd,
            s=6 if many else 14,
            color=SERIES[series],
            alpha=0.55,
            lw=0,
            rasterized=many,
        )
        low, high = float(fit.oracle_sd.min()), float(fit.oracle_sd.max())
        axes.plot([low, high], [low, high], color=INK, lw=1, ls=":", label="prediction = oracle")
        axes.set(xlabel="oracle influence (SD)", ylabel="predicted (SD)")
        axes.legend()

    return panel(name, "Predicted against oracle influence of test samples", draw)


def selection_figure(name: str, selection: Selection, series: int) -> Markup:
    """Distribution of scores: all candidates and the selected ones."""
    edges = _edges(selection.candidates)

    def draw(axes: Axes) -> None:
        parts = (("candidates", selection.candidates, SERIES[0]), ("selected", selection.selected, SERIES[series]))
        for label, scores, colour in parts:
            heights = np.histogram(scores, edges)[0] / len(scores)
            axes.stairs(100 * heights, edges, fill=True, color=colour, alpha=0.25)
            axes.stairs(100 * heights, edges, color=colour, lw=1.4, label=f"{label}, mean {signed(scores.mean())}")
            axes.axvline(scores.mean(), ymax=0.75, color=colour, lw=1.2, ls="--")
        axes.set(xlabel="score (SD of the labels), lower helps more", ylabel="share in a bin (%)")
        axes.margins(y=0.35)  # room for the legend
        axes.legend(loc="upper left")

    return panel(name, "Scores of candidates and of selected samples", draw)


def _edges(values: Floats) -> Floats:
    """Histogram edges: by the data's spread, at most ``BINS`` bins."""
    edges = np.histogram_bin_edges(values, "auto")
    return edges if len(edges) <= BINS + 1 else np.histogram_bin_edges(values, BINS)


def _thousands_exponent(values: Floats) -> int:
    """The power of ten, a multiple of three, that brings the values near 1."""
    largest = float(np.abs(values).max())
    return 3 * int(np.floor(np.log10(largest) / 3)) if largest > 0 else 0


def _superscript(exponent: int) -> str:
    return str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
