"""The linear probe: states that hold only what the prompt tells, and states that hold the answer."""
from collections import Counter
from itertools import permutations

import numpy as np
import pytest

from utils.probe.linear_probe import (FOLDS, LinearProbe, Target, choose_testable, exchangeable,
                                      ridge_smoother, shuffle_answers)

OPTIONS = {kind: tuple(f"{kind} {n}" for n in range(4)) for kind in ("colour", "number", "shape")}


def draw(rng, same_question, n=96):
    """Targets and states that hold all that the prompt tells, the kind of question or the options, and no
    more: the answer is drawn among the options."""
    if same_question:
        asked = [("What is it?", tuple(map(str, rng.choice(8, 4, replace=False)))) for _ in range(n)]
    else:
        asked = [(kind, OPTIONS[kind]) for kind in rng.choice(list(OPTIONS), n)]
    targets = [Target(str(rng.choice(options)), question, options, n)
               for n, (question, options) in enumerate(asked)]
    names = sorted({name for _, options in asked for name in options})
    told = np.array([[name in options for name in names] for _, options in asked], dtype=float)
    states = 50 + 3 * told @ rng.normal(size=(len(names), 30)) + rng.normal(size=(n, 30))
    places = choose_testable(targets)
    return [targets[place] for place in places], states[places]


@pytest.mark.parametrize("same_question", [False, True], ids=["kinds of questions", "options"])
def test_what_the_prompt_tells_is_not_taken_for_the_answer(same_question):
    found = []
    for seed in range(150):
        targets, states = draw(np.random.default_rng(seed), same_question)
        found.append(LinearProbe(targets, n_shuffles=99, seed=seed).measure(states))
    mean = {name: np.mean([one[name] for one in found]) for name in ("accuracy", "question_only", "shuffled")}
    assert abs(mean["accuracy"] - mean["shuffled"]) < 0.02
    assert abs(mean["question_only"] - 0.25) < 0.03  # four options; more if learnt from what is asked
    p = np.array([one["p"] for one in found])
    assert (p <= 0.05).mean() < 0.09 and (p <= 0.2).mean() < 0.27  # 0.05 and 0.2, less for ties
    assert (p <= 0.2).mean() > 0.08


def test_states_that_hold_the_answer_give_it_with_the_least_p():
    rng = np.random.default_rng(1)
    targets, states = draw(rng, False, 96)
    codes = {gold: 3 * rng.normal(size=30) for options in OPTIONS.values() for gold in options}
    probe = LinearProbe(targets)
    found = probe.measure(states + np.array([codes[target.gold] for target in targets]))
    assert found["accuracy"] > 0.9 and found["p"] == 0.001 and found["n"] == len(targets)
    assert found["low"] > 0.7 > 0.4 > max(found["question_only"], found["shuffled"])
    assert 0.6 < found["changed"] < 0.8  # three of four
    assert probe.measure(np.ones((len(targets), 5)))["p"] > 0.1


def test_the_question_alone_is_as_good_as_its_commonest_answer():
    """70 % of the colours are red, 70 % of the numbers two; a question that was not asked elsewhere gets the
    commonest answer of all among its options."""
    rng, targets = np.random.default_rng(2), []
    for n in range(400):
        kind = ("colour", "number")[n % 2]
        targets.append(Target(str(rng.choice(OPTIONS[kind], p=(0.7, 0.1, 0.1, 0.1))), kind, (), n))
    share = np.mean([target.gold.endswith("0") for target in targets])
    assert LinearProbe(targets, 1).about["question_only"] == pytest.approx(share)
    alone = [target._replace(question=f"{n}?", options=OPTIONS[target.question])
             for n, target in enumerate(targets)]
    assert LinearProbe(alone, 1).about["question_only"] == pytest.approx(share)


def test_one_instance_of_an_image_is_probed_so_that_no_image_is_in_two_folds():
    targets = [Target("no" if n // 4 % 2 else "yes", "Is it?", (), n // 4) for n in range(80)]
    assert choose_testable([None, *targets]) == list(range(1, 81, 4))


def test_only_questions_with_several_answers_and_answers_for_every_fold_are_probed():
    golds = ["red"] * 6 + ["blue"] * FOLDS + ["pink"] * (FOLDS - 1)
    targets = [Target(gold, "Which?", (), n) for n, gold in enumerate(golds)]
    alone = [Target("red", "What?", (), 50 + n) for n in range(3)]  # always red: a shuffle changes nothing
    left = [Target(gold, "Where?", (), 60 + n) for n, gold in enumerate(("blue", "rare"))]  # then always blue
    assert choose_testable([*alone, *left, *targets]) == list(range(5, 5 + 6 + FOLDS))
    assert choose_testable([Target("yes", f"{n}?", (), n) for n in range(40)]) == []


def test_shuffles_are_every_allowed_exchange_and_each_as_often():
    """Against all permutations of six answers, of which few give every instance one of its options."""
    golds, options = "abcdab", ("abc", "ab", "acd", "cd", "ab", "ab")
    targets = [Target(gold, "What?" if n < 4 else "Where?", tuple(letters), n)
               for n, (gold, letters) in enumerate(zip(golds, options))]
    allowed = {order for order in permutations(range(6)) if all(
        (i < 4) == (j < 4) and golds[j] in options[i] for i, j in enumerate(order))}
    fits, kinds = exchangeable(targets), np.array([0, 0, 0, 0, 1, 1])
    counts = Counter(map(tuple, shuffle_answers(fits, kinds, 4000, 0).tolist()))
    assert set(counts) == allowed and len(allowed) > 5
    expected = 4000 / len(allowed)
    assert all(abs(count - expected) < 4.5 * expected**0.5 for count in counts.values())


def test_the_smoother_equals_ridge_regression():
    rng = np.random.default_rng(1)
    train, test, y = rng.normal(size=(30, 5)), rng.normal(size=(7, 5)), rng.normal(size=(30, 2))
    x = train - train.mean(0)
    weight = 0.1 * (x**2).sum() / 30
    w = np.linalg.solve(x.T @ x + weight * np.eye(5), x.T @ (y - y.mean(0)))
    assert np.allclose(ridge_smoother(train, test, 0.1) @ y, (test - train.mean(0)) @ w + y.mean(0))
