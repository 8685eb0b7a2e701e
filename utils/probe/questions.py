"""What an imagination tells without the image: questions about its source, asked in ways that differ only in
what is given.

    tokens_only (a prompt without image; the imagination begins the reply)
      image       the image and nothing else               image_own   the image and the imagination
      text_only   neither                                  own         the imagination of the source
      other       that of another image's item             mean        the mean latent of every step
      random      noise of the own latents' lengths
    cut (the source's own prompt is read and imagined on, then the image and every word read after it are
    hidden but the imagination, and the question follows as a new turn)
      cut         the source's   cut_other  another item's   cut_none   the source's, its imagination hidden
                                                                        too; how far off
                                                                        the question is still tells how long
                                                                        it was

A text imagination has no mean and no noise. Cut, its words keep what they were read with, the image: what
that adds to the words alone is "cut" beside "own". Every way is read twice: R0 scores each option behind one
stem, which cannot fail to parse; the free reply is parsed. A reader, another model, is given the words, or
the latents if its states have their size; it cannot be given what is cut, which is of the model that read the
image.
"""
import argparse
import hashlib
import random
from collections import Counter

import numpy as np
import torch
from tqdm import tqdm

from utils.answers import extract_choice
from utils.decode import State, decode, prefill, prefill_blocks, truncate_cache
from utils.items import group_of, open_images, prompt_of
from utils.jsonl import DataError
from utils.latent_families import Generation, LatentSpec, clean_text, last_latent, latent_ids
from utils.option_scores import describe_scores, score_options
from utils.probe.capture import find_steps
from utils.probe.states import States
from utils.qwen import Qwen, encode
from utils.spans import CLOSE, OPEN, conclusion
from utils.stats import chance, mcnemar_exact, paired_interval, robust_mean, wilson

TOKENS_ONLY = ("image", "image_own", "text_only", "own", "other")
LATENT_ONLY = ("mean", "random")
CUT = ("cut", "cut_other", "cut_none")
TURN = "<|im_start|>user"


def conditions(spec: LatentSpec | None, variants: list[str]) -> list[str]:
    """Return the ways to ask of the variants "tokens_only" and "cut", in the order in which they are asked.
    """
    names = [*TOKENS_ONLY, *(LATENT_ONLY if spec else ())] if "tokens_only" in variants else []
    return names + [*(CUT if "cut" in variants else ())]


def batched(rows: list[dict], size: int, what: str) -> tqdm:
    return tqdm([rows[i:i + size] for i in range(0, len(rows), size)], desc=what)


def rotations(probe: dict) -> list[dict]:
    """Return a question once for every place that its options can be turned to: a letter that is liked gains
    nothing."""
    letters, texts = zip(*probe["options"])
    gold = letters.index(probe["answer"]["value"])
    return [{**probe, "id": f"{probe['id']}#{k}",
             "options": [list(pair) for pair in zip(letters, texts[k:] + texts[:k])],
             "answer": {**probe["answer"], "value": letters[(gold - k) % len(letters)]}}
             for k in range(len(letters))]


def derange(probes: list[dict], groups: dict[str, str], seed: int) -> dict[str, str]:
    """Return for every probe id a donor: the source of a probe of another group. DataError if one group is
    over half."""
    order = list(probes)
    random.Random(seed).shuffle(order)
    order.sort(key=lambda probe: groups[probe["source"]])
    shift = max(Counter(groups[probe["source"]] for probe in probes).values())
    if 2 * shift > len(order):
        raise DataError(
            f"--probe_items: {shift} of {len(order)} usable probe items have one image; expected at most half, "
                        "so that each can be given another image's imagination")
    return {probe["id"]: donor["source"] for probe, donor in zip(order, order[shift:] + order[:shift])}


def beginning(spec: LatentSpec | None, imagination: str | None, n_latents: int) -> str:
    """Return the words of a reply that begins with an imagination; pads stand where latents go."""
    if spec is None:
        return f"{OPEN}{imagination}{CLOSE}"
    # there the first latent is fed in place of the start token
    start = "" if spec.overwrite_start else spec.start
    return start + spec.pad * n_latents + (spec.end if spec.force_end else "")


def conclude(qwen: Qwen, spec: LatentSpec | None, row: Generation) -> str:
    """Return the words after the last imagination of a reply: what is parsed for an answer."""
    if spec is None:
        return conclusion(qwen.tokenizer.decode(row.ids, skip_special_tokens=True)).strip()
    return clean_text(qwen.tokenizer, row.ids[last_latent(row):], spec)


class Prober:
    """Asks probe questions about `items` (by id) whose states are in `store`; `args` are probe.py's."""

    def __init__(self, qwen: Qwen, spec: LatentSpec | None, items: dict[str, dict], store: States,
                 args: argparse.Namespace):
        self.qwen, self.spec, self.items, self.store, self.args = qwen, spec, items, store, args
        self.groups = {name: group_of(item) for name, item in items.items()}
        self.mean: np.ndarray | None = None
        if spec is not None:
            self.check_size()

    def check_size(self) -> None:
        """Raise DataError unless the model can be fed the latents of the store."""
        name, hidden = self.args.reader or self.args.model, self.qwen.model.config.text_config.hidden_size
        try:
            latent_ids(self.qwen.tokenizer, self.spec)
        except DataError as error:
            raise DataError(f"{name}: cannot be given latents of {self.spec.name}: {error}") from error
        width = next((r["tensors"]["latent"][1] for r in self.store.records.values()
                      if "latent" in r["tensors"]), hidden)
        if width != hidden:
            raise DataError(
                f"{name}: states of {hidden} numbers, but the latents of {self.args.model} have {width}; expected "
                            "a --reader of the same hidden size")

    def latents(self, source: str) -> np.ndarray:
        """Return the latents [k, hidden] of the first segment."""
        return self.store.load(source, "latent")[:self.store.records[source]["segments"][0]]

    def given(self, condition: str, probe: dict, donor: str) -> torch.Tensor:
        """Return the latents [k, hidden] that begin the reply; as many as the source's own but for "other".
        """
        own = self.latents(donor if condition == "other" else probe["source"])
        if condition == "mean":
            own = self.mean[:len(own)]
        if condition == "random":
            seed = hashlib.sha256(f"{self.args.seed}/{probe['source']}".encode()).digest()
            noise = np.random.default_rng(list(seed[:8])).normal(size=own.shape)
            own = noise / np.linalg.norm(noise, axis=1, keepdims=True) * np.linalg.norm(own, axis=1,
                                                                                        keepdims=True)
        return torch.tensor(own, dtype=torch.float32, device=self.qwen.device)

    def fit_mean(self, sources: list[str]) -> None:
        """Set the mean latent of every step over `sources`, those counted that have the step."""
        every = [self.latents(source) for source in sources]
        self.mean = np.stack([np.mean([x[t] for x in every if len(x) > t], axis=0)
                              for t in range(max(map(len, every)))])

    def ask(self, probes: list[dict], names: list[str]) -> list[dict]:
        """Ask every question in every way; return the rows of answers.jsonl."""
        donors, rows = derange(probes, self.groups, self.args.seed), []
        if "mean" in names:
            self.fit_mean(sorted({probe["source"] for probe in probes}))
        for name in names:
            for batch in batched(probes, self.args.batch_size, name):
                its = [donors[p["id"]] if name in ("other", "cut_other") else p["source"] for p in batch]
                state, before, able = self.cut(batch, its, name) if name in CUT else self.begin(batch, its,
                                                                                                name)
                asked = [batch[i] for i in able]
                scores = score_options(self.qwen, state, asked, [self.args.stem] * len(asked), before,
                                       self.args.options) if asked else []
                replies = decode(self.qwen, state, self.args.max_new_tokens, self.spec)[0] if asked else []
                found = dict(zip(able, zip(scores, replies)))
                rows += [self.row(probe, name, donor, *found.get(i, (None, None)))
                         for i, (probe, donor) in enumerate(zip(batch, its))]
        return rows

    def begin(self, batch: list[dict], sources: list[str], name: str) -> tuple[State, list[list[int]],
                                                                               list[int]]:
        """Read prompts of "tokens_only"; return their state, the ids that R0 puts before its stem, and all
        places."""
        spec, latents = self.spec, None
        shows = name in ("image", "image_own")
        images = [open_images(item, item["root"]) if shows else [] for item in (self.items[p["source"]]
                                                                                for p in batch)]
        prompts = [prompt_of(self.qwen.tokenizer, probe, len(pictures), self.args.system, self.args.suffix,
                             blind=not shows)
                   for probe, pictures in zip(batch, images)]
        before = [[] for _ in batch]
        if name not in ("image", "text_only"):
            if spec:
                latents = [self.given(name, probe, donor) for probe, donor in zip(batch, sources)]
                before = [[] if spec.force_end else [latent_ids(self.qwen.tokenizer, spec)[2]] for _ in batch]
            words = [self.store.records[source]["imagination"] for source in sources]
            prompts = [prompt + beginning(spec, its, len(latents[i]) if spec else 0)
                       for i, (prompt, its) in enumerate(zip(prompts, words))]
        inputs = encode(self.qwen, prompts, images)
        return prefill(self.qwen, inputs, spec if latents else None, latents), before, list(range(len(batch)))

    def cut(self, batch: list[dict], sources: list[str], name: str) -> tuple[State | None, list[list[int]],
                                                                             list[int]]:
        """Read and imagine on the sources' own prompts, hide what has seen the image, put the question;
        places that imagined again come back."""
        qwen, args, items = self.qwen, self.args, [self.items[source] for source in sources]
        images = [open_images(item, item["root"]) for item in items]
        prompts = [prompt_of(qwen.tokenizer, item, len(pictures), args.system, args.suffix) for item,
                   pictures in zip(items, images)]
        begun = prefill(qwen, encode(qwen, prompts, images))
        rows, end = decode(qwen, begun.select(list(range(len(batch)))), args.max_new_tokens, self.spec)
        first = begun.mask.shape[1]
        steps = [self.imagined(row) for row in rows]
        able = [i for i, its in enumerate(steps) if its and its[-1] < end.mask.shape[1] - first]
        if not able:
            return None, [], []
        back = truncate_cache(end, begun, [steps[i][-1] + 1 if i in able else 0 for i in range(len(rows))])
        for i in able:
            seen = torch.zeros_like(back.mask[i])
            seen[:int(begun.is_image[i].nonzero()[0])] = 1  # what stands before the image, on the left of it
            if name != "cut_none":
                seen[[first + step for step in steps[i]]] = 1
            back.mask[i] *= seen
        closing = [latent_ids(qwen.tokenizer, self.spec)[2]] if self.spec else \
            qwen.tokenizer(CLOSE, add_special_tokens=False).input_ids
        blocks = []
        for i in able:
            whole = prompt_of(qwen.tokenizer, batch[i], 0, args.system, args.suffix, blind=True)
            turn = "<|im_end|>\n" + whole[whole.rindex(TURN):]
            blocks.append(closing + qwen.tokenizer(turn, add_special_tokens=False).input_ids)
        return prefill_blocks(qwen, back.select(able), blocks)[1], [[] for _ in able], able

    def imagined(self, row: Generation) -> list[int]:
        """Return the steps of a reply that are its imagination: all its latents, or the first text; []
        without any."""
        if self.spec:
            return [step for s in row.segments for step in range(s.start, s.start + s.size)]
        found = find_steps(self.qwen, None, row)
        return found[0] if found else []

    def row(self, probe: dict, name: str, donor: str, scores: dict | None, reply: Generation | None) -> dict:
        """Return the line of one answer; one that could not be asked (no latents this time) is counted as no
        answer."""
        gold = probe["answer"]["value"]
        row = {"id": probe["id"], "source": probe["source"], "donor": None if name in ("image", "text_only")
               else donor,
               "condition": name, "gold": gold, "pred": None, "rule": "not_asked", "correct": False,
               "text": "", "r0": None}
        if reply is not None:
            found = extract_choice(conclude(self.qwen, self.spec, reply), dict(probe["options"]),
                                   reply.finish)
            row |= {"pred": found.letter, "rule": found.rule, "correct": found.letter == gold,
                    "text": clean_text(self.qwen.tokenizer, reply.ids, self.spec),
                    "r0": describe_scores(scores, gold)}
        return row


# ------------------------------------------------------------------------------------ scores
def score(rows: list[dict], probes: list[dict], groups: dict[str, str], level: float) -> dict:
    """Return accuracy by condition, parsed and by R0, letters, chance, and what the own imagination gives
    over others.

    `groups`: the image of every probe id; where questions share one, intervals let them vary together.
    """
    n, every = len(probes), {}
    for row in rows:
        every.setdefault(row["condition"], []).append(row)
    result = {"n": n, "chance": chance([len(p["options"]) for p in probes]),
              "gold_letters": Counter(p["answer"]["value"] for p in probes), "conditions": {}}
    for name, its in every.items():
        k, asked = sum(row["correct"] for row in its), [row for row in its if row["r0"]]
        sure = sum(row["r0"]["pred"] == row["gold"] for row in asked)
        result["conditions"][name] = {
            "correct": k, "accuracy": k / n, "ci": wilson(k, n, level),
            "parsed": sum(r["pred"] is not None for r in its) / n,
            "letters": Counter(row["pred"] for row in its if row["pred"]), "asked": len(asked),
            "r0": asked and {"accuracy": sure / len(asked), "ci": wilson(sure, len(asked), level),
                             "letters": Counter(row["r0"]["pred"] for row in asked),
                             "nll": sum(row["r0"]["nll"] for row in asked) / len(asked)} or None}
    for name, against in (("own", "other"), ("own", "text_only"), ("own", "mean"), ("own", "random"),
                          ("cut", "cut_other"),
                          ("cut", "cut_none")):
        if name in every and against in every:
            result[f"{name}_minus_{against}"] = compare(every[name], every[against], groups, level)
    return result


def compare(ones: list[dict], others: list[dict], groups: dict[str, str], level: float) -> dict:
    """Return the paired difference of two conditions: parsed, by R0, and of the R0 likelihood of the right
    option (nats)."""
    def change(one: list[bool], two: list[bool], names: list[str]) -> dict:
        b, c = (sum(x and not y for x, y in zip(*pair)) for pair in ((two, one), (one, two)))
        return {"delta": (c - b) / len(one), "ci": paired_interval(two, one, names, level), "b": b, "c": c,
                "mcnemar_p": mcnemar_exact(b, c)}

    result = change([r["correct"] for r in ones], [r["correct"] for r in others],
                    [groups[r["id"]] for r in ones])
    both = [(x, y) for x, y in zip(ones, others) if x["r0"] and y["r0"]]
    names = [groups[x["id"]] for x, _ in both]
    if len(set(names)) > 1:
        right = [[r["r0"]["pred"] == r["gold"] for r in side] for side in zip(*both)]
        gain, low, high = robust_mean([y["r0"]["nll"] - x["r0"]["nll"] for x, y in both], names, level)
        result |= {"r0": change(*right, names), "r0_nats": {"delta": gain, "ci": (low, high)}}
    return result
