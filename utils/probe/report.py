"""A report of a run folder: what evaluate, intervene and probe left in it, as one self-contained HTML page.

Outputs are recognised by their metrics (`<output>.metrics.json`; `<folder>/metrics.json` of probe.py);
`<output>.meta.json` has their settings. Imports neither torch nor matplotlib.
"""
import base64
import html
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from utils.display import Block, Table, Text, interval, intervene_blocks, percent
from utils.jsonl import DataError, load_object, replace_file

STAGES = ("evaluate", "intervene", "probe")
EARLIER_FIELDS = ("kept", "imagination")  # in metrics of stages 1 to 3, not shown
NOT_RUN = "{}: not run."
AGAIN = "run the stage again, or move it away"
FIGURES = {  # by file name: the paper's figure, then what is shown
    "effects": ("new", "changes in accuracy and in R0 with equivalence margins and verdicts"),
    "mediation": ("new", "total effect of the image and its parts through and past the imagination"),
    "map": ("new", "effect of single positions and windows of layers"),
    "positions": ("new", "single positions kept or replaced"),
    "doses": ("new", "effect against dose"),
    "attention": ("new", "attention of the answer's stem, by layer"),
    "heatmap": ("Fig. 2(b) left", "cosine of every two instances, step by step, raw and centred"),
    "curves": ("Fig. 2(b) right", "similarity between instances and from step to step"),
    "probing": ("Fig. 2(c) right", "accuracy on questions about what was imagined"),
    "layers": ("new", "similarity and decodability by layer and step"),
    "spectra": ("new", "how many directions the states span"),
    "lens": ("new", "the patch and the word nearest to each latent")}
TEXT_FIGURES = {"heatmap": "Fig. 4", "curves": "Fig. 4"}  # of text imaginations
CSS = """body{font:15px/1.45 Georgia,serif;max-width:62rem;margin:2rem auto;padding:0 1rem}
h1,h2,h3,th{font-family:Helvetica,Arial,sans-serif}h2{border-bottom:2px solid #111;margin-top:2.2rem}
table{border-collapse:collapse;margin:.6rem 0 1.2rem;font-size:.8rem}th{text-align:left}
th,td{border-bottom:1px solid #bbb;padding:.15rem .55rem .15rem 0;vertical-align:top;overflow-wrap:anywhere}
figure{margin:1.2rem 0}img{max-width:100%;height:auto}figcaption{font-size:.85rem}
@media print{body{max-width:none;margin:0}table{font-size:7.5pt}figure,tr{break-inside:avoid}}"""


class Figure(NamedTuple):
    png: Path
    caption: str
    alt: str
    numbers: str | None  # path of the CSV, relative to the page


# ---- outputs in a run folder
def read_metrics(path: Path) -> tuple[str | None, dict]:
    """Return the stage (None: one of the first three) and content of a metrics file."""
    metrics = load_object(path, f"expected one JSON object: {AGAIN}")
    if metrics.get("stage") in STAGES:
        return metrics["stage"], metrics
    if {"protocol", "accuracy", "categories"} <= set(metrics):
        return "evaluate", metrics
    if any(field in metrics for field in EARLIER_FIELDS):
        return None, metrics
    raise DataError(f"{path}: not the metrics of any stage; expected those of {', '.join(STAGES)}: {AGAIN}")


def find_outputs(folder: Path) -> dict[str, list[tuple[str, Path, dict]]]:
    """Return {stage: [(output without ending, its metrics file, metrics)]}, at any depth."""
    outputs = {stage: [] for stage in STAGES}
    for path in sorted([*folder.rglob("*.metrics.json"), *folder.rglob("metrics.json")]):
        if any(part.endswith(".run") for part in path.relative_to(folder).parts):
            continue
        stage, metrics = read_metrics(path)
        if stage:
            output = path.parent if path.name == "metrics.json" else str(path).removesuffix(".metrics.json")
            outputs[stage].append((str(output), path, metrics))
    return outputs


def collect(folder: str | Path) -> list[Block | Figure]:
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: not a folder; expected one with outputs of {', '.join(STAGES)}")
    blocks, settings = [], [Text("Settings", "h2")]
    for stage, outputs in find_outputs(folder).items():
        blocks += [Text(stage, "h2")] + ([] if outputs else [Text(NOT_RUN.format(stage))])
        for output, path, metrics in outputs:
            name = os.path.relpath(output, folder)
            try:
                blocks += [Text(name, "h3"), *SECTIONS[stage](metrics)]
                blocks += stage_figures(stage, output, metrics.get("latent"), folder)
            except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
                raise DataError(f"{path}: damaged, or of another version ({type(error).__name__}: {error}); "
                                f"{AGAIN}") from error
            settings += [Text(name, "h3"), settings_block(Path(f"{output}.meta.json"))]
    return blocks + settings


def stage_figures(stage: str, output: str, latent: str | None, folder: Path) -> list[Figure]:
    """Return an output's figures; `latent` is "off" if its imaginations are text."""
    figures = []
    for file, (source, shows) in FIGURES.items():
        png = Path(output, f"{file}.png") if stage == "probe" else Path(f"{output}.{file}.png")
        if png.is_file():
            source = TEXT_FIGURES.get(file, source) if latent == "off" else source
            label = "New" if source == "new" else f"Paper's {source}"
            csv = png.with_suffix(".csv")
            alt = f"{shows}, of {os.path.relpath(output, folder)}; the numbers are in {csv.name}"
            numbers = csv.relative_to(folder).as_posix() if csv.is_file() else None
            figures.append(Figure(png, f"{label}: {shows}", alt, numbers))
    return figures


def settings_block(path: Path) -> Block:
    if not path.is_file():
        return Text(f"{path.name}: not there.")
    meta = load_object(path, AGAIN, {"flags": dict, "versions": dict, "inputs": dict, "hardware": dict,
                                     "seconds": (int, float)})
    rows = [[f"--{name}", " ".join(map(str, value)) if isinstance(value, list) else str(value)]
            for name, value in meta["flags"].items() if value or value == 0 and value is not False]
    rows.append(["versions", ", ".join(f"{name} {version}" for name, version in meta["versions"].items())])
    rows += [[f"sha256 of {name}", str(value)] for name, value in meta["inputs"].items()]
    rows += [["seconds", str(meta["seconds"])], ["hardware", ", ".join(map(str, meta["hardware"].values()))]]
    return Table(["setting", "value"], rows)


# ---- one function per stage; intervene.py and probe.py show their own too
def evaluate_blocks(metrics: dict) -> list[Block]:
    parts = {"all": metrics} | (metrics["categories"] if len(metrics["categories"]) > 1 else {})
    rows = [[name, str(part["n"]), percent(part["accuracy"]), interval(part["ci95"]),
             percent(part.get("chance")), str(part["unresolved"]), str(part["error"])]
            for name, part in parts.items()]
    blocks = [Table(["category", "items", "accuracy, %", "95 % interval", "chance, %", "unresolved",
                     "errors"], rows),
              Text(f"{metrics['protocol']['line']} model={metrics['protocol']['model']}")]
    return blocks + ([Text(said)] if (said := emitted(metrics)) else [])


def emitted(metrics: dict) -> str:
    counts = metrics.get("emission")
    return "Imagined something: {k} of {n} items.".format(**counts) if counts else ""


def probe_blocks(metrics: dict) -> list[Block]:
    text = f"{metrics['model']}: latents {metrics['latent']}, {metrics['steps']} steps. {emitted(metrics)}"
    blocks: list[Block] = [Text(text.rstrip())]
    if kinds := metrics["similarity"]:
        measures = dict.fromkeys(name for means in kinds.values() for name in means)
        rows = [[name.replace("_", " "), *("-" if means.get(name) is None else f"{means[name]:.3g}"
                                           for means in kinds.values())] for name in measures]
        blocks += [Text("Means over the steps, by kind of states:"), Table(["measure", *kinds], rows)]
    if decoding := metrics["decoding"]:
        rows = [[kind, str(part["n"]), percent(part["accuracy"]), percent(part["question_only"]),
                 percent(part["shuffled"]), f"{part['p']:.3f}"] for kind, part in decoding.items()]
        blocks += [Text("The answer by a linear probe, from the states, from the question alone, and after "
                        "answers were exchanged within a question; Holm's p over the steps."),
                   Table(["states", "items", "accuracy, %", "question only, %", "exchanged, %", "p"], rows)]
    if crossed := (metrics["crossed"] or {}).get("all_steps"):
        rows = [[name, percent(crossed[name]), percent(crossed[f"{name}_chance"]),
                 "-" if crossed[f"{name}_p"] is None else f"{crossed[f'{name}_p']:.3f}"]
                for name in ("image", "question")]
        blocks += [Text("Variance of the states over crossed images and questions:"),
                   Table(["explained by", "share, %", "by chance, %", "p"], rows)]
    edits = dict(metrics.get("edits", {}))
    if masks := edits.pop("selectivity", None):
        blocks.append(Text("What the relevant mask moves, to what the other one does: " + ", ".join(
            f"{kind} {ratio_cell(entry)}" for kind, entry in masks.items()) + "."))
    if edits:
        rows = [[name, f"{entry['emitted_too']} of {entry['emitted']}", ratio_cell(entry["sensitivity"])]
                for name, entry in edits.items()]
        blocks.append(Table(["edit of the input", "imagined again", "moved, relative to the text"], rows))
    if lens := metrics.get("lens"):
        shares = {name: f"{percent(part['share'])} % ({interval(part['ci'])})"
                  for name, part in lens["stays"].items()}
        blocks.append(Text("With the latents of another item in place of its own, the nearest patch stays in "
                           f"{shares['patch']} of {lens['latents']} latents (chance "
                           f"{percent(lens['patch_chance'])} %), the nearest word in {shares['word']}."))
    if probing := metrics["probing"]:
        rows = [[name, percent(entry["accuracy"]), interval(entry["ci"]), percent(entry["parsed"]),
                 percent(entry["r0"]["accuracy"] if entry["r0"] else None)]
                for name, entry in probing["conditions"].items()]
        blocks += [Text(f"{probing['n']} questions about what was imagined, on {probing['images']} images; "
                        f"chance {percent(probing['chance'])} %:"),
                   Table(["given", "accuracy, %", "interval", "parsed, %", "R0, %"], rows)]
    return blocks


def ratio_cell(entry: dict | None) -> str:
    return "{value:.2f} ({low:.2f} to {high:.2f})".format(**entry) if entry else "-"


SECTIONS: dict[str, Callable[[dict], list[Block]]] = {
    "evaluate": evaluate_blocks, "intervene": intervene_blocks, "probe": probe_blocks}


# ---- the page
def html_of(block: Block | Figure) -> str:
    if isinstance(block, Text):
        return f"<{block.tag}>{html.escape(block.text)}</{block.tag}>"
    if isinstance(block, Figure):
        data = base64.b64encode(block.png.read_bytes()).decode("ascii")
        link = f' (<a href="{html.escape(quote(block.numbers))}">numbers</a>)' if block.numbers else ""
        return (f'<figure><img src="data:image/png;base64,{data}" alt="{html.escape(block.alt)}">'
                f"<figcaption>{html.escape(block.caption)}{link}</figcaption></figure>")

    def row(cells: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "".join(row(cells, "td") for cells in block.rows)
    return f"<table><thead>{row(block.header, 'th')}</thead><tbody>{body}</tbody></table>"


def page(title: str, blocks: list[Block | Figure]) -> str:
    title = html.escape(title)
    head = f'<meta charset="utf-8"><title>{title}</title><style>{CSS}</style>'
    return "\n".join([f'<!doctype html><html lang="en"><head>{head}</head><body>', f"<h1>{title}</h1>",
                      *map(html_of, blocks), "</body></html>", ""])


def write_report(folder: str | Path, title: str, blocks: list[Block]) -> dict:
    path = Path(folder, "report.html")
    replace_file(path, lambda file: file.write(page(title, blocks)))
    return {"report": str(path), "tables": sum(isinstance(block, Table) for block in blocks),
            "figures": sum(isinstance(block, Figure) for block in blocks),
            "not_run": [stage for stage in STAGES if Text(NOT_RUN.format(stage)) in blocks]}
