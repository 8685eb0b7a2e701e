"""Estimates before a run, against the release's numbers and a run's own.    pytest tests/test_preview.py"""
import pytest
import torch
from PIL import Image
from transformers import AutoConfig

from utils import qwen as Q
from utils.jsonl import read_rows
from utils.train.batching import (check_files, count_parameters, describe_lengths, device_memory,
                                  draw_lengths, estimate_hours, estimate_memory, memory_lines)
from utils.train.examples import Target, make_examples

SMALLER = "a smaller --max_tokens than 8192 or --recompute layers"


@pytest.fixture
def examples(tiny_checkpoint, data):
    return make_examples(Q.load_tools(str(tiny_checkpoint)), read_rows(data, {}),
                         Target("text", str(data.parent)))


def test_parameters_are_counted_without_loading_any(tiny_checkpoint):
    counts = count_parameters(Q.load_tools(str(tiny_checkpoint)).config)
    model = Q.load(str(tiny_checkpoint), device="cpu").model
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters())
    assert counts["tower"] == sum(p.numel() for p in model.model.visual.parameters())


def test_the_paper_s_run_by_hand(shared_data):
    """7B: 7.616 billion weights in the language model, 0.677 in the tower; on 8 GPUs of 80 GB 15.2 GB of
    weights and AdamW, 1.35 GB of tower, 1.6 GB of checkpoints at 8,192 tokens, 1.8 GB of one layer's
    recomputation."""
    config = AutoConfig.from_pretrained(shared_data / "qwen2_5_vl")
    counts = count_parameters(config)
    assert counts["layers"] + counts["root"] == pytest.approx(7.616e9,
                                                              rel=1e-3) and counts["tower"] == pytest.approx(
        0.677e9, rel=2e-3)
    parts = estimate_memory(config, 8192, 1800, 8, sharded=True, recompute="layers")
    assert parts["weights, gradients, optimizer"] == pytest.approx(15.2e9, rel=0.01)
    assert parts["vision tower"] == pytest.approx(1.35e9, rel=0.01)
    assert parts["activations"] == pytest.approx(3.4e9, rel=0.05)
    assert parts["total"] == pytest.approx(sum(size for name, size in parts.items() if name != "total"))
    assert 28e9 < parts["total"] < 40e9
    assert memory_lines(parts, 80 * 2**30, SMALLER)[0].endswith(": fits")
    one = estimate_memory(config, 8192, 1800, 1, sharded=True, recompute="layers")
    assert memory_lines(one, 80 * 2**30,
                        SMALLER)[0].endswith(
                            "DOES NOT FIT; take more devices, a smaller model, or --lora_rank 64")
    whole = estimate_memory(config, 8192, 1800, 8, sharded=True, recompute="none")
    assert memory_lines(whole, 80e9, SMALLER)[0].endswith(f"DOES NOT FIT; take {SMALLER}")
    halfway = estimate_memory(config, 8192, 1800, 8, sharded=True, recompute="mlps")
    # 28 layers of 8 x 3584 + 4 x 512 numbers a token, and the 4 x 18944 of one MLP: it fits into 80 GB, as
    # all kept do not
    assert halfway["activations"] == pytest.approx(8192 * 2 * (28 * 30720 + 75776)) == pytest.approx(15.3e9,
                                                                                                     rel=0.01)
    assert memory_lines(halfway, 80e9, SMALLER)[0].endswith(": fits")
    adapted = estimate_memory(config, 8192, 1800, 8, sharded=True, recompute="layers", lora_rank=64)
    assert adapted["weights, gradients, optimizer"] < 0.4 * parts["weights, gradients, optimizer"]


def test_hours_of_known_devices():
    """8 A800 at 40 % of 312 TFLOP/s do 1e18 operations in 1,002 seconds."""
    assert estimate_hours(3.6e18)["A800"] == pytest.approx(3605 / 3600, abs=0.01)
    assert estimate_hours(3.6e18)["H200"] == pytest.approx(2.53 / 8, abs=0.01)


def test_lengths_and_their_picture(examples, tmp_path):
    lengths = sorted(example.n_tokens for example in examples)
    stats = describe_lengths(examples)
    assert stats["median"] == lengths[5] and stats["max"] == lengths[-1] == stats["p95"] and stats[
        "tokens"] == sum(lengths)
    assert stats["images"] == 9
    draw_lengths(examples, 8192, str(tmp_path / "lengths.png"))
    assert Image.open(tmp_path / "lengths.png").size == (1050, 480)


def test_every_image_is_opened_whole(examples, data):
    assert check_files(examples) == []
    path = data.parent / "1_0.png"
    path.write_bytes(path.read_bytes()[:-40])  # its header is whole
    (fault,) = check_files(examples)
    assert "1_0.png: not a whole picture" in fault


def test_memory_of_this_machine():
    assert device_memory(torch.device("cpu")) > 2**30
