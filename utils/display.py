"""How numbers are shown: as text, as a stage's tables on a terminal and in the report, as figures (a PNG and
a CSV) in the colours of Okabe and Ito (2008), which colour-blind readers can tell apart."""
import csv
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, TextIO

from utils.jsonl import replace_file

EFFECTS = ["condition", "site", "items", "clean, %", "intervened, %", "change, 90 % interval", "Holm p",
           "verdict", "R0 items", "R0 clean, %", "R0, nats", "Holm p", "verdict", "imagines again",
           "follows, %"]
BLUE, ORANGE, GREEN, PINK, GREY = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#999999"
SKY, YELLOW, VERMILION, DARK_GREY, BAND = "#56B4E9", "#F0E442", "#D55E00", "#7F7F7F", "#DDDDDD"
FORCED = "; each reply was made to begin with one: the model's own rate needs a run without --force_start"
PARTS = ("TE", "NIE", "NIE0", "NDE", "NDE1")


class Text(NamedTuple):
    text: str
    tag: str = "p"  # or "h2", "h3"


class Table(NamedTuple):
    header: list[str]
    rows: list[list[str]]


Block = Text | Table


# ---- numbers as text
def percent(share: float | None) -> str:
    """Return a share as a percentage, "-" for None."""
    return "-" if share is None else f"{100 * share:.1f}"


def interval(pair: list[float] | None) -> str:
    return "-" if pair is None else f"{100 * pair[0]:.1f} to {100 * pair[1]:.1f}"


def nats(mean: float, pair: list[float]) -> str:
    return f"{mean:+.3f} ({pair[0]:+.3f} to {pair[1]:+.3f})"


def share_cell(share: dict) -> str:
    return f"{percent(share['share'])} of {share['n']} ({interval(share['ci95'])})"


def points(mean: float, pair: list[float]) -> str:
    """Return a change of a share with its interval, in percentage points."""
    return f"{100 * mean:+.1f} ({interval(pair)})"


def effect_row(name: str, entry: dict) -> list[str]:
    effect, r0, again = entry["effect"], entry["r0"], entry["again"]
    if effect is None:
        return [name, entry["site"], entry["reason"], *[""] * (len(EFFECTS) - 3)]
    readout = ["-"] * 5
    if r0:
        readout = [str(r0["n"]), percent(r0["acc_clean"]), nats(r0["delta_nll"], r0["ci90"]),
                   f"{r0['holm_p']:.3f}", r0["verdict"]]
    n, n_all = entry["coverage"]["k"], entry["coverage"]["n"]
    return [name, entry["site"], str(n) if n == n_all else f"{n} of {n_all}",
            percent(effect["acc_clean"]), percent(effect["acc_int"]), points(effect["delta"], effect["ci90"]),
            f"{effect['holm_p']:.3f}", effect["verdict"], *readout,
            f"{again['k']} of {again['n']}" if again["k"] else "-",
            percent(entry["follow"]["share"]) if entry.get("follow") else "-"]


def mediation_table(sites: dict[str, dict[str, dict | None]]) -> tuple[list[str], list[list[str]]]:
    """Return (header, rows) of the parts of the total effect at each site that was run, by R2 and R0."""
    rows = []
    for site, readouts in sites.items():
        for readout, shown in (("r2", points), ("r0", nats)):
            if parts := readouts[readout]:
                share = parts["proportion_mediated"]
                rows.append([site, "R2, points" if readout == "r2" else "R0, nats", str(parts["n"]),
                             *(shown(parts[name]["mean"], parts[name]["ci95"]) for name in PARTS),
                             f"{percent(share['value'])} ({interval(share['ci95'])})"
                             if share["ci95"] else "-"])
    return ["site", "readout", "items", *PARTS, "mediated, %"], rows


def table_lines(header: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(header)} |", "|---" * len(header) + "|",
            *(f"| {' | '.join(row)} |" for row in rows)]


def swept(names: Iterable[str]) -> set[str]:
    """Return the conditions of which there are several (`mix:0.25 mix:0.5`): points of a curve or map."""
    counts = Counter(name.partition(":")[0] for name in names if ":" in name)
    return {name for name in names if ":" in name and counts[name.partition(":")[0]] > 1}


# ---- stage 5, on the terminal and on the page
SAID = {"effect": "changes the answers", "equivalent": "changes accuracy by less than the margin",
        "small effect inside the margin": "changes the answers, but by less than the margin",
        "effect, not after Holm": "changes the answers by its own test, not after correction for all of them",
        "undone": "was undone: the model imagined again", "inconclusive": "may or may not change the answers",
        "readout insensitive": "cannot be judged: replies do not worsen with a blank image either"}
SUBJECTS = {"markers_only": "A segment of markers alone", "no_segment": "No segment at all",
            "oracle": "Feeding the helper image's features", "strict": "Answering from the imagination alone",
            "cut_image_after": "Hiding the image from then on", "image_off": "Hiding the image from then on",
            "strict_fed": "Answering from the fed vectors alone"}
EDITED = {"the fed vectors": ("tau", "norm_noise", "near_zero", "first_repeat"),
          "the latent positions": ("slot_swap_random", "cut_latent"),
          "the imagined words": ("removal", "constant", "foreign")}


def summary(metrics: dict) -> list[str]:
    """Return what a run shows by its replies, in sentences that say no more than the verdicts."""
    effects = {name: entry["effect"] for name, entry in metrics["conditions"].items() if entry["effect"]}
    sentences, margin = [], percent(metrics["margin"])
    for what, names in EDITED.items():
        found = {name: effects[name]["verdict"] for name in names if name in effects}
        if changing := [name for name, verdict in found.items() if verdict == "effect"]:
            sentences.append(f"Editing {what} changes the answers ({', '.join(changing)}).")
        elif len(found) == len(names):
            inside = set(found.values()) <= {"equivalent", "small effect inside the margin"}
            sentences.append(f"No edit of {what} changes accuracy by {margin} points or more." if inside else
                             f"Whether an edit of {what} changes the answers is open.")
    sentences += [f"{subject} {SAID[effects[name]['verdict']]}: "
                  f"{points(effects[name]['delta'], effects[name]['ci90'])} points."
                  for name, subject in SUBJECTS.items() if name in effects]
    for site, readouts in metrics["mediation"].items():
        if readouts["r2"] and (share := readouts["r2"]["proportion_mediated"])["ci95"]:
            sentences.append(f"Of the accuracy that the image adds, {percent(share['value'])} % "
                             f"({interval(share['ci95'])}) goes through the imagination (site {site}).")
    if found := metrics.get("retrieval"):
        more = "above" if found["r1"]["ci95"][0] > found["chance"] else "not shown to be above"
        sentences.append(f"The latents find their own helper's features, %: R@1 {share_cell(found['r1'])}, "
                         f"{more} chance ({percent(found['chance'])}); R@5 {share_cell(found['r5'])}; MRR "
                         f"{found['mrr']:.2f}.")
    trends = metrics.get("dose_trends", {})
    return sentences + [f"The score falls with the dose of {name} (trend {trend['trend']:+.2f})."
                        for name, trend in trends.items() if 0 < trend["trend"]
                        and trend["p"] <= 0.05 / len(trends)]


def intervene_blocks(metrics: dict) -> list[Block]:
    emission, in_sweeps = metrics["emission"], swept(metrics["conditions"])
    entries = {name: entry for name, entry in metrics["conditions"].items() if name not in in_sweeps}
    blocks: list[Block] = [Text(
        f"{metrics['model']}: {metrics['arm']} imagination; {emission['k']} of {emission['n']} items "
        f"imagined something (95 % interval {interval(emission['ci95'])} %"
        f"{FORCED if metrics.get('force_start') else ''}). Margins: "
        f"{percent(metrics['margin'])} points, {metrics['margin_nll']} nats of R0.")]
    if anew := metrics["declared_anew"]:
        flags = ", ".join(f"--{name}" for name in anew)
        blocks.append(Text(f"Changed after this run was first started: {flags}. The verdicts are "
                           "exploratory: what was tested was not declared before."))
    blocks += [Text(f"{name.upper()} says nothing: {control['reason']}.")
               for name, control in metrics["sensitivity"].items() if name != "r1" and not control["moves"]]
    blocks += map(Text, summary(metrics))
    blocks.append(Table(EFFECTS, [effect_row(name, entry) for name, entry in entries.items()]))
    if in_sweeps:
        blocks.append(Text(f"{len(in_sweeps)} points of sweeps are in the metrics and figures, not here."))
    asked = {name: entry["asked"] for name, entry in entries.items() if entry["asked"]}
    if asked:
        shares = ("same_answer", "correct", "correct_flip")
        blocks += [Text("Where another prompt was asked, on items that imagined something: the same answer "
                        "in words; the right answer of what was asked; and that of items right before."),
                   Table(["condition", "same answer, %", "right, %", "right of those right before, %"],
                         [[name, *(share_cell(part[key]) for key in shares)]
                          for name, part in asked.items()])]
    if specific := metrics["specific"]:
        blocks.append(Text(
            f"On the {specific['n']} items ({percent(specific['coverage'])} % of those that imagined "
            f"something) on which both edits could be made, {percent(specific['directed'])} % of the answers "
            f"follow the directed edit, and {percent(specific['irrelevant'])} % are that option after an "
            f"irrelevant edit: {points(specific['difference'], specific['ci95'])} points, 95 % interval."))
    if markers := metrics["markers_share"]:
        found = markers["reason"] or f"{percent(markers['value'])} % ({interval(markers['ci95'])})"
        blocks.append(Text(f"Of the accuracy gained over no imagination, empty markers keep: {found}."))
    if any(readouts[name] for readouts in metrics["mediation"].values() for name in readouts):
        blocks += [Text("Against a blank image, with 95 % intervals: accuracy of the reply (R2) and "
                        "log-probability of the right option among the options (R0)."),
                   Table(*mediation_table(metrics["mediation"]))]
    return blocks


def plain_text(blocks: list[Block]) -> str:
    """Return all blocks but figures as text for a terminal."""
    return "\n\n".join("\n".join(table_lines(*block)) if isinstance(block, Table) else block.text
                       for block in blocks if isinstance(block, (Text, Table)))


# ---- figures
class LineStyle(NamedTuple):
    """How a curve is drawn. Of two that coincide the later needs the smaller marks."""

    label: str
    color: str
    mark: str = "o"
    size: float = 5


def new_figure(width: float, height: float, n_rows: int = 1, n_columns: int = 1, **more) -> tuple:
    """Return (figure, axes [n_rows, n_columns]) without pyplot's state; sides in inches."""
    from matplotlib.figure import Figure as Drawing
    figure = Drawing(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(n_rows, n_columns, squeeze=False, **more)


# ---- primitives
def lengths(values: Sequence[float], ends: Sequence[Sequence[float]]) -> list[list[float]]:
    """Return the lengths of whiskers down to low and up to high, for `ends` [(low, high), ...]."""
    return [[max(0.0, value - low) for value, (low, _) in zip(values, ends)],
            [max(0.0, high - value) for value, (_, high) in zip(values, ends)]]


def draw_bars(axes, places: Sequence[float], values: Sequence[float], ends: Sequence[Sequence[float]],
              width: float, **more) -> None:
    axes.bar(places, values, width, yerr=lengths(values, ends), capsize=2, error_kw={"linewidth": 1}, **more)


def draw_line(axes, x: Sequence[float], values: Sequence[float], ends: Sequence[Sequence[float]] | None,
              style: LineStyle, whiskers: bool = False) -> None:
    """Draw a curve with its intervals `ends`, as a pale band or whiskers."""
    looks = {"marker": style.mark, "color": style.color, "markersize": style.size, "label": style.label}
    if ends is None:
        axes.plot(x, values, **looks)
    elif whiskers:
        axes.errorbar(x, values, lengths(values, ends), capsize=3, elinewidth=1, **looks)
    else:
        axes.plot(x, values, **looks)
        axes.fill_between(x, *zip(*ends), alpha=0.12, color=style.color, linewidth=0)


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
