"""Multiple choice without letters: the option that the model finds likeliest as its reply.

As V* is scored by its authors (penghao-wu/vstar, vstar_bench_eval.py, multiple_choices_inference, commit 7539bcc8): an
option is the whole reply with its end, and the one of the least mean loss a token is chosen.
"""
import torch

from utils.decode import State, extend_all
from utils.qwen import Qwen, plain


@torch.no_grad()
def score_replies(qwen: Qwen, state: State, replies: list[list[str]]) -> list[list[dict]]:
    """Return {"logp": sum over the tokens in nats, "n": tokens, the end among them} of each row's replies.

    Reply after reply, all rows at once; `state` stands at the end of the prompts and is not used up.
    """
    end = qwen.tokenizer.eos_token_id  # of a turn, in Qwen's chats
    found = [[] for _ in replies]
    for k in range(max(map(len, replies))):
        rows = [i for i, texts in enumerate(replies) if k < len(texts)]
        blocks = [qwen.tokenizer(plain(replies[i][k]), add_special_tokens=False).input_ids + [end] for i in rows]
        hidden = extend_all(qwen, state.take(rows), blocks)[0]  # [rows, longest, hidden]
        for n, (i, block) in enumerate(zip(rows, blocks)):
            before = torch.cat([state.hidden[i][None], hidden[n, :len(block) - 1]])  # the state that predicts each token
            logits = qwen.model.lm_head(before).float().log_softmax(-1)
            own = torch.tensor(block, device=logits.device)
            found[i].append({"logp": float(logits.gather(1, own[:, None]).sum()), "n": len(block)})
    return found
