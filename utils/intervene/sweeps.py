"""Sweeps of a latent intervention over positions, layers, ranks and doses: conditions and figures.

map        effect of one position and one window of layers replaced by a donor's
positions  one position kept or replaced
doses      effect against the dose: mixed with tau, or noise added

A point of a sweep is a condition with a number: `keep_one:2` keeps position 2 (from 0), `keep_first:2` two
latents of each segment. Other positions get their calibration mean.
"""
from collections.abc import Hashable, Sequence
from functools import partial

import numpy as np

from utils.display import BAND, BLUE, ORANGE, LineStyle, draw_grid, draw_line, legend, new_figure, tidy
from utils.intervene.figures import ends_of, title_of, write_figures
from utils.intervene.latent_case import (Case, Condition, cut_to, feed, has_latent, markers_only, put_slots,
                                         whole)
from utils.items import group_of
from utils.jsonl import DataError
from utils.latent_families import Intervention
from utils.means import RESOLUTION, robust_mean, sign_flip
from utils.stats import effective_groups

MAX_WINDOWS = 8  # of layers in a map
LINES = {"keep_one": LineStyle("only this position kept", BLUE),
         "drop_one": LineStyle("only this position replaced", ORANGE, "s"),
         "mix": LineStyle("(1 - dose) z + dose tau", BLUE),
         "add_noise": LineStyle("z + dose rms(z) noise", ORANGE, "s")}
CHANGE = "change in R0 negative\nlog-likelihood, nats"


# ---- conditions
def one_position(case: Case, number: float, keep: bool) -> Intervention:
    """Keep one position and replace all others by their mean, or replace that one alone."""
    case.need_position(number)
    mean = case.mean_at()
    return feed(lambda z, segment, step: z if (step == number) == keep else mean(step))


def keep_first(case: Case, number: float) -> Intervention:
    if number < 1:
        return markers_only(case)
    return Intervention(spec=cut_to(case, int(number)),
                        covers=lambda segment, step: segment < len(case.clean.segments))


def parse_place(word: str) -> tuple[range, range]:
    """Return positions and layers of a map, from 0: "2/4" is one of each, "0-3/4-7" four."""
    ends = [part.split("-") for part in word.split("/")]
    if len(ends) != 2 or any(len(pair) > 2 or not all(end.isdecimal() for end in pair) for pair in ends):
        raise ValueError(
            f"{word!r}, expected a position or a range of positions, a slash, and the same of layers: 2/4-7")
    steps, layers = (range(int(pair[0]), int(pair[-1]) + 1) for pair in ends)
    if not steps or not layers:
        raise ValueError(f"{word!r}, expected rising ranges")
    return steps, layers


def slot_swap_at(case: Case, place: tuple[range, range]) -> Intervention:
    """`slot_swap_random` at some positions and layers alone, "2/4-7"."""
    steps, layers = place
    donor = case.donor("random")
    case.need_position(steps[0])
    if layers[-1] >= len(donor.slots[0]):
        raise DataError(f"slot_swap_at: layer {layers[-1]}, expected one of the model's "
                        f"{len(donor.slots[0])} layers, counted from 0")
    everywhere = put_slots(donor).slot

    def states(segment: int, step: int) -> list | None:
        inputs = everywhere(segment, step) if step in steps else None
        return None if inputs is None else [state if n in layers else None for n, state in enumerate(inputs)]
    return Intervention(slot=states, covers=lambda segment, step: has_latent(
        donor, segment, step if step in steps else 0))


SWEEPS = {"keep_one": Condition("fed", partial(one_position, keep=True), default=0, parse=whole),
          "drop_one": Condition("fed", partial(one_position, keep=False), default=0, parse=whole),
          "keep_first": Condition("none", keep_first, default=1, parse=whole),
          "slot_swap_at": Condition("slot", slot_swap_at, default=(range(1), range(1)), needs=("random",),
                                    parse=parse_place)}


def sweep_conditions(size: int, n_layers: int) -> list[str]:
    """Return the points of all sweeps for `size` latents per segment, and the ends of curves."""
    width = -(-n_layers // MAX_WINDOWS)
    windows = [(low, min(low + width, n_layers) - 1) for low in range(0, n_layers, width)]
    return ["identity", "mean_t", "slot_swap_random",
            *(f"slot_swap_at:{step}/{low}-{high}" for step in range(size) for low, high in windows),
            *(f"{name}:{step}" for name in ("keep_one", "drop_one") for step in range(size)),
            "markers_only", *(f"keep_first:{k}" for k in range(1, size)),
            *(f"mix:{dose}" for dose in (0.25, 0.5, 0.75, 1)),
            *(f"add_noise:{dose}" for dose in (0.1, 0.3, 1, 3))]


# ---- trends
def dose_trend(doses: Sequence[float], outcomes: Sequence[Sequence[float]],
               groups: Sequence[Hashable]) -> dict:
    """Return {"n", "trend", "ci95", "p"}: how steadily outcomes [items, doses] in nats rise with the dose.

    An item's trend is Kendall's tau-a, from -1 to 1: of all pairs of doses, the share between which the
    outcome rises minus the share between which it falls, changes up to RESOLUTION being neither. "trend" is
    their mean, as in Jonckheere's test of m rankings against an order (1954, Brit. J. Stat. Psychol. 7:93);
    "ci95" is `robust_mean`'s. p flips the signs of groups: exact where without a trend rises and falls are
    as likely, whatever the spread at each dose. ValueError for fewer than two doses or groups.
    """
    values, order = np.asarray(outcomes, dtype=float), np.argsort(doses)
    if len(set(doses)) < max(2, len(doses)) or values.shape != (len(groups), len(doses)):
        raise ValueError(f"doses {list(doses)}, outcomes {values.shape}, {len(groups)} groups: expected at "
                         "least two doses, all unlike, and a row per item")
    low, high = np.triu_indices(len(doses), k=1)
    steps = values[:, order[high]] - values[:, order[low]]
    taus = (np.sign(steps) * (np.abs(steps) > RESOLUTION)).mean(axis=1)
    mean, *ends = robust_mean(taus, groups, 0.95)
    return {"n": len(taus), "trend": mean, "ci95": ends, "p": sign_flip(taus, groups)}


def dose_trends(items: list[dict], records: dict[str, dict[str, dict]], min_groups: float) -> dict[str, dict]:
    """Return `dose_trend` of R0's negative log-likelihood by condition ("mix", "add_noise") that was run with
    at least two doses, over the items that have all of them, if these are enough effective groups. Dose 0 is
    the clean run."""
    result = {}
    for base in ("mix", "add_noise"):
        names = {name for by in records.values() for name in by if name.startswith(f"{base}:")}
        doses = {"clean": 0.0} | {name: float(name.partition(":")[2]) for name in names}
        complete = [item for item in items if all((records[item["id"]].get(name) or {}).get("r0")
                                                  for name in doses)]
        groups = list(map(group_of, complete))
        if len(names) > 1 and effective_groups(groups) >= max(2, min_groups):
            nats = [[records[item["id"]][name]["r0"]["nll"] for name in doses] for item in complete]
            result[base] = dose_trend(list(doses.values()), nats, groups)
    return result


# ---- figures
Effects = dict[str, dict]  # condition -> its number (None without one) -> effect on R0


def draw_sweeps(metrics: dict, output: str) -> None:
    """Write <output>.<figure>.png and .csv of every sweep."""
    effects: Effects = {}
    for name, entry in metrics["conditions"].items():
        base, colon, number = name.partition(":")
        if entry["r0"]:
            parse = parse_place if base == "slot_swap_at" else float
            effects.setdefault(base, {})[parse(number) if colon else None] = entry["r0"]
    write_figures({"map": map_figure(metrics, effects), "positions": positions_figure(metrics, effects),
                   "doses": doses_figure(metrics, effects)}, output)


def map_figure(metrics: dict, effects: Effects) -> tuple:
    """Return a grid of positions by layers; a dot where the verdict is "effect"."""
    cells = {place: effect for place, effect in effects.get("slot_swap_at", {}).items() if place is not None}
    if len(cells) < 2:
        return None, []
    by_ends = partial(sorted, key=lambda numbers: (numbers[0], numbers[-1]))
    steps, layers = by_ends({place[0] for place in cells}), by_ends({place[1] for place in cells})
    grid = [[float("nan")] * len(steps) for _ in layers]
    for (cell_steps, cell_layers), effect in cells.items():
        grid[layers.index(cell_layers)][steps.index(cell_steps)] = effect["delta_nll"]
    figure, [[axes]] = new_figure(max(6.0, 0.75 * len(steps) + 3), max(3.6, 0.45 * len(layers) + 1.9))
    # what is within the margin stays pale
    bound = max(metrics["margin_nll"], *(abs(effect["delta_nll"]) for effect in cells.values()))
    shown = draw_grid(axes, grid, bound, aspect="auto", origin="lower")
    for (cell_steps, cell_layers), effect in cells.items():
        x, y, change = steps.index(cell_steps), layers.index(cell_layers), effect["delta_nll"]
        dot = " •" if effect["verdict"] == "effect" else ""
        axes.annotate(f"{change:+.3f}{dot}", (x, y), ha="center", va="center", fontsize=8,
                      color="white" if abs(change) > 0.6 * bound else "black")
    axes.set_xticks(range(len(steps)), map(from_one, steps))
    axes.set_yticks(range(len(layers)), map(from_one, layers))
    axes.set(xlabel="position of the latent", ylabel="inputs of layers")
    figure.colorbar(shown, ax=axes, label=CHANGE)
    whole = effects.get("slot_swap_random", {}).get(None)
    total = f"all positions and layers at once: {whole['delta_nll']:+.3f} nats" if whole else ""
    axes.set_title(f"{title_of(metrics)}\na random donor's state at one place; •: effect, after Holm\n"
                   f"{total}", fontsize=9)
    return figure, [{"position": from_one(place[0]), "layers": from_one(place[1]), **csv_row(effect)}
                    for place, effect in cells.items()]


def from_one(numbers: range) -> str:
    low, high = numbers[0] + 1, numbers[-1] + 1
    return str(low) if low == high else f"{low}-{high}"


def csv_row(effect: dict) -> dict:
    return {"n": effect["n"], "change": effect["delta_nll"], **ends_of(effect, "ci95"),
            "holm_p": effect["holm_p"], "verdict": effect["verdict"]}


def points_of(effects: Effects, name: str, *ends: tuple[str, float], shift: int = 0) -> dict[float, dict]:
    """Return {number + shift: effect} of a condition, with the (condition, x) at the ends."""
    points = {number + shift: effect for number, effect in effects.get(name, {}).items()
              if number is not None}
    for other, x in ends:
        if points and None in effects.get(other, {}):
            points.setdefault(x, effects[other][None])
    return points


def curves_figure(metrics: dict, subtitle: str, *panels: tuple[str, dict[str, dict]]) -> tuple:
    """Return (figure, axes, rows of the CSV) of panels (label of x, {condition: points}); (None, [], [])
    where no curve has two points."""
    if max(len(points) for _, curves in panels for points in curves.values()) < 2:
        return None, [], []
    figure, [both] = new_figure(5.5 * max(1.2, len(panels)), 4.2, 1, len(panels))
    rows = []
    for axes, (label, curves) in zip(both, panels, strict=True):
        for name, points in curves.items():
            rows += draw_points(axes, name, points)
        axes.axhspan(-metrics["margin_nll"], metrics["margin_nll"], color=BAND, zorder=0, label="margin")
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set(xlabel=label, ylabel=CHANGE)
        tidy(axes)
    legend(figure, both)
    figure.suptitle(f"{title_of(metrics)}\n{subtitle}", fontsize=10)
    return figure, both, rows


def draw_points(axes, name: str, points: dict[float, dict]) -> list[dict]:
    """Draw one curve with 95 % intervals; return the rows of the CSV."""
    x = sorted(points)
    if x:
        draw_line(axes, x, [points[at]["delta_nll"] for at in x], [points[at]["ci95"] for at in x],
                  LINES[name], whiskers=True)
    return [{"curve": name, "x": at, **csv_row(points[at])} for at in x]


def positions_figure(metrics: dict, effects: Effects) -> tuple:
    single = {name: points_of(effects, name, shift=1) for name in ("keep_one", "drop_one")}
    figure, panels, rows = curves_figure(
        metrics, "other latents replaced by their position's mean; 95 % intervals", ("position", single))
    for axes in panels:
        tidy(axes, whole=True)
    return figure, rows


def doses_figure(metrics: dict, effects: Effects) -> tuple:
    mixed, noisy = points_of(effects, "mix", ("identity", 0)), points_of(effects, "add_noise")
    found = [f"{name}: trend {trend['trend']:+.2f}, p {trend['p']:.2g}"
             for name, trend in metrics.get("dose_trends", {}).items()]
    figure, both, rows = curves_figure(metrics, "; ".join(["95 % intervals", *found]),
                                       ("dose", {"mix": mixed}), ("dose", {"add_noise": noisy}))
    if figure and noisy:
        both[1].set_xscale("log")
        both[1].set_xticks(sorted(noisy), [f"{dose:g}" for dose in sorted(noisy)])
        both[1].minorticks_off()
    return figure, rows
