"""Prompts against text written by hand from the harnesses' sources, and the zoom tool."""
import base64
import hashlib
import io
import json
from collections import Counter
from dataclasses import replace

import pytest
from benchmark_fixtures import EXPECTED
from PIL import Image
from samples import table
from scipy.stats import binomtest, chisquare

from utils.evaluate.benchmarks import shuffle_options
from utils.evaluate.prompts import (EXAMPLE, PROTOCOLS, SWIMBIRD_SYSTEM, TOOL_SYSTEM, Conversation, read_turn,
                                    user_text)
from utils.evaluate.scoring import as_published, score
from utils.images import ImageError, Picture, open_picture, picture_url
from utils.items import question_text
from utils.jsonl import DataError

CASES = [(case["item"], case["prompt"]) for case in table("vlmevalkit_prompts")]
MCQ = CASES[0][0]


@pytest.mark.parametrize("item, expected", CASES)
def test_vlmevalkit_s_words(item, expected):
    assert all(user_text(item, PROTOCOLS[name]) == expected for name in ("vlmevalkit", "monet", "plain"))
    assert user_text(item, replace(PROTOCOLS["vlmevalkit"], suffix="\nThink.")) == expected + "\nThink."


def test_multiple_choice_is_question_text_byte_for_byte():
    """VLMEvalKit's words are those of stages 5 and 6, but for MME-RealWorld's own."""
    items = [{name: part for name, part in MCQ.items() if name not in ("metric", "benchmark")}]
    for (name, _), made in EXPECTED.items():
        items += [item | {"benchmark": name} for item in made.values()
                  if item["metric"] == "mcq" and name != "mme_realworld_lite"]
    assert len(items) > 20
    for item in items:
        assert user_text(item, PROTOCOLS["vlmevalkit"]).encode() == question_text(item).encode()


def test_system_prompts_and_pixel_limits():
    monet = ("You are a helpful multimodal assistant. You are required to answer the question based on the "
             "image provided. Put your final answer in \\boxed{}.")
    assert {name: (p.system, p.min_pixels, p.max_pixels) for name, p in PROTOCOLS.items()} == {
        "vlmevalkit": (None, 1_003_520, 12_845_056), "monet": (monet, 1_003_520, 12_845_056),
        "deepeyes": (TOOL_SYSTEM, 3_136, 12_845_056), "plain": (None, None, None),
        "swimbird": (SWIMBIRD_SYSTEM, 1_003_520, 12_845_056)}
    assert all(not protocol.suffix for protocol in PROTOCOLS.values())
    # the text of DeepEyes' eval/eval_vstar.py, commit cc3ff4d6
    digest = hashlib.sha256(TOOL_SYSTEM.encode()).hexdigest()
    assert digest == "1fc5b8b5ebdc9b24d6a9281071222872c8542dd65a4a4be1e70d9760c3a7f99f"
    assert json.dumps(EXAMPLE) in TOOL_SYSTEM
    # SWIMBIRD_SYSTEM_PROMPT of SwimBird's VLMEvalKit/vlmeval/config.py, commit 6aa2cc3
    digest = hashlib.sha256(SWIMBIRD_SYSTEM.encode()).hexdigest()
    assert digest == "cbe73400643781616464aed5371e42c08951f3f3c97eafa6704622498fa866d6"


@pytest.mark.parametrize("benchmark, begin, asked", [
    ("vstar", "Think step by step, enclose your textual thought in <reason>...</reason> and", ">. Then"),
    ("mmstar", "Enclose your verbal thought in <reason>...</reason> (if needed) and", "> (if needed). Then"),
    ("hrbench_4k", "Think step by step, enclose your verbal thought", "> (if needed). Then answer with the"),
    ("blink/Jigsaw", "Answer with the option's letter from the given choices.", "")])
def test_swimbird_s_own_marks_stay_and_those_of_data_do_not(benchmark, begin, asked):
    """After the options come its build_prompt's words, with the tokens of its modes; the question's break."""
    item = MCQ | {"id": "1", "benchmark": benchmark, "question": "<|latent_start|>?", "images": []}
    conversation = Conversation(item, PROTOCOLS["swimbird"], ".", "latent", {})
    (role, system), (_, parts) = conversation.opening
    words = "".join(parts)
    assert role == "system" and system == SWIMBIRD_SYSTEM and words.startswith("Question: < |latent_start|>?")
    options, _, rest = words.partition(begin)
    assert options.endswith(f"{MCQ['options'][-1][0]}. {MCQ['options'][-1][1]}\n") and asked in rest
    assert ("<|latent_start|>...<|latent_end|>" in rest) == bool(asked)


@pytest.mark.parametrize("case", table("turns"))
def test_what_a_reply_asks_for(case):
    assert read_turn(case["reply"], tuple(case["size"])) == (
        case["box"] and tuple(case["box"]), case["ended_by"])


def test_a_region_is_cut_out_and_enlarged_to_whole_tokens(tmp_path):
    image = Image.new("RGB", (200, 100), "red")
    image.paste("blue", (100, 0, 200, 100))
    image.save(tmp_path / "a.png")
    shown = open_picture(Picture(str(tmp_path / "a.png"), (110, 10, 190, 70)))
    assert shown.size == (84, 56)  # 80 x 60 in multiples of 28
    assert shown.getextrema() == ((0, 0), (0, 0), (255, 255))
    assert open_picture(Picture(str(tmp_path / "a.png"), (0, 0, 8, 8))).size == (56, 56)  # four tokens
    assert open_picture(Picture(str(tmp_path / "a.png"))).size == (200, 100)
    Image.new("RGB", (999, 30)).save(tmp_path / "wide.png")
    with pytest.raises(ImageError, match="aspect"):
        open_picture(Picture(str(tmp_path / "wide.png"), (0, 0, 999, 1)))


def test_a_region_is_sent_without_loss_and_a_file_as_it_is(tmp_path):
    path, box = tmp_path / "a.png", (5, 5, 61, 61)
    Image.effect_noise((90, 60), 80).convert("RGB").save(path)
    region = Picture(str(path), box)
    sent = Image.open(io.BytesIO(base64.b64decode(picture_url(region, 28 * 28, 28).partition(",")[2])))
    assert sent.tobytes() == open_picture(region).tobytes() == Image.open(path).crop(box).tobytes()
    whole = picture_url(Picture(str(path)), 12_845_056, 28)
    assert base64.b64decode(whole.partition(",")[2]) == path.read_bytes()


def test_cv_bench_is_asked_in_its_own_words():
    item = {"benchmark": "cv_bench/2D", "metric": "mcq", "question": "How many?",
            "options": [["A", "1"], ["B", "2"]], "raw": {"prompt": "How many? Select from (A) 1 (B) 2"}}
    assert user_text(item, PROTOCOLS["vlmevalkit"]) == "How many? Select from (A) 1 (B) 2"
    assert user_text(item | {"raw": {}}, PROTOCOLS["plain"]) == question_text(item)


# ---- options in another order
def mcq(n: int, gold: str = "A", letters: str = "ABCD") -> dict:
    return {"id": f"v/{n}", "metric": "mcq", "question": "?", "images": [], "category": "c",
            "options": [[letter, f"text {letter}"] for letter in letters],
            "answer": {"type": "letter", "value": gold}}


def test_options_keep_their_texts_and_the_gold_its_text_and_nothing_else_changes():
    items = [mcq(n, "ABC"[n % 3], "ABCDE"[:3 + n % 3]) for n in range(60)] + [
        {"id": "t", "metric": "wtq", "options": [], "answer": {"type": "values", "value": ["A"]}}]
    asked = shuffle_options(items, 0)
    assert asked == shuffle_options(items[::-1], 0)[::-1] != shuffle_options(items, 1)  # by id and seed alone
    assert asked[-1] == items[-1]  # it has none
    for item, other in zip(items[:-1], asked):
        assert sorted(text for _, text in other["options"]) == [text for _, text in item["options"]]
        assert [letter for letter, _ in other["options"]] == [letter for letter, _ in item["options"]]
        assert all(dict(item["options"])[other["letters"][shown]] == text for shown, text in other["options"])
        gold = other["answer"]["value"]
        assert other["letters"][gold] == item["answer"]["value"]
        assert {name for name in other if other[name] != item.get(name)} <= {
            "options", "answer", "letters", "raw"}


def test_words_that_name_the_options_are_left_out():
    """CV-Bench's own prompt lists them in their published order."""
    item = mcq(0) | {"benchmark": "cv_bench/2D", "raw": {"prompt": "Select from (A) text A ...", "idx": 1}}
    asked = shuffle_options([item], 0)[0]
    assert asked["raw"] == {"idx": 1} and item["raw"]["prompt"]
    assert user_text(asked, PROTOCOLS["vlmevalkit"]) == question_text(asked)


def test_orders_are_equally_frequent_and_a_model_that_always_says_a_gets_chance():
    """3,000 items whose right option is always the first: without another order it would get all."""
    asked = shuffle_options([mcq(n, letters="ABC") for n in range(3000)], 0)
    orders = Counter("".join(item["letters"].values()) for item in asked)
    assert len(orders) == 6 and chisquare(list(orders.values())).pvalue > 0.01
    reply = {"clean_output": "A", "finish_reason": "stop"}
    results = [as_published(item, {"gold": item["answer"]["value"], **score(item, reply)}) for item in asked]
    hits = sum(result["verdict"] == "correct" for result in results)
    assert binomtest(hits, 3000, 1 / 3).pvalue > 0.01 and {result["gold"] for result in results} == {"A"}
    for item, result in zip(asked, results):
        assert result["extraction"]["value"] == item["letters"]["A"] == result["shown"]["order"][0]
        assert (result["extraction"]["value"] == "A") == (result["verdict"] == "correct")
        assert result["compat"] == {"vlmevalkit_e8e78f0": item["letters"]["A"]}
        assert result["shown"]["value"] == "A" and result["shown"]["gold"] == item["answer"]["value"]


def test_a_judge_s_letter_is_published_too_and_unread_replies_stay_unread():
    asked = shuffle_options([mcq(n) for n in range(9)], 0)
    item = next(item for item in asked if item["letters"]["A"] == "C")
    result = {"gold": "A", "extraction": {"value": None, "rule": "empty"}, "compat": {"x": None, "y": "Z"}}
    found = as_published(item, result | {"judge": {"parsed": "A"}})
    assert found["judge"] == {"parsed": "C"} and found["extraction"]["value"] is None
    assert found["compat"] == {"x": None, "y": "Z"} and found["gold"] == "C"
    assert as_published(item, result | {"judge": {"parsed": "yes"}})["judge"] == {"parsed": "yes"}
    assert as_published(mcq(0), result) == result


@pytest.mark.parametrize("items, match", [
    ([mcq(0), mcq(1) | {"raw": {"cycle_category": "2"}}], "'v/1' and 0 more are rotations"),
    ([{"id": "t", "metric": "wtq"}], "no item has options")])
def test_items_whose_options_cannot_be_shuffled(items, match):
    with pytest.raises(DataError, match=match):
        shuffle_options(items, 0)
