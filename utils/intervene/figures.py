"""Figures of an intervention run, each with the CSV behind it (causal.md, F3, F6 and F7).

accuracy   clean against intervened accuracy of every condition, follow rate beside it          (the paper's
Fig. 2c, left)
effects    forest of the changes in accuracy and in R0, margins as bands, verdicts as words     (new)
mediation  TE and its parts at every site, both orders                                          (new)
"""
from pathlib import Path

from utils.plots import BAND, BLUE, GREEN, GREY, ORANGE, SKY, YELLOW, legend, new_figure, tidy, write_figure
from utils.report import swept
from utils.stats import wilson

MARKS = {"equivalent": ("s", GREEN), "small effect inside the margin": ("D", GREEN), "effect": ("o", BLUE),
         "inconclusive": ("o", GREY)}
PARTS = {"TE": ("TE", GREY), "NIE": ("NIE (necessity)", BLUE), "NDE": ("NDE = TE - NIE", ORANGE),
         "NIE0": ("NIE0 (sufficiency)", SKY), "NDE1": ("NDE1 = TE - NIE0", YELLOW)}


def draw_all(metrics: dict, output: str) -> None:
    """Write <output>.<figure>.png and .csv; a figure without anything to show is not written. Points of
    sweeps are left to `utils.intervene.sweeps`."""
    few = set(metrics["conditions"]) - swept(metrics["conditions"])
    shown = {name: entry for name, entry in metrics["conditions"].items() if entry["effect"] and name in few}
    if shown:
        save({name: draw(metrics, shown) for name, draw in (("accuracy", accuracy), ("effects", effects),
                                                            ("mediation", mediation))}, output)


def save(figures: dict[str, tuple], output: str) -> None:
    """Write each (figure, rows of its CSV) that there is."""
    for name, (figure, rows) in figures.items():
        if figure is not None:
            write_figure(figure, rows, f"{output}.{name}.png")


def title(metrics: dict) -> str:
    emission = metrics["emission"]
    return (f"{Path(metrics['model']).name}: {metrics['arm']} imagination; {emission['k']} of {emission['n']} items imagined "
            "something")


def height_of(shown: dict) -> float:
    """Return the inches that so many conditions take, a line each: a page shrinks what is wide, not what is
    long."""
    return 1.8 + 0.36 * len(shown)


def a_line_each(axes, shown: dict, named: bool = True) -> None:
    """Give every condition a line, the first at the top; `named`: with its name and site on the left."""
    names = [f"{name} ({entry['site']})" if named else "" for name, entry in shown.items()]
    axes.set_yticks(range(len(shown)), names, fontsize=8)
    axes.set_ylim(len(shown) - 0.5, -0.5)
    tidy(axes)


def accuracy(metrics: dict, shown: dict) -> tuple:
    figure, [[axes]] = new_figure(8, height_of(shown))
    rows = []
    for y, (name, entry) in enumerate(shown.items()):
        effect = entry["effect"]
        bars = [("clean", effect["acc_clean"], GREY), ("intervened", effect["acc_int"], BLUE)]
        if entry.get("follow"):
            bars.append(("follows the edit", entry["follow"]["share"], ORANGE))
        for j, (label, share, color) in enumerate(bars):
            low, high = wilson(round(share * effect["n"]), effect["n"])
            axes.barh(y + 0.27 * (j - (len(bars) - 1) / 2), 100 * share, 0.25, color=color, label=label,
                      capsize=2,
                      xerr=[[100 * max(0.0, share - low)], [100 * max(0.0, high - share)]],
                      error_kw={"linewidth": 1})
            rows.append({"condition": name, "site": entry["site"], "n": effect["n"], "bar": label,
                         "share": share,
                         "ci95_low": low, "ci95_high": high})
    legend(figure, [axes])
    a_line_each(axes, shown)
    axes.set(xlim=(0, 105), xlabel="share of items, %")
    axes.set_title(f"{title(metrics)}\nbars with 95 % intervals", fontsize=10)
    return figure, rows


def effects(metrics: dict, shown: dict) -> tuple:
    """Forest: 90 % intervals thick (the equivalence test's), 95 % thin; the margin is the band."""
    figure, [both] = new_figure(11, height_of(shown), 1, 2)
    rows = []
    panels = (("change in accuracy, points", 100, metrics["margin"], lambda entry: entry["effect"], "delta"),
              ("change in R0 negative log-likelihood, nats", 1, metrics["margin_nll"],
               lambda entry: entry["r0"], "delta_nll"))
    for axes, (label, unit, margin, part, value) in zip(both, panels):
        axes.axvspan(-unit * margin, unit * margin, color=BAND, zorder=0)
        axes.axvline(0, color="black", linewidth=0.8)
        for y, (name, entry) in enumerate(shown.items()):
            if not (found := part(entry)):
                continue
            mark, color = MARKS[found["verdict"]]
            axes.plot([unit * end for end in found["ci95"]], [y, y], color=color, linewidth=1)
            axes.plot([unit * end for end in found["ci90"]], [y, y], color=color, linewidth=3)
            axes.plot(unit * found[value], y, mark, color=color, markersize=6)
            axes.annotate(found["verdict"].replace(" inside the margin", ""), (1.01, y),
                          xycoords=("axes fraction", "data"),
                          fontsize=7, va="center")
            rows.append({"condition": name, "site": entry["site"], "readout": "R2" if unit == 100 else "R0",
                         "n": found["n"],
                         "change": found[value], "ci90_low": found["ci90"][0], "ci90_high": found["ci90"][1],
                         "ci95_low": found["ci95"][0], "ci95_high": found["ci95"][1], "margin": margin,
                         "verdict": found["verdict"]})
        a_line_each(axes, shown, named=axes is both[0])
        axes.set_xlabel(label)
    figure.suptitle(f"{title(metrics)}\nthick: 90 % interval (equivalence), thin: 95 %; band: margin",
                    fontsize=10)
    return figure, rows


def mediation(metrics: dict, shown: dict) -> tuple:
    sites = {site: parts["r0"] for site, parts in metrics["mediation"].items() if parts["r0"]}
    if not sites:
        return None, []
    figure, [[axes]] = new_figure(8, 4.5)
    rows, width = [], 0.8 / 5
    for x, (site, found) in enumerate(sites.items()):
        for j, (name, (label, color)) in enumerate(PARTS.items()):
            effect = found[name]
            low, high = effect["ci95"]
            axes.bar(x + width * (j - 2), effect["mean"], 0.9 * width, color=color, edgecolor="black",
                     linewidth=0.5, capsize=2,
                     yerr=[[effect["mean"] - low], [high - effect["mean"]]], error_kw={"linewidth": 1},
                     label=label)
            rows.append({"site": site, "effect": name, "n": found["n"], "mean": effect["mean"],
                         "ci95_low": low,
                         "ci95_high": high})
    legend(figure, [axes], fontsize=8)
    shares = {site: found["proportion_mediated"] for site, found in sites.items()}
    axes.set_xticks(range(len(sites)),
                    [f"site {site}\nmediated: {'-' if s['value'] is None else format(s['value'], '.0%')}"
                                        for site, s in shares.items()])
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_ylabel("log-probability of the right option, nats")
    axes.set_title(f"{title(metrics)}\nagainst a blank image, 95 % intervals", fontsize=10)
    tidy(axes)
    return figure, rows
