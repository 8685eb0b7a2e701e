"""A model with known truth, in closed form: an attribute reaches the answer through latents, past them, or
both ways.

An item shows attribute a of C. Its latent is Z = kappa * E_a + mu0, with E [C, d] orthonormal rows and mu0 a
direction that all items share. The answer's logits are scale * (share * E (Z - mu0) + (1 - share) * E I) +
noise, where I is E_a, or 0 for the blank image. The noise is Gumbel's: the likeliest answer is right with the
probability of a softmax. At kappa = 1 and with the same noise in every world NIE = share * TE, item by item.
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
    kappa: float = 1.0
    redraw: float = 0.0
    offset: float = 0.0  # length of mu0: raises the raw cosine of latents and nothing else
    n_options: int = 4
    width: int = 8

    @property
    def embedding(self) -> np.ndarray:
        return np.eye(self.n_options, self.width)

    @property
    def mu0(self) -> np.ndarray:
        return self.offset * np.eye(self.width)[-1]

    def latents(self, attributes: np.ndarray | None, n: int) -> np.ndarray:
        """Return Z [n, width]: of the attributes [n], or of the blank image (None)."""
        shown = np.zeros((n, self.width)) if attributes is None else self.embedding[attributes]
        return self.kappa * shown + self.mu0

    def logits(self, attributes: np.ndarray | None, latents: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """Return the logits [n, n_options] of the image (None: blank), latents forced to a value, and noise.
        """
        image = np.zeros_like(latents) if attributes is None else self.embedding[attributes]
        mixed = self.share * (latents - self.mu0) + (1 - self.share) * image
        return self.scale * mixed @ self.embedding.T + noise

    def worlds(self, attributes: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Return the logits of the four worlds of items; the clean world keeps the items' own noise."""
        n = len(attributes)
        own, z, z0 = rng.gumbel(size=(n, self.n_options)), self.latents(attributes, n), self.latents(None, n)
        worlds = {"y_xz": self.logits(attributes, z, own)}
        for name, image, latents in (("y_xz0", attributes, z0), ("y_x0z", None, z), ("y_x0z0", None, z0)):
            redrawn = rng.random((n, 1)) < self.redraw
            worlds[name] = self.logits(image, latents, np.where(redrawn, rng.gumbel(size=own.shape), own))
        return worlds

    def accuracy(self, image: bool, latent: bool) -> float:
        """Return the probability of a right answer in a world with or without the image and its latents."""
        gold = self.scale * (self.share * self.kappa * latent + (1 - self.share) * image)
        return math.exp(gold) / (math.exp(gold) + self.n_options - 1)

    def accuracy_under_tau(self) -> float:
        """Return the probability of a right answer when every item is given the latents of one attribute."""
        others = self.n_options - 1
        direct, lie = math.exp(self.scale * (1 - self.share)), math.exp(self.scale * self.share * self.kappa)
        return (self.accuracy(True, True) + others * direct / (direct + lie + others - 1)) / self.n_options


def outcomes(worlds: dict[str, np.ndarray], attributes: np.ndarray, binary: bool) -> dict[str, np.ndarray]:
    """Return one outcome per item in each world: the gold logit, or whether the likeliest answer is right."""
    if binary:
        return {name: (logits.argmax(axis=1) == attributes).astype(float) for name, logits in worlds.items()}
    return {name: logits[np.arange(len(attributes)), attributes] for name, logits in worlds.items()}


def draw(model: AnalyticModel, n: int, binary: bool, rng: np.random.Generator, size: int = 1,
         rho: float = 0.0) -> tuple:
    """Return (outcomes of n items in the four worlds, groups). In a share rho of the groups of `size` all
    items are copies of the first, so that every item keeps its distribution and items of a group correlate by
    rho exactly."""
    attributes, groups = rng.integers(model.n_options, size=n), np.arange(n) // size
    found = outcomes(model.worlds(attributes, rng), attributes, binary)
    copies = (rng.random(n // size) < rho)[groups]
    rows = np.where(copies, groups * size, np.arange(n))
    return {name: values[rows] for name, values in found.items()}, groups.tolist()


def trinomial(n: int, p_b: float, p_c: float) -> Iterator[tuple[int, int, float]]:
    """Yield (b, c, probability) of all counts of changed answers that come up at all, of n items that change
    or not."""
    logs = [math.lgamma(i + 1) for i in range(n + 1)]
    for b, c in itertools.product(range(n + 1), repeat=2):
        near = abs(b - n * p_b) < 8 * math.sqrt(n * p_b) + 8 and abs(c - n * p_c) < 8 * math.sqrt(n * p_c) + 8
        rest = n - b - c
        if near and rest >= 0:
            yield b, c, math.exp(logs[n] - logs[b] - logs[c] - logs[rest] + b * math.log(p_b)
                                 + c * math.log(p_c) + rest * math.log(1 - p_b - p_c))
