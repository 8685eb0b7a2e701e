"""How much the rows of an answer's stem attend to what, layer by layer, without a matrix of all tokens by all
tokens.

The model is given an attention function that calls the library's own and looks at the queries and keys it is
handed, after their rotary embedding; only the rows just read are weighed, [rows, columns] a head. Mass is not
use: a model may attend to latents that no intervention on them can move (causal.md, 2.4).

A batch of items, clean and under every condition on its latents, from one reading of each prompt.

The clean run captures what it feeds and what its layers read; donors' runs say the item's own words up to the
latents; then all conditions of all items decode side by side from copies of the prompts' caches
(`State.select`).
"""
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from PIL import Image
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from utils.decode import State, decode, prefill_blocks, truncate_cache
from utils.intervene.latent_case import Case, Known, NotPossible, likeliest, why_no_prompt
from utils.intervene.latent_conditions import Condition, find_condition, forced_prefix
from utils.intervene.prompts import Asking, Prompts, answer_fields, first_difference, pick_donor, stem_of
from utils.latent_families import Generation, Intervention, LatentSpec, clean_text, last_latent, latent_ids
from utils.option_scores import read_out
from utils.qwen import Qwen

NAME = "sdpa_watched"
# columns by what stands there; "said" is the rest of the reply
GROUPS = ("first", "image", "question", "imagination", "said")


def weigh(query: torch.Tensor, key: torch.Tensor, allowed: torch.Tensor, scaling: float) -> torch.Tensor:
    """Return attention weights [B, heads, R, C] in float32 of queries [B, heads, R, d] over keys [B, groups
    of heads, C, d]; `allowed` is bool [B, R, C]."""
    # the heads that share a key: keys are not repeated
    grouped = query.float().unflatten(1, (key.shape[1], -1))
    scores = torch.einsum("bkgrd,bkcd->bkgrc", grouped, key.float()).flatten(1, 2) * scaling
    return scores.masked_fill(~allowed[:, None], -torch.inf).softmax(-1)


@contextmanager
def watched(model: torch.nn.Module, note: Callable[[torch.Tensor, torch.Tensor, float], None]) -> Iterator[
    None]:
    """Call note(query, key, scaling) for every decoder layer inside the block; what the model computes stays
    as it is.

    The function is set on the language model's configuration (sdpa) and taken off again; nothing is patched.
    """
    config = model.config.text_config
    before = config._attn_implementation
    if before != "sdpa":
        raise ValueError(f"attention {before!r}, expected sdpa, which utils.qwen.load asks for")

    def attend(module, query, key, value, attention_mask, scaling=None, **kwargs):
        note(query, key, scaling)
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, scaling=scaling,
                                               **kwargs)

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before


@torch.no_grad()
def stem_attention(qwen: Qwen, state: State, before: list[int], stem: str,
                   imagined: list[list[int]]) -> list[dict]:
    """Return where the tokens of `stem`, read after the ids `before`, look in each row of `state`, which is
    not used up.

    `imagined[row]` are the cache's columns of the imagination. For each row {"mass": {group: [share a
    layer]}, "uniform": {group: its share of the columns that may be seen}, "imagined": [mass of each of its
    columns, mean over the layers]}; means over the heads and the stem's tokens, the groups' shares add up to
    1.
    """
    block = before + qwen.tokenizer(stem, add_special_tokens=False).input_ids
    (n, n_before), rows = state.mask.shape, slice(len(before), len(block))
    mask = torch.cat([state.mask, state.mask.new_ones(n, len(block))], dim=1).bool()
    steps = torch.arange(len(block), device=mask.device)
    allowed = (mask[:, None] & (torch.arange(mask.shape[1], device=mask.device) <= n_before
                                + steps[:, None]))[:, rows]
    layers: list[torch.Tensor] = []  # [B, C] each
    with watched(qwen.model, lambda query, key, scaling: layers.append(
            weigh(query[:, :, rows], key, allowed, scaling).mean((1, 2)))):
        prefill_blocks(qwen, state.select(list(range(n))), [block] * n)
    member = columns_of(state, mask, imagined)
    mass = torch.einsum("lbc,bgc->bgl", torch.stack(layers), member)
    uniform = torch.einsum("brc,bgc->bg", allowed / allowed.sum(-1, keepdim=True), member) / allowed.shape[1]
    each = torch.stack(layers).mean(0)
    return [{"mass": {name: rounded(mass[i, g]) for g, name in enumerate(GROUPS)},
             "uniform": dict(zip(GROUPS, rounded(uniform[i]))), "imagined": rounded(each[i, imagined[i]])}
             for i in range(n)]


def columns_of(state: State, mask: torch.Tensor, imagined: list[list[int]]) -> torch.Tensor:
    """Return [B, groups, C] of 0 and 1: which group each column belongs to; the first token that is seen is
    one by itself."""
    group = torch.full(mask.shape, GROUPS.index("said"), device=mask.device)
    n_prompt = state.is_image.shape[1]
    group[:, :n_prompt] = torch.where(state.is_image, GROUPS.index("image"), GROUPS.index("question"))
    for row, columns in enumerate(imagined):
        group[row, columns] = GROUPS.index("imagination")
    group[torch.arange(len(mask)), mask.int().argmax(1)] = GROUPS.index("first")
    return torch.stack([group == g for g in range(len(GROUPS))], dim=1).float()


def rounded(values: torch.Tensor) -> list[float]:
    return [round(value, 6) for value in values.tolist()]


# ------------------------------------------------------------ latent_arm


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
        self.clean = self.decode("own", list(range(len(items))), [Intervention()] * len(items))
        self.emitters = [i for i, (row, _) in enumerate(self.clean) if row.slots]

    def decode(self, kind: str, places: list[int], arms: list[Intervention],
               at_most: int | None = None) -> list[tuple[Generation, dict | None]]:
        """Decode arms of items at `places`, at most `rows` side by side; return each run with its R0 scores
        (None without a segment). `at_most`: no more new ids than this, and no scores."""
        state, having = self.prompts[kind]
        done = []
        for some in self.asking.pieces(list(zip(places, arms))):
            its = [i for i, _ in some]
            begun = state.select([having.index(i) for i in its])
            their = [self.asking.arm(self.items[i], arm) for i, arm in some]
            rows, end = decode(self.qwen, begun, at_most or self.asking.max_new_tokens, self.spec, their,
                               capture=True,
                               with_slots=True)
            done += zip(rows, self.read(begun, end, rows, its) if at_most is None else [None] * len(rows))
        return done

    def read(self, begun: State, end: State, rows: list[Generation], places: list[int]) -> list[dict | None]:
        """Score the options behind each row's last segment: R0 and, where the clean run boxed an answer, R1.
        Of the clean run also where R0's stem looks."""
        n_read = end.mask.shape[1] - begun.mask.shape[1]
        having = [k for k, row in enumerate(rows) if row.segments and last_latent(row) <= n_read]
        found = [None] * len(rows)
        if not having:
            return found
        back = truncate_cache(end, begun, [last_latent(row) if k in having else 0 for k,
                                   row in enumerate(rows)]).select(having)
        items = [self.items[places[k]] for k in having]
        stems = [self.clean_stem(places[k], rows[k]) for k in having]
        scores = read_out(self.qwen, back, items, self.asking.stem, stems, [[self.end_id]] * len(having),
                          self.asking.options)
        if not self.clean:
            n_prompt = begun.mask.shape[1]
            latents = [[n_prompt + s.start + j for s in rows[k].segments for j in range(s.size)]
                       for k in having]
            looks = stem_attention(self.qwen, back, [self.end_id], self.asking.stem, latents)
            scores = [its | {"attention": look} for its, look in zip(scores, looks)]
        for k, its in zip(having, scores):
            found[k] = its
        return found

    def clean_stem(self, place: int, row: Generation) -> str | None:
        """Return what the item's clean run, `row` itself while there is none, said between its latents and
        its box."""
        clean = self.clean[place][0] if self.clean else row
        return stem_of(clean_text(self.qwen.tokenizer, clean.ids[last_latent(clean):], self.spec))

    # -------------------------------------------------------------------------------- conditions
    def case(self, place: int, needs: set[str]) -> Case:
        self.donors[place] = {kind: found for kind in needs if (found := self.donor(kind, place))}
        donors = {kind: run for kind, (_, run) in self.donors[place].items()}
        pad = self.qwen.model.get_input_embeddings().weight[self.pad_id]
        clean, scores = self.clean[place]
        return Case(self.items[place], clean, self.spec, pad, self.start_id, self.asking.seed, self.known,
                    donors,
                    self.asking.pick(self.items[place]), scores and scores["attention"]["imagined"])

    def donor(self, kind: str, place: int) -> tuple[dict | None, Generation] | None:
        """Return the donor of a kind (None: the item itself, under a blank image) and its run; None if there
        is no donor."""
        if kind in ("blank", "counterfactual"):
            run = self.worlds(kind).get(place)
            return run and (self.edits[place][0] if kind == "counterfactual" else None, run)
        j = pick_donor(kind, place, self.items, self.emitters)
        return None if j is None else (self.items[j], self.clean[j][0])

    def worlds(self, kind: str) -> dict[int, Generation]:
        """Return the run of each emitter under another prompt, its own words said before the latents: Z(x').
        """
        if kind not in self.donor_runs:
            places = [i for i in self.prompts[kind][1] if i in self.emitters]
            # read the last latent too
            longest = max((last_latent(self.clean[i][0]) for i in places), default=0) + 1
            arms = [forced_prefix(self.clean[i][0], likeliest) for i in places]
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
        """Return the record of one run: what was fed and read, the answer after the last segment, how it
        differs from clean."""
        item, clean, tokenizer = self.items[place], self.clean[place][0], self.qwen.tokenizer
        places = [j for s in row.segments for j in range(s.start, s.start + s.size)]
        raw, fed = row.states[places].float(), row.fed.float()
        record = {"emitted": bool(places),
                  "segments": [{"start": s.start, "k": s.size, "closed_by": s.closed_by}
                               for s in row.segments],
                  "n_fed": len(fed), "rel_change": float((fed - raw).norm() / raw.norm()) if places else None,
                  "norm_ratio": float(fed.norm(dim=1).median() / raw.norm(dim=1).median()) if places
                  else None,
                  **answer_fields(item, clean_text(tokenizer, row.ids, self.spec),
                                  clean_text(tokenizer, row.ids[last_latent(row):], self.spec), row.ids,
                                  row.finish),
                  "r0": scores and scores["r0"], "r1": scores and scores["r1"], "ids": row.ids}
        if one is None:
            record["attention"] = scores and scores["attention"]
        else:
            both = min(len(row.slots), len(clean.slots))
            mine, its = (torch.stack(slots[:both]).float()[:, 1:] if both else torch.zeros(1)
                         for slots in (row.slots, clean.slots))
            first = first_difference(clean.ids, row.ids)
            record |= {"first_diff": first, "changed": first is not None,
                       "reach": float((mine - its).abs().max())}
            for kind in one.needs:
                donor = self.donors[place][kind][0]
                record["donor"] = donor and {"item": donor["id"], "gold": donor["answer"]["value"]}
        return record
