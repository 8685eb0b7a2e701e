"""A batch of items, clean and under every condition on their text imagination, from one reading of each
prompt.

A reply is cut after its last imagination, edited by a rung of `utils.intervene.text_conditions`, fed back as
the assistant's own beginning and continued. Beside the ladder: the directed edit made by an LLM
(`directed_llm`), the image hidden from what follows the imagination (`image_off`, `image_off_directed`, the
positive control), and the worlds of a mediation, in which the imagination is what a blank image brings about
(`swap_blank`) or a blank image has the item's own (`blank_x`).
"""
import random
from typing import NamedTuple

from PIL import Image

from utils.decode import State, decode, prefill_more
from utils.intervene.latent_batch import stem_attention
from utils.intervene.latent_case import NotPossible, why_no_prompt
from utils.intervene.latent_conditions import DO_X
from utils.intervene.prompts import Asking, Prompts, answer_fields, pick_donor, stem_of
from utils.intervene.text_conditions import LADDER, Context, direct_all, until_last_span
from utils.intervene.text_edits import NotEditable
from utils.latent_families import Generation
from utils.model_calls import Caller
from utils.option_scores import read_out
from utils.qwen import Qwen
from utils.spans import conclusion, find_spans, passages, put_spans

# name -> (rung of the ladder that makes the beginning, prompt, whether what follows sees the image)
BESIDE = {"image_off": ("sham", "own", False), "image_off_directed": ("directed", "own", False),
          "swap_blank": ("swap_blank", "own", True), "blank_x": ("sham", "blank", True),
          "blank": ("swap_blank", "blank", True),
          **{name: (None, kind, True) for name, kind in DO_X.items()}}
TEXT_CONDITIONS = {**{name: (name, "own", True) for name in (*LADDER, "directed_llm")}, **BESIDE}
TEXT_PRESETS = {"paper": ["sham", "directed"],
                "maps": ["sham", *(name for name in LADDER if name.startswith("truncate"))],
                "full": [name for name in TEXT_CONDITIONS if name not in ("x_region", "directed_llm")]}
TEXT_CONTROLS = ("sham",)  # change nothing but the tokens


class Beginning(NamedTuple):
    """The beginning of a reply that is to be continued: of a condition and the item at `place`, its text ("":
    none), how that was edited, and whether what follows sees the image."""

    condition: str
    place: int
    text: str
    edit: dict | None
    sees: bool


class TextBatch:
    """The runs of one batch; `records()` gives {condition: record} for each item."""

    def __init__(self, qwen: Qwen, asking: Asking, items: list[dict], images: list[list[Image.Image]],
                 edits: list[tuple[dict, list[Image.Image]] | None], editor: Caller | None = None):
        self.qwen, self.asking, self.items = qwen, asking, items
        self.editor = editor
        self.prompts = Prompts(qwen, asking, items, images, edits)
        everyone = list(range(len(items)))
        rows, _ = decode(qwen, self.prompts["own"][0].select(everyone), asking.max_new_tokens,
                         arms=[asking.arm(item) for item in items])
        self.clean = rows
        # not stripped: continued
        self.texts = [qwen.tokenizer.decode(row.ids, skip_special_tokens=True) for row in rows]
        self.spans = [find_spans(text) for text in self.texts]
        self.blank_spans: dict[int, list[str]] | None = None
        self.llm_edits: dict[int, tuple[str, dict] | NotEditable] | None = None

    def target(self, item: dict) -> str:
        """Return the letter of a wrong option, drawn by seed and item."""
        wrong = [letter for letter, _ in item["options"] if letter != item["answer"]["value"]]
        return random.Random(f"{self.asking.seed}/{item['id']}").choice(wrong)

    def blank_donors(self) -> dict[int, list[str]]:
        """Return what each item imagines under a blank image, its own words before the first imagination said
        first."""
        if self.blank_spans is None:
            places = [i for i in range(len(self.items)) if self.spans[i]]
            self.blank_spans = {}
            for its in self.asking.pieces(places):
                heads = [self.head(i) for i in its]
                state = prefill_more(self.qwen, self.prompts["blank"][0].select(its), heads)
                arms = [self.asking.arm(self.items[i]) for i in its]
                for i, head, row in zip(its, heads, decode(self.qwen, state, self.asking.max_new_tokens,
                                                           arms=arms)[0]):
                    text = self.qwen.tokenizer.decode(head + row.ids, skip_special_tokens=True)
                    self.blank_spans[i] = passages(text, find_spans(text))
        return self.blank_spans

    def edited(self) -> dict[int, tuple[str, dict] | NotEditable]:
        """Return what the LLM editor makes of each reply's beginning, asked for all at once."""
        if self.llm_edits is None:
            places = [i for i, its in enumerate(self.spans) if its]
            samples = [(until_last_span(self.texts[i], self.spans[i]), self.spans[i], self.items[i],
                        self.target(self.items[i]))
                       for i in places]
            self.llm_edits = dict(zip(places, direct_all(self.editor, samples)))
        return self.llm_edits

    def head(self, place: int) -> list[int]:
        """Return the clean ids up to the first imagination: no further than its mark, as a token may reach
        over that."""
        ids, start = self.clean[place].ids, self.spans[place][0][0]
        return ids[:max(n for n in range(1, len(ids) + 1)
                        if n == 1 or len(self.qwen.tokenizer.decode(ids[:n], skip_special_tokens=True))
                        <= start)]

    def ids(self, text: str) -> list[int]:
        return self.qwen.tokenizer(text, add_special_tokens=False).input_ids

    def columns(self, first: int, place: int, text: str) -> list[int]:
        """Return the cache's columns of an item's imaginations in `text`, its reply's beginning, read from
        column `first`."""
        offsets = self.qwen.tokenizer(text, add_special_tokens=False,
                                      return_offsets_mapping=True)["offset_mapping"]
        return [first + n for n, (low, high) in enumerate(offsets)
                if any(low < end and start < high for start, end in self.spans[place])]

    def beginning(self, rung: str, place: int) -> tuple[str, dict | None]:
        """Return a reply's edited beginning and the edit; NotEditable says why there is none."""
        item, text, spans = self.items[place], self.texts[place], self.spans[place]
        if not spans:
            raise NotEditable("no_span", "no imagination in the reply")
        text = until_last_span(text, spans)
        if rung == "directed_llm":
            if isinstance(found := self.edited()[place], NotEditable):
                raise found
            return found
        if rung == "swap_blank":  # also where it is the item's own: a world of the mediation, not an edit
            donor = self.blank_donors().get(place, [])
            if len(donor) < len(spans):
                raise NotEditable("no_donor",
                                  f"{len(donor)} imaginations under a blank image, expected {len(spans)}")
            return put_spans(text, spans, donor[:len(spans)]), {"before": passages(text, spans),
                                                                "after": donor[:len(spans)]}
        j = pick_donor("random", place, self.items, [i for i, its in enumerate(self.spans) if its])
        donor = None if j is None else passages(self.texts[j], self.spans[j])
        return LADDER[rung](text, spans, item, Context(self.target(item), donor, seed=self.asking.seed))

    def records(self, names: list[str]) -> list[dict[str, dict]]:
        result = [{"clean": self.describe_clean(i)} for i in range(len(self.items))]
        todo: dict[str, list[Beginning]] = {}
        for name in names:
            rung, kind, sees = TEXT_CONDITIONS[name]
            for i in range(len(self.items)):
                try:
                    if i not in self.prompts[kind][1]:
                        raise NotPossible(why_no_prompt(kind))
                    text, edit = ("", None) if rung is None else self.beginning(rung, i)
                    todo.setdefault(kind, []).append(Beginning(name, i, text, edit, sees))
                except (NotEditable, NotPossible) as fault:
                    result[i][name] = {"emitted": bool(self.spans[i]), "pred": None, "rule": None,
                                       "correct": False,
                                       "reason": fault.args[0], "target": self.target(self.items[i])}
        for kind, its in todo.items():
            for one, record in self.continued(kind, its):
                result[one.place][one.condition] = record
        for one, scores in self.scored_clean():
            result[one.place]["clean"] |= scores
        return result

    def read(self, kind: str, its: list[Beginning]) -> tuple[State, list[dict]]:
        """Feed beginnings, none of them empty, back; return the state behind them and how the options score
        there."""
        items, texts = [self.items[one.place] for one in its], [self.texts[one.place] for one in its]
        state = prefill_more(self.qwen, self.after_prompt(kind, its), [self.ids(one.text) for one in its])
        state.hide_images([n for n, one in enumerate(its) if not one.sees])
        stems = [stem_of(conclusion(text)) for text in texts]
        return state, read_out(self.qwen, state, items, self.asking.stem, stems, [[]] * len(its),
                               self.asking.options)

    def after_prompt(self, kind: str, its: list[Beginning]) -> State:
        state, having = self.prompts[kind]
        return state.select([having.index(one.place) for one in its])

    def continued(self, kind: str, todo: list[Beginning]) -> list[tuple[Beginning, dict]]:
        """Feed beginnings back, score the options behind them and go on; return each with its record."""
        done = []
        for some in self.asking.pieces(todo):
            for its in ([one for one in some if one.text], [one for one in some if not one.text]):
                if not its:
                    continue
                if its[0].text:
                    state, scores = self.read(kind, its)
                else:
                    state, scores = self.after_prompt(kind, its), [{"r0": None, "r1": None}] * len(its)
                arms = [self.asking.arm(self.items[one.place]) for one in its]
                rows = decode(self.qwen, state, self.asking.max_new_tokens, arms=arms)[0]
                done += [(one, found | self.describe(one, row)) for one, found, row in zip(its, scores, rows)]
        return done

    def scored_clean(self) -> list[tuple[Beginning, dict]]:
        """Return for each clean reply with an imagination how the options score behind it, and where the stem
        looks there."""
        heads = [Beginning("clean", i, until_last_span(self.texts[i], spans), None, True)
                 for i, spans in enumerate(self.spans) if spans]
        n_prompt, done = self.prompts["own"][0].mask.shape[1], []
        for its in self.asking.pieces(heads):
            state, scores = self.read("own", its)
            looks = stem_attention(self.qwen, state, [], self.asking.stem,
                                   [self.columns(n_prompt, one.place, one.text) for one in its])
            done += [(one, found | {"attention": look}) for one, found, look in zip(its, scores, looks)]
        return done

    def describe(self, one: Beginning, row: Generation) -> dict:
        place, text = one.place, one.text
        item, said = self.items[place], self.qwen.tokenizer.decode(row.ids, skip_special_tokens=True)
        last = said if text else conclusion(said)
        changed = said.strip() != (conclusion(self.texts[place]) if text
                                   else self.texts[place]).strip()
        return {"emitted": bool(self.spans[place] if text else find_spans(said)),
                "spans": self.spans[place],
                **answer_fields(item, text + said, last, row.ids, row.finish), "changed": changed,
                "edit": one.edit,
                "target": self.target(item), "ids": row.ids}

    def describe_clean(self, place: int) -> dict:
        row, text = self.clean[place], self.texts[place]
        return {"emitted": bool(self.spans[place]), "spans": self.spans[place], "r0": None, "r1": None,
                "attention": None, "ids": row.ids,
                **answer_fields(self.items[place], text, conclusion(text), row.ids, row.finish)}
