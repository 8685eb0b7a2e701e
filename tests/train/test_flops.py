"""The count of operations against torch's own counter, and against the release's size.    pytest
tests/test_flops.py"""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

from toy.make_model import make_model
from utils import qwen as Q
from utils.train.batching import peak_flops, training_flops
from utils.train.packing import run_packed, use_packed_attention


@pytest.mark.parametrize("train_vision", [False, True])
def test_within_a_tenth_of_torch_s_counter(tmp_path, train_vision):
    """The counter takes masked attention for whole, which the small share of attention here makes up for."""
    make_model(["a red circle"] * 4, tmp_path / "m", n_tokens=300, seed=0, sizes={
        "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2},
        vision_sizes={"depth": 3, "hidden_size": 256, "intermediate_size": 512, "num_heads": 4})
    qwen = Q.load(str(tmp_path / "m"), device="cpu")
    qwen.model.model.visual.requires_grad_(train_vision)
    config, image_id = qwen.model.config, Q.special_id(qwen.tokenizer, Q.IMAGE_TOKEN)
    grids, lengths = [(1, 8, 8), (1, 8, 16)], [70, 90]
    ids = torch.full((1, 160), 5)
    ids[0, :16] = ids[0, 70:102] = image_id
    pack = {"input_ids": ids, "position_ids": torch.arange(160).expand(3, 1, 160), "max_length": 90,
            "cu_seqlens": torch.tensor([0, 70, 160], dtype=torch.int32), "source": torch.arange(30).repeat(2)
            + 40,
            "pixel_values": torch.randn(64 + 128, 1176), "image_grid_thw": torch.tensor(grids)}
    pack["source"][30:] += 80
    with use_packed_attention(qwen.model), FlopCounterMode(display=False) as counter:
        qwen.model.lm_head(run_packed(qwen.model, pack)).sum().backward()
    assert training_flops(config, lengths, 60, grids,
                          train_vision) == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_the_release_s_own_numbers(shared_data):
    """7B: 6.525 billion weights a token in the layers, of which an MLP has 0.204, and 0.545 billion in the
    head, counted by hand from its config. The last MLP and the head are counted where something is
    predicted."""
    config = AutoConfig.from_pretrained(shared_data / "qwen2_5_vl")
    one = training_flops(config, [1], 0, [])
    assert one / 6 == pytest.approx(6.525e9 - 0.204e9, rel=1e-3)
    assert (training_flops(config, [1], 1, []) - one) / 6 == pytest.approx(0.204e9 + 0.545e9, rel=1e-3)
    patches = training_flops(config, [1], 0, [(1, 2, 2)]) - one
    # a patch, and its quarter of the merger
    assert patches / 4 / 2 == pytest.approx(631.5e6 + 44.6e6 / 4, rel=0.01)


def test_peaks_are_known_by_name():
    assert peak_flops("NVIDIA H200") == 989e12 and peak_flops("NVIDIA A800-SXM4-80GB") == 312e12
    assert peak_flops("Some other device") is None
