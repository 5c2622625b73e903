"""Plots as SVG text for one HTML page: no file, no script, colours that follow the page (light or dark).

Used by the report; refuses to know about run folders. matplotlib is imported when the first plot is drawn.
"""

from __future__ import annotations

import html
import io
import math
import re
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

SERIES = 8
"""Colours of the page: series 1 is the first system, the start model where there is one."""

# Danger: matplotlib knows no CSS variables. Each stand-in colour is replaced by one in the finished SVG.
_INK, _MUTED, _GRID, _PAPER = "#010101", "#020202", "#030303", "#040404"
_COLOURS = [f"#0a000{i}" for i in range(1, SERIES + 1)]
_VARIABLES = {
    _INK: "var(--ink)",
    _MUTED: "var(--muted)",
    _GRID: "var(--line)",
    _PAPER: "var(--paper)",
    **{colour: f"var(--series-{i})" for i, colour in enumerate(_COLOURS, start=1)},
}
_MARKERS = "osD^vPX*"
_PIXEL = 1 / 72
HALF, WHOLE = 490, 1000
"""Widths of a plot in a column and across the page, in pixels."""
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 12,
    "axes.titlesize": 13,
    "axes.titlelocation": "left",
    "axes.titlecolor": _INK,
    "axes.titlepad": 10,
    "axes.labelcolor": _MUTED,
    "axes.edgecolor": _GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.7,
    "xtick.color": _GRID,
    "ytick.color": _GRID,
    "xtick.labelcolor": _MUTED,
    "ytick.labelcolor": _MUTED,
    "text.color": _INK,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "legend.fontsize": 12,
}


class Point(NamedTuple):
    """One system in a plane of two rates: each (value, low, high) in [0, 1]."""

    name: str
    series: int
    x: tuple[float, float, float]
    y: tuple[float, float, float]


class Line(NamedTuple):
    """A named curve over optimiser steps."""

    name: str
    series: int
    x: Sequence[float]
    y: Sequence[float]
    is_faint: bool = False
    band: tuple[Sequence[float], Sequence[float]] | None = None
    """Lower and upper ends of an interval at each point."""


def safety_plot(panels: Sequence[tuple[str, str, Sequence[Point]]], y_label: str, *, name: str = "safety") -> str:
    """Draw safety against each price, one panel (title, x label, points) each, with 95 % bars."""
    with _Canvas(name, len(panels), height=330) as canvas:
        for axes, (title, x_label, points) in zip(canvas.axes, panels, strict=True):
            axes.set(title=title, xlabel=x_label, ylabel=y_label)
            for p in points:
                axes.errorbar(
                    100 * p.x[0],
                    100 * p.y[0],
                    xerr=_arms(p.x),
                    yerr=_arms(p.y),
                    fmt=_marker(p.series),
                    color=_COLOURS[p.series % SERIES],
                    markersize=8,
                    elinewidth=1.5,
                    zorder=3 - p.series / 100,  # the first systems lie on top
                )
            _fit_percent(axes, [p.x for p in points], [p.y for p in points])
        canvas.legend(list({p.name: p for _, _, points in panels for p in points}.values()))
        return canvas.svg(f"{', '.join(title for title, _, _ in panels)}, with 95 % intervals")


def curves_plot(
    name: str,
    panels: Sequence[tuple[str, Sequence[Line]]],
    stage_ends: Sequence[float] = (),
    *,
    width: int | None = None,
) -> str:
    """Draw curves over steps side by side; a dotted line marks the end of each stage but the last."""
    with _Canvas(name, len(panels), height=270, width=width) as canvas:
        for axes, (title, lines) in zip(canvas.axes, panels, strict=True):
            axes.set(title=title, xlabel="optimiser step")
            for line in lines:
                axes.plot(
                    line.x,
                    line.y,
                    color=_COLOURS[line.series % SERIES],
                    alpha=0.3 if line.is_faint else 1,
                    linewidth=1 if line.is_faint else 1.8,
                    marker="o" if len(line.x) <= 12 else None,
                    markersize=4,
                    label=None if line.is_faint else line.name,
                )
                if line.band is not None:
                    axes.fill_between(
                        line.x, *line.band, color=_COLOURS[line.series % SERIES], alpha=0.15, linewidth=0
                    )
            for end in stage_ends[:-1]:
                axes.axvline(end, color=_MUTED, linestyle=(0, (1, 3)), linewidth=1.2)
            if sum(not line.is_faint for line in lines) > 1:
                axes.legend(loc="best", labelcolor=_INK)
        return canvas.svg(", ".join(title for title, _ in panels))


def difficulty_plot(stages: Sequence[Sequence[float]], cuts: Sequence[float]) -> str:
    """Draw how difficulty is distributed, coloured by stage (easy first), with the cuts between stages."""
    everything = np.concatenate([np.asarray(s, dtype=float) for s in stages])
    low, high = float(everything.min()), float(everything.max())
    edges = np.linspace(low, high if high > low else low + 1, 41)
    with _Canvas("difficulty", 1, height=270) as canvas:
        axes = canvas.axes[0]
        axes.set(title="Difficulty of the training pairs", xlabel="score (larger is easier)", ylabel="pairs")
        axes.hist(
            [np.asarray(s, dtype=float) for s in stages],
            bins=edges,
            stacked=True,
            color=[_COLOURS[(i + 1) % SERIES] for i in range(len(stages))],
            label=[f"stage {i + 1}" for i in range(len(stages))],
        )
        for cut in cuts:
            axes.axvline(cut, color=_INK, linewidth=1)
        if len(stages) > 1:
            axes.legend(loc="best", labelcolor=_INK)
        return canvas.svg("Histogram of difficulty scores, by stage")


def exposure_plot(draws: Sequence[float], expected: Sequence[float]) -> str:
    """Draw mean draws of a pair by decile of difficulty inside its stage, beside the expectation."""
    with _Canvas("exposure", 1, height=270) as canvas:
        axes, x = canvas.axes[0], np.arange(1, len(draws) + 1)
        axes.set(title="How often a pair was drawn", xlabel="decile inside the stage, easy to hard", ylabel="draws")
        axes.bar(x, draws, color=_COLOURS[1], width=0.7, label="drawn")
        if len(expected) == len(draws):
            axes.plot(x, expected, color=_INK, marker="_", markersize=18, linestyle="", label="expected")
            axes.legend(loc="best", labelcolor=_INK)
        axes.set_xticks(x)
        axes.grid(False, axis="x")
        return canvas.svg("Mean number of draws by difficulty decile, against the expected number")


def density_plot(name: str, title: str, edges: Sequence[float], groups: Sequence[tuple[str, Sequence[float]]]) -> str:
    """Draw densities on common bins, one outline a group."""
    with _Canvas(name, 1, height=270) as canvas:
        axes = canvas.axes[0]
        axes.set(title=title, xlabel="similarity to the base", ylabel="density")
        for series, (label, density) in enumerate(groups):
            axes.stairs(density, edges, color=_COLOURS[series % SERIES], linewidth=1.8, label=label)
            axes.stairs(density, edges, color=_COLOURS[series % SERIES], alpha=0.15, fill=True)
        axes.legend(loc="best", labelcolor=_INK)
        return canvas.svg(f"Densities of {' and of '.join(label for label, _ in groups)} candidates")


def layers_plot(name: str, lines: Sequence[Line], chosen: Sequence[int]) -> str:
    """Draw areas under the curve over layers, the layers in use shaded; a half is chance."""
    with _Canvas(name, 1, height=270) as canvas:
        axes = canvas.axes[0]
        axes.set(title="Harmful from safe, by layer", xlabel="layer (0: embeddings)", ylabel="AUROC")
        if chosen:
            axes.axvspan(min(chosen) - 0.5, max(chosen) + 0.5, color=_GRID, alpha=0.5, linewidth=0)
        axes.axhline(0.5, color=_MUTED, linestyle=(0, (1, 3)), linewidth=1.2)
        for line in lines:
            axes.plot(line.x, line.y, color=_COLOURS[line.series % SERIES], linewidth=1.8, label=line.name)
        axes.legend(loc="best", labelcolor=_INK)
        return canvas.svg("Area under the curve by layer, over all candidates and within prompts")


def scatter_plot(name: str, groups: Sequence[tuple[str, Sequence[float], Sequence[float]]]) -> str:
    """Draw candidates by length and similarity, one mark a group."""
    with _Canvas(name, 1, height=270) as canvas:
        axes = canvas.axes[0]
        axes.set(title="Length against similarity", xlabel="tokens", ylabel="similarity to the base")
        for series, (label, x, y) in enumerate(groups):
            axes.plot(
                x, y, linestyle="", marker=_marker(series), markersize=4, alpha=0.6,
                color=_COLOURS[series % SERIES], label=label,
            )  # fmt: skip
        axes.legend(loc="best", labelcolor=_INK)
        return canvas.svg("Candidates by length and similarity to the base")


def heat_plot(name: str, title: str, rows: Sequence[str], columns: Sequence[str], shares: Any) -> str:
    """Draw shares in [0, 1], (rows, columns), as squares whose area grows with the share, with the numbers of few."""
    height = max(200, min(60 + 26 * len(rows), 900))
    with _Canvas(name, 1, height=height, width=WHOLE) as canvas:
        axes = canvas.axes[0]
        y, x = np.mgrid[0 : len(rows), 0 : len(columns)]
        size = 380 * np.asarray(shares, dtype=float).ravel() / max(float(np.max(shares)), 1e-9)
        axes.scatter(x.ravel(), y.ravel(), s=size, marker="s", color=_COLOURS[1])
        axes.set(title=title, xlim=(-0.5, len(columns) - 0.5), ylim=(len(rows) - 0.5, -0.5))
        axes.set_xticks(range(len(columns)), columns, rotation=0 if len(columns) <= 6 else 40, ha="center")
        axes.set_yticks(range(len(rows)), rows)
        axes.grid(False)
        if len(rows) * len(columns) <= 120:
            for i, j in zip(y.ravel(), x.ravel(), strict=True):
                axes.text(j + 0.2, i, f"{100 * shares[i][j]:.0f} %", va="center", color=_INK, fontsize=11)
        return canvas.svg(html.escape(title))


class _Canvas:
    """A figure of panels in a row, under our style, that turns into SVG text."""

    def __init__(self, name: str, panels: int, *, height: int, width: int | None = None) -> None:
        import matplotlib
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure

        self._name = name
        # The hash salt makes ids the same from run to run; the name keeps two plots of a page apart.
        self._context = matplotlib.rc_context({**_STYLE, "svg.hashsalt": name})
        self._context.__enter__()
        width = width or (WHOLE if panels > 1 else HALF)
        self._figure = Figure(figsize=(width * _PIXEL, height * _PIXEL), layout="constrained")
        FigureCanvasSVG(self._figure)
        self.axes: list[Any] = list(self._figure.subplots(1, panels, squeeze=False)[0])

    def __enter__(self) -> _Canvas:
        return self

    def __exit__(self, *error: object) -> None:
        self._context.__exit__(None, None, None)

    def legend(self, points: Sequence[Point]) -> None:
        """Put one legend of points for all panels above them."""
        from matplotlib.lines import Line2D

        handles = [
            Line2D(
                [],
                [],
                linestyle="",
                marker=_marker(p.series),
                color=_COLOURS[p.series % SERIES],
                markersize=8,
                label=p.name,
            )
            for p in points
        ]
        self._figure.legend(handles=handles, loc="outside upper left", ncols=min(len(points), 5), labelcolor=_INK)

    def svg(self, description: str) -> str:
        """Return the figure as an `<svg>` element for HTML."""
        buffer = io.StringIO()
        with warnings.catch_warnings():
            # Names in scripts that matplotlib's own font lacks: the reader's browser draws the text.
            warnings.filterwarnings("ignore", message="Glyph .* missing")
            warnings.filterwarnings("ignore", message="Matplotlib currently does not support .* natively")
            self._figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        return inline_svg(buffer.getvalue(), self._name, description)


def inline_svg(document: str, name: str, description: str) -> str:
    """Make an SVG document an element of a page: own ids, the page's colours and fonts, no metadata."""
    svg = document[document.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style\b.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font-family: [^;\"]*", "font-family: inherit", svg)
    svg = re.sub(r' id="([^"]*)"', rf' id="{name}-\1"', svg)
    svg = re.sub(r"url\(#([^)]*)\)", rf"url(#{name}-\1)", svg)
    svg = re.sub(r'xlink:href="#([^"]*)"', rf'href="#{name}-\1"', svg)
    svg = re.sub(r"#0[0-9a]0[0-9]0[0-9]", lambda m: _VARIABLES.get(m[0], m[0]), svg)
    view_box = re.search(r'viewBox="[^"]*"', svg)
    is_wide = bool(view_box and float(view_box[0].split()[2]) > HALF)
    head = (
        f'<svg class="plot{" wide" if is_wide else ""}" role="img" aria-label="{description}" '
        f"{view_box[0] if view_box else ''}>"
    )
    return head + re.sub(r"\n\s*", "\n", svg[svg.index(">") + 1 :]).strip()


def _marker(series: int) -> str:
    """A marker that is another one when the colours come round again."""
    return _MARKERS[(series + series // SERIES) % len(_MARKERS)]


def _arms(interval: tuple[float, float, float]) -> list[list[float]]:
    value, low, high = interval
    return [[100 * max(0.0, value - low)], [100 * max(0.0, high - value)]]


def _fit_percent(axes: Any, *intervals: Sequence[tuple[float, float, float]]) -> None:
    for set_limits, spans in zip((axes.set_xlim, axes.set_ylim), intervals, strict=True):
        low = 10 * math.floor(10 * min(s[1] for s in spans)) if spans else 0
        high = 10 * math.ceil(10 * max(s[2] for s in spans)) if spans else 100
        set_limits(max(0, low) - 1.5, min(100, max(high, low + 20)) + 1.5)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:.0f} %")
