"""Probing, capture and figures on models whose truth is known."""
import csv
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import TEXTS, TINY, TINY_VISION
from decoding import generate
from imagining import NAMES, make_latent_checkpoint, write_items

import probe
from toy.make_model import make_model
from utils.decode import decode, prefill, prefill_blocks
from utils.display import plain_text
from utils.items import ANSWER_TYPES, USER_TURN, chat, open_images, question_text, read_items
from utils.jsonl import DataError, load_object, read_rows, write_rows
from utils.latent_families import PRESETS
from utils.option_scores import describe_scores, score_options
from utils.probe.figures import draw_heatmaps
from utils.probe.questions import Prober, derange, held_out_means, list_conditions, rotations, score
from utils.probe.report import probe_blocks
from utils.probe.similarity import cosine_matrix
from utils.probe.states import States, find_steps
from utils.qwen import encode, load
from utils.rows import CLOSE
from utils.stats import mcnemar_exact, wilson
from utils.train.weights import add_tokens, save

pytestmark = [pytest.mark.numeric, pytest.mark.usefixtures("plain_figures")]

MIRAGE = PRESETS["mirage"]
PROBE = ("question", "options", "answer")
BOX = " It is \\boxed{"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Sixteen items of eight pictures, and for each the same question as a probe item."""
    folder = tmp_path_factory.mktemp("items")
    path, items = write_items(folder, 16)
    write_rows(folder / "probe.jsonl",
               [{"id": f"probe/{i}", "source": item["id"], **{name: item[name] for name in PROBE}}
                for i, item in enumerate(items)])
    return path


def run(data, model, output, *more):
    assert probe.main(["--items", str(data), "--probe_items", str(data.parent / "probe.jsonl"), "--model",
                       str(model), "--output", str(output), "--max_new_tokens", "40", *more]) == 0
    return load_object(output / "metrics.json")


# ---- whole runs
@pytest.fixture(scope="module")
def latent_run(imagining_model, data, tmp_path_factory):
    """A model whose latents are codes of the colour seen, captured, analysed and asked in every way."""
    folder = tmp_path_factory.mktemp("latent")
    (folder / "model").symlink_to(imagining_model("latent", True))
    return folder, run(data, folder / "model", folder / "out", "--latent", "mirage", "--options", "text",
                       "--stem", BOX, "--variants", "tokens_only", "cut", "--crossed", "4", "2")


def test_latents_that_are_codes_of_the_colour_tell_it_without_the_image(latent_run):
    folder, metrics = latent_run
    found = metrics["probing"]["conditions"]
    assert metrics["emission"]["k"] == metrics["emission"]["n"] == 8  # one instance per picture
    assert found["image"]["accuracy"] > 0.9  # by R0 it was never trained to answer without imagining first
    for readout in (lambda name: found[name]["accuracy"], lambda name: found[name]["r0"]["accuracy"]):
        assert readout("image_own") > 0.9 and readout("own") > 0.9
        assert max(readout("other"), readout("mean"), readout("random")) < readout("own") - 0.3
    difference = metrics["probing"]["own_minus_other"]
    assert difference["ci"][0] > 0 and difference["r0_nats"]["delta"] > 0.5
    rows = read_rows(folder / "out" / "answers.jsonl", {"condition": str})
    assert len(rows) == 16 * len(list_conditions(MIRAGE, ["tokens_only", "cut"])) == 160
    assert all(row["rule"] != "not_asked" and row["r0"] for row in rows)


def test_similarity_and_its_corrections_say_what_the_codes_are(latent_run):
    folder, metrics = latent_run
    found = metrics["similarity"]
    assert found["imagination"]["adjacent_raw"] > 0.9  # all steps of an item are the same code
    assert len(NAMES) == 4 and found["imagination"]["inter_raw"] < 0.5
    assert {"imagination", "text", "image", "start", "dummy_pad"} <= set(found)
    for split in (metrics["crossed"]["steps"][0], metrics["crossed"]["all_steps"]):
        assert split["image"] > 0.9
        assert split["image"] + split["question"] + split["interaction"] == pytest.approx(1)
    rows = read_rows(folder / "out" / "probes.jsonl", {"kind": str, "measure": str})
    assert {row["layer"] for row in rows if row["kind"] == "inner"} == {0, 1}
    first = [row for row in rows if (row["kind"], row["measure"]) == ("imagination", "spectrum")][0]
    assert 2.5 < first["participation_ratio"] < 3.2  # four codes: three directions around their mean


def test_slots_of_the_kind_ids_are_captured_and_can_be_asked_by_their_positions_alone(imagining_model, data,
                                                                                      tmp_path):
    """What the slots' positions hold tells the colour; their own embeddings cannot begin a reply."""
    flags = [data, imagining_model("ids", True), tmp_path / "out", "--latent", "lavit", "--options", "text",
             "--stem", BOX]
    found = run(*flags, "--variants", "cut")["probing"]["conditions"]
    shares = {name: found[name]["r0"]["accuracy"] for name in ("cut", "cut_other", "cut_none")}
    assert shares["cut"] > 0.9 and max(shares["cut_other"], shares["cut_none"]) < 0.5
    store = States(tmp_path / "out" / "states")
    record = store.records[read_items(data)[0]["id"]]
    assert record["segments"] == [4] and "dummy_pad" not in record["tensors"]
    embedding = load(str(flags[1]), "float32", "cpu").model.get_input_embeddings().weight.detach().numpy()
    fed = store.load(record["key"], "fed")
    assert all((fed == other).all() for key in store.records for other in [store.load(key, "fed")]
               if other is not None) and all((embedding == row).all(1).any() for row in fed)
    with pytest.raises(DataError, match="lavit feeds nothing back"):
        run(*flags)


def test_the_lens_reads_the_colour_and_not_another_item_s(latent_run, data, capsys):
    folder, metrics = latent_run
    items = {item["id"]: dict(item["options"])[item["answer"]["value"]] for item in read_items(data)}
    with open(folder / "out" / "lens.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8 * MIRAGE.size and all(
        row["word"].strip("'{") == items[row["id"]] for row in rows)
    stays = metrics["lens"]["stays"]
    assert stays["word"]["share"] < 0.5 and "nearest patch stays in" in plain_text(probe_blocks(metrics))
    with pytest.raises(SystemExit):
        run(data, folder / "model", folder / "out", "--stage", "lens")
    assert "--stage lens looks at latents" in capsys.readouterr().err


def test_every_figure_has_its_numbers(latent_run):
    folder, _ = latent_run
    for name in ("heatmap", "curves", "spectra", "layers", "probing", "lens"):
        assert (folder / "out" / f"{name}.png").stat().st_size > 10_000
        with open(folder / "out" / f"{name}.csv", newline="") as file:
            assert len(list(csv.DictReader(file))) > 3, name


def test_the_store_is_analysed_again_without_a_model_and_gives_the_same(latent_run, data, tmp_path, capsys,
                                                                        monkeypatch):
    folder, metrics = latent_run
    before = (folder / "out" / "probes.jsonl").read_bytes()
    again = run(data, folder / "model", folder / "out", "--latent", "mirage", "--stage", "analyse",
                "--options", "text")
    assert (folder / "out" / "probes.jsonl").read_bytes() == before and again["probing"] == metrics["probing"]
    flags = [data, folder / "model", folder / "out", "--latent", "mirage", "--stage"]
    with pytest.raises(DataError, match="other settings"):
        run(*flags, "capture", "--suffix", "Think.")
    with pytest.raises(DataError, match="no states of 6 of"):
        run(*flags, "analyse", "--crossed", "3", "4")
    flags[2] = shutil.copytree(folder / "out", tmp_path / "out")
    with pytest.raises(SystemExit):
        run(*flags, "analyse", "--fresh")
    run(*flags, "capture", "--suffix", "Think.", "--fresh")
    assert States(tmp_path / "out" / "states").settings["suffix"] == "Think."
    assert States(tmp_path / "out" / "states.old-1").settings["suffix"] == ""
    monkeypatch.setattr(probe, "model_identity", lambda folder: "of other weights")
    with pytest.raises(DataError, match="(?s)other settings.*weights"):
        run(*flags, "capture", "--suffix", "Think.")


def test_captured_states_are_those_of_a_run(latent_run, data):
    """To 1e-4, a hundred roundings of states of about 1. What pads make of themselves: pads written into the
    prompt."""
    folder, _ = latent_run
    store, item = States(folder / "out" / "states"), read_items(data)[0]
    qwen = load(str(folder / "model"), "float32", "cpu")
    inputs = encode(qwen, [chat(qwen.tokenizer, question_text(item), 1)], [open_images(item, data.parent)])
    row = generate(qwen, inputs, 40, MIRAGE, capture=True)[0]
    steps, after, _ = find_steps(qwen, MIRAGE, row)
    for kind, wanted in (("latent", row.states[steps]), ("text", row.states[after[:4]]),
                         ("start", row.states[[steps[0] - 1]]), ("fed", row.fed)):
        assert np.allclose(store.load(item["id"], kind), wanted.numpy(), atol=1e-4), kind
    inner, pads = store.load(item["id"], "inner"), store.load(item["id"], "dummy_pad")
    assert np.allclose(inner[:, 0], row.fed.numpy(), atol=1e-4)  # what the first layer reads is what is fed
    prompt = chat(qwen.tokenizer, question_text(item), 1) + MIRAGE.start + MIRAGE.pad * (MIRAGE.size - 1)
    with torch.no_grad():
        inputs = encode(qwen, [prompt], [open_images(item, data.parent)])
        written = qwen.model.model(**inputs).last_hidden_state[0, -MIRAGE.size:]
    assert len(steps) == MIRAGE.size and np.allclose(pads, written.numpy(), atol=1e-4)
    assert not np.allclose(pads[1:], row.states[steps[1:]].numpy(), atol=1e-3)


@pytest.fixture(scope="module")
def text_model(imagining_model):
    return imagining_model("text", True)


def test_a_text_imagination_tells_the_colour_without_the_image(text_model, data, tmp_path):
    metrics = run(data, text_model, tmp_path / "out", "--circular", "--variants", "tokens_only", "cut")
    assert metrics["probing"]["n"] == 64 and set(metrics["probing"]["gold_letters"].values()) == {16}
    assert metrics["similarity"]["imagination"]["inter_raw"] is not None
    found = metrics["probing"]["conditions"]
    accuracy = {name: entry["accuracy"] for name, entry in found.items()}
    assert accuracy["image"] > 0.9 and accuracy["own"] > 0.9 and accuracy["other"] < 0.1
    assert "mean" not in accuracy
    assert [found[name]["asked"] for name in ("cut", "cut_other", "cut_none")] == [64] * 3


@pytest.mark.parametrize("kind", ["text", "latent"])
def test_what_is_cut_has_its_imagination_and_nothing_of_the_image(kind, imagining_model, latent_run, data):
    """With the imagination hidden too, the scores are those of a prompt that ends before the image, with the
    question at the same distance."""
    spec, qwen = {"latent": MIRAGE}.get(kind), load(str(imagining_model(kind, True)), "float32", "cpu")
    items = {item["id"]: item | {"root": str(data.parent)} for item in read_items(data)}
    args = probe.parse_args(["--model", "m", "--items", "i", "--output", "o", "--max_new_tokens", "40"])
    prober = Prober(qwen, spec, items, States(latent_run[0] / "out" / "states"), args)
    question, found = items["item/1"], {}
    turn = chat(qwen.tokenizer, question_text(question), 0)
    block = [i for text in (spec.end if spec else CLOSE, "<|im_end|>\n" + turn[turn.rindex(USER_TURN):])
             for i in qwen.tokenizer(text, add_special_tokens=False).input_ids]
    for source in ("item/0", "item/3"):
        for name in ("cut", "cut_none"):
            asked = prober.cut([question], [source], name)
            assert asked.places == [0]
            found[name] = score_options(qwen, asked.state, [question], [BOX], asked.forced_ids, "text")[0]
        inputs = encode(qwen, [chat(qwen.tokenizer, "", 1)], [open_images(items[source], data.parent)])
        first = int(prefill(qwen, inputs).is_image[0].nonzero()[0])
        alone = prefill(qwen, {name: inputs[name][..., :first]
                               for name in ("input_ids", "attention_mask", "position_ids")})
        alone.positions = asked.state.positions - len(block)
        alone = prefill_blocks(qwen, alone, [block])[1]
        assert torch.equal(alone.positions, asked.state.positions)
        wanted = score_options(qwen, alone, [question], [BOX], [[]], "text")[0]
        assert found["cut_none"] == pytest.approx(wanted, abs=1e-3)
        assert max(abs(found["cut"][letter] - wanted[letter]) for letter in wanted) > 1e-2


def test_a_reader_is_given_the_words_that_another_model_imagined(text_model, tiny_checkpoint, data, tmp_path):
    """Scores of a random reader against the same prompts put together by hand."""
    metrics = run(data, text_model, tmp_path / "out", "--reader", str(tiny_checkpoint))
    assert metrics["reader"] == str(tiny_checkpoint) and metrics["emission"]["k"] == 8
    rows = {(row["id"], row["condition"]): row
            for row in read_rows(tmp_path / "out" / "answers.jsonl", {"condition": str})}
    assert {name for _, name in rows} == {"image", "image_own", "text_only", "own", "other"}
    store, reader = States(tmp_path / "out" / "states"), load(str(tiny_checkpoint), "float32", "cpu")
    for i, item in enumerate(read_items(data)[:3]):
        said = store.records[rows[f"probe/{i}", "other"]["donor"]]["imagination"]
        assert said.startswith("a ")
        prompt = chat(reader.tokenizer, question_text(item), 0) + f"<think_image>{said}</think_image>"
        scores = score_options(reader, prefill(reader, encode(reader, [prompt], [[]])), [item],
                               [metrics["stem"]], [[]], "letter")
        assert rows[f"probe/{i}", "other"]["r0"]["nll"] == pytest.approx(
            describe_scores(scores[0], item["answer"]["value"])["nll"], abs=1e-3)
    with pytest.raises(SystemExit):
        run(data, text_model, tmp_path / "out", "--reader", str(tiny_checkpoint), "--variants", "cut")


def test_a_reader_of_latents_has_their_tokens_and_their_size(latent_run, tiny_checkpoint, data, tmp_path,
                                                             monkeypatch):
    folder, _ = latent_run
    asked = ["--latent", "mirage", "--stage", "ask", "--store", str(folder / "out" / "states"), "--options",
             "text"]
    with pytest.raises(DataError, match="cannot be given latents of mirage: .*expected one added token"):
        run(data, folder / "model", tmp_path / "none", *asked, "--reader", str(tiny_checkpoint))
    make_model(TEXTS, tmp_path / "wide", n_tokens=320, seed=0, sizes=TINY | {"hidden_size": 64},
               vision_sizes=TINY_VISION)
    for source, name in ((tiny_checkpoint, "same"), (tmp_path / "wide", "wider")):
        qwen = load(str(source), "float32", "cpu")
        add_tokens(qwen, MIRAGE.tokens)
        save(qwen, str(tmp_path / name))
    with pytest.raises(DataError, match="states of 64 numbers, but the latents of .* have 32"):
        run(data, folder / "model", tmp_path / "wide_out", *asked, "--reader", str(tmp_path / "wider"))
    forced = set()
    monkeypatch.setattr("utils.probe.questions.decode", lambda qwen, state, n, spec: (
        forced.add(spec.force_start), decode(qwen, state, n, spec))[1])
    metrics = run(data, folder / "model", tmp_path / "same_out", *asked, "--reader", str(tmp_path / "same"),
                  "--force_start")  # of what is captured; the questions come after the latents that are given
    found = metrics["probing"]
    assert metrics["force_start"] and forced == {False}
    assert found["conditions"]["own"]["asked"] == found["n"] == 16 and "random" in found["conditions"]


def test_edits_of_the_inputs_move_latents_that_are_codes_of_the_colour(latent_run, data, tmp_path, capsys):
    """Another image brings another code; another question, a darker image and nothing at all hardly do."""
    folder, _ = latent_run
    items = read_items(data)
    for n, item in enumerate(items):
        item["region"], item["question"] = [0, 0, 20, 56], f"{item['question']}{' Now?' * (n % 2)}"
    write_rows(data.parent / "regions.jsonl", items)
    flags = ["--items", str(data.parent / "regions.jsonl"), "--model", str(folder / "model"), "--output",
             str(tmp_path / "out"), "--latent", "mirage", "--max_new_tokens", "40", "--edits", "all"]
    assert probe.main(flags) == 0
    found, err = load_object(tmp_path / "out" / "metrics.json")["edits"], capsys.readouterr().err
    assert set(found) == {*probe.EDITS, "selectivity"}
    assert all(found[name]["asked"] == 8 for name in probe.EDITS)
    assert all(f"| {name} | {found[name]['emitted_too']} of {found[name]['emitted']} | " in err
               for name in probe.EDITS) and "What the relevant mask moves" in err
    # batch by batch the same
    assert found["identity"]["change"] == 0.0 and found["identity"]["sensitivity"] is None
    assert found["image_swap"]["change"] > 4 * found["question_swap"]["change"] > 0
    assert found["image_swap"]["change"] > 4  # between two codes of 32 numbers of rms 1: 8
    before = (tmp_path / "out" / "probes.jsonl").read_bytes()
    assert probe.main([*flags, "--stage", "analyse"]) == 0
    assert (tmp_path / "out" / "probes.jsonl").read_bytes() == before


def write_five(folder):
    """Write 40 items of 20 pictures for each of the paper's five benchmarks; return the paths."""
    files = []
    for name, metric, value in (("vstar", "mcq", None), ("mme", "yesno_pair", "yes"),
                                ("mme_realworld_lite", "mcq", None), ("ocrbench_v2", "unscored", ["red"]),
                                ("vwtq", "wtq", ["red"])):
        (folder / name).mkdir()
        path, items = write_items(folder / name, 40)
        for item in items:
            item |= {"benchmark": name, "metric": metric, "id": f"{name}/{item['id']}",
                     "group_id": f"{name}/{item['group_id']}", "counterfactual": None}
            if metric != "mcq":
                item |= {"options": [], "answer": {"type": ANSWER_TYPES[metric], "value": value}}
        write_rows(path, items)
        files.append(str(path))
    return files


@pytest.mark.slow
def test_five_benchmarks_are_compared_by_one_command(tmp_path, monkeypatch):
    """The paper's protocol: 100 instances, 20 of each, the benchmark as the task, and every figure; the
    model imagines whatever it is asked."""
    monkeypatch.undo()  # figures are drawn
    files = write_five(tmp_path)
    model = make_latent_checkpoint(tmp_path / "model")
    write_rows(tmp_path / "probe.jsonl", [
        {"id": f"p/{i}", "source": item["id"], **{name: item[name] for name in PROBE}}
        for i, item in enumerate(read_rows(files[0], {"id": str})[:12])])
    assert probe.main(["--items", *files, "--model", str(model), "--output", str(tmp_path / "out"),
                       "--latent", "mirage", "--max_new_tokens", "24", "--n_items", "100", "--crossed", "4",
                       "3", "--batch_size", "16", "--probe_items", str(tmp_path / "probe.jsonl"), "--edits",
                       "image_swap", "question_swap"]) == 0
    metrics = load_object(tmp_path / "out" / "metrics.json")
    assert metrics["emission"]["n"] == 100 and metrics["emission"]["k"] >= 90 and metrics["items"] == files
    for name in ("heatmap", "curves", "spectra", "layers", "probing"):
        assert (tmp_path / "out" / f"{name}.png").stat().st_size > 10_000
    rows = read_rows(tmp_path / "out" / "probes.jsonl", {"kind": str})
    assert {"inter", "adjacent", "first", "spread"} <= {row["measure"] for row in rows}


def test_a_dry_run_shows_a_prompt_and_counts_decodings(tiny_checkpoint, data, tmp_path, capsys):
    flags = ["--items", str(data), "--probe_items", str(data.parent / "probe.jsonl"), "--model",
             str(tiny_checkpoint), "--output", str(tmp_path / "out"), "--image_root", str(data.parent),
             "--system", "Be brief.", "--suffix", "Think.", "--dtype", "float32", "--circular", "--dry_run"]
    assert probe.main(flags) == 0
    out, err = capsys.readouterr()
    assert "Be brief." in err and "Think." in err and not (tmp_path / "out").exists()
    # 8 instances and 8 other sources; 16 questions in 4 rotations and 5 ways
    assert json.loads(out) == {"instances": 8, "probe_items": 16, "decodings_at_most": 16 + 16 * 4 * 5}


def test_items_in_two_files_and_probe_items_without_their_source_are_named(data, tmp_path):
    write_rows(tmp_path / "probe.jsonl", [
        {"id": "p", "source": "nobody", "question": "?", "options": [["A", "a"], ["B", "b"]],
         "answer": {"type": "letter", "value": "A"}}])
    for more, match in (([str(data)], "duplicate id"),
                        (["--probe_items", str(tmp_path / "probe.jsonl")], "source 'nobody' is not in")):
        with pytest.raises(DataError, match=match):
            probe.main(["--model", "m", "--output", str(tmp_path / "o"), "--items", str(data),
                        *more])


def test_instances_are_taken_evenly_from_files():
    items = [{"id": f"{name}/{n}", "file": name, "group_id": f"{name}/{n // 2}"}
             for name, size in (("a", 40), ("b", 10), ("c", 80)) for n in range(size)]
    chosen = probe.choose(items, 22)
    assert [sum(i["file"] == name for i in chosen) for name in "abc"] == [8, 5, 7]  # b has only five pictures
    assert len({i["group_id"] for i in chosen}) == len(chosen)
    assert [i["id"] for i in probe.choose(items[:40], 4)] == ["a/0", "a/10", "a/20", "a/30"]


# ---- parts
def test_rotated_options_keep_their_gold():
    options = [["A", "red"], ["B", "blue"], ["C", "gray"]]
    turned = rotations({"id": "p", "options": options, "answer": {"value": "B"}})
    assert [row["answer"]["value"] for row in turned] == ["B", "A", "C"] and turned[0]["options"] == options
    assert all(dict(row["options"])[row["answer"]["value"]] == "blue" for row in turned)
    assert len({row["id"] for row in turned}) == 3


def test_donors_are_of_other_images():
    probes = [{"id": str(i), "source": f"s{i % 5}"} for i in range(20)]
    donors = derange(probes, {f"s{i}": f"g{i // 2}" for i in range(5)}, 0)
    assert all(int(donors[p["id"]][1]) // 2 != int(p["source"][1]) // 2 for p in probes)
    with pytest.raises(DataError, match="15 of 20"):
        derange([{"id": str(i), "source": "s0" if i < 15 else "s4"} for i in range(20)],
                {"s0": "a", "s4": "b"}, 0)


def test_scores_count_what_could_not_be_asked_as_wrong_and_compare_in_pairs():
    probes = [{"id": str(i), "options": [["A", "x"], ["B", "y"]], "answer": {"value": "A"}} for i in range(8)]

    def row(i, name, right):
        r0 = {"pred": "A" if right else "B", "nll": 0.5 if right else 2.0} if i else None
        return {"id": str(i), "condition": name, "gold": "A", "pred": "A" if right else None,
                "correct": right, "r0": r0}
    rows = [row(i, "own", i < 6) for i in range(8)] + [row(i, "other", i in (0, 7)) for i in range(8)]
    found = score(rows, probes, {str(i): i for i in range(8)})
    own = found["conditions"]["own"]
    assert found["chance"] == 0.5 and own["accuracy"] == 0.75
    assert own["r0"]["accuracy"] == pytest.approx(5 / 7) and own["asked"] == 7
    difference = found["own_minus_other"]
    assert (difference["delta"], difference["b"], difference["c"]) == (0.5, 1, 5)
    assert difference["r0_nats"]["delta"] == pytest.approx((5 - 1) * 1.5 / 7)


def test_intervals_and_p_let_the_questions_about_one_image_vary_together():
    """40 images with 10 questions each, right or wrong as a whole: 40 facts, not 400."""
    rng, n_images, rows = np.random.default_rng(0), 40, []
    ids = [f"{image}/{k}" for image in range(n_images) for k in range(10)]
    probes = [{"id": id_, "options": [["A", "x"], ["B", "y"]], "answer": {"value": "A"}} for id_ in ids]
    rights = {"own": (rng.random(n_images) < 0.6).tolist(), "other": (rng.random(n_images) < 0.4).tolist()}
    for name, right in rights.items():
        for id_ in ids:
            letter = "A" if right[int(id_.split("/")[0])] else "B"
            rows.append({"id": id_, "condition": name, "gold": "A", "pred": letter, "correct": letter == "A",
                         "r0": {"pred": letter, "nll": 1.0}})
    found = score(rows, probes, {id_: id_.split("/")[0] for id_ in ids})
    assert (found["n"], found["images"]) == (400, n_images)
    for name, right in rights.items():
        low, high = wilson(sum(right), n_images)
        entry = found["conditions"][name]
        for ci in (entry["ci"], entry["r0"]["ci"]):
            assert ci[0] < low + 1e-9 and high - 1e-9 < ci[1]
    pairs, difference = list(zip(*rights.values())), found["own_minus_other"]
    b, c = pairs.count((False, True)), pairs.count((True, False))
    assert (difference["b"], difference["c"]) == (10 * b, 10 * c)
    assert difference["p"] == pytest.approx(mcnemar_exact(b, c), abs=0.02)


def test_the_mean_given_to_a_question_is_of_other_images():
    """Latents that are codes of their image: a mean without the own image has nothing of its code."""
    groups = [f"g{n // 2}" for n in range(12)]
    codes = [np.eye(6)[[n // 2] * (3 - n % 2)] for n in range(12)]
    means = held_out_means(codes, groups, 0)
    assert all(means[group].shape == (3, 6) for group in groups)
    assert all((means[group][:, int(group[1])] == 0).all() for group in groups)
    assert all(mean.sum(1) == pytest.approx(1) and (mean[0] > 0).sum() == 3 for mean in means.values())
    assert {mean.tobytes() for mean in held_out_means(codes, groups, 1).values()} != {
        mean.tobytes() for mean in means.values()}


def test_heat_maps_order_instances_by_task(tmp_path):
    states = np.random.default_rng(0).normal(size=(6, 9))
    matrix, tasks = cosine_matrix(states), np.array(["b", "a", "b", "a", "b", "a"])
    draw_heatmaps({("text", form, 0): (np.arange(6), matrix) for form in ("raw", "centred")}, tasks,
                  tmp_path / "map.png")
    rows = list(csv.DictReader(open(tmp_path / "map.csv")))
    wanted = [matrix[int(row["instance"]), int(row["other"])] for row in rows]
    assert len(rows) == 2 * 15 and [float(row["cosine"]) for row in rows] == pytest.approx(wanted, abs=1e-4)
