"""Training targets, which of their tokens are trained, and the visual token budget."""
import math
import random
from dataclasses import replace

import pytest
from samples import grey_tiff, png, row

from train_sft import marked
from utils import qwen as Q
from utils.images import smart_size
from utils.jsonl import DataError
from utils.latent_families import PRESETS
from utils.train.examples import Target, budget_sizes, make_example, make_examples, sort_rows, target_text
from utils.train.weights import add_tokens

MIRAGE = PRESETS["mirage"]
ROW = row(caption="a red 7")
def tools_and_target(checkpoint, pictures, imagination):
    """Return the tools, which know the target's tokens, and the target; latents are Mirage's."""
    qwen, target = Q.load_tools(str(checkpoint)), Target(imagination, pictures)
    if imagination == "latent":
        target = replace(target, spec=MIRAGE)
        add_tokens(qwen, MIRAGE.tokens)
    return qwen, target


@pytest.fixture
def pictures(picture, tmp_path):
    picture("a.png"), picture("b.png")
    return str(tmp_path)


def test_target_of_each_variant_and_data_that_looks_like_control_tokens():
    latents = f"<|latent_start|>{'<|latent_pad|>' * 4}<|latent_end|>"
    for target, expected in (
            (Target("text"), ROW["chain"]), (Target("direct"), "\\boxed{42}"),
            (Target("placeholder"), "I look closer. <think_image> The answer is \\boxed{42}."),
            (Target("latent", spec=MIRAGE), f"I look closer. {latents} {ROW['steps'][2]['text']}")):
        assert target_text(ROW, target) == expected
    assert target_text(ROW | {"chain": "a<|im_end|>b"}, Target()) == "a< |im_end|>b"


def test_only_the_reply_is_trained_and_no_pad_nor_forced_end(tiny_checkpoint, pictures):
    qwen = Q.load_tools(str(tiny_checkpoint))
    example = make_example(qwen, ROW, Target("text", pictures))
    assert marked(qwen, example).endswith(f"<|im_start|>assistant\n>>{ROW['chain']}<|im_end|><<")
    add_tokens(qwen, MIRAGE.tokens)
    latent = make_example(qwen, ROW, Target("latent", pictures, MIRAGE))
    for example, reply, rest in (
            (example, ROW["chain"] + "<|im_end|>", ""),
            (latent, "I look closer. <|latent_start|> The answer is \\boxed{42}.<|im_end|>",
             MIRAGE.pad * 4 + MIRAGE.end)):
        parts = [qwen.tokenizer.decode([i for i, t in zip(example.ids, example.trained) if t == is_trained])
                 for is_trained in (True, False)]
        assert parts[0] == reply and parts[1].endswith("<|im_start|>assistant\n" + rest)


def test_the_image_budget_is_the_published_algorithm_on_1000_random_sizes():
    """Oracle: Monet's resize_by_token_budget, written a second time from its description; and by hand."""
    rng, changed = random.Random(0), 0
    for _ in range(1000):
        sizes = [(rng.randint(20, 3000), rng.randint(20, 3000)) for _ in range(rng.randint(0, 5))]
        most, each = rng.choice([(2000, 1280), (1500, 1280), (1000, 500), (2000, 2000), (100, 25)])
        factor, expected = rng.choice((28, 32)), []
        if (total := sum(w * h for w, h in sizes)) > most * factor**2:
            changed += 1
            for size in sizes:
                for area, limit in ((total, most), (None, each)):
                    share = limit * factor**2 / (area or size[0] * size[1])
                    if share < 1:
                        size = [max(factor, int(side * math.sqrt(share)) // factor * factor) for side in size]
                expected.append(tuple(size))
        assert budget_sizes(sizes, most, each, factor) == (expected or sizes)
    assert 500 < changed < 1000
    assert budget_sizes([(1253, 1251)], 2000, 1280, 28) == [(1253, 1251)]  # 1,567,503 of 1,568,000 pixels
    # r = sqrt(1568000 / 3000000) = 0.72296: 1445 x 722 -> 1428 x 700 < 1003520; 722 x 722 -> 700 x 700
    assert budget_sizes([(2000, 1000), (1000, 1000)], 2000, 1280, 28) == [(1428, 700), (700, 700)]
    # r = sqrt(7840 / 90000) = 0.2951: 88 -> 84, never below one token: 2 -> 28
    assert budget_sizes([(300, 290), (300, 10)], 10, 10, 28) == [(84, 84), (84, 28)]


def test_bad_rows_are_counted_and_named_together(tiny_checkpoint, pictures):
    qwen, target = Q.load_tools(str(tiny_checkpoint)), Target("text", pictures)
    rows = [ROW, ROW | {"id": "a/2", "images": ["gone.png"]}, ROW | {"id": "a/3", "images": ["../a.png"]}]
    rows += [ROW | {"id": f"b/{n}", "images": []} | {"question": "one <image> too many"} for n in range(30)]
    with pytest.raises(DataError) as caught:
        make_examples(qwen, rows, target)
    text = str(caught.value)
    assert text.startswith("32 of 33 rows cannot be trained on") and text.endswith("... and 12 more")
    assert all(part in text for part in ("a/2: ", "gone.png", "a/3: ", "1 <image> markers for 0 images"))
    with pytest.raises(DataError, match=r"s/1: \d+ tokens, visual ones included, expected at most --max_"):
        make_examples(qwen, [ROW], target, max_tokens=20)
    with pytest.raises(DataError, match="^'<.latent_pad.>' is .* expected one added token"):  # no row's fault
        sort_rows(qwen, [ROW], Target("latent", pictures, MIRAGE))
    add_tokens(qwen, MIRAGE.tokens)
    with pytest.raises(DataError, match="b.png: 6 visual tokens, expected at least 9"):
        make_examples(qwen, [ROW], Target("latent", pictures, replace(MIRAGE, size=9)))
    latent = Target("latent", pictures, MIRAGE)
    n_tokens = make_example(qwen, ROW, latent).n_tokens  # latents are held to --max_tokens, too
    assert len(make_examples(qwen, [ROW], latent, max_tokens=n_tokens)) == 1
    with pytest.raises(DataError, match=rf"s/1: {n_tokens} tokens, .* at most --max_tokens {n_tokens - 1}"):
        make_examples(qwen, [ROW], latent, max_tokens=n_tokens - 1)


def test_the_budget_keeps_every_picture_within_the_aspect_that_the_processor_takes(tiny_checkpoint):
    """What stage 2 keeps stage 3 trains on: any aspect up to 200, next to pictures of any size."""
    rng, qwen, clamped = random.Random(0), Q.load_tools(str(tiny_checkpoint)), 0
    for _ in range(2000):
        low = rng.randint(1, 120)
        thin = (low, min(low * rng.randint(90, 200), 20_000))
        others = [(rng.randint(28, 4000), rng.randint(28, 4000)) for _ in range(rng.randint(0, 4))]
        sizes = [thin if rng.random() < 0.5 else thin[::-1], *others]
        most, each = rng.choice([(2000, 1280), (200, 100), (20, 5)])
        budgeted = budget_sizes(sizes, most, each)
        for (width, height), size in zip(budgeted, sizes):
            assert max(width, height) <= 200 * min(width, height)
            smart_size(width, height, qwen.factor, 3136, 12_845_056)  # raises nothing
            assert min(width, height) >= 28 or (width, height) == size
        clamped += any(max(size) == 200 * min(size) for size in budgeted)
        assert budgeted == sizes or sum(w * h for w, h in sizes) > most * 784
    assert clamped > 20


@pytest.mark.parametrize("data, words", [
    (grey_tiff([9], 32, 3), "greys of mode F"), (grey_tiff([9], 32, 2), "greys of mode I"),
    (png(3, 601, 8, 0, 4 * 601), "3x601 pixels, expected an aspect"),
    (png(14_000, 14_000, 8, 2, 64), "Image size"), (b"P6 64 64 255\n" + bytes(12288), "not a whole picture"),
    (png(60, 40, 8, 2, 64)[:20], "not a whole picture"), (b"", "not a whole picture"),
    (bytes(range(256)), "not a whole picture"), (None, "no such image")])
@pytest.mark.parametrize("imagination", ["text", "latent"])
def test_what_a_header_tells_is_refused_at_the_start(tiny_checkpoint, pictures, tmp_path, data, words,
                                                     imagination):
    """In one line with the row and the picture: of the question, and of a step that is imagined."""
    qwen, target = tools_and_target(tiny_checkpoint, pictures, imagination)
    if data is not None:
        (tmp_path / "bad.png").write_bytes(data)
    change = {"images": ["bad.png"]}
    if imagination == "latent":
        change = {"steps": [{"image": "bad.png", "operation": "zoom"}, *ROW["steps"][2:]]}
    with pytest.raises(DataError, match=rf"1 of 2 rows .*: bad/1: .*bad\.png: {words}") as caught:
        make_examples(qwen, [ROW, ROW | change | {"id": "bad/1"}], target)
    assert "\n" not in str(caught.value)
    if imagination == "latent":  # where the step is not imagined its picture is not looked at
        assert len(make_examples(qwen, [ROW | change], Target("placeholder", pictures))) == 1


@pytest.mark.parametrize("imagination", ["text", "direct", "placeholder", "latent"])
def test_control_characters_are_refused_where_the_target_shows_them(tiny_checkpoint, pictures, imagination):
    qwen, target = tools_and_target(tiny_checkpoint, pictures, imagination)
    controls = [chr(code) for code in (*range(32), *range(127, 160)) if not chr(code).isspace()]
    texts = [f"a {char} boat" for char in controls] + ["\x1b[31mred", "bo\x00at"]
    own = {"text": lambda text: {"chain": text}, "direct": lambda text: {"answer": text}}.get(
        imagination, lambda text: {"steps": [*ROW["steps"][:2], {"text": text}]})
    rows = [ROW | own(text) | {"id": f"r/{n}"} for n, text in enumerate(texts)]
    examples, faults = sort_rows(qwen, [*rows, ROW | {"id": "q", "question": "What\x07?"}], target)
    assert not examples and {error.reason for error in faults.values()} == {"control"}
    whole = [ROW | own(f"a{space}boat") | {"id": f"s/{n}"}
             for n, space in enumerate("\t\n\r\x0b\x0c\x1c\x85\u2028")]
    examples, faults = sort_rows(qwen, whole, target)
    assert len(examples) == len(whole) and not faults


SILENT = ["", " \n\t", "\u200b\ufeff", "\x00", "<think_image> </think_image>", "\\boxed{ }",
          "<think_image></think_image> \\boxed{}\u00a0"]
SPOKEN = ["7", "-", "是", "＋", "\\boxed{7}", "<think_image>a boat</think_image>", "\u200b7"]


@pytest.mark.parametrize("imagination", ["text", "direct", "placeholder", "latent"])
def test_rows_that_say_nothing_are_counted_and_refused(tiny_checkpoint, pictures, imagination):
    qwen, target = tools_and_target(tiny_checkpoint, pictures, imagination)

    def rows(texts):
        """One row per text, which the target of this imagination takes alone, and rows that have no step."""
        image = ROW["steps"][1]
        made = [{"text": {"chain": text}, "direct": {"answer": text}}.get(
                    imagination, {"steps": [image, {"text": text}]}) for text in texts]
        return [ROW | change | {"id": f"r/{n}"} for n, change in enumerate(made)]

    assert len(make_examples(qwen, rows(SPOKEN), target)) == len(SPOKEN)
    with pytest.raises(DataError) as caught:
        make_examples(qwen, [*rows(SPOKEN), *rows(SILENT)], target)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith(f"{len(SILENT)} of {len(SILENT) + len(SPOKEN)} rows cannot be trained on")
    assert [line.split(":")[0] for line in lines[1:]] == [f"  r/{n}" for n in range(len(SILENT))]
    assert all(f"its text is empty (--imagination {imagination})" in line for line in lines[1:])
    if imagination in ("placeholder", "latent"):
        with pytest.raises(DataError, match="1 of 1 rows"):
            make_examples(qwen, [ROW | {"steps": []}], target)
