"""What the README says can be run, and its numbers stand in results/.    pytest tests/test_readme.py"""
import importlib
import json
import re
import shlex
from pathlib import Path

import pytest

from speed.table import table
from toy.report import readme
from toy.variants import markdown

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
LINES = [line.split("   #")[0].strip() for block in BLOCKS for line in block.replace("\\\n",
                                                                                     " ").splitlines()]
COMMANDS = [line for line in LINES if re.search(r"\b\w+\.py\b", line)]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[:60])
def test_every_command_is_understood_by_its_script(command):
    words = shlex.split(command)
    place = next(i for i, word in enumerate(words) if word.endswith(".py"))
    script = importlib.import_module(words[place].removesuffix(".py"))
    script.parse_args(words[place + 1:])


def test_every_stage_has_a_command():
    named = {re.search(r"(\w+)\.py", command)[1] for command in COMMANDS}
    assert named == {"rewrite_captions", "filter_data", "train_sft", "evaluate", "intervene", "probe"}


def test_every_file_named_exists():
    for name in re.findall(r"`((?:utils|toy|results|tests)/[\w./]*|\w+\.(?:py|txt))`", README):
        assert name.startswith("toy/work") or (ROOT / name).exists(), name  # toy/work is what the run makes


def test_the_numbers_of_the_toy_are_those_of_its_results_file():
    """What stands between the markers is made of results/toy.json."""
    table = README.split("<!-- results/toy.json -->\n")[1].split("\n<!-- end -->")[0]
    assert table == readme(json.loads((ROOT / "results" / "toy.json").read_text()))


def test_what_the_stages_keep_is_what_they_kept_of_the_toy():
    toy = json.loads((ROOT / "results" / "toy.json").read_text())
    for stage in ("rewrite", "filter"):
        assert f'last line is `{{"read": {toy[stage]["read"]}, "kept": {toy[stage]["kept"]}, ' in README
    assert f'"imagination": "text", "rows": {toy["filter"]["kept"]}, ' in README
    assert f'"accuracy": {round(toy["accuracy"]["text"]["accuracy"], 4)}' in README


def test_the_table_of_the_variants_is_made_of_its_results_file():
    table = README.split("<!-- results/variants.json -->\n")[1].split("\n<!-- end -->")[0]
    assert table == markdown(json.loads((ROOT / "results" / "variants.json").read_text()))


def test_the_table_of_speed_is_made_of_its_results_files():
    assert README.split("<!-- results of speed/ -->\n")[1].split("\n<!-- end -->")[0] == table()


def test_the_numbers_of_the_proofs_are_those_of_their_files():
    words = " ".join(README.split())
    kills = json.loads((ROOT / "results" / "kills.json").read_text()).values()
    assert "{} kills, {} records lost, {} doubled".format(*(sum(its[name] for its in kills)
                                                            for name in ("kills", "lost",
                                                                         "doubled"))) in words
    assert all(its["identical"] for its in kills)
    found = json.loads((ROOT / "results" / "hostile.json").read_text())
    assert ("{inputs:,} inputs, {tracebacks} tracebacks, {hangs} hangs, {escapes} files opened elsewhere, {tokens} control tokens "
            "let through, {pickles} pickles loaded".format(**found)) in words
