"""Each script, copied as README.md says into an empty folder, on another project's data.

The data is unlike the toy's: receipts under names with spaces and letters of other scripts, rows with extra
keys, answers in three languages. Every script runs from a folder that holds neither it nor the data.
"""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fault_server import serving
from PIL import Image, ImageDraw
from processes import words

import evaluate
import filter_data
import intervene
import probe
import rewrite_captions
from utils.jsonl import DataError, located_rows, write_rows

ROOT = Path(__file__).parents[1]
COPY = {line[3:].split(".py")[0]: line for line in (ROOT / "README.md").read_text("utf-8").splitlines()
        if line.startswith("cp ")}
GOODS = {"bread": "3", "米饭": "五", "شاي": "7", "figs": "9", "salt": "2", "milk": "4"}


@pytest.fixture
def project(tmp_path):
    """Return the folder of a project: six receipts, a detail of each, chains, items and probe questions."""
    folder = tmp_path / "Belege & Diagramme 图"
    rows, items, probes = [], [], []
    for n, (good, price) in enumerate(GOODS.items()):
        whole, detail = f"bilder/Beleg {n} ü.png", f"details/图 {n}.jpg"
        picture = Image.new("RGB", (84 + 28 * (n % 2), 112), "ivory")
        ImageDraw.Draw(picture).text((9, 15 * n + 5), f"no. {n} at {n}.00", fill="black")
        for name, image in ((whole, picture), (detail, picture.crop((0, 15 * n, 84, 15 * n + 28)))):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            image.save(folder / name)
        name, question, letters = f"receipts/{n}", f"What does {good} cost?", "ABC"[n % 3:] + "ABC"[:n % 3]
        rows.append({"id": name, "subset": "receipts", "images": [whole], "question": question,
                     "answer": price, "licence": {"name": "CC0"},
                     "steps": [{"text": f"I look for {good}."},
                               {"image": detail, "operation": ("zoom", "draw")[n % 2]},
                               {"text": f"It costs {price}. The answer is \\boxed{{{price}}}."}]})
        options = sorted([letter, word] for letter, word in zip(letters, (price, "100", "千")))
        items.append({"id": name, "question": question, "answer": {"type": "letter", "value": letters[0]},
                      "options": options, "images": [{"path": whole}], "metric": "mcq", "drawn_by": "hand"})
        probes.append(items[-1] | {"id": f"{name}/again", "source": name, "question": f"Which has {good}?"})
    for name, lines in (("ketten.jsonl", rows), ("items.jsonl", items), ("fragen.jsonl", probes)):
        write_rows(folder / name, lines)
    return folder


RUN_EACH = """
import json, runpy, sys
for argv in json.loads(sys.argv[1]):
    sys.argv, sys.path[0] = argv, argv[0].rpartition("/")[0]
    try:
        runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as stop:
        assert stop.code == 0, argv
    for name in [name for name in sys.modules if name.partition(".")[0] == "utils"]:
        del sys.modules[name]
"""


def run_alone(folder: Path, **scripts: dict) -> list[dict]:
    """Copy each script into a new folder, run them from yet another one, and return what they print.

    `scripts`: their flags. One process runs them all, as the libraries take longer to import than to run.
    """
    elsewhere, commands = folder / "elsewhere", []
    elsewhere.mkdir()
    for script, flags in scripts.items():
        place = folder / f"only {script}"
        (place / "utils").mkdir(parents=True)
        subprocess.run(["bash", "-ec", re.sub(r"\bP/", '"$P"/', COPY[script])], cwd=ROOT, check=True,
                       env=os.environ | {"P": str(place)})
        commands.append([f"{place}/{script}.py", *words(**flags)])
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", RUN_EACH, json.dumps(commands)], cwd=elsewhere, env=env,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not list(elsewhere.iterdir())  # nothing was written where the command was given
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_script_works_alone_on_another_project_s_data(project, tiny_checkpoint, tmp_path):
    out = tmp_path / "neu" / "Läufe"  # does not exist yet
    with serving(tmp_path) as (_, url):
        server = {"image_root": project, "backend": "openai", "base_url": url, "model": "any"}
        asked = {"model": out / "3 latent", "items": project / "items.jsonl", "latent": "mirage",
                 "max_new_tokens": 8}
        written, kept, trained, scored, changed, probed = run_alone(
            tmp_path,
            rewrite_captions=server | {"input": project / "ketten.jsonl", "output": out / "1.jsonl"},
            filter_data=server | {"input": out / "1.jsonl", "output": out / "2.jsonl"},
            train_sft={"data": out / "2.jsonl", "image_root": project, "model": tiny_checkpoint, "output":
                       out / "3 latent", "imagination": "latent", "max_steps": 2, "global_batch": 3,
                       "num_workers": 0},
            evaluate=asked | {"output": out / "4.jsonl", "protocol": "plain"},
            intervene=asked | {"output": out / "5.jsonl", "calibration": 2,
                               "conditions": ["identity", "cut_latent"]},
            probe=asked | {"output": out / "6", "probe_items": project / "fragen.jsonl"})
    for counts in (written, kept):
        assert (counts["read"], counts["kept"], counts["errors"]) == (6, 6, 0)
    assert [row["answer"] for _, row in located_rows(out / "2.jsonl")] == list(GOODS.values())
    assert (trained["rows"], trained["steps"]) == (6, 2)
    assert (scored["n"], scored["error"]) == (6, 0)
    assert (changed["n"], changed["errors"], changed["calibration"]["items"]) == (4, 0, 2)
    assert probed["emission"]["n"] == 6


@pytest.mark.parametrize("script, flags", [
    (rewrite_captions, "--input ketten.jsonl --image_root ."),
    (filter_data, "--input ketten.jsonl --image_root ."), (evaluate, "--items items.jsonl --model m"),
    (evaluate, "--compare items.jsonl fragen.jsonl"), (evaluate, "--table Ours=items.jsonl"),
    (intervene, "--items items.jsonl --model m"), (probe, "derive --items items.jsonl --image_root .")])
def test_no_script_replaces_its_input(project, monkeypatch, script, flags):
    monkeypatch.chdir(project)
    before = {path: path.read_bytes() for path in project.glob("*.jsonl")}
    own = re.search(r"\w+\.jsonl", flags)[0]
    with pytest.raises(DataError, match="is read too, as .*; name another --output"):
        script.main([*flags.split(), "--output", str(project / own)])
    assert {path: path.read_bytes() for path in project.iterdir() if path.is_file()} == before


STAGES = "--input rows.jsonl --image_root . --model ."
DECODED = "--items items.jsonl --latent mirage --max_new_tokens 4 --model"


@pytest.mark.parametrize("script, flags, match", [
    (rewrite_captions, STAGES, "no config.json here"), (filter_data, STAGES, "no config.json here"),
    (evaluate, DECODED, "one added token"), (intervene, f"--calibration 2 {DECODED}", "one added token"),
    (probe, DECODED, "one added token")])
def test_a_wrong_model_leaves_no_run(project, tiny_checkpoint, monkeypatch, script, flags, match):
    rows = [row | {"chain": "It costs that."} for _, row in located_rows(project / "ketten.jsonl")]
    write_rows(project / "rows.jsonl", rows)
    monkeypatch.chdir(project)
    model = [] if flags.endswith(".") else [str(tiny_checkpoint)]  # of no family
    with pytest.raises(DataError, match=match):
        script.main([*flags.split(), *model, "--output", "out"])
    assert not list(project.glob("out*/**/meta.json"))  # settings that would refuse the right flags
