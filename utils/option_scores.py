"""Readouts without a parser: the score of every option of an item after a fixed beginning of an answer.

An option's score is the log-probability of its tokens, and if one option is a prefix of another, also of the
closing brace, which may otherwise share a token with what follows. R0 reads the same stem after the last
latent (or text imagination) in every condition; R1 reads the clean run's own words there, so that only a path
around the words can change the score: for text they are R0's stem too, unless another is given. R2 is the
free reply, parsed.
"""
import math

import torch

from utils.decode import State, prefill_blocks
from utils.items import plain
from utils.qwen import Qwen


def option_words(item: dict, by: str) -> dict[str, str]:
    """Return {letter: content of the box}: the letter (by "letter") or the option's words ("text"), as always
    for the paths of a planning item."""
    letters = by == "letter" and item.get("metric") != "vsp_path"
    return {letter: letter if letters else plain(text) for letter, text in item["options"]}


def option_blocks(qwen: Qwen, stem: str, words: list[str], before: list[int]) -> tuple[list[list[int]], int]:
    """Return the ids of `before` + stem + words for each option, and how many leading ids they share."""
    def ids(ending: str) -> list[list[int]]:
        return [before + qwen.tokenizer(stem + word + ending, add_special_tokens=False).input_ids
                for word in words]

    blocks = ids("")
    if any(a is not b and a == b[:len(a)] for a in blocks for b in blocks):
        blocks = ids("}")
    shortest = min(map(len, blocks)) - 1
    shared = next((n for n in range(shortest) if len({block[n] for block in blocks}) > 1), shortest)
    if shared == 0:
        raise ValueError(f"options {words} share no token after {stem!r}; expected a longer stem")
    return blocks, shared


@torch.no_grad()
def score_blocks(qwen: Qwen, state: State, blocks: list[list[list[int]]],
                 shared: list[int]) -> list[list[float]]:
    """Return the log-probability, in nats, of each block of each row without its first `shared[row]` ids.

    The kth blocks of all rows are read at once; `state` is kept.
    """
    scores = [[] for _ in blocks]
    for k in range(max(map(len, blocks))):
        rows = [i for i, of_row in enumerate(blocks) if k < len(of_row)]
        # [rows, longest, hidden]
        hidden = prefill_blocks(qwen, state.select(rows), [blocks[i][k] for i in rows])[0]
        for read, i in zip(hidden, rows):
            block, skipped = blocks[i][k], shared[i]
            before = read[skipped - 1:len(block) - 1]  # the state that predicts each token
            logits = qwen.model.lm_head(before).float().log_softmax(-1)
            own = torch.tensor(block[skipped:], device=logits.device)
            scores[i].append(float(logits.gather(1, own[:, None]).sum()))
    return scores


def score_options(qwen: Qwen, state: State, items: list[dict], stems: list[str], before: list[list[int]],
                  by: str = "letter") -> list[dict[str, float]]:
    """Return {letter: log-probability} of each row's options after `before[row]` (ids) and `stems[row]`."""
    laid_out = [option_blocks(qwen, stem, list(option_words(item, by).values()), ids)
            for item, stem, ids in zip(items, stems, before, strict=True)]
    scores = score_blocks(qwen, state, [blocks for blocks, _ in laid_out], [shared for _, shared in laid_out])
    return [{letter: logp for (letter, _), logp in zip(item["options"], of_row)}
            for item, of_row in zip(items, scores)]


def describe_scores(scores: dict[str, float], gold: str, prior: dict[str, float] | None = None) -> dict:
    """Return {"logp" by letter, "pi" (softmax over the options), "nll" = -log pi(gold), "margin" to the best
    wrong option, "pred"}. With a `prior` {letter: log-probability} all but "logp" are of logp - prior, as in
    pointwise mutual information, and "prior" is returned too."""
    kept = {"logp": scores} | ({"prior": prior} if prior else {})
    if prior:
        scores = {letter: value - prior[letter] for letter, value in scores.items()}
    top = max(scores.values())
    total = top + math.log(sum(math.exp(value - top) for value in scores.values()))
    best_wrong = max(value for letter, value in scores.items() if letter != gold)
    return {**kept, "pi": {letter: math.exp(value - total) for letter, value in scores.items()},
            "nll": total - scores[gold], "margin": scores[gold] - best_wrong,
            "pred": max(scores, key=scores.get)}
