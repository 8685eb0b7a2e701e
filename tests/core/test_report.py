"""The report of a run folder, built from real outputs of a tiny checkpoint.    pytest
tests/test_run_report.py"""
import base64
import json
import shutil
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from decoding import MIRAGE, load_with
from imagining import write_items

import evaluate
import intervene
import probe
from toy.report import data_blocks
from utils import qwen as Q
from utils.jsonl import DataError
from utils.report import STAGES, collect, markdown, page


class Page(HTMLParser):
    """What a page refers to, and whether its tags close."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.images, self.open, self.text = [], [], [], [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        its = dict(attrs)
        self.tags.append((tag, its))
        self.links += [its["href"]] if "href" in its else []
        self.images += [its] if tag == "img" else []
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def runs(tiny_checkpoint, tmp_path_factory):
    """A folder with the outputs of the three stages, on a random model that likes to emit latents."""
    folder = tmp_path_factory.mktemp("runs")
    path, _ = write_items(folder, 16)
    model = folder / "model <b>&|"
    Q.save(load_with(tiny_checkpoint, MIRAGE), str(model))
    asked = ["--model", str(model), "--items", str(path), "--latent", "mirage", "--max_new_tokens", "12"]
    assert evaluate.main([*asked, "--protocol", "plain", "--output", str(folder / "results.jsonl")]) == 0
    assert intervene.main([*asked, "--conditions", "paper", "maps", "--calibration", "4", "--min_emitters",
                           "4", "--limit", "8",
                           "--output", str(folder / "do z.jsonl")]) == 0
    assert probe.main([*asked, "--output", str(folder / "looks")]) == 0
    return folder


def test_the_page_shows_everything_and_needs_nothing_else(runs, capsys):
    assert probe.main(["report", str(runs)]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    text = (runs / "report.html").read_text()
    seen = Page(text)
    assert not seen.open and not {tag for tag, _ in seen.tags} & {"script", "link", "iframe", "object",
                                                                  "base", "video", "form"}
    assert not any(name.startswith("on") or name in ("srcset", "background", "action") for _, its in seen.tags
                   for name in its)
    for image in seen.images:
        kind, _, data = image["src"].partition(",")
        assert kind == "data:image/png;base64" and base64.b64decode(data).startswith(b"\x89PNG") and len(
            image["alt"]) > 20
    for link in seen.links:  # to the numbers beside the page, and to nothing outside
        assert ":" not in link and not link.startswith("/") and (runs / unquote(link)).is_file()
    assert "url(" not in text and "@import" not in text and "http" not in text.replace(
        "https://", "http://").split("<body>")[0]
    pictures = [path for path in runs.rglob("*.png") if not path.name[0].isdigit()]
    assert len(seen.images) == len(seen.links) == len(pictures) == found["figures"] >= 10 and found[
        "not_run"] == []
    for label in ("F1, paper's Fig. 2(b) left", "F2, paper's Fig. 2(b) right", "F3, paper's Fig. 2(c) left",
                  "F8, new", "F9, new"):
        assert label in seen.text
    assert str(runs / "model <b>&|") in seen.text and "<b>" not in text  # a name with markup is text
    metrics = json.loads((runs / "do z.jsonl.metrics.json").read_text())
    assert metrics["conditions"]["tau"]["effect"][
        "verdict"] in seen.text and "slot_swap_at" not in seen.text.split("Settings")[0]
    assert all(stage in seen.text for stage in STAGES) and "--max_new_tokens" in seen.text


def test_markdown_says_the_same(runs):
    blocks = collect(runs)
    text = markdown("T", blocks, runs)
    cells = sum(len(block[2]) for block in blocks if block[0] == "table")
    assert sum(line.startswith("| ") for line in text.splitlines()) == cells + sum(block[0] == "table"
                                                                                   for block in blocks)
    figures = [part.split(")")[0] for part in text.split("](")[1:]]
    assert figures and all((runs / unquote(name)).is_file() for name in figures) and "<b>" not in text


def copied(runs, folder, *names):
    folder.mkdir()
    for name in names:
        (shutil.copytree if (runs / name).is_dir() else shutil.copy)(runs / name, folder / name)
    return folder


def test_the_toys_data_are_blocks_of_the_same_report(tmp_path):
    result = json.loads((Path(__file__).parents[2] / "results" / "toy.json").read_text())
    blocks = data_blocks(result)
    text, seen = markdown("T", blocks, tmp_path), Page(page("T", blocks, tmp_path))
    fault, part = next(iter(result["filter"]["by_fault"].items()))
    assert f"| {fault} | {part['rows']} | {part['taken_out']} |" in text and "Precision" in seen.text and not seen.open


def test_a_stage_that_was_not_run_is_said_to_be_missing(runs, tmp_path):
    folder = copied(runs, tmp_path / "some", "results.jsonl.metrics.json")
    text = page("T", collect(folder), folder)
    assert "intervene: not run." in text and "probe: not run." in text and "evaluate: not run." not in text
    assert "results.jsonl.meta.json: not there." in text
    with pytest.raises(DataError, match="no folder"):
        collect(tmp_path / "nothing")


@pytest.mark.parametrize("damage, match", [
    (lambda text: text[:len(text) // 2], "damaged"), (lambda text: "[]", "list, expected an object"),
    (lambda text: "{}", "of no stage"),
    (lambda text: text.replace('"emission"', '"omission"'), "another version.*emission")])
def test_a_damaged_metrics_file_is_named(runs, tmp_path, damage, match):
    folder = copied(runs, tmp_path / "some", "do z.jsonl.metrics.json", "results.jsonl.metrics.json")
    path = folder / "do z.jsonl.metrics.json"
    path.write_text(damage(path.read_text()))
    with pytest.raises(DataError, match=f"do z.jsonl.metrics.json: .*{match}"):
        collect(folder)


def test_without_a_report_the_flags_are_demanded(capsys):
    for flags in ([], ["--model", "m", "--items", "i"]):
        with pytest.raises(SystemExit) as stop:
            probe.parse_args(flags)
        assert stop.value.code == 2 and "--output" in capsys.readouterr().err
