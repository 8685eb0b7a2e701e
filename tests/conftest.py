"""Fixtures: a tiny random Qwen2.5-VL in the released layout, and pictures made on the spot."""
import os
import random
import shutil
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # tests run from any folder
# before torch is imported, and for all processes: the last bits depend on the number of threads
os.environ.setdefault("OMP_NUM_THREADS", "1")

TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1}
TINY_VISION = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2}
TEXTS = ["What digit is on the red circle?", "a red circle with the digit 7", "The answer is \\boxed{7}.",
         "I look closer. <think_image>a blue square</think_image> It is blue."] * 4


def pytest_collection_modifyitems(items):
    """Run the whole toy first: it takes as long as all other slow tests, and one worker would end with it."""
    items.sort(key=lambda item: "the_whole_run" not in item.name)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> Path:
    """Folder of a random Qwen2.5-VL of about 100,000 parameters with a byte-level BPE tokenizer."""
    from toy.make_model import make_model
    folder = tmp_path_factory.mktemp("tiny") / "checkpoint"
    make_model(TEXTS, folder, n_tokens=320, seed=0, sizes=TINY, vision_sizes=TINY_VISION)
    return folder


def make_qwen3(base: Path, folder: Path, sizes: dict = TINY, vision_sizes: dict = TINY_VISION) -> Path:
    """Write a random Qwen3-VL with the tokenizer of a checkpoint. Its first layers read what the vision
    tower's first block sees; heads of queries are wider than the model."""
    import torch
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    from utils.jsonl import load_object, write_json
    shutil.copytree(base, folder)
    old, image = (load_object(folder / name) for name in ("config.json", "preprocessor_config.json"))
    ids = {key: value for key, value in old.items() if key.endswith("_token_id") and "s_" not in key}
    rope = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1e4}
    config = Qwen3VLConfig(
        text_config=sizes | {"vocab_size": old["vocab_size"], "head_dim": 32, "rope_parameters": rope},
        vision_config=vision_sizes | {"out_hidden_size": sizes["hidden_size"], "num_position_embeddings": 64,
                                      "deepstack_visual_indexes": [0], "initializer_range": 0.2}, **ids)
    config.text_config.initializer_range = 0.2
    (folder / "model.safetensors").unlink()
    torch.manual_seed(0)
    Qwen3VLForConditionalGeneration(config).save_pretrained(folder)
    write_json(folder / "preprocessor_config.json", image | {"patch_size": 16})
    return folder


@pytest.fixture(scope="session")
def tiny_qwen3(tiny_checkpoint, tmp_path_factory) -> Path:
    """Folder of a random Qwen3-VL as small as `tiny_checkpoint`."""
    return make_qwen3(tiny_checkpoint, tmp_path_factory.mktemp("qwen3") / "checkpoint")


@pytest.fixture(scope="session")
def released_files(shared_data, tmp_path_factory) -> Path:
    """Folder of a tiny random model with the config and vocabulary of Qwen2.5-VL-7B as released."""
    import torch
    from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration

    from utils.jsonl import load_object, write_json
    folder = tmp_path_factory.mktemp("released") / "checkpoint"
    shutil.copytree(shared_data / "qwen2_5_vl", folder)
    config = load_object(folder / "config.json") | TINY | {"torch_dtype": "float32"}
    config["rope_scaling"]["mrope_section"] = [2, 3, 3]
    config["vision_config"] |= TINY_VISION | {"out_hidden_size": 32, "fullatt_block_indexes": [1]}
    write_json(folder / "config.json", config)
    files = {path: path.read_bytes() for path in folder.iterdir()}
    torch.manual_seed(0)
    Qwen2_5_VLForConditionalGeneration(AutoConfig.from_pretrained(folder)).save_pretrained(folder)
    for path, content in files.items():  # flat again, as released
        path.write_bytes(content)
    return folder


@pytest.fixture(scope="session")
def imagining_model(tmp_path_factory):
    """Return make(kind "text", "latent" or "ids", follows) -> folder of a model of tests/imagining.py."""
    @cache
    def make(kind, follows):
        from imagining import make_latent_checkpoint, make_text_checkpoint
        folder = tmp_path_factory.mktemp(kind) / "checkpoint"
        if kind == "text":
            return make_text_checkpoint(folder, follows)
        return make_latent_checkpoint(folder, follows, family="lavit" if kind == "ids" else "mirage")
    return make


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real data next to the repository; tests that need it are skipped without it."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}")
    return folder


@pytest.fixture
def plain_figures(monkeypatch):
    """A figure is a file without a drawing, which takes longer than the run itself."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig",
                        lambda figure, file, **options: file.write(bytes(50_000)))


@pytest.fixture
def picture(tmp_path):
    """Return make(name, size, color) -> path of a PNG that is not one flat colour."""
    from samples import framed
    return lambda name="picture.png", size=(56, 84), color="red": framed(tmp_path / name, size, color)


@pytest.fixture
def rows_file(tmp_path, picture):
    """Return write(rows, name) -> path of a JSONL next to the pictures a.png, b.png and c.png."""
    from utils.jsonl import write_rows
    for name, color in (("a.png", "red"), ("b.png", "blue"), ("c.png", "green")):
        picture(name, color=color)

    def write(rows: list[dict], name: str = "in.jsonl") -> Path:
        write_rows(tmp_path / name, rows)
        return tmp_path / name
    return write


@pytest.fixture
def data(tmp_path, picture):
    """Twelve rows of unequal length: every third imagines no image, every fourth has no picture."""
    from utils.jsonl import write_rows
    rng, rows = random.Random(0), []
    for n in range(12):
        picture(f"{n}_0.png", (56, 56 + 28 * (n % 3)), rng.choice(("red", "blue")))
        picture(f"{n}_1.png", (56, 84), "green")
        words = " ".join(["closer"] * rng.randint(1, 12))
        image = {"image": f"{n}_1.png", "operation": "zoom", "caption": f"a {words} thing"}
        steps = [{"text": f"I look {words}."}, *([image] if n % 3 else []),
                 {"text": f"It is {n}. The answer is \\boxed{{{n}}}."}]
        rows.append({"id": f"t/{n}", "subset": "t", "images": [f"{n}_0.png"] if n % 4 else [],
                     "question": f"What is {words}?", "answer": str(n), "steps": steps,
                     "chain": f"I look {words}. <think_image>a thing</think_image> "
                              f"The answer is \\boxed{{{n}}}."})
    write_rows(tmp_path / "rows.jsonl", rows)
    return tmp_path / "rows.jsonl"
