"""A batch of items, clean and under every condition on its latents, from one reading of each prompt.

The clean run captures what it feeds and what its layers read; donors' runs say the item's own words up to the latents; then
all conditions of all items decode side by side from copies of the prompts' caches (`State.take`).
"""
import torch
from PIL import Image

from utils.asking import Asking, Prompts, answer_fields, first_difference, pick_donor, stem_of
from utils.attention import stem_attention
from utils.cases import Case, Known, NotPossible, last_latent, likeliest, why_no_prompt
from utils.conditions import Condition, echo, find_condition
from utils.decode import Arm, State, clean_text, decode, rewind
from utils.families import Generation, LatentSpec, latent_ids
from utils.qwen import Qwen
from utils.readouts import read_out


class LatentBatch:
    """The runs of one batch; `records()` gives {condition: record} for each item."""

    def __init__(self, qwen: Qwen, spec: LatentSpec, known: Known | None, asking: Asking, items: list[dict],
                 images: list[list[Image.Image]], edits: list[tuple[dict, list[Image.Image]] | None]):
        self.qwen, self.spec, self.known, self.asking = qwen, spec, known, asking
        self.items, self.edits = items, edits
        self.start_id, self.pad_id, self.end_id = latent_ids(qwen.tokenizer, spec)
        self.prompts = Prompts(qwen, asking, items, images, edits)
        self.donors: dict[int, dict[str, tuple[dict | None, Generation]]] = {}
        self.donor_runs: dict[str, dict[int, Generation]] = {}
        self.clean: list[tuple[Generation, dict | None]] = []
        self.clean = self.decode("own", list(range(len(items))), [Arm()] * len(items))
        self.emitters = [i for i, (row, _) in enumerate(self.clean) if row.slots]

    def decode(self, kind: str, places: list[int], arms: list[Arm],
               at_most: int | None = None) -> list[tuple[Generation, dict | None]]:
        """Decode arms of items at `places`, at most `rows` side by side; return each run with its R0 scores (None without a
        segment). `at_most`: no more new ids than this, and no scores."""
        state, having = self.prompts[kind]
        done = []
        for some in self.asking.pieces(list(zip(places, arms))):
            its = [i for i, _ in some]
            begun = state.take([having.index(i) for i in its])
            their = [self.asking.arm(self.items[i], arm) for i, arm in some]
            rows, end = decode(self.qwen, begun, at_most or self.asking.max_new_tokens, self.spec, their, capture=True,
                               with_slots=True)
            done += zip(rows, self.read(begun, end, rows, its) if at_most is None else [None] * len(rows))
        return done

    def read(self, begun: State, end: State, rows: list[Generation], places: list[int]) -> list[dict | None]:
        """Score the options behind each row's last segment: R0 and, where the clean run boxed an answer, R1. Of the clean run
        also where R0's stem looks."""
        n_read = end.mask.shape[1] - begun.mask.shape[1]
        having = [k for k, row in enumerate(rows) if row.segments and last_latent(row) <= n_read]
        found = [None] * len(rows)
        if not having:
            return found
        back = rewind(end, begun, [last_latent(row) if k in having else 0 for k, row in enumerate(rows)]).take(having)
        items = [self.items[places[k]] for k in having]
        stems = [self.clean_stem(places[k], rows[k]) for k in having]
        scores = read_out(self.qwen, back, items, self.asking.stem, stems, [[self.end_id]] * len(having), self.asking.options)
        if not self.clean:
            n_prompt = begun.mask.shape[1]
            latents = [[n_prompt + s.start + j for s in rows[k].segments for j in range(s.size)] for k in having]
            looks = stem_attention(self.qwen, back, [self.end_id], self.asking.stem, latents)
            scores = [its | {"attention": look} for its, look in zip(scores, looks)]
        for k, its in zip(having, scores):
            found[k] = its
        return found

    def clean_stem(self, place: int, row: Generation) -> str | None:
        """Return what the item's clean run, `row` itself while there is none, said between its latents and its box."""
        clean = self.clean[place][0] if self.clean else row
        return stem_of(clean_text(self.qwen.tokenizer, clean.ids[last_latent(clean):], self.spec))

    # -------------------------------------------------------------------------------- conditions
    def case(self, place: int, needs: set[str]) -> Case:
        self.donors[place] = {kind: found for kind in needs if (found := self.donor(kind, place))}
        donors = {kind: run for kind, (_, run) in self.donors[place].items()}
        pad = self.qwen.model.get_input_embeddings().weight[self.pad_id]
        clean, scores = self.clean[place]
        return Case(self.items[place], clean, self.spec, pad, self.start_id, self.asking.seed, self.known, donors,
                    self.asking.pick(self.items[place]), scores and scores["attention"]["imagined"])

    def donor(self, kind: str, place: int) -> tuple[dict | None, Generation] | None:
        """Return the donor of a kind (None: the item itself, under a blank image) and its run; None if there is no donor."""
        if kind in ("blank", "counterfactual"):
            run = self.worlds(kind).get(place)
            return run and (self.edits[place][0] if kind == "counterfactual" else None, run)
        j = pick_donor(kind, place, self.items, self.emitters)
        return None if j is None else (self.items[j], self.clean[j][0])

    def worlds(self, kind: str) -> dict[int, Generation]:
        """Return the run of each emitter under another prompt, its own words said before the latents: Z(x')."""
        if kind not in self.donor_runs:
            places = [i for i in self.prompts[kind][1] if i in self.emitters]
            longest = max((last_latent(self.clean[i][0]) for i in places), default=0) + 1  # read the last latent too
            arms = [echo(self.clean[i][0], likeliest) for i in places]
            runs = self.decode(kind, places, arms, longest) if places else []
            self.donor_runs[kind] = {i: row for i, (row, _) in zip(places, runs)}
        return self.donor_runs[kind]

    def records(self, names: list[str]) -> list[dict[str, dict]]:
        """Return {condition: record} for each item, "clean" among them."""
        result = [{"clean": self.describe(i, *self.clean[i], None)} for i in range(len(self.items))]
        found = {name: find_condition(name) for name in names}
        needs = {kind for one, _ in found.values() for kind in one.needs}
        cases, todo = {i: self.case(i, needs) for i in self.emitters}, {}
        for name, (one, number) in found.items():
            for i in range(len(self.items)):
                if i not in cases and one.prompt == "own":  # nothing is fed, so nothing can change
                    result[i][name] = {**result[i]["clean"], "changed": False, "first_diff": None}
                    continue
                try:
                    if i not in cases:
                        raise NotPossible("no_latents")
                    if i not in self.prompts[one.prompt][1]:
                        raise NotPossible(why_no_prompt(one.prompt))
                    todo.setdefault(one.prompt, []).append((name, one, i, one.make(cases[i], number)))
                except NotPossible as fault:
                    result[i][name] = {"emitted": i in cases, "pred": None, "rule": None, "correct": False,
                                       "reason": str(fault)}
        for kind, its in todo.items():
            runs = self.decode(kind, [i for _, _, i, _ in its], [arm for *_, arm in its])
            for (name, one, i, _), (row, scores) in zip(its, runs):
                result[i][name] = self.describe(i, row, scores, one)
        return result

    def describe(self, place: int, row: Generation, scores: dict | None, one: Condition | None) -> dict:
        """Return the record of one run: what was fed and read, the answer after the last segment, how it differs from clean."""
        item, clean, tokenizer = self.items[place], self.clean[place][0], self.qwen.tokenizer
        places = [j for s in row.segments for j in range(s.start, s.start + s.size)]
        raw, fed = row.states[places].float(), row.fed.float()
        record = {"emitted": bool(places),
                  "segments": [{"start": s.start, "k": s.size, "closed_by": s.closed_by} for s in row.segments],
                  "n_fed": len(fed), "rel_change": float((fed - raw).norm() / raw.norm()) if places else None,
                  "norm_ratio": float(fed.norm(dim=1).median() / raw.norm(dim=1).median()) if places else None,
                  **answer_fields(item, clean_text(tokenizer, row.ids, self.spec),
                                  clean_text(tokenizer, row.ids[last_latent(row):], self.spec), row.ids, row.finish),
                  "r0": scores and scores["r0"], "r1": scores and scores["r1"], "ids": row.ids}
        if one is None:
            record["attention"] = scores and scores["attention"]
        else:
            both = min(len(row.slots), len(clean.slots))
            mine, its = (torch.stack(slots[:both]).float()[:, 1:] if both else torch.zeros(1)
                         for slots in (row.slots, clean.slots))
            first = first_difference(clean.ids, row.ids)
            record |= {"first_diff": first, "changed": first is not None, "reach": float((mine - its).abs().max())}
            for kind in one.needs:
                donor = self.donors[place][kind][0]
                record["donor"] = donor and {"item": donor["id"], "gold": donor["answer"]["value"]}
        return record
