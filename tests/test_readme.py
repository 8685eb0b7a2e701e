"""What the README says can be run, and its numbers stand in results/.    pytest tests/test_readme.py"""
import importlib
import json
import re
import shlex
from pathlib import Path

import pytest

from speed import evaluate as evaluation
from toy.report import readme
from toy.variants import markdown

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
LINES = [line.split("   #")[0].strip() for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]
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


def test_the_table_of_the_variants_is_made_of_its_results_file():
    table = README.split("<!-- results/variants.json -->\n")[1].split("\n<!-- end -->")[0]
    assert table == markdown(json.loads((ROOT / "results" / "variants.json").read_text()))


def test_the_numbers_of_speed_are_those_of_their_files():
    table = README.split("## Speed")[1].split("<!-- end of speed -->")[0]
    client = json.loads((ROOT / "results" / "client.json").read_text())
    rates = {name: f"{part['requests_per_s']:.0f}" for name, part in client["clients"].items()}
    assert f"| {rates['ours']} | openai SDK {rates['openai']}, aiohttp {rates['aiohttp']} |" in table
    export = json.loads((ROOT / "results" / "export.json").read_text())
    assert f"| {export['export_s']:.0f} s, {export['export_gb']:.1f} GB |" in table
    assert f"| {export['scan_s']:.1f} s | the same {export['json_loads_s']:.1f} s |" in table
    sweep = json.loads((ROOT / "results" / "sweep.json").read_text())
    assert f"| {sweep['together_s'][0]} s in one run | eight runs of one condition {sweep['apart_s'][0]} s ({sweep['ratio']} times) |" in table
    for path, more in ((ROOT / "results" / "evaluate.json", ""), (ROOT / "results" / "growth.json", " --growth")):
        expected = evaluation.readme(json.loads(path.read_text())) if path.exists() else "| not yet run |"
        assert f"`{evaluation.COMMAND.format('text', more)}`" in table and expected in table
    train = json.loads((ROOT / "results" / "train.json").read_text())["contenders"]
    peers = [train[name] for name in ("trainer", "trainer_rebalance", "trl")]
    for peer in peers:
        ratios = peer["over_rounds"]
        assert f"{peer['tokens_per_s']} ({min(ratios)} to {max(ratios)})" in table
    assert f"| {train['ours']['tokens_per_s']} |" in table
    assert f"| {train['ours']['peak_gib']} | {', '.join(str(peer['peak_gib']) for peer in peers)} |" in table
    same = json.loads((ROOT / "results" / "train_own_pixels.json").read_text())["contenders"]
    assert ", ".join(f"{same[name]['tokens_per_s']} ({min(same[name]['over_rounds'])} to {max(same[name]['over_rounds'])})"
                     for name in ("trainer", "trainer_rebalance", "trl")) in table
    memory = json.loads((ROOT / "results" / "probe_memory.json").read_text())
    assert f"| {memory['analyse_s']:.0f} s, {memory['analyse_gb']} GB | reading them once {memory['read_s']} s |" in table


def test_the_numbers_of_the_proofs_are_those_of_their_files():
    words = " ".join(README.split())
    kills = json.loads((ROOT / "results" / "kills.json").read_text()).values()
    assert "{} kills, {} records lost, {} doubled".format(*(sum(its[name] for its in kills)
                                                            for name in ("kills", "lost", "doubled"))) in words
    assert all(its["identical"] for its in kills)
    found = json.loads((ROOT / "results" / "hostile.json").read_text())
    assert ("{inputs:,} inputs, {tracebacks} tracebacks, {hangs} hangs, {escapes} files opened elsewhere, {tokens} control tokens "
            "let through, {pickles} pickles loaded".format(**found)) in words
