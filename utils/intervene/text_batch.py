"""A batch of items, clean and under every condition on their text imagination; prompts are read once.

A reply is cut after its last imagination, edited, fed back as the assistant's own beginning and continued.
"""
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from PIL import Image

from utils.decode import State, decode, prefill_blocks
from utils.intervene.attention import stem_attention
from utils.intervene.edits import NotEditable, passages, put_spans
from utils.intervene.latent_case import NotPossible, why_no_prompt
from utils.intervene.prompts import (Prompt, Prompts, Settings, answer_fields, asked_fields, pick_donor,
                                     stem_of)
from utils.intervene.text_conditions import (EDITS, TEXT_CONDITIONS, Context, TextCondition, direct_all,
                                             until_last_span)
from utils.latent_families import Generation, Intervention
from utils.model_calls import Caller
from utils.qwen import Qwen
from utils.rows import CLOSE, OPEN, conclusion, find_spans

BEGINNING = "<think"  # of the opening mark; what completes it is forbidden, not every "<"
Forbid = Callable[[Generation, int], bool]


@dataclass(frozen=True)
class Prefix:
    """The beginning of a reply to continue; without an `edit` the whole reply is generated again."""

    name: str
    condition: TextCondition
    place: int
    text: str = ""
    edit: dict | None = None


# ---- imagining again
def begins_span(before: str, after: str) -> bool:
    """Return whether the words added to `before` make an opening mark, or bring one to BEGINNING."""
    ends = ((start, after[start:start + len(OPEN)]) for start in range(max(0, len(before) - len(OPEN) + 1),
                                                                       len(after)))
    return any(OPEN.startswith(piece) and len(piece) >= len(BEGINNING) and start + len(piece) > len(before)
               for start, piece in ends)


def imagines_after(before: str, said: str) -> bool:
    """Return whether what was `said` after `before` opens or closes an imagination before its box."""
    text = before + said
    boxed = text.find("\\boxed", len(before))
    end = len(text) if boxed < 0 else boxed
    return any(text.find(mark, max(0, len(before) - len(mark) + 1), end) >= 0 for mark in (OPEN, CLOSE))


class TextBatch:
    """The runs of one batch."""

    def __init__(self, qwen: Qwen, settings: Settings, items: list[dict], images: list[list[Image.Image]],
                 others: list[dict[str, Prompt]], editor: Caller | None = None):
        self.qwen, self.settings, self.items, self.editor = qwen, settings, items, editor
        self.prompts = Prompts(qwen, settings, items, images, others)
        everyone = list(range(len(items)))
        self.clean, _ = decode(qwen, self.prompts.select("own", everyone), settings.max_new_tokens,
                               arms=[settings.sampled(item) for item in items])
        self.texts = [self.text_of(row.ids) for row in self.clean]
        self.spans = [find_spans(text) for text in self.texts]
        self.emitters = [i for i in everyone if self.spans[i]]
        self.other_spans: dict[str, dict[int, list[str]]] = {}  # by kind of prompt and place
        self.llm_edits: dict[int, tuple[str, dict] | NotEditable] | None = None

    def text_of(self, ids: list[int]) -> str:
        return self.qwen.tokenizer.decode(ids, skip_special_tokens=True)

    def target(self, item: dict, edit: str | None = None) -> str:
        """Return the letter of a wrong option, drawn by seed and item; for swap_counterfactual the edit's."""
        if edit == "swap_counterfactual" and item.get("counterfactual"):
            return item["counterfactual"]["answer"]["value"]
        wrong = [letter for letter, _ in item["options"] if letter != item["answer"]["value"]]
        return random.Random(f"{self.settings.seed}/{item['id']}").choice(wrong)

    # ---- edited beginnings
    def imagined_under(self, kind: str) -> dict[int, list[str]]:
        """Return what each item imagines under a "blank" or its "counterfactual" image, after its own words.
        """
        if kind not in self.other_spans:
            self.other_spans[kind] = {}
            able = self.prompts.places(kind)
            for places in self.settings.pieces([i for i in self.emitters if i in able]):
                heads = [self.head(i) for i in places]
                state = prefill_blocks(self.qwen, self.prompts.select(kind, places), heads)[1]
                for i, head, row in zip(places, heads, self.continued(state, places)):
                    text = self.text_of(head + row.ids)
                    self.other_spans[kind][i] = passages(text, find_spans(text))
        return self.other_spans[kind]

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
        if edit.startswith("swap_"):  # what is imagined under another image, even if it equals the own
            donor = self.imagined_under(edit.removeprefix("swap_")).get(place, [])
            if len(donor) < len(spans):
                raise NotEditable("no_donor", f"{len(donor)} imaginations under another image, expected "
                                              f"{len(spans)}")
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
                    todo.setdefault(condition.prompt, []).append(Prefix(name, condition, i, *edited))
                except (NotEditable, NotPossible) as fault:
                    result[i][name] = {"emitted": bool(self.spans[i]), "pred": None, "rule": None,
                                       "correct": False, "reason": fault.args[0],
                                       "target": (self.target(self.items[i], condition.edit)
                                                  if condition.edit else None)}
        for kind, prefixes in todo.items():
            for piece in self.settings.pieces(prefixes):
                for prefix, record in self.answered(kind, piece):
                    result[prefix.place][prefix.name] = record
                    if prefix.edit is None:
                        record |= asked_fields(self.prompts.asked(kind, prefix.place),
                                               self.items[prefix.place], result[prefix.place]["clean"],
                                               record)
        for place, scores in self.scored_clean():
            result[place]["clean"] |= scores
        return result

    def answered(self, kind: str, prefixes: list[Prefix]) -> Iterator[tuple[Prefix, dict]]:
        """Continue prefixes. Those without a text are not fed back, those without an edit not scored."""
        parts: dict[tuple[bool, bool], list[Prefix]] = {}
        for prefix in prefixes:
            parts.setdefault((prefix.text == "", prefix.edit is None), []).append(prefix)
        for (empty, free), part in parts.items():
            places = [prefix.place for prefix in part]
            state = self.prompts.select(kind, places) if empty else self.read(
                kind, places, [prefix.text for prefix in part])
            state.hide_images([n for n, prefix in enumerate(part) if not prefix.condition.sees_image])
            scores = [{"r0": None, "r1": None}] * len(part) if free else self.scores(state, kind, places)
            banned = [self.no_more_spans(prefix.text) if prefix.condition.again == "forbidden" else None
                      for prefix in part]
            for prefix, score, row in zip(part, scores, self.continued(state, places, banned)):
                yield prefix, score | self.describe(kind, prefix, row)

    def read(self, kind: str, places: list[int], texts: list[str]) -> State:
        """Feed beginnings of replies back; return the state behind them."""
        ids = self.qwen.tokenizer(texts, add_special_tokens=False).input_ids
        return prefill_blocks(self.qwen, self.prompts.select(kind, places), ids)[1]

    def words(self, place: int) -> str | None:
        """Return the words between the clean run's last imagination and its box, with that opened."""
        return stem_of(conclusion(self.texts[place]))

    def scores(self, state: State, kind: str, places: list[int]) -> list[dict]:
        return self.prompts.read_out(state, kind, places, list(map(self.words, places)), [])

    def no_more_spans(self, before: str) -> Forbid:
        """Forbid what would open an imagination in the words that follow `before`."""
        def forbid(row: Generation, token: int) -> bool:
            recent = row.ids[-2 * len(OPEN):]  # a token without a character is not a word
            said, more = self.text_of(recent), self.text_of([*recent, token])
            return begins_span(before + said, before + more)
        return forbid

    def continued(self, state: State, places: list[int],
                  banned: list[Forbid | None] | None = None) -> list[Generation]:
        arms = [self.settings.sampled(self.items[i], Intervention(forbid=forbid))
                for i, forbid in zip(places, banned or [None] * len(places), strict=True)]
        return decode(self.qwen, state, self.settings.max_new_tokens, arms=arms)[0]

    def scored_clean(self) -> list[tuple[int, dict]]:
        """Return (place, scores or attention of the stem) of the clean replies with an imagination."""
        n_prompt, done = self.prompts.read["own"][0].mask.shape[1], []
        for places in self.settings.pieces(self.emitters):
            texts = [until_last_span(self.texts[i], self.spans[i]) for i in places]
            state = self.read("own", places, texts)
            done += zip(places, self.scores(state, "own", places))
            stems = {n: stem for n, i in enumerate(places) if (stem := self.settings.stem or self.words(i))}
            if stems:
                columns = [self.columns(n_prompt, places[n], texts[n]) for n in stems]
                looks = stem_attention(self.qwen, state.select(list(stems)), [], list(stems.values()),
                                       columns)
                done += [(places[n], {"attention": look}) for n, look in zip(stems, looks)]
        return done

    def columns(self, first: int, place: int, text: str) -> list[int]:
        """Return the cache's columns of the imaginations in a reply that begins at column `first`."""
        offsets = self.qwen.tokenizer(text, add_special_tokens=False,
                                      return_offsets_mapping=True)["offset_mapping"]
        return [first + n for n, (low, high) in enumerate(offsets)
                if any(low < end and start < high for start, end in self.spans[place])]

    def describe(self, kind: str, prefix: Prefix, row: Generation) -> dict:
        """Return the record of a continued reply, compared with the clean one from there on."""
        place, said, again = prefix.place, self.text_of(row.ids), prefix.condition.again
        item, clean, spans = self.items[place], self.texts[place], find_spans(prefix.text + said)
        clean_words = clean if prefix.edit is None else conclusion(clean)
        undone = {"own": None, "cannot": False}.get(again, imagines_after(prefix.text, said))
        return {"emitted": bool(spans), "spans": spans, "again": undone,
                "n_forbidden": row.n_forbidden if again == "forbidden" else None,
                **answer_fields(self.prompts.asked(kind, place).item, prefix.text + said, conclusion(said),
                                row.ids, row.finish),
                "changed": said.strip() != clean_words.strip(), "edit": prefix.edit,
                "target": self.target(item, prefix.condition.edit) if prefix.edit else None, "ids": row.ids}

    def describe_clean(self, place: int) -> dict:
        row, text = self.clean[place], self.texts[place]
        return {"emitted": bool(self.spans[place]), "spans": self.spans[place], "again": None,
                "n_forbidden": None, "r0": None, "r1": None, "attention": None, "ids": row.ids,
                **answer_fields(self.items[place], text, conclusion(text), row.ids, row.finish)}
