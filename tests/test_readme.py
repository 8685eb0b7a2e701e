"""README.md and docs/: commands are valid, files exist, numbers are those of results/."""
import importlib
import json
import re
import shlex
from pathlib import Path

import pytest

from speed.table import table
from toy.report import full_tables, short_table
from toy.variants import markdown

ROOT = Path(__file__).parents[1]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
         for path in (ROOT / "README.md", ROOT / "tests" / "README.md", *sorted(ROOT.glob("docs/*.md")))}
SCRIPTS = {"rewrite_captions", "filter_data", "train_sft", "evaluate", "intervene", "probe"}


def commands() -> list[str]:
    blocks = re.findall(r"```(?:bash|text)\n(.*?)```", "\n".join(TEXTS.values()), re.DOTALL)
    lines = [line.split("   #")[0].strip() for line in "".join(blocks).replace("\\\n", " ").splitlines()]
    return [line for line in lines if re.match(rf"(python|torchrun) .*\b({'|'.join(SCRIPTS)})\.py\b", line)]


def results(name: str) -> dict:
    return json.loads((ROOT / "results" / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("command", commands(), ids=lambda command: command[:60])
def test_every_command_is_understood_by_its_script(command):
    words = shlex.split(command)
    place = next(n for n, word in enumerate(words) if word.endswith(".py"))
    if words[place].startswith("speed/"):
        assert (ROOT / words[place]).exists()
    else:
        importlib.import_module(words[place].removesuffix(".py")).parse_args(words[place + 1:])


def test_every_stage_has_a_command():
    assert SCRIPTS <= {re.search(r"(\w+)\.py", command)[1] for command in commands()}


@pytest.mark.parametrize("name", TEXTS)
def test_every_file_named_exists(name):
    pattern = r"`((?:utils|toy|results|tests|speed|docs)/[\w./]*|\w+\.(?:py|txt))`"
    for path in re.findall(pattern, TEXTS[name]):
        assert path.startswith("toy/work") or (ROOT / path).exists(), path  # toy/work is what the run makes


TABLES = {"results/toy.json": lambda: full_tables(results("toy")),
          "results/toy.json, results/toy_second.json, results/toy_third.json":
              lambda: short_table([results(name) for name in ("toy", "toy_second", "toy_third")]),
          "results/variants.json": lambda: markdown(results("variants")), "results of speed/": table}
MARKED = [(name, *marked) for name, text in TEXTS.items()
          for marked in re.findall(r"<!-- (results.*?) -->\n(.*?)\n<!-- end -->", text, re.DOTALL)]


@pytest.mark.parametrize("name, source, shown", MARKED)
def test_a_marked_table_is_made_of_its_results_files(name, source, shown):
    assert shown == TABLES[source]()


def test_every_table_is_shown_once_and_every_results_file_is_named():
    assert sorted(source for _, source, _ in MARKED) == sorted(TABLES)
    shown = "\n".join(TEXTS.values())
    for path in (ROOT / "results").glob("*.json"):
        assert f"results/{path.name}" in shown, path.name


def test_the_last_lines_in_the_readme_are_those_of_the_toy():
    toy, text = results("toy"), " ".join(TEXTS["README.md"].split())
    for stage in ("rewrite", "filter"):
        assert f'Last line: `{{"read": {toy[stage]["read"]}, "kept": {toy[stage]["kept"]}, ' in text
    accuracy = toy["accuracy"]["text"]
    assert f'Last line: `{{"n": {accuracy["n"]}, ..., "accuracy": {round(accuracy["accuracy"], 4)}' in text


def test_the_numbers_of_kills_and_hostile_inputs_are_those_of_their_files():
    words = " ".join(" ".join(TEXTS.values()).split())
    kills = results("kills").values()
    kill, lost, doubled = (sum(case[name] for case in kills) for name in ("kills", "lost", "doubled"))
    assert f"{kill} kills, {lost} records lost, {doubled} doubled" in words
    assert all(case["identical"] for case in kills)
    counts = ("{inputs:,} inputs, {tracebacks} tracebacks, {hangs} hangs, {escapes} files opened elsewhere, "
              "{tokens} control tokens let through, {pickles} pickles loaded")
    assert counts.format(**results("hostile")) in words
