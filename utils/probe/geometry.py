"""What a set of states spans and tells, beyond cosines: spectrum, CKA, retrieval, crossed variance. numpy
only.

All of it works on [n, n] products, so that d may be large. The spectrum has no bootstrap interval: drawing an
instance twice lowers every rank.

What a linear reader can tell from states: kernel ridge classification with grouped folds and a shuffled
control. numpy only.

"Encoded" is not "used": a label that can be read off the latents need not be what the answer follows.
Instances of one group (one image, say) are never in training and test at once, or a probe would recognise the
image in place of the label.
"""
from collections.abc import Hashable, Sequence

import numpy as np

from utils.stats import cluster_bootstrap

SHARES = (0.90, 0.95, 0.99)


def spectrum(states: np.ndarray) -> dict:
    """Return the variances' participation ratio (sum)^2 / sum of squares, effective rank exp(entropy) (Roy
    and Vetterli 2007), the number of directions that hold 90, 95 and 99 %, and the largest one's share.

    Of states [n, d] minus their mean. All are bounded by n - 1: compare sets of one n only. None of all if
    nothing varies.
    """
    offsets = states - states.mean(0, dtype=np.float64)
    values = np.linalg.eigvalsh(offsets @ offsets.T)[::-1].clip(0)
    if values[0] <= 1e-24 * max(float((states.astype(np.float64) ** 2).sum()), 1e-300):
        return {"n": len(states), "participation_ratio": None, "effective_rank": None, "top1": None,
                **{f"rank{100 * share:.0f}": None for share in SHARES}}
    p = values / values.sum()
    some = p[p > 0]
    return {"n": len(states), "participation_ratio": float(1 / (p**2).sum()),
            "effective_rank": float(np.exp(-(some * np.log(some)).sum())), "top1": float(p[0]),
            **{f"rank{100 * share:.0f}": int(np.searchsorted(np.cumsum(p), share - 1e-12) + 1)
               for share in SHARES}}


def cka(one: np.ndarray, other: np.ndarray, debiased: bool = True) -> float:
    """Return the linear centred kernel alignment of states [n, d] and [n, e] of the same instances.

    The debiased form (Song et al. 2012, HSIC_1; n >= 4) has expectation 0 for independent sets. The biased
    one is 0.97 there at n = 100, d = 3584: it is given only to show that.
    """
    grams = [x @ x.T for x in (one.astype(np.float64), other.astype(np.float64))]
    hsic = _hsic_debiased if debiased else _hsic_biased
    below = hsic(grams[0], grams[0]) * hsic(grams[1], grams[1])
    if len(one) != len(other) or len(one) < 4 or not below > 0:
        raise ValueError(
            f"cka: {len(one)} and {len(other)} states, norms {below}; expected four or more of the same "
                         "instances, varying in both sets")
    return float(hsic(*grams) / np.sqrt(below))


def _hsic_debiased(k: np.ndarray, l: np.ndarray) -> float:
    n = len(k)
    k, l = (x - np.diag(np.diag(x)) for x in (k, l))
    a, b = k.sum(0), l.sum(0)
    return ((k * l).sum() + a.sum() * b.sum() / ((n - 1) * (n - 2)) - 2 * (a @ b) / (n - 2)) / (n * (n - 3))


def _hsic_biased(k: np.ndarray, l: np.ndarray) -> float:
    k, l = (x - x.mean(0) - x.mean(1)[:, None] + x.mean() for x in (k, l))
    return (k * l).sum() / (len(k) - 1) ** 2


def retrieval(queries: np.ndarray, keys: np.ndarray) -> dict:
    """Return how well row i of `queries` [n, d] finds row i of `keys` [n, d] by cosine: top-1, mean
    reciprocal rank, and what both are by chance. Centre both before. Of keys that tie, each is as likely to
    come first."""
    if queries.shape != keys.shape or len(keys) < 2:
        raise ValueError(
            f"retrieval: {queries.shape} queries, {keys.shape} keys; expected as many, two or more")
    one, two = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-30) for x in (queries, keys))
    scores = one @ two.T
    own, n = np.diag(scores)[:, None], len(keys)
    # ties: the own key among them
    above, ties = (scores > own + 1e-6).sum(1), (abs(scores - own) <= 1e-6).sum(1)
    harmonic = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, n + 1))])
    return {"n": n, "top1": float(((above == 0) / ties).mean()), "top1_chance": 1 / n,
            "mrr": float(((harmonic[above + ties] - harmonic[above]) / ties).mean()),
            "mrr_chance": float(harmonic[n] / n)}


def variance_split(states: np.ndarray, n_perm: int = 1000, seed: int = 0) -> dict:
    """Split the variance of states [images, questions, d], one run of each pair, into images, questions and
    both together.

    The shares sum to 1 and a direction common to all runs does not matter: the size of X -> Z. By chance
    alone the expected share of images is (A - 1) / (AB - 1): "image_chance", and so on; "image_p" permutes
    images within every question, "question_p" questions within every image, (1 + k) / (1 + n_perm).
    """
    n_images, n_questions, d = states.shape
    if min(n_images, n_questions) < 2:
        raise ValueError(
            f"variance_split: {n_images} images and {n_questions} questions, expected two of each or more")
    flat = states.reshape(-1, d) - states.reshape(-1, d).mean(0, dtype=np.float64)
    gram, places = flat @ flat.T, np.arange(len(flat)).reshape(n_images, n_questions)
    total = float(np.trace(gram))
    if total <= 1e-24 * float((states.astype(np.float64) ** 2).sum()):
        raise ValueError("variance_split: the states do not vary at all, so that there are no shares")

    # sum of squares of the row means, of an index [rows, columns]
    def between_rows(index: np.ndarray) -> float:
        return float(gram[index[:, :, None], index[:, None, :]].sum() / index.shape[1])

    rng, result, size = np.random.default_rng(seed), {"images": n_images, "questions": n_questions}, len(flat)
    for name, index in (("image", places), ("question", places.T)):
        own = between_rows(index)
        k = sum(between_rows(rng.permuted(index, axis=0)) >= own * (1 - 1e-12) for _ in range(n_perm))
        result |= {name: own / total, f"{name}_chance": (len(index) - 1) / (size - 1), f"{name}_p": (1 + k)
                   / (1 + n_perm)}
    return result | {"interaction": 1 - result["image"] - result["question"]}


# ------------------------------------------------------------ linear_probe


RIDGE = 1e-2  # of the mean variance of a training state along its own kernel: enough for n below d
N_SHUFFLES = 20


def grouped_folds(groups: Sequence[Hashable], n_folds: int, seed: int = 0) -> np.ndarray:
    """Return the fold [n] of every instance, whole groups in one fold, folds of about one size. ValueError
    for fewer groups than folds."""
    names, members = np.unique(np.asarray([repr(group) for group in groups]), return_inverse=True)
    if len(names) < n_folds or n_folds < 2:
        raise ValueError(
            f"{len(names)} groups for {n_folds} folds; expected two folds or more, and a group for each at least")
    sizes = np.bincount(members)
    order = np.random.default_rng(seed).permutation(len(names))
    order = order[np.argsort(-sizes[order], kind="stable")]  # the largest first, each to the emptiest fold
    fold_of, filled = np.zeros(len(names), dtype=int), np.zeros(n_folds)
    for group in order:
        fold_of[group] = np.argmin(filled)
        filled[fold_of[group]] += sizes[group]
    return fold_of[members]


def predict(train: np.ndarray, targets: np.ndarray, test: np.ndarray, ridge: float = RIDGE) -> np.ndarray:
    """Return the scores [m, ...] of states `test` [m, d] from a linear ridge fit of `targets` [n, ...] on
    `train` [n, d].

    Mean of states and targets come from the training part alone.
    """
    mean, level = train.mean(0, dtype=np.float64), targets.mean(0)
    one, two = ((x - mean).astype(train.dtype) for x in (train, test))
    kernel = (one @ one.T).astype(np.float64)
    weight = ridge * max(float(np.trace(kernel)) / len(one), 1e-30)
    flat = (targets - level).reshape(len(targets), -1)
    solved = np.linalg.solve(kernel + weight * np.eye(len(one)), flat)
    return ((two @ one.T).astype(np.float64) @ solved).reshape(len(test), *targets.shape[1:]) + level


def probe(states: np.ndarray, labels: Sequence[Hashable], groups: Sequence[Hashable], n_folds: int = 5,
          seed: int = 0,
          level: float = 0.95) -> dict:
    """Return how well `labels` [n] can be read from states [n, d], by folds over `groups`.

    {"accuracy", "low", "high" (groups drawn), "majority" (share of the commonest label), "shuffled" (mean
    accuracy with labels exchanged), "above_shuffled", "p" ((1 + k) / (1 + N_SHUFFLES)), "n", "classes"}.
    Labels that are the same within every group are exchanged group by group, others instance by instance.
    ValueError for a single label.
    """
    names, own = np.unique(np.asarray([repr(label) for label in labels]), return_inverse=True)
    if len(names) < 2 or not len(states) == len(own) == len(groups):
        raise ValueError(
            f"{len(states)} states, {len(own)} labels of {len(names)} kinds, {len(groups)} groups; expected as "
                         "many of each, and two kinds or more")
    folds, rng = grouped_folds(groups, n_folds, seed), np.random.default_rng(seed)
    # [n, 1 + N_SHUFFLES]
    each = np.stack([own, *(shuffle(own, groups, rng) for _ in range(N_SHUFFLES))], axis=1)
    right = np.zeros(each.shape, dtype=bool)
    for fold in range(n_folds):
        held = folds == fold
        # [m, 1 + N_SHUFFLES, classes]
        scores = predict(states[~held], np.eye(len(names))[each[~held]], states[held])
        right[held] = scores.argmax(-1) == each[held]
    accuracy, shuffled = right[:, 0].mean(), right[:, 1:].mean(0)
    low, high = cluster_bootstrap(right[:, 0], list(groups), level, 2000, seed)
    return {"accuracy": float(accuracy), "low": low, "high": high, "majority": float(np.bincount(own).max()
                                                                                     / len(own)),
            "shuffled": float(shuffled.mean()), "above_shuffled": float(accuracy - shuffled.mean()),
            "p": float((1 + (shuffled >= accuracy).sum()) / (1 + N_SHUFFLES)), "n": len(own),
            "classes": len(names)}


def shuffle(labels: np.ndarray, groups: Sequence[Hashable], rng: np.random.Generator) -> np.ndarray:
    """Return labels exchanged between instances, or between groups if every group has one label only."""
    _, members = np.unique(np.asarray([repr(group) for group in groups]), return_inverse=True)
    first = np.zeros(members.max() + 1, dtype=int)
    first[members[::-1]] = labels[::-1]
    return rng.permutation(first)[members] if (first[members] == labels).all() else rng.permutation(labels)
