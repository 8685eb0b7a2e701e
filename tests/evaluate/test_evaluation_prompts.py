"""Prompts against text written by hand from the harnesses' sources.    pytest tests/test_protocols.py"""
import re
from dataclasses import FrozenInstanceError, replace

import benchmark_fixtures as made
import pytest

from utils.evaluate.benchmarks import TABLE, prepare
from utils.evaluate.prompts import PROTOCOLS, TOOL_SYSTEM, user_text
from utils.items import question_text
from utils.jsonl import DataError

MCQ = {"id": "x/1", "benchmark": "vstar", "metric": "mcq", "question": "What is the material of the glove?",
       "options": [["A", "rubber"], ["B", "cotton"]], "answer": {"type": "letter", "value": "A"}}
REALWORLD = MCQ | {"benchmark": "mme_realworld_lite", "question": "What colour is it?",
                   "options": [["A", "Red"], ["B", "Green"], ["C", "Blue"], ["D", "Grey"],
                               ["E", "The image does not show it"]]}
WTQ = {"id": "x/2", "benchmark": "tablevqa/vwtq", "metric": "wtq", "question": "who won?", "options": []}
TABFACT = {"id": "x/3", "benchmark": "tablevqa/vtabfact", "metric": "tabfact", "question": "the bucks win",
           "options": []}
MME = {"id": "x/4", "benchmark": "mme", "metric": "yesno_pair", "options": [],
       "question": "Is it a dog? Please answer yes or no."}
OCR = {"id": "x/5", "benchmark": "ocrbench_v2", "metric": "unscored", "question": " What is written? ",
       "options": []}
VSP = {"id": "x/6", "benchmark": "vsp", "metric": "vsp_path", "question": "Find <image> a path",
       "options": []}
LIKELIHOOD = MCQ | {"benchmark": "vstar_likelihood", "metric": "likelihood"}
VLM, LMMS = PROTOCOLS["vlmevalkit"], PROTOCOLS["lmms_eval"]

VLMEVALKIT = [
    (MCQ, "Question: What is the material of the glove?\nOptions:\nA. rubber\nB. cotton\n"
          "Please select the correct answer from the options above. \n"),
    (MCQ | {"hint": "Look."},
     "Hint: Look.\nQuestion: What is the material of the glove?\nOptions:\nA. rubber\nB. cotton\n"
                              "Please select the correct answer from the options above. \n"),
    (REALWORLD, "What colour is it? The choices are listed below:\n(A) Red\n(B) Green\n(C) Blue\n(D) Grey\n"
                "(E) The image does not show it\nSelect the best answer to the above multiple-choice question based on the "
                "image. Respond with only the letter (A, B, C, D, or E) of the correct option. \nThe best answer is:"),
    (WTQ, "You are asked to answer questions asked on an image.\n"
          "You should answer the question with a single word.\nExample: \n"
          "Question: what was the only year mr. wu competed in the olympic games?\nAnswer: 2004\n"
          "Question: which township in pope county, arkansas has the least amount of water area?\nAnswer: Freeman\n"
          "If you have multiple answers, please separate them with || marks. Example: Apple||Banana||Tomato\n\n"
          "Question: who won?\nAnswer:"),
    (TABFACT, "You are asked to answer whether the statement is True or False based on given image\n"
              "You should only answer True or False.\nExample: \n"
              "Statement: the milwaukee buck win 6 game in the 2010 - 11 season\nAnswer: True\n"
              "Statement: only the top team score above the average of 8.8\nAnswer: False\n\n"
              "Statement: the bucks win\nAnswer:"),
    (MME, "Is it a dog? Please answer yes or no."), (OCR, " What is written? "), (VSP, "Find <image> a path"),
    (LIKELIHOOD, "What is the material of the glove?")]
WITHOUT_HINTS = [
    (REALWORLD, "What colour is it? The choices are listed below:\n(A) Red\n(B) Green\n(C) Blue\n(D) Grey\n"
                "(E) The image does not show it\nSelect the best answer to the above multiple-choice question based on the "
                "image."),
    (WTQ, "You are asked to answer questions asked on an image.\nExample: \n"
          "Question: what was the only year mr. wu competed in the olympic games?\nAnswer: 2004\n"
          "Question: which township in pope county, arkansas has the least amount of water area?\nAnswer: Freeman\n"
          "If you have multiple answers, please separate them with || marks. Example: Apple||Banana||Tomato\n\n"
          "Question: who won?"),
    (MME, "Is it a dog?"), (MCQ, VLMEVALKIT[0][1])]
LMMS_EVAL = [
    (MCQ, "What is the material of the glove?\nA. rubber\nB. cotton\n"
          "Answer with the option's letter from the given choices directly.\n"
          "Answer with the option's letter from the given choices directly."),
    (MCQ | {"benchmark": "hrbench_4k", "question": " Which one? "},
     "Which one?\nA. rubber\nB. cotton\nAnswer the option letter directly."),
    (REALWORLD, "What colour is it? The choices are listed below:\n(A) Red\n(B) Green\n(C) Blue\n(D) Grey\n"
                "(E) The image does not show it\nSelect the best answer to the above multiple-choice question based on the "
                "image. Respond with only the letter (A, B, C, D, or E) of the correct option.\nThe best answer is: "),
    (MCQ | {"benchmark": "blink/Jigsaw", "raw": {"prompt": "Which?\n(A) rubber\n(B) cotton"}},
     "Note: You only need to respond with A, B without providing any additional information.\n"
     "Which?\n(A) rubber\n(B) cotton"),
    (MME, "Is it a dog?\nAnswer the question using a single word or phrase."), (OCR, "What is written?")]


@pytest.mark.parametrize("item, expected", VLMEVALKIT, ids=lambda part: isinstance(part, dict) and part["id"]
                         or "")
def test_vlmevalkit_s_words(item, expected):
    assert user_text(item, VLM) == expected
    assert user_text(item, PROTOCOLS["monet"]) == user_text(item, PROTOCOLS["monet_paper"]) == expected
    assert user_text(item, replace(VLM, suffix="\nThink.")) == expected + "\nThink."


@pytest.mark.parametrize("item, expected", WITHOUT_HINTS)
def test_vlmevalkit_s_words_without_format_hints(item, expected):
    assert user_text(item, replace(VLM, format_hints=False)) == expected


@pytest.mark.parametrize("item, expected", LMMS_EVAL)
def test_lmms_eval_s_words(item, expected):
    assert user_text(item, LMMS) == expected


def test_v_star_s_words_equal_what_lmms_eval_s_pattern_makes_of_the_stored_text(tmp_path):
    """The pattern is that of lmms_eval/tasks/vstar_bench/utils.py, vstar_doc_to_text."""
    source, _ = made.write_vstar_questions(tmp_path)
    for item in prepare(replace(TABLE["vstar_inline"], n=None, counts={}), tmp_path / "images", source):
        text = item["raw"]["text"]
        found = re.findall(r"\([A-D]\)\s*([^()]+?)(?=\s*\([A-D]\)|$)", text)
        lines = [f"{letter}. {option.strip()}" for letter, option in zip("ABCD", found)]
        expected = "\n".join([text.split("(A)")[0].strip(), *lines])
        assert user_text(item,
                         LMMS) == f"{expected}\nAnswer with the option's letter from the given choices directly."


def test_lmms_eval_without_format_hints():
    bare = replace(LMMS, format_hints=False)
    assert user_text(MCQ, bare) == "What is the material of the glove?\nA. rubber\nB. cotton"
    assert user_text(MCQ | {"benchmark": "hrbench_8k"},
                     bare) == "What is the material of the glove?\nA. rubber\nB. cotton"
    assert user_text(MME, bare) == "Is it a dog?"


@pytest.mark.parametrize("item, match", [
    (WTQ, "lmms-eval has no task for benchmark 'tablevqa/vwtq'"), (VSP, "no task"), (LIKELIHOOD, "no task"),
    (MCQ | {"options": [["A", "red (dark)"], ["B", "red"]]},
     "drops the option 'red .dark.', which holds a bracket"),
    (MCQ | {"benchmark": "blink/Jigsaw", "raw": {}}, "no prompt of BLINK's own")])
def test_what_lmms_eval_cannot_ask_is_named(item, match):
    with pytest.raises(DataError, match=match):
        user_text(item, LMMS)


def test_multiple_choice_is_byte_for_byte_question_text(tmp_path):
    """Of prepared items, of items of an unknown benchmark, and of items that name no metric."""
    for name, write in (("vstar", made.write_vstar), ("hrbench_4k", made.write_hrbench),
                        ("blink/Jigsaw", made.write_blink_tsv)):
        source, expected = write(tmp_path)
        for item in prepare(replace(TABLE[name], n=None, counts={}), tmp_path / "images", source):
            assert user_text(item, VLM).encode() == question_text(item).encode()
    own = {name: part for name, part in MCQ.items() if name not in ("metric", "benchmark")}
    assert user_text(own, VLM) == question_text(own) == VLMEVALKIT[0][1]


def test_system_prompts_and_pixel_limits():
    found = {name: (p.system, p.min_pixels, p.max_pixels) for name, p in PROTOCOLS.items()}
    readme = "You are a helpful multimodal assistant. You are required to answer the question based on the image provided. " \
             "Put your final answer in \\boxed{}."
    paper = "You are an expert multimodal large language model designed to reason with latent visual embeddings."
    assert found == {"vlmevalkit": (None, 1_003_520, 12_845_056), "monet": (readme, 1_003_520, 12_845_056),
                     "monet_paper": (paper, 200_704, 6_422_528),
                     "lmms_eval": ("You are a helpful assistant.", 200_704, 1_605_632),
                     "deepeyes": (TOOL_SYSTEM, 3_136, 12_845_056), "plain": (None, None, None)}
    assert all(not p.suffix and p.format_hints for p in PROTOCOLS.values())


def test_protocols_do_not_change():
    with pytest.raises(FrozenInstanceError):
        VLM.system = "other"
