"""Checkpoints: written aside, read by other numbers of ranks, damage left out.    pytest
tests/test_checkpoints.py

Kills while one is written, and resuming to the bit: tests/test_train_sft.py, tests/test_sharding.py.
"""
import json
import threading

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from utils.jsonl import DataError
from utils.train.checkpoints import (Run, Saver, keep_lines, newest_checkpoint, open_run, prune, publish,
                                     rank_file, read_piece, restore, steps_of, take)


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


def write(folder, step, world=1, **state):
    model, optimizer = trained_model()
    for rank in range(world):  # rank 0 waits for the others, so that it comes last here
        saver = Saver(world - 1 - rank, world)
        saver.checkpoint(folder / f"step-{step}", take(model, optimizer, 0), {"step": step, **state},
                         after=lambda: None)
        saver.close()


def test_what_is_written_is_read_and_frozen_weights_are_not_written(tmp_path):
    model, optimizer = trained_model()
    write(tmp_path, 2)
    with safe_open(tmp_path / "step-2" / rank_file(0, 1), "pt") as file:
        assert {key.split("/")[0] for key in file.keys()} == {"model", "step", "exp_avg", "exp_avg_sq"}
        assert "model/0.bias" not in file.keys() and "model/0.weight" in file.keys()
    again, other = trained_model()
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
        again[0].bias.copy_(model[0].bias)
    restore(tmp_path / "step-2", again, other)
    for _ in range(2):
        for its, its_optimizer in ((model, optimizer), (again, other)):
            its(torch.ones(1, 3)).sum().backward()
            its_optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))


def test_pieces_of_ranks_are_one_tensor_again(tmp_path):
    whole = torch.randn(7, 2)
    for rank, rows in enumerate(whole.split([3, 3, 1])):
        save_file({"model/w": rows.contiguous(), **({"step/w": torch.tensor(4.0)} if rank == 0 else {})},
                  tmp_path / rank_file(rank, 3))
    files = [safe_open(tmp_path / rank_file(rank, 3), "pt") for rank in range(3)]
    assert torch.equal(read_piece(files, "model/w", torch.zeros(7, 2)), whole)
    assert float(read_piece(files, "step/w", torch.zeros(7, 2))) == 4.0
    with pytest.raises(DataError, match="7 rows in the checkpoint, 9 in the model"):
        read_piece(files, "model/w", torch.zeros(9, 2))


def test_a_checkpoint_of_several_ranks_appears_when_the_last_part_is_there(tmp_path):
    model, optimizer = trained_model()
    first, done = Saver(0, 2), threading.Event()
    first.checkpoint(tmp_path / "step-2", take(model, optimizer, 0), {"step": 2}, after=done.set)
    assert not done.wait(0.3) and (tmp_path / "step-2.part").is_dir() and not (tmp_path / "step-2").exists()
    second = Saver(1, 2)
    second.checkpoint(tmp_path / "step-2", take(model, optimizer, 1), {}, after=lambda: None)
    second.close(), first.close()
    assert done.is_set() and newest_checkpoint(tmp_path)[1] == {"step": 2}
    alone = Saver(0, 2)
    alone.checkpoint(tmp_path / "step-3", {}, {"step": 3}, after=done.set)
    alone.abandon()  # the other rank died: nobody waits for it for ever
    assert newest_checkpoint(tmp_path)[0].name == "step-2"


@pytest.mark.parametrize("damage", [
    lambda folder: (folder / rank_file(0, 1)).write_bytes((folder / rank_file(0, 1)).read_bytes()[:-3]),
    lambda folder: (folder / rank_file(0, 1)).unlink(),
    lambda folder: (folder / "state.json").write_text('{"step": 4'),
    lambda folder: (folder / "state.json").unlink(),
    lambda folder: (folder / rank_file(0, 1)).rename(folder / rank_file(0, 2))])
def test_the_last_whole_one_is_found(tmp_path, damage, capsys):
    for step in (2, 10):
        write(tmp_path, step)
    (tmp_path / "step-11.part").mkdir()
    assert newest_checkpoint(tmp_path)[0].name == "step-10"  # by number, not by name
    damage(tmp_path / "step-10")
    assert newest_checkpoint(tmp_path) == (tmp_path / "step-2", {"step": 2})
    assert "step-10 is left out, as it is damaged" in capsys.readouterr().err
    assert newest_checkpoint(tmp_path / "none") is None


def test_an_error_of_the_disk_reaches_the_training(tmp_path):
    (tmp_path / "step-1.part").write_text("a file where the folder should be")
    saver = Saver(0, 1)
    saver.checkpoint(tmp_path / "step-1", {}, {}, after=lambda: None)
    with pytest.raises(DataError,
                       match="a checkpoint could not be written: .*step-1.part.*the last whole one is kept"):
        saver.close()


def test_another_model_is_refused(tmp_path):
    write(tmp_path, 1)
    with pytest.raises(DataError, match=r"holds no weight \(and 0 more\); was it written by another model"):
        model = torch.nn.Linear(3, 4, bias=False)
        restore(tmp_path / "step-1", model, torch.optim.AdamW(model.parameters()))


def test_the_best_are_kept_by_score_and_the_rest_removed_after_the_checkpoint(tmp_path):
    run, scores = Run(), {1: 0.5, 2: 0.3, 3: 0.9, 4: 0.4}
    entered = []
    for run.step, score in scores.items():
        entered.append(run.is_among_best([0.0, score], 2))
        publish(tmp_path / f"best-{run.step}", lambda to: write_folder(to))
        write(tmp_path, run.step)
    assert entered == [True, True, False, True] and run.best_steps == [2, 4] and run.best[0] == [0.0, 0.3, 2]
    prune(tmp_path, 1, set(run.best_steps))
    assert list(steps_of(tmp_path, "best")) == [2, 4] and list(steps_of(tmp_path, "step")) == [4]


def write_folder(to):
    import os
    os.mkdir(to)


def test_resume_takes_must_have_and_must_not_have(tmp_path):
    settings = {"learning_rate": 1e-5}
    with pytest.raises(DataError, match="no whole checkpoint, against --resume must"):
        open_run(tmp_path / "o.run", settings, "must", True)
    assert open_run(tmp_path / "o.run", settings, "never", True) is None
    write(tmp_path / "o.run", 3)
    (tmp_path / "o.run" / "step-4.part").mkdir()
    assert open_run(tmp_path / "o.run", settings, "auto", True)[1] == {"step": 3}
    assert not (tmp_path / "o.run" / "step-4.part").exists()
    assert open_run(tmp_path / "o.run", settings, "must", False)[0].name == "step-3"
    with pytest.raises(DataError, match="there is a run to resume, against --resume never; move"):
        open_run(tmp_path / "o.run", settings, "never", True)
    with pytest.raises(DataError, match="--learning_rate: 1e-05 then, 0.5 now"):
        open_run(tmp_path / "o.run", {"learning_rate": 0.5}, "auto", True)


def test_the_log_is_cut_back_to_the_step_resumed_from(tmp_path):
    path = tmp_path / "log.jsonl"
    keep_lines(path, 0)
    path.write_text("".join(json.dumps({"step": n}) + "\n" for n in (1, 2, 3)))
    keep_lines(path, 2)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]
