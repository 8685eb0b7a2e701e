"""What an intervention on latents works with: calibration, one item with its clean run and donors, and the
building blocks of an Intervention.

A donor is another run whose latents replace the item's own. torch is imported inside functions, so that
conditions can be listed and checked without it.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

from utils.jsonl import call_key
from utils.latent_families import Generation, Intervention, LatentSpec, Segment, last_latent

if TYPE_CHECKING:
    import torch


class NotPossible(ValueError):
    """A condition that does not apply to an item: no_latents, no_donor, no_calibration, no_counterfactual,
    no_helper, one_latent, no_such_position; in the kind "ids" also no_marks, same_vectors."""


def why_no_prompt(kind: str) -> str:
    return {"counterfactual": "no_counterfactual", "helper": "no_helper",
            "features": "no_helper"}.get(kind, "no_donor")


@dataclass(frozen=True)
class Calibration:
    """Statistics of the calibration items' latents, in float32: mean `mu`, the latent `tau` nearest to it,
    the `first` of all (each [hidden]). By position in a segment: mean `mu_t`, standard deviation `sigma_t`
    [K, hidden] and mean layer inputs `slots_t` [K, layers, hidden]."""

    n_latents: int
    mu: torch.Tensor
    tau: torch.Tensor
    first: torch.Tensor
    mu_t: torch.Tensor
    sigma_t: torch.Tensor
    slots_t: torch.Tensor

    @classmethod
    def from_runs(cls, runs: list[Generation]) -> Calibration | None:
        """Return the statistics of captured runs; None without a latent."""
        import torch
        fed = [row.fed[:len(row.slots)].float().cpu() for row in runs]
        places = torch.tensor([step for row, vectors in zip(runs, fed)
                               for _, step in places_of(row)[:len(vectors)]])
        if not len(places):
            return None
        latents = torch.cat(fed)
        slots = torch.stack([slot.float().cpu() for row in runs for slot in row.slots])
        mu = latents.double().mean(0).float()
        at = [places == step for step in range(int(places.max()) + 1)]
        return cls(len(latents), mu, latents[(latents - mu).norm(dim=1).argmin()], latents[0],
                   torch.stack([latents[here].mean(0) for here in at]),
                   torch.stack([latents[here].std(0, correction=0) for here in at]),
                   torch.stack([slots[here].mean(0) for here in at]))


# ---- latents of a run
def places_of(row: Generation) -> list[tuple[int, int]]:
    """Return each latent's segment and its position in that."""
    return [(n, step) for n, segment in enumerate(row.segments) for step in range(segment.size)]


def has_latent(row: Generation, segment: int, step: int) -> bool:
    return segment < len(row.segments) and step < row.segments[segment].size


def latent_index(row: Generation, segment: int, step: int) -> int:
    """Return the index of a latent among all of a run."""
    return sum(s.size for s in row.segments[:segment]) + step


def latent_at(row: Generation, segment: int, step: int) -> torch.Tensor:
    """Return a latent of a captured run, [hidden]."""
    return row.fed[latent_index(row, segment, step)].float().cpu()


# ---- random numbers
def seeded(*where) -> torch.Generator:
    import torch
    return torch.Generator().manual_seed(int(call_key(where=where)[:15], 16))


def likeliest(logits: torch.Tensor, n: int) -> int:
    return int(logits.argmax())


def sampler(temperature: float, *where) -> Callable[[torch.Tensor, int], int]:
    """Return pick(logits [vocab], n), which samples the nth id of a reply by the Gumbel trick. Its noise
    depends on `where` and n alone, so that replies to all conditions differ only where their logits do.
    Temperature 0 is greedy."""
    if not temperature:
        return likeliest

    def pick(logits: torch.Tensor, n: int) -> int:
        import torch
        uniform = torch.rand(len(logits), generator=seeded("sample", *where, n)).clamp(1e-20, 1 - 1e-7)
        return int((logits.float().cpu() / temperature - (-uniform.log()).log()).argmax())
    return pick


# ---- an item
@dataclass
class Case:
    """An item, its clean run and what a condition may draw on: donors' runs by kind ("random", "question",
    "image", "counterfactual", "blank", "helper", "features"), the embedding of the latent `pad` [hidden],
    `start_id` that opens a segment, `pick(logits, n)` for the nth id, and `slots` of the kind "ids"."""

    item: dict
    clean: Generation
    spec: LatentSpec
    pad: torch.Tensor
    start_id: int | None
    seed: int
    calibration: Calibration | None = None
    donors: dict[str, Generation] = field(default_factory=dict)
    pick: Callable[[torch.Tensor, int], int] = likeliest
    slots: frozenset[int] = frozenset()

    def noise(self, n: int, segment: int, step: int) -> torch.Tensor:
        """Return n standard normal numbers by seed, item, segment and step."""
        import torch
        return torch.randn(n, generator=seeded(self.seed, self.item["id"], segment, step))

    def calibrated(self) -> Calibration:
        if self.calibration is None:
            raise NotPossible("no_calibration")
        return self.calibration

    def mean_at(self) -> Callable[[int], torch.Tensor]:
        """Return mean(step) -> the mean calibration latent [hidden] of a position."""
        mu_t = self.calibrated().mu_t
        return lambda step: mu_t[min(step, len(mu_t) - 1)]

    def need_position(self, step: int) -> None:
        """Raise NotPossible unless a segment has a latent at this position."""
        if all(segment.size <= step for segment in self.clean.segments):
            raise NotPossible("no_such_position")

    def donor(self, kind: str) -> Generation:
        """Return a donor with a latent for each of this item's."""
        row = self.donors.get(kind)
        if row is None or len(row.segments) < len(self.clean.segments) or any(
                theirs.size < ours.size for theirs, ours in zip(row.segments, self.clean.segments)):
            raise NotPossible(why_no_prompt(kind) if row is None else "no_donor")
        return row


# ---- conditions
def finite(word: str) -> float:
    number = float(word)
    if not math.isfinite(number):
        raise ValueError(f"{word!r}, expected a finite number")
    return number


def whole(word: str) -> int:
    if not word.isdecimal():
        raise ValueError(f"{word!r}, expected a whole number, 0 or more")
    return int(word)


@dataclass(frozen=True)
class Condition:
    """An intervention: `build(case)` or, with a number, `build(case, number)` returns the Intervention
    or raises NotPossible. `default` is the number unless the name gives another, read by `parse`; `prompt`
    the kind of prompt, `needs` the kinds of donors; `strict`: after the latents the question is read again
    over them alone."""

    site: str
    build: Callable[..., Intervention]
    default: object = None
    prompt: str = "own"
    needs: tuple[str, ...] = ()
    parse: Callable[[str], object] = finite
    strict: bool = False

    def make(self, case: Case, number: object) -> Intervention:
        return self.build(case) if self.default is None else self.build(case, number)


# ---- building blocks
def feed(vector: Callable[[torch.Tensor, int, int], torch.Tensor]) -> Intervention:
    """Feed vector(z, segment, step), in float32 on the CPU, in place of each latent z."""
    def computed(z: torch.Tensor, segment: int, step: int) -> torch.Tensor:
        return vector(z.float().cpu(), segment, step).to(z.device, z.dtype)
    return Intervention(feed=computed)


def feed_constant(vector: torch.Tensor) -> Intervention:
    return feed(lambda z, segment, step: vector)


def feed_run(row: Generation) -> Intervention:
    """Feed a captured run's latents at the same positions."""
    fed = feed(lambda z, segment, step:
               latent_at(row, segment, step) if has_latent(row, segment, step) else z)
    return replace(fed, covers=partial(has_latent, row))


def put_slots(row: Generation) -> Intervention:
    """Put a captured run's layer inputs at the same latent positions."""
    def states(segment: int, step: int) -> torch.Tensor | None:
        index = latent_index(row, segment, step)
        return row.slots[index] if has_latent(row, segment, step) and index < len(row.slots) else None
    return Intervention(slot=states, covers=partial(has_latent, row))


def no_more_segments(case: Case, n: int, **more) -> Intervention:
    """Forbid the start of a segment after n of them, and slots outside of segments that have a start."""
    def forbid(row: Generation, token: int) -> bool:
        full, inside = len(row.segments) >= n, row.segments and row.segments[-1].closed_by == "max_tokens"
        if token in case.slots:
            return not inside and (full or case.start_id is not None)
        return token == case.start_id and full and not (inside and case.spec.force_end)  # then it is ignored
    return Intervention(forbid=forbid, **more)


def cut_to(case: Case, size: int) -> LatentSpec:
    """Return the family with segments that end after `size` latents."""
    spec = case.spec
    if not (spec.end or size == 0 and spec.force_start):
        raise NotPossible("no_marks")
    return replace(spec, size=size, overwrite_start=spec.overwrite_start and size > 0,
                   force_end=spec.force_end or bool(spec.slots))


def markers_only(case: Case) -> Intervention:
    """The clean run's segments without their latents."""
    return no_more_segments(case, len(case.clean.segments) if case.spec.start else 0, spec=cut_to(case, 0))


def imagines_again(row: Generation, intervention: Intervention) -> bool | None:
    """Return whether a run has latents that the intervention does not reach; None where it leaves latents to
    the model."""
    if not (intervention.feed or intervention.slot or intervention.hide or intervention.spec
            or intervention.forbid):
        return None
    return bool(intervention.covers) and not all(intervention.covers(*place) for place in places_of(row))


def ending(row: Generation, segment: Segment, spec: LatentSpec) -> list[int]:
    """Return the ids of a decoded row that close a segment: its end, and what is forced to follow that."""
    first = segment.start + segment.size
    n = (spec.force_end or segment.closed_by == "end") + bool(spec.after_limit and segment.closed_by != "end")
    return row.ids[first:first + n]


def forced_prefix(clean: Generation, pick: Callable[[torch.Tensor, int], int],
                  intervention: Intervention = Intervention()) -> Intervention:
    """Force what the clean run sampled up to the end of its last segment, an early end included; `pick`
    chooses after that."""
    ended = bool(clean.segments) and clean.segments[-1].closed_by == "end"
    ids = clean.sampled[:last_latent(clean) + ended]
    return replace(intervention, choose=lambda logits, n: ids[n] if n < len(ids) else pick(logits, n))


def latents_alone(case: Case) -> Intervention:
    """Feed the clean run's latents in its segments, whose marks are forced without the words between."""
    ids, clean = [], case.clean
    for segment in clean.segments:
        begin = segment.start - (case.start_id in clean.ids[max(segment.start - 1, 0):segment.start])
        ids += clean.sampled[begin:segment.start + segment.size]
        ids += ending(clean, segment, case.spec)
    return replace(feed_run(clean), covers=None,
                   choose=lambda logits, n: ids[n] if n < len(ids) else case.pick(logits, n))


def go_on(clean: Generation, spec: LatentSpec, pick: Callable[[torch.Tensor, int], int],
          never: frozenset[int] = frozenset()) -> Intervention:
    """Choose the ids after a run's last latent: what closes the segment, then by `pick`, `never` these."""
    skipped, closing = last_latent(clean), ending(clean, clean.segments[-1], spec)
    return Intervention(spec=replace(spec, force_start=False), forbid=lambda row, token: token in never,
                        choose=lambda logits, n:
                        closing[n] if n < len(closing) else pick(logits, n + skipped))


def joined(row: Generation, rest: Generation) -> Generation:
    """Return a run up to its last latent and what followed instead."""
    import torch
    n = last_latent(row)
    return Generation(row.ids[:n] + rest.ids, rest.finish,
                      row.segments + [replace(later, start=later.start + n) for later in rest.segments],
                      torch.cat([row.states[:n], rest.states]), torch.cat([row.fed, rest.fed]),
                      slots=row.slots + rest.slots, sampled=row.sampled[:n] + rest.sampled)
