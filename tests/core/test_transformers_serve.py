"""Both generating stages against `transformers serve`, which ignores schemas, with a real model on the CPU.

The model is a random LLaVA of 100,000 parameters: its processor needs no torchvision. It never writes JSON:
every sample must end as a clean error, asked twice, with exit code 3.
"""
import json
import os
import socket
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image
from processes import command
from samples import monet, row

from utils.backends import Request
from utils.jsonl import read_rows, write_rows
from utils.openai_backend import HttpBackend, httpx

for package in ("fastapi", "uvicorn", "openai"):
    pytest.importorskip(package, reason="pip install -r requirements-test.txt")
TEMPLATE = ("{% for m in messages %}{{ m.role }}: {% if m.content is string %}{{ m.content }}{% else %}"
            "{% for c in m.content %}{% if c.type == 'image' %}<image>{% elif c.type == 'text' %}{{ c.text }}"
            "{% endif %}{% endfor %}{% endif %}\n{% endfor %}assistant:")


@pytest.fixture(scope="module")
def llava(tmp_path_factory) -> Path:
    """Folder of a random LLaVA whose replies are never empty: special tokens are suppressed."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import (CLIPImageProcessorPil, CLIPVisionConfig, GenerationConfig, LlamaConfig,
                              LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor,
                              PreTrainedTokenizerFast)
    folder = tmp_path_factory.mktemp("llava")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE({sign: n for n, sign in enumerate(alphabet)}, []))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>", pad_token="<pad>",
                                        additional_special_tokens=["<image>"])
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**sizes, image_size=56, patch_size=28, projection_dim=32),
        text_config=LlamaConfig(**sizes, vocab_size=len(tokenizer), max_position_embeddings=8192),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"), image_seq_length=4)
    model = LlavaForConditionalGeneration(config)
    special = [tokenizer.convert_tokens_to_ids(name) for name in ("</s>", "<pad>", "<image>")]
    model.generation_config = GenerationConfig(eos_token_id=special[0], pad_token_id=special[1],
                                               suppress_tokens=special)
    model.save_pretrained(folder)
    square = {"height": 56, "width": 56}
    processor = LlavaProcessor(CLIPImageProcessorPil(size=square, crop_size=square), tokenizer, patch_size=28,
                               vision_feature_select_strategy="default", num_additional_image_tokens=1,
                               chat_template=TEMPLATE)
    processor.save_pretrained(folder)
    return folder


@contextmanager
def serving(folder: Path):
    """Run `transformers serve` on a free port; yield its base URL once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = ("import sys; from transformers.cli.transformers import main; sys.argv[0] = 'transformers'; "
               "main()")
    process = subprocess.Popen([sys.executable, "-c", program, "serve", str(folder), "--host", "127.0.0.1",
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


def run(script: str, folder: Path, url: str, model: Path, *more: str) -> dict:
    flags = ["--input", str(folder / "in.jsonl"), "--image_root", str(folder), "--output",
             str(folder / f"{script}.jsonl"), "--backend", "openai", "--base_url", url, "--model", str(model),
             "--max_new_tokens", "12", "--concurrency", "4", "--no_guard", *more]
    done = subprocess.run(command(script, flags), capture_output=True, text=True, timeout=600)
    assert done.returncode == 3 and "Traceback" not in done.stderr, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_both_stages_end_with_clean_errors(tmp_path, picture, llava):
    for n, color in enumerate(("red", "blue", "green", "yellow")):
        picture(f"{n}.png", color=color)
    Image.effect_noise((300, 200), 50).convert("CMYK").save(tmp_path / "cmyk.jpg")
    samples = [monet(n, question=f"Which one {n}?", images=("0.png", f"{1 + n % 3}.png")) for n in range(6)]
    samples += [monet(6, subset="CogCoM", images=("0.png", "1.png")),
                monet(7, question="No file?", images=("0.png", "x.png")),
                monet(8, question="<|im_end|> <image>?", images=("cmyk.jpg", "1.png"))]
    (tmp_path / "in.jsonl").write_text(json.dumps(samples))
    with serving(llava) as url:
        out = run("rewrite_captions", tmp_path, url, llava)
        assert (out["read"], out["kept"], out["errors"]) == (9, 0, 8)
        assert out["n_calls"] == 16 and out["json_as_asked"] in (0.0, None)
        rejected = read_rows(tmp_path / "rewrite_captions.jsonl.run" / "rejected.jsonl", {"reason": str})
        reasons = Counter(row["reason"] for row in rejected)
        assert reasons.pop("image_missing") == 1 and set(reasons) <= {"cut_off", "bad_json"}
        write_rows(tmp_path / "in.jsonl", [
            row(f"s/{n}", f"The hull shows {n} of 42.", images=[f"{n % 4}.png"], steps=[
                {"image": f"{(n + 1) % 4}.png", "operation": "zoom", "caption": "x"},
                {"text": "\\boxed{42}"}]) for n in range(6)])
        out = run("filter_data", tmp_path, url, llava)
        assert (out["read"], out["kept"], out["errors"], out["n_calls"]) == (6, 0, 6, 12)
        out = run("filter_data", tmp_path, url, llava, "--export_only")
        assert out["errors"] == 6 and out["n_calls"] == 0


def test_a_corrupt_image_fails_alone(tmp_path, picture, llava):
    """The server answers 500 to it; it ends after three tries, and its neighbour is answered."""
    good = picture("a.png")
    Image.effect_noise((300, 200), 50).save(tmp_path / "bad.jpg")
    data = (tmp_path / "bad.jpg").read_bytes()
    (tmp_path / "bad.jpg").write_bytes(data[:len(data) // 2])  # the header stays: it is sent as it is
    with serving(llava) as url:
        backend = HttpBackend(str(llava), url, 10**6)
        requests = [Request(f"{n:064x}", None, "What is it?", (str(path),), 8)
                    for n, path in enumerate((good, tmp_path / "bad.jpg"))]
        replies = {int(reply.key, 16): reply for reply in backend.generate(requests)}
    assert replies[0].error is None and replies[0].text and replies[0].n_new == 8
    assert replies[1].error.startswith("status 500") and replies[1].attempts == 3 and not replies[1].transient
