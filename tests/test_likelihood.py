"""Options scored as whole replies.    pytest tests/test_likelihood.py"""
import math

import torch
from PIL import Image

from utils.decode import prefill
from utils.likelihood import score_replies
from utils.qwen import chat, encode, load


def test_scores_are_those_of_one_forward_pass_over_prompt_and_reply(tiny_checkpoint):
    """The oracle: each reply appended to its own prompt, one row, no cache, token by token."""
    qwen = load(str(tiny_checkpoint), "float32", "cpu")
    images = [[Image.new("RGB", (56, 84), "red")], [Image.new("RGB", (84, 56), "blue")]]
    prompts = [chat(qwen.tokenizer, text, 1) for text in ("What is it?", "What digit is on the red circle over there?")]
    replies = [["a red circle", "The answer is 7."], ["blue", "a blue square", "It is blue."]]
    state = prefill(qwen, encode(qwen, prompts, images))
    before = state.mask.clone()
    found = score_replies(qwen, state, replies)
    assert torch.equal(state.mask, before) and found == score_replies(qwen, state, replies)  # not used up
    for prompt, shown, texts, scores in zip(prompts, images, replies, found, strict=True):
        for text, score in zip(texts, scores, strict=True):
            own = qwen.tokenizer(text + "<|im_end|>", add_special_tokens=False).input_ids
            inputs = encode(qwen, [prompt + text + "<|im_end|>"], [shown])
            with torch.no_grad():
                logits = qwen.model(**{k: v for k, v in inputs.items() if k != "mm_token_type_ids"}).logits[0]
            logits = logits.log_softmax(-1)
            expected = sum(float(logits[-len(own) - 1 + k, token]) for k, token in enumerate(own))
            assert math.isclose(score["logp"], expected, rel_tol=1e-4) and score["n"] == len(own)
