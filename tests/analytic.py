"""A closed-form model: an attribute reaches the answer through latents, past them, or both ways.

An item shows attribute a of C; its image I and its latent Z are both the unit vector E_a, or 0 for the blank
image. The answer's logits are scale * (share * Z + (1 - share) * I) + noise. The noise is Gumbel's: the
likeliest answer is right with the probability of a softmax. With the same noise in every world
NIE = share * TE, item by item.
"""
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class AnalyticModel:
    """`redraw` is the probability that intervened runs draw new noise: answers change without an effect."""
    share: float
    scale: float = 3.0
    redraw: float = 0.0
    n_options: int = 4

    def logits(self, image: np.ndarray, latents: np.ndarray, noise: np.ndarray) -> np.ndarray:
        return self.scale * (self.share * latents + (1 - self.share) * image) + noise

    def worlds(self, attributes: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Return the logits of the four worlds of items; the clean world keeps the items' own noise."""
        shown, blank = np.eye(self.n_options)[attributes], np.zeros((len(attributes), self.n_options))
        own = rng.gumbel(size=shown.shape)
        worlds = {"y_xz": self.logits(shown, shown, own)}
        for name, image, latents in (("y_xz0", shown, blank), ("y_x0z", blank, shown),
                                     ("y_x0z0", blank, blank)):
            redrawn = rng.random((len(own), 1)) < self.redraw
            worlds[name] = self.logits(image, latents, np.where(redrawn, rng.gumbel(size=own.shape), own))
        return worlds

    def accuracy(self, image: bool, latent: bool) -> float:
        """Return the probability of a right answer in a world with or without the image and its latents."""
        gold = math.exp(self.logits(image, latent, 0))
        return gold / (gold + self.n_options - 1)


def draw(model: AnalyticModel, n: int, binary: bool, rng: np.random.Generator, size: int = 1,
         rho: float = 0.0) -> tuple:
    """Return ({world: outcomes of n items}, groups). An outcome is the gold logit, or (binary) whether the
    likeliest answer is right. In a share rho of the groups of `size`, all items are copies of the first:
    items of a group correlate by exactly rho, each as if drawn alone."""
    attributes, groups = rng.integers(model.n_options, size=n), np.arange(n) // size
    worlds = model.worlds(attributes, rng)
    found = {name: (logits.argmax(axis=1) == attributes).astype(float) if binary else
             logits[np.arange(n), attributes] for name, logits in worlds.items()}
    copies = (rng.random(n // size) < rho)[groups]
    rows = np.where(copies, groups * size, np.arange(n))
    return {name: values[rows] for name, values in found.items()}, groups.tolist()


def trinomial(n: int, p_b: float, p_c: float) -> Iterator[tuple[int, int, float]]:
    """Yield (b, c, probability) of all counts of changed answers of n items that come up at all."""
    logs = [math.lgamma(i + 1) for i in range(n + 1)]
    for b, c in itertools.product(range(n + 1), repeat=2):
        near = abs(b - n * p_b) < 8 * math.sqrt(n * p_b) + 8 and abs(c - n * p_c) < 8 * math.sqrt(n * p_c) + 8
        rest = n - b - c
        if near and rest >= 0:
            yield b, c, math.exp(logs[n] - logs[b] - logs[c] - logs[rest] + b * math.log(p_b)
                                 + c * math.log(p_c) + rest * math.log(1 - p_b - p_c))


def most_misses(rate, n, chance=0.001):
    """Return the largest count of n that is reached with more than this chance if misses have the rate."""
    tail, k = 1.0, 0
    while tail > chance:
        tail -= math.comb(n, k) * rate**k * (1 - rate) ** (n - k)
        k += 1
    return k - 1
