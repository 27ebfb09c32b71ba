"""Figures of the commands as PNG: lines, histograms, bars and matrices, laid out for reading.

Drawn without pyplot and so without any global state or display; matplotlib is imported when a
figure is drawn. Values may be tensors, arrays or plain sequences; each file appears whole.
"""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ebm_prior.files import written_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Values = Any  # a tensor, an array or a sequence of numbers
Path = str | os.PathLike[str]
#: Label -> value, lower and upper end of its range, what to write beside the bar.
Bars = dict[str, tuple[float, float, float, str]]

# Okabe and Ito's palette, told apart with any kind of colour vision; marks repeat the message.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKS = ("o", "s", "^", "D", "v", "P", "X")
DPI = 150
BINS = 40


def lines(
    path: Path,
    x: Values,
    curves: Mapping[str, Values],
    *,
    xlabel: str,
    ylabel: str,
    title: str,
    band: Mapping[str, tuple[Values, Values]] | None = None,
    hline: Mapping[str, float] | float | None = None,
) -> None:
    """Curves over common x.

    Args:
        x: (n,), the positions of every curve.
        curves: label -> (n,).
        band: label of a curve -> its lower and upper bound, shaded.
        hline: a level, or label -> level, as dashed lines.
    """
    x = _array(x)
    figure, (axes,) = _figure(1, title)
    for i, (label, y) in enumerate(curves.items()):
        if len(_array(y)) != len(x):
            raise ValueError(f"{label}: {len(_array(y))} values at {len(x)} positions of x")
        colour = COLOURS[i % len(COLOURS)]
        mark = MARKS[i % len(MARKS)] if len(x) <= 40 else None
        axes.plot(x, _array(y), color=colour, marker=mark, markersize=4, label=label)
        if band and label in band:
            low, high = (_array(bound) for bound in band[label])
            axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
    levels = hline if isinstance(hline, Mapping) else {} if hline is None else {"": hline}
    for i, (label, level) in enumerate(levels.items()):
        style = ("--", ":", "-.")[i % 3]
        axes.axhline(level, color="0.35", linestyle=style, linewidth=1.2, label=label or None)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    _legend(axes)
    _save(path, figure)


def curves(
    path: Path,
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]],
    *,
    xlabel: str,
    ylabel: str,
    title: str,
    hline: Mapping[str, float] | None = None,
) -> None:
    """Panels of curves with an x of their own, on a logarithmic axis.

    Args:
        panels: title -> label of a curve -> its points (x, y), x positive.
        hline: title of a panel -> a level, dashed.
    """
    figure, all_axes = _figure(len(panels), title)
    for axes, (name, points) in zip(all_axes, panels.items(), strict=True):
        for i, (label, pairs) in enumerate(points.items()):
            x, y = zip(*sorted(pairs), strict=True)
            colour, mark = COLOURS[i % len(COLOURS)], MARKS[i % len(MARKS)]
            axes.plot(x, y, color=colour, marker=mark, markersize=4, label=label)
        if hline and name in hline:
            axes.axhline(hline[name], color="0.35", linestyle="--", linewidth=1.2)
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks := [2**i for i in range(1, 9)], [str(tick) for tick in ticks])
        axes.set(title=name, xlabel=xlabel, ylabel=ylabel)
        axes.grid(alpha=0.3)
        _legend(axes)
    _save(path, figure)


def histograms(
    path: Path, panels: Mapping[str, Mapping[str, Values]], *, xlabel: str, title: str
) -> None:
    """Densities side by side: panel title -> label -> values (n,); a panel has common bins."""
    figure, all_axes = _figure(len(panels), title)
    for axes, (name, groups) in zip(all_axes, panels.items(), strict=True):
        values = {label: _finite(group) for label, group in groups.items()}
        edges = np.histogram_bin_edges(np.concatenate(list(values.values())), bins=BINS)
        for i, (label, group) in enumerate(values.items()):
            colour = COLOURS[i % len(COLOURS)]
            share = np.full(len(group), 1 / max(1, len(group)))
            axes.hist(group, list(edges), weights=share, color=colour, alpha=0.35, label=label)
            axes.hist(
                group, list(edges), weights=share, color=colour, histtype="step", linewidth=1.2
            )
        axes.set(title=name, xlabel=xlabel, ylabel="share")
        _legend(axes)
    _save(path, figure)


def bars(
    path: Path,
    values: Mapping[str, float | tuple[float, float, float]],
    *,
    ylabel: str,
    title: str,
) -> None:
    """A bar per label, from the top down, with its number; (value, low, high) adds a range."""
    triples = {k: v if isinstance(v, tuple) else (v, v, v) for k, v in values.items()}
    figure, (axes,) = _figure(1, title, height=1.4 + 0.42 * len(triples))
    _draw_bars(axes, {label: (*triple, f"{triple[0]:.4g}") for label, triple in triples.items()})
    axes.set_xlabel(ylabel)
    _save(path, figure)


def bar_panels(path: Path, panels: Mapping[str, Bars], *, title: str) -> None:
    """Bars side by side, each panel with a scale of its own: panel title -> its bars."""
    longest = max((len(bars) for bars in panels.values()), default=0)
    rows = math.ceil(len(panels) / 3)
    height = 0.8 + rows * (1.0 + 0.42 * longest)
    figure, all_axes = _figure(len(panels), title, height=height)
    for axes, (name, bars) in zip(all_axes, panels.items(), strict=True):
        _draw_bars(axes, bars)
        axes.set_title(name, fontsize="medium")
        axes.margins(x=0.3)
    _save(path, figure)


def _draw_bars(axes: Axes, bars: Bars) -> None:
    """A bar per label, from the top down."""
    middle, low, high = (
        np.array([bar[i] for bar in bars.values()], dtype=float) for i in range(3)
    )
    places = np.arange(len(bars))
    axes.barh(places, middle, color=COLOURS[0], alpha=0.85)
    spread = high > low
    if spread.any():
        reach = np.stack([middle - low, high - middle])[:, spread]
        axes.errorbar(
            middle[spread], places[spread], xerr=reach, fmt="none", ecolor="black", capsize=3
        )
    for place, (value, _, top, note) in zip(places, bars.values(), strict=True):
        at = max(value, top, 0.0)
        axes.annotate(note, (at, place), (4, 0), textcoords="offset points", va="center")
    axes.set_yticks(places, list(bars))
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.grid(axis="x", alpha=0.3)


def heatmap(
    path: Path,
    matrix: Values,
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    *,
    title: str,
    xlabel: str = "",
    ylabel: str = "",
) -> None:
    """A matrix with the number in each cell, for example of confusion."""
    cells = np.asarray(matrix, dtype=float)
    if cells.shape != (len(row_labels), len(column_labels)):
        raise ValueError(
            f"a matrix of shape {cells.shape} with {len(row_labels)} row and"
            f" {len(column_labels)} column labels; expected one label for each"
        )
    size = (2.6 + 0.55 * cells.shape[1], 1.8 + 0.45 * cells.shape[0])
    figure, (axes,) = _figure(1, title, *size)
    picture = axes.imshow(cells, cmap="Blues", aspect="auto")
    figure.colorbar(picture, ax=axes)
    middle = (np.nanmin(cells) + np.nanmax(cells)) / 2
    for (row, column), value in np.ndenumerate(cells):
        colour = "white" if value > middle else "black"
        axes.text(column, row, f"{value:.3g}", ha="center", va="center", color=colour, fontsize=8)
    turn = 45 if max(map(len, column_labels)) > 4 else 0
    axes.set_xticks(range(cells.shape[1]), list(column_labels), rotation=turn)
    axes.set_yticks(range(cells.shape[0]), list(row_labels))
    axes.set(xlabel=xlabel, ylabel=ylabel)
    _save(path, figure)


# --- what they share


def _figure(
    panels: int, title: str, width: float = 0.0, height: float = 0.0
) -> tuple[Figure, list[Axes]]:
    """A figure of `panels` axes in rows of at most three; sizes in inches."""
    from matplotlib.figure import Figure

    if panels < 1:
        raise ValueError("nothing to draw: no panels")
    columns = min(panels, 3)
    rows = math.ceil(panels / columns)
    width, height = width or 2.4 + 4.0 * columns, height or 0.8 + 3.2 * rows
    figure = Figure((width, height), layout="constrained")
    figure.suptitle(textwrap.fill(title, round(11 * width)), fontsize="medium")
    grid = figure.subplots(rows, columns, squeeze=False)
    axes = list(grid.flat)
    for spare in axes[panels:]:
        spare.set_axis_off()
    return figure, axes[:panels]


def _legend(axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        axes.legend(handles, labels, fontsize="small", framealpha=0.8)


def _save(path: Path, figure: Figure) -> None:
    with written_whole(path) as temporary:
        figure.savefig(temporary, format="png", dpi=DPI)


def _array(values: Values) -> np.ndarray:
    """1-D float64 of anything; tensors come from their device."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
    return np.asarray(values, dtype=float).reshape(-1)


def _finite(values: Values) -> np.ndarray:
    found = _array(values)
    return found[np.isfinite(found)]
