"""README.md, docs/ and reproduce.sh: commands are valid, files exist, numbers are those of results/."""
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from processes import MAINS, parsed

from speed import readers
from speed.table import table
from toy.report import full_tables, short_table
from toy.variants import markdown

ROOT = Path(__file__).parents[1]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
         for path in (ROOT / "README.md", ROOT / "tests" / "README.md", *sorted(ROOT.glob("docs/*.md")))}


def commands() -> list[str]:
    blocks = re.findall(r"```(?:bash|text)\n(.*?)```", "\n".join(TEXTS.values()), re.DOTALL)
    lines = [line.split("   #")[0].strip() for line in "".join(blocks).replace("\\\n", " ").splitlines()]
    return [line for line in lines if re.match(rf"(python|torchrun) .*\b({'|'.join(MAINS)})\.py\b", line)]


def results(name: str) -> dict:
    return json.loads((ROOT / "results" / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("command", commands(), ids=lambda command: command[:60])
def test_every_command_is_understood_by_its_script(command):
    speed = re.search(r"speed/\w+\.py", command)
    assert (ROOT / speed[0]).exists() if speed else parsed(shlex.split(command))


def test_every_stage_has_a_command():
    assert set(MAINS) <= {re.search(r"(\w+)\.py", command)[1] for command in commands()}


@pytest.mark.parametrize("name", TEXTS)
def test_every_file_named_exists(name):
    pattern = r"`((?:utils|toy|results|tests|speed|docs)/[\w./]*|\w+\.(?:py|txt))`"
    for path in re.findall(pattern, TEXTS[name]):
        assert path.startswith("toy/work") or (ROOT / path).exists(), path  # toy/work is what the run makes


TABLES = {"results/toy.json": lambda: full_tables(results("toy")),
          "results/toy.json, results/toy_second.json, results/toy_third.json":
              lambda: short_table([results(name) for name in ("toy", "toy_second", "toy_third")]),
          "results/readers.json": lambda: readers.table(results("readers")),
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


# ---- reproduce.sh: it plans the whole run and runs nothing without GPUs
def run(*words, path=None, script="reproduce.sh", **environment):
    own = [str(path)] if path else []
    paths = os.pathsep.join([*own, str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(["bash", script, *map(str, words)], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"PATH": paths} | environment)


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    work = tmp_path_factory.mktemp("plan") / "run"
    done = run("--dry_run", work, MIRAGE="mirage", MIRAGE_VSP="vsp.jsonl")
    assert done.returncode == 0, done.stderr
    assert not work.exists()  # nothing was done
    last = r"GPUs \d+ of 8 \| free \d+ of \d+ GiB in \S+ \| estimated \d+ h \d+ min\n$"
    assert re.search(last, done.stderr)
    return [shlex.split(line) for line in done.stdout.splitlines()]


def test_the_plan_holds_every_stage_target_and_benchmark(planned):
    calls = {script: [parsed(words) for words in planned if f"{script}.py" in words] for script in MAINS}
    assert len(calls["rewrite_captions"]) == len(calls["filter_data"]) == 1
    assert [(args.imagination, Path(args.data[0]).stem) for args in calls["train_sft"]] == [
        ("text", "sft"), ("placeholder", "sft"), ("text", "rewritten"), ("latent", "sft"), ("latent", "sft"),
        ("direct", "sft")]
    assert [(Path(args.model).name, args.align_weight) for args in calls["train_sft"][3:5]] == [
        ("Qwen2.5-VL-7B-Instruct", 10), ("latent", 0)]
    prepared = [name for args in calls["evaluate"] for name in args.benchmark or ()]
    assert set(prepared) == {
        "hrbench_4k", "hrbench_8k", "mme_realworld_lite", "blink/Jigsaw", "vsp", "vstar", "tablevqa/vwtq",
        "mme", "blink/Multi-view_Reasoning", "tablevqa/vwtq_syn", "tablevqa/vtabfact", "ocrbench_v2"}
    answered = [args for args in calls["evaluate"] if args.items]
    assert {args.method for args in answered} == {"direct", "text", "latent", "tool"}
    table = next(args for args in calls["evaluate"] if args.table)
    assert [text.partition("=")[2] for text in table.table] == [args.output for args in answered]
    assert {args.latent for args in calls["intervene"]} == {"off", "monet_capimagine", "lvr", "mirage"} == {
        args.latent for args in calls["probe"] if args.task == "probe"} | {"mirage"}
    assert all("directed_llm" in args.conditions for args in calls["intervene"] if args.latent == "off")
    assert sum("vllm" in words[0] for words in planned) == 2  # the captioner; the editor, also the judge


@pytest.mark.parametrize("old, new, said", [
    ('--imagination "$4"', '--imagine "$4"', "--imagine"),
    ('--data "$work/$3.jsonl"', '--data "$work/$3.json"', "no stage before makes it")])
def test_a_wrong_flag_and_a_wrong_path_fail_the_dry_run(tmp_path, old, new, said):
    text = (ROOT / "reproduce.sh").read_text()
    assert text.count(old) == 1
    for path in (*ROOT.glob("*.py"), ROOT / "utils"):
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "reproduce.sh").write_text(text.replace(old, new))
    done = run("--dry_run", "run", script=tmp_path / "reproduce.sh")
    assert done.returncode != 0 and said in done.stderr


def test_without_gpus_the_run_stops_with_one_line(tmp_path):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 0\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    done = run(tmp_path / "work", path=tmp_path)
    assert done.returncode == 2 and done.stdout == "" and not (tmp_path / "work").exists()
    assert re.fullmatch(r"reproduce.sh: 0 GPUs found \(nvidia-smi\), expected 8; .+\n", done.stderr)
