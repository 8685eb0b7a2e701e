"""Figures of probe.py, each with the numbers behind it in a CSV of the same name. Raw is always drawn beside
corrected."""
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.plots import (BLUE, DARK_GREY, GREEN, ORANGE, PINK, VERMILION, legend, new_figure, tidy,
                         write_figure)
from utils.probe.similarity import FORMS


class Look(NamedTuple):
    """How a kind of states is drawn; lines that coincide stay visible, as small marks lie on top of large
    ones."""

    name: str
    color: str
    mark: str
    size: float = 5


LOOKS = {"imagination": Look("imagination", BLUE, "o", 3.5), "text": Look("text after it", VERMILION, "s"),
         "image": Look("image tokens", GREEN, "^", 8), "inner": Look("inner layer", PINK, "D"),
         "dummy_pad": Look("pads fed instead", DARK_GREY, "x"), "start": Look("start", ORANGE, "P")}


def finish(figure, path: Path, rows: list[dict]) -> None:
    write_figure(figure, rows, path, bbox_inches="tight")  # a label beside an image may lie outside


def draw_heatmaps(matrices: dict[tuple[str, str, int], tuple[np.ndarray, np.ndarray]], tasks: np.ndarray,
                  path: Path) -> None:
    """F1: the cosine of every pair of instances; a column a step, two rows (raw, centred) a kind.

    matrices[(kind, form, step)] = (places [m] in `tasks`, cosines [m, m]). Instances are ordered by task,
    with a line between tasks and their names on the left.
    """
    rows = [(kind, form) for kind in LOOKS for form in ("raw", "centred") if (kind, form, 0) in matrices]
    n_steps = 1 + max(step for _, _, step in matrices)
    figure, axes = new_figure(1.35 * n_steps + 1.6, 1.35 * len(rows) + 0.8, len(rows), n_steps)
    numbers, shown = [], None
    for panel, (kind, form) in zip(axes, rows):
        for step, ax in enumerate(panel):
            ax.set(xticks=[], yticks=[])
            if (kind, form, step) not in matrices:
                ax.axis("off")
                continue
            who, matrix = matrices[kind, form, step]
            order = np.lexsort((who, tasks[who]))
            shown = ax.imshow(matrix[np.ix_(order, order)], vmin=-1, vmax=1, cmap="RdBu_r",
                              interpolation="nearest")
            names, counts = np.unique(tasks[who], return_counts=True)
            for edge in np.cumsum(counts)[:-1]:
                ax.axhline(edge - 0.5, color="black", linewidth=0.6)
                ax.axvline(edge - 0.5, color="black", linewidth=0.6)
            if step == 0:
                ax.set_yticks(np.cumsum(counts) - counts / 2 - 0.5, [str(name)[:18] for name in names],
                              fontsize=6)
                ax.set_ylabel(f"{LOOKS[kind].name}\n{form}", fontsize=8)
            one, two = np.triu_indices(len(who), 1)
            numbers += [{"kind": kind, "form": form, "step": step + 1, "instance": int(who[i]),
                         "other": int(who[j]),
                         "cosine": f"{matrix[i, j]:.4f}"} for i, j in zip(one, two)]
    for step, ax in enumerate(axes[0]):
        ax.set_title(f"step {step + 1}", fontsize=9)
    figure.suptitle(f"Cosine between every two of {len(tasks)} instances, by task", fontsize=11)
    if shown is not None:
        figure.colorbar(shown, ax=axes, label="cosine", shrink=0.5, aspect=50)
    finish(figure, path, numbers)


def draw_curves(rows: list[dict], level: float, path: Path) -> None:
    """F2 (and F5 where the imagination is text): similarity by step; a row a form, a column a measure, a line
    a kind."""
    titles = {"inter": "between instances, same step", "adjacent": "one instance, step t - 1 to t",
              "first": "one instance, step 1 to t"}
    rows = [row for row in rows if row["layer"] == -1 and row["pairs"] == "all" and row["measure"] in titles]
    forms = [form for form in FORMS if any(row["form"] == form for row in rows)]
    figure, axes = new_figure(12.5, 2.7 * len(forms) + 0.8, len(forms), 3, sharey=True)
    for form, panel in zip(forms, axes):
        for ax, (measure, title) in zip(panel, titles.items()):
            for kind, look in reversed(LOOKS.items()):
                points = [row for row in rows if (row["kind"], row["form"], row["measure"])
                          == (kind, form, measure)]
                if not points:
                    continue
                x = [row["step"] + 1 for row in points]
                ax.plot(x, [row["value"] for row in points], marker=look.mark, color=look.color,
                        markersize=look.size,
                        label=look.name)
                ax.fill_between(x, [row["low"] for row in points], [row["high"] for row in points],
                                alpha=0.12,
                                color=look.color, linewidth=0)
            ax.axhline(0, color="black", linewidth=0.5)
            ax.set(ylim=(-0.55, 1.05), xlabel="step t" if form == forms[-1] else "",
                   title=title if form == forms[0] else "")
            tidy(ax, whole=True)
        panel[0].set_ylabel(f"{form}\nmean cosine ({100 * level:.3g} %)")
    legend(figure, axes[0][:1])
    finish(figure, path, rows)


def draw_probing(probing: dict, level: float, path: Path) -> None:
    """F4: accuracy by condition, parsed and by R0, with Wilson intervals and the line of chance."""
    names = {"image": "image", "image_own": "image and\nown", "text_only": "question\nonly", "own": "own",
             "other": "another\nimage's", "mean": "mean", "random": "noise", "cut": "cut:\nown",
             "cut_other": "cut: another\nimage's", "cut_none": "cut:\nnone"}
    shown = [name for name in names if name in probing["conditions"]]
    figure, [[ax]] = new_figure(1.05 * len(shown) + 2, 4.6)
    rows = []
    for x, name in enumerate(shown):
        entry = probing["conditions"][name]
        for offset, readout, part, color in ((-0.2, "parsed", entry, BLUE), (0.2, "R0", entry["r0"], ORANGE)):
            if part is None:
                continue
            ends = [[100 * abs(end - part["accuracy"])] for end in part["ci"]]
            ax.bar(x + offset, 100 * part["accuracy"], 0.38, yerr=ends, capsize=3, color=color,
                   label={"parsed": "reply, parsed", "R0": "likeliest option (R0)"}[readout] if x == 0
                   else None)
            rows.append({"condition": name, "readout": readout, "accuracy": part["accuracy"],
                         "low": part["ci"][0],
                         "high": part["ci"][1], "parsed": entry["parsed"], "chance": probing["chance"],
                         "n": probing["n"]})
    ax.axhline(100 * probing["chance"], color="black", linestyle="--", linewidth=1,
               label=f"chance, {100 * probing['chance']:.1f} %")
    parsed = [100 * probing["conditions"][name]["parsed"] for name in shown]
    ax.set_xticks(range(len(shown)), [f"{names[name]}\n({share:.0f} %)" for name,
                                      share in zip(shown, parsed)], fontsize=8)
    ax.set(ylim=(0, 118), ylabel=f"accuracy, % ({100 * level:.3g} % interval)",
           xlabel="given beside the question (share parsed)",
           title=f"{probing['n']} questions about what was imagined")
    ax.set_yticks(range(0, 101, 20))
    tidy(ax)
    ax.legend(frameon=False, loc="upper center", ncol=3, fontsize=8)
    finish(figure, path, rows)


def draw_layers(rows: list[dict], path: Path) -> None:
    """F8: layer by step at the latent positions: raw and centred inter-instance cosine, and what a linear
    probe reads."""
    panels = [("raw cosine", "inter", "raw"), ("centred cosine", "inter", "centred"),
              ("answer read, above shuffled", "decode", "raw")]
    rows = [row for row in rows if row["kind"] == "inner" and row["pairs"] == "all"
            and row["measure"] in ("inter", "decode")]
    panels = [panel for panel in panels if any((row["measure"], row["form"]) == panel[1:] for row in rows)]
    n_layers, n_steps = (1 + max(row[name] for row in rows) for name in ("layer", "step"))
    figure, axes = new_figure(4.2 * len(panels), 0.16 * n_layers + 2.6, 1, len(panels))
    for ax, (title, measure, form) in zip(axes[0], panels):
        grid = np.full((n_layers, n_steps), np.nan)
        for row in rows:
            if row["measure"] == measure and row["form"] == form:
                grid[row["layer"], row["step"]] = row["value"]
        shown = ax.imshow(grid, vmin=-1, vmax=1, cmap="RdBu_r", aspect="auto", origin="lower",
                          interpolation="nearest",
                          extent=(0.5, n_steps + 0.5, 0.5, n_layers + 0.5))
        ax.set(title=title, xlabel="step")
        tidy(ax, whole=True)
        ax.yaxis.get_major_locator().set_params(integer=True)
    axes[0][0].set_ylabel("input of layer")
    figure.colorbar(shown, ax=axes, shrink=0.8)
    finish(figure, path, rows)


def draw_spectra(rows: list[dict], path: Path) -> None:
    """F9: how many directions the states of a step span, and the share of the largest, a line a kind."""
    rows = [row for row in rows if row["measure"] == "spectrum" and row["layer"] == -1
            and row["participation_ratio"] is not None]
    panels = {"participation_ratio": "participation ratio", "effective_rank": "effective rank",
              "top1": "share of the largest"}
    figure, axes = new_figure(12.5, 3.9, 1, 3)
    for ax, (name, title) in zip(axes[0], panels.items()):
        for kind, look in LOOKS.items():
            points = [row for row in rows if row["kind"] == kind]
            if points:
                ax.plot([row["step"] + 1 for row in points], [row[name] for row in points], marker=look.mark,
                        markersize=look.size, color=look.color, label=look.name)
        ax.set(title=title, xlabel="step", ylim=(0, 1.05) if name == "top1" else (0, None))
        tidy(ax, whole=True)
    sizes = sorted({row["n"] for row in rows})
    figure.suptitle(f"Spectrum over instances (n = {', '.join(map(str, sizes))}; at most n - 1)", fontsize=10)
    legend(figure, axes[0][:1])
    finish(figure, path, rows)
