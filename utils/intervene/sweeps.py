"""Figures of the sweeps of an intervention run, each with the CSV behind it (causal.md, F8 and F9).

map        effect of one position and one window of layers exchanged for a donor's
(F8, new)
positions  one position kept or dropped; the k most attended kept, against k random ones
(F8, new)
doses      effect against the dose: mixed with tau, noise added
(F9, new)
attention  where the answer's stem looks, layer by layer, beside the share that even attention would give
(F9, new)
early      share of answers already those of the whole reply, by how much of the imagination is kept
(F9, new)
"""
import numpy as np

from utils.intervene.figures import save, title
from utils.intervene.latent_conditions import find_condition
from utils.plots import BAND, BLUE, GREEN, GREY, ORANGE, PINK, legend, new_figure, tidy

LINES = {"keep_one": ("only this position kept", "o", BLUE), "drop_one": ("only this position replaced", "s",
                                                                          ORANGE),
         "top_k": ("most attended", "D", GREEN), "top_random": ("random ranking", "x", GREY),
         "mix": ("(1 - dose) z + dose tau", "o", BLUE), "add_noise": ("z + dose rms(z) noise", "s", ORANGE)}
LOOKS = {"imagination": ("imagination", "o", BLUE), "image": ("image", "^", GREEN),
         "question": ("question, template", "s", ORANGE), "said": ("other words said", "D", PINK),
         "first": ("first token", "x", GREY)}
CHANGE = "change in R0 negative\nlog-likelihood, nats"


def draw_maps(metrics: dict, output: str) -> None:
    """Write <output>.<figure>.png and .csv of what was swept; a figure without anything to show is not
    written."""
    swept: dict[str, dict] = {}  # condition -> its number -> effect on R0
    for name, entry in metrics["conditions"].items():
        if entry["r0"]:
            one, colon, _ = name.partition(":")
            swept.setdefault(one, {})[find_condition(name)[1] if colon else None] = entry["r0"]
    save({"map": effect_map(metrics, swept), "positions": positions(metrics, swept),
          "doses": doses(metrics, swept),
          "attention": attention(metrics), "early": early(metrics)}, output)


def effect_map(metrics: dict, swept: dict) -> tuple:
    """One cell a position and window of layers; a dot where the 95 % interval leaves out 0."""
    cells = {place: found for place, found in swept.get("slot_swap_at", {}).items() if place is not None}
    if len(cells) < 2:
        return None, []
    steps, layers = (sorted({place[side] for place in cells}, key=lambda them: (them[0], them[-1]))
                     for side in (0, 1))
    grid = np.full((len(layers), len(steps)), np.nan)
    for (its_steps, its_layers), found in cells.items():
        grid[layers.index(its_layers), steps.index(its_steps)] = found["delta_nll"]
    figure, [[axes]] = new_figure(max(6.0, 0.75 * len(steps) + 3), max(3.6, 0.45 * len(layers) + 1.9))
    bound = max(float(np.nanmax(np.abs(grid))), metrics["margin_nll"])  # what is within the margin stays pale
    shown = axes.imshow(grid, vmin=-bound, vmax=bound, cmap="RdBu_r", aspect="auto", origin="lower")
    for (its_steps, its_layers), found in cells.items():
        x, y = steps.index(its_steps), layers.index(its_layers)
        sure = found["ci95"][0] > 0 or found["ci95"][1] < 0
        axes.annotate(f"{found['delta_nll']:+.3f}{' •' if sure else ''}", (x, y), ha="center", va="center",
                      fontsize=8,
                      color="white" if abs(found["delta_nll"]) > 0.6 * bound else "black")
    axes.set_xticks(range(len(steps)), [ends(step) for step in steps])
    axes.set_yticks(range(len(layers)), [ends(layer) for layer in layers])
    axes.set(xlabel="position of the latent", ylabel="inputs of layers")
    figure.colorbar(shown, ax=axes, label=CHANGE)
    axes.set_title(f"{title(metrics)}\na random donor's state at one place; •: 95 % interval without 0\n"
                   f"{whole_change(swept)}", fontsize=9)
    return figure, [{"position": ends(place[0]), "layers": ends(place[1]), **row_of(found)}
                    for place, found in cells.items()]


def ends(numbers: range) -> str:
    """Return a range of numbers from 0 in words, counted from 1."""
    low, high = numbers[0] + 1, numbers[-1] + 1
    return str(low) if low == high else f"{low}-{high}"


def whole_change(swept: dict) -> str:
    found = swept.get("slot_swap_random", {}).get(None)
    return f"all positions and layers at once: {found['delta_nll']:+.3f} nats" if found else ""


def row_of(found: dict) -> dict:
    return {"n": found["n"], "change": found["delta_nll"], "ci95_low": found["ci95"][0],
            "ci95_high": found["ci95"][1]}


def curve(axes, points: dict, name: str, looks: tuple[str, str, str]) -> list[dict]:
    """Draw points {x: effect on R0} with 95 % intervals; return the rows of the CSV."""
    label, mark, color = looks
    x = sorted(points)
    y = np.array([points[at]["delta_nll"] for at in x])
    low, high = np.array([points[at]["ci95"] for at in x]).T
    axes.errorbar(x, y, [y - low, high - y], marker=mark, color=color, label=label, capsize=3, linewidth=1.5,
                  elinewidth=1)
    return [{"curve": name, "x": at, **row_of(points[at])} for at in x]


def curves_beside(metrics: dict, *panels: tuple[str, dict[str, dict]]) -> tuple:
    """Return (figure, axes, rows of the CSV) of two panels, (label of x, {condition: points}), with the
    margin as a band."""
    figure, [both] = new_figure(11, 4.2, 1, 2)
    rows = []
    for axes, (label, curves) in zip(both, panels, strict=True):
        for name, points in curves.items():
            rows += curve(axes, points, name, LINES[name]) if points else []
        axes.axhspan(-metrics["margin_nll"], metrics["margin_nll"], color=BAND, zorder=0, label="margin")
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set(xlabel=label, ylabel=CHANGE)
        tidy(axes)
    return figure, both, rows


def numbered(swept: dict, name: str, *both_ends: tuple[str, float], shift: int = 0) -> dict:
    """Return {number + shift: effect} of a swept condition, with the (condition, x) that stand at the ends of
    its curve."""
    points = {number + shift: found for number, found in swept.get(name, {}).items() if number is not None}
    for other, at in both_ends:
        if points and None in swept.get(other, {}):
            points.setdefault(at, swept[other][None])
    return points


def positions(metrics: dict, swept: dict) -> tuple:
    kept = {name: numbered(swept, name, shift=1) for name in ("keep_one", "drop_one")}
    size = metrics["latent_size"]
    ranked = {name: numbered(swept, name, ("mean_t", 0), ("identity", size)) for name in ("top_k",
                                                                                          "top_random")}
    if max(len(points) for points in (*kept.values(), *ranked.values())) < 2:
        return None, []
    figure, both, rows = curves_beside(metrics, ("position", kept), ("latents kept of a segment, k", ranked))
    for axes in both:
        tidy(axes, whole=True)
    legend(figure, both)
    figure.suptitle(f"{title(metrics)}\nother latents replaced by their position's mean; 95 % intervals",
                    fontsize=10)
    return figure, rows


def doses(metrics: dict, swept: dict) -> tuple:
    mixed, noisy = numbered(swept, "mix", ("identity", 0)), numbered(swept, "add_noise")
    if max(len(mixed), len(noisy)) < 2:
        return None, []
    figure, both, rows = curves_beside(metrics, ("dose", {"mix": mixed}), ("dose", {"add_noise": noisy}))
    if noisy:
        both[1].set_xscale("log")
        both[1].set_xticks(sorted(noisy), [f"{dose:g}" for dose in sorted(noisy)])
        both[1].minorticks_off()
    legend(figure, both)
    figure.suptitle(f"{title(metrics)}\n95 % intervals", fontsize=10)
    return figure, rows


def attention(metrics: dict) -> tuple:
    found = metrics["attention"]
    if not found:
        return None, []
    figure, [both] = new_figure(11, 4.4, 1, 2)
    rows = []
    for name, (label, mark, color) in LOOKS.items():
        mean = np.array([at["mean"] for at in found["mass"][name]])
        low, high = np.array([at["ci95"] for at in found["mass"][name]]).T
        layers, even = range(1, len(mean) + 1), found["uniform"][name]
        both[0].plot(layers, mean, marker=mark, color=color, label=label)
        both[0].fill_between(layers, low, high, color=color, alpha=0.15, linewidth=0)
        both[0].axhline(even, color=color, linestyle=":", linewidth=1)
        if even:
            both[1].plot(layers, mean / even, marker=mark, color=color)
        rows += [{"layer": layer, "columns": name, "n": found["n"], "mass": m, "ci95_low": lo,
                  "ci95_high": hi, "uniform": even}
                 for layer, m, lo, hi in zip(layers, mean, low, high)]
    both[0].set(xlabel="layer", ylabel="share of attention", ylim=(0, None))
    both[1].axhline(1, color="black", linestyle=":", linewidth=1)
    low, high = both[1].get_ylim()
    both[1].set(xlabel="layer", ylabel="times the share of even attention", yscale="log",
                ylim=(min(0.45, max(low, 1e-3)), max(high, 2.2)))
    both[1].yaxis.set_major_formatter("{x:g}")
    both[1].yaxis.set_minor_formatter("{x:g}")
    for axes in both:
        tidy(axes, whole=True)
    legend(figure, both)
    figure.suptitle(
        f"{title(metrics)}\nwhere the answer's stem looks (mass is not use); 95 % intervals; dotted: even "
                    "attention", fontsize=10)
    return figure, rows


def early(metrics: dict) -> tuple:
    found = metrics["early_answering"]
    if not found:
        return None, []
    figure, [[axes]] = new_figure(6.5, 4.4)
    rows = []
    for readout, label, mark, size, color in (("r2", "reply, parsed", "o", 10, BLUE),
                                              # small on large, if they meet
                                              ("r0", "likeliest option (R0)", "s", 5, ORANGE)):
        part = found[readout]
        x, y = (np.array([100 * point[name] for point in part["curve"]]) for name in ("kept", "same"))
        low, high = 100 * np.array([point["ci95"] for point in part["curve"]]).T
        axes.errorbar(x, y, [np.maximum(y - low, 0), np.maximum(high - y, 0)], marker=mark, color=color,
                      capsize=3,
                      markersize=size, elinewidth=1, label=f"{label}; area over the curve {part['aoc']:.2f} "
                                          "[{:.2f}, {:.2f}]".format(*part["ci95"]))
        rows += [{"readout": readout, "n": found["n"], "kept": point["kept"], "same": point["same"],
                  "ci95_low": point["ci95"][0], "ci95_high": point["ci95"][1], "aoc": part["aoc"]}
                  for point in part["curve"]]
    axes.set(ylim=(0, 105), xlabel="share of the imagination kept, %", ylabel="answers as with all of it, %")
    tidy(axes)
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    axes.set_title(f"{title(metrics)}\n{found['n']} items, 95 % intervals", fontsize=9)
    return figure, rows
