"""Checkpoints: written in the background, read by other numbers of ranks, damaged ones skipped."""
import json
import os
import threading
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from utils.jsonl import DataError
from utils.train import checkpoints
from utils.train.checkpoints import (Best, Run, Saver, enter_run_folder, keep_lines, newest_checkpoint,
                                     numbered_folders, prune, publish, rank_file, read_shard, restore,
                                     snapshot)


def trained_model():
    """A small model with one frozen weight, and AdamW after two steps."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    model[0].bias.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        model(torch.randn(5, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def write(folder, step, world=1):
    model, optimizer = trained_model()
    for rank in range(world):  # rank 0 waits for the others, so that it comes last here
        saver = Saver(world - 1 - rank, world)
        saver.submit(saver.checkpoint, folder / f"step-{step}", snapshot(model, optimizer, 0),
                     {"step": step}, lambda: None)
        saver.close()


def test_what_is_written_is_read_and_frozen_weights_are_not_written(tmp_path):
    model, optimizer = trained_model()
    write(tmp_path, 2)
    keys = load_file(tmp_path / "step-2" / rank_file(0, 1)).keys()
    assert {key.split("/")[0] for key in keys} == {"model", "step", "exp_avg", "exp_avg_sq"}
    assert "model/0.bias" not in keys and "model/0.weight" in keys
    again, new_optimizer = trained_model()
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
        again[0].bias.copy_(model[0].bias)
    restore(tmp_path / "step-2", again, new_optimizer)
    for _ in range(2):
        for net, adam in ((model, optimizer), (again, new_optimizer)):
            net(torch.ones(1, 3)).sum().backward()
            adam.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    other = torch.nn.Linear(3, 4, bias=False)
    with pytest.raises(DataError, match=r"holds no weight \(and 0 more\); expected those of this model"):
        restore(tmp_path / "step-2", other, torch.optim.AdamW(other.parameters()))


def test_shards_of_ranks_are_one_tensor_again(tmp_path):
    whole = torch.randn(7, 2)
    for rank, rows in enumerate(whole.split([3, 3, 1])):
        save_file({"model/w": rows.contiguous(), **({"step/w": torch.tensor(4.0)} if rank == 0 else {})},
                  tmp_path / rank_file(rank, 3))
    files = [safe_open(tmp_path / rank_file(rank, 3), "pt") for rank in range(3)]
    assert torch.equal(read_shard(files, "model/w", torch.zeros(7, 2)), whole)
    assert float(read_shard(files, "step/w", torch.zeros(7, 2))) == 4.0
    with pytest.raises(DataError, match="7 rows in the checkpoint, 9 in the model"):
        read_shard(files, "model/w", torch.zeros(9, 2))


def test_an_error_does_not_throw_away_what_is_queued(tmp_path):
    model, optimizer = trained_model()

    def submit(rank, world, step):
        saver = Saver(rank, world)
        saver.submit(time.sleep, 0.2)  # as an export does, which takes minutes
        saver.submit(saver.checkpoint, tmp_path / f"step-{step}", snapshot(model, optimizer, rank),
                     {"step": step}, lambda: None)
        return saver

    submit(0, 1, 4).abandon()
    assert newest_checkpoint(tmp_path) == (tmp_path / "step-4", {"step": 4})
    first, second = submit(0, 2, 6), submit(1, 2, 6)  # the error is one of both ranks
    first.abandon(), second.abandon()
    assert newest_checkpoint(tmp_path) == (tmp_path / "step-6", {"step": 6})


def test_a_checkpoint_of_several_ranks_appears_when_the_last_part_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "GRACE", 0.2)
    model, optimizer = trained_model()
    first, done = Saver(0, 2), threading.Event()
    first.submit(first.checkpoint, tmp_path / "step-2", snapshot(model, optimizer, 0), {"step": 2}, done.set)
    assert not done.wait(0.3) and (tmp_path / "step-2.part").is_dir() and not (tmp_path / "step-2").exists()
    second = Saver(1, 2)
    second.submit(second.checkpoint, tmp_path / "step-2", snapshot(model, optimizer, 1), {}, lambda: None)
    second.close(), first.close()
    assert done.is_set() and newest_checkpoint(tmp_path)[1] == {"step": 2}
    alone = Saver(0, 2)
    alone.submit(alone.checkpoint, tmp_path / "step-3", {}, {"step": 3}, done.set)
    alone.abandon()  # the other rank died: this one does not wait for it
    assert newest_checkpoint(tmp_path)[0].name == "step-2"


@pytest.mark.parametrize("name, damage", [
    (rank_file(0, 1), lambda path: path.write_bytes(path.read_bytes()[:-3])), (rank_file(0, 1), Path.unlink),
    ("state.json", lambda path: path.write_text('{"step": 4')), ("state.json", Path.unlink),
    (rank_file(0, 1), lambda path: path.rename(path.with_name(rank_file(0, 2))))])
def test_the_last_complete_one_is_found(tmp_path, name, damage, capsys):
    for step in (2, 10):
        write(tmp_path, step)
    (tmp_path / "step-11.part").mkdir()
    assert newest_checkpoint(tmp_path)[0].name == "step-10"  # by number, not by name
    damage(tmp_path / "step-10" / name)
    assert newest_checkpoint(tmp_path) == (tmp_path / "step-2", {"step": 2})
    assert "step-10 is skipped, because it is damaged" in capsys.readouterr().err
    assert newest_checkpoint(tmp_path / "none") is None


def test_an_error_of_the_disk_reaches_the_training(tmp_path):
    (tmp_path / "step-1.part").write_text("a file where the folder should be")
    saver = Saver(0, 1)
    saver.submit(saver.checkpoint, tmp_path / "step-1", {}, {}, lambda: None)
    with pytest.raises(DataError, match="could not be written: .*step-1.part.*last complete one is kept"):
        saver.close()


def test_the_best_is_kept_and_the_rest_removed_after_the_checkpoint(tmp_path):
    run, entered = Run(), []
    assert Run.from_state(json.loads(json.dumps(asdict(run))), "state.json") == run
    for run.step, loss in {1: 0.5, 2: 0.3, 3: 0.9, 4: 0.3}.items():
        entered.append(run.is_best(loss))
        publish(tmp_path / f"best-{run.step}", os.mkdir)
        write(tmp_path, run.step)
    assert entered == [True, True, False, False] and run.best == Best(0.3, 2)
    assert Run.from_state(json.loads(json.dumps(asdict(run))), "state.json") == run
    with pytest.raises(DataError, match="step-4: written by another version .*move the .run folder away"):
        Run.from_state({"step": 4, "best": [[0.3, 2]], "recent": []}, "step-4")
    prune(tmp_path, 1, run.best.step)
    assert list(numbered_folders(tmp_path, "best")) == [2]
    assert list(numbered_folders(tmp_path, "step")) == [4]


def test_a_run_is_resumed_with_its_own_settings_only(tmp_path):
    settings = {"learning_rate": 1e-5}
    assert enter_run_folder(tmp_path / "o.run", settings, True) is None
    write(tmp_path / "o.run", 3)
    (tmp_path / "o.run" / "step-4.part").mkdir()
    assert enter_run_folder(tmp_path / "o.run", settings, True)[1] == {"step": 3}
    assert not (tmp_path / "o.run" / "step-4.part").exists()
    assert enter_run_folder(tmp_path / "o.run", settings, False)[0].name == "step-3"
    with pytest.raises(DataError, match=r"(?s)begun with other settings.*learning_rate +1e-05 +0.5"):
        enter_run_folder(tmp_path / "o.run", {"learning_rate": 0.5}, True)


def test_the_log_is_cut_back_to_the_step_resumed_from(tmp_path):
    path = tmp_path / "log.jsonl"
    keep_lines(path, 0)
    path.write_text("".join(json.dumps({"step": n}) + "\n" for n in (1, 2, 3)))
    keep_lines(path, 2)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]
