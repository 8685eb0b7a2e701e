"""Figures of an intervention run, each with a CSV of its numbers; those of sweeps are in
`utils.intervene.sweeps`. The forest plot holds the paper's Fig. 2(c), left.
"""
from collections.abc import Sequence
from pathlib import Path

from utils.display import (BAND, BLUE, GREEN, GREY, ORANGE, PINK, SKY, YELLOW, LineStyle, draw_bars,
                           draw_line, legend, new_figure, swept, tidy, write_figure)

VERDICTS = {"equivalent": ("s", GREEN), "small effect inside the margin": ("D", GREEN),
            "effect": ("o", BLUE), "effect, not after Holm": ("o", SKY), "inconclusive": ("o", GREY),
            "undone": ("x", ORANGE), "readout insensitive": ("x", GREY)}
PARTS = {"TE": ("TE", GREY), "NIE": ("NIE (necessity)", BLUE), "NDE": ("NDE = TE - NIE", ORANGE),
         "NIE0": ("NIE0 (sufficiency)", SKY), "NDE1": ("NDE1 = TE - NIE0", YELLOW)}
COLUMNS = {"imagination": LineStyle("imagination", BLUE), "image": LineStyle("image", GREEN, "^"),
           "question": LineStyle("question, template", ORANGE, "s"),
           "said": LineStyle("other words of the reply", PINK, "D"),
           "first": LineStyle("first token", GREY, "x")}


def draw_effects(metrics: dict, output: str) -> None:
    """Write <output>.<figure>.png and .csv for every figure that has something to show."""
    points = swept(metrics["conditions"])
    shown = {name: entry for name, entry in metrics["conditions"].items()
             if entry["effect"] and name not in points}
    figures = {"attention": attention_figure(metrics)}
    if shown:
        figures |= {"effects": forest_figure(metrics, shown), "mediation": mediation_figure(metrics)}
    write_figures(figures, output)


def write_figures(figures: dict[str, tuple], output: str) -> None:
    """Write each (figure, rows of its CSV) that is not (None, [])."""
    for name, (figure, rows) in figures.items():
        if figure is not None:
            write_figure(figure, rows, f"{output}.{name}.png")


def ends_of(effect: dict, *names: str) -> dict[str, float]:
    """Return the ends of intervals ("ci95") as columns of a CSV."""
    return {f"{name}_{side}": effect[name][k] for name in names for k, side in enumerate(("low", "high"))}


def title_of(metrics: dict) -> str:
    emission = metrics["emission"]
    return (f"{Path(metrics['model']).name}: {metrics['arm']} imagination; "
            f"{emission['k']} of {emission['n']} items imagined something")


# ---- one function per figure
def forest_figure(metrics: dict, shown: dict) -> tuple:
    """Return the forest plot: 90 % intervals thick, 95 % thin, margins as bands."""
    figure, [panels] = new_figure(11, 1.8 + 0.36 * len(shown), 1, 2)
    rows, scored = [], [entry["r0"] for entry in shown.values() if entry["r0"]]
    accuracy = f"{100 * max(scored, key=lambda r0: r0['n'])['acc_clean']:.0f} %" if scored else "-"
    for axes, readout, label, part, value, unit, margin in (
            (panels[0], "R2", "change in accuracy, points", "effect", "delta", 100, metrics["margin"]),
            (panels[1], "R0", f"change in R0 negative log-likelihood, nats (clean R0 right: {accuracy})",
             "r0", "delta_nll", 1, metrics["margin_nll"])):
        axes.axvspan(-unit * margin, unit * margin, color=BAND, zorder=0)
        axes.axvline(0, color="black", linewidth=0.8)
        for y, (name, entry) in enumerate(shown.items()):
            effect = entry[part]
            if not effect:
                continue
            mark, color = VERDICTS[effect["verdict"]]
            draw_estimate(axes, y, unit * effect[value], [unit * end for end in effect["ci90"]],
                          [unit * end for end in effect["ci95"]], LineStyle("", color, mark, 6),
                          effect["verdict"].replace(" inside the margin", ""))
            rows.append({"condition": name, "site": entry["site"], "readout": readout, "n": effect["n"],
                         "change": effect[value], **ends_of(effect, "ci90", "ci95"), "margin": margin,
                         "acc_clean": effect["acc_clean"], "p": effect["p"], "holm_p": effect["holm_p"],
                         "verdict": effect["verdict"]})
        names = [f"{name} ({entry['site']})" if axes is panels[0] else "" for name, entry in shown.items()]
        axes.set_yticks(range(len(shown)), names, fontsize=8)
        axes.set(xlabel=label, ylim=(len(shown) - 0.5, -0.5))
        tidy(axes)
    figure.suptitle(f"{title_of(metrics)}\nthick: 90 % interval (equivalence), thin: 95 %; band: margin",
                    fontsize=10)
    return figure, rows


def draw_estimate(axes, y: float, value: float, thick: Sequence[float], thin: Sequence[float],
                  style: LineStyle, note: str) -> None:
    """Draw one line of a forest plot, with a note at the right edge."""
    axes.plot(thin, [y, y], color=style.color, linewidth=1)
    axes.plot(thick, [y, y], color=style.color, linewidth=3)
    axes.plot(value, y, style.mark, color=style.color, markersize=style.size)
    axes.annotate(note, (1.01, y), xycoords=("axes fraction", "data"), fontsize=7, va="center")


def mediation_figure(metrics: dict) -> tuple:
    if not any(parts for readouts in metrics["mediation"].values() for parts in readouts.values()):
        return None, []
    figure, [panels] = new_figure(11, 4.5, 1, 2)
    rows, width = [], 0.8 / len(PARTS)
    for axes, readout, unit, label in (
            (panels[0], "r2", 100, "right replies (R2), points"),
            (panels[1], "r0", 1, "log-probability among the options (R0), nats")):
        sites = {site: readouts[readout] for site, readouts in metrics["mediation"].items()
                 if readouts[readout]}
        for j, (name, (part_label, color)) in enumerate(PARTS.items()):
            parts = [effects[name] for effects in sites.values()]
            draw_bars(axes, [x + width * (j - 2) for x in range(len(sites))],
                      [unit * part["mean"] for part in parts],
                      [[unit * end for end in part["ci95"]] for part in parts], 0.9 * width, color=color,
                      edgecolor="black", linewidth=0.5, label=part_label)
        for site, effects in sites.items():
            rows += [{"site": site, "readout": readout.upper(), "effect": name, "n": effects["n"],
                      "mean": effects[name]["mean"], **ends_of(effects[name], "ci95")} for name in PARTS]
        shares = [effects["proportion_mediated"]["value"] for effects in sites.values()]
        axes.set_xticks(range(len(sites)),
                        [f"site {site}\nmediated: {'-' if share is None else f'{share:.0%}'}"
                         for site, share in zip(sites, shares)])
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_ylabel(label)
        tidy(axes)
    legend(figure, [panels[0]], fontsize=8)
    figure.suptitle(f"{title_of(metrics)}\nagainst a blank image, 95 % intervals", fontsize=10)
    return figure, rows


def attention_figure(metrics: dict) -> tuple:
    attention = metrics["attention"]
    if not attention:
        return None, []
    figure, [[shares, ratios]] = new_figure(11, 4.4, 1, 2)
    rows = []
    for name, style in COLUMNS.items():
        means, ends = zip(*((at["mean"], at["ci95"]) for at in attention["mass"][name]))
        layers, uniform = range(1, len(means) + 1), attention["uniform"][name]
        draw_line(shares, layers, means, ends, style)
        shares.axhline(uniform, color=style.color, linestyle=":", linewidth=1)
        if uniform:
            draw_line(ratios, layers, [mean / uniform for mean in means], None, style)
        rows += [{"layer": layer, "columns": name, "n": attention["n"], "mass": at["mean"],
                  **ends_of(at, "ci95"), "uniform": uniform}
                 for layer, at in zip(layers, attention["mass"][name])]
    shares.set(xlabel="layer", ylabel="share of attention", ylim=(0, None))
    ratios.axhline(1, color="black", linestyle=":", linewidth=1)
    ratios.set(xlabel="layer", ylabel="relative to uniform attention", yscale="log")
    ratios.yaxis.set_major_formatter("{x:g}")
    for axes in (shares, ratios):
        tidy(axes, whole=True)
    legend(figure, [shares])
    figure.suptitle(f"{title_of(metrics)}\nattention of the answer's stem (mass is not use); 95 % intervals; "
                    "dotted: uniform attention", fontsize=10)
    return figure, rows
