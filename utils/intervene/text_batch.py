"""A batch of items, clean and under every condition on their text imagination, from one reading of each
prompt.

A reply is cut after its last imagination, edited, fed back as the assistant's own beginning and continued.
"""
import random
from dataclasses import dataclass

from PIL import Image

from utils.decode import State, decode, prefill_more
from utils.intervene.latent_batch import stem_attention
from utils.intervene.latent_case import NotPossible, why_no_prompt
from utils.intervene.prompts import Prompt, Prompts, Settings, answer_fields, pick_donor, stem_of
from utils.intervene.text_conditions import EDITS, TEXT_CONDITIONS, Context, direct_all, until_last_span
from utils.intervene.text_edits import NotEditable
from utils.latent_families import Generation
from utils.model_calls import Caller
from utils.option_scores import read_out
from utils.qwen import Qwen
from utils.rows import conclusion, find_spans, passages, put_spans


@dataclass(frozen=True)
class Prefix:
    """The beginning of a reply to continue; an empty `text`: the whole reply is generated again."""

    condition: str
    place: int
    text: str = ""
    edit: dict | None = None
    sees_image: bool = True


class TextBatch:
    """The runs of one batch."""

    def __init__(self, qwen: Qwen, settings: Settings, items: list[dict], images: list[list[Image.Image]],
                 edits: list[Prompt | None], editor: Caller | None = None):
        self.qwen, self.settings, self.items, self.editor = qwen, settings, items, editor
        self.prompts = Prompts(qwen, settings, items, images, edits)
        everyone = list(range(len(items)))
        self.clean, _ = decode(qwen, self.prompts.select("own", everyone), settings.max_new_tokens,
                               arms=[settings.sampled(item) for item in items])
        self.texts = [self.text_of(row.ids) for row in self.clean]
        self.spans = [find_spans(text) for text in self.texts]
        self.emitters = [i for i in everyone if self.spans[i]]
        self.blank_spans: dict[int, list[str]] | None = None
        self.llm_edits: dict[int, tuple[str, dict] | NotEditable] | None = None

    def text_of(self, ids: list[int]) -> str:
        return self.qwen.tokenizer.decode(ids, skip_special_tokens=True)

    def target(self, item: dict) -> str:
        """Return the letter of a wrong option, drawn by seed and item."""
        wrong = [letter for letter, _ in item["options"] if letter != item["answer"]["value"]]
        return random.Random(f"{self.settings.seed}/{item['id']}").choice(wrong)

    # ---- edited beginnings
    def blank_donors(self) -> dict[int, list[str]]:
        """Return what each item imagines under a blank image, after its own words."""
        if self.blank_spans is None:
            self.blank_spans = {}
            for places in self.settings.pieces(self.emitters):
                heads = [self.head(i) for i in places]
                state = prefill_more(self.qwen, self.prompts.select("blank", places), heads)
                for i, head, row in zip(places, heads, self.continued(state, places)):
                    text = self.text_of(head + row.ids)
                    self.blank_spans[i] = passages(text, find_spans(text))
        return self.blank_spans

    def head(self, place: int) -> list[int]:
        """Return the clean ids up to the first imagination, without a token that reaches beyond its mark."""
        ids, start = self.clean[place].ids, self.spans[place][0][0]
        return ids[:max(n for n in range(1, len(ids) + 1) if n == 1 or len(self.text_of(ids[:n])) <= start)]

    def llm_edited(self, place: int) -> tuple[str, dict]:
        """Return the LLM's edit of a reply's beginning; all replies are sent at once."""
        if self.llm_edits is None:
            samples = [(until_last_span(self.texts[i], self.spans[i]), self.spans[i], self.items[i],
                        self.target(self.items[i])) for i in self.emitters]
            self.llm_edits = dict(zip(self.emitters, direct_all(self.editor, samples)))
        result = self.llm_edits[place]
        if isinstance(result, NotEditable):
            raise result
        return result

    def edited(self, edit: str, place: int) -> tuple[str, dict]:
        """Return a reply's edited beginning and the edit, or raise NotEditable."""
        text, spans = self.texts[place], self.spans[place]
        if not spans:
            raise NotEditable("no_span", "no imagination in the reply")
        text = until_last_span(text, spans)
        if edit == "directed_llm":
            return self.llm_edited(place)
        if edit == "swap_blank":  # even if it equals the item's own: a world of the mediation, not an edit
            donor = self.blank_donors()[place]
            if len(donor) < len(spans):
                raise NotEditable("no_donor",
                                  f"{len(donor)} imaginations under a blank image, expected {len(spans)}")
            after = donor[:len(spans)]
            return put_spans(text, spans, after), {"before": passages(text, spans), "after": after}
        j = pick_donor("random", place, self.items, self.emitters)
        donor = None if j is None else passages(self.texts[j], self.spans[j])
        item = self.items[place]
        return EDITS[edit](text, spans, item, Context(self.target(item), donor, seed=self.settings.seed))

    # ---- records
    def records(self, names: list[str]) -> list[dict[str, dict]]:
        """Return {condition: record} for each item, including "clean"."""
        result = [{"clean": self.describe_clean(i)} for i in range(len(self.items))]
        todo: dict[str, list[Prefix]] = {}  # by kind of prompt
        for name in names:
            condition = TEXT_CONDITIONS[name]
            for i in range(len(self.items)):
                try:
                    if i not in self.prompts.places(condition.prompt):
                        raise NotPossible(why_no_prompt(condition.prompt))
                    edited = self.edited(condition.edit, i) if condition.edit else ("", None)
                    prefix = Prefix(name, i, *edited, condition.sees_image)
                    todo.setdefault(condition.prompt, []).append(prefix)
                except (NotEditable, NotPossible) as fault:
                    result[i][name] = {"emitted": bool(self.spans[i]), "pred": None, "rule": None,
                                       "correct": False, "reason": fault.args[0],
                                       "target": self.target(self.items[i])}
        for kind, prefixes in todo.items():
            for piece in self.settings.pieces(prefixes):
                # those with a text first: only they are fed back and scored
                for part in ([p for p in piece if p.text], [p for p in piece if not p.text]):
                    for prefix, record in self.answered(kind, part):
                        result[prefix.place][prefix.condition] = record
        for place, scores in self.scored_clean():
            result[place]["clean"] |= scores
        return result

    def answered(self, kind: str, prefixes: list[Prefix]) -> list[tuple[Prefix, dict]]:
        """Continue prefixes, all with a text or all without one."""
        if not prefixes:
            return []
        places = [prefix.place for prefix in prefixes]
        if prefixes[0].text:
            state, scores = self.read(kind, prefixes)
        else:
            state, scores = self.prompts.select(kind, places), [{"r0": None, "r1": None}] * len(places)
        return [(prefix, score | self.describe(prefix, row))
                for prefix, score, row in zip(prefixes, scores, self.continued(state, places))]

    def read(self, kind: str, prefixes: list[Prefix]) -> tuple[State, list[dict]]:
        """Feed prefixes back; return the state behind them and how the options score there."""
        places = [prefix.place for prefix in prefixes]
        ids = [self.qwen.tokenizer(prefix.text, add_special_tokens=False).input_ids for prefix in prefixes]
        state = prefill_more(self.qwen, self.prompts.select(kind, places), ids)
        state.hide_images([n for n, prefix in enumerate(prefixes) if not prefix.sees_image])
        stems = [stem_of(conclusion(self.texts[i])) for i in places]
        return state, read_out(self.qwen, state, [self.items[i] for i in places], self.settings.stem, stems,
                               [[]] * len(places), self.settings.options)

    def continued(self, state: State, places: list[int]) -> list[Generation]:
        return decode(self.qwen, state, self.settings.max_new_tokens,
                      arms=[self.settings.sampled(self.items[i]) for i in places])[0]

    def scored_clean(self) -> list[tuple[int, dict]]:
        """Return (place, scores and attention of the stem) of the clean replies with an imagination."""
        n_prompt, done = self.prompts.read["own"][0].mask.shape[1], []
        for places in self.settings.pieces(self.emitters):
            prefixes = [Prefix("clean", i, until_last_span(self.texts[i], self.spans[i])) for i in places]
            state, scores = self.read("own", prefixes)
            columns = [self.columns(n_prompt, prefix) for prefix in prefixes]
            attention = stem_attention(self.qwen, state, [], self.settings.stem, columns)
            done += [(i, score | {"attention": look}) for i, score, look in zip(places, scores, attention)]
        return done

    def columns(self, first: int, prefix: Prefix) -> list[int]:
        """Return the cache's columns of an item's imaginations; its reply begins at column `first`."""
        offsets = self.qwen.tokenizer(prefix.text, add_special_tokens=False,
                                      return_offsets_mapping=True)["offset_mapping"]
        return [first + n for n, (low, high) in enumerate(offsets)
                if any(low < end and start < high for start, end in self.spans[prefix.place])]

    def describe(self, prefix: Prefix, row: Generation) -> dict:
        """Return the record of a continued reply, compared with the clean one from there on."""
        place, reply = prefix.place, self.text_of(row.ids)
        item, clean, spans = self.items[place], self.texts[place], self.spans[place]
        emitted, last, clean_words = ((spans, reply, conclusion(clean)) if prefix.text
                                      else (find_spans(reply), conclusion(reply), clean))
        return {"emitted": bool(emitted), "spans": spans,
                **answer_fields(item, prefix.text + reply, last, row.ids, row.finish),
                "changed": reply.strip() != clean_words.strip(), "edit": prefix.edit,
                "target": self.target(item), "ids": row.ids}

    def describe_clean(self, place: int) -> dict:
        row, text = self.clean[place], self.texts[place]
        return {"emitted": bool(self.spans[place]), "spans": self.spans[place], "r0": None, "r1": None,
                "attention": None, "ids": row.ids,
                **answer_fields(self.items[place], text, conclusion(text), row.ids, row.finish)}
