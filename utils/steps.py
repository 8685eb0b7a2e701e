"""The rows of an optimizer step: which they are, how they lie in micro-batches on the devices, and what work that is."""
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch

from utils.flops import training_flops
from utils.latents import make_batch
from utils.packing import make_pack, plan_packs
from utils.qwen import Qwen
from utils.targets import Example, Target


@dataclass(frozen=True)
class Batching:
    """The flags of train_sft.py that decide how rows become steps; `global_batch` rows a step, `max_tokens` a pack,
    `batch_size` rows a padded batch of latents, `loss_norm` "token" or "row"."""

    seed: int = 42
    global_batch: int = 128
    max_tokens: int = 8192
    batch_size: int = 1
    loss_norm: str = "token"
    train_vision: bool = False
    num_workers: int = 0


@dataclass
class Work:
    """What one optimizer step is, on all ranks together: known from the plan, so that nobody needs to ask.

    `norm` divides the summed loss: trained tokens, or rows with loss_norm "row". `balance` is the share of the devices'
    time that is not spent waiting for the slowest rank, by tokens.
    """

    micro_steps: int
    tokens: int
    trained_tokens: int
    norm: float
    segments: int
    images: int
    flops: float
    balance: float


class Steps(torch.utils.data.Dataset):
    """Item (s, k) is the kth micro-batch of this rank in optimizer step s; every rank has as many.

    The rows of a step are a pure function of (seed, step), whatever the number of ranks: that is what resuming needs. Rows
    are packed up to `max_tokens`; with latents, whose recurrence wants columns in common, they are padded, `batch_size` at
    a time.
    """

    def __init__(self, qwen: Qwen, examples: list[Example], target: Target, batching: Batching, rank: int, world: int):
        self.qwen, self.examples, self.target, self.batching = qwen, examples, target, batching
        self.rank, self.world = rank, world
        self.per_epoch = math.ceil(len(examples) / batching.global_batch)

    @lru_cache(4)  # asked for at every micro-batch: to shuffle a hundred thousand rows takes longer than to read one
    def order(self, epoch: int) -> list[int]:
        """Return all rows in the order of an epoch."""
        order = list(range(len(self.examples)))
        random.Random(f"{self.batching.seed}/{epoch}").shuffle(order)
        return order

    @lru_cache(16)
    def plan(self, step: int) -> list[list[list[int]]]:
        """Return plan[k][rank], the rows of a micro-batch; a rank may have none."""
        epoch, place = divmod(step, self.per_epoch)
        rows = self.order(epoch)[place * self.batching.global_batch:(place + 1) * self.batching.global_batch]
        if not self.target.spec:
            packs = plan_packs([self.examples[i].n_tokens for i in rows], self.batching.max_tokens, self.world)
            return [[[rows[i] for i in pack] for pack in packs_k] for packs_k in packs]
        rows.sort(key=lambda i: (len(self.examples[i].steps), self.examples[i].n_tokens))  # like rows together: less padding
        size = self.batching.batch_size * self.world
        return [[rows[k:k + size][rank::self.world] for rank in range(self.world)] for k in range(0, len(rows), size)]

    def __getitem__(self, place: tuple[int, int]) -> dict:
        ranks = self.plan(place[0])[place[1]]
        rows, examples = ranks[self.rank], self.examples
        # a rank without rows computes one that does not count, so that all ranks do as many
        mine = [examples[i] for i in rows] or [examples[next(i for its in ranks for i in its)]]
        weights = [self.weight(example) if rows else 0.0 for example in mine]
        if not self.target.spec:
            return make_pack(self.qwen, mine, weights, self.target)
        n_blocks = 1 + max(len(examples[i].steps) for its in ranks for i in its)
        return make_batch(self.qwen, mine, weights, self.target, n_blocks)

    def weight(self, example: Example) -> float:
        """The weight of each trained token of a row."""
        return 1.0 if self.batching.loss_norm == "token" else 1.0 / example.n_trained

    def work(self, step: int) -> Work:
        plan = self.plan(step)
        rows = [self.examples[i] for ranks in plan for its in ranks for i in its]
        lengths, grids = [e.n_tokens for e in rows], [(1, *grid) for e in rows for grid in (*e.grids, *e.step_grids)]
        n_trained = sum(e.n_trained for e in rows)
        loads = [[sum(self.examples[i].n_tokens for i in its) for its in ranks] for ranks in plan]
        return Work(len(plan), sum(lengths), n_trained, sum(self.weight(e) * e.n_trained for e in rows),
                    sum(len(e.steps) for e in rows), len(grids),
                    training_flops(self.qwen.config, lengths, n_trained, grids, self.batching.train_vision),
                    sum(lengths) / sum(self.world * max(ranks) for ranks in loads))

    def ahead(self, first: int, last: int) -> Iterator[dict]:
        """Return an iterator over all micro-batches of steps first to last - 1, made by `num_workers` processes."""
        places = ((step, k) for step in range(first, last) for k in range(len(self.plan(step))))
        workers = self.batching.num_workers
        return iter(torch.utils.data.DataLoader(
            self, batch_size=None, sampler=places, num_workers=workers, pin_memory=torch.cuda.is_available(),
            prefetch_factor=2 if workers else None, worker_init_fn=lambda _: torch.set_num_threads(1)))
