"""Can a linear probe read the right answer from states, beyond what the prompt alone tells? numpy only.

A state that has read the prompt knows the question and its options, and these alone make some answers
likelier than others: against answers shuffled over all items it would seem to hold the answer. So answers are
exchanged only between instances with the same question, and only where each is an option of the other. If
states hold nothing but the prompt, every such exchange is as likely as the data.
"""
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

from utils.items import gold_words, group_of
from utils.probe.similarity import LEVEL
from utils.stats import share_interval

RIDGE = 1e-2  # of the mean variance of a training state along its own kernel: enough for n below d
N_SHUFFLES = 999  # the least p is 0.001
ROUNDS = 50  # of exchanges in each shuffle
FOLDS = 5


class Target(NamedTuple):
    """The right answer of an instance, its question, its options (empty: any answer), and its image."""

    gold: str
    question: str
    options: tuple[str, ...]
    group: Hashable


def target_of(item: dict) -> Target | None:
    """Return what is to be read from the states of an item; None if it has no single right answer."""
    gold = gold_words(item)
    return gold and Target(gold, item["question"].strip(), tuple(text for _, text in item["options"]),
                           group_of(item))


def exchangeable(targets: Sequence[Target]) -> np.ndarray:
    """Return whether instance i may have the answer of j, [n, n]."""
    questions = np.array([target.question for target in targets])
    golds = np.array([target.gold for target in targets])
    return (questions[:, None] == questions) & is_option(targets, golds)


def is_option(targets: Sequence[Target], answers: np.ndarray) -> np.ndarray:
    """Return whether instance i has the option j of `answers` [m], [n, m]."""
    return np.stack([np.isin(answers, target.options) | (not target.options) for target in targets])


def choose_testable(targets: Sequence[Target | None]) -> list[int]:
    """Return the places of targets that can be probed: one per image, of questions with at least two answers,
    and answers at least as often as there are folds."""
    kept: dict[Hashable, int] = {}
    for place, target in enumerate(targets):
        if target is not None:
            kept.setdefault(target.group, place)
    places, before = list(kept.values()), None
    while places != before:
        counts, golds, before = Counter(targets[place].gold for place in places), defaultdict(set), places
        for place in places:
            golds[targets[place].question].add(targets[place].gold)
        places = [place for place in places if counts[targets[place].gold] >= FOLDS
                  and len(golds[targets[place].question]) > 1]
    return places


def shuffle_answers(fits: np.ndarray, kinds: np.ndarray, n_shuffles: int, seed: int) -> np.ndarray:
    """Return for each shuffle the instance whose answer each one gets, [n_shuffles, n].

    In each round pairs of one kind (of question) are drawn, and half of those that fit exchange answers. All
    shuffles start from one that is as far from the data as they are from it (Besag and Clifford 1989,
    Biometrika 76:633): p is then exact however slowly exchanges mix.
    """
    rng = np.random.default_rng(seed)
    common = exchange(np.arange(len(fits))[None], fits, kinds, rng)
    return exchange(np.repeat(common, n_shuffles, axis=0), fits, kinds, rng)


def exchange(source: np.ndarray, fits: np.ndarray, kinds: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    rows, source = np.arange(len(source))[:, None], source.copy()
    for first in rng.integers(2, size=ROUNDS):  # a kind of two instances may begin at an odd place
        order = np.argsort(kinds + rng.random(source.shape), axis=1)
        one, two = order[:, first:-1:2], order[:, first + 1::2]
        of_one, of_two = source[rows, one], source[rows, two]
        swapped = fits[one, of_two] & fits[two, of_one] & (rng.random(one.shape) < 0.5)
        source[rows, one] = np.where(swapped, of_two, of_one)
        source[rows, two] = np.where(swapped, of_one, of_two)
    return source


def ridge_smoother(train: np.ndarray, test: np.ndarray, ridge: float = RIDGE) -> np.ndarray:
    """Return S [m, n] such that S @ targets are the scores of `test` [m, d] after a ridge fit of any targets
    [n, ...] on `train` [n, d]."""
    mean, n = train.mean(0, dtype=np.float64), len(train)
    train_offsets, test_offsets = ((x - mean).astype(train.dtype) for x in (train, test))
    kernel = (train_offsets @ train_offsets.T).astype(np.float64)
    weight = ridge * max(float(np.trace(kernel)) / n, 1e-30)
    solved = np.linalg.solve(kernel + weight * np.eye(n), np.eye(n) - 1 / n)  # targets lose their mean
    return (test_offsets @ train_offsets.T).astype(np.float64) @ solved + 1 / n


class LinearProbe:
    """Kernel ridge classification, by cross-validation, of the answers of `targets` [n]: at least two folds'
    worth, one per image, else the probe recognises the image."""

    def __init__(self, targets: Sequence[Target], n_shuffles: int = N_SHUFFLES, seed: int = 0):
        self.targets, self.names = targets, np.unique([target.gold for target in targets])
        self.groups = [target.group for target in targets]
        self.folds = np.random.default_rng(seed).permutation(len(targets)) % FOLDS  # sizes differ by one
        own = np.searchsorted(self.names, [target.gold for target in targets])
        self.questions = np.unique([target.question for target in targets], return_inverse=True)[1]
        source = shuffle_answers(exchangeable(targets), self.questions, n_shuffles, seed)
        self.answers = np.vstack([own, own[source]]).T  # [n, 1 + n_shuffles]
        self.about = {"n": len(targets), "classes": len(self.names),
                      "changed": float((self.answers[:, 1:] != own[:, None]).mean()),
                      "question_only": self.question_baseline(own)}

    def question_baseline(self, own: np.ndarray) -> float:
        """Return the accuracy of the option that is the commonest answer to the same question in the other
        folds, of equals the one that is the commonest answer there to all questions."""
        golds, right = np.eye(len(self.names))[own], 0
        options, same = is_option(self.targets, self.names), self.questions[:, None] == self.questions
        for fold in range(FOLDS):
            held = self.folds == fold
            counts = same[held][:, ~held] @ golds[~held] + golds[~held].mean(0) / 2
            right += (np.where(options[held], counts, -1).argmax(1) == own[held]).sum()
        return float(right / len(own))

    def measure(self, states: np.ndarray) -> dict:
        """Return how well states [n, d] give the answers: "accuracy" with its interval, "question_only" (see
        `question_baseline`), "shuffled": mean accuracy on shuffled answers, p of the accuracy against it, and
        "changed": the share of answers that a shuffle changes (near 0, nothing can be shown)."""
        right = np.zeros(self.answers.shape, dtype=bool)
        for fold in range(FOLDS):
            held = self.folds == fold
            smoother, train = ridge_smoother(states[~held], states[held]), self.answers[~held]
            best, said = np.full((held.sum(), train.shape[1]), -np.inf), np.zeros_like(self.answers[held])
            for label in range(len(self.names)):
                scores = smoother @ (train == label)
                said[scores > best] = label
                best = np.maximum(best, scores)
            right[held] = said == self.answers[held]
        accuracy, shuffled = right[:, 0].mean(), right[:, 1:].mean(0)
        low, high = share_interval(right[:, 0], self.groups, LEVEL)
        return {**self.about, "accuracy": float(accuracy), "low": float(low), "high": float(high),
                "shuffled": float(shuffled.mean()), "above_shuffled": float(accuracy - shuffled.mean()),
                "p": float((1 + (shuffled >= accuracy).sum()) / (1 + len(shuffled)))}
