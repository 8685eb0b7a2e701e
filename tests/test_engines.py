"""What training writes, read by the transformers of another major version. It installs that version:

    python -m pytest -m engines tests/test_engines.py
"""
import json
import os
import subprocess
import sys
import sysconfig
import venv

import pytest
import torch
from PIL import Image
from training import scene_rows

import train_sft
from toy.make_model import make_model
from utils import qwen as Q
from utils.decode import decode, prefill
from utils.items import chat
from utils.jsonl import write_rows
from utils.latent_families import PRESETS
from utils.train.weights import add_tokens

pytestmark = pytest.mark.engines

OTHER, N_ITEMS, N_TOKENS = "transformers==4.57.6", 20, 40
READER = """
import json, sys
import torch, transformers
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer, Qwen2VLImageProcessor
folder, questions = sys.argv[1:]
tokenizer, reader = AutoTokenizer.from_pretrained(folder), Qwen2VLImageProcessor.from_pretrained(folder)
model, report = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
replies = []
for path, question in json.load(open(questions)):
    text = tokenizer.apply_chat_template([{"role": "user", "content": [
        {"type": "image"}, {"type": "text", "text": question}]}], tokenize=False, add_generation_prompt=True)
    pixels = reader([Image.open(path)], return_tensors="pt")
    n_visual = int(pixels["image_grid_thw"].prod()) // reader.merge_size**2
    text = text.replace("<|image_pad|>", "<|image_pad|>" * n_visual)
    inputs = tokenizer(text, return_tensors="pt")
    out = model.generate(**inputs, **pixels, max_new_tokens=N_TOKENS, do_sample=False)
    replies.append(out[0, inputs["input_ids"].shape[1]:].tolist())
print(json.dumps({"version": transformers.__version__, "replies": replies, "dtype": str(model.dtype),
                  "missing": sorted(report["missing_keys"]), "unexpected": sorted(report["unexpected_keys"]),
                  "rope": AutoConfig.from_pretrained(folder).rope_scaling, "n_tokens": len(tokenizer)}))
"""


@pytest.fixture(scope="module")
def other_python(tmp_path_factory):
    """Python with the other version; torch is this one's, which is found behind its own packages."""
    folder = tmp_path_factory.mktemp("engines") / "venv"
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", OTHER, "pillow"], check=True)
    own = next((folder / "lib").glob("python*/site-packages"))
    (own / "torch_of_this.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Folder of items, of a model trained on text, and of one trained on latents from there."""
    folder = tmp_path_factory.mktemp("world")
    rows, asked = scene_rows(folder, 128, "train")[0], scene_rows(folder, N_ITEMS, "test")[0]
    write_rows(folder / "rows.jsonl", rows)
    make_model([row["question"] + row["chain"] for row in rows], folder / "random")
    shared = ["--data", str(folder / "rows.jsonl"), "--image_root", str(folder), "--global_batch", "32",
              "--num_workers", "0", "--learning_rate", "3e-3", "--schedule", "constant"]
    for name, base, more in (("text", "random", ["--train_vision", "--max_steps", "60"]),
                             ("latent", "text", ["--imagination", "latent", "--max_steps", "10"])):
        more += ["--model", str(folder / base), "--output", str(folder / name)]
        assert train_sft.main([*shared, *more]) == 0
    (folder / "items.json").write_text(json.dumps(
        [[str(folder / row["images"][0]), row["question"]] for row in asked]))
    return folder


@pytest.mark.parametrize("name", ["text", "latent"])
def test_the_other_version_gives_the_same_replies(world, other_python, name):
    code = READER.replace("N_TOKENS", str(N_TOKENS), 1)
    done = subprocess.run([other_python, "-c", code, world / name, world / "items.json"], text=True,
                          capture_output=True, env=os.environ | {"PYTHONPATH": ""})
    assert done.returncode == 0, done.stderr
    other = json.loads(done.stdout.splitlines()[-1])
    assert other["version"] == OTHER.partition("==")[2] and other["missing"] == other["unexpected"] == []
    assert other["rope"]["mrope_section"] and other["dtype"] == "torch.float32"
    qwen = Q.load(str(world / name), device="cpu")
    assert other["n_tokens"] == len(qwen.tokenizer)
    if name == "latent":
        assert len(add_tokens(qwen, PRESETS["mirage"].tokens)) == len(qwen.tokenizer) - len(
            Q.load_tools(str(world / "text")).tokenizer)
    items = json.loads((world / "items.json").read_text())
    inputs = Q.encode(qwen, [chat(qwen.tokenizer, question, 1) for _, question in items],
                      [[Image.open(path).convert("RGB")] for path, _ in items])
    with torch.no_grad():
        ours = decode(qwen, prefill(qwen, inputs), N_TOKENS)[0]
    assert [row.ids for row in ours] == other["replies"]
    assert len({tuple(row.ids) for row in ours}) > 1
    print(f"{sys.version.split()[0]}: {len(ours)} replies equal, such as",
          qwen.tokenizer.decode(ours[0].ids), file=sys.stderr)
