"""How alike states are between instances and from step to step: raw, and corrected for what all share.

States with one large common direction have a raw cosine of 0.98 however well they tell instances apart. Every
correction is fitted on the other half of the instances: subtracting the mean of the same set would put the
cosine of unrelated states at -1 / (n - 1). Pairs of corrected states are taken within halves. Their mean
over all pairs is near 0 by construction, for constant states with noise as for unrelated ones. What tells
these apart: the spread, whether an instance is found again (`utils.probe.analysis.retrieval`), how the
variance splits between images and questions (`utils.probe.input_edits.variance_split`).

    raw            cos(z, z')
    centred        after subtracting the mean of the calibration half
    standardised   then divided by its standard deviation in each dimension (outlier coordinates)
    whitened       centred, then multiplied by ((1 - rho) S + rho tr(S) / d I)^(-1/2), S its covariance

Intervals resample instances: the n - 1 pairs of one instance are not independent. A cell is the states of all
instances at one step and one layer; three are in memory at a time. numpy only.
"""
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

FORMS = ("raw", "centred", "standardised", "whitened")
LEVEL = 0.95  # of all intervals
N_BOOT = 2000  # resamples of instances
SHRINKAGE = 0.1  # rho of `whitened`: bounds the weight of directions without variance in the calibration half
LEAST_SHARE = 1e-6  # of the largest variance: directions below are rounding in float32


class Cell(NamedTuple):
    """States [n, d] of the `instances` [n] (indices) at one step and layer (-1: after the final norm)."""

    layer: int
    step: int
    instances: np.ndarray
    states: np.ndarray


# ---- corrections
@dataclass(frozen=True)
class Calibration:
    """Mean and scale [d] of other instances, orthonormal directions of variance [r, d] with the factor that
    whitens each [r], and the factor outside them."""

    mean: np.ndarray
    scale: np.ndarray
    directions: np.ndarray
    factors: np.ndarray
    outside: float


def calibrate(states: np.ndarray, shrinkage: float = SHRINKAGE) -> Calibration:
    """Fit the corrections to states [n, d], n >= 2, without a [d, d] matrix where n <= d."""
    mean = states.mean(0, dtype=np.float64)
    offsets = (states - mean).astype(states.dtype)
    scale = offsets.std(0, ddof=1)
    # the smaller of [n, n] and [d, d]
    small = offsets @ offsets.T if len(states) <= states.shape[1] else offsets.T @ offsets
    values, vectors = np.linalg.eigh(small.astype(np.float64))
    kept = values > LEAST_SHARE * max(values[-1], 0.0)
    values, vectors = values[kept], vectors[:, kept]
    directions = vectors.T.astype(states.dtype)
    if len(states) <= states.shape[1]:
        directions = (directions / np.sqrt(values)[:, None]).astype(states.dtype) @ offsets
    floor = shrinkage * values.sum() / (len(states) - 1) / states.shape[1]
    if not len(values):  # all states are the same: nothing to whiten by
        return Calibration(mean, np.ones_like(scale), directions, values, 1.0)
    factors = ((1 - shrinkage) * values / (len(states) - 1) + floor) ** -0.5
    return Calibration(mean, np.where(scale > 0, scale, 1), directions, factors, float(floor ** -0.5))


def apply_form(calibration: Calibration, states: np.ndarray, form: str) -> np.ndarray:
    if form == "raw":
        return states
    offsets = (states - calibration.mean).astype(states.dtype)
    if form == "centred":
        return offsets
    if form == "standardised":
        return offsets / calibration.scale
    factors = (calibration.factors - calibration.outside).astype(states.dtype)
    inside = (offsets @ calibration.directions.T) * factors
    return (calibration.outside * offsets + inside @ calibration.directions).astype(states.dtype)


def draw_halves(n: int, seed: int) -> np.ndarray:
    """Return 0 or 1 for each of n instances, drawn: the order of a file may be periodic."""
    return np.random.default_rng(seed).permutation(n) % 2


def correct(states: np.ndarray, halves: np.ndarray,
            forms: Iterable[str] = FORMS) -> dict[str, np.ndarray] | None:
    """Return {form: [n, d]}, each half corrected by the other; None if a half has under two states."""
    if min((halves == half).sum() for half in (0, 1)) < 2:
        return None
    result = {form: np.empty_like(states) for form in forms}
    for half in (0, 1):
        calibration = calibrate(states[halves != half])
        for form in result:
            result[form][halves == half] = apply_form(calibration, states[halves == half], form)
    return result


def unit(states: np.ndarray) -> np.ndarray:
    """Return rows of length 1; a zero row stays zero."""
    return states / np.maximum(np.linalg.norm(states, axis=1, keepdims=True), 1e-30)


def cosine_matrix(states: np.ndarray) -> np.ndarray:
    rows = unit(states)
    return rows @ rows.T


# ---- intervals
class Bootstrap:
    """Resamples of n instances, the same for every measure, so that differences are paired."""

    def __init__(self, n: int, level: float = LEVEL, n_boot: int = N_BOOT, seed: int = 0):
        self.n, self.ends = n, [(1 - level) / 2, (1 + level) / 2]
        self.counts: dict[bytes, np.ndarray] = {}  # of drawn pairs, by the mask of `pairs`
        self.drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n),
                                                             size=n_boot).astype(np.float32)

    def entry(self, value: float, resampled: np.ndarray) -> dict:
        """Return the value with its percentile interval; empty resamples (NaN) are left out."""
        low, high = np.quantile(resampled[np.isfinite(resampled)], self.ends)
        return {"value": value, "low": float(low), "high": float(high), "n": self.n}

    def mean(self, values: np.ndarray) -> dict:
        return self.entry(float(values.mean()), self.drawn @ values.astype(np.float64) / self.n)

    def ratio(self, above: np.ndarray, below: np.ndarray) -> dict:
        """Return the entry of sum(above) / sum(below), both [n], the latter above 0."""
        above, below = (values.astype(np.float64) for values in (above, below))
        with np.errstate(divide="ignore", invalid="ignore"):
            return self.entry(float(above.sum() / below.sum()), (self.drawn @ above) / (self.drawn @ below))

    def spread(self, states: np.ndarray) -> dict:
        """Return the entry of the relative spread E|z - mu|^2 / |mu|^2 of states [n, d], unbiased."""
        mean = states.mean(0, dtype=np.float64)
        offsets = (states - mean).astype(states.dtype)  # from the mean: small spreads keep their digits
        squares, along = (offsets ** 2).sum(1), (offsets @ mean.astype(states.dtype)).astype(np.float64)
        gram = offsets @ offsets.T

        def spread_of(weights: np.ndarray) -> np.ndarray:
            shift = ((weights @ gram) * weights).sum(1) / self.n**2  # |mean of the resample - mean|^2
            length = mean @ mean + 2 * weights @ along / self.n + shift
            return (weights @ squares / self.n - shift) * self.n / (self.n - 1) / length
        return self.entry(float(spread_of(np.ones((1, self.n), dtype=np.float32))[0]), spread_of(self.drawn))

    def pairs(self, matrix: np.ndarray, mask: np.ndarray) -> dict:
        """Return the entry of the mean of `matrix` over the pairs of distinct instances in `mask`, both
        [n, n]. A pair counts as often as both instances were drawn."""
        mask = mask & ~np.eye(self.n, dtype=bool)
        key = mask.tobytes()
        if key not in self.counts:  # the cells of a store share their masks
            self.counts[key] = self.pair_sums(mask)
        with np.errstate(divide="ignore", invalid="ignore"):
            return self.entry(float(matrix[mask].mean(dtype=np.float64)),
                              self.pair_sums(np.where(mask, matrix, 0)) / self.counts[key])

    def pair_sums(self, values: np.ndarray) -> np.ndarray:
        """Return the sum of `values` [n, n] over all pairs of each resample."""
        return ((self.drawn @ values.astype(np.float32)) * self.drawn).sum(1, dtype=np.float64)


# ---- cell by cell
class Corrected(NamedTuple):
    """A cell and its states in every form."""

    cell: Cell
    forms: dict[str, np.ndarray]


class CellSimilarity:
    """Measures cells that come layer by layer, step by step; `matrices` holds the last cell's cosines by
    form. `halves` [n] are of all instances."""

    def __init__(self, halves: np.ndarray, n_boot: int = N_BOOT, seed: int = 0):
        self.halves, self.settings = halves, (LEVEL, n_boot, seed)
        self.instances: tuple[int, ...] | None = None
        self.first: Corrected | None = None  # of this layer: step 0, and the step before
        self.before: Corrected | None = None
        self.matrices: dict[str, np.ndarray] = {}

    def measure(self, cell: Cell) -> list[dict]:
        """Return rows of a cell. inter: pairs of instances; adjacent, first: this step and the one before, or
        step 0, of one instance; spread. Fewer than four instances give no rows."""
        self.matrices = {}
        if self.first is None or cell.layer != self.first.cell.layer:
            self.first = self.before = None
        if len(cell.instances) < 4:
            return []
        if tuple(cell.instances) != self.instances:
            self.instances, self.boot = tuple(cell.instances), Bootstrap(len(cell.instances), *self.settings)
        halves = self.halves[cell.instances]
        same_half = halves[:, None] == halves
        place, rows = {"layer": cell.layer, "step": cell.step}, []
        forms = correct(cell.states, halves) or {"raw": cell.states}
        for form, states in forms.items():
            self.matrices[form] = cosine_matrix(states)
            rows.append({**place, "measure": "inter", "form": form,
                         **self.boot.pairs(self.matrices[form], same_half | (form == "raw"))})
        rows.append({**place, "measure": "spread", "form": "raw", **self.boot.spread(cell.states)})
        current = Corrected(cell, forms)
        if self.before is not None and self.before.cell.step + 1 == cell.step:
            rows += [place | row for row in self.compare_steps("adjacent", self.before, current)]
        if self.first is not None:
            rows += [place | row for row in self.compare_steps("first", self.first, current)]
        self.before = current
        if cell.step == 0:
            self.first = current
        return rows

    def compare_steps(self, name: str, earlier: Corrected, later: Corrected) -> list[dict]:
        """Return the rows of two steps, over the instances that have both."""
        _, in_later, in_earlier = np.intersect1d(later.cell.instances, earlier.cell.instances,
                                                 return_indices=True)
        n, rows = len(in_later), []
        if n < 2:
            return rows
        boot = self.boot if n == len(self.instances) else Bootstrap(n, *self.settings)
        for form in later.forms:
            if form in earlier.forms:
                one, two = earlier.forms[form][in_earlier], later.forms[form][in_later]
                rows.append({"measure": name, "form": form, **boot.mean((unit(one) * unit(two)).sum(1))})
        return rows
