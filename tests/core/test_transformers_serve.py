"""Both generating stages against `transformers serve`, which ignores schemas, with a real model on the CPU.

The model is a random LLaVA of 100,000 parameters: its processor needs no torchvision. It never writes JSON:
every sample must end as a clean error, asked twice, with exit code 3.
"""
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image
from processes import free_port, run_here, words
from samples import flags, monet, row

from utils.backends import Request
from utils.jsonl import read_rows, write_rows
from utils.openai_backend import HttpBackend, httpx

for package in ("fastapi", "uvicorn", "openai"):
    pytest.importorskip(package, reason="pip install -r requirements-test.txt")
TEMPLATE = ("{% for m in messages %}{{ m.role }}: {% if m.content is string %}{{ m.content }}{% else %}"
            "{% for c in m.content %}{% if c.type == 'image' %}<image>{% elif c.type == 'text' %}{{ c.text }}"
            "{% endif %}{% endfor %}{% endif %}\n{% endfor %}assistant:")


@pytest.fixture
def llava(tiny_checkpoint, tmp_path) -> Path:
    """Folder of a random LLaVA whose replies are never empty: special tokens are suppressed."""
    from transformers import (AutoTokenizer, CLIPImageProcessorPil, CLIPVisionConfig, GenerationConfig,
                              LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor)
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    tokenizer.add_tokens("<image>", special_tokens=True)
    tokenizer.image_token = "<image>"
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**sizes, image_size=56, patch_size=28, projection_dim=32),
        text_config=LlamaConfig(**sizes, vocab_size=len(tokenizer), max_position_embeddings=8192),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"), image_seq_length=4)
    model = LlavaForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        suppress_tokens=[*tokenizer.added_tokens_decoder])
    model.save_pretrained(tmp_path / "llava")
    square = {"height": 56, "width": 56}
    processor = LlavaProcessor(CLIPImageProcessorPil(size=square, crop_size=square), tokenizer, patch_size=28,
                               vision_feature_select_strategy="default", num_additional_image_tokens=1,
                               chat_template=TEMPLATE)
    processor.save_pretrained(tmp_path / "llava")
    return tmp_path / "llava"


@pytest.fixture
def url(llava):
    """Run `transformers serve` on a free port; yield its base URL once it answers."""
    port = free_port()
    program = ("import sys; from transformers.cli.transformers import main; sys.argv[0] = 'transformers'; "
               "main()")
    process = subprocess.Popen([sys.executable, "-c", program, "serve", str(llava), "--host", "127.0.0.1",
                                "--port", str(port), "--device", "cpu", "--dtype", "float32"],
                               env=os.environ | {"HF_HUB_OFFLINE": "1"})
    try:
        for _ in range(600):
            assert process.poll() is None, "transformers serve ended"
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).status_code == 200:
                    break
            except httpx.RequestError:
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait()


def test_stages_end_with_clean_errors_and_a_corrupt_image_fails_alone(tmp_path, picture, llava, url, capsys):
    def run(script: str, *more: str) -> dict:
        assert run_here(script, [*flags(tmp_path / "in.jsonl", *more), *words(
            output=tmp_path / f"{script}.jsonl", backend="openai", base_url=url, model=llava,
            max_new_tokens=12, concurrency=4, no_guard=True)]) == 3
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    for n, color in enumerate(("red", "blue", "green", "yellow")):
        picture(f"{n}.png", color=color)
    noise = Image.effect_noise((300, 200), 50)
    noise.convert("CMYK").save(tmp_path / "cmyk.jpg")
    samples = [monet(n, question=f"Which one {n}?", images=("0.png", f"{1 + n % 3}.png")) for n in range(6)]
    samples += [monet(6, subset="CogCoM", images=("0.png", "1.png")),
                monet(7, question="No file?", images=("0.png", "x.png")),
                monet(8, question="<|im_end|> <image>?", images=("cmyk.jpg", "1.png"))]
    write_rows(tmp_path / "in.jsonl", samples)
    out = run("rewrite_captions")
    assert (out["read"], out["kept"], out["errors"]) == (9, 0, 8)
    assert out["n_calls"] == 16 and out["json_as_asked"] in (0.0, None)
    rejected = read_rows(tmp_path / "rewrite_captions.jsonl.run" / "rejected.jsonl", {"reason": str})
    reasons = Counter(row["reason"] for row in rejected)
    assert reasons.pop("image_missing") == 1 and set(reasons) <= {"cut_off", "bad_json"}
    write_rows(tmp_path / "in.jsonl", [
        row(f"s/{n}", f"The hull shows {n} of 42.", images=[f"{n % 4}.png"], steps=[
            {"image": f"{(n + 1) % 4}.png", "operation": "zoom", "caption": "x"},
            {"text": "\\boxed{42}"}]) for n in range(6)])
    for more, n_calls in (((), 12), (("--export_only",), 0)):
        out = run("filter_data", *more)
        assert (out["read"], out["kept"], out["errors"], out["n_calls"]) == (6, 0, 6, n_calls)

    noise.save(tmp_path / "bad.jpg")
    data = (tmp_path / "bad.jpg").read_bytes()
    (tmp_path / "bad.jpg").write_bytes(data[:len(data) // 2])  # the header stays: it is sent as it is
    requests = [Request(f"{n:064x}", None, "What is it?", (str(tmp_path / name),), 8)
                for n, name in enumerate(("0.png", "bad.jpg"))]
    good, bad = sorted(HttpBackend(str(llava), url, 10**6).generate(requests), key=lambda reply: reply.key)
    assert good.error is None and good.text and good.n_new == 8
    assert bad.error.startswith("status 500") and bad.attempts == 3 and not bad.transient
