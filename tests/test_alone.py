"""Each script with utils/ alone, in a folder of its own, on another project's data.    pytest
tests/test_alone.py

The data is unlike the toy's: receipts and charts under names with spaces and other scripts' letters, rows
with keys of their own, answers in words of three languages. Every script is run from a folder that holds
neither it nor the data.
"""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fault_server import serving
from PIL import Image, ImageDraw

import evaluate
import filter_data
import intervene
import probe
import rewrite_captions
from utils.jsonl import DataError

ROOT = Path(__file__).parents[1]
GOODS = ("bread 3", "米饭 五", "شاي 7", "figs 9", "salt 2", "milk 4")


@pytest.fixture
def project(tmp_path):
    """Return the folder of a project: six drawn receipts, a detail of each, chains, items, and questions to
    probe with."""
    folder = tmp_path / "Belege & Diagramme 图"
    rows, items, probes = [], [], []
    for n, (good, price) in enumerate(line.split() for line in GOODS):
        whole, detail = f"bilder/Beleg {n} ü.png", f"details/图 {n}.jpg"
        picture = Image.new("RGB", (84 + 28 * (n % 2), 112), "ivory")
        ImageDraw.Draw(picture).text((9, 15 * n + 5), f"no. {n} at {n}.00", fill="black")
        for name, image in ((whole, picture), (detail, picture.crop((0, 15 * n, 84, 15 * n + 28)))):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            image.save(folder / name)
        rows.append({"id": f"receipts/{n}", "subset": "receipts", "images": [whole],
                     "question": f"What does {good} cost?",
                     "answer": price, "licence": {"name": "CC0"},
                     "steps": [{"text": f"I look for {good}."},
                               {"image": detail, "operation": ("zoom", "draw")[n % 2]},
                               {"text": f"It costs that. The answer is \\boxed{{{price}}}."}]})
        letters = "ABC"[n % 3:] + "ABC"[:n % 3]
        item = {"id": f"receipts/{n}", "question": f"What does {good} cost?",
                "answer": {"type": "letter", "value": letters[0]},
                "options": sorted([letter, word] for letter, word in zip(letters, (price, "100", "千"))),
                "images": [{"path": whole}], "metric": "mcq", "drawn_by": "hand"}
        items.append(item)
        probes.append({**item, "id": f"receipts/{n}/again", "source": item["id"],
                       "question": f"Which price has {good}?"})
    for name, lines in (("ketten.jsonl", rows), ("items.jsonl", items), ("fragen.jsonl", probes)):
        (folder / name).write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines),
                                   encoding="utf-8")
    return folder


def run_alone(script: str, folder: Path, *flags: str | Path) -> dict:
    """Copy `script` and utils/ into a fresh folder, run it from yet another one, and return its last line."""
    place, elsewhere = folder / f"only {script}", folder / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    shutil.copytree(ROOT / "utils", place / "utils", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / f"{script}.py", place)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, place / f"{script}.py", *flags], cwd=elsewhere, env=env,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_every_script_works_alone_on_another_projects_data(project, tiny_checkpoint, tmp_path):
    out = tmp_path / "neu" / "Läufe"  # is not there yet
    images = ("--image_root", project)
    with serving(tmp_path) as (_, url):
        server = ("--backend", "openai", "--base_url", url, "--model", "any")
        made = run_alone("rewrite_captions", tmp_path, "--input", project / "ketten.jsonl", "--output",
                         out / "1.jsonl", *images,
                         *server)
        assert (made["read"], made["kept"], made["errors"]) == (6, 6, 0)
        kept = run_alone("filter_data", tmp_path, "--input", out / "1.jsonl", "--output", out / "2.jsonl",
                         *images, *server)
        assert (kept["read"], kept["kept"], kept["errors"]) == (6, 6, 0)
    rows = [json.loads(line) for line in (out / "2.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["answer"] for row in rows] == [line.split()[1] for line in GOODS]

    trained = run_alone("train_sft", tmp_path, "--data", out / "2.jsonl", *images, "--model", tiny_checkpoint,
                        "--output",
                        out / "3 latent", "--imagination", "latent", "--max_steps", "2", "--global_batch",
                        "3", "--num_workers", "0")
    assert (trained["rows"], trained["steps"]) == (6, 2)
    asked = ("--model", out / "3 latent", "--items", project / "items.jsonl", "--latent", "mirage",
             "--max_new_tokens", "8")
    scored = run_alone("evaluate", tmp_path, *asked, "--output", out / "4.jsonl", "--protocol", "plain")
    assert (scored["n"], scored["error"]) == (6, 0)
    changed = run_alone("intervene", tmp_path, *asked, "--output", out / "5.jsonl", "--calibration", "2",
                        "--conditions",
                        "identity", "cut_latent")
    assert (changed["n"], changed["errors"], changed["calibration"]["items"]) == (4, 0, 2)
    probed = run_alone("probe", tmp_path, *asked, "--output", out / "6", "--probe_items",
                       project / "fragen.jsonl")
    assert probed["emission"]["n"] == 6
    # nothing was written beside the caller
    assert sorted(path.name for path in (tmp_path / "elsewhere").iterdir()) == []


# --------------------------------------------------------------------------------------- a slip of the user's
@pytest.mark.parametrize("script, reads, more", [
    (rewrite_captions, ["--input", "ketten.jsonl"], ["--image_root", "."]),
    (filter_data, ["--input", "ketten.jsonl"], ["--image_root", "."]), (evaluate, ["--items", "items.jsonl"],
                                                                        ["--model", "m"]),
    (evaluate, ["--compare", "items.jsonl", "fragen.jsonl"], []), (evaluate, ["--table", "Ours=items.jsonl"],
                                                                   []),
    (intervene, ["--items", "items.jsonl"], ["--model", "m"]),
    (probe, ["derive", "--items", "items.jsonl"], ["--image_root", "."])])
def test_no_script_replaces_what_it_reads(project, monkeypatch, script, reads, more):
    monkeypatch.chdir(project)
    before = {path: path.read_bytes() for path in project.glob("*.jsonl")}
    own = next(word.rpartition("=")[2] for word in reads if word.endswith(".jsonl"))
    with pytest.raises(DataError, match="is read too, as .*; name another --output"):
        script.main([*reads, *more, "--output", str(project / own)])
    assert {path: path.read_bytes() for path in project.iterdir() if path.is_file()} == before


@pytest.mark.parametrize("script", [evaluate, intervene, probe])
def test_another_familys_checkpoint_leaves_no_run_that_refuses_the_right_flags(project, tiny_checkpoint,
                                                                               script):
    flags = ["--model", str(tiny_checkpoint), "--items", str(project / "items.jsonl"), "--output",
             str(project / "out"),
             "--max_new_tokens", "4"]
    wrong = ["--latent", "mirage", *(["--calibration", "2"] if script is intervene else [])]
    with pytest.raises(DataError,
                       match="expected one added token; is this a checkpoint that was trained with that token"):
        script.main([*flags, *wrong])
    assert script.main(flags) == 0


@pytest.mark.parametrize("script", [rewrite_captions, filter_data])
def test_a_model_folder_that_is_none_leaves_no_run_behind(project, tmp_path, script):
    rows = [{**json.loads(line), "chain": "It costs that."}
            for line in (project / "ketten.jsonl").read_text("utf-8").splitlines()]
    (project / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match="no config.json here; expected a checkpoint folder"):
        script.main(["--input", str(project / "rows.jsonl"), "--image_root", str(project), "--output",
                     str(tmp_path / "out"),
                     "--model", str(project)])
    assert not list(tmp_path.glob("out*"))


def test_a_row_that_is_almost_of_our_form_says_what_it_lacks(project, tmp_path):
    row = json.loads((project / "ketten.jsonl").read_text("utf-8").splitlines()[0])
    (tmp_path / "in.jsonl").write_text(json.dumps({name: row[name] for name in row if name != "subset"}))
    with pytest.raises(DataError, match="are of no known form; .*; for own it lacks subset$"):
        rewrite_captions.main(["--input", str(tmp_path / "in.jsonl"), "--image_root", str(project),
                               "--output",
                               str(tmp_path / "out"), "--dry_run"])
