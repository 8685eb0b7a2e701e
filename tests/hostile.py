"""Put thousands of hostile rows and pictures before everything that reads them, and count what went wrong.

    python tests/hostile.py --result results/hostile.json      (minutes on one core)

Reads   nothing: inputs are made by tests/mutations.py from --seed, around sound ones
Writes  --result: {"rows", "images", "processes", "tracebacks", "hangs", "escapes", "tokens", "pickles",
"memory", ...}
Prints  the same as one JSON object; exit code 1 if a count of failures is not 0

Scripts run in this process, through the `cli` that their commands go through; a sample runs as commands. For
each input: no exception but a SystemExit or one line and a code of 0, 2, 3 or 4; at most 10 s; at most 2 GiB
more memory at the peak; no file opened outside of the case's folder (an audit hook; library code and the
checkpoint are named below); no control token in a prompt or a training row that the template itself does not
bring; no class looked up by a pickle.
"""
import argparse
import contextlib
import faulthandler
import functools
import io
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

ROOT, TESTS = Path(__file__).parents[1], Path(__file__).parent
sys.path[:0] = [str(ROOT), str(TESTS)]

import benchmark_fixtures as bench  # noqa: E402
import mutations  # noqa: E402
from standin import StandIn  # noqa: E402

import evaluate  # noqa: E402
import filter_data  # noqa: E402
import intervene  # noqa: E402
import probe  # noqa: E402
import rewrite_captions  # noqa: E402
import train_sft  # noqa: E402
from utils.cli import cli  # noqa: E402
from utils.evaluate.answering import Conversation, render  # noqa: E402
from utils.evaluate.prompts import PROTOCOLS  # noqa: E402
from utils.images import ImageError, data_url, image_size, open_image  # noqa: E402
from utils.items import chat  # noqa: E402
from utils.items import question_text  # noqa: E402
from utils.jsonl import write_rows
from utils.latent_families import PRESETS  # noqa: E402
from utils.probe.states import States, StateWriter  # noqa: E402
from utils.qwen import load_with  # noqa: E402
from utils.qwen import add_tokens, load_processors, load_tools  # noqa: E402
from utils.train.examples import END_OF_TURN, make_examples  # noqa: E402

LIMIT_S, LIMIT_GIB = 10.0, 2.0
LIBRARIES = [str(Path(path).resolve()) for path in (sys.prefix, sys.base_prefix, ROOT, "/usr", "/dev",
                                                    "/proc/self", "/proc/meminfo",
                                                     "/proc/cpuinfo", "/sys", "/lib", "/etc/ld.so.cache",
                                                     "/etc/localtime")]
LIBRARIES += [str(Path.home() / ".cache"), str(Path.home() / ".config"), f"{tempfile.gettempdir()}/datasets-"]
FORBIDDEN = ("/dev/zero", "/proc/self/mem", "/etc/passwd")
JUDGED = json.dumps({"reason": "x", "answerable": "yes", "observation_supports_answer": "yes",
                     "chain_consistent": "yes", "problems": []})
watched = {"case": None, "opened": [], "pickles": 0}


def audit(event: str, args: tuple) -> None:
    """Note what is opened outside of the case that is under way, and every class that a pickle looks up."""
    if event == "pickle.find_class" and watched["case"]:
        watched["pickles"] += 1
    if event == "open" and watched["case"] and isinstance(args[0], (str, bytes)):
        path = os.path.realpath(os.fsdecode(args[0]))
        inside = path.startswith(watched["case"]) and not path.startswith(f"{watched['case']}/outside")
        if path in FORBIDDEN or not (inside or path.startswith(tuple(watched["allowed"]))):
            watched["opened"].append(path)


class StandInModel(StandIn):
    """Captions, refinements and verdicts that stage 1 and 2 take."""

    def reply(self, text: str) -> str:
        if "[1]" in text:
            return json.dumps({"segments": []})
        return JUDGED if "judge this example" in text else json.dumps({"caption": "a white 42 on a hull",
                                                                       "legible": "yes"})


# -------------------------------------------------------------------------------------------- what is counted
class Tally:
    """Runs cases and counts; `case` is the folder that they may read."""

    def __init__(self, case: Path):
        self.case, self.counts, self.codes, self.by_reader = case, Counter(), Counter(), Counter()
        self.failures, self.slowest, self.base = [], (0.0,
                                                      ""), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        self.peak = self.base

    def fail(self, kind: str, reader: str, said: object) -> None:
        self.counts[kind] += 1
        self.failures.append({"kind": kind, "reader": reader, "said": str(said)[-1500:], "seed": self.seed})

    def run(self, reader: str, kind: str, act: Callable[[], object], seed: object = None) -> int | None:
        """Run one input as a command would; return its exit code, None after a failure."""
        self.counts[kind] += 1
        self.by_reader[reader] += 1
        self.seed, out, err, code = seed, io.StringIO(), io.StringIO(), None
        watched.update(case=str(self.case), opened=[], pickles=0)
        faulthandler.dump_traceback_later(120, exit=True, file=sys.__stderr__)
        began, busy = time.monotonic(), time.process_time()
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = cli(act) or 0
        except SystemExit as error:
            code = error.code
        except BaseException:  # whatever it is, it is what this file looks for
            self.fail("tracebacks", reader, traceback.format_exc())
        finally:
            faulthandler.cancel_dump_traceback_later()
            watched["case"] = None
        took, said = time.monotonic() - began, err.getvalue()
        # other work on the machine is no hang
        took = took if took > 6 * LIMIT_S else min(took, time.process_time() - busy)
        self.slowest = max(self.slowest, (round(took, 2), f"{reader} {seed}"))
        if code is not None:
            self.codes[str(code)] += 1
            if code not in (0, 2, 3, 4) or "Traceback" in said or (code == 2 and "error: " not in said):
                self.fail("tracebacks", reader, f"exit code {code}: {said}")
        if took > LIMIT_S:
            self.fail("hangs", reader, f"{took:.1f} s")
        if watched["opened"]:
            self.fail("escapes", reader, watched["opened"][:3])
        if watched["pickles"]:
            self.fail("pickles", reader, watched["pickles"])
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if peak - self.base > LIMIT_GIB * 2**20 and peak > self.peak:
            self.fail("memory", reader, f"{(peak - self.base) / 2**20:.2f} GiB more than at the start")
        self.peak = max(self.peak, peak)
        return code

    def check_tokens(self, reader: str, tokenizer: object, ids: list[int], expected: Counter) -> None:
        """Count it as a failure if control tokens are not those that the template brings."""
        special = special_ids(tokenizer)
        found = Counter(i for i in ids if i in special)
        if found != expected:
            names = {tokenizer.convert_ids_to_tokens(i): n for i, n in (found - expected).items()}
            self.fail("tokens", reader, names or f"lacks {expected - found}")

    def result(self) -> dict:
        names = ("rows", "images", "processes", "tracebacks", "hangs", "escapes", "tokens", "pickles",
                 "memory")
        return {"inputs": sum(self.counts[name] for name in names[:3])} | {name: self.counts[name]
                                                                           for name in names} | {
            "exit_codes": dict(sorted(self.codes.items())), "by_reader": dict(sorted(self.by_reader.items())),
            "slowest_s": self.slowest, "more_memory_gib": round((self.peak - self.base) / 2**20, 2),
            "failures": self.failures[:50]}


@functools.cache
def special_ids(tokenizer: object) -> frozenset[int]:
    return frozenset(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)


def template_ids(tokenizer: object, ids: list[int]) -> Counter:
    return Counter(i for i in ids if i in special_ids(tokenizer))


# ----------------------------------------------------------------------------------------------- sound inputs
def own_row(name: str = "x/1") -> dict:
    return {"id": name, "subset": "Visual_CoT", "images": ["a.png"],
            "question": "What is on the hull?\nA. 41\nB. 42", "answer": "42",
            "steps": [{"text": "I look closer."}, {"image": "b.png", "operation": "zoom",
                                                   "caption": "a white 42 on a hull"},
                      {"text": "It shows 42. The answer is \\boxed{42}."}],
            "chain": "I look closer. <think_image>a white 42 on a hull</think_image> It shows 42. The answer is \\boxed{42}.", "refined": True}


def monet_row(name: object = 7) -> dict:
    content = [("text", "I zoom in. <abs_vis_token></abs_vis_token>"), ("image", "b.png"),
               ("text", "<observation>The hull shows 42.</observation> The answer is \\boxed{42}.")]
    turns = ("system", [("text", "Help.")]), ("user", [("image", "a.png"), ("text", "What number?")]), (
        "assistant", content)
    return {"metadata": {"dataset_name": "Visual_CoT", "sample_id": name},
            "data": [{"role": role, "content": [{"type": kind, kind: value} for kind, value in parts]}
                     for role, parts in turns]}


def mirage_row() -> dict:
    return {"text_input": "Map: <image>\nSafe?", "image_input": "a.png", "image_output": "b.png",
            "text_output": "<think> Go on. </think><output_image>The answer is \\boxed{A}."}


def item_row(name: str = "i/1", metric: str = "mcq") -> dict:
    gold = {"mcq": {"type": "letter", "value": "B"}, "likelihood": {"type": "letter", "value": "B"},
            "wtq": {"type": "values", "value": ["7"]},
            "tabfact": {"type": "bool", "value": True}, "yesno_pair": {"type": "yesno", "value": "yes"},
            "vsp_path": {"type": "path_map", "value": [[1, 0], [-1, 2]]}}[metric]
    return {"id": name, "benchmark": "toy", "category": "zoom", "group_id": f"g/{name}",
            "question": "What digit?", "answer": gold,
            "options": [["A", "4"], ["B", "7"]] if gold["type"] == "letter" else [],
            "images": [{"path": "a.png", "sha256": "0"}],
            "metric": metric, "hint": "look", "raw": {"cycle_category": "0"}, "region": [1, 2, 30, 40],
            "counterfactual": {"images": [{"path": "b.png"}], "answer": gold}}


def probe_row(name: str = "p/1") -> dict:
    return {"id": name, "source": "i/1", "question": "What colour?", "options": [["A", "red"], ["B", "blue"]],
            "answer": {"type": "letter", "value": "A"}}


def result_row(name: str = "i/1") -> dict:
    return {"id": name, "benchmark": "vstar", "category": "a", "group_id": "g", "gold": "B", "n_options": 4,
            "prompt_sha": "0",
            "verdict": "correct", "clean_output": "B", "judged": "correct", "n_tokens": 3, "n_latent": 0}


METRICS = {"n": 2, "ci95": [0.1, 0.9], "chance": 0.25, "efficiency": {"seconds_per_item": 1.0,
                                                                      "tokens_per_item": 8.0},
           "protocol": {"model": "m", "method": "text", "line": "l"}, "with_judge": {"ci95": [0.1, 0.9],
                                                                                     "chance": 0.3}}


def make_case(folder: Path) -> Path:
    """Make the root with its pictures, links out of it, a pipe and a circle of links; beside it what may not
    be read."""
    root = folder / "root"
    (folder / "outside").mkdir()
    root.mkdir()
    for n, name in enumerate(("a.png", "b.png", "ä.png")):
        mutations.sound_picture(n).save(root / name)
    mutations.sound_picture(9).save(folder / "outside" / "secret.png")
    (root / "link.png").symlink_to(folder / "outside" / "secret.png")
    (root / "linked").symlink_to(folder / "outside")
    (root / "loop").symlink_to(root / "loop")
    os.mkfifo(root / "pipe")
    return root


# -------------------------------------------------------------------------------------------- readers of rows
class Readers:
    """One method a reader: it writes the input of a random generator and runs the script that reads it."""

    def __init__(self, tally: Tally, root: Path, checkpoint: Path):
        self.tally, self.root, self.case, self.checkpoint = tally, root, root.parent, str(checkpoint)
        self.input, self.output = self.case / "in.jsonl", self.case / "out.jsonl"
        # loaded once: what is read of them is the same for every input
        evaluate.load_processors = probe.load_processors = functools.cache(load_processors)
        intervene.load_tools = functools.cache(load_tools)
        evaluate.load_with, self.qwen = functools.cache(load_with), load_tools(self.checkpoint)
        for preset in PRESETS.values():  # all families' markers are tokens: none of them may come from data
            add_tokens(self.qwen, preset.tokens)
        import utils.call_flags
        utils.call_flags.LocalBackend = StandInModel

    def write(self, rng: random.Random, sound: Callable[[], dict], more: list[dict]) -> Path:
        self.input.write_bytes(mutations.as_file(rng, [mutations.mutate(rng, sound()), *more]))
        return self.input

    def run(self, reader: str, seed: object, main: Callable, *argv: object) -> int | None:
        return self.tally.run(reader, "rows", lambda: main([str(word) for word in argv]), seed)

    def stage_1(self, rng, seed):
        form, sound = rng.choice([("monet", monet_row), ("mirage", mirage_row), ("own", own_row)])
        argv = ["--input", self.write(rng, sound, [own_row("x/2")]), "--image_root", self.root, "--output",
                self.output, "--dry_run"]
        if self.run(f"rewrite_captions {form}", seed, rewrite_captions.main, *argv) == 0:
            self.check_calls(rewrite_captions, [str(word) for word in argv])

    def check_calls(self, script: object, argv: list[str]) -> None:
        """The words of a call go to a server whose tokenizer takes markers for tokens: none may come from
        data."""
        args, tokenizer = script.parse_args(argv), self.qwen.tokenizer
        if script is rewrite_captions:
            samples = script.read_samples(args)
            script.apply_rules(samples, args.image_root, None)
            calls = [call for s in samples if s.reason is None
                     for call in script.caption_calls(s, args, script.PROMPTS)]
        else:
            rows = script.read_rows(args.input, script.OWN_FIELDS | {"chain": str})
            calls = [script.judge_call(row, verdict, args.image_root, script.PROMPTS)
                     for row, verdict in zip(rows, script.judge(rows, None, args, script.PROMPTS))
                     if verdict.stage is None]
        for call in calls:
            if "<|" in call.text.replace("<| ", "") and (markers := script_markers(tokenizer, call.text)):
                self.tally.fail("tokens", f"{script.__name__} call", markers)

    def stage_2(self, rng, seed):
        argv = ["--input", self.write(rng, own_row, [own_row("x/2")]), "--image_root", self.root, "--output",
                self.output]
        if self.run("filter_data", seed, filter_data.main, *argv,
                    rng.choice(("--dry_run", "--rules_only"))) == 0:
            self.check_calls(filter_data, [str(word) for word in argv])

    def training(self, rng, seed):
        kind = rng.choice(train_sft.IMAGINATIONS)
        args = train_sft.parse_args(["--data", str(self.write(rng, own_row, [own_row("x/2")])),
                                     "--image_root", str(self.root),
                                     "--output", str(self.case / "checkpoint"), "--imagination", kind])
        target, tokenizer = train_sft.make_target(args), self.qwen.tokenizer

        def act() -> int:
            rows = train_sft.prepare_rows(args)[0]
            for row, example in zip(rows, make_examples(self.qwen, rows, target, args.max_tokens)):
                n_steps = sum("image" in step for step in row["steps"]) if target.spec else 0
                latents = "" if not n_steps else target.spec.start + target.spec.pad * target.spec.size + target.spec.end
                neutral = chat(tokenizer, "x", len(row["images"])) + latents * n_steps + END_OF_TURN
                expected = template_ids(tokenizer, tokenizer(neutral, add_special_tokens=False).input_ids)
                self.tally.check_tokens(f"train_sft {kind}", tokenizer, example.ids, expected)
            return 0
        self.tally.run(f"train_sft {kind}", "rows", act, seed)

    def items(self, rng, seed):
        metric = rng.choice(("mcq", "mcq", "likelihood", "wtq", "tabfact", "yesno_pair", "vsp_path"))
        self.write(rng, lambda: item_row(metric=metric), [item_row("i/2")])
        script, argv = rng.choice([(evaluate, ["--output", self.output, "--backend",
                                               rng.choice(("local", "openai")), "--max_pixels", "100000"]),
                                   (probe, ["--output", self.case / "probe"]),
                                   (intervene, ["--output", self.output, "--latent", "off"])])
        argv = ["--items", self.input, "--image_root", self.root, "--model", self.checkpoint, "--dry_run",
                *argv]
        if self.run(f"{script.__name__} items", seed, script.main, *argv) == 0:
            self.check_items(script)

    def check_items(self, script: object) -> None:
        tokenizer = self.qwen.tokenizer
        for item in evaluate.read_items(self.input, None, tuple(evaluate.ANSWER_TYPES)):
            n = len(item["images"])
            prompts = [chat(tokenizer, question_text(item), n)]
            if script is evaluate:
                conversation = Conversation(item, PROTOCOLS["vlmevalkit"], str(self.root), "direct", {})
                prompts.append(render(tokenizer, conversation.messages))
            expected = template_ids(tokenizer, tokenizer(chat(tokenizer, "x", n),
                                                         add_special_tokens=False).input_ids)
            for prompt in prompts:
                self.tally.check_tokens(f"{script.__name__} prompt", tokenizer,
                                        tokenizer(prompt, add_special_tokens=False).input_ids, expected)

    def probe_items(self, rng, seed):
        write_rows(self.case / "items.jsonl", [item_row(), item_row("i/2")])
        self.write(rng, probe_row, [probe_row("p/2") | {"source": "i/2"}])
        self.run("probe questions", seed, probe.main, "--items", self.case / "items.jsonl", "--probe_items",
                 self.input, "--image_root", self.root,
                 "--model", self.checkpoint, "--output", self.case / "probe", "--dry_run",
                 *rng.choice(([], ["--circular"])))

    def results(self, rng, seed):
        self.write(rng, result_row, [result_row("i/2") | {"verdict": "incorrect"}])
        metrics = mutations.as_line(mutations.mutate(rng, METRICS)) if rng.random() < 0.5 else json.dumps(
            METRICS)
        Path(f"{self.input}.metrics.json").write_bytes(mutations.PICKLE if rng.random() < 0.03
                                                       else metrics.encode("utf-8", "surrogatepass"))
        write_rows(self.case / "other.jsonl", [result_row(), result_row("i/2")])
        if rng.random() < 0.5:
            self.run("evaluate --table", seed, evaluate.main, "--table", f"Monet={self.input}", "--output",
                     self.case / "table.md")
        else:
            self.run("evaluate --compare", seed, evaluate.main, "--compare", self.input, self.case
                     / "other.jsonl", "--output",
                     self.case / "compare.json")

    def prompts(self, rng, seed):
        write_rows(self.case / "own.jsonl", [own_row()])
        script, flag = rng.choice([(rewrite_captions, "--no_refine"), (filter_data, "--blind_answer")])
        lines = mutations.as_file(rng,
                                  [mutations.mutate(rng,
                                                    {name: text for name, text in script.PROMPTS.items()})])
        self.input.write_bytes(lines)
        self.run("prompts", seed, script.main, "--input", self.case / "own.jsonl", "--image_root", self.root,
                 "--output", self.output,
                 "--prompts", self.input, "--dry_run", flag)

    # ---------------------------------------------------------------------------------- benchmarks' own files
    def source(self, rng, seed):
        name, make = rng.choice([("vstar", bench.vstar_rows), ("vstar_inline", bench.inline_rows),
                                 ("hrbench_4k", bench.hrbench_rows),
                                 ("mme_realworld_lite", bench.realworld_rows),
                                 ("blink/Jigsaw", bench.blink_rows), ("tablevqa/vwtq", table_rows),
                                 ("mme", mme_rows), ("vsp", vsp_rows),
                                 ("ocrbench_v2", ocr_rows)])
        rows = json.loads(json.dumps(make(), default=bench.text_of))
        rows[0] = mutations.mutate(rng, rows[0])
        kind = rng.choice(("tsv", "jsonl", "parquet"))
        path = self.case / f"source.{kind}"
        if kind == "jsonl":
            path.write_bytes(mutations.as_file(rng, rows))
        elif kind == "tsv":
            bench.write_tsv(path, [{key: as_cell(row.get(key, "")) for key in make()[0]} for row in rows])
        else:
            write_parquet(rng, path, make(), rows)
        if rng.random() < 0.15 and path.exists():
            damage(rng, path)
        self.run(f"evaluate --benchmark {kind}", seed, evaluate.main, "--benchmark", name, "--source", path,
                 "--image_root", self.root, "--prepare",
                 "--output", self.case / "bench", *rng.choice(([], ["--limit", "2"])))

    def folder_source(self, rng, seed):
        shutil.rmtree(self.case / "sources", ignore_errors=True)
        (self.case / "sources").mkdir()
        make, name = rng.choice([(bench.write_vstar_original, "vstar_likelihood"),
                                 (bench.write_vstar_original, "vstar_likelihood"),
                                 (bench.write_vstar_original, "vstar_likelihood"),
                                 (bench.write_tablevqa, "tablevqa/vwtq"),
                                 (bench.write_blink, "blink/Jigsaw")])
        folder = make(self.case / "sources")[0]
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        victim = rng.choice([path for path in files if path.suffix in (".json", ".parquet", ".jpg")])
        act = rng.randrange(5)
        if victim.suffix == ".json" and act < 3:
            victim.write_bytes(mutations.as_file(rng,
                                                 [mutations.mutate(rng, json.loads(victim.read_text()))]))
        # tables and notes are what the user names, wherever they lie
        elif act == 3 and victim.suffix == ".jpg":
            victim.unlink()
            victim.symlink_to(rng.choice((self.case / "outside" / "secret.png", "/etc/passwd", victim)))
        else:
            damage(rng, victim)
        self.run("evaluate --benchmark folder", seed, evaluate.main, "--benchmark", name, "--source", folder,
                 "--prepare", "--output",
                 self.case / "bench", "--limit", "2")

    # -------------------------------------------------------------------------- what scripts wrote themselves
    def journal(self, rng, seed):
        which = rng.choice(("rewrite", "rewrite", "filter", "filter", "evaluate"))
        made = self.case / f"journal_{which}"
        write_rows(self.case / "own.jsonl", [own_row(), own_row("x/2") | {"answer": "B"}])
        write_rows(self.case / "items.jsonl", [item_row(), item_row("i/2")])
        common = ["--image_root", self.root, "--model", self.checkpoint]
        script, argv = {"rewrite": (rewrite_captions, ["--input", self.case / "own.jsonl", "--no_guard",
                                                       *common]),
                        "filter": (filter_data, ["--input", self.case / "own.jsonl", "--no_guard", *common]),
                        "evaluate": (evaluate, ["--items", self.case / "items.jsonl", "--max_new_tokens", "4",
                                                "--protocol", "plain",
                                                "--dtype", "float32", *common])}[which]
        if not made.exists():
            made.mkdir()
            self.tally.run(f"journal of {which}", "rows",
                           lambda: script.main([*map(str, argv), "--output", str(made / "out.jsonl")]),
                           "sound")
        work = self.case / "again"
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(made, work)
        victim = rng.choice([path for path in sorted((work / "out.jsonl.run").iterdir())
                             if path.suffix in (".json", ".jsonl") and path.stat().st_size])
        mutate_file(rng, victim)
        self.run(f"journal of {which}", seed, script.main, *argv, "--output", work / "out.jsonl", *rng.choice(
            ([], ["--export_only"]) if which != "evaluate" else ([], ["--retry_errors"])))

    def store(self, rng, seed):
        import numpy as np
        folder = self.case / "states"
        shutil.rmtree(folder, ignore_errors=True)
        with StateWriter(folder, {"model": "m"}) as writer:
            for n in range(3):
                writer.add(f"i/{n}", {"latent": np.ones((4, 8)), "text": np.ones((2, 8))}, emitted=True)
        victim = rng.choice([path for path in sorted(folder.rglob("*")) if path.is_file()])
        if victim.suffix == ".safetensors":
            damage(rng, victim)
        else:
            mutate_file(rng, victim)

        def act() -> int:
            found = States(folder)
            for key in found.records:
                found.load(key, "latent")
            for kind in ("latent", "text"):
                for _ in found.cells(kind, [*found.records]):
                    pass
            return 0
        self.tally.run("states", "rows", act, seed)


def script_markers(tokenizer: object, text: str) -> list[str]:
    """Return the control tokens of Qwen's chat format that a text is read as."""
    ids = tokenizer(text, add_special_tokens=False).input_ids
    return [name for i in ids if i in special_ids(tokenizer)
            and (name := tokenizer.convert_ids_to_tokens(i)).startswith("<|")]


def as_cell(value: object) -> str:
    text = mutations.as_line(value) if not isinstance(value, str) else mutations.RAW.get(value, value)
    return text.encode("utf-8", "replace").decode("utf-8")


def mutate_file(rng: random.Random, path: Path) -> None:
    """Mutate the first line of a JSONL, or the one object of a JSON file."""
    text = path.read_text()
    lines = [json.loads(line) for line in (text.splitlines() if path.suffix == ".jsonl" else [text])]
    lines[0] = mutations.mutate(rng, lines[0])
    path.write_bytes(mutations.as_file(rng, lines))


def damage(rng: random.Random, path: Path) -> None:
    """Flip, cut or replace a binary file."""
    data, act = bytearray(path.read_bytes()), rng.randrange(5)
    if act == 0:
        data = data[:rng.randrange(len(data) + 1)]
    elif act == 1:
        data = mutations.PICKLE
    else:
        for _ in range(rng.choice((1, 3, 20)) if data else 0):
            data[rng.randrange(len(data))] = rng.randrange(256)
    path.write_bytes(data)


def write_parquet(rng: random.Random, path: Path, sound: list[dict], rows: list[dict]) -> None:
    """Write mutated rows if their types go together, else sound ones with a column of another type."""
    import datetime

    import pyarrow
    from pyarrow import parquet
    try:
        table = pyarrow.Table.from_pylist([{key: row.get(key) for key in sound[0]} for row in rows])
    except (pyarrow.ArrowException, OverflowError, UnicodeError, TypeError):
        odd = rng.choice((b"\xff\0", datetime.datetime(2026, 1, 1), 2.5, {"a": b"\xff"}, ["x"], None))
        column = rng.choice([*sound[0], "extra"])
        table = pyarrow.Table.from_pylist([row | {column: odd} for row in sound])
    parquet.write_table(table, path)


def table_rows() -> list[dict]:
    return [{"qa_id": f"vwtq_{n}", "image": bench.struct(bench.picture(n)), "question": "who?",
             "gt": r"Apple|10\p20"} for n in range(2)]


def mme_rows() -> list[dict]:
    return [{"question_id": "count/0.jpg", "image": bench.struct(bench.picture(0)), "question": question,
             "answer": gold, "category": "count"}
            for question, gold in (("a dog?", "Yes"), ("a cat?", "No"))]


def vsp_rows() -> list[dict]:
    return [{"text_input": f"Map {n}: <image>", "image_input": "a.png", "map_id": str(n),
             "map_desc": [[1, 0], [-1, 2]]} for n in range(2)]


def ocr_rows() -> list[dict]:
    return [{"id": n, "question": "What?", "type": "text recognition en", "answers": ["Stop"],
             "image": bench.struct(bench.picture(n))} for n in range(2)]


SHARES = {"stage_1": 22, "stage_2": 18, "training": 18, "items": 16, "probe_items": 5, "results": 8,
          "prompts": 4, "source": 14, "folder_source": 2,
          "journal": 6, "store": 4}  # how often each reader's turn comes


# ----------------------------------------------------------------------------------------- pictures, commands
def run_pictures(readers: Readers, n: int, seed: int, bombs: bool) -> None:
    """Put each picture before all that opens one: rules of stages 1 and 2, training, benchmarks, what is sent
    to a server."""
    tally, path = readers.tally, readers.root / "hostile.png"
    write_rows(readers.case / "one.jsonl", [own_row() | {"images": ["hostile.png"]}])
    args = train_sft.parse_args(["--data", "x", "--image_root", str(readers.root), "--output", "x"])
    for name, data in mutations.hostile_pictures(n, seed, bombs):
        path.write_bytes(data)
        tally.run("picture in stage 1", "images", lambda: rewrite_captions.main(
            ["--input", str(readers.case / "one.jsonl"), "--image_root", str(readers.root), "--output",
             str(readers.output), "--dry_run"]), name)

        def open_it() -> int:
            for open_one in (image_size, open_image):
                with contextlib.suppress(ImageError):
                    open_one(path)
            return 0

        def send() -> int:
            with contextlib.suppress(ImageError):
                data_url(path, 10**6, 28)
            return 0

        def train() -> int:
            make_examples(readers.qwen, [own_row() | {"images": ["hostile.png"]}],
                          train_sft.make_target(args), 8192)
            return 0

        def store() -> int:
            evaluate.prepare.__globals__["store"]("here", data, readers.case)
            return 0
        for reader, act in (("opened", open_it), ("sent", send), ("trained on", train), ("stored", store)):
            tally.run(f"picture {reader}", "reads_of_images", act, name)


def run_commands(readers: Readers, n: int, seed: int) -> None:
    """Run a sample as commands, each with its own process."""
    for k in range(n):
        rng = random.Random(f"{seed} command {k}")
        script, sound, flags = [("rewrite_captions", own_row, ["--dry_run"]),
                                ("filter_data", own_row, ["--rules_only"]),
                                ("train_sft", own_row, ["--dry_run", "--model", readers.checkpoint])][k % 3]
        path = readers.write(rng, sound, [own_row("x/2")])
        argv = ["--data" if script == "train_sft" else "--input", path, "--image_root", readers.root,
                "--output", readers.case / f"command_{k}", *flags]
        try:
            done = subprocess.run([sys.executable, f"{script}.py", *map(str, argv)], cwd=ROOT,
                                  capture_output=True, text=True, timeout=90)
        except subprocess.TimeoutExpired:
            readers.tally.fail("hangs", script, "90 s as a command")
            continue
        readers.tally.seed = f"{seed} command {k}"
        readers.tally.counts["processes"] += 1
        if done.returncode not in (0, 2, 3, 4) or "Traceback" in done.stderr:
            readers.tally.fail("tracebacks", f"{script} as a command", done.stderr)


def watch(checkpoint: Path | None = None) -> None:
    """Note from now on what cases open beside their folder, the checkpoint and what libraries read."""
    watched["allowed"] = [*LIBRARIES, *([str(checkpoint.resolve())] if checkpoint else [])]
    if "hooked" not in watched:  # an audit hook stays for good
        sys.addaudithook(audit)
        watched["hooked"] = True


def run(checkpoint: Path, n_rows: int, n_images: int, n_commands: int, seed: int, bombs: bool, only: str
        | None = None) -> dict:
    """Run it all; return the counts."""
    watch(checkpoint)
    before = {script: dict(vars(script)) for script in (evaluate, probe, intervene, train_sft)}
    import utils.call_flags
    backend = utils.call_flags.LocalBackend
    with tempfile.TemporaryDirectory(prefix="hostile-") as folder:
        case = Path(folder).resolve() / "case"
        case.mkdir()
        os.environ["HF_DATASETS_CACHE"] = str(case / "cache")
        root = make_case(case)
        readers = Readers(Tally(case), root, checkpoint)
        names, weights = [*SHARES], [*SHARES.values()]
        try:
            for n in range(n_rows):
                rng = random.Random(f"{seed} row {n}")
                name = rng.choices(names, weights)[0]
                if only in (None, name):
                    getattr(readers, name)(rng, f"{seed} row {n} {name}")
                if n == 100:
                    readers.tally.base = readers.tally.peak  # libraries are loaded by now
            run_pictures(readers, n_images, seed, bombs)
            run_commands(readers, n_commands, seed)
        finally:
            utils.call_flags.LocalBackend = backend
            for script, names in before.items():
                vars(script).update(names)
    return readers.tally.result()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--result", required=True, help="JSON to write")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--commands", type=int, default=9)
    parser.add_argument("--only", choices=SHARES, help="one reader's turns of the same sequence")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    from conftest import TEXTS, TINY, TINY_VISION

    from toy.make_model import make_model
    with tempfile.TemporaryDirectory() as folder:
        make_model(TEXTS, Path(folder) / "tiny", n_tokens=320, seed=0, sizes=TINY, vision_sizes=TINY_VISION)
        began = time.monotonic()
        result = run(Path(folder) / "tiny", args.rows, args.images, args.commands, args.seed,
                     bombs=args.images >= 100, only=args.only)
        result |= {"seed": args.seed, "seconds": round(time.monotonic() - began, 1)}
    Path(args.result).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result))
    bad = ("tracebacks", "hangs", "escapes", "tokens", "pickles", "memory")
    return int(any(result[name] for name in bad))


if __name__ == "__main__":
    raise SystemExit(main())
