"""Answering and scoring items.    pytest tests/test_evaluate.py"""
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import benchmark_fixtures as B
import pytest
from fault_server import calls_of, serving
from processes import command, rank_of
from samples import shortest_path

import evaluate
from utils.evaluate.answering import Local
from utils.jsonl import DataError, load_object, write_rows
from utils.latent_families import PRESETS
from utils.qwen import add_tokens, load, save


@pytest.fixture
def items(tmp_path, picture):
    """Nine items of three pictures."""
    rows = []
    for n in range(9):
        picture(f"{n // 3}.png", color=("red", "blue", "green")[n // 3])
        rows.append({"id": f"t/{n}", "category": ("a", "b")[n % 2], "group_id": f"t/{n // 3}",
                     "question": "What is it?" * (n % 4 + 1),
                     "options": [["A", "red"], ["B", "blue"], ["C", "green"]], "metric": "mcq",
                     "answer": {"type": "letter", "value": "ABC"[n // 3]},
                     "images": [{"path": f"{n // 3}.png"}]})
    write_rows(tmp_path / "items.jsonl", rows)
    return tmp_path / "items.jsonl"


def flags(items, checkpoint, *more, output="out.jsonl"):
    return ["--items", str(items), "--model", str(checkpoint), "--output", str(items.parent / output),
            "--max_new_tokens", "6",
            "--batch_size", "2", "--protocol", "plain", *more]


def rows(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_a_run_writes_a_record_an_item_and_prints_the_metrics(tiny_checkpoint, items, capsys):
    assert evaluate.main(flags(items, tiny_checkpoint)) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed == load_object(items.parent / "out.jsonl.metrics.json")
    results = rows(items.parent / "out.jsonl")
    assert [r["id"] for r in results] == [f"t/{n}" for n in range(9)] and printed["n"] == 9
    assert sum(printed[v] for v in ("correct", "incorrect",
                                    "unresolved")) == 9 and "ci95_clustered" in printed
    assert all(r["image_grids"] == [[1, 6, 4]] and 0 < r["n_tokens"] <= 6 for r in results)
    assert sum(part["n"] for part in printed["categories"].values()) == 9
    before = (items.parent / "out.jsonl").read_bytes()
    assert evaluate.main(flags(items, tiny_checkpoint)) == 0  # all from the journal
    assert (items.parent / "out.jsonl").read_bytes() == before
    with pytest.raises(DataError, match="max_new_tokens"):
        evaluate.main(flags(items, tiny_checkpoint, "--max_new_tokens", "7"))


@pytest.fixture(scope="module")
def latent_checkpoint(tiny_checkpoint, tmp_path_factory):
    """The tiny checkpoint with Mirage's tokens."""
    folder = tmp_path_factory.mktemp("latent") / "checkpoint"
    qwen = load(str(tiny_checkpoint), device="cpu")
    add_tokens(qwen, PRESETS["mirage"].tokens)
    save(qwen, str(folder))
    return folder


def test_latents_are_counted(latent_checkpoint, items):
    assert evaluate.main(flags(items, latent_checkpoint, "--latent", "mirage")) == 0
    metrics = load_object(items.parent / "out.jsonl.metrics.json")
    assert metrics["emission"]["n"] == 9 and metrics["protocol"]["latent_size"] == 4
    assert (metrics["protocol"]["method"], metrics["protocol"]["protocol"]) == ("latent", "plain")


def test_a_missing_and_a_truncated_image_and_one_outside_are_counted_errors(tiny_checkpoint, items):
    data = rows(items)
    (items.parent / "cut.png").write_bytes((items.parent / "0.png").read_bytes()[:60])
    for n, name in ((0, "gone.png"), (4, "cut.png"), (5, "../items.jsonl")):
        data[n]["images"] = [{"path": name}]
    write_rows(items, data)
    assert evaluate.main(flags(items, tiny_checkpoint)) == 3
    results = rows(items.parent / "out.jsonl")
    assert [r["verdict"] == "error" for r in results] == [n in (0, 4, 5) for n in range(9)]
    assert {r["error"] for r in results if "error" in r} == {"image_missing", "image_unreadable",
                                                             "image_outside_root"}
    metrics = load_object(items.parent / "out.jsonl.metrics.json")
    assert (metrics["n"], metrics["error"], metrics["incomplete"]) == (6, 3, True)


def test_a_mended_image_is_asked_again(tiny_checkpoint, items, picture):
    (items.parent / "0.png").rename(items.parent / "away.png")
    assert evaluate.main(flags(items, tiny_checkpoint)) == 3
    (items.parent / "away.png").rename(items.parent / "0.png")
    assert evaluate.main(flags(items, tiny_checkpoint)) == 0
    picture("0.png", size=(112, 112), color="black")
    assert evaluate.main(flags(items, tiny_checkpoint)) == 0
    assert [r["image_grids"] for r in rows(items.parent / "out.jsonl")[2:4]] == [[[1, 8, 8]], [[1, 6, 4]]]


def test_an_error_has_every_field_and_nothing_but_errors_has_no_accuracy(tiny_checkpoint, items, tmp_path):
    (tmp_path / "empty").mkdir()
    assert evaluate.main(flags(items, tiny_checkpoint, "--image_root", str(tmp_path / "empty"))) == 3
    result = rows(items.parent / "out.jsonl")[0]
    assert result["extraction"] == {"value": None, "rule": "image_missing"} and result["n_tokens"] == 0
    metrics = load_object(items.parent / "out.jsonl.metrics.json")
    assert (metrics["n"], metrics["accuracy"], metrics["incomplete"]) == (0, None, True)


def test_a_changed_gold_is_scored_anew_without_the_model(tiny_checkpoint, items):
    assert evaluate.main(flags(items, tiny_checkpoint)) == 0
    journal = next((items.parent / "out.jsonl.run").glob("calls-*"))
    write_rows(journal, [record | {"clean_output": "\\boxed{B}"} for record in rows(journal)])
    write_rows(items, [item | {"answer": {"type": "letter", "value": "B"}} for item in rows(items)])
    assert evaluate.main(flags(items, tiny_checkpoint)) == 0
    assert {r["verdict"] for r in rows(items.parent / "out.jsonl")} == {"correct"}


def test_other_weights_under_the_same_name_are_refused(tiny_checkpoint, items, tmp_path):
    shutil.copytree(tiny_checkpoint, tmp_path / "named")
    assert evaluate.main(flags(items, tmp_path / "named")) == 0
    qwen = load(str(tmp_path / "named"), device="cpu")
    qwen.model.lm_head.weight.data.neg_()
    save(qwen, str(tmp_path / "other"))
    shutil.rmtree(tmp_path / "named")
    (tmp_path / "other").rename(tmp_path / "named")
    with pytest.raises(DataError, match="weights"):
        evaluate.main(flags(items, tmp_path / "named"))


@pytest.mark.parametrize("change, match", [
    ({"question": "<image> or <image>?"}, "'t/3': 2 <image> markers for 1 images"),
    ({"category": 3}, "'t/3': field 'category'"),
    ({"metric": "vsp_path", "answer": {"type": "path_map", "value": [[1, 0], [0, 0]]}},
     "'t/3': answer has not one start")])
def test_an_item_that_cannot_be_asked_is_named(tiny_checkpoint, items, change, match):
    write_rows(items, [item | (change if item["id"] == "t/3" else {}) for item in rows(items)])
    with pytest.raises(DataError, match=match):
        evaluate.main(flags(items, tiny_checkpoint))


def test_no_items_are_an_error(tiny_checkpoint, items):
    items.write_text("")
    with pytest.raises(DataError, match="no items"):
        evaluate.main(flags(items, tiny_checkpoint))


def test_all_real_vsp_problems_become_items(shared_data, tmp_path, capsys):
    source = shared_data / "vsp" / "test.jsonl"
    assert evaluate.main(["--benchmark", "vsp", "--source", str(source), "--prepare", "--output",
                          str(tmp_path / "v")]) == 0
    assert json.loads(capsys.readouterr().out) == {"items": 400,
                                                   "categories": {f"level_{n}": 100 for n in (3, 4, 5, 6)}}
    assert (evaluate.find_items(evaluate.parse_args(["--items", str(tmp_path / "v.items.jsonl"), "--model",
                                                     "m",
                                                     "--output", "o"]))[0][0]["question"].count(
                                                         "<image>")) == 1


def test_prepared_items_travel_with_their_pictures(tiny_checkpoint, shared_data, tmp_path):
    source = str(shared_data / "vsp" / "test.jsonl")
    assert evaluate.main(["--benchmark", "vsp", "--source", source, "--prepare", "--output",
                          str(tmp_path / "v"), "--limit", "2"]) == 0
    arguments = ["--items", str(tmp_path / "v.items.jsonl"), "--model", str(tiny_checkpoint),
                 "--max_new_tokens", "3", "--protocol", "plain"]
    assert evaluate.main([*arguments, "--output", str(tmp_path / "o.jsonl"), "--max_pixels", "50176"]) == 0
    assert (tmp_path / rows(tmp_path / "v.items.jsonl")[0]["images"][0]["path"]).read_bytes() == \
        (shared_data / "vsp" / "img" / "level3" / "31.png").read_bytes()


@pytest.mark.slow
def test_all_real_vsp_problems_run_and_their_shortest_paths_are_right(tiny_checkpoint, shared_data, tmp_path):
    """All 400 from the published file to the score; then a solution of each is put into the journal in the
    reply's place."""
    arguments = ["--benchmark", "vsp", "--source", str(shared_data / "vsp" / "test.jsonl"), "--model",
                 str(tiny_checkpoint),
                 "--output", str(tmp_path / "v.jsonl"), "--max_new_tokens", "8", "--protocol", "plain",
                 "--max_pixels", "50176"]
    assert evaluate.main(arguments) == 0
    metrics = load_object(tmp_path / "v.jsonl.metrics.json")
    assert (metrics["n"], metrics["error"],
            metrics["correct"]) == (400, 0, 0) and len(rows(tmp_path / "v.jsonl")) == 400
    assert {name: part["n"] for name, part in metrics["categories"].items()} == {f"level_{n}": 100
                                                                                 for n in (3, 4, 5, 6)}
    boards = {r["id"]: r["gold"] for r in rows(tmp_path / "v.jsonl")}
    journal = next((tmp_path / "v.jsonl.run").glob("calls-*"))
    conversations = evaluate.open_conversations(rows(tmp_path / "v.jsonl.items.jsonl"),
                                                evaluate.PROTOCOLS["plain"],
                                                evaluate.parse_args([*arguments, "--image_root",
                                                                     str(tmp_path)]))
    tokenizer = load(str(tiny_checkpoint), device="cpu", max_pixels=50176)
    system = Local(tokenizer, None, 8, 8, 65536)
    ids = {conversation.ask(system): conversation.item["id"] for conversation in conversations}
    write_rows(journal,
               [record | {"clean_output": f"\\boxed{{{','.join(shortest_path(boards[ids[record['key']]]))}}}"}
                         for record in rows(journal)])
    assert evaluate.main(arguments) == 0
    metrics = load_object(tmp_path / "v.jsonl.metrics.json")
    assert (metrics["correct"], metrics["accuracy"]) == (400, 1.0)


# ------------------------------------------------------------------------------------------ several processes
def torchrun(processes, arguments):
    return subprocess.Popen(command("evaluate", arguments, processes), stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_one_two_and_three_real_processes_write_the_same_bytes(tiny_checkpoint, items):
    files = []
    for processes in (1, 2, 3):
        run = torchrun(processes, flags(items, tiny_checkpoint, "--max_new_tokens", "40", "--dtype",
                                        "float32", output=f"{processes}.jsonl"))
        out, err = run.communicate(timeout=180)
        assert run.returncode == 0, err
        assert json.loads(out.splitlines()[-1])["n"] == 9
        files.append((items.parent / f"{processes}.jsonl").read_bytes())
    assert len(files[0].splitlines()) == 9 and files[0] == files[1] == files[2]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="ranks are told by /proc")
def test_a_rank_that_is_killed_ends_the_run_and_the_same_command_goes_on(tiny_checkpoint, items):
    """Killed in the middle of its share: torchrun stops the rest, no result is written, and 3 processes
    finish what 2 began."""
    arguments = flags(items, tiny_checkpoint, "--max_new_tokens", "400", "--batch_size", "1", "--dtype",
                      "float32", output="cut.jsonl")
    run = torchrun(2, arguments)
    share = items.parent / "cut.jsonl.run" / "calls-00001-of-00002.jsonl"
    while run.poll() is None and not (share.exists() and share.read_bytes().count(b"\n")):
        time.sleep(0.005)
    os.kill(rank_of(run.pid, 1), signal.SIGKILL)
    _, err = run.communicate(timeout=60)
    assert run.returncode not in (0,
                                  None) and "the same command goes on" in err and "evaluate.py\", line" not in err, err
    assert not (items.parent / "cut.jsonl").exists()
    done = sum(path.read_bytes().count(b"\n") for path in (items.parent / "cut.jsonl.run").glob("calls-*"))
    assert 1 <= done < 9
    again = torchrun(3, arguments)
    _, err = again.communicate(timeout=180)
    assert again.returncode == 0, err
    assert evaluate.main(flags(items, tiny_checkpoint, "--max_new_tokens", "400", "--batch_size", "1",
                               "--dtype", "float32",
                               output="whole.jsonl")) == 0
    assert (items.parent / "cut.jsonl").read_bytes() == (items.parent / "whole.jsonl").read_bytes()


# ------------------------------------------------------------------------------ every benchmark, every method
def write_vsp(folder):
    (folder / "map.png").write_bytes(B.picture(1, "PNG"))
    rows = [{"text_input": "Here is <image>. Which way?", "image_input": "map.png", "map_id": str(n),
             "map_desc": [[1, 2], [0, -1]]}
            for n in range(2)]
    return B.write_jsonl(folder / "vsp.jsonl", rows), {f"vsp/level_2/{n}": {} for n in range(2)}


WRITERS = {"vstar": B.write_vstar, "vstar_inline": B.write_vstar_inline, "hrbench_4k": B.write_hrbench,
           "hrbench_8k": B.write_hrbench, "mme_realworld_lite": B.write_realworld,
           "blink/Jigsaw": B.write_blink,
           "tablevqa/vwtq": B.write_tablevqa,
           "tablevqa/vtabfact": lambda folder: B.write_tablevqa_tsv(folder), "mme": B.write_mme,
           "vsp": write_vsp}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("server"), latency=0.0) as (_, url):
        yield url


def run(folder, name, source, *more):
    """Evaluate a benchmark's fixture; return (exit code, results, metrics)."""
    output = folder / "out" / f"{len(list(folder.glob('out/*.meta.json')))}.jsonl"
    code = evaluate.main(["--benchmark", name, "--source", str(source), "--output", str(output), "--limit",
                          "50", *more])
    return code, rows(output), load_object(f"{output}.metrics.json")


@pytest.mark.parametrize("name", WRITERS)
def test_every_benchmark_runs_by_every_method_that_applies(name, tiny_checkpoint, latent_checkpoint, server,
                                                           tmp_path):
    source, expected = WRITERS[name](tmp_path)
    local = ["--max_new_tokens", "4", "--protocol", "plain", "--model"]
    remote = ["--backend", "openai", "--base_url", server, "--model", "m", "--method"]
    runs = [run(tmp_path, name, source, *local, str(tiny_checkpoint), "--method", "direct"),
            run(tmp_path, name, source, *local, str(latent_checkpoint), "--latent", "mirage"),
            run(tmp_path, name, source, *remote, "text"), run(tmp_path, name, source, *remote, "tool"),
            run(tmp_path, name, source, *local, str(tiny_checkpoint), "--max_pixels", "50176", "--method",
                "text"),
            run(tmp_path, name, source, *local, str(tiny_checkpoint), "--max_pixels", "50176", "--protocol",
                "deepeyes", "--method", "tool"),
            run(tmp_path, name, source, "--system", "Be brief.", *remote, "direct")]
    for (code, results, metrics), method in zip(runs, ("direct", "latent", "text", "tool", "text", "tool",
                                                       "direct")):
        assert code == 0 and sorted(r["id"] for r in results) == sorted(expected if name != "hrbench_8k"
                                                                        else [
            i.replace("4k", "8k") for i in expected])
        assert {(r["method"], r["benchmark"]) for r in results} == {(method, name)} and all(r["prompt"]
                                                                                            for r in results)
        assert metrics["protocol"]["line"].startswith(f"protocol={results[0]['protocol']} method={method} ")
        assert sum(metrics[v] for v in ("correct", "incorrect", "unresolved")) == len(results) and metrics[
            "headline"] is not None
        assert (metrics["efficiency"]["tokens"] > 0) and (metrics["chance"] is None) == (
            name in ("vsp", "tablevqa/vwtq"))
    assert runs[2][1][0]["protocol"] == "vlmevalkit" and all(r["ended_by"] == "answer" for r in runs[3][1])
    if name == "vstar":  # this server always says <answer>A</answer>: one of the four golds
        assert runs[3][2]["accuracy"] == 0.5 == sum(item["answer"]["value"] == "A"
                                                    for item in expected.values()) / 4
    if name.startswith("hrbench"):
        assert runs[2][2]["own_scores"][name]["all"] == {"average": 0.25,
                                                         "by_rotation": runs[2][2]["own_scores"][name]["all"][
            "by_rotation"], "all_right": 0.0, "complete": 2}


def test_options_are_scored_by_their_likelihood_without_a_reply(tiny_checkpoint, tmp_path):
    source, expected = B.write_vstar_original(tmp_path)
    code, results, metrics = run(tmp_path, "vstar_likelihood", source, "--model", str(tiny_checkpoint),
                                 "--protocol", "plain")
    assert code == 0 and {r["extraction"]["rule"] for r in results} == {"likelihood"} and metrics[
        "unresolved"] == 0
    again = run(tmp_path, "vstar_likelihood", source, "--model", str(tiny_checkpoint), "--protocol", "plain")
    assert again[:2] == (code, results)  # from the journal
    assert all(len(r["scores"]) == r["n_options"] == 2 and r["n_tokens"] == 0
               for r in results) and len(results) == len(expected)
    with pytest.raises(DataError, match="2 items are scored by the likelihood"):
        run(tmp_path, "vstar_likelihood", source, "--model", "m", "--backend", "openai", "--method", "text")


def test_items_without_a_scorer_are_refused_before_anything_is_asked(tmp_path):
    with pytest.raises(DataError, match="'ocrbench_v2/0' and 1 more: metric 'unscored' has no scorer"):
        run(tmp_path, "ocrbench_v2", B.write_ocrbench(tmp_path)[0], "--model", "nowhere", "--method",
            "direct")


def test_several_benchmarks_of_one_source_are_one_run(server, tmp_path):
    source, _ = B.write_tablevqa_tsv(tmp_path)
    code = evaluate.main(["--benchmark", "tablevqa/vwtq", "tablevqa/vtabfact", "--source", str(source),
                          "--limit", "50", "--model",
                          "m", "--backend", "openai", "--base_url", server, "--output",
                          str(tmp_path / "t.jsonl")])
    metrics = load_object(tmp_path / "t.jsonl.metrics.json")
    assert code == 0 and metrics["own_scores"]["tablevqa"]["splits"] == 2 and metrics["n"] == 5
    assert "tablevqabench" in metrics["compat"] and metrics["numeric"]["correct"] == 0


# ------------------------------------------------------------------------------------------- server and judge
def remote(items, url, *more, output="out.jsonl"):
    return ["--items", str(items), "--model", "m", "--backend", "openai", "--base_url", url, "--server_wait",
            "4", "--output",
            str(items.parent / output), *more]


def judged_by(url, kind="map"):
    return ["--judge", kind, "--judge_model", "j", "--judge_base_url", url, "--judge_wait", "1", "--timeout",
            "20"]


def test_a_judge_reads_what_no_rule_does_and_the_rest_stands(items, tmp_path):
    """A third of the replies is vague ("something not unlike blue"): wrong when strict, and read by either
    judge."""
    write_rows(items,
               [item | {"question": "vague?" if n % 3 == 0 else "What?", "options": item["options"][:2],
                               "answer": {"type": "letter", "value": "B" if n % 3 == 0 else "A"}}
                       for n, item in enumerate(rows(items))])
    with serving(tmp_path, name="m.jsonl") as (_, model), serving(tmp_path, name="j.jsonl") as (_, judge):
        assert evaluate.main(remote(items, model)) == 0
        strict = load_object(tmp_path / "out.jsonl.metrics.json")
        assert (strict["correct"], strict["unresolved"], strict["headline"]) == (6, 3, 6 / 9)
        for kind in ("map", "grade"):
            assert evaluate.main([*remote(items, model), *judged_by(judge, kind)]) == 0
            metrics = load_object(tmp_path / "out.jsonl.metrics.json")
            assert (metrics["accuracy"], metrics["with_judge"]["accuracy"], metrics["headline"]) == (6 / 9,
                                                                                                     1.0, 1.0)
            assert metrics["protocol"]["judge"] == f"{kind}:j" and metrics["with_judge"]["judged"] == 3
            theirs = metrics["compat"].get("vlmevalkit_0bac5c0+judge", {}).get("accuracy")
            # its rules read none of these replies, its judge all
            assert theirs == (1.0 if kind == "map" else None)
        assert len(calls_of(tmp_path, "m.jsonl")) == 9  # answered once, whoever judges
    assert [r["judged"] for r in rows(tmp_path / "out.jsonl")] == ["correct"] * 9


def test_no_judge_no_start_and_a_judge_that_fails_leaves_no_headline_until_it_is_mended(items, tmp_path):
    write_rows(items, [item | {"question": "vague? " + ("fault:prose" if n == 0 else "")} for n,
                       item in enumerate(rows(items))])
    with serving(tmp_path, name="m.jsonl", sound=True) as (_, model):
        with serving(tmp_path, name="j.jsonl") as (process, judge):
            process.kill()
            process.wait()
            assert evaluate.main([*remote(items, model), *judged_by(judge)]) == 4 and not calls_of(tmp_path,
                                                                                                   "m.jsonl")
        with serving(tmp_path, name="k.jsonl") as (_, judge):
            assert evaluate.main([*remote(items, model), *judged_by(judge)]) == 3
            metrics = load_object(tmp_path / "out.jsonl.metrics.json")
            assert (metrics["with_judge"]["judge_errors"], metrics["headline"]) == (1, None)
            assert rows(tmp_path / "out.jsonl")[0]["judged"] == "judge_error"
            assert evaluate.main([*remote(items, model), *judged_by(judge), "--allow_incomplete"]) == 3
            metrics = load_object(tmp_path / "out.jsonl.metrics.json")
            assert metrics["headline"] == metrics["with_judge"]["accuracy"] and metrics["with_judge"][
                "judge_errors"] == 1
        with serving(tmp_path, name="l.jsonl", sound=True) as (_, judge):
            assert evaluate.main([*remote(items, model), *judged_by(judge)]) == 0
            assert len(calls_of(tmp_path, "l.jsonl")) == 2  # the preflight, and the one that had failed
    assert load_object(tmp_path / "out.jsonl.metrics.json")["headline"] is not None


def test_a_server_that_fails_on_an_item_or_is_gone_says_so(items, tmp_path):
    write_rows(items, [item | {"question": "fault:400" if n == 2 else "What?"} for n,
                       item in enumerate(rows(items))])
    with serving(tmp_path, name="m.jsonl") as (_, model):
        assert evaluate.main(remote(items, model)) == 3
    metrics = load_object(tmp_path / "out.jsonl.metrics.json")
    assert (metrics["n"], metrics["error"], metrics["headline"]) == (8, 1, None)
    assert "status 400" in rows(tmp_path / "out.jsonl")[2]["error"]
    with serving(tmp_path, name="n.jsonl", sound=True) as (_, model):
        assert evaluate.main(remote(items, model)) == 3 and not calls_of(tmp_path, "n.jsonl")
        assert evaluate.main([*remote(items, model), "--retry_errors"]) == 0 and len(calls_of(tmp_path,
                                                                                              "n.jsonl")) == 1
    assert evaluate.main(remote(items, model, "--server_wait", "1", output="new.jsonl")) == 4


# ------------------------------------------------------------------------------------ results of several runs
def test_results_are_compared_and_tabulated(items, tmp_path, server, capsys):
    data = [item | {"benchmark": "vstar"} for item in rows(items)]
    write_rows(items, data)
    assert evaluate.main(remote(items, server, output="a.jsonl")) == 0
    assert evaluate.main(remote(items, server, "--method", "tool", output="b.jsonl")) == 0
    one, two = str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")
    assert evaluate.main(["--compare", one, two, "--output", str(tmp_path / "c.json")]) == 0
    result = load_object(tmp_path / "c.json")
    assert (result["n"], result["difference"], result["test"], result["other_prompts"]) == (9, 0.0,
                                                                                            "sign_flip", 9)
    assert evaluate.main(["--table", f"CapImagine={one}", two, "--output", str(tmp_path / "t.md")]) == 0
    table = (tmp_path / "t.md").read_text()
    assert "| CapImagine | 33.3 (85.9) | not run (74.1) |" in table and "| m (tool) | 33.3 | - |" in table


@pytest.mark.parametrize("more, match", [
    (["--method", "latent"], "latents need both"), (["--latent", "mirage", "--method", "text"],
                                                    "latents need both"),
    (["--latent", "mirage", "--backend", "openai"], "do not feed latents"),
    (["--method", "tool", "--protocol", "monet"], "deepeyes"),
    (["--judge", "map"], "needs --judge_model"), (["--compare", "a", "b"], "expected one of"),
    (["--batch_tokens", "0"], "at least 1")])
def test_flags_that_cannot_go_together(more, match, capsys):
    with pytest.raises(SystemExit):
        evaluate.parse_args(["--items", "i", "--model", "m", "--output", "o", *more])
    assert match in capsys.readouterr().err


def test_a_protocol_decides_words_and_resolution_unless_a_flag_does(tiny_checkpoint, items, capsys):
    assert evaluate.main(flags(items, tiny_checkpoint, "--protocol", "monet", "--dry_run")) == 0
    shown = capsys.readouterr()
    assert "Put your final answer in \\boxed{}." in shown.err and json.loads(shown.out)["items"] == 9
    args = evaluate.parse_args(flags(items, "m", "--protocol", "monet_paper", "--max_pixels", "50176",
                                     "--suffix", "!", "--system", "S"))
    protocol = evaluate.find_protocol(args)
    assert (protocol.min_pixels, protocol.max_pixels, protocol.suffix, protocol.system) == (200704, 50176,
                                                                                            "!", "S")
    with pytest.raises(DataError, match="expected --max_pixels"):
        evaluate.main(flags(items, "m", "--backend", "openai"))
