"""A batch of items, clean and under every condition on its latents, from one reading of each prompt.

The clean run captures what it feeds and what its layers read. All conditions of all items then decode side by
side from copies of the prompts' caches.
"""
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from tqdm import tqdm

from utils.decode import State, decode, prefill_blocks, truncate_cache
from utils.intervene.attention import stem_attention
from utils.intervene.latent_case import (Calibration, Case, Condition, NotPossible, forced_prefix, go_on,
                                         imagines_again, joined, likeliest, places_of, why_no_prompt)
from utils.intervene.latent_conditions import CONTROLS, DO_X, find_condition
from utils.intervene.prompts import (Prompt, Prompts, Settings, answer_fields, asked_fields, donor_fields,
                                     first_difference, pick_donor, stem_of)
from utils.items import blind_turn, open_images
from utils.jsonl import DataError, replace_file
from utils.latent_families import (Generation, Intervention, LatentSpec, clean_text, last_latent, latent_ids,
                                   latent_steps, pool_features)
from utils.qwen import Qwen, image_features, process_images


# ---- calibration
def calibrate(path: Path, qwen: Qwen, spec: LatentSpec, settings: Settings, items: list[dict],
              image_root: str, batch_size: int) -> Calibration | None:
    """Return the statistics of these items' latents, kept at `path`; None if they emit none."""
    if not path.exists():
        rows = []
        for first in tqdm(range(0, len(items), batch_size), desc="calibration"):
            batch = items[first:first + batch_size]
            images = [open_images(item, image_root) for item in batch]
            prompts = Prompts(qwen, settings, batch, images, [{}] * len(batch))
            state = prompts.select("own", list(range(len(batch))))
            rows += decode(qwen, state, settings.max_new_tokens, spec, capture=True, with_slots=True)[0]
        calibration = Calibration.from_runs(rows)
        tensors = {name: torch.as_tensor(value).clone()
                   for name, value in (vars(calibration) if calibration else {}).items()}
        data = save(tensors)
        replace_file(path, lambda file: file.write(data), "wb")
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path}: damaged ({error}); remove it, and it is computed again") from error
    return Calibration(**{**tensors, "n_latents": int(tensors["n_latents"])}) if tensors else None


def keep_ids(case: Case, intervention: Intervention, is_control: bool) -> Intervention:
    """Return the intervention with the clean run's ids up to its last latent and no latent after it, since
    other embeddings lead to other slots. NotPossible for a feed that gives back what the run fed."""
    if intervention.feed and not is_control and all(
            torch.allclose(intervention.feed(z, *place), z, rtol=1e-5)
            for z, place in zip(case.clean.fed, places_of(case.clean))):
        raise NotPossible("same_vectors")
    n, more = last_latent(case.clean), case.slots | {case.start_id}
    kept = intervention if intervention.choose else forced_prefix(case.clean, case.pick, intervention)
    return replace(kept, forbid=lambda row, token: token in more and len(row.ids) >= n)


# ---- a batch
class Decoded(NamedTuple):
    """A run and how the options score behind its last segment."""

    row: Generation
    scores: dict | None


class Planned(NamedTuple):
    """A condition that applies to the item at `place`, and what it does there."""

    name: str
    condition: Condition | None  # None: the clean run
    place: int
    intervention: Intervention


class LatentBatch:
    """The runs of one batch."""

    def __init__(self, qwen: Qwen, spec: LatentSpec, calibration: Calibration | None, settings: Settings,
                 items: list[dict], images: list[list[Image.Image]], others: list[dict[str, Prompt]]):
        self.qwen, self.spec, self.calibration, self.settings = qwen, spec, calibration, settings
        self.items, self.others = items, others
        self.start_id, self.pad_id, self.end_id, self.slots, *_ = latent_ids(qwen.tokenizer, spec)
        self.closing = [] if self.end_id is None else [self.end_id]  # before R0's stem
        self.prompts = Prompts(qwen, settings, items, images, others)
        # place -> kind -> (the donor's item, its run)
        self.donors: dict[int, dict[str, tuple[dict | None, Generation]]] = {}
        self.other_worlds: dict[str, dict[int, Generation]] = {}  # kind of prompt -> place -> run
        self.clean: list[Decoded] = []
        self.clean = self.decode("own", list(range(len(items))), [Intervention()] * len(items))
        self.emitters = [i for i, (row, _) in enumerate(self.clean) if row.slots]

    def decode(self, kind: str, places: list[int], interventions: list[Intervention],
               at_most: int | None = None, strict: bool = False) -> list[Decoded]:
        """Decode interventions on the items at `places`; `at_most` new ids, then without scores, or `strict`
        from there on."""
        done = []
        for piece in self.settings.pieces(list(zip(places, interventions))):
            here = [place for place, _ in piece]
            begun = self.prompts.select(kind, here)
            sampled = [self.settings.sampled(self.items[place], own) for place, own in piece]
            rows, end = decode(self.qwen, begun, at_most or self.settings.max_new_tokens, self.spec, sampled,
                               capture=True, with_slots=True)
            if strict:
                done += self.ask_again(kind, begun, end, rows, here)
                continue
            scores = self.read(kind, begun, end, rows, here) if at_most is None else [None] * len(rows)
            done += map(Decoded, rows, scores)
        return done

    def ask_again(self, kind: str, begun: State, end: State, rows: list[Generation],
                  places: list[int]) -> list[Decoded]:
        """Return the runs after their last latent, the question read again over the latents alone: all else
        that has read the image is hidden from it and from what follows."""
        tokenizer, settings, n_prompt = self.qwen.tokenizer, self.settings, begun.mask.shape[1]
        state = truncate_cache(end, begun, list(map(last_latent, rows)))
        state.hide_all_but({k: [n_prompt + step for step in latent_steps(row)] for k, row in enumerate(rows)})
        turns = [blind_turn(tokenizer, self.prompts.asked(kind, place).item, settings.system, settings.suffix)
                 for place in places]
        state = prefill_blocks(self.qwen, state, tokenizer(turns, add_special_tokens=False).input_ids)[1]
        scores = self.prompts.read_out(state, kind, places, list(map(self.clean_stem, places, rows)),
                                       self.closing)
        again = self.slots and self.slots | {self.start_id}
        after = [go_on(self.clean[i].row, self.spec, settings.pick(self.items[i]), again) for i in places]
        rest, _ = decode(self.qwen, state, settings.max_new_tokens, self.spec, after, capture=True,
                         with_slots=True)
        return list(map(Decoded, map(joined, rows, rest), scores))

    def read(self, kind: str, begun: State, end: State, rows: list[Generation],
             places: list[int]) -> list[dict | None]:
        """Score the options behind each row's last segment: R0 and R1; for the clean run also the attention
        of R0's stem."""
        n_read = end.mask.shape[1] - begun.mask.shape[1]
        scored = [k for k, row in enumerate(rows) if row.segments and last_latent(row) <= n_read]
        if not scored:
            return [None] * len(rows)
        kept = [last_latent(row) if k in scored else 0 for k, row in enumerate(rows)]
        state = truncate_cache(end, begun, kept).select(scored)
        words = [self.clean_stem(places[k], rows[k]) for k in scored]
        scores = self.prompts.read_out(state, kind, [places[k] for k in scored], words, self.closing)
        if not self.clean:
            latents = [[begun.mask.shape[1] + step for step in latent_steps(rows[k])] for k in scored]
            looks = stem_attention(self.qwen, state, self.closing, [self.settings.stem] * len(scored),
                                   latents)
            scores = [row | {"attention": look} for row, look in zip(scores, looks)]
        by_row = dict(zip(scored, scores))
        return [by_row.get(k) for k in range(len(rows))]

    def clean_stem(self, place: int, row: Generation) -> str | None:
        """Return the words between the clean run's latents and its box; `row` is that run while it is read.
        """
        clean = self.clean[place].row if self.clean else row
        return stem_of(clean_text(self.qwen.tokenizer, clean.ids[last_latent(clean):], self.spec))

    # ---- conditions
    def case(self, place: int, needs: set[str]) -> Case:
        self.donors[place] = {kind: donor for kind in needs if (donor := self.donor(kind, place))}
        runs = {kind: run for kind, (_, run) in self.donors[place].items()}
        item, clean = self.items[place], self.clean[place].row
        pad = self.qwen.model.get_input_embeddings().weight[self.pad_id]
        return Case(item, clean, self.spec, pad, self.start_id, self.settings.seed, self.calibration, runs,
                    self.settings.pick(item), self.slots)

    def donor(self, kind: str, place: int) -> tuple[dict | None, Generation] | None:
        """Return the item (None: this one, under another image) and the run of a donor of this kind."""
        if kind in ("features", "blank", "counterfactual", "helper"):
            run = self.oracle(place) if kind == "features" else self.other_world(kind).get(place)
            return run and (self.others[place][kind][0] if kind == "counterfactual" else None, run)
        j = pick_donor(kind, place, self.items, self.emitters)
        return None if j is None else (self.items[j], self.clean[j].row)

    @torch.no_grad()
    def oracle(self, place: int) -> Generation | None:
        """Return a run that feeds, in each segment, what training aligns latents to: the features of the
        item's helper image, pooled. None without one, with fewer visual tokens than latents, or of slots."""
        if "helper" not in self.others[place] or self.slots:
            return None
        pixels = process_images(self.qwen.image_processor, self.others[place]["helper"][1][:1])
        features, = image_features(self.qwen, {name: x.to(self.qwen.device) for name, x in pixels.items()})
        if len(features) < self.spec.size:
            return None
        segments = [replace(segment, size=self.spec.size) for segment in self.clean[place].row.segments]
        pooled = pool_features(features, self.spec.size)
        return Generation(segments=segments, fed=pooled.repeat(len(segments), 1))

    def other_world(self, kind: str) -> dict[int, Generation]:
        """Return Z(x'): each emitter's run under another prompt, after its own words."""
        if kind not in self.other_worlds:
            places = [i for i in self.prompts.places(kind) if i in self.emitters]
            forced = [forced_prefix(self.clean[i].row, likeliest) for i in places]
            longest = max((last_latent(self.clean[i].row) for i in places), default=0) + 1  # reads the last
            runs = self.decode(kind, places, forced, longest) if places else []
            self.other_worlds[kind] = {i: run.row for i, run in zip(places, runs)}
        return self.other_worlds[kind]

    def records(self, names: list[str]) -> list[dict[str, dict]]:
        """Return {condition: record} for each item, including "clean"."""
        result = [{"clean": self.describe(Planned("clean", None, i, Intervention()), run)}
                  for i, run in enumerate(self.clean)]
        conditions = {name: find_condition(name) for name in names}
        needs = {kind for condition, _ in conditions.values() for kind in condition.needs}
        cases = {i: self.case(i, needs) for i in self.emitters}
        for i, case in cases.items():  # means over the positions, for `retrieval`
            if oracle := case.donors.get("features"):
                both = case.clean.fed, oracle.fed
                result[i]["clean"]["vectors"] = [vectors.float().mean(0).tolist() for vectors in both]
        todo: dict[tuple[str, bool], list[Planned]] = {}  # by kind of prompt and whether it is strict
        for name, (condition, number) in conditions.items():
            for i in range(len(self.items)):
                if i not in cases and condition.prompt == "own":  # without latents nothing can change
                    result[i][name] = {**result[i]["clean"], "changed": False, "first_diff": None}
                    continue
                try:
                    if i not in cases:
                        raise NotPossible("no_latents")
                    if i not in self.prompts.places(condition.prompt):
                        raise NotPossible(why_no_prompt(condition.prompt))
                    intervention = condition.make(cases[i], number)
                    if self.slots and condition.site in ("fed", "slot") and condition.prompt == "own":
                        intervention = keep_ids(cases[i], intervention, name in CONTROLS)
                    todo.setdefault((condition.prompt, condition.strict), []).append(
                        Planned(name, condition, i, intervention))
                except NotPossible as fault:
                    result[i][name] = {"emitted": i in cases, "pred": None, "rule": None, "correct": False,
                                       "reason": str(fault)}
        for (kind, strict), plans in todo.items():
            places = [plan.place for plan in plans]
            longest = max(last_latent(self.clean[i].row) for i in places) + 1  # reads the last
            runs = self.decode(kind, places, [plan.intervention for plan in plans],
                               longest if strict else None, strict)
            for plan, run in zip(plans, runs):
                result[plan.place][plan.name] = record = self.describe(plan, run)
                if plan.name in DO_X:
                    record |= asked_fields(self.prompts.asked(kind, plan.place), self.items[plan.place],
                                           result[plan.place]["clean"], record)
        return result

    def describe(self, plan: Planned, run: Decoded) -> dict:
        """Return the record of one run."""
        _, condition, place, intervention = plan
        (row, scores), clean, tokenizer = run, self.clean[place].row, self.qwen.tokenizer
        at = latent_steps(row)
        raw, fed = row.states[at].float(), row.fed.float()
        if self.slots:  # what a slot is fed without an intervention
            raw = self.qwen.model.get_input_embeddings().weight[[row.ids[n] for n in at]].detach().float()
        record = {"emitted": bool(at),
                  "segments": [{"start": s.start, "k": s.size, "closed_by": s.closed_by}
                               for s in row.segments],
                  "again": False if condition and condition.strict else imagines_again(row, intervention),
                  "n_forbidden": row.n_forbidden if intervention.forbid else None,
                  "n_fed": len(fed), "rel_change": float((fed - raw).norm() / raw.norm()) if at else None,
                  **answer_fields(self.prompts.asked(condition.prompt if condition else "own", place).item,
                                  clean_text(tokenizer, row.ids, self.spec),
                                  clean_text(tokenizer, row.ids[last_latent(row):], self.spec), row.ids,
                                  row.finish),
                  "r0": scores and scores["r0"], "r1": scores and scores["r1"], "ids": row.ids}
        if condition is None:
            return record | {"attention": scores and scores["attention"],
                             "at_latents": tokenizer.decode([row.sampled[n] for n in at])}
        first = first_difference(clean.ids, row.ids)
        reach = max((float((a.float() - b.float())[1:].abs().max()) for a, b in zip(row.slots, clean.slots)),
                    default=0.0)
        record |= {"first_diff": first, "changed": first is not None, "reach": reach}
        for kind in condition.needs:
            record["donor"] = donor_fields(self.donors[place][kind][0], self.items[place])
            if kind == "counterfactual":
                record["target"] = record["donor"]["option"]
        return record
