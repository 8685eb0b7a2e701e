"""What interventions on latents know: calibration items, one item with its clean run and donors, ids sampled
alike.

`utils.intervene.latent_conditions` makes of a Case what is done to its item.
"""
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from utils.jsonl import call_key
from utils.latent_families import Generation, LatentSpec


class NotPossible(ValueError):
    """An item that a condition cannot be applied to: no_latents, no_donor, no_calibration, no_counterfactual,
    no_region, one_latent, no_such_position, no_attention."""


@dataclass(frozen=True)
class Known:
    """What calibration items tell of latents, all float32: their mean `mu` and the latent nearest to it,
    `tau`, the first of all, `first` (all [hidden]), mean and standard deviation by position in a segment,
    `mu_t` and `sigma_t` [K, hidden], and the mean layer inputs by position, `slots_t` [K, layers, hidden]."""

    n_latents: int
    mu: torch.Tensor
    tau: torch.Tensor
    first: torch.Tensor
    mu_t: torch.Tensor
    sigma_t: torch.Tensor
    slots_t: torch.Tensor

    @classmethod
    def from_runs(cls, runs: list[Generation]) -> "Known | None":
        """Return what captured runs tell (with fed vectors and slots); None if no latent was read in any of
        them."""
        fed = [row.fed[:len(row.slots)].float().cpu() for row in runs]
        places = torch.tensor([step for row, vectors in zip(runs, fed)
                               for step in steps_of(row)[:len(vectors)]])
        if not len(places):
            return None
        latents, slots = torch.cat(fed), torch.stack([slot.float().cpu() for row in runs
                                                      for slot in row.slots])
        mu = latents.double().mean(0).float()
        at = [places == step for step in range(int(places.max()) + 1)]
        return cls(len(latents), mu, latents[(latents - mu).norm(dim=1).argmin()], latents[0],
                   torch.stack([latents[here].mean(0) for here in at]),
                   torch.stack([latents[here].std(0, correction=0) for here in at]),
                   torch.stack([slots[here].mean(0) for here in at]))


# -------------------------------------------------------------------------------- where a run's latents stand
def steps_of(row: Generation) -> list[int]:
    """Return the position within its segment of each latent of a run."""
    return [step for segment in row.segments for step in range(segment.size)]


def within(row: Generation, segment: int, step: int) -> bool:
    return segment < len(row.segments) and step < row.segments[segment].size


def latent(row: Generation, segment: int, step: int) -> torch.Tensor:
    """Return a latent of a captured run, [hidden]."""
    return row.fed[sum(s.size for s in row.segments[:segment]) + step].float().cpu()


# ------------------------------------------------------------------------------------ chance
def seeded(*where) -> torch.Generator:
    """Return a generator of numbers that depend on `where` alone."""
    return torch.Generator().manual_seed(int(call_key(where=where)[:15], 16))


def likeliest(logits: torch.Tensor, n: int) -> int:
    return int(logits.argmax())


def sampler(temperature: float, *where) -> Callable[[torch.Tensor, int], int]:
    """Return pick(logits [vocab], n), which samples the nth id of a reply with numbers that depend on `where`
    and n alone.

    By the Gumbel trick, argmax of logits / temperature + noise: every condition on an item meets the same
    noise (common random numbers), so that replies part only where their logits do. Temperature 0 is greedy.
    """
    if not temperature:
        return likeliest

    def pick(logits: torch.Tensor, n: int) -> int:
        uniform = torch.rand(len(logits), generator=seeded("sample", *where, n)).clamp(1e-20, 1 - 1e-7)
        return int((logits.float().cpu() / temperature - (-uniform.log()).log()).argmax())
    return pick


# ------------------------------------------------------------------------------------ an item
@dataclass
class Case:
    """An item and its clean run, and what conditions may take from elsewhere.

    `donors` are runs by kind ("random", "question", "image", "counterfactual", "blank"); `pad` is the
    embedding of the latent pad [hidden]; `start_id` the token that opens a segment; `pick(logits, n)` the nth
    id of a reply; `attention` how much the answer's stem attends to each of the clean run's latents, in order
    (None where that was not read).
    """

    item: dict
    clean: Generation
    spec: LatentSpec
    pad: torch.Tensor
    start_id: int
    seed: int
    known: Known | None = None
    donors: dict[str, Generation] = field(default_factory=dict)
    pick: Callable[[torch.Tensor, int], int] = likeliest
    attention: list[float] | None = None

    def noise(self, n: int, segment: int, step: int) -> torch.Tensor:
        """Return n standard normal numbers that depend on seed, item, segment and step alone: not on batch or
        device."""
        return torch.randn(n, generator=seeded(self.seed, self.item["id"], segment, step))

    def calibrated(self) -> Known:
        if self.known is None:
            raise NotPossible("no_calibration")
        return self.known

    def means(self) -> Callable[[int], torch.Tensor]:
        """Return what gives the mean calibration latent of a position, [hidden]; NotPossible now, not while
        decoding."""
        mu_t = self.calibrated().mu_t
        return lambda step: mu_t[min(step, len(mu_t) - 1)]

    def need_position(self, step: int) -> None:
        """Raise NotPossible unless a segment of the clean run has a latent at this position."""
        if all(segment.size <= step for segment in self.clean.segments):
            raise NotPossible("no_such_position")

    def donor(self, kind: str) -> Generation:
        """Return a donor with a latent for each of this item's."""
        row = self.donors.get(kind)
        if row is None or len(row.segments) < len(self.clean.segments) or any(
                its.size < mine.size for its, mine in zip(row.segments, self.clean.segments)):
            raise NotPossible("no_counterfactual" if kind == "counterfactual" and row is None else "no_donor")
        return row


def why_no_prompt(kind: str) -> str:
    """Return the reason why an item has no prompt of a kind."""
    return {"masked": "no_region", "counterfactual": "no_counterfactual"}.get(kind, "no_donor")
