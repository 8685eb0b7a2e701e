"""Make a tiny Qwen2.5-VL with random weights, in the layout of the released checkpoints.

    python -m toy.make_model --texts work/see.jsonl work/base.jsonl --output work/random

Reads   --texts: JSONL rows with "question" and "chain"; the tokenizer is trained on them
Writes  --output: config.json (flat, as released), model.safetensors, vocab.json, merges.txt,
        tokenizer_config.json, chat_template.jinja, preprocessor_config.json, generation_config.json
Prints  one JSON object: {"parameters": n, "tokens": n}
"""
import argparse
import json
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration

from utils.cli import cli, log
from utils.jsonl import read_rows, write_json

# Qwen2.5-VL's added tokens in its order (tokenizer_config.json of the release); the last six are not special.
ADDED_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
                "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>",
                "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>", "<tool_call>",
                "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
                "<|repo_name|>", "<|file_sep|>")
N_SPECIAL = 14
# Qwen2's own pre-tokenisation pattern (transformers, tokenization_qwen2.py)
PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
           r"|\s*[\r\n]+|\s+(?!\S)|\s+")
# Qwen2.5-VL's template for text and images (chat_template.jinja of the release, Apache-2.0), without video
CHAT_TEMPLATE = """\
{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}<|im_end|>
{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' %}\
<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}\
{% endif %}{% endfor %}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
SPARE_ROWS = 16  # embedding rows left free for added tokens, as the release leaves 399
SIZES = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4,
         "num_key_value_heads": 2}
VISION_SIZES = {"depth": 3, "hidden_size": 96, "intermediate_size": 256, "num_heads": 4}
# CLIP's, as released
IMAGE_MEAN, IMAGE_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def train_tokenizer(texts: list[str], folder: Path, n_tokens: int) -> dict[str, int]:
    """Train a byte-level BPE of at most `n_tokens` tokens, write its files, return the added tokens' ids."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PATTERN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=n_tokens, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    bpe.model.save(str(folder))  # vocab.json, merges.txt
    first = bpe.get_vocab_size()
    ids = {name: first + i for i, name in enumerate(ADDED_TOKENS)}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    added = {str(i): {"content": name, **flags, "special": i - first < N_SPECIAL} for name, i in ids.items()}
    write_json(folder / "tokenizer_config.json", {
        "added_tokens_decoder": added, "additional_special_tokens": list(ADDED_TOKENS[1:N_SPECIAL]),
        "add_prefix_space": False, "bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
        "unk_token": None, "errors": "replace", "model_max_length": 4096, "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer"})
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    return ids


def flat_config(ids: dict[str, int], sizes: dict, vision_sizes: dict) -> dict:
    """Return config.json as transformers 4.x wrote it: the text model's settings on the top level."""
    head_dim = sizes["hidden_size"] // sizes["num_attention_heads"]
    temporal = head_dim // 8
    spatial = (head_dim // 2 - temporal) // 2
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl",
        "attention_dropout": 0.0, "bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"],
        "vision_start_token_id": ids["<|vision_start|>"], "vision_end_token_id": ids["<|vision_end|>"],
        "vision_token_id": ids["<|vision_pad|>"], "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"], "hidden_act": "silu", "tie_word_embeddings": False,
        "initializer_range": 0.08,  # 0.02, the release's, learns far slower at this width
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
        "torch_dtype": "float32", "use_cache": True, "use_sliding_window": False, **sizes,
        "rope_scaling": {"type": "mrope", "mrope_section": [temporal, spatial, spatial]},
        "vision_config": {"hidden_act": "silu", "in_chans": 3, "out_hidden_size": sizes["hidden_size"],
                          "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2,
                          "tokens_per_second": 2, "window_size": 112, "initializer_range": 0.08,
                          "fullatt_block_indexes": [vision_sizes["depth"] - 1], **vision_sizes},
        "vocab_size": max(ids.values()) + 1 + SPARE_ROWS}


def make_model(texts: list[str], folder: Path, n_tokens: int = 640, seed: int = 0, sizes: dict = SIZES,
               vision_sizes: dict = VISION_SIZES) -> dict:
    """Write a random checkpoint into `folder`; return {"parameters": n, "tokens": n}."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = train_tokenizer(texts, folder, n_tokens)
    config = flat_config(ids, sizes, vision_sizes)
    write_json(folder / "config.json", config)
    write_json(folder / "preprocessor_config.json", {
        "min_pixels": 4 * 28 * 28, "max_pixels": 12845056, "patch_size": 14, "temporal_patch_size": 2,
        "merge_size": 2, "image_mean": IMAGE_MEAN, "image_std": IMAGE_STD,
        "image_processor_type": "Qwen2VLImageProcessor"})
    eos = [ids["<|im_end|>"], ids["<|endoftext|>"]]
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(AutoConfig.from_pretrained(folder))
    model.save_pretrained(folder)
    write_json(folder / "config.json", config)  # save_pretrained wrote the nested form of transformers 5
    write_json(folder / "generation_config.json",
               {"eos_token_id": eos, "pad_token_id": ids["<|endoftext|>"], "do_sample": False})
    return {"parameters": sum(p.numel() for p in model.parameters()), "tokens": max(ids.values()) + 1}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", nargs="+", required=True,
                        help="JSONL rows whose question and chain train the tokenizer")
    parser.add_argument("--output", required=True, help="folder of the checkpoint")
    args = parser.parse_args(argv)
    rows = [row for path in args.texts for row in read_rows(path, {"id": str, "question": str, "chain": str})]
    texts = [text for row in rows for text in (row["question"], row["chain"])]
    made = make_model(texts, Path(args.output))
    log(f"{made['parameters']:,} parameters, {made['tokens']} tokens -> {args.output}")
    print(json.dumps(made))
    return 0


if __name__ == "__main__":
    raise SystemExit(cli(main))
