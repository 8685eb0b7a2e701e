"""The layout of what training writes: that of its base, for bases as transformers 4 and 5 write them."""
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from training import flags

import train_sft
from utils import qwen as Q
from utils.jsonl import DataError, load_object, write_json
from utils.latent_families import PRESETS
from utils.train.weights import file_dtype

NAMES = PRESETS["mirage"].tokens
# what training changes in the base's files, if the base has it
CHANGED = {"config.json": {"vocab_size", "torch_dtype", "dtype"},
           "tokenizer_config.json": {"added_tokens_decoder"}, "tokenizer.json": {"added_tokens"},
           "added_tokens.json": set(NAMES)}


def edit(path, change):
    write_json(path, change(load_object(path)))


def written_by_5(folder):
    """Have the library write every file again."""
    qwen = Q.load(str(folder), device="cpu")
    for path in folder.iterdir():
        path.unlink()
    for part in (qwen.model, qwen.tokenizer, qwen.image_processor):
        part.save_pretrained(folder)


def one_processor_file(folder):
    """What AutoProcessor of transformers 5 writes in place of preprocessor_config.json."""
    written_by_5(folder)
    path = folder / "preprocessor_config.json"
    write_json(folder / "processor_config.json", {"image_processor": load_object(path),
                                                  "processor_class": "Qwen2_5_VLProcessor"})
    path.unlink()


def with_all_tokenizer_files(folder):
    """As fast tokenizers of transformers 4 write it: tokenizer.json beside the old files."""
    tokenizer = Q.load_tools(str(folder)).tokenizer
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "added_tokens.json", {token: i for i, token in enumerate(
        map(str, tokenizer.added_tokens_decoder.values()), min(tokenizer.added_tokens_decoder))})
    write_json(folder / "special_tokens_map.json", {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"})
    text = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    write_json(folder / "chat_template.json", {"chat_template": text})
    (folder / "chat_template.jinja").unlink()


def without_spare_rows(folder):
    """Cut the rows that nothing uses, and the generation config."""
    n_tokens = len(Q.load_tools(str(folder)).tokenizer)
    tensors = load_file(folder / "model.safetensors")
    cut = {name: tensor[:n_tokens].clone() if tensor.ndim == 2 and len(tensor) > n_tokens else tensor
           for name, tensor in tensors.items()}
    save_file(cut, folder / "model.safetensors", {"format": "pt"})
    edit(folder / "config.json", lambda config: config | {"vocab_size": n_tokens})
    (folder / "generation_config.json").unlink()


def bfloat16_that_says(**said):
    """Return a change to weights of bfloat16 whose config says another type or none."""
    def change(folder):
        tensors = load_file(folder / "model.safetensors")
        save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, folder / "model.safetensors",
                  {"format": "pt"})
        edit(folder / "config.json", lambda config: {key: value for key, value in config.items()
                                                     if "dtype" not in key} | said)
    return change


LAYOUTS = {"released": lambda folder: None, "written by 5": written_by_5,
           "one processor file": one_processor_file, "all tokenizer files": with_all_tokenizer_files,
           "no spare rows": without_spare_rows, "silent bfloat16": bfloat16_that_says(),
           "false bfloat16": bfloat16_that_says(torch_dtype="float32")}


def without(value, names):
    """Return a JSON value without these keys at any depth."""
    if isinstance(value, dict):
        return {key: without(one, names) for key, one in value.items() if key not in names}
    return value


@pytest.mark.parametrize("base, layout", [*(("tiny_checkpoint", name) for name in LAYOUTS),
                                          ("tiny_qwen3", "released"), ("tiny_qwen3", "all tokenizer files")])
@pytest.mark.parametrize("imagination", ["text", "latent"])
def test_the_export_is_laid_out_as_its_base(request, data, tmp_path, base, layout, imagination):
    folder, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(request.getfixturevalue(base), folder)
    LAYOUTS[layout](folder)
    before = Q.load_tools(str(folder))
    more = ["--imagination", imagination, "--max_steps", "1", "--warmup_steps", "0"]
    assert train_sft.main(flags(data, folder, out, *more)) == 0
    assert {path.name for path in out.iterdir()} == {path.name for path in folder.iterdir()}
    for path in folder.iterdir():
        if path.name in CHANGED and (imagination == "latent" or "false" in layout):
            now, then = (without(load_object(one), CHANGED[path.name]) for one in (out / path.name, path))
            assert now == then, path.name
        elif path.suffix != ".safetensors":
            assert (out / path.name).read_bytes() == path.read_bytes(), path.name
    old, new = load_file(folder / "model.safetensors"), load_file(out / "model.safetensors")
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in old.values()}
    assert dtypes == {"bfloat16" if "bfloat16" in layout else "float32"}
    assert old.keys() == new.keys() and {t.dtype for t in new.values()} == {t.dtype for t in old.values()}
    config = load_object(out / "config.json")
    said = {part[key] for part in (config, *config.values()) if isinstance(part, dict)
            for key in ("dtype", "torch_dtype") if key in part}
    assert said <= dtypes
    after = Q.load(str(out), device="cpu")
    assert after.eos_ids == before.eos_ids and after.model.lm_head.out_features == len(new["lm_head.weight"])
    known = len(before.tokenizer)
    assert len(after.tokenizer) == known + (len(NAMES) if imagination == "latent" else 0)
    text = "".join(NAMES) + " a red circle<|im_end|>"
    assert before.tokenizer("a red circle").input_ids == after.tokenizer("a red circle").input_ids
    if imagination == "latent":
        ids = after.tokenizer(text).input_ids
        assert ids[:3] == [known, known + 1, known + 2]
        assert after.tokenizer.decode(ids, skip_special_tokens=True) == " a red circle"
    for path in (out, folder):  # both files name the same tokens, if there are two
        if (path / "tokenizer.json").exists() and (path / "added_tokens.json").exists():
            listed = {token["content"]: token["id"]
                      for token in load_object(path / "tokenizer.json")["added_tokens"]}
            assert listed == load_object(path / "added_tokens.json")


def test_a_base_of_another_kind_of_numbers_is_refused(tmp_path):
    save_file({"a": torch.zeros(2, dtype=torch.int8)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(DataError, match="hold I8, expected one of F32, F16, BF16"):
        file_dtype(tmp_path)
    save_file({"a": torch.zeros(2, dtype=torch.float32), "b": torch.zeros(3, dtype=torch.float16)},
              tmp_path / "model.safetensors", {"format": "pt"})
    assert file_dtype(tmp_path) == torch.float16  # that of most numbers


def test_the_release_s_own_files(released_files, data, tmp_path):
    """Its vocabulary, config and settings, at a small size; a trained token is its tokenizer's first free."""
    out = tmp_path / "out"
    more = ["--imagination", "latent", "--max_steps", "1"]
    assert train_sft.main(flags(data, released_files, out, *more)) == 0
    for path in released_files.iterdir():
        name = path.name
        if path.suffix == ".safetensors":
            continue
        if name == "tokenizer_config.json":
            now, then = load_object(out / name), load_object(path)
            added = now.pop("added_tokens_decoder")
            assert added.items() > then.pop("added_tokens_decoder").items() and now == then
            assert {i: token["content"] for i, token in list(added.items())[-3:]} == dict(
                zip(("151665", "151666", "151667"), NAMES))
        else:
            assert load_object(out / name) == load_object(path) if name == "config.json" else (
                (out / name).read_bytes() == path.read_bytes())
