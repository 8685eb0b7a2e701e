"""What a linear reader can tell from states: kernel ridge classification with grouped folds and a shuffled control. numpy only.

"Encoded" is not "used": a label that can be read off the latents need not be what the answer follows. Instances of one group
(one image, say) are never in training and test at once, or a probe would recognise the image in place of the label.
"""
from collections.abc import Hashable, Sequence

import numpy as np

from utils.stats import cluster_bootstrap

RIDGE = 1e-2  # of the mean variance of a training state along its own kernel: enough for n below d
N_SHUFFLES = 20


def grouped_folds(groups: Sequence[Hashable], n_folds: int, seed: int = 0) -> np.ndarray:
    """Return the fold [n] of every instance, whole groups in one fold, folds of about one size. ValueError for fewer groups
    than folds."""
    names, members = np.unique(np.asarray([repr(group) for group in groups]), return_inverse=True)
    if len(names) < n_folds or n_folds < 2:
        raise ValueError(f"{len(names)} groups for {n_folds} folds; expected two folds or more, and a group for each at least")
    sizes = np.bincount(members)
    order = np.random.default_rng(seed).permutation(len(names))
    order = order[np.argsort(-sizes[order], kind="stable")]  # the largest first, each to the emptiest fold
    fold_of, filled = np.zeros(len(names), dtype=int), np.zeros(n_folds)
    for group in order:
        fold_of[group] = np.argmin(filled)
        filled[fold_of[group]] += sizes[group]
    return fold_of[members]


def predict(train: np.ndarray, targets: np.ndarray, test: np.ndarray, ridge: float = RIDGE) -> np.ndarray:
    """Return the scores [m, ...] of states `test` [m, d] from a linear ridge fit of `targets` [n, ...] on `train` [n, d].

    Mean of states and targets come from the training part alone.
    """
    mean, level = train.mean(0, dtype=np.float64), targets.mean(0)
    one, two = ((x - mean).astype(train.dtype) for x in (train, test))
    kernel = (one @ one.T).astype(np.float64)
    weight = ridge * max(float(np.trace(kernel)) / len(one), 1e-30)
    flat = (targets - level).reshape(len(targets), -1)
    solved = np.linalg.solve(kernel + weight * np.eye(len(one)), flat)
    return ((two @ one.T).astype(np.float64) @ solved).reshape(len(test), *targets.shape[1:]) + level


def probe(states: np.ndarray, labels: Sequence[Hashable], groups: Sequence[Hashable], n_folds: int = 5, seed: int = 0,
          level: float = 0.95) -> dict:
    """Return how well `labels` [n] can be read from states [n, d], by folds over `groups`.

    {"accuracy", "low", "high" (groups drawn), "majority" (share of the commonest label), "shuffled" (mean accuracy with
    labels exchanged), "above_shuffled", "p" ((1 + k) / (1 + N_SHUFFLES)), "n", "classes"}. Labels that are the same
    within every group are exchanged group by group, others instance by instance. ValueError for a single label.
    """
    names, own = np.unique(np.asarray([repr(label) for label in labels]), return_inverse=True)
    if len(names) < 2 or not len(states) == len(own) == len(groups):
        raise ValueError(f"{len(states)} states, {len(own)} labels of {len(names)} kinds, {len(groups)} groups; expected as "
                         "many of each, and two kinds or more")
    folds, rng = grouped_folds(groups, n_folds, seed), np.random.default_rng(seed)
    each = np.stack([own, *(shuffle(own, groups, rng) for _ in range(N_SHUFFLES))], axis=1)  # [n, 1 + N_SHUFFLES]
    right = np.zeros(each.shape, dtype=bool)
    for fold in range(n_folds):
        held = folds == fold
        scores = predict(states[~held], np.eye(len(names))[each[~held]], states[held])  # [m, 1 + N_SHUFFLES, classes]
        right[held] = scores.argmax(-1) == each[held]
    accuracy, shuffled = right[:, 0].mean(), right[:, 1:].mean(0)
    low, high = cluster_bootstrap(right[:, 0], list(groups), level, 2000, seed)
    return {"accuracy": float(accuracy), "low": low, "high": high, "majority": float(np.bincount(own).max() / len(own)),
            "shuffled": float(shuffled.mean()), "above_shuffled": float(accuracy - shuffled.mean()),
            "p": float((1 + (shuffled >= accuracy).sum()) / (1 + N_SHUFFLES)), "n": len(own), "classes": len(names)}


def shuffle(labels: np.ndarray, groups: Sequence[Hashable], rng: np.random.Generator) -> np.ndarray:
    """Return labels exchanged between instances, or between groups if every group has one label only."""
    _, members = np.unique(np.asarray([repr(group) for group in groups]), return_inverse=True)
    first = np.zeros(members.max() + 1, dtype=int)
    first[members[::-1]] = labels[::-1]
    return rng.permutation(first)[members] if (first[members] == labels).all() else rng.permutation(labels)
