"""Figures of probe.py, each with a CSV of its numbers. Raw values are drawn next to corrected ones."""
from pathlib import Path

import numpy as np
from PIL import Image

from utils.display import (BLUE, DARK_GREY, GREEN, ORANGE, PINK, VERMILION, LineStyle, draw_bars, draw_grid,
                           draw_line, legend, new_figure, tidy, write_figure)
from utils.probe.similarity import FORMS, LEVEL

STYLES = {"imagination": LineStyle("imagination", BLUE, "o", 3.5),
          "text": LineStyle("text after it", VERMILION, "s"),
          "image": LineStyle("image tokens", GREEN, "^", 8),
          "inner": LineStyle("inner layer", PINK, "D"),
          "dummy_pad": LineStyle("pads fed instead", DARK_GREY, "x"),
          "start": LineStyle("start", ORANGE, "P")}
CONDITIONS = {"image": "image", "image_own": "image and\nown", "text_only": "question\nonly", "own": "own",
              "other": "another\nimage's", "mean": "mean", "random": "noise", "cut": "cut:\nown",
              "cut_other": "cut: another\nimage's", "cut_none": "cut:\nnone"}
SHOWN_SIDE = 480  # pixels, of a picture under the lens, at most


def write_tight(figure, path: Path, rows: list[dict]) -> None:
    write_figure(figure, rows, path, bbox_inches="tight")  # labels next to an image may lie outside


def draw_heatmaps(matrices: dict[tuple[str, str, int], tuple[np.ndarray, np.ndarray]], tasks: np.ndarray,
                  path: Path) -> None:
    """Draw the cosine of every pair of instances (the paper's Fig. 2b, left), by task: one column per step,
    two rows (raw, centred) per kind. matrices[(kind, form, step)] = (indices [m] of `tasks`, cosines [m, m]).
    """
    rows = [(kind, form) for kind in STYLES for form in ("raw", "centred") if (kind, form, 0) in matrices]
    n_steps = 1 + max(step for _, _, step in matrices)
    figure, axes = new_figure(1.35 * n_steps + 1.6, 1.35 * len(rows) + 0.8, len(rows), n_steps)
    numbers, image = [], None
    for panel, (kind, form) in zip(axes, rows):
        for step, ax in enumerate(panel):
            ax.set(xticks=[], yticks=[])
            if (kind, form, step) not in matrices:
                ax.axis("off")
                continue
            who, matrix = matrices[kind, form, step]
            order = np.lexsort((who, tasks[who]))
            image = draw_grid(ax, matrix[np.ix_(order, order)], 1)
            names, counts = np.unique(tasks[who], return_counts=True)
            for edge in np.cumsum(counts)[:-1]:
                ax.axhline(edge - 0.5, color="black", linewidth=0.6)
                ax.axvline(edge - 0.5, color="black", linewidth=0.6)
            if step == 0:
                ax.set_yticks(np.cumsum(counts) - counts / 2 - 0.5, [str(name)[:18] for name in names],
                              fontsize=6)
                ax.set_ylabel(f"{STYLES[kind].label}\n{form}", fontsize=8)
            numbers += [{"kind": kind, "form": form, "step": step + 1, "instance": int(who[i]),
                         "other": int(who[j]), "cosine": f"{matrix[i, j]:.4f}"}
                        for i, j in zip(*np.triu_indices(len(who), 1))]
    for step, ax in enumerate(axes[0]):
        ax.set_title(f"step {step + 1}", fontsize=9)
    figure.suptitle(f"Cosine between every two of {len(tasks)} instances, by task", fontsize=11)
    if image is not None:
        figure.colorbar(image, ax=axes, label="cosine", shrink=0.5, aspect=50)
    write_tight(figure, path, numbers)


def draw_curves(rows: list[dict], path: Path) -> None:
    """Draw the cosines of final states by step (the paper's Fig. 2b, right; Fig. 4 for text), by form and
    measure."""
    titles = {"inter": "between instances, same step\n(corrected: near 0 by construction)",
              "adjacent": "one instance, step t - 1 to t", "first": "one instance, step 1 to t"}
    forms = [form for form in FORMS if any(row["form"] == form for row in rows)]
    figure, axes = new_figure(12.5, 2.7 * len(forms) + 0.8, len(forms), 3, sharey=True)
    for form, panel in zip(forms, axes):
        for ax, (measure, title) in zip(panel, titles.items()):
            for kind, style in reversed(STYLES.items()):
                points = [row for row in rows
                          if (row["kind"], row["form"], row["measure"]) == (kind, form, measure)]
                if points:
                    draw_line(ax, [row["step"] + 1 for row in points], [row["value"] for row in points],
                              [(row["low"], row["high"]) for row in points], style)
            ax.axhline(0, color="black", linewidth=0.5)
            ax.set(ylim=(-0.55, 1.05), xlabel="step t" if form == forms[-1] else "",
                   title=title if form == forms[0] else "")
            tidy(ax, whole=True)
        panel[0].set_ylabel(f"{form}\nmean cosine ({100 * LEVEL:.3g} %)")
    legend(figure, axes[0][:1])
    write_tight(figure, path, rows)


def draw_probing(probing: dict, path: Path) -> None:
    """Draw the accuracy of probe questions by condition (the paper's Fig. 2c, right), parsed and by R0."""
    chance, n = probing["chance"], probing["n"]
    shown = {name: probing["conditions"][name] for name in CONDITIONS if name in probing["conditions"]}
    figure, [[ax]] = new_figure(1.05 * len(shown) + 2, 4.6)
    rows = []
    for readout, label, offset, color in (("parsed", "reply, parsed", -0.2, BLUE),
                                          ("R0", "likeliest option (R0)", 0.2, ORANGE)):
        scores = {name: entry if readout == "parsed" else entry["r0"] for name, entry in shown.items()}
        scores = {name: score for name, score in scores.items() if score is not None}
        if scores:
            ends = [[100 * end for end in score["ci"]] for score in scores.values()]
            draw_bars(ax, [list(shown).index(name) + offset for name in scores],
                      [100 * score["accuracy"] for score in scores.values()], ends, 0.38, color=color,
                      label=label)
        rows += [{"condition": name, "readout": readout, "accuracy": score["accuracy"], "low": score["ci"][0],
                  "high": score["ci"][1], "parsed": shown[name]["parsed"], "chance": chance, "n": n}
                 for name, score in scores.items()]
    rows.sort(key=lambda row: list(shown).index(row["condition"]))
    ax.axhline(100 * chance, color="black", linestyle="--", linewidth=1,
               label=f"chance, {100 * chance:.1f} %")
    ax.set_xticks(range(len(shown)), [f"{CONDITIONS[name]}\n({100 * entry['parsed']:.0f} %)"
                                      for name, entry in shown.items()], fontsize=8)
    ax.set(ylim=(0, 118), ylabel=f"accuracy, % ({100 * LEVEL:.3g} % interval)",
           xlabel="given with the question (share parsed)", title=f"{n} questions about what was imagined")
    ax.set_yticks(range(0, 101, 20))
    tidy(ax)
    ax.legend(frameon=False, loc="upper center", ncol=3, fontsize=8)
    write_tight(figure, path, rows)


def draw_layers(rows: list[dict], path: Path) -> None:
    """Draw layers against steps at the latents: raw cosine, retrieval of an instance, linear probe."""
    rows = [row for row in rows if row["kind"] == "inner"
            and row["measure"] in ("inter", "retrieval_adjacent", "decode")]
    panels = [("raw cosine", "inter", "raw"),
              ("found by the step before", "retrieval_adjacent", "centred"),
              ("answer read, above shuffled", "decode", "raw")]
    panels = [panel for panel in panels if any((row["measure"], row["form"]) == panel[1:] for row in rows)]
    n_layers, n_steps = (1 + max(row[name] for row in rows) for name in ("layer", "step"))
    figure, axes = new_figure(4.2 * len(panels), 0.16 * n_layers + 2.6, 1, len(panels))
    for ax, (title, measure, form) in zip(axes[0], panels):
        grid = np.full((n_layers, n_steps), np.nan)
        for row in rows:
            if row["measure"] == measure and row["form"] == form:
                grid[row["layer"], row["step"]] = row["value"]
        image = draw_grid(ax, grid, 1, aspect="auto", origin="lower",
                          extent=(0.5, n_steps + 0.5, 0.5, n_layers + 0.5))
        ax.set(title=title, xlabel="step")
        tidy(ax, whole=True)
        ax.yaxis.get_major_locator().set_params(integer=True)
    axes[0][0].set_ylabel("input of layer")
    figure.colorbar(image, ax=axes, shrink=0.8)
    write_tight(figure, path, rows)


def draw_spectra(rows: list[dict], path: Path) -> None:
    """Draw how many directions the states of a step span, and the share of the largest."""
    rows = [row for row in rows if row["measure"] == "spectrum" and row["layer"] == -1
            and row["participation_ratio"] is not None]
    panels = {"participation_ratio": "participation ratio", "effective_rank": "effective rank",
              "top1": "share of the largest"}
    figure, axes = new_figure(12.5, 3.9, 1, 3)
    for ax, (name, title) in zip(axes[0], panels.items()):
        for kind, style in STYLES.items():
            points = [row for row in rows if row["kind"] == kind]
            if points:
                draw_line(ax, [row["step"] + 1 for row in points], [row[name] for row in points], None, style)
        ax.set(title=title, xlabel="step", ylim=(0, 1.05) if name == "top1" else (0, None))
        tidy(ax, whole=True)
    sizes = sorted({row["n"] for row in rows})
    figure.suptitle(f"Spectrum over instances (n = {', '.join(map(str, sizes))}; at most n - 1)", fontsize=10)
    legend(figure, axes[0][:1])
    write_tight(figure, path, rows)


def draw_lens(pictures: dict[str, tuple[Image.Image, int, int]], rows: list[dict], path: Path) -> None:
    """Draw pictures by id, each with its numbers of columns and lines of patches: the patch nearest to each
    latent has the latent's number, and the first word of each is below. `rows`: the CSV's, of all items.
    """
    from matplotlib.patches import Rectangle
    across = min(4, len(pictures))
    down = -(-len(pictures) // across)
    figure, axes = new_figure(3.4 * across, 3.6 * down, down, across)
    for axis in axes.flat[len(pictures):]:
        axis.axis("off")
    for axis, (name, (image, n_columns, n_lines)) in zip(axes.flat, pictures.items()):
        shape = image.height * n_columns / (image.width * n_lines)  # of a patch, height to width
        image.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
        axis.imshow(image, extent=(0, n_columns, n_lines, 0), aspect=shape)
        own, at = [row for row in rows if row["id"] == name], {}
        for row in own:
            at.setdefault((row["column"], row["row"]), []).append(str(row["latent"]))
        for place, numbers in at.items():
            for color, width in (("white", 3), (VERMILION, 1.5)):
                axis.add_patch(Rectangle(place, 1, 1, fill=False, edgecolor=color, linewidth=width))
            axis.text(place[0] + 0.5, place[1] + 0.5, ",".join(numbers), ha="center", va="center", fontsize=8,
                      bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1})
        axis.set(xticks=[], yticks=[])
        axis.set_title(name[-38:], fontsize=8)
        said = [f"{row['latent']} {row['word'][:14]}" for row in own[:20]]
        axis.set_xlabel("\n".join("  ".join(said[n:n + 4]) for n in range(0, len(said), 4)), fontsize=7,
                        parse_math=False)
    figure.suptitle("Nearest patch and word of each latent, by its number", fontsize=10)
    write_tight(figure, path, rows)
