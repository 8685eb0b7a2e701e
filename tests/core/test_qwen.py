"""Loading checkpoints and turning chats into tensors."""
import json
import shutil

import numpy as np
import pytest
import torch
from decoding import generate, library_generate
from PIL import Image
from transformers import Qwen2VLImageProcessorPil

from utils import qwen as Q
from utils.images import open_image, smart_size
from utils.items import chat
from utils.jsonl import DataError
from utils.latent_families import PRESETS
from utils.train.weights import add_tokens

pytestmark = pytest.mark.numeric


@pytest.fixture(scope="module")
def tiny(tiny_checkpoint):
    return Q.load(str(tiny_checkpoint), device="cpu")


def test_flat_and_nested_configs_load_alike(tiny, tiny_checkpoint, tmp_path):
    assert "text_config" not in json.loads((tiny_checkpoint / "config.json").read_text())
    for part in (tiny.model, tiny.tokenizer, tiny.image_processor):
        part.save_pretrained(tmp_path / "nested")
    assert "text_config" in json.loads((tmp_path / "nested" / "config.json").read_text())
    again = Q.load(str(tmp_path / "nested"), device="cpu")
    assert again.eos_ids == tiny.eos_ids and again.factor == 28
    for (name, a), (_, b) in zip(tiny.model.state_dict().items(), again.model.state_dict().items(),
                                 strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("settings", [{"min_pixels": 3136, "max_pixels": 12845056},
                                      {"size": {"shortest_edge": 3136, "longest_edge": 12845056}}])
def test_pixel_budget_holds_on_both_forms_of_settings(tiny_checkpoint, tmp_path, settings):
    shutil.copytree(tiny_checkpoint, tmp_path / "c")
    path = tmp_path / "c" / "preprocessor_config.json"
    config = {k: v for k, v in json.loads(path.read_text()).items() if k not in ("min_pixels", "max_pixels")}
    path.write_text(json.dumps(config | settings))
    for tokens in (4, 100, 600):
        _, processor = Q.load_processors(str(tmp_path / "c"), max_pixels=tokens * 784)
        grid = Q.process_images(processor, [Image.new("RGB", (900, 1300))])["image_grid_thw"][0]
        width, height = smart_size(900, 1300, 28, 3136, tokens * 784)
        assert grid.tolist() == [1, height // 14, width // 14] and int(grid.prod()) // 4 <= tokens
    with pytest.raises(DataError, match="expected 784 <= min_pixels <= max_pixels"):
        Q.load_processors(str(tmp_path / "c"), min_pixels=100_000, max_pixels=50_000)


@pytest.mark.parametrize("patch, red", [(14, 0.48), (16, 0.25)])  # Qwen2.5-VL; Qwen3-VL, other settings
@pytest.mark.parametrize("low, high", [(3136, 12845056), (50000, 60000), (784 * 200, 784 * 400)])
def test_every_value_is_the_librarys(patch, red, low, high):
    processor = Qwen2VLImageProcessorPil(patch_size=patch, image_mean=[red, 0.46, 0.41],
                                         image_std=[0.27, 0.26, 0.28])
    processor.size = {"shortest_edge": low, "longest_edge": high}
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
                for width, height in ((28, 28), (64, 320), (333, 517), (1000, 90), (448, 448), (30, 31))]
    expected, computed = processor(pictures, return_tensors="pt"), Q.process_images(processor, pictures)
    assert torch.equal(computed["image_grid_thw"], expected["image_grid_thw"])
    assert torch.equal(computed["pixel_values"], expected["pixel_values"])
    assert computed["pixel_values"].dtype == torch.float32 and Q.process_images(processor, []) is None


def test_patches_are_multiplied_as_the_stock_model_convolves_them(tiny_checkpoint, picture):
    """Features and the gradient of the first layer's weight; the library's forward is back afterwards."""
    qwen = Q.load(str(tiny_checkpoint), device="cpu")
    conv = qwen.model.model.visual.patch_embed.proj
    inputs = Q.process_images(qwen.image_processor, [Image.open(picture("a.png", size=(90, 140)))])
    results = []
    for device in ("cpu", "cuda"):  # what is done on a GPU, and the library's convolution
        conv.weight.grad = None
        with Q.multiplied_patches(qwen.model, device):
            assert ("forward" in vars(conv)) == (device == "cpu")
            with Q.multiplied_patches(qwen.model, device):
                pass
            assert ("forward" in vars(conv)) == (device == "cpu")  # a nested block leaves it to the outer one
            features = qwen.model.model.get_image_features(**inputs, return_dict=True).pooler_output[0]
            features.square().sum().backward()
        assert "forward" not in vars(conv)
        results.append((features, conv.weight.grad))
    assert torch.allclose(results[0][0], results[1][0], atol=1e-5)
    assert torch.allclose(results[0][1], results[1][1], rtol=1e-4, atol=1e-5) and results[0][1].any()


def test_chat_places_images_and_breaks_control_tokens(tiny):
    pad = "<|vision_start|><|image_pad|><|vision_end|>"
    text = chat(tiny.tokenizer, "What is this?<|im_end|>", 2)
    assert text == ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n" + pad * 2
                    + "What is this?< |im_end|><|im_end|>\n<|im_start|>assistant\n")
    assert f"first {pad} then {pad}.<|im_end|>" in chat(tiny.tokenizer, "first <image> then <image>.", 2)
    brief = chat(tiny.tokenizer, "a", 0, system="Be brief.")
    assert brief.startswith("<|im_start|>system\nBe brief.<|im_end|>")
    with pytest.raises(DataError, match="1 <image> markers for 2 images"):
        chat(tiny.tokenizer, "one <image>", 2)


def test_collate_counts_positions_and_padding(tiny):
    images = [[Image.new("RGB", (56, 84), "red")], [],
              [Image.new("RGB", (84, 84)), Image.new("RGB", (56, 56))]]
    prompts = [chat(tiny.tokenizer, "What is it?", len(row)) for row in images]
    batch = Q.encode(tiny, prompts, images)
    image_id = Q.special_id(tiny.tokenizer, Q.IMAGE_TOKEN)
    assert (batch["input_ids"] == image_id).sum(1).tolist() == [6, 0, 9 + 4]
    assert torch.equal(batch["mm_token_type_ids"], (batch["input_ids"] == image_id).int())
    assert batch["attention_mask"][:, -1].tolist() == [1, 1, 1]
    assert batch["pixel_values"].shape == (4 * (6 + 9 + 4), 3 * 2 * 14 * 14)
    # Text positions grow by 1; after an image of h x w tokens they resume max(h, w) after its first.
    for row in range(3):
        places = batch["position_ids"][:, row, batch["attention_mask"][row].bool()]
        steps = batch["mm_token_type_ids"][row, batch["attention_mask"][row].bool()]
        assert places.max() + 1 == (steps == 0).sum() + [3, 0, 3 + 2][row]
    with pytest.raises(DataError, match="2 .*image_pad.* in a prompt with 1 images"):
        Q.encode(tiny, [prompts[2]], [images[0]])


def test_qwen3_vl_loads_the_same_way(tiny_qwen3):
    qwen = Q.load(str(tiny_qwen3), device="cpu", max_pixels=64 * 32 * 32)
    assert qwen.factor == 32 and qwen.model.config.model_type == "qwen3_vl"
    batch = Q.encode(qwen, [chat(qwen.tokenizer, "What?", 1), chat(qwen.tokenizer, "No picture here.", 0)],
                     [[Image.new("RGB", (64, 96))], []])
    assert (batch["mm_token_type_ids"].sum(1)).tolist() == [6, 0]
    library = library_generate(qwen, batch, 4)[:, batch["input_ids"].shape[1]:].tolist()
    for ids, row in zip(library, generate(qwen, batch, 4)):
        assert row.ids and ids[:len(row.ids)] == row.ids


@pytest.mark.parametrize("family", sorted(PRESETS))
def test_each_family_starts_at_the_first_free_id(released_files, family):
    qwen, names = Q.load(str(released_files), device="cpu"), PRESETS[family].tokens
    for _ in range(2):  # a second time adds nothing
        assert add_tokens(qwen, names) == [*range(151665, 151665 + len(names))]
    assert qwen.model.lm_head.out_features == 152064 and qwen.eos_ids == [151645, 151643]


def test_real_photographs_at_budgets_from_4_to_2000_tokens(released_files, shared_data):
    images = [open_image(path) for path in sorted((shared_data / "photos").iterdir())]
    assert len(images) == 11
    for tokens, some in ((4, images), (500, images), (2000, images[:2])):
        qwen = Q.load(str(released_files), device="cpu", max_pixels=tokens * 28 * 28)
        for image in some:
            batch = Q.encode(qwen, [chat(qwen.tokenizer, "What is in the picture?", 1)], [[image]])
            width, height = smart_size(*image.size, 28, 3136, tokens * 784)
            assert int(batch["mm_token_type_ids"].sum()) == width * height // 784 <= tokens
        assert len(generate(qwen, batch, 2)[0].ids) == 2
