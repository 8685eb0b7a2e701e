"""Figures: begin one, draw what several stages draw, label it, and write a PNG and a CSV of its numbers.

The colours are Okabe and Ito's (2008), which colour-blind readers can tell apart.
"""
from __future__ import annotations

import csv
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, TextIO

from utils.jsonl import replace_file

BLUE, ORANGE, GREEN, PINK, GREY = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#999999"
SKY, YELLOW, VERMILION, DARK_GREY, BAND = "#56B4E9", "#F0E442", "#D55E00", "#7F7F7F", "#DDDDDD"


class LineStyle(NamedTuple):
    """How a curve is drawn. Of two that coincide the later needs the smaller marks."""

    label: str
    color: str
    mark: str = "o"
    size: float = 5


def new_figure(width: float, height: float, n_rows: int = 1, n_columns: int = 1, **more) -> tuple:
    """Return (figure, axes [n_rows, n_columns]) without pyplot's state; sides in inches."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(n_rows, n_columns, squeeze=False, **more)


# ---- primitives
def lengths(values: Sequence[float], ends: Sequence[Sequence[float]]) -> list[list[float]]:
    """Return the lengths of whiskers down to low and up to high, for `ends` [(low, high), ...]."""
    return [[max(0.0, value - low) for value, (low, _) in zip(values, ends)],
            [max(0.0, high - value) for value, (_, high) in zip(values, ends)]]


def draw_bars(axes, places: Sequence[float], values: Sequence[float], ends: Sequence[Sequence[float]],
              width: float, horizontal: bool = False, **more) -> None:
    draw, side = (axes.barh, "xerr") if horizontal else (axes.bar, "yerr")
    draw(places, values, width, **{side: lengths(values, ends)}, capsize=2, error_kw={"linewidth": 1}, **more)


def draw_line(axes, x: Sequence[float], values: Sequence[float], ends: Sequence[Sequence[float]] | None,
              style: LineStyle, whiskers: bool = False) -> None:
    """Draw a curve with its intervals `ends`, as a pale band or whiskers."""
    looks = {"marker": style.mark, "color": style.color, "markersize": style.size, "label": style.label}
    if ends is None:
        axes.plot(x, values, **looks)
    elif whiskers:
        axes.errorbar(x, values, lengths(values, ends), capsize=3, elinewidth=1, **looks)
    else:
        low, high = zip(*ends)
        axes.plot(x, values, **looks)
        axes.fill_between(x, low, high, alpha=0.12, color=style.color, linewidth=0)


def draw_estimate(axes, y: float, value: float, thick: Sequence[float], thin: Sequence[float],
                  style: LineStyle, note: str = "") -> None:
    """Draw one line of a forest plot, with a note at the right edge."""
    axes.plot(thin, [y, y], color=style.color, linewidth=1)
    axes.plot(thick, [y, y], color=style.color, linewidth=3)
    axes.plot(value, y, style.mark, color=style.color, markersize=style.size)
    axes.annotate(note, (1.01, y), xycoords=("axes fraction", "data"), fontsize=7, va="center")


def draw_grid(axes, grid, bound: float, **more) -> object:
    """Draw and return a heat map from -bound (blue) to bound (red), NaN left blank."""
    return axes.imshow(grid, vmin=-bound, vmax=bound, cmap="RdBu_r", interpolation="nearest", **more)


# ---- labels and files
def tidy(axes, whole: bool = False) -> None:
    """Remove the frame's upper and right sides; `whole`: x are whole numbers."""
    axes.spines[["top", "right"]].set_visible(False)
    if whole:
        axes.xaxis.get_major_locator().set_params(integer=True)


def legend(figure, panels, **more) -> None:
    handles = {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncol=max(len(handles), 1),
                  frameon=False, **more)


def write_figure(figure, rows: list[dict], png: str | Path, **more) -> None:
    """Write a figure, and its numbers as a CSV whose columns the first row names."""
    def write_csv(file: TextIO) -> None:
        writer = csv.DictWriter(file, list(rows[0]) if rows else ["empty"], extrasaction="ignore",
                                lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)

    replace_file(png, partial(figure.savefig, format="png", dpi=150, **more), "wb")
    replace_file(Path(png).with_suffix(".csv"), write_csv)
