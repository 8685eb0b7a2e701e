"""reproduce.sh plans the whole run with flags that every script understands and runs nothing without GPUs."""
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BIN = str(Path(sys.executable).parent)
SCRIPTS = ("rewrite_captions", "filter_data", "train_sft", "evaluate", "intervene", "probe")


def run(*words, path=None, script="reproduce.sh", **environment):
    paths = os.pathsep.join([*([str(path)] if path else []), BIN, os.environ["PATH"]])
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


def calls_of(planned, script):
    """Return the parsed flags of each command of a script."""
    parse_args, name = importlib.import_module(script).parse_args, f"{script}.py"
    return [parse_args(words[words.index(name) + 1:]) for words in planned if name in words]


def test_the_plan_holds_every_stage_target_and_benchmark(planned):
    calls = {script: calls_of(planned, script) for script in SCRIPTS}
    assert len(calls["rewrite_captions"]) == len(calls["filter_data"]) == 1
    assert [(args.imagination, Path(args.data[0]).stem) for args in calls["train_sft"]] == [
        ("text", "sft"), ("placeholder", "sft"), ("text", "rewritten"), ("latent", "sft"), ("direct", "sft")]
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


def test_the_shell_finds_no_fault():
    if shutil.which("shellcheck"):
        done = subprocess.run(["shellcheck", "reproduce.sh"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
    assert subprocess.run(["bash", "-n", "reproduce.sh"], cwd=ROOT).returncode == 0
