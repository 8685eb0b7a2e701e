"""How alike states are between instances and from step to step: raw, and corrected for what all of them
share. numpy only.

Raw cosine is ruled by what states have in common: states with one large common direction lie at 0.98 however
well they tell instances apart. Every correction is fitted on instances other than those it is applied to
(`draw_halves`, `correct`): a mean of one's own set would put the cosine of unrelated states at -1 / (n - 1).
Pairs of corrected states are taken within halves.

    raw            cos(z, z')
    centred        after subtracting the mean of the calibration half
    standardised   after that, divided by its standard deviation in each dimension (outlier coordinates)
    whitened       after that, multiplied by (1 - rho) S + rho tr(S) / d I to the power -1/2, S its covariance
    adjusted       (c - c0) / (1 - c0), c0 the raw cosine of ordinary tokens (Ethayarajh 2019, "How Contextual
    ...")

Intervals draw instances, not pairs: the n - 1 pairs of one instance are not independent. A cell is the states
of all instances at one step and one layer; `measure_cells` holds three cells at a time, whatever their
number.
"""
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

FORMS = ("raw", "centred", "standardised", "whitened")
N_BOOT = 2000  # resamples of instances
# rho of `whitened`: bounds what directions without variance in the calibration half can weigh
SHRINKAGE = 0.1
LEAST_SHARE = 1e-6  # of the largest variance: directions below are rounding in float32


class Cell(NamedTuple):
    """States [n, d] of the instances `rows` [n] (places in a list of instances) at one layer (-1: after the
    final norm) and one step."""

    layer: int
    step: int
    rows: np.ndarray
    states: np.ndarray


# ------------------------------------------------------------------------------------ corrections
@dataclass(frozen=True)
class Calibration:
    """What other instances tell: mean and scale [d]; orthonormal directions of variance [r, d] with the
    factor that whitens each [r], and the factor of every direction outside them."""

    mean: np.ndarray
    scale: np.ndarray
    directions: np.ndarray
    factors: np.ndarray
    outside: float


def calibrate(states: np.ndarray, shrinkage: float = SHRINKAGE) -> Calibration:
    """Fit the corrections to states [n, d], n >= 2; no [d, d] matrix where n <= d. A dimension that never
    varies keeps scale 1."""
    if len(states) < 2 or not 0 < shrinkage <= 1:
        raise ValueError(
            f"calibrate: {len(states)} states, shrinkage {shrinkage}; expected two states or more and "
                         "0 < shrinkage <= 1")
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


def apply(calibration: Calibration, states: np.ndarray, form: str) -> np.ndarray:
    """Return states [n, d] in one of FORMS."""
    if form == "raw":
        return states
    offsets = (states - calibration.mean).astype(states.dtype)
    if form == "centred":
        return offsets
    if form == "standardised":
        return offsets / calibration.scale
    if form != "whitened":
        raise ValueError(f"form {form!r}, expected one of {', '.join(FORMS)}")
    inside = (offsets @ calibration.directions.T) * (calibration.factors
                                                     - calibration.outside).astype(states.dtype)
    return (calibration.outside * offsets + inside @ calibration.directions).astype(states.dtype)


def draw_halves(n: int, seed: int) -> np.ndarray:
    """Return 0 or 1 for each of n instances, as many of each; drawn, since a file's order may have a period
    of its own."""
    return np.random.default_rng(seed).permutation(n) % 2


def correct(states: np.ndarray, halves: np.ndarray, forms: Iterable[str] = FORMS) -> dict[str,
                                                                                          np.ndarray] | None:
    """Return {form: [n, d]}, each half corrected by what the other tells; None if a half has fewer than two
    states."""
    if min((halves == half).sum() for half in (0, 1)) < 2:
        return None
    result = {form: np.empty_like(states) for form in forms}
    for half in (0, 1):
        calibration = calibrate(states[halves != half])
        for form in result:
            result[form][halves == half] = apply(calibration, states[halves == half], form)
    return result


def unit(states: np.ndarray) -> np.ndarray:
    """Return rows of length 1; a zero row stays zero and has cosine 0 with all."""
    return states / np.maximum(np.linalg.norm(states, axis=1, keepdims=True), 1e-30)


def cosine_matrix(states: np.ndarray) -> np.ndarray:
    """Return the cosines [n, n] of rows [n, d]."""
    rows = unit(states)
    return rows @ rows.T


# ------------------------------------------------------------------------------------ intervals
class Bootstrap:
    """Resamples of n instances, the same for every measure of a run, so that differences are paired."""

    def __init__(self, n: int, level: float = 0.95, n_boot: int = N_BOOT, seed: int = 0):
        self.n, self.level = n, level
        self.drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n),
                                                             size=n_boot).astype(np.float32)

    def interval(self, values: np.ndarray) -> tuple[float, float]:
        """Return the percentile interval of resampled values; those that are no number (an empty resample)
        are left out."""
        low, high = np.quantile(values[np.isfinite(values)], [(1 - self.level) / 2, (1 + self.level) / 2])
        return float(low), float(high)

    def mean(self, values: np.ndarray) -> dict:
        """Return {"value", "low", "high", "n"} of the mean over instances [n]."""
        return self._entry(float(values.mean()), self.drawn @ values.astype(np.float64) / self.n)

    def ratio(self, above: np.ndarray, below: np.ndarray) -> dict:
        """Return the same of sum(above) / sum(below), both [n]: instances of nothing weigh nothing."""
        above, below = (values.astype(np.float64) for values in (above, below))
        if not below.sum() > 0:
            raise ValueError(f"ratio of means: the lower sum is {below.sum()}, expected above 0")
        with np.errstate(divide="ignore", invalid="ignore"):
            return self._entry(float(above.sum() / below.sum()), (self.drawn @ above) / (self.drawn @ below))

    def spread(self, states: np.ndarray) -> dict:
        """Return the same of the relative spread E|z - mu|^2 / |mu|^2 of states [n, d], an unbiased variance
        above."""
        mean = states.mean(0, dtype=np.float64)
        offsets = (states - mean).astype(states.dtype)  # from the mean: small spreads keep their digits
        squares, along = (offsets ** 2).sum(1), (offsets @ mean.astype(states.dtype)).astype(np.float64)
        gram = offsets @ offsets.T

        def of(weights: np.ndarray) -> np.ndarray:
            shift = ((weights @ gram) * weights).sum(1) / self.n**2  # |mean of the resample - mean|^2
            length = mean @ mean + 2 * weights @ along / self.n + shift
            return (weights @ squares / self.n - shift) * self.n / (self.n - 1) / length
        return self._entry(float(of(np.ones((1, self.n), dtype=np.float32))[0]), of(self.drawn))

    def _entry(self, value: float, resampled: np.ndarray) -> dict:
        low, high = self.interval(resampled)
        return {"value": value, "low": low, "high": high, "n": self.n}


class PairBootstrap:
    """Means of an [n, n] matrix over pairs of distinct instances, by mask: {"all": bool [n, n], ...}.

    A pair counts as often as both its instances were drawn together. With masks "within" and "between" there
    is a "difference". A mask without pairs is left out. The weights of the masks are made once for all
    matrices.
    """

    def __init__(self, masks: dict[str, np.ndarray], level: float = 0.95, n_boot: int = N_BOOT,
                 seed: int = 0):
        n = len(next(iter(masks.values())))
        self.boot, off = Bootstrap(n, level, n_boot, seed), ~np.eye(n, dtype=bool)
        self.masks = {name: (mask & off) for name, mask in masks.items() if (mask & off).any()}
        self.counts = {name: self._sums(mask.astype(np.float32)) for name, mask in self.masks.items()}

    def _sums(self, matrix: np.ndarray) -> np.ndarray:
        drawn = self.boot.drawn
        return ((drawn @ matrix) * drawn).sum(1, dtype=np.float64)

    def summary(self, matrix: np.ndarray) -> dict[str, dict]:
        """Return {mask: {"value", "low", "high", "n", "n_pairs"}}, "n_pairs" counting each pair once."""
        result, resampled = {}, {}
        for name, mask in self.masks.items():
            with np.errstate(divide="ignore", invalid="ignore"):
                resampled[name] = self._sums(np.where(mask, matrix, 0).astype(np.float32)) / self.counts[name]
            result[name] = self.boot._entry(float(matrix[mask].mean(dtype=np.float64)), resampled[name]) | {
                "n_pairs": int(mask.sum()) // 2}
        if {"within", "between"} <= set(result):
            value = result["within"]["value"] - result["between"]["value"]
            result["difference"] = self.boot._entry(value, resampled["within"] - resampled["between"])
        return result


# ------------------------------------------------------------------------------------ cell by cell
def pair_masks(halves: np.ndarray | None, tasks: np.ndarray) -> dict[str, np.ndarray]:
    """Return the masks of `PairBootstrap`: all pairs (within halves, if given), of one task, and of two."""
    together = np.ones((len(tasks),) * 2, dtype=bool) if halves is None else halves[:, None] == halves
    same = tasks[:, None] == tasks
    masks = {"all": together}
    return masks if same.all() else masks | {"within": together & same, "between": together & ~same}


class Measure:
    """Runs over cells in the order layer by layer, step by step, and yields rows of numbers.

    halves and tasks [n] of all instances. `seen(cell, form, matrix)` is called with every inter-instance
    matrix.
    """

    def __init__(self, halves: np.ndarray, tasks: np.ndarray, level: float = 0.95, n_boot: int = N_BOOT,
                 seed: int = 0,
                 forms: tuple[str, ...] = FORMS, seen=None):
        self.halves, self.tasks, self.settings = halves, np.asarray(tasks), (level, n_boot, seed)
        self.forms, self.seen = forms, seen or (lambda cell, form, matrix: None)
        self.rows: tuple[int, ...] | None = None

    def prepare(self, rows: np.ndarray) -> None:
        """Make the resamples of these instances, unless the last cell had the same."""
        if tuple(rows) != self.rows:
            self.rows, halves, tasks = tuple(rows), self.halves[rows], self.tasks[rows]
            self.pairs = {True: PairBootstrap(pair_masks(None, tasks), *self.settings),
                          False: PairBootstrap(pair_masks(halves, tasks), *self.settings)}

    def run(self, cells: Iterable[Cell]) -> Iterator[dict]:
        """Yield {"layer", "step", "measure", "form", "pairs", "value", "low", "high", "n"}; steps count from
        0.

        inter: pairs of instances at the step; adjacent: this step and the one before; first: this step and
        step 0, of one instance; drift: |z_t - z_(t-1)| / |z_(t-1)|; spread: relative spread. Below four
        instances nothing is yielded.
        """
        first = before = None
        for cell in cells:
            if first is None or cell.layer != first[0].layer:
                first = before = None
            if len(cell.rows) < 4:
                continue
            self.prepare(cell.rows)
            place = {"layer": cell.layer, "step": cell.step}
            forms = correct(cell.states, self.halves[cell.rows], self.forms) or {"raw": cell.states}
            for form, states in forms.items():
                matrix = cosine_matrix(states)
                self.seen(cell, form, matrix)
                for name, entry in self.pairs[form == "raw"].summary(matrix).items():
                    yield {**place, "measure": "inter", "form": form, "pairs": name, **entry}
            yield {**place, "measure": "spread", "form": "raw", "pairs": "all",
                   **self.pairs[True].boot.spread(cell.states)}
            for name, other in (("adjacent", before), ("first", first)):
                if other is not None and (name == "first" or other[0].step + 1 == cell.step):
                    yield from ({**place, **row} for row in self.between(name, other, (cell, forms)))
            before = cell, forms
            first = first or (before if cell.step == 0 else None)

    def between(self, name: str, earlier: tuple[Cell, dict], later: tuple[Cell, dict]) -> Iterator[dict]:
        """Yield the rows of two steps of the instances that have both."""
        _, mine, its = np.intersect1d(later[0].rows, earlier[0].rows, return_indices=True)
        if len(mine) < 2:
            return
        boot = self.pairs[True].boot if len(mine) == len(self.rows) else Bootstrap(len(mine), *self.settings)
        for form in later[1]:
            if form in earlier[1]:
                one, two = earlier[1][form][its], later[1][form][mine]
                yield {"measure": name, "form": form, "pairs": "all",
                       **boot.mean((unit(one) * unit(two)).sum(1))}
        if name == "adjacent":
            one, two = earlier[0].states[its], later[0].states[mine]
            steps = np.linalg.norm(two - one, axis=1) / np.maximum(np.linalg.norm(one, axis=1), 1e-30)
            yield {"measure": "drift", "form": "raw", "pairs": "all", **boot.mean(steps)}


def adjust(row: dict, c0: float) -> dict:
    """Return a raw row as "adjusted" for anisotropy: c0 is the raw cosine of ordinary tokens at the same
    layer, below 1."""
    if not c0 < 1:
        raise ValueError(
            f"c0 is {c0}, expected below 1: ordinary tokens that are all alike leave nothing to adjust to")
    return {**row, "form": "adjusted", **{end: (row[end] - c0) / (1 - c0) for end in ("value", "low",
                                                                                      "high")}}
