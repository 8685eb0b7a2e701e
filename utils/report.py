"""One report of a run folder: what evaluate, intervene and probe left in it, as report.md and one
self-contained report.html.

Outputs are found by their metrics (`<output>.metrics.json`, and `<folder>/metrics.json` of probe.py) and
settings (`<output>.meta.json`). Figures are named after the paper's that they answer, or "new". No torch
here, and no matplotlib.
"""
import base64
import html
import os
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from urllib.parse import quote

from utils.jsonl import DataError, load_object, replace_file

STAGES = ("evaluate", "intervene", "probe")
# fields by which the metrics of the first three stages are known: not shown here
OTHERS = ("kept", "imagination")
EFFECTS = ["condition", "site", "items", "clean, %", "intervened, %", "change, 90 % interval", "verdict",
           "R0, nats", "verdict",
           "follows, %"]
PARTS = ("TE", "NIE", "NIE0", "NDE", "NDE1")
FIGURES = {  # by stage and file: its name, then what it shows
    "intervene": {
        "accuracy": ("F3, paper's Fig. 2(c) left", "accuracy clean and intervened, by condition"),
        "effects": ("F6, new", "changes in accuracy and in R0 with equivalence margins and verdicts"),
        "mediation": ("F7, new", "total effect of the image and its parts through and past the imagination"),
        "map": ("F8, new", "effect of single positions and windows of layers"),
        "positions": ("F8, new",
                      "single positions kept or replaced; most attended against random positions kept"),
        "doses": ("F9, new", "effect against dose"),
        "attention": ("F9, new", "where the answer's stem looks, by layer"),
        "early": ("F9, new", "share of answers settled, by how much of the imagination is kept")},
    "probe": {
        "heatmap": ("F1, paper's Fig. 2(b) left",
                    "cosine of every two instances, step by step, raw and centred"),
        "curves": ("F2, paper's Fig. 2(b) right", "similarity between instances and from step to step"),
        "probing": ("F4, paper's Fig. 2(c) right", "accuracy on questions about what was imagined"),
        "layers": ("F8, new", "similarity and decodability by layer and step"),
        "spectra": ("F9, new", "how many directions the states span")}}
TEXT_FIGURES = {  # of a text imagination
    "accuracy": "F3, paper's do(Z) on text", "heatmap": "F5, paper's Fig. 4 (as F1)",
    "curves": "F5, paper's Fig. 4 (as F2)"}
STYLE = """body{font:15px/1.45 Georgia,serif;color:#111;max-width:62rem;margin:2rem auto;padding:0 1rem}
h1,h2,h3,th{font-family:Helvetica,Arial,sans-serif;line-height:1.2}h2{border-bottom:2px solid #111;margin-top:2.2rem}
table{border-collapse:collapse;margin:.6rem 0 1.2rem;font-size:.8rem}th{text-align:left}
th,td{border-bottom:1px solid #bbb;padding:.15rem .55rem .15rem 0;vertical-align:top;overflow-wrap:anywhere}
figure{margin:1.2rem 0}img{max-width:100%;height:auto}figcaption{font-size:.85rem}
@media print{body{max-width:none;margin:0;font-size:10pt}table{font-size:7.5pt}h2,h3{break-after:avoid}
figure,tr{break-inside:avoid}img{max-height:20cm}}"""
# ("title", level, text), ("text", text), ("table", header, rows) or ("figure", png, caption, alt, csv or
# None)
Block = tuple


# ------------------------------------------------------------------------------------ numbers in words
def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def interval(pair: list[float] | None) -> str:
    return "-" if pair is None else f"{100 * pair[0]:.1f} to {100 * pair[1]:.1f}"


def nats(mean: float, pair: list[float]) -> str:
    return f"{mean:+.3f} ({pair[0]:+.3f} to {pair[1]:+.3f})"


def effect_row(name: str, entry: dict) -> list[str]:
    """Return the cells of EFFECTS for a condition's entry in the metrics of intervene.py."""
    effect, r0 = entry["effect"], entry["r0"]
    if effect is None:
        return [name, entry["site"], entry["reason"], *[""] * (len(EFFECTS) - 3)]
    return [name, entry["site"], str(effect["n"]), percent(effect["acc_clean"]), percent(effect["acc_int"]),
            f"{percent(effect['delta'])} ({interval(effect['ci90'])})", effect["verdict"],
            *((nats(r0["delta_nll"], r0["ci90"]), r0["verdict"]) if r0 else ("-", "-")),
            percent(entry["follow"]["share"]) if entry.get("follow") else "-"]


def mediation_table(sites: dict[str, dict | None]) -> tuple[list[str], list[list[str]]]:
    """Return (header, rows) of the parts of the total effect at each site that was run."""
    return ["site", *PARTS, "mediated, %"], [
        [site, *(nats(found[name]["mean"], found[name]["ci95"]) for name in PARTS),
         percent(found["proportion_mediated"]["value"])] for site, found in sites.items() if found]


def table_lines(header: list[str], rows: list[list[str]]) -> list[str]:
    """Return a table's lines in Markdown."""
    return [f"| {' | '.join(header)} |", "|---" * len(header) + "|",
            *(f"| {' | '.join(row)} |" for row in rows)]


# ------------------------------------------------------------------------------------ what a run folder holds
def read_metrics(path: Path) -> tuple[str | None, dict]:
    """Return the stage (None: an earlier one) and the object of a metrics file; DataError if it is neither.
    """
    metrics = load_object(path, "expected one JSON object: run the stage again, or move it away")
    if metrics.get("stage") in STAGES:
        return metrics["stage"], metrics
    if {"protocol", "accuracy", "categories"} <= set(metrics):
        return "evaluate", metrics
    if any(field in metrics for field in OTHERS):
        return None, metrics
    raise DataError(
        f"{path}: the metrics of no stage; expected those of {', '.join(STAGES)}: run it again, or move it away")


def find_outputs(folder: Path) -> dict[str, list[tuple[str, Path, dict]]]:
    """Return {stage: [(output's path without ending, its metrics file, metrics)]} of what lies in `folder`,
    at any depth."""
    found = {stage: [] for stage in STAGES}
    for path in sorted([*folder.rglob("*.metrics.json"), *folder.rglob("metrics.json")]):
        if any(part.endswith(".run") for part in path.relative_to(folder).parts):
            continue
        stage, metrics = read_metrics(path)
        if stage:
            output = path.parent if path.name == "metrics.json" else str(path).removesuffix(".metrics.json")
            found[stage].append((str(output), path, metrics))
    return found


def collect(folder: str | Path) -> list[Block]:
    """Return the blocks of a run folder's report: by stage tables, verdicts and figures; settings at the end.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: no folder; expected one with outputs of {', '.join(STAGES)}")
    blocks, settings = [], [("title", 2, "Settings")]
    for stage, outputs in find_outputs(folder).items():
        blocks.append(("title", 2, stage))
        if not outputs:
            blocks.append(("text", f"{stage}: not run."))
        for output, path, metrics in outputs:
            name = os.path.relpath(output, folder)
            try:
                blocks += [("title", 3, name), *SECTIONS[stage](metrics)]
            except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
                raise DataError(
                    f"{path}: damaged, or of another version ({type(error).__name__}: {error}); run {stage} "
                                "again, or move it away") from error
            blocks += figures(stage, output, metrics, name)
            settings += [("title", 3, name), *settings_of(output)]
    return blocks + settings


def figures(stage: str, output: str, metrics: dict, name: str) -> list[Block]:
    blocks = []
    for file, (label, shows) in FIGURES.get(stage, {}).items():
        png = Path(output) / f"{file}.png" if stage == "probe" else Path(f"{output}.{file}.png")
        if png.is_file():
            label = TEXT_FIGURES.get(file, label) if metrics["latent"] == "off" else label
            csv = png.with_suffix(".csv")
            blocks.append(("figure", png, f"{label}: {shows}",
                           f"{shows}, of {name}; its numbers are in {csv.name}",
                           csv if csv.is_file() else None))
    return blocks


def settings_of(output: str) -> list[Block]:
    """Return what <output>.meta.json tells: flags that were set, versions, inputs, time and machine."""
    path = Path(f"{output}.meta.json")
    if not path.is_file():
        return [("text", f"{path.name}: not there.")]
    meta = load_object(path, "run the stage again, or move it away")
    try:
        rows = [[f"--{name}", " ".join(map(str, value)) if isinstance(value, list) else str(value)]
                for name, value in meta["flags"].items() if value or value == 0 and value is not False]
        rows += [["versions", ", ".join(f"{name} {version}" for name, version in meta["versions"].items())],
                 *([f"sha256 of {name}", value] for name, value in meta["inputs"].items()),
                 ["seconds", str(meta["seconds"])],
                 ["hardware", ", ".join(map(str, meta["hardware"].values()))]]
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path}: damaged ({type(error).__name__}: {error}); run the stage again, or move it away") from error
    return [("table", ["setting", "value"], rows)]


# ------------------------------------------------------------------------------------ one function a stage
def evaluate_blocks(metrics: dict) -> list[Block]:
    parts = {"all": metrics} | (metrics["categories"] if len(metrics["categories"]) > 1 else {})
    rows = [[name, str(part["n"]), percent(part["accuracy"]), interval(part["ci95"]),
             interval(part.get("ci95_clustered")),
             percent(part.get("chance")), str(part["unresolved"]), str(part["error"])] for name,
             part in parts.items()]
    lines = [metrics["protocol"]["line"] + f" model={metrics['protocol']['model']}"]
    if emission := metrics.get("emission"):
        lines.append(f"Imagined something: {emission['k']} of {emission['n']} items.")
    return [("table", ["category", "items", "accuracy, %", "95 % interval", "over groups", "chance, %",
                       "unresolved", "errors"],
             rows), *(("text", line) for line in lines)]


def intervene_blocks(metrics: dict) -> list[Block]:
    emission, points = metrics["emission"], swept(metrics["conditions"])
    entries = {name: entry for name, entry in metrics["conditions"].items() if name not in points}
    blocks = [("text",
               f"{metrics['model']}: {metrics['arm']} imagination; {emission['k']} of {emission['n']} items imagined "
                       f"something (95 % interval {interval(emission['ci95'])} %). Margins: {percent(metrics['margin'])} "
                       f"points, {metrics['margin_nll']} nats of R0.")]
    for readout, part in (("accuracy", "effect"), ("R0", "r0")):
        said: dict[str, list[str]] = {}
        for name, entry in entries.items():
            if entry[part]:
                said.setdefault(entry[part]["verdict"], []).append(name)
        blocks += [("text", f"Verdicts by {readout}: " + "; ".join(f"{verdict}: {', '.join(names)}"
                                                                   for verdict, names in said.items())
                                                                   + ".")] if said else []
    blocks.append(("table", EFFECTS, [effect_row(name, entry) for name, entry in entries.items()]))
    if points:
        blocks.append(("text",
                       f"{len(points)} points of sweeps are in the figures and their CSV, not in this table."))
    sites = {site: readouts["r0"] for site, readouts in metrics["mediation"].items() if readouts["r0"]}
    if sites:
        blocks += [("text",
                    "Against a blank image, log-probability of the right option (R0), nats with 95 % intervals:"),
                   ("table", *mediation_table(sites))]
    planned = [(name, effect) for name, entry in entries.items() if (effect := entry["effect"])
               and effect["items_needed"]]
    if planned:
        blocks += [("text",
                    "F10, new: items at which the margin could be shown if the same share of answers changed, none on "
                            "average, and the margin that these items can show (power 80 %)."),
                   ("table", ["condition", "answers changed, %", "items", "items needed",
                              "margin shown, points"],
                    [[name, percent(effect["psi"]), str(effect["n"]), str(effect["items_needed"]),
                      percent(effect["margin_shown"])] for name, effect in planned])]
    return blocks


def probe_blocks(metrics: dict) -> list[Block]:
    blocks = [("text", f"{metrics['model']}: latents {metrics['latent']}, {metrics['steps']} steps.")]
    if emission := metrics.get("emission"):
        blocks[0] = ("text", f"{blocks[0][1]} Imagined something: {emission['k']} of {emission['n']} items.")
    if metrics["similarity"]:
        kinds = metrics["similarity"]
        names = list(dict.fromkeys(name for its in kinds.values() for name in its))
        rows = [[name.replace("_", " "), *("-" if its.get(name) is None else f"{its[name]:+.3f}"
                                           for its in kinds.values())]
                for name in names]
        blocks += [("text", "Mean cosine over the steps, by kind of states:"), ("table", ["measure", *kinds],
                                                                                rows)]
    if probing := metrics["probing"]:
        rows = [[name, percent(entry["accuracy"]), interval(entry["ci"]), percent(entry["parsed"]),
                 percent(entry["r0"]["accuracy"] if entry["r0"] else None)] for name,
                 entry in probing["conditions"].items()]
        blocks += [("text",
                    f"{probing['n']} questions about what was imagined, chance {percent(probing['chance'])} %:"),
                   ("table", ["given", "accuracy, %", "interval", "parsed, %", "R0, %"], rows)]
    return blocks


SECTIONS: dict[str, Callable[[dict], list[Block]]] = {
    "evaluate": evaluate_blocks, "intervene": intervene_blocks, "probe": probe_blocks}


# ------------------------------------------------------------------------------------ the same blocks, twice
def markdown(title: str, blocks: list[Block], folder: Path) -> str:
    def plain(text: str) -> str:
        return html.escape(text, quote=False).replace("|", "\\|")

    lines = [f"# {plain(title)}", ""]
    for kind, *block in blocks:
        if kind == "title":
            lines.append(f"{'#' * block[0]} {plain(block[1])}")
        elif kind == "text":
            lines.append(plain(block[0]))
        elif kind == "table":
            lines += table_lines([plain(cell) for cell in block[0]],
                                 [[plain(cell) for cell in row] for row in block[1]])
        else:
            png, caption, alt, csv = block
            numbers = f" ([numbers]({link(csv, folder)}))" if csv else ""
            lines += [f"![{plain(alt)}]({link(png, folder)})", "", f"{plain(caption)}{numbers}"]
        lines.append("")
    return "\n".join(lines)


def link(path: Path, folder: Path) -> str:
    return quote(path.relative_to(folder).as_posix())


def page(title: str, blocks: list[Block], folder: Path) -> str:
    """Return one HTML page that needs no other file: its pictures are in it; only the CSV behind them are
    links."""
    def row(cells: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    parts = [f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
             f"<style>{STYLE}</style></head><body>", f"<h1>{html.escape(title)}</h1>"]
    for kind, *block in blocks:
        if kind == "title":
            parts.append(f"<h{block[0]}>{html.escape(block[1])}</h{block[0]}>")
        elif kind == "text":
            parts.append(f"<p>{html.escape(block[0])}</p>")
        elif kind == "table":
            parts.append(
                f"<table><thead>{row(block[0], 'th')}</thead><tbody>{''.join(row(its, 'td') for its in block[1])}"
                         "</tbody></table>")
        else:
            png, caption, alt, csv = block
            data = base64.b64encode(png.read_bytes()).decode("ascii")
            numbers = f' (<a href="{html.escape(link(csv, folder))}">numbers</a>)' if csv else ""
            parts.append(f'<figure><img src="data:image/png;base64,{data}" alt="{html.escape(alt)}">'
                         f"<figcaption>{html.escape(caption)}{numbers}</figcaption></figure>")
    return "\n".join([*parts, "</body></html>", ""])


def write_report(folder: str | Path, title: str, blocks: list[Block]) -> dict:
    """Write report.md and report.html into `folder`; return how much they show."""
    folder = Path(folder)
    replace_file(folder / "report.md", lambda file: file.write(markdown(title, blocks, folder)))
    replace_file(folder / "report.html", lambda file: file.write(page(title, blocks, folder)))
    kinds = [kind for kind, *_ in blocks]
    return {"report": str(folder / "report.html"), "tables": kinds.count("table"),
            "figures": kinds.count("figure"),
            "not_run": [stage for stage in STAGES if ("text", f"{stage}: not run.") in blocks]}


def swept(names: Iterable[str]) -> set[str]:
    """Return the conditions that stand there with several numbers (`mix:0.25 mix:0.5`): points of a curve or
    of a map."""
    names = list(names)
    counts = Counter(name.partition(":")[0] for name in names if ":" in name)
    return {name for name in names if ":" in name and counts[name.partition(":")[0]] > 1}
