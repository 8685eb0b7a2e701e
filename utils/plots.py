"""How figures are begun, labelled and written: a PNG, and beside it the CSV of the numbers that it shows.

Colours are Okabe and Ito's (2008), which people with colour-blind eyes tell apart; shape and place say the
same in print. matplotlib is imported by the function that begins a figure, so that importing a script stays
free of side effects.
"""
import csv
from functools import partial
from pathlib import Path
from typing import TextIO

from utils.jsonl import replace_file

BLUE, ORANGE, GREEN, PINK, GREY = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#999999"
SKY, YELLOW, VERMILION, DARK_GREY, BAND = "#56B4E9", "#F0E442", "#D55E00", "#7F7F7F", "#DDDDDD"


def new_figure(width: float, height: float, n_rows: int = 1, n_columns: int = 1, **more) -> tuple:
    """Return (figure, axes [n_rows, n_columns]), without a display and without pyplot's state; sides in
    inches."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(n_rows, n_columns, squeeze=False, **more)


def tidy(axes, whole: bool = False) -> None:
    """Take the frame's upper and right side away; `whole`: x are whole numbers."""
    axes.spines[["top", "right"]].set_visible(False)
    if whole:
        axes.xaxis.get_major_locator().set_params(integer=True)


def legend(figure, panels, **more) -> None:
    """Put one legend of all panels below them."""
    handles = {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncol=max(len(handles), 1),
                  frameon=False,
                  **more)


def write_figure(figure, rows: list[dict], png: str | Path, **more) -> None:
    """Write a figure and, beside it under the same name, its numbers; the first row names the columns."""
    def write_csv(file: TextIO) -> None:
        writer = csv.DictWriter(file, list(rows[0]) if rows else ["empty"], extrasaction="ignore",
                                lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)

    replace_file(png, partial(figure.savefig, format="png", dpi=150, **more), "wb")
    replace_file(Path(png).with_suffix(".csv"), write_csv)
