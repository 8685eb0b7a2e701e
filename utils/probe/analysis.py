"""All measures of a store of states: similarity, and what cosines do not show. numpy only.

Spectrum, CKA and retrieval work on [n, n] products, so that d may be large. The linear probe is kernel ridge
classification with grouped folds and shuffled labels as a control: with one image in training and test it
would recognise the image instead of the label.
"""
from collections import Counter
from collections.abc import Hashable, Sequence
from pathlib import Path

import numpy as np

from utils.items import gold_words, group_of
from utils.probe.figures import draw_curves, draw_heatmaps, draw_layers, draw_spectra
from utils.probe.similarity import LEVEL, Cell, CellSimilarity, correct, draw_halves, unit
from utils.probe.states import STORED, States
from utils.stats import cluster_bootstrap

SHARES = (0.90, 0.95, 0.99)  # of the variance
RIDGE = 1e-2  # of the mean variance of a training state along its own kernel: enough for n below d
N_SHUFFLES = 20
FOLDS = 5
MOST_ALIKE = 0.99  # ordinary tokens with a higher mean cosine leave nothing to adjust a cosine to
SHOWN = 100  # instances in a heat map, as in the paper


# ---- spectrum, CKA, retrieval
def spectrum(states: np.ndarray) -> dict:
    """Return how many directions states [n, d] span around their mean: participation ratio (sum)^2 / sum of
    squares, effective rank exp(entropy) (Roy and Vetterli 2007), "rank90" the directions that hold 90 %,
    "top1" the largest share. All are bounded by n - 1. None where nothing varies."""
    offsets = states - states.mean(0, dtype=np.float64)
    values = np.linalg.eigvalsh(offsets @ offsets.T)[::-1].clip(0)
    ranks = [f"rank{100 * share:.0f}" for share in SHARES]
    if values[0] <= 1e-24 * max(float((states.astype(np.float64) ** 2).sum()), 1e-300):
        return {"n": len(states), "participation_ratio": None, "effective_rank": None, "top1": None,
                **dict.fromkeys(ranks)}
    p = values / values.sum()
    positive = p[p > 0]
    return {"n": len(states), "participation_ratio": float(1 / (p**2).sum()),
            "effective_rank": float(np.exp(-(positive * np.log(positive)).sum())), "top1": float(p[0]),
            **{name: int(np.searchsorted(np.cumsum(p), share - 1e-12) + 1)
               for name, share in zip(ranks, SHARES)}}


def cka(x: np.ndarray, y: np.ndarray, debiased: bool = True) -> float:
    """Return the linear centred kernel alignment of states [n, d] and [n, e] of the same instances. The
    debiased form (Song et al. 2012, HSIC_1; n >= 4) has expectation 0 for independent sets, the biased one
    0.97 at n = 100, d = 3584."""
    k, l = (states @ states.T for states in (x.astype(np.float64), y.astype(np.float64)))
    hsic = hsic_debiased if debiased else hsic_biased
    return float(hsic(k, l) / np.sqrt(hsic(k, k) * hsic(l, l)))


def hsic_debiased(k: np.ndarray, l: np.ndarray) -> float:
    n = len(k)
    k, l = (gram - np.diag(np.diag(gram)) for gram in (k, l))
    a, b = k.sum(0), l.sum(0)
    return ((k * l).sum() + a.sum() * b.sum() / ((n - 1) * (n - 2)) - 2 * (a @ b) / (n - 2)) / (n * (n - 3))


def hsic_biased(k: np.ndarray, l: np.ndarray) -> float:
    k, l = (gram - gram.mean(0) - gram.mean(1)[:, None] + gram.mean() for gram in (k, l))
    return (k * l).sum() / (len(k) - 1) ** 2


def retrieval(queries: np.ndarray, keys: np.ndarray) -> dict:
    """Return how well row i of `queries` [n, d] retrieves row i of `keys` by cosine: top-1 accuracy, mean
    reciprocal rank, and both by chance. Tied keys are in random order."""
    scores = unit(queries) @ unit(keys).T
    own, n = np.diag(scores)[:, None], len(keys)
    above, ties = (scores > own + 1e-6).sum(1), (abs(scores - own) <= 1e-6).sum(1)  # ties include the own key
    harmonic = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, n + 1))])
    return {"n": n, "top1": float(((above == 0) / ties).mean()), "top1_chance": 1 / n,
            "mrr": float(((harmonic[above + ties] - harmonic[above]) / ties).mean()),
            "mrr_chance": float(harmonic[n] / n)}


# ---- linear probe
def grouped_folds(groups: Sequence[Hashable], n_folds: int, seed: int = 0) -> np.ndarray:
    """Return the fold [n] of every instance: whole groups, folds of about the same size."""
    names, members = np.unique(np.asarray([repr(group) for group in groups]), return_inverse=True)
    if len(names) < n_folds or n_folds < 2:
        raise ValueError(f"{len(names)} groups for {n_folds} folds; expected a group for each, two or more")
    sizes = np.bincount(members)
    order = np.random.default_rng(seed).permutation(len(names))
    order = order[np.argsort(-sizes[order], kind="stable")]  # the largest first, each to the emptiest fold
    fold_of, filled = np.zeros(len(names), dtype=int), np.zeros(n_folds)
    for group in order:
        fold_of[group] = np.argmin(filled)
        filled[fold_of[group]] += sizes[group]
    return fold_of[members]


def ridge_scores(train: np.ndarray, targets: np.ndarray, test: np.ndarray,
                 ridge: float = RIDGE) -> np.ndarray:
    """Return scores [m, ...] of `test` [m, d] from a ridge fit of `targets` [n, ...] on `train` [n, d]."""
    mean, mean_target = train.mean(0, dtype=np.float64), targets.mean(0)
    train_offsets, test_offsets = ((x - mean).astype(train.dtype) for x in (train, test))
    kernel = (train_offsets @ train_offsets.T).astype(np.float64)
    weight = ridge * max(float(np.trace(kernel)) / len(train), 1e-30)
    flat = (targets - mean_target).reshape(len(targets), -1)
    solved = np.linalg.solve(kernel + weight * np.eye(len(train)), flat)
    scores = (test_offsets @ train_offsets.T).astype(np.float64) @ solved
    return scores.reshape(len(test), *targets.shape[1:]) + mean_target


def linear_probe(states: np.ndarray, labels: Sequence[Hashable], groups: Sequence[Hashable],
                 n_folds: int = FOLDS, seed: int = 0) -> dict:
    """Return how well `labels` [n] can be read from states [n, d], by folds over `groups`. "low", "high":
    groups resampled; "majority": share of the commonest label; "shuffled": mean accuracy with permuted
    labels, "p" that of `accuracy` against them."""
    names, own = np.unique(np.asarray([repr(label) for label in labels]), return_inverse=True)
    if len(names) < 2 or not len(states) == len(own) == len(groups):
        raise ValueError(f"{len(states)} states, {len(own)} labels of {len(names)} kinds, {len(groups)} "
                         "groups; expected as many of each, and two kinds")
    folds, rng = grouped_folds(groups, n_folds, seed), np.random.default_rng(seed)
    # [n, 1 + N_SHUFFLES]
    columns = np.stack([own, *(shuffle_labels(own, groups, rng) for _ in range(N_SHUFFLES))], axis=1)
    right = np.zeros(columns.shape, dtype=bool)
    for fold in range(n_folds):
        held = folds == fold
        # [m, 1 + N_SHUFFLES, classes]
        scores = ridge_scores(states[~held], np.eye(len(names))[columns[~held]], states[held])
        right[held] = scores.argmax(-1) == columns[held]
    accuracy, shuffled = right[:, 0].mean(), right[:, 1:].mean(0)
    low, high = cluster_bootstrap(right[:, 0], list(groups), LEVEL, 2000, seed)
    return {"accuracy": float(accuracy), "low": low, "high": high,
            "majority": float(np.bincount(own).max() / len(own)), "shuffled": float(shuffled.mean()),
            "above_shuffled": float(accuracy - shuffled.mean()),
            "p": float((1 + (shuffled >= accuracy).sum()) / (1 + N_SHUFFLES)), "n": len(own),
            "classes": len(names)}


def shuffle_labels(labels: np.ndarray, groups: Sequence[Hashable], rng: np.random.Generator) -> np.ndarray:
    """Permute labels between instances, or between groups that each have one label."""
    _, members = np.unique(np.asarray([repr(group) for group in groups]), return_inverse=True)
    first = np.zeros(members.max() + 1, dtype=int)
    first[members[::-1]] = labels[::-1]
    return rng.permutation(first)[members] if (first[members] == labels).all() else rng.permutation(labels)


# ---- all cells of a store
def adjust(row: dict, c0: float) -> dict:
    """Return a raw row as "adjusted" for anisotropy by c0."""
    if not c0 < 1:
        raise ValueError(f"c0 is {c0}, expected below 1: alike tokens leave nothing to adjust to")
    adjusted = {name: (row[name] - c0) / (1 - c0) for name in ("value", "low", "high")}
    return {**row, "form": "adjusted", **adjusted}


class Analysis:
    """Measures the states of `items`: `rows` are the lines of probes.jsonl, `matrices` the heat maps."""

    def __init__(self, store: States, items: list[dict], n_steps: int, seed: int):
        self.store, self.n_steps, self.seed = store, n_steps, seed
        self.keys = [item["id"] for item in items]
        field = "benchmark" if len({item.get("benchmark") for item in items}) > 1 else "category"
        self.tasks = np.array([str(item.get(field) or "all") for item in items])
        self.halves, self.groups = draw_halves(len(items), seed), list(map(group_of, items))
        self.labels = {"decode": [gold_words(item) or item["id"] for item in items],
                       "decode_task": self.tasks.tolist()}
        images = [store.load(key, "image") for key in self.keys]
        self.image = {i: image.mean(0) for i, image in enumerate(images) if image is not None}
        shapes = [r["tensors"]["inner"] for r in store.records.values() if "inner" in r["tensors"]]
        self.middle = shapes[0][1] // 2 if shapes else -1  # layer
        self.rows: list[dict] = []
        self.matrices: dict[tuple[str, str, int], tuple[np.ndarray, np.ndarray]] = {}

    def run(self) -> None:
        for kind in STORED:
            if name := self.store.find(kind):
                self.measure_kind(kind, name)
        if (c0 := self.ordinary_cosine()) is not None:
            self.rows += [adjust(row, c0) for row in final_cosines(self.rows)
                          if row["form"] == "raw" and row["kind"] != "text"]

    def measure_kind(self, kind: str, name: str) -> None:
        segments = {key: self.store.records[key]["segments"] for key in self.keys}
        sizes = {key: sizes[0] for key, sizes in segments.items() if sizes}
        similarity, before = CellSimilarity(self.halves, self.tasks, seed=self.seed), None
        for cell in self.store.cells(name, self.keys, self.n_steps,
                                     at_most=sizes if name in ("latent", "inner") else None):
            place = {"kind": kind, "layer": cell.layer, "step": cell.step, "form": "raw", "pairs": "all"}
            if len(cell.instances) >= 4:
                self.measure_cell(place, cell)
            if before is not None and (before.layer, before.step + 1) == (cell.layer, cell.step):
                self.compare_cells(place, before, cell)
            self.rows += [{"kind": kind, **row} for row in similarity.measure(cell)]
            if cell.layer in (-1, self.middle) and kind != "start":
                few = cell.instances < SHOWN
                for form, matrix in similarity.matrices.items():
                    if form in ("raw", "centred"):
                        self.matrices[kind, form, cell.step] = cell.instances[few], matrix[np.ix_(few, few)]
            before = cell

    def measure_cell(self, place: dict, cell: Cell) -> None:
        """Add the spectrum of a cell, what a linear probe reads from it, and its CKA with the images."""
        self.rows.append({**place, "measure": "spectrum", **spectrum(cell.states)})
        for measure, all_labels in self.labels.items():
            labels = [all_labels[i] for i in cell.instances]
            counts = Counter(labels)
            common = [n for n, label in enumerate(labels) if counts[label] >= FOLDS]
            groups = [self.groups[cell.instances[n]] for n in common]
            if len({labels[n] for n in common}) >= 2 and len(set(groups)) >= 2 * FOLDS:
                result = linear_probe(cell.states[common], [labels[n] for n in common], groups,
                                      seed=self.seed)
                self.rows.append({**place, "measure": measure, "value": result["above_shuffled"], **result})
        shown = [n for n, i in enumerate(cell.instances) if i in self.image]
        if place["kind"] != "image" and len(shown) >= 4:
            images = np.stack([self.image[cell.instances[n]] for n in shown])
            self.add_cka(place, "cka_image", cell.states[shown], images)

    def compare_cells(self, place: dict, before: Cell, cell: Cell) -> None:
        """Add CKA and retrieval between a step and the one before."""
        both, now, earlier = np.intersect1d(cell.instances, before.instances, return_indices=True)
        if len(both) < 4:
            return
        sides = cell.states[now], before.states[earlier]
        self.add_cka(place, "cka_adjacent", *sides)
        centred = [correct(states, self.halves[both], ["centred"]) for states in sides]
        if None not in centred:
            result = retrieval(*(forms["centred"] for forms in centred))
            self.rows.append({**place, "form": "centred", "measure": "retrieval_adjacent",
                              "value": result["top1"], **result})

    def add_cka(self, place: dict, measure: str, x: np.ndarray, y: np.ndarray) -> None:
        """Add both CKAs of two sets of states, if both vary."""
        if min(np.ptp(states, axis=0).max() for states in (x, y)) > 0:
            self.rows.append({**place, "measure": measure, "value": cka(x, y), "biased": cka(x, y, False),
                              "n": len(x)})

    def ordinary_cosine(self) -> float | None:
        """Return c0, the mean cosine of text states of different instances; None if too high."""
        states = [self.store.load(key, "text") for key in self.keys]
        means = np.array([unit(x).mean(0) for x in states if x is not None])
        if len(means) < 2:
            return None
        products = means @ means.T
        c0 = float(products[~np.eye(len(means), dtype=bool)].mean())
        return c0 if c0 < MOST_ALIKE else None

    def curves(self) -> dict:
        """Return {kind: {measure_form: [{"step", "mean", "low", "high", "n"}]}} of final states."""
        result = {}
        for row in final_cosines(self.rows):
            curve = result.setdefault(row["kind"], {}).setdefault(f"{row['measure']}_{row['form']}", [])
            curve.append({"step": row["step"] + 1, "mean": row["value"], "low": row["low"],
                          "high": row["high"], "n": row["n"]})
        return result

    def draw(self, output: Path) -> None:
        if self.matrices:
            draw_heatmaps(self.matrices, self.tasks, output / "heatmap.png")
            draw_curves(final_cosines(self.rows), output / "curves.png")
            draw_spectra(self.rows, output / "spectra.png")
        if any(row["kind"] == "inner" for row in self.rows):
            draw_layers(self.rows, output / "layers.png")


def final_cosines(rows: list[dict]) -> list[dict]:
    """Return the rows of final states' cosines over all pairs."""
    return [row for row in rows if row["layer"] == -1 and row["pairs"] == "all"
            and row["measure"] in ("inter", "adjacent", "first")]


def curve_means(curves: dict) -> dict:
    """Return {kind: {measure_form: mean over the steps}}."""
    return {kind: {name: float(np.mean([point["mean"] for point in curve])) for name, curve in named.items()}
            for kind, named in curves.items()}
