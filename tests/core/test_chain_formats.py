"""Rows of every form: conversations written in many dialects are read alike, odd ones are told apart."""
import json
import random
import re

import pytest
from samples import PAIR, mirage, monet, row, table

from utils.chain_formats import convert, read_chains
from utils.jsonl import DataError, write_rows

# A conversation is [(role, [text or ("image", path), ...]), ...]; a dialect writes it as a row.
FROM = {"system": "system", "user": "human", "assistant": "gpt"}


def paths_of(talk):
    return [part[1] for _, parts in talk for part in parts if isinstance(part, tuple)]


def with_marks(parts):
    return "".join(part if isinstance(part, str) else "<image>" for part in parts)


def sharegpt(talk):
    return {"conversations": [{"from": FROM[role], "value": with_marks(parts)} for role, parts in talk],
            "images": paths_of(talk)}


def llava(talk):
    value = sharegpt(talk)
    images = value.pop("images")
    return value | ({"image": images[0] if len(images) == 1 else images} if images else {})


def renamed(talk):
    return {"conversations": [{"role": role, "content": with_marks(parts)} for role, parts in talk],
            "images": paths_of(talk)}


def openai(talk):
    return {"messages": [{"role": role, "content": with_marks(parts)} for role, parts in talk],
            "images": paths_of(talk)}


def in_parts(write_image, write_text=lambda text: {"type": "text", "text": text}, listed=False):
    def write(talk):
        turns = [{"role": role, "content": [
            write_text(part) if isinstance(part, str) else write_image(part[1]) for part in parts]}
            for role, parts in talk]
        return {"messages": turns} | ({"images": paths_of(talk)} if listed else {})
    return write


DIALECTS = {
    "llava": llava, "sharegpt": sharegpt, "role and content": renamed, "openai, marks": openai,
    "image": in_parts(lambda path: {"type": "image", "image": path}),
    "image_url": in_parts(lambda path: {"type": "image_url", "image_url": {"url": path}}),
    "image_url, a text": in_parts(lambda path: {"type": "image_url", "image_url": path}),
    "path, repeated in images": in_parts(lambda path: {"type": "image", "path": path}, listed=True),
    "image without a path": in_parts(lambda path: {"type": "image"}, listed=True),
    "url": in_parts(lambda path: {"type": "image", "url": path}),
    "an object": in_parts(lambda path: {"type": "image", "image": {"bytes": None, "path": path}}),
    "objects in images": lambda talk: openai(talk) | {
        "images": [{"bytes": None, "path": path} for path in paths_of(talk)]},
    "no types": in_parts(lambda path: {"image": path}, lambda text: {"text": text})}


def make_talk(rng, n_pairs, in_reply):
    """Return a conversation with pictures in any places, of the last reply too if `in_reply`."""
    names = iter(f"p{n}.png" for n in range(99))

    def parts(n_images):
        images = [("image", next(names)) for _ in range(n_images)]
        place, last = rng.randint(0, n_images), f"\nand \\boxed{{{rng.randint(0, 99)}}} "
        words = f"words {rng.randint(0, 99)} 是吗？"
        return [*images[:place], *([words, *images[place:], last] if images[place:] else [words + last])]

    talk = [("system", ["Be brief."])] if rng.random() < 0.5 else []
    for n in range(n_pairs):
        talk += [("user", parts(rng.randint(0, 2))),
                 ("assistant", parts(2 if in_reply and n == n_pairs - 1 else 0))]
    return talk


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("n_pairs, in_reply", [(1, False), (1, True), (2, False), (3, True)])
def test_a_conversation_is_the_same_row_in_every_dialect(dialect, n_pairs, in_reply):
    rng = random.Random(f"{n_pairs} {in_reply}")
    for _ in range(20):
        talk = make_talk(rng, n_pairs, in_reply)
        made, fault = convert("x:1", DIALECTS[dialect](talk) | {"id": 7})
        assert fault is None and made["id"] == "7"
        assert made.get("system") == (talk[0][1][0] if talk[0][0] == "system" else None)
        turns = [parts for role, parts in talk if role != "system"]
        asked = [part for parts in turns[::2] for part in parts]
        assert made["images"] == [part[1] for part in asked if isinstance(part, tuple)]
        assert made.get("history", []) == [[with_marks(asked), with_marks(said)]
                                           for asked, said in zip(turns[:-2:2], turns[1:-2:2])]
        n_first = sum(isinstance(part, tuple) for part in turns[-2])
        leading = all(isinstance(part, tuple) for part in turns[-2][:n_first])
        assert made["question"] == (with_marks(turns[-2][n_first:]) if leading and n_pairs == 1
                                    else with_marks(turns[-2]))
        if in_reply:
            assert "chain" not in made and made["steps"] == [
                {"image": part[1]} if isinstance(part, tuple) else {"text": part.strip()}
                for part in turns[-1]]
        else:
            assert made["chain"] == with_marks(turns[-1]) and made["steps"] == []
        assert f"\\boxed{{{made['answer']}}}" in turns[-1][-1]


KEYS = ("from role content value text image image_url path url type images conversations messages system "
        "answer").split()


def exported(value):
    """Return a value as a table exports it, every object with every key, roles in any case."""
    if isinstance(value, dict):
        value = {name: part.title() if name in ("from", "role") else exported(part)
                 for name, part in value.items()}
        return dict.fromkeys(KEYS) | value
    return list(map(exported, value)) if isinstance(value, list) else value


@pytest.mark.parametrize("dialect", DIALECTS)
def test_null_is_no_value_and_the_system_prompt_may_stand_beside_the_turns(dialect, tmp_path):
    rng, values = random.Random(dialect), []
    for n in range(12):
        talk = make_talk(rng, rng.randint(1, 3), rng.random() < 0.5)
        values.append(DIALECTS[dialect](talk) | {"id": str(n)})
        if talk[0][0] == "system":
            values.append(DIALECTS[dialect](talk[1:]) | {"id": str(n), "system": "Be brief."})
    tables = exported(values) + [exported(row()) | {"answer": "42"}]
    write_rows(tmp_path / "x.jsonl", tables)
    read = [made for _, _, made, _ in read_chains([tmp_path / "x.jsonl"])]
    direct = {}
    for value in values:
        made, fault = convert("x:1", value)
        assert fault is None and direct.setdefault(made["id"], made) == made
    assert [made | {"id": made["id"].removesuffix("-2")} for made in read[:-1]] == [
        direct[value["id"]] for value in values]
    assert read[-1] == convert("x:1", row())[0]


@pytest.mark.parametrize("empty", [None, [], ""])
def test_image_counts_where_images_is_empty(empty, tmp_path):
    value = llava([("user", [("image", "a.png"), "hi"]), ("assistant", ["b"])]) | {"images": empty}
    assert convert("x:1", value)[0]["images"] == ["a.png"]


def test_images_without_marks_stand_first_in_the_first_turn():
    value = {"images": ["a.png", "b.png"], "conversations": [
        {"from": "human", "value": "Same?"}, {"from": "gpt", "value": "No."}]}
    assert convert("x:1", value)[0]["question"] == "Same?"
    more = value["conversations"] + [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Red."}]
    made = convert("x:1", value | {"conversations": more})[0]
    assert made["images"] == ["a.png", "b.png"] and made["question"] == "Why?"
    assert made["history"] == [["<image><image>Same?", "No."]]


@pytest.mark.parametrize("extra, answer", [({}, "4"), ({"answer": "5"}, "5"), ({"answer": 5}, "5"),
                                           ({"answer": None}, "4"), ({"answer": ["5"]}, "4"),
                                           ({"answer": ""}, "4"), ({"answer": " "}, "4"),
                                           ({"answer": True}, "4"), ({"answer": 0}, "0")])
def test_the_answer_is_its_key_or_that_of_the_last_box(extra, answer):
    talk = [("user", ["What?"]), ("assistant", ["\\boxed{3} or \\boxed{4}"])]
    assert convert("x:1", openai(talk) | extra)[0]["answer"] == answer


def test_finished_chains_of_all_forms():
    chain = "I look. <think_image>a 7</think_image> It is \\boxed{7}."
    talk = [("user", [("image", "a.png"), "What?"]), ("assistant", [chain])]
    rows = [convert("x:1", value)[0] for value in (
        monet(question="What?", assistant=[("text", chain)]), llava(talk), openai(talk),
        {"id": "x", "images": ["a.png"], "question": "What?", "chain": chain})]
    names = ("question", "chain", "answer", "images", "steps")
    assert [[made[name] for name in names] for made in rows] == [["What?", chain, "7", ["a.png"], []]] * 4
    assert convert("x:1", row() | {"chain": chain})[0] == {
        name: value for name, value in row(chain=chain).items() if name != "refined"}
    made, fault = convert("x:1", monet(assistant=[("text", f"{chain} {PAIR}")]))
    assert fault == ("tag_count", "1 latent pairs for 0 images")


@pytest.mark.parametrize("value, match", [case.values() for case in table("odd_rows")])
def test_odd_rows_have_a_fault_in_words(value, match, tmp_path):
    made, (reason, detail) = convert("x:1", value)
    assert reason == "structure" and re.search(match, detail), detail
    write_rows(tmp_path / "x.jsonl", [value, row()])  # the next row is read
    assert [fault is None for *_, fault in read_chains([tmp_path / "x.jsonl"])] == [False, True]


@pytest.mark.parametrize("case", table("unknown_forms"), ids=lambda case: case["match"])
def test_wrong_keys_end_the_run(case):
    with pytest.raises(DataError, match=f"^x:1: {case['match']}"):
        convert("x:1", case["value"])


@pytest.mark.parametrize("write", [llava, openai, in_parts(lambda path: {"type": "image", "image": path})])
def test_ids_are_their_own_or_of_the_content_and_repeated_ones_are_numbered(write, tmp_path):
    rng = random.Random(0)
    values = [write(make_talk(rng, 1, False)) for _ in range(6)]

    def ids(*files):
        for n, rows in enumerate(files):
            text = json.dumps(rows) if n % 2 else "\n".join(map(json.dumps, rows))  # a list, or lines
            (tmp_path / f"{n}.json").write_text(text)
        return {made["chain"]: made["id"] for _, _, made, _ in read_chains(
            [tmp_path / f"{n}.json" for n in range(len(files))])}

    first = ids(values)
    assert len(set(first.values())) == 6
    assert first == ids(values[3:], values[:3]) == ids([value | {"licence": "x"} for value in values[::-1]])
    named = ids([value | {"id": n} for n, value in enumerate(values)],
                [value | {"id": "0"} for value in values])
    assert sorted(named.values()) == ["0-2", "0-3", "0-4", "0-5", "0-6", "0-7"]
    odd = ["0", "0-2", "0", "0-3", "0", "0-2"]  # own ids that look like numbered ones
    assert len(set(ids([value | {"id": name} for name, value in zip(odd, values)]).values())) == 6
    changes = [{}, {"text_input": "<image>?"}, {"text_output": "x<output_image>y"}, {"image_input": "c.png"},
               {"image_output": "c.png"}]
    assert len({convert("x:1", mirage(**change))[0]["id"] for change in changes}) == len(changes)
    with pytest.raises(DataError, match="duplicate id 's/1', first seen at"):
        ids([row()], [row()])
