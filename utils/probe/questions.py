"""Answer questions about an image from the imagination alone, in ways that differ only in what is given.

    tokens_only: a prompt without the image; the imagination begins the reply
      image      the image alone                      image_own   the image and the imagination
      text_only  neither                              own         the imagination of the source
      other      that of an item with another image   mean        the mean latent of every step, over the
      random     noise with the lengths of the                    other half of the images
                 source's own latents

    cut: the source's own prompt is read and decoded up to the imagination; then the image and every later
    token except the imagination are hidden, and the question follows as a new turn
      cut        the source's own                     cut_other   another item's
      cut_none   the source's own, with the imagination hidden too (only the distance shows its length)

A text imagination has no mean and no noise; when cut, its words keep the states computed with the image in
view. R0 scores each option behind one stem; the free reply is parsed. A reader, another model, is given the
words, or latents of its own size, but never what is cut: those are states of the model that read the image.
"""
import argparse
import hashlib
import random
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import torch

from utils.answers import extract_choice
from utils.decode import State, decode, prefill, prefill_blocks, truncate_cache
from utils.items import blind_turn, group_of, open_images, prompt_of
from utils.jsonl import DataError
from utils.latent_families import Generation, LatentSpec, clean_text, last_latent, latent_ids, latent_steps
from utils.means import robust_mean, sign_flip
from utils.option_scores import describe_scores, score_options
from utils.probe.similarity import LEVEL, draw_halves
from utils.probe.states import States, batched, embed_prompt, find_steps
from utils.qwen import Qwen, encode
from utils.rows import CLOSE, conclusion, mark
from utils.stats import chance, paired_interval, share_interval

TOKENS_ONLY = ("image", "image_own", "text_only", "own", "other")
LATENT_ONLY = ("mean", "random")
CUT = ("cut", "cut_other", "cut_none")
COMPARED = (("own", "other"), ("own", "text_only"), ("own", "mean"), ("own", "random"), ("cut", "cut_other"),
            ("cut", "cut_none"))


def list_conditions(spec: LatentSpec | None, variants: list[str]) -> list[str]:
    names = [*TOKENS_ONLY, *(LATENT_ONLY if spec else ())] if "tokens_only" in variants else []
    return [*names, *(CUT if "cut" in variants else ())]


def rotations(probe: dict) -> list[dict]:
    """Return a question once per rotation of its options."""
    letters, texts = zip(*probe["options"])
    gold = letters.index(probe["answer"]["value"])
    return [{**probe, "id": f"{probe['id']}#{k}",
             "options": [list(pair) for pair in zip(letters, texts[k:] + texts[:k])],
             "answer": {**probe["answer"], "value": letters[(gold - k) % len(letters)]}}
            for k in range(len(letters))]


def derange(probes: list[dict], groups: dict[str, str], seed: int) -> dict[str, str]:
    """Return a donor for every probe id: the source of a probe from another group."""
    order = list(probes)
    random.Random(seed).shuffle(order)
    order.sort(key=lambda probe: groups[probe["source"]])
    shift = max(Counter(groups[probe["source"]] for probe in probes).values())
    if 2 * shift > len(order):
        raise DataError(f"--probe_items: {shift} of {len(order)} usable probe items have one image; expected "
                        "at most half, to give each another image's imagination")
    return {probe["id"]: donor["source"] for probe, donor in zip(order, order[shift:] + order[:shift])}


def held_out_means(latents: list[np.ndarray], groups: list[str], seed: int) -> dict[str, np.ndarray]:
    """Return for every group (of two or more) the mean latents [k, hidden] of the other half of the groups: a
    mean over its own would contain some of them. `latents`: [k of the source, hidden]."""
    names, means = sorted(set(groups)), []
    half_of = dict(zip(names, draw_halves(len(names), seed)))
    for half in (0, 1):
        fitted = [own for own, group in zip(latents, groups) if half_of[group] != half]
        means.append(np.stack([np.mean([own[step] for own in fitted if len(own) > step], axis=0)
                               for step in range(max(map(len, fitted)))]))
    return {name: means[half] for name, half in half_of.items()}


def beginning(spec: LatentSpec | None, imagination: str | None, n_latents: int) -> str:
    """Return the text of a reply that begins with an imagination, with pads where latents go."""
    if spec is None:
        return mark(imagination)
    start = "" if spec.overwrite_start else spec.start  # the first latent may replace the start token
    return start + spec.pad * n_latents + (spec.end if spec.force_end else "")


@dataclass
class Asked:
    """Prompts that were read, the ids of each row before R0's stem, and the places in the batch of the
    questions asked."""

    state: State | None
    forced_ids: list[list[int]]
    places: list[int]


class Prober:
    """Asks probe questions about `items` (by id) whose states are in `store`."""

    def __init__(self, qwen: Qwen, spec: LatentSpec | None, items: dict[str, dict], store: States,
                 args: argparse.Namespace):
        self.qwen, self.spec, self.items, self.store, self.args = qwen, spec, items, store, args
        self.groups = {name: group_of(item) for name, item in items.items()}
        self.means: dict[str, np.ndarray] = {}  # by group
        if spec is not None:
            self.check_size()

    def prompt(self, item: dict, n_images: int, blind: bool = False) -> str:
        return prompt_of(self.qwen.tokenizer, item, n_images, self.args.system, self.args.suffix, blind)

    def check_size(self) -> None:
        """Raise DataError unless the model can be fed the latents of the store."""
        name, hidden = self.args.reader or self.args.model, self.qwen.model.config.text_config.hidden_size
        if self.spec.slots and "tokens_only" in self.args.variants:
            raise DataError(f"--variants tokens_only: {self.spec.name} feeds nothing back, so no latents can "
                            "begin a reply; use --variants cut")
        try:
            latent_ids(self.qwen.tokenizer, self.spec)
        except DataError as error:
            raise DataError(f"{name}: cannot be given latents of {self.spec.name}: {error}") from error
        for record in self.store.records.values():
            width = record["tensors"].get("latent", [0, hidden])[1]
            if width != hidden:
                raise DataError(f"{name}: states of {hidden} numbers, but the latents of {self.args.model} "
                                f"have {width}; expected a --reader of the same hidden size")

    def ask(self, probes: list[dict], names: list[str]) -> list[dict]:
        """Ask every question in every way; return the rows of answers.jsonl."""
        donors, rows = derange(probes, self.groups, self.args.seed), []
        if "mean" in names:
            sources = sorted({probe["source"] for probe in probes})
            self.means = held_out_means(list(map(self.store.first_latents, sources)),
                                        [self.groups[source] for source in sources], self.args.seed)
        for name in names:
            for batch in batched(probes, self.args.batch_size, name):
                sources = [donors[p["id"]] if name in ("other", "cut_other") else p["source"] for p in batch]
                asked = self.cut(batch, sources, name) if name in CUT else self.begin(batch, sources, name)
                answers = self.answer([batch[i] for i in asked.places], asked) if asked.places else []
                answer_of = dict(zip(asked.places, answers))
                rows += [self.row(probe, name, source, *answer_of.get(i, (None, None)))
                         for i, (probe, source) in enumerate(zip(batch, sources))]
        return rows

    def answer(self, probes: list[dict], asked: Asked) -> list[tuple[dict, Generation]]:
        scores = score_options(self.qwen, asked.state, probes, [self.args.stem] * len(probes),
                               asked.forced_ids, self.args.options)
        spec = self.spec and replace(self.spec, force_start=False)  # what was given comes in its place
        replies = decode(self.qwen, asked.state, self.args.max_new_tokens, spec)[0]
        return list(zip(scores, replies))

    def begin(self, batch: list[dict], sources: list[str], name: str) -> Asked:
        spec, latents = self.spec, None
        shows = name in ("image", "image_own")
        items = [self.items[probe["source"]] for probe in batch]
        images = [open_images(item, item["root"]) if shows else [] for item in items]
        prompts = [self.prompt(probe, len(pictures), not shows) for probe, pictures in zip(batch, images)]
        forced_ids = [[] for _ in batch]
        if name not in ("image", "text_only"):
            if spec:
                latents = [self.given(name, probe, source) for probe, source in zip(batch, sources)]
                end = [] if spec.force_end else [latent_ids(self.qwen.tokenizer, spec).end]
                forced_ids = [end] * len(batch)
            for i, source in enumerate(sources):
                text = self.store.records[source]["imagination"]
                prompts[i] += beginning(spec, text, len(latents[i]) if spec else 0)
        inputs = encode(self.qwen, prompts, images)
        if latents:
            inputs["inputs_embeds"] = embed_prompt(self.qwen, inputs, spec, latents)
        return Asked(prefill(self.qwen, inputs), forced_ids, list(range(len(batch))))

    def given(self, name: str, probe: dict, donor: str) -> torch.Tensor:
        """Return the latents [k, hidden] that begin the reply."""
        own = self.store.first_latents(donor if name == "other" else probe["source"])
        if name == "mean":
            own = self.means[self.groups[probe["source"]]][:len(own)]
        if name == "random":
            seed = hashlib.sha256(f"{self.args.seed}/{probe['source']}".encode()).digest()
            noise = np.random.default_rng(list(seed[:8])).normal(size=own.shape)
            lengths, own_lengths = (np.linalg.norm(x, axis=1, keepdims=True) for x in (noise, own))
            own = noise / lengths * own_lengths
        return torch.tensor(own, dtype=torch.float32, device=self.qwen.device)

    def cut(self, batch: list[dict], sources: list[str], name: str) -> Asked:
        """Decode the sources' prompts, hide what has seen the image, and ask where something was imagined."""
        qwen, args, items = self.qwen, self.args, [self.items[source] for source in sources]
        images = [open_images(item, item["root"]) for item in items]
        prompts = [self.prompt(item, len(pictures)) for item, pictures in zip(items, images)]
        begun = prefill(qwen, encode(qwen, prompts, images))
        replies, end = decode(qwen, begun.select(list(range(len(batch)))), args.max_new_tokens, self.spec)
        first = begun.mask.shape[1]
        steps = [self.imagined_steps(reply) for reply in replies]
        places = [i for i, own in enumerate(steps) if own and own[-1] < end.mask.shape[1] - first]
        if not places:
            return Asked(None, [], [])
        kept = [steps[i][-1] + 1 if i in places else 0 for i in range(len(batch))]
        state = truncate_cache(end, begun, kept)
        state.hide_all_but({i: [first + step for step in steps[i] if name != "cut_none"] for i in places})
        blocks = [self.question_ids(batch[i]) for i in places]
        return Asked(prefill_blocks(qwen, state.select(places), blocks)[1], [[] for _ in places], places)

    def imagined_steps(self, reply: Generation) -> list[int]:
        """Return the steps of all latents of a reply, or of its first text imagination."""
        if self.spec:
            return latent_steps(reply)
        return imagined.steps if (imagined := find_steps(self.qwen, None, reply)) else []

    def question_ids(self, probe: dict) -> list[int]:
        """Return the ids that close an imagination and ask a question as a new turn."""
        tokenizer = self.qwen.tokenizer
        closing, turn = tokenizer([CLOSE, blind_turn(tokenizer, probe, self.args.system, self.args.suffix)],
                                  add_special_tokens=False).input_ids
        end = latent_ids(tokenizer, self.spec).end if self.spec else None
        return ([] if self.spec and end is None else [end] if self.spec else closing) + turn

    def row(self, probe: dict, name: str, donor: str, scores: dict | None, reply: Generation | None) -> dict:
        gold = probe["answer"]["value"]
        row = {"id": probe["id"], "source": probe["source"],
               "donor": None if name in ("image", "text_only") else donor, "condition": name, "gold": gold,
               "pred": None, "rule": "not_asked", "correct": False, "text": "", "r0": None}
        if reply is not None:
            choice = extract_choice(self.conclusion(reply), dict(probe["options"]), reply.finish)
            row |= {"pred": choice.letter, "rule": choice.rule, "correct": choice.letter == gold,
                    "text": clean_text(self.qwen.tokenizer, reply.ids, self.spec),
                    "r0": describe_scores(scores, gold)}
        return row

    def conclusion(self, reply: Generation) -> str:
        if self.spec is None:
            return conclusion(self.qwen.tokenizer.decode(reply.ids, skip_special_tokens=True)).strip()
        return clean_text(self.qwen.tokenizer, reply.ids[last_latent(reply):], self.spec)


# ---- scores
def score(rows: list[dict], probes: list[dict], groups: dict[str, str]) -> dict:
    """Return accuracy by condition and the gain of the own imagination. `groups`: image of every probe id;
    all intervals and p values let the questions about one image vary together."""
    n, by_condition = len(probes), {}
    for row in rows:
        by_condition.setdefault(row["condition"], []).append(row)
    letters = Counter(p["answer"]["value"] for p in probes)
    result = {"n": n, "images": len({groups[p["id"]] for p in probes}),
              "chance": chance([len(p["options"]) for p in probes]), "gold_letters": letters,
              "conditions": {name: score_condition(own, groups) for name, own in by_condition.items()}}
    for name, against in COMPARED:
        if name in by_condition and against in by_condition:
            result[f"{name}_minus_{against}"] = compare_conditions(by_condition[name], by_condition[against],
                                                                   groups)
    return result


def score_condition(rows: list[dict], groups: dict[str, str]) -> dict:
    """Return the accuracy of one condition; questions that could not be asked count as wrong."""
    asked = [row for row in rows if row["r0"]]
    entry = {"correct": sum(row["correct"] for row in rows),
             **share([row["correct"] for row in rows], [groups[row["id"]] for row in rows]),
             "parsed": sum(row["pred"] is not None for row in rows) / len(rows),
             "asked": len(asked), "r0": None}
    if asked:
        right = [row["r0"]["pred"] == row["gold"] for row in asked]
        entry["r0"] = {**share(right, [groups[row["id"]] for row in asked]),
                       "nll": sum(row["r0"]["nll"] for row in asked) / len(asked)}
    return entry


def share(right: list[bool], names: list[str]) -> dict:
    return {"accuracy": sum(right) / len(right), "ci": share_interval(right, names, LEVEL)}


def compare_conditions(rows: list[dict], against: list[dict], groups: dict[str, str]) -> dict:
    """Return the paired difference of two conditions: parsed, by R0, and in nats."""
    result = paired_change([r["correct"] for r in rows], [r["correct"] for r in against],
                           [groups[r["id"]] for r in rows])
    both = [(x, y) for x, y in zip(rows, against) if x["r0"] and y["r0"]]
    names = [groups[x["id"]] for x, _ in both]
    if len(set(names)) > 1:
        right = [[r["r0"]["pred"] == r["gold"] for r in side] for side in zip(*both)]
        gain, low, high = robust_mean([y["r0"]["nll"] - x["r0"]["nll"] for x, y in both], names, LEVEL)
        result |= {"r0": paired_change(*right, names), "r0_nats": {"delta": gain, "ci": (low, high)}}
    return result


def paired_change(right: list[bool], right_against: list[bool], names: list[str]) -> dict:
    changes = [int(x) - int(y) for x, y in zip(right, right_against)]
    return {"delta": sum(changes) / len(changes), "ci": paired_interval(right_against, right, names, LEVEL),
            "b": changes.count(-1), "c": changes.count(1), "p": sign_flip(changes, names)}
