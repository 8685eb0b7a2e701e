"""A batch of items, clean and under every condition on its latents, from one reading of each prompt.

The clean run captures what it feeds and what its layers read. All conditions of all items then decode side by
side from copies of the prompts' caches. The attention of the answer's stem is read in an attention function
that calls the library's own, without a matrix of all tokens by all tokens. Mass is not use: a model may
attend to latents that no intervention on them can move.
"""
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from tqdm import tqdm
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from utils.decode import State, decode, prefill_blocks, truncate_cache
from utils.intervene.latent_case import (Calibration, Case, Condition, NotPossible, forced_prefix,
                                         imagines_again, likeliest, why_no_prompt)
from utils.intervene.latent_conditions import DO_X, find_condition
from utils.intervene.prompts import (Prompt, Prompts, Settings, answer_fields, asked_fields, donor_fields,
                                     first_difference, pick_donor, stem_of)
from utils.items import open_images
from utils.jsonl import DataError, replace_file
from utils.latent_families import Generation, Intervention, LatentSpec, clean_text, last_latent, latent_ids
from utils.qwen import Qwen

WATCHED = "sdpa_watched"
GROUPS = ("first", "image", "question", "imagination", "said")  # of columns; "said": the rest of the reply


# ---- attention of the stem
def attention_weights(query: torch.Tensor, key: torch.Tensor, allowed: torch.Tensor,
                      scaling: float) -> torch.Tensor:
    """Return weights [B, heads, R, C] in float32 of queries [B, heads, R, d] over keys [B, groups of heads,
    C, d]; `allowed` is bool [B, R, C]."""
    grouped = query.float().unflatten(1, (key.shape[1], -1))  # heads that share a key: keys are not repeated
    scores = torch.einsum("bkgrd,bkcd->bkgrc", grouped, key.float()).flatten(1, 2) * scaling
    return scores.masked_fill(~allowed[:, None], -torch.inf).softmax(-1)


@contextmanager
def watched(model: torch.nn.Module,
            note: Callable[[torch.Tensor, torch.Tensor, float], None]) -> Iterator[None]:
    """Call note(query, key, scaling) for every decoder layer inside the block."""
    config = model.config.text_config
    before = config._attn_implementation  # sdpa, which utils.qwen.load asks for

    def attend(module, query, key, value, attention_mask, scaling=None, **kwargs):
        note(query, key, scaling)
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, scaling=scaling,
                                               **kwargs)

    AttentionInterface.register(WATCHED, attend)
    AttentionMaskInterface.register(WATCHED, sdpa_mask)
    config._attn_implementation = WATCHED
    try:
        yield
    finally:
        config._attn_implementation = before


@torch.no_grad()
def stem_attention(qwen: Qwen, state: State, before: list[int], stems: list[str],
                   imagined: list[list[int]]) -> list[dict]:
    """Return where the tokens of each row's stem, read after the ids `before`, attend in that row of `state`
    (kept): {"mass": {group: [share per layer]}, "uniform": {group: share of the visible columns},
    "imagined": [mass of each of the row's columns `imagined`, mean over layers]}. Means over heads and the
    stem's tokens."""
    blocks = [before + qwen.tokenizer(stem, add_special_tokens=False).input_ids for stem in stems]
    lengths = torch.tensor([len(block) for block in blocks], device=state.mask.device)[:, None]
    steps = torch.arange(int(lengths.max()), device=lengths.device)
    mask = torch.cat([state.mask, (steps < lengths).to(state.mask)], dim=1).bool()  # padded on the right
    columns, own = torch.arange(mask.shape[1], device=mask.device), slice(len(before), None)
    allowed = (mask[:, None] & (columns <= state.mask.shape[1] + steps[:, None]))[:, own]
    share = (steps < lengths)[:, own] / (lengths - len(before))  # [B, R] of each of the stem's tokens
    layers: list[torch.Tensor] = []  # [B, C] each
    with watched(qwen.model, lambda query, key, scaling: layers.append(torch.einsum(
            "bhrc,br->bc", attention_weights(query[:, :, own], key, allowed, scaling), share)
            / query.shape[1])):
        prefill_blocks(qwen, state.select(list(range(len(blocks)))), blocks)
    member = column_groups(state, mask, imagined)
    mass = torch.einsum("lbc,bgc->bgl", torch.stack(layers), member)
    uniform = torch.einsum("brc,br,bgc->bg", allowed / allowed.sum(-1, keepdim=True), share, member)
    each = torch.stack(layers).mean(0)
    return [{"mass": {name: rounded(mass[i, g]) for g, name in enumerate(GROUPS)},
             "uniform": dict(zip(GROUPS, rounded(uniform[i]))), "imagined": rounded(each[i, imagined[i]])}
            for i in range(len(blocks))]


def column_groups(state: State, mask: torch.Tensor, imagined: list[list[int]]) -> torch.Tensor:
    """Return [B, groups, C] of 0 and 1; the first visible token has a group of its own."""
    group = torch.full(mask.shape, GROUPS.index("said"), device=mask.device)
    n_prompt = state.is_image.shape[1]
    group[:, :n_prompt] = torch.where(state.is_image, GROUPS.index("image"), GROUPS.index("question"))
    for row, columns in enumerate(imagined):
        group[row, columns] = GROUPS.index("imagination")
    group[torch.arange(len(mask)), mask.int().argmax(1)] = GROUPS.index("first")
    return torch.stack([group == g for g in range(len(GROUPS))], dim=1).float()


def rounded(values: torch.Tensor) -> list[float]:
    return [round(value, 6) for value in values.tolist()]


# ---- calibration
def calibrate(path: Path, qwen: Qwen, spec: LatentSpec, settings: Settings, items: list[dict],
              image_root: str, batch_size: int) -> Calibration | None:
    """Return the statistics of these items' latents, kept at `path`; None if they emit none."""
    if not path.exists():
        rows = []
        for first in tqdm(range(0, len(items), batch_size), desc="calibration"):
            batch = items[first:first + batch_size]
            images = [open_images(item, image_root) for item in batch]
            prompts = Prompts(qwen, settings, batch, images, [None] * len(batch))
            state = prompts.select("own", list(range(len(batch))))
            rows += decode(qwen, state, settings.max_new_tokens, spec, capture=True, with_slots=True)[0]
        calibration = Calibration.from_runs(rows)
        tensors = {name: torch.as_tensor(value).contiguous()
                   for name, value in (vars(calibration) if calibration else {}).items()}
        data = save(tensors)
        replace_file(path, lambda file: file.write(data), "wb")
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path}: damaged ({error}); remove it, and it is computed again") from error
    return Calibration(**{**tensors, "n_latents": int(tensors["n_latents"])}) if tensors else None


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
                 items: list[dict], images: list[list[Image.Image]], edits: list[Prompt | None]):
        self.qwen, self.spec, self.calibration, self.settings = qwen, spec, calibration, settings
        self.items, self.edits = items, edits
        self.start_id, self.pad_id, self.end_id = latent_ids(qwen.tokenizer, spec)
        self.prompts = Prompts(qwen, settings, items, images, edits)
        # place -> kind -> (the donor's item, its run)
        self.donors: dict[int, dict[str, tuple[dict | None, Generation]]] = {}
        self.other_worlds: dict[str, dict[int, Generation]] = {}  # kind of prompt -> place -> run
        self.clean: list[Decoded] = []
        self.clean = self.decode("own", list(range(len(items))), [Intervention()] * len(items))
        self.emitters = [i for i, (row, _) in enumerate(self.clean) if row.slots]

    def decode(self, kind: str, places: list[int], interventions: list[Intervention],
               at_most: int | None = None) -> list[Decoded]:
        """Decode interventions on the items at `places`; `at_most` new ids, then without scores."""
        done = []
        for piece in self.settings.pieces(list(zip(places, interventions))):
            here = [place for place, _ in piece]
            begun = self.prompts.select(kind, here)
            sampled = [self.settings.sampled(self.items[place], own) for place, own in piece]
            rows, end = decode(self.qwen, begun, at_most or self.settings.max_new_tokens, self.spec, sampled,
                               capture=True, with_slots=True)
            scores = self.read(kind, begun, end, rows, here) if at_most is None else [None] * len(rows)
            done += map(Decoded, rows, scores)
        return done

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
        scores = self.prompts.read_out(state, kind, [places[k] for k in scored], words, [self.end_id])
        if not self.clean:
            n_prompt = begun.mask.shape[1]
            latents = [[n_prompt + s.start + j for s in rows[k].segments for j in range(s.size)]
                       for k in scored]
            looks = stem_attention(self.qwen, state, [self.end_id], [self.settings.stem] * len(scored),
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
        item, (clean, scores) = self.items[place], self.clean[place]
        pad = self.qwen.model.get_input_embeddings().weight[self.pad_id]
        return Case(item, clean, self.spec, pad, self.start_id, self.settings.seed, self.calibration, runs,
                    self.settings.pick(item), scores and scores["attention"]["imagined"])

    def donor(self, kind: str, place: int) -> tuple[dict | None, Generation] | None:
        """Return the item (None: this one, blank) and the run of a donor of this kind."""
        if kind in ("blank", "counterfactual"):
            run = self.other_world(kind).get(place)
            return run and (self.edits[place][0] if kind == "counterfactual" else None, run)
        j = pick_donor(kind, place, self.items, self.emitters)
        return None if j is None else (self.items[j], self.clean[j].row)

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
        todo: dict[str, list[Planned]] = {}  # by kind of prompt
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
                    todo.setdefault(condition.prompt, []).append(Planned(name, condition, i, intervention))
                except NotPossible as fault:
                    result[i][name] = {"emitted": i in cases, "pred": None, "rule": None, "correct": False,
                                       "reason": str(fault)}
        for kind, plans in todo.items():
            runs = self.decode(kind, [plan.place for plan in plans], [plan.intervention for plan in plans])
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
        at = [j for s in row.segments for j in range(s.start, s.start + s.size)]
        raw, fed = row.states[at].float(), row.fed.float()
        record = {"emitted": bool(at),
                  "segments": [{"start": s.start, "k": s.size, "closed_by": s.closed_by}
                               for s in row.segments],
                  "again": imagines_again(row, intervention),
                  "n_forbidden": row.n_forbidden if intervention.forbid else None,
                  "n_fed": len(fed), "rel_change": float((fed - raw).norm() / raw.norm()) if at else None,
                  "norm_ratio": float(fed.norm(dim=1).median() / raw.norm(dim=1).median()) if at else None,
                  **answer_fields(self.prompts.asked(condition.prompt if condition else "own", place).item,
                                  clean_text(tokenizer, row.ids, self.spec),
                                  clean_text(tokenizer, row.ids[last_latent(row):], self.spec), row.ids,
                                  row.finish),
                  "r0": scores and scores["r0"], "r1": scores and scores["r1"], "ids": row.ids}
        if condition is None:
            return record | {"attention": scores and scores["attention"]}
        first = first_difference(clean.ids, row.ids)
        reach = max((float((a.float() - b.float())[1:].abs().max()) for a, b in zip(row.slots, clean.slots)),
                    default=0.0)
        record |= {"first_diff": first, "changed": first is not None, "reach": reach}
        for kind in condition.needs:
            record["donor"] = donor_fields(self.donors[place][kind][0], self.items[place])
        return record
