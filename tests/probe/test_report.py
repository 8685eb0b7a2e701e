"""The report of a run folder, built from outputs of the three stages on a tiny checkpoint."""
import json
import re
import shutil
from urllib.parse import unquote

import pytest
from decoding import MIRAGE, load_with
from imagining import write_items

import evaluate
import intervene
import probe
from filter_data import Verdict, calibrate
from toy.report import data_blocks
from utils.jsonl import DataError
from utils.probe.report import STAGES, collect, page
from utils.train.weights import save


@pytest.fixture(scope="module")
def runs(tiny_checkpoint, tmp_path_factory):
    """A folder with the outputs of the three stages, on a random model that likes to emit latents."""
    folder = tmp_path_factory.mktemp("runs")
    path, _ = write_items(folder, 16)
    model = folder / "model <b>&|"
    save(load_with(tiny_checkpoint, MIRAGE), str(model))
    flags = ["--model", str(model), "--items", str(path), "--latent", "mirage", "--max_new_tokens", "12"]
    assert evaluate.main([*flags, "--protocol", "plain", "--output", str(folder / "results.jsonl")]) == 0
    assert intervene.main([*flags, "--conditions", "paper", "maps", "--calibration", "4", "--min_emitters",
                           "4", "--limit", "8", "--output", str(folder / "do z.jsonl")]) == 0
    assert probe.main([*flags, "--output", str(folder / "looks")]) == 0
    return folder


def test_the_page_shows_everything_and_needs_no_other_file(runs, capsys):
    assert probe.main(["report", str(runs)]) == 0
    out, err = capsys.readouterr()
    summary = json.loads(out.splitlines()[-1])
    text = (runs / "report.html").read_text()
    body = text.split("<body>")[1]
    for tag in ("table", "thead", "tbody", "tr", "td", "th", "figure", "figcaption", "p", "h2", "h3", "a"):
        assert len(re.findall(f"<{tag}[ >]", body)) == body.count(f"</{tag}>"), tag
    assert not re.search(r"<(script|link|iframe|object|base|video|form)|srcset|url\(|@import", text)
    assert "http" not in text.split("<body>")[0]
    pictures = re.findall('<img src="data:image/png;base64,iVBORw0KGgo[^"]*" alt="([^"]{20,})">', body)
    links = re.findall('<a href="([^"]*)">', body)
    for link in links:  # only to the CSV files, which are in the folder
        assert ":" not in link and not link.startswith("/") and (runs / unquote(link)).is_file()
    pngs = [path for path in runs.rglob("*.png") if not path.name[0].isdigit()]
    assert len(pictures) == len(links) == len(pngs) == summary["figures"] >= 9
    assert body.count("<img") == len(pictures) and summary["not_run"] == []
    for label in ("Fig. 2(b) left: ", "Fig. 2(b) right: ", "New: changes in ", "New: effect of single pos"):
        assert label in body
    assert "model &lt;b&gt;&amp;|" in body and "<b>" not in text  # markup in a name is text
    metrics = json.loads((runs / "do z.jsonl.metrics.json").read_text())
    assert metrics["conditions"]["tau"]["effect"]["verdict"] in body
    assert "slot_swap_at" not in body.split("Settings")[0]
    assert all(stage in body for stage in STAGES) and "--max_new_tokens" in body
    assert err.count("\n|---") == summary["tables"] == body.count("<table>")  # also on the terminal


def copied(runs, folder, *names):
    folder.mkdir()
    for name in names:
        shutil.copy(runs / name, folder / name)
    return folder


def test_the_toys_data_are_blocks_of_the_same_report():
    rows = [{"id": str(n)} for n in range(6)]
    verdicts = [Verdict("judge", ["unsupported"] if n < 2 else []) for n in range(6)]
    truth = {"0": "conflict", "1": None, "2": None, "3": "conflict", "9": "conflict"}
    found = calibrate(rows, verdicts, truth)
    text = page("T", data_blocks({"filter": {"calibration": found}, "rewrite": {"refined_share": 0.5}}))
    assert "<td>recall:conflict</td><td>50.0 of 2 (" in text
    assert "Rejected by stage 1: 1 conflict. 50.0 % of the chains were refined." in text


def test_a_stage_that_was_not_run_is_named(runs, tmp_path):
    text = page("T", collect(copied(runs, tmp_path / "some", "results.jsonl.metrics.json")))
    assert "intervene: not run." in text and "probe: not run." in text and "evaluate: not run." not in text
    assert "results.jsonl.meta.json: not there." in text
    with pytest.raises(DataError, match="not a folder"):
        collect(tmp_path / "nothing")


@pytest.mark.parametrize("name, damage, match", [
    ("metrics", lambda text: text[:len(text) // 2], "damaged"),
    ("metrics", lambda text: "[]", "list, expected an object"),
    ("metrics", lambda text: "{}", "not the metrics of any stage"),
    ("metrics", lambda text: text.replace('"emission"', '"omission"'), "another version.*emission"),
    ("meta", lambda text: text.replace('"flags"', '"flag"'), "no field 'flags'")])
def test_a_damaged_file_is_named(runs, tmp_path, name, damage, match):
    folder = copied(runs, tmp_path / "some", "do z.jsonl.metrics.json", "do z.jsonl.meta.json",
                    "results.jsonl.metrics.json")
    path = folder / f"do z.jsonl.{name}.json"
    path.write_text(damage(path.read_text()))
    with pytest.raises(DataError, match=f"do z.jsonl.{name}.json: .*{match}"):
        collect(folder)
