"""Answering and scoring items."""
import csv
import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
from benchmark_fixtures import EXPECTED, FILES
from fault_server import calls_of, serving
from processes import run_here
from samples import framed, shortest_path
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

import evaluate
from utils.backends import LocalBackend
from utils.evaluate.answering import Local
from utils.evaluate.sources import table_rows
from utils.jsonl import DataError, load_object, write_rows
from utils.latent_families import PRESETS
from utils.qwen import load, load_processors
from utils.train.weights import add_tokens, save


@pytest.fixture
def items(tmp_path, picture):
    """Nine items of three pictures."""
    rows = []
    for n in range(9):
        picture(f"{n // 3}.png", color=("red", "blue", "green")[n // 3])
        rows.append({"id": f"t/{n}", "category": "ab"[n % 2], "group_id": f"t/{n // 3}", "metric": "mcq",
                     "question": "What is it?" * (n % 4 + 1), "images": [{"path": f"{n // 3}.png"}],
                     "options": [["A", "red"], ["B", "blue"], ["C", "green"]],
                     "answer": {"type": "letter", "value": "ABC"[n // 3]}})
    write_rows(tmp_path / "items.jsonl", rows)
    return tmp_path / "items.jsonl"


def flags(items, checkpoint, *more, output="out.jsonl"):
    return ["--items", str(items), "--model", str(checkpoint), "--output", str(items.parent / output),
            "--max_new_tokens", "6", "--batch_size", "2", "--protocol", "plain", *more]


def rows(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def results_of(items):
    return rows(items.parent / "out.jsonl")


def metrics_of(items):
    return load_object(items.parent / "out.jsonl.metrics.json")


def change(items, **changes):
    """Change fields of items: {name: function of the number and the item}."""
    write_rows(items, [item | {name: make(n, item) for name, make in changes.items()}
                       for n, item in enumerate(rows(items))])


def answer(items, checkpoint, *more, code=0):
    """Run over the items; return (metrics, results)."""
    assert evaluate.main(flags(items, checkpoint, *more)) == code
    return metrics_of(items), results_of(items)


def test_a_run_writes_one_record_per_item_and_prints_the_metrics(tiny_checkpoint, items, capsys):
    metrics, results = answer(items, tiny_checkpoint)
    assert metrics == json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [r["id"] for r in results] == [f"t/{n}" for n in range(9)] and metrics["n"] == 9
    assert sum(metrics[verdict] for verdict in ("correct", "incorrect", "unresolved")) == 9
    assert sum(part["n"] for part in metrics["categories"].values()) == 9
    assert all(r["image_grids"] == [[1, 6, 4]] and 0 < r["n_tokens"] <= 6 for r in results)
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


@pytest.mark.parametrize("more, size", [([], 4), (["--latent_size", "2"], 2), (["--force_start"], 4)])
def test_latents_are_counted(latent_checkpoint, items, more, size):
    metrics, results = answer(items, latent_checkpoint, "--latent", "mirage", *more)
    assert metrics["emission"]["n"] == 9 and metrics["protocol"]["latent_size"] == size
    assert metrics["protocol"]["force_start"] == (more == ["--force_start"])
    assert more != ["--force_start"] or metrics["emission"]["k"] == 9 and all(
        result["raw_output"].startswith(PRESETS["mirage"].start) for result in results)
    assert (metrics["protocol"]["method"], metrics["protocol"]["protocol"]) == ("latent", "plain")


def test_images_that_are_missing_truncated_or_outside_are_counted_errors(tiny_checkpoint, items):
    (items.parent / "cut.png").write_bytes((items.parent / "0.png").read_bytes()[:60])
    wrong = {0: "gone.png", 4: "cut.png", 5: "../items.jsonl"}
    change(items, images=lambda n, item: [{"path": wrong[n]}] if n in wrong else item["images"])
    metrics, results = answer(items, tiny_checkpoint, code=3)
    assert [r["verdict"] == "error" for r in results] == [n in wrong for n in range(9)]
    assert [r["error"] for r in results if "error" in r] == [
        "image_missing", "image_unreadable", "image_outside_root"]
    assert results[0]["extraction"] == {"value": None, "rule": "image_missing"}
    assert results[0]["n_tokens"] == 0
    assert (metrics["n"], metrics["error"], metrics["incomplete"]) == (6, 3, True)
    change(items, images=lambda n, item: [{"path": "gone.png"}])
    metrics, _ = answer(items, tiny_checkpoint, code=3)
    assert (metrics["n"], metrics["accuracy"], metrics["incomplete"]) == (0, None, True)


def test_a_changed_image_is_asked_again_and_a_changed_gold_scored_without_the_model(tiny_checkpoint, items,
                                                                                   picture):
    (items.parent / "0.png").rename(items.parent / "away.png")
    answer(items, tiny_checkpoint, code=3)
    (items.parent / "away.png").rename(items.parent / "0.png")
    answer(items, tiny_checkpoint)
    picture("0.png", size=(112, 112), color="black")
    _, results = answer(items, tiny_checkpoint)
    assert [r["image_grids"] for r in results[2:4]] == [[[1, 8, 8]], [[1, 6, 4]]]
    journal = next((items.parent / "out.jsonl.run").glob("calls-*"))
    write_rows(journal, [record | {"clean_output": "\\boxed{B}"} for record in rows(journal)])
    change(items, answer=lambda n, item: {"type": "letter", "value": "B"})
    assert {r["verdict"] for r in answer(items, tiny_checkpoint)[1]} == {"correct"}


def test_other_weights_under_the_same_name_are_refused(tiny_checkpoint, items, tmp_path):
    shutil.copytree(tiny_checkpoint, tmp_path / "named")
    answer(items, tmp_path / "named")
    qwen = load(str(tmp_path / "named"), device="cpu")
    qwen.model.lm_head.weight.data.neg_()
    save(qwen, str(tmp_path / "other"))
    shutil.rmtree(tmp_path / "named")
    (tmp_path / "other").rename(tmp_path / "named")
    with pytest.raises(DataError, match="weights"):
        answer(items, tmp_path / "named")


@pytest.mark.parametrize("changes, match", [
    ({"question": "<image> or <image>?"}, "'t/3': 2 <image> markers for 1 images"),
    ({"metric": "vsp_path", "answer": {"type": "path_map", "value": [[1, 0], [0, 0]]}}, "'t/3': answer"),
    (None, "no items")])
def test_items_that_cannot_be_asked_are_named(tiny_checkpoint, items, changes, match):
    data = rows(items)
    write_rows(items, [] if changes is None else [*data[:3], data[3] | changes, *data[4:]])
    with pytest.raises(DataError, match=match):
        evaluate.main(flags(items, tiny_checkpoint))


def test_prepared_items_travel_with_their_pictures(tiny_checkpoint, tmp_path, capsys):
    made, limit = EXPECTED["vsp", "vsp.jsonl"], ["--limit", "50"]
    (tmp_path / "here").mkdir()
    assert evaluate.main(["--benchmark", "vsp", "--source", str(FILES / "vsp.jsonl"), "--prepare", *limit,
                          "--output", str(tmp_path / "here" / "v")]) == 0
    assert json.loads(capsys.readouterr().out)["items"] == len(made)
    (tmp_path / "here").rename(tmp_path / "there")
    assert evaluate.main(flags(tmp_path / "there" / "v.items.jsonl", tiny_checkpoint, *limit)) == 0
    assert {result["id"] for result in rows(tmp_path / "there" / "out.jsonl")} == set(made)


def test_a_file_of_one_s_own_is_answered_with_pictures_of_any_size(tiny_checkpoint, tmp_path):
    """332 x 27 and 5 x 5 pixels: transformers enlarges them to 336 x 28 and 28 x 28."""
    sizes = {"a.png": (332, 27), "b.png": (5, 5)}
    for name, size in sizes.items():
        framed(tmp_path / name, size)
    (tmp_path / "my.csv").write_text("id,image_path,question,A,B,C,answer,category\n"
                                     "1,a.png,Which?,red,blue,,A,colour\n2,b.png,Which?,red,blue,,b,\n")
    code = evaluate.main(["--benchmark", "mcq", "--source", str(tmp_path / "my.csv"), "--protocol", "plain",
                          "--model", str(tiny_checkpoint), "--output", str(tmp_path / "out.jsonl"),
                          "--max_new_tokens", "4"])
    results = rows(tmp_path / "out.jsonl")
    assert (code, [result["gold"] for result in results]) == (0, ["A", "B"])
    limits = load_processors(str(tiny_checkpoint))[1].size
    for result, size in zip(results, sizes.values()):
        expected = smart_resize(size[1], size[0], 28, limits["shortest_edge"], limits["longest_edge"])
        assert [14 * n for n in result["image_grids"][0][1:]] == list(expected)


@pytest.mark.slow
def test_all_real_vsp_problems_run_and_their_shortest_paths_are_right(tiny_checkpoint, shared_data, tmp_path):
    """All 400 from the published file to the score; then the journal gets a solution of each as its reply."""
    output = tmp_path / "v.jsonl"
    arguments = ["--benchmark", "vsp", "--source", str(shared_data / "vsp" / "test.jsonl"), "--model",
                 str(tiny_checkpoint), "--output", str(output), "--max_new_tokens", "8", "--protocol",
                 "plain", "--max_pixels", "50176"]
    assert evaluate.main(arguments) == 0
    metrics, results = load_object(f"{output}.metrics.json"), rows(output)
    assert (metrics["n"], metrics["error"], metrics["correct"], len(results)) == (400, 0, 0, 400)
    paths = {r["id"]: ",".join(shortest_path(r["gold"])) for r in results}
    args = evaluate.parse_args([*arguments, "--image_root", str(tmp_path)])
    conversations = evaluate.open_conversations(rows(f"{output}.items.jsonl"),
                                                evaluate.PROTOCOLS["plain"], args)
    system = Local(LocalBackend(str(tiny_checkpoint), 50176, 8, 65536), 8)
    solutions = {conversation.ask(system): paths[conversation.item["id"]] for conversation in conversations}
    journal = next((tmp_path / "v.jsonl.run").glob("calls-*"))
    write_rows(journal, [record | {"clean_output": f"\\boxed{{{solutions[record['key']]}}}"}
                         for record in rows(journal)])
    assert evaluate.main(arguments) == 0
    metrics = load_object(f"{output}.metrics.json")
    assert (metrics["correct"], metrics["accuracy"]) == (400, 1.0)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("server"), latency=0.0) as (_, url):
        yield url


def run(folder, name, source, *more):
    """Evaluate a benchmark of tests/evaluate/files; return (exit code, results, metrics)."""
    output = folder / "out" / f"{len(list(folder.glob('out/*.meta.json')))}.jsonl"
    code = evaluate.main(["--benchmark", name, "--source", str(FILES / source), "--output", str(output),
                          "--limit", "50", *more])
    return code, rows(output), load_object(f"{output}.metrics.json")


@pytest.mark.parametrize("name, source", [
    ("vstar", "vstar.tsv"), ("hrbench_8k", "hrbench.tsv"), ("mme_realworld_lite", "realworld.tsv"),
    ("blink/Jigsaw", "BLINK"), ("tablevqa/vwtq", "tables"), ("tablevqa/vtabfact", "tables.tsv"),
    ("mme", "mme.parquet"), ("vsp", "vsp.jsonl")])
def test_every_benchmark_runs_by_every_method_that_applies(name, source, tiny_checkpoint, latent_checkpoint,
                                                           server, tmp_path):
    plain = ["--max_new_tokens", "4", "--protocol", "plain", "--model", str(tiny_checkpoint)]
    remote = ["--backend", "openai", "--base_url", server, "--model", "m", "--method"]
    runs = [("direct", [*plain, "--method", "direct"]),
            ("latent", [*plain[:-1], str(latent_checkpoint), "--latent", "mirage"]),
            ("text", [*remote, "text"]), ("tool", [*remote, "tool"]),
            ("tool", [*plain, "--max_pixels", "50176", "--protocol", "deepeyes", "--method", "tool"]),
            ("direct", ["--system", "Be brief.", *remote, "direct"])]
    expected = EXPECTED[name.replace("8k", "4k"), source]
    runs = [(method, *run(tmp_path, name, source, *more)) for method, more in runs]
    for method, code, results, metrics in runs:
        assert code == 0 and {r["id"].replace("8k", "4k") for r in results} == set(expected)
        assert {(r["method"], r["benchmark"]) for r in results} == {(method, name)}
        assert all(r["prompt"] for r in results)
        assert metrics["protocol"]["line"].startswith(f"protocol={results[0]['protocol']} method={method} ")
        assert sum(metrics[v] for v in ("correct", "incorrect", "unresolved")) == len(results)
        assert metrics["headline"] is not None and metrics["efficiency"]["tokens"] > 0
        assert (metrics["chance"] is None) == (name in ("vsp", "tablevqa/vwtq"))
    _, _, by_text, text_metrics = runs[2]
    _, _, by_tool, tool_metrics = runs[3]
    assert by_text[0]["protocol"] == "vlmevalkit" and all(r["ended_by"] == "answer" for r in by_tool)
    if name == "vstar":  # this server always replies <answer>A</answer>
        golds = Counter(item["answer"]["value"] for item in expected.values())
        assert tool_metrics["accuracy"] == 0.5 == golds["A"] / 4
    if name.startswith("hrbench"):
        scores = text_metrics["own_scores"][name]["all"]
        assert (scores["average"], scores["all_right"], scores["complete"]) == (0.25, 0.0, 2)


def test_benchmarks_that_cannot_be_asked_are_refused_before_anything_is(tmp_path):
    for name, source, first in (("ocrbench_v2", "ocr.parquet", "ocrbench_v2/0"),
                                ("vstar_regions", "vstar_bench", "vstar_regions/direct")):
        with pytest.raises(DataError, match=f"'{first}.*' and 1 more: metric 'unscored' has no scorer"):
            run(tmp_path, name, source, "--model", "nowhere", "--method", "direct")
    with pytest.raises(DataError, match="BLINK: revision 'main', expected a commit of 40 hex digits"):
        evaluate.main(["--benchmark", "blink/Jigsaw", "--revision", "main", "--prepare", "--output",
                       str(tmp_path / "b")])


def test_several_benchmarks_of_one_source_are_one_run(server, tmp_path):
    code, _, metrics = run(tmp_path, "tablevqa/vwtq", "tables.tsv", "--benchmark", "tablevqa/vwtq",
                           "tablevqa/vtabfact", "--model", "m", "--backend", "openai", "--base_url", server)
    assert code == 0 and metrics["own_scores"]["tablevqa"]["splits"] == 2 and metrics["n"] == 5
    assert "tablevqabench" in metrics["compat"]


def remote(items, url, *more, output="out.jsonl"):
    return ["--items", str(items), "--model", "m", "--backend", "openai", "--base_url", url, "--server_wait",
            "4", "--output", str(items.parent / output), *more]


def judged_by(url, kind="map"):
    return ["--judge", kind, "--judge_model", "j", "--judge_base_url", url, "--judge_wait", "1", "--timeout",
            "20"]


def test_a_judge_reads_what_no_rule_does_and_changes_nothing_else(items, tmp_path):
    """A third of the replies is vague ("something not unlike blue"): wrong by rules, read by the judge."""
    change(items, question=lambda n, item: "What?" if n % 3 else "vague?",
           options=lambda n, item: item["options"][:2],
           answer=lambda n, item: {"type": "letter", "value": "A" if n % 3 else "B"})
    with serving(tmp_path, name="m.jsonl") as (_, model), serving(tmp_path, name="j.jsonl") as (_, judge):
        assert evaluate.main(remote(items, model)) == 0
        strict = metrics_of(items)
        assert (strict["correct"], strict["unresolved"], strict["headline"]) == (6, 3, 6 / 9)
        for kind in ("map", "grade"):
            assert evaluate.main([*remote(items, model), *judged_by(judge, kind)]) == 0
            metrics = metrics_of(items)
            with_judge = metrics["with_judge"]
            assert (metrics["accuracy"], with_judge["accuracy"], metrics["headline"]) == (6 / 9, 1.0, 1.0)
            assert metrics["protocol"]["judge"] == f"{kind}:j" and with_judge["judged"] == 3
            theirs = metrics["compat"].get("vlmevalkit_e8e78f0+judge", {}).get("accuracy")
            # VLMEvalKit's rules read none of these replies, the judge that matches options reads all
            assert theirs == (1.0 if kind == "map" else None)
        assert len(calls_of(tmp_path, "m.jsonl")) == 9  # answered once, whoever judges
    assert [r["judged"] for r in results_of(items)] == ["correct"] * 9


def test_a_judge_that_fails_leaves_no_headline_until_it_is_repaired(items, tmp_path):
    change(items, question=lambda n, item: "vague? " + ("" if n else "fault:prose"))
    with serving(tmp_path, name="m.jsonl", faults=False) as (_, model):
        assert run_here("evaluate", [*remote(items, model), *judged_by("http://127.0.0.1:9/v1")]) == 4
        assert not calls_of(tmp_path, "m.jsonl")  # no judge, no start
        with serving(tmp_path, name="k.jsonl") as (_, judge):
            assert evaluate.main([*remote(items, model), *judged_by(judge)]) == 3
            metrics = metrics_of(items)
            assert (metrics["with_judge"]["judge_errors"], metrics["headline"]) == (1, None)
            assert results_of(items)[0]["judged"] == "judge_error"
        with serving(tmp_path, name="l.jsonl", faults=False) as (_, judge):
            assert evaluate.main([*remote(items, model), *judged_by(judge)]) == 0
            assert len(calls_of(tmp_path, "l.jsonl")) == 2  # the preflight, and the one that had failed
    assert metrics_of(items)["headline"] is not None


def test_results_are_compared_and_tabulated(items, tmp_path, server, capsys):
    change(items, benchmark=lambda n, item: "vstar")
    assert evaluate.main(remote(items, server, output="a.jsonl")) == 0
    assert evaluate.main(remote(items, server, "--method", "tool", output="b.jsonl")) == 0
    a, b = str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")
    assert evaluate.main(["--compare", a, b, "--output", str(tmp_path / "c.json")]) == 0
    result = load_object(tmp_path / "c.json")
    assert (result["n"], result["difference"], result["test"]) == (9, 0.0, "sign_flip")
    assert result["other_prompts"] == 9
    assert evaluate.main(["--table", f"CapImagine={a}", b, "--output", str(tmp_path / "t.md")]) == 0
    table = (tmp_path / "t.md").read_text()
    assert "| CapImagine | 33.3 (85.9) | not run (74.1) |" in table and "| m (tool) | 33.3 | - |" in table


def test_shuffled_options_are_asked_in_their_order_and_written_with_their_published_letters(items, server):
    """The server of this file always answers A."""
    tool = ["--method", "tool", "--shuffle_options", "--seed", "3"]
    assert evaluate.main(remote(items, server, *tool)) == 0
    metrics, results = metrics_of(items), results_of(items)
    orders = [result["shown"]["order"] for result in results]
    assert len(set(orders)) > 2 and metrics["protocol"]["line"].endswith(" shuffled=3")
    texts = dict(rows(items)[0]["options"])
    for result, item in zip(results, rows(items)):
        order = result["shown"]["order"]
        shown = "".join(f"\\n{name}. {texts[letter]}" for name, letter in zip("ABC", order))
        assert shown in result["prompt"] and result["gold"] == item["answer"]["value"]
        assert (result["extraction"]["value"], result["shown"]["value"]) == (order[0], "A")
        assert (result["verdict"] == "correct") == (order[0] == result["gold"])
    assert metrics["constant"]["accuracy"] == max(
        Counter(result["shown"]["gold"] for result in results).values()) / 9
    assert evaluate.main(remote(items, server, *tool[:2], output="plain.jsonl")) == 0
    pair = [str(items.parent / name) for name in ("plain.jsonl", "out.jsonl")]
    assert evaluate.main(["--compare", *pair, "--output", str(items.parent / "c.json")]) == 0
    assert load_object(items.parent / "c.json")["other_prompts"] == 9 - orders.count("ABC")


def test_several_replies_are_drawn_scored_and_resumed_to_the_same(tiny_checkpoint, items):
    more = ["--samples", "3", "--temperature", "2.5"]
    metrics, results = answer(items, tiny_checkpoint, *more)
    assert [r["id"] for r in results] == [f"t/{n}#{k}" for n in range(9) for k in range(3)]
    assert len({(r["item"], r["raw_output"]) for r in results}) > 20  # seldom twice the same
    scores = metrics["samples"]
    assert (metrics["n"], scores["items"], sorted(scores["pass"])) == (27, 9, list("123"))
    assert metrics["accuracy"] == scores["mean"]["accuracy"]
    assert metrics["protocol"]["line"].endswith(" temperature=2.5 samples=3 seed=0")
    before, journal = (items.parent / "out.jsonl").read_bytes(), next(
        (items.parent / "out.jsonl.run").glob("calls-*"))
    write_rows(journal, rows(journal)[::2])
    answer(items, tiny_checkpoint, *more)
    assert (items.parent / "out.jsonl").read_bytes() == before
    kept = {r["id"]: r["raw_output"] for r in answer(items, tiny_checkpoint, "--samples", "4", *more[2:])[1]}
    assert all(kept[r["id"]] == r["raw_output"] for r in results) and len(kept) == 36
    other = answer(items, tiny_checkpoint, *more, "--seed", "1")[1]
    assert sum(a["raw_output"] == b["raw_output"] for a, b in zip(results, other)) < 9
    with pytest.raises(DataError, match="temperature"):
        evaluate.main(flags(items, tiny_checkpoint, *more[:2], "--temperature", "1"))


def test_a_server_is_asked_for_each_reply_with_its_own_seed(items, tmp_path):
    with serving(tmp_path, name="m.jsonl") as (_, model):
        for _ in range(2):  # the second time from the journal
            assert evaluate.main(remote(items, model, "--samples", "2", "--temperature", "0.7")) == 0
    calls = calls_of(tmp_path, "m.jsonl")
    assert len(calls) == len({call["seed"] for call in calls}) == 18
    assert {call["temperature"] for call in calls} == {0.7}
    assert metrics_of(items)["own_scores"].keys() == {"sample 0", "sample 1"}


def test_replies_made_elsewhere_score_as_if_they_were_our_own(items, tmp_path):
    """The replies of a run, given as a file, have its verdicts; an item without one is an error."""
    change(items, question=lambda n, item: "vague?" if n == 4 else "What?",
           options=lambda n, item: item["options"][:2],
           answer=lambda n, item: {"type": "letter", "value": "AB"[n % 2]})
    with serving(tmp_path, name="m.jsonl") as (_, model), serving(tmp_path, name="j.jsonl") as (_, judge):
        assert evaluate.main([*remote(items, model), *judged_by(judge)]) == 0
        asked, own = results_of(items), metrics_of(items)
        write_rows(tmp_path / "r.jsonl", [{"id": r["id"], "text": r["raw_output"],
                                           "finish_reason": r["finish_reason"]} for r in asked[::-1]])
        given = ["--items", str(items), "--responses", str(tmp_path / "r.jsonl"), *judged_by(judge)]
        assert evaluate.main([*given, "--output", str(tmp_path / "given.jsonl")]) == 0
        assert len(calls_of(tmp_path, "m.jsonl")) == 9
    results, metrics = rows(tmp_path / "given.jsonl"), load_object(tmp_path / "given.jsonl.metrics.json")
    same = ("id", "verdict", "judged", "extraction", "compat", "gold", "finish_reason", "raw_output")
    assert [[r[name] for name in same] for r in results] == [[r[name] for name in same] for r in asked]
    for name in ("n", "accuracy", "ci95", "headline", "with_judge", "constant", "finish_reasons"):
        assert metrics[name] == own[name], name
    assert metrics["protocol"]["line"] == ("protocol=elsewhere method=direct prompt=unknown pixels=unknown "
                                           "judge=map:j")
    assert (metrics["mean_tokens"], metrics["efficiency"]["seconds"]) == (None, None)
    pair = [str(tmp_path / "out.jsonl"), str(tmp_path / "given.jsonl")]
    assert evaluate.main(["--compare", *pair, "--output", str(tmp_path / "c.json")]) == 0
    found = load_object(tmp_path / "c.json")
    assert (found["n"], found["difference"], found["judged"]["difference"]) == (9, 0.0, 0.0)
    assert evaluate.main(["--table", pair[1], "--output", str(tmp_path / "t.md")]) == 0
    assert "| - | - | protocol=elsewhere" in (tmp_path / "t.md").read_text()
    write_rows(tmp_path / "r.jsonl", rows(tmp_path / "r.jsonl")[1:])
    assert evaluate.main([*given[:4], "--output", str(tmp_path / "given.jsonl")]) == 3
    metrics = load_object(tmp_path / "given.jsonl.metrics.json")
    assert (metrics["n"], metrics["error"], metrics["headline"]) == (8, 1, None)
    assert metrics["responses"]["no_response"] == 1


@pytest.mark.parametrize("name, source", [
    ("vstar", "vstar.tsv"), ("hrbench_4k", "hrbench.tsv"), ("mme", "mme.tsv"),
    ("tablevqa/vtabfact", "tables.tsv")])
def test_predictions_of_vlmevalkit_belong_to_the_items_of_their_source(tmp_path, name, source):
    """The published rows with their answers as predictions, as VLMEvalKit writes them: all are right."""
    said = {"1": "True", "0": "False"} if name.startswith("tablevqa") else {}
    rows_of = list(table_rows(FILES / source))
    lines = [{column: value for column, value in row.items() if column != "image"}
             | {"prediction": said.get(row["answer"], row["answer"])} for _, row in rows_of]
    with open(tmp_path / "p.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, lines[0], quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerows(lines)
    code, results, metrics = run(tmp_path, name, source, "--responses", str(tmp_path / "p.csv"))
    assert (code, metrics["accuracy"], metrics["responses"]["form"]) == (0, 1.0, "vlmevalkit")
    assert metrics["responses"]["rows"] == len(lines) and len(results) == metrics["n"]


@pytest.mark.parametrize("more, match", [
    (["--responses", "r", "--protocol", "monet"], "nothing is asked"),
    (["--responses", "r", "--method", "tool"], "nothing is asked"),
    (["--responses", "r", "--dry_run"], "nothing is asked"),
    (["--responses", "r", "--shuffle_options"], "nothing is asked"),
    (["--samples", "2"], "expected --temperature above 0"), (["--temperature", "-1"], "from 0 to 10"),
    (["--temperature", "nan"], "from 0 to 10"),
    (["--samples", "2", "--temperature", "1", "--responses", "r"], "no --responses"),
    (["--method", "latent"], "latents need both"),
    (["--latent", "mirage", "--method", "text"], "latents need both"),
    (["--latent", "mirage", "--backend", "openai"], "do not feed latents"),
    (["--method", "tool", "--protocol", "monet"], "deepeyes"),
    (["--judge", "map"], "needs --judge_model"), (["--compare", "a", "b"], "expected one of"),
    (["--batch_tokens", "0"], "expected int from 1 to")])
def test_flags_that_cannot_go_together(more, match, capsys):
    with pytest.raises(SystemExit):
        evaluate.parse_args(["--items", "i", "--model", "m", "--output", "o", *more])
    assert match in capsys.readouterr().err


def test_a_protocol_decides_words_and_resolution_unless_a_flag_does(tiny_checkpoint, items, capsys):
    assert evaluate.main(flags(items, tiny_checkpoint, "--protocol", "monet", "--dry_run")) == 0
    shown = capsys.readouterr()
    assert "Put your final answer in \\boxed{}." in shown.err and json.loads(shown.out)["items"] == 9
    monet = evaluate.find_protocol(evaluate.parse_args(flags(items, "m", "--protocol", "monet")))
    assert monet == evaluate.PROTOCOLS["monet"]
    changed = evaluate.find_protocol(evaluate.parse_args(flags(
        items, "m", "--protocol", "monet", "--min_pixels", "784", "--max_pixels", "50176", "--suffix", "!",
        "--system", "")))
    assert (changed.min_pixels, changed.max_pixels, changed.suffix, changed.system) == (784, 50176, "!", "")
    with pytest.raises(DataError, match="expected --max_pixels"):
        evaluate.main(flags(items, "m", "--backend", "openai"))
