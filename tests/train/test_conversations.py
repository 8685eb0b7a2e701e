"""Training on the rows that people have: finished chains, with pictures, conversations of several turns."""
from dataclasses import replace
from itertools import product

import pytest
import torch
from processes import run_here
from samples import PAIR, monet
from training import flags, library_loss, log_of, summed

import train_sft
from utils import qwen as Q
from utils.chain_formats import convert
from utils.jsonl import DataError, write_rows
from utils.latent_families import PRESETS, special_id
from utils.train.examples import Target, make_example, make_pack
from utils.train.model import Objective, use_packed_attention
from utils.train.weights import add_tokens

CHAIN = "I zoom in. <think_image>a red 42</think_image> It is \\boxed{42}."
ASKED = "What number is on the boat?"


MONET = monet(user=[("image", "a.png"), ("text", ASKED)],
              assistant=[("text", f"I zoom in. {PAIR}"), ("image", "b.png"),
                         ("text", "<observation>The hull shows 42.</observation> \\boxed{42}")])


def finished(n=1, chain=CHAIN):
    return {"id": f"o/{n}", "images": ["a.png"], "question": ASKED, "chain": chain}


def prepared(value, *more):
    args = train_sft.parse_args(["--data", "d", "--output", "o", *more])
    made, fault = convert("x:1", value)
    return train_sft.prepare_row(made, fault and ": ".join(fault), args)


def tokens_of(qwen, example):
    """Return the tokens of an example, the trained ones marked by a leading +."""
    return ["+" * is_trained + qwen.tokenizer.decode([i])
            for i, is_trained in zip(example.ids, example.trained)]


# by hand, in the vocabulary of the release
IMAGE = ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>"]
SYSTEM = ["<|im_start|>", "system", "\n", "You", " are", " a", " helpful", " assistant", ".", "<|im_end|>",
          "\n"]
USER, REPLY = ["<|im_start|>", "user", "\n"], ["<|im_end|>", "\n", "<|im_start|>", "assistant", "\n"]
BOAT = [*SYSTEM, *USER, *IMAGE, "What", " number", " is", " on", " the", " boat", "?", *REPLY]


def trained(text):
    return ["+" + token for token in text.split("·")]


BOX, SHOWN = "\\·boxed·{·4·2·}·<|im_end|>", " The· hull· shows· ·4·2·.· "


@pytest.mark.parametrize("imagination, value, reply", [
    ("text", finished(), trained("I· zoom· in·.· <·think·_image·>a· red· ·4·2·</·think·_image·>· It· is· \\·"
                                 "boxed·{·4·2·}.·<|im_end|>")),
    ("direct", finished(), trained(BOX)),
    ("placeholder", MONET, trained("I· zoom· in·.· <·think·_image·>·" + SHOWN + BOX)),
    ("latent", MONET, [*trained("I· zoom· in·.· ·<abs_vis_token>"), *["<abs_vis_token_pad>"] * 2,
                       "</abs_vis_token>", *trained(SHOWN + BOX)])])
def test_labels_of_each_target_in_the_vocabulary_of_the_release(imagination, value, reply, shared_data,
                                                                tmp_path, picture):
    """Each token by hand, and whether Monet's rules train it (its src/utils.py). Only the newline after
    "assistant", part of the generation prompt, is not trained here."""
    picture("a.png"), picture("b.png")
    qwen = Q.load_tools(str(shared_data / "qwen2_5_vl"))
    spec = replace(PRESETS["monet_vllm"], size=2) if imagination == "latent" else None
    if spec:
        add_tokens(qwen, spec.tokens)
    row = prepared(value, "--imagination", imagination)
    example = make_example(qwen, row, Target(imagination, str(tmp_path), spec))
    assert tokens_of(qwen, example) == [*BOAT, *reply]


TALK = {"images": ["a.png", "b.png"], "conversations": [
    {"from": "system", "value": "Be brief."}, {"from": "human", "value": "<image>\nWhat?"},
    {"from": "gpt", "value": "A boat \\boxed{3}."}, {"from": "human", "value": "And <image>?"},
    {"from": "gpt", "value": "A red one \\boxed{4}."}]}


def plus(is_trained, *tokens):
    return ["+" * is_trained + token for token in tokens]


@pytest.mark.parametrize("turns", ["all", "last"])
@pytest.mark.parametrize("imagination", ["text", "direct"])
def test_labels_of_a_conversation(turns, imagination, shared_data, tmp_path, picture):
    picture("a.png"), picture("b.png")
    qwen = Q.load_tools(str(shared_data / "qwen2_5_vl"))
    row = prepared(TALK, "--imagination", imagination, "--turns", turns)
    found = tokens_of(qwen, make_example(qwen, row, Target(imagination, str(tmp_path), turns=turns)))
    first, second = (["A", " boat", " \\", "boxed", "{", "3", "}."],
                     ["A", " red", " one", " \\", "boxed", "{", "4", "}."])
    box = [["\\", "boxed", "{", digit, "}"] for digit in "34"]
    if imagination == "direct":
        first, second = box[0] if turns == "all" else first, box[1]
    assert found == [
        "<|im_start|>", "system", "\n", "Be", " brief", ".", "<|im_end|>", "\n", *USER, *IMAGE, "\n", "What",
        "?", *REPLY, *plus(turns == "all", *first, "<|im_end|>"), "\n", *USER, "And", " ", *IMAGE, "?",
        *REPLY, *plus(True, *second, "<|im_end|>")]


def talk_of(*pairs, **more):
    return {"messages": [{"role": role, "content": text} for pair in pairs
                         for role, text in zip(("user", "assistant"), pair)]} | more


TALKS = [talk_of(("<image> or <image>?", "a red one"), ("more?", "no more"), ("<image> again", "a blue one"),
                 images=["a.png", "b.png", "c.png"]), talk_of(("Which?", "this"), ("<image>?", "a boat"),
                                                              images=["b.png"]), talk_of(("Hi", "Hi."))]


@pytest.fixture
def small(tiny_checkpoint, tmp_path, picture):
    """(qwen, target, rows): three conversations with pictures of unequal sizes in several turns."""
    for name, size in (("a.png", (56, 84)), ("b.png", (112, 84)), ("c.png", (28, 56))):
        picture(name, size)
    return Q.load(str(tiny_checkpoint), "float32", "cpu"), Target("text", str(tmp_path)), [
        prepared(value) for value in TALKS]


def check_places(pack, examples):
    """Every label is a trained token, and is predicted where the token before it stands."""
    labels = [i for example in examples for i, is_trained in zip(example.ids, example.trained) if is_trained]
    kept = torch.cat([one["tokens"][one["kept"]] for one in pack["passes"]])
    ids, places = pack["input_ids"][0], kept[pack["predicting"]]
    assert pack["labels"].tolist() == ids[places + 1].tolist() == labels
    before = [i for example in examples for i, is_trained in zip(example.ids, example.trained[1:] + [False])
              if is_trained]
    assert ids[places].tolist() == before


def test_labels_are_where_they_stand_after_pictures_of_later_turns(small):
    qwen, target, rows = small
    examples = [make_example(qwen, row, target) for row in rows]
    image_id = special_id(qwen.tokenizer, Q.IMAGE_TOKEN)
    assert image_id in examples[0].ids[examples[0].trained.index(True):]  # a picture follows a trained token
    check_places(make_pack(qwen, examples, target), examples)
    spec = PRESETS["mirage"]
    add_tokens(qwen, spec.tokens)
    target = replace(target, imagination="latent", spec=replace(spec, size=2))
    steps = [{"text": "I look."}, {"image": "b.png"}, {"text": "It is."}]
    examples = [make_example(qwen, row | {"steps": steps}, target) for row in rows]
    check_places(make_pack(qwen, examples, target), examples)


@pytest.mark.numeric
def test_all_turns_of_a_pack_have_the_loss_of_the_library(small):
    qwen, target, rows = small
    examples = [make_example(qwen, row, target) for row in rows]
    loss, expected, hits = summed(qwen.model, (library_loss(qwen, [one], target) for one in examples))
    with use_packed_attention(qwen.model):
        of_pack = Objective(qwen)(make_pack(qwen, examples, target))
        found, its_gradient, its_hits = summed(qwen.model, [of_pack])
    assert torch.allclose(found, loss, rtol=1e-5) and hits == its_hits
    assert (its_gradient - expected).norm() < 1e-5 * expected.norm()


# ---- whole runs
@pytest.mark.parametrize("imagination", ["text", "direct"])
def test_finished_chains_are_shown_and_train(imagination, tiny_checkpoint, rows_file, tmp_path, capsys):
    path = rows_file([finished(n) for n in range(4)])
    arguments = flags(path, tiny_checkpoint, tmp_path / "o", "--imagination", imagination, "--max_steps", "2",
                      "--global_batch", "2", "--max_tokens", "1000")
    assert run_here("train_sft", [*arguments, "--dry_run"]) == 0
    shown = ">>\\boxed{42}<|im_end|><<" if imagination == "direct" else f">>{CHAIN}<|im_end|><<"
    assert capsys.readouterr().err.count(shown) == 3
    assert run_here("train_sft", arguments) == 0
    assert [line["step"] for line in log_of(tmp_path / "o")] == [1, 2]


def test_targets_that_need_steps_refuse_a_finished_chain(tiny_checkpoint, rows_file, tmp_path, capsys):
    path = rows_file([finished(n) for n in range(2)])
    for imagination in ("placeholder", "latent"):
        assert run_here("train_sft", flags(path, tiny_checkpoint, tmp_path / "o", "--imagination",
                                           imagination)) == 2
        error = capsys.readouterr().err.rpartition("error: ")[2]
        assert error.startswith("2 of 2 rows cannot be trained on") and error.count(
            f"only a finished chain, no steps with the images (--imagination {imagination})") == 2
    path = rows_file([finished(n, "I think so.") for n in range(2)])
    assert run_here("train_sft", flags(path, tiny_checkpoint, tmp_path / "o", "--imagination", "direct")) == 2
    assert capsys.readouterr().err.count("no answer, as a key or in a \\boxed{} of the chain (--imag") == 2


def test_chains_with_pictures_train_on_their_steps(tiny_checkpoint, rows_file, tmp_path, capsys):
    path = rows_file([monet(1), monet(2)])
    more = ["--max_steps", "2", "--max_tokens", "1000"]
    assert run_here("train_sft", flags(path, tiny_checkpoint, tmp_path / "o", *more)) == 2
    fault = "no chain; rewrite_captions.py makes it of the steps (--imagination text)"
    assert capsys.readouterr().err.count(fault) == 2
    assert run_here("train_sft", flags(path, tiny_checkpoint, tmp_path / "o", "--imagination", "placeholder",
                                       *more)) == 0


@pytest.mark.parametrize("replies, target, match", [
    (("", "b"), "text", "its text is empty"), (("a", " "), "text", "its text is empty"),
    (("a", "\\boxed{4}"), "direct", "its text is empty"), (("\\boxed{4}", "b"), "direct", "no answer")])
def test_a_reply_that_says_nothing_is_refused_where_it_is_trained(replies, target, match, tiny_checkpoint):
    qwen = Q.load_tools(str(tiny_checkpoint))
    value = talk_of(*(("Well?", reply) for reply in replies))
    with pytest.raises(DataError, match=match):
        make_example(qwen, prepared(value, "--imagination", target), Target(target))
    if match == "its text is empty" and replies[1].strip():  # the first is not trained
        last = prepared(value, "--imagination", target, "--turns", "last")
        assert make_example(qwen, last, Target(target, turns="last")).n_trained > 1


@pytest.mark.parametrize("place", [0, 1])
def test_marks_of_imaginations_close_in_their_reply_where_it_is_trained(place):
    for n in range(5):
        for marks in product(("<think_image>", "</think_image>"), repeat=n):
            replies = ["a \\boxed{3}", "b \\boxed{4}"]
            replies[place] = "a".join(("", *marks, " \\boxed{4}"))
            by_turns = all(("/" in mark) == k % 2 for k, mark in enumerate(marks)) and n % 2 == 0
            for turns, target in product(("all", "last"), ("text", "direct")):
                row = prepared(talk_of(*(("Well?", reply) for reply in replies)), "--turns", turns,
                               "--imagination", target)
                is_trained = target == "text" and (turns == "all" or place == 1)
                assert row.get("fault", ("",))[0] == ("marks" if is_trained and not by_turns else ""), marks


def test_control_tokens_in_a_conversation_are_text(tiny_checkpoint, tmp_path):
    qwen = Q.load_tools(str(tiny_checkpoint))
    value = talk_of(("a<|im_end|>", "b<|im_start|>"), ("c<|image_pad|>", "d<|im_end|>"))
    value["messages"].insert(0, {"role": "system", "content": "e<|im_end|>"})
    write_rows(tmp_path / "x.jsonl", [value])
    for turns in ("all", "last"):
        row = prepared(value, "--turns", turns)
        text = qwen.tokenizer.decode(make_example(qwen, row, Target(turns=turns)).ids)
        assert text.count("<|im_end|>") == text.count("<|im_start|>") == 5 and text.count("< |") == 5


def test_the_system_flag_goes_before_the_rows_own(tiny_checkpoint):
    qwen = Q.load_tools(str(tiny_checkpoint))
    system = {"role": "system", "content": "Be brief."}
    row = prepared({"messages": [system, *talk_of(("a", "b"))["messages"]]})
    texts = [qwen.tokenizer.decode(make_example(qwen, row, Target(system=flag)).ids)
             for flag in (None, "No.")]
    assert "Be brief." in texts[0] and "No." in texts[1] and "brief" not in texts[1]
