"""Fixtures: a tiny random Qwen2.5-VL in the released layout, and pictures made on the spot."""
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # tests run from any folder

TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
TINY_VISION = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2}
TEXTS = ["What digit is on the red circle?", "a red circle with the digit 7", "The answer is \\boxed{7}.",
         "I look closer. <think_image>a blue square</think_image> It is blue."] * 4


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> Path:
    """Folder of a random Qwen2.5-VL of about 100,000 parameters with a byte-level BPE tokenizer."""
    from toy.make_model import make_model
    folder = tmp_path_factory.mktemp("tiny") / "checkpoint"
    make_model(TEXTS, folder, n_tokens=320, seed=0, sizes=TINY, vision_sizes=TINY_VISION)
    return folder


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real data beside the repository; tests that need it skip where it is absent."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}")
    return folder


@pytest.fixture
def picture(tmp_path):
    """Return make(name, size, color) -> path of a PNG with a frame, so that it is not one flat colour."""
    def make(name: str = "picture.png", size: tuple[int, int] = (56, 84), color: str = "red") -> Path:
        image = Image.new("RGB", size, color)
        image.paste("white", (0, 0, size[0] // 2, size[1] // 3))
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
        return path
    return make
