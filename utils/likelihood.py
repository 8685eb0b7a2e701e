"""The likelihood of given words; multiple choice without letters: the option that the model finds likeliest as its reply.

As V* is scored by its authors (penghao-wu/vstar, vstar_bench_eval.py, multiple_choices_inference, commit 7539bcc8): an
option is the whole reply with its end, and the one of the least mean loss a token is chosen.
"""
import torch

from utils.decode import State, extend_all
from utils.qwen import Qwen, plain


@torch.no_grad()
def score_blocks(qwen: Qwen, state: State, blocks: list[list[list[int]]], shared: list[int]) -> list[list[float]]:
    """Return the log-probability, in nats, of each of a row's blocks of ids, without its first `shared[row]` ids.

    Block after block, all rows at once; `state` is not used up.
    """
    found = [[] for _ in blocks]
    for k in range(max(map(len, blocks))):
        rows = [i for i, its in enumerate(blocks) if k < len(its)]
        hidden = extend_all(qwen, state.take(rows), [blocks[i][k] for i in rows])[0]  # [rows, longest, hidden]
        for read, i in zip(hidden, rows):
            block, skipped = blocks[i][k], shared[i]
            before = read[max(skipped - 1, 0):len(block) - 1]  # the state that predicts each token
            before = before if skipped else torch.cat([state.hidden[i][None], before])
            logits = qwen.model.lm_head(before).float().log_softmax(-1)
            own = torch.tensor(block[skipped:], device=logits.device)
            found[i].append(float(logits.gather(1, own[:, None]).sum()))
    return found


def score_replies(qwen: Qwen, state: State, replies: list[list[str]]) -> list[list[dict]]:
    """Return {"logp": sum over the tokens in nats, "n": tokens, the end among them} of each row's replies.

    `state` stands at the end of the prompts and is not used up.
    """
    end = qwen.tokenizer.eos_token_id  # of a turn, in Qwen's chats
    blocks = [[qwen.tokenizer(plain(text), add_special_tokens=False).input_ids + [end] for text in texts] for texts in replies]
    return [[{"logp": logp, "n": len(block)} for logp, block in zip(scores, its)]
            for scores, its in zip(score_blocks(qwen, state, blocks, [0] * len(blocks)), blocks)]
