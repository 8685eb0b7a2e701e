"""Options scored behind a stem or as whole replies, against a pass over each whole sequence."""
import math

import pytest
import torch
from decoding import batch_of, embedded, one_pass

from utils import qwen as Q
from utils.decode import prefill
from utils.intervene.mediation import kl
from utils.option_scores import describe_scores, option_blocks, score_options

ITEMS = [{"options": [["A", "red"], ["B", "blue square"], ["C", "the red circle"]]},
         {"options": [["A", "7"], ["B", "red"]]}, {"options": [["A", "red"], ["B", "red circle"]]}]


@torch.no_grad()
@pytest.mark.parametrize("by", ["letter", "text"])
def test_scores_equal_the_likelihood_of_each_whole_sequence(tiny_checkpoint, by):
    """Options of one and many tokens, one the beginning of another; prompts and numbers of options differ."""
    qwen = Q.load(str(tiny_checkpoint), device="cpu")
    stems, before = [" It is \\boxed{", " The answer: {", " {"], [[5, 6], [], [7]]
    scores = score_options(qwen, prefill(qwen, batch_of(qwen)), ITEMS, stems, before, by)
    for i, (item, stem, ids) in enumerate(zip(ITEMS, stems, before)):
        words = [letter if by == "letter" else text for letter, text in item["options"]]
        blocks, shared = option_blocks(qwen, stem, words, ids)
        assert len({tuple(block[:shared]) for block in blocks}) == 1 and len(
            {tuple(block[shared:]) for block in blocks}) == len(blocks)
        for (letter, _), block in zip(item["options"], blocks):
            single = batch_of(qwen, slice(i, i + 1))
            n = single["input_ids"].shape[1]
            logp = qwen.model.lm_head(one_pass(qwen, single, embedded(qwen, block))).log_softmax(-1)
            expected = sum(float(logp[n + j - 1, block[j]]) for j in range(shared, len(block)))
            assert scores[i][letter] == pytest.approx(expected, abs=1e-4)


def test_shares_margins_and_divergence():
    described = describe_scores({"A": math.log(0.2), "B": math.log(0.1), "C": math.log(0.1)}, "B")
    pi = described["pi"]
    assert pi == pytest.approx({"A": 0.5, "B": 0.25, "C": 0.25}) and described["pred"] == "A"
    assert described["nll"] == pytest.approx(math.log(4))
    assert described["margin"] == pytest.approx(math.log(0.5)) and kl(pi, pi) == 0
    assert kl({"A": 0.5, "B": 0.5}, {"A": 0.25, "B": 0.75}) == pytest.approx(math.log(4 / 3) / 2)
