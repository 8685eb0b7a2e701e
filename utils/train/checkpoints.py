"""Checkpoints to resume from: weights, optimizer and place of a run, written beside the training and renamed
when whole.

A checkpoint is a folder step-N with one safetensors file a rank, its own pieces of every trained weight and
of the optimizer's state, and state.json. No pickle. It may be read by another number of ranks than wrote it.
"""
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from utils.cli import log
from utils.jsonl import DataError, disk_errors, load_object, replace_file, write_json

STATE = "state.json"
POLL = 0.05  # seconds between looks at the other ranks' files


@dataclass
class Run:
    """The place of a run, which a checkpoint holds beside weights and optimizer; `best` are (score..., step),
    best first."""

    step: int = 0
    best: list[list[float]] = field(default_factory=list)
    recent: list[float] = field(default_factory=list)

    def is_among_best(self, score: list[float], keep: int) -> bool:
        """Enter the present step's score, where less is better; return whether it is one of the best `keep`.
        """
        self.best = sorted([*self.best, [*score, self.step]])[:keep]
        return self.best_steps.count(self.step) == 1

    @property
    def best_steps(self) -> list[int]:
        return [int(entry[-1]) for entry in self.best]


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold the folder of a run, made if need be, against a second process: DataError if another has it.

    The lock is one that forks do not inherit: workers outlive a killed run by seconds, and would keep the
    next one out.
    """
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / "lock", "w")
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise DataError(
                f"{folder}: another process trains here; wait for it, or give another --output") from error
        yield


def open_run(folder: Path, settings: dict, resume: str, is_first: bool) -> tuple[Path, dict] | None:
    """Make or re-enter the folder of a run; return the last whole checkpoint. For the first rank, before the
    others.

    `resume` "auto" takes what is there, "must" wants a checkpoint, "never" wants none. DataError against it,
    or if the run began with other settings.
    """
    path = folder / "settings.json"
    if is_first:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob("*.part"):
            shutil.rmtree(stale)
    found = newest_checkpoint(folder)
    if found and resume == "never":
        raise DataError(
            f"{found[0]}: there is a run to resume, against --resume never; move {folder} away, or name another "
                        "--output")
    if not found and resume == "must":
        raise DataError(f"{folder}: no whole checkpoint, against --resume must; expected step-N in it")
    if path.exists():
        theirs = load_object(path, f"move {folder} away to start afresh")
        differing = [f"--{name}: {theirs.get(name)} then, {settings.get(name)} now"
                     for name in sorted({*settings, *theirs})
                     if settings.get(name) != theirs.get(name)]
        if differing:
            raise DataError(f"{path}: the run to resume had other settings: {'; '.join(differing)}; "
                            "give the old ones, or move the .run folder away to start afresh")
    elif is_first:
        write_json(path, settings)
    return found


def keep_lines(path: Path, n_lines: int) -> None:
    """Cut a log back to the step resumed from, so that no step stands in it twice."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)[:n_lines] if path.exists() else []
    # a kill in between must not take the curve with it
    replace_file(path, lambda file: file.writelines(lines))


def trained(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def piece(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy of this rank's piece of a tensor on the CPU."""
    tensor = tensor.detach()
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).to("cpu", copy=True).contiguous()


def take(model: torch.nn.Module, optimizer: torch.optim.Optimizer, rank: int) -> dict[str, torch.Tensor]:
    """Return copies of this rank's pieces of all that training changes; what all ranks hold alike is the
    first one's."""
    taken = {}
    for name, parameter in trained(model).items():
        for key, tensor in {"model": parameter, **optimizer.state.get(parameter, {})}.items():
            if rank == 0 or isinstance(tensor, DTensor):
                taken[f"{key}/{name}"] = piece(tensor)
    return taken


def rank_file(rank: int, world: int) -> str:
    return f"rank-{rank}-of-{world}.safetensors"


class Saver:
    """Writes in the background, one thing after the other; an error of writing is raised by the next call."""

    def __init__(self, rank: int, world: int):
        self.rank, self.world, self.stop = rank, world, Event()
        self.thread, self.pending = ThreadPoolExecutor(1), []

    def submit(self, write: Callable[[], None]) -> Future:
        self.check()
        self.pending.append(self.thread.submit(write))
        return self.pending[-1]

    def check(self) -> None:
        """Raise DataError if something could not be written."""
        for future in [future for future in self.pending if future.done()]:
            self.pending.remove(future)
            self.result(future)

    def result(self, future: Future) -> None:
        try:
            future.result()
        except (OSError, SafetensorError) as error:
            raise DataError(
                f"a checkpoint could not be written: {error}; the last whole one is kept, the same command goes on "
                            "from it") from error

    def checkpoint(self, folder: Path, tensors: dict[str, torch.Tensor], state: dict,
                   after: Callable[[], None]) -> None:
        """Write this rank's part of checkpoint `folder`; the first rank renames it once all parts are there.
        """
        self.submit(lambda: self.write(folder, tensors, state, after))

    def write(self, folder: Path, tensors: dict[str, torch.Tensor], state: dict,
              after: Callable[[], None]) -> None:
        part = folder.with_name(folder.name + ".part")
        part.mkdir(exist_ok=True)
        mine = part / rank_file(self.rank, self.world)
        save_file(tensors, f"{mine}.part")
        os.replace(f"{mine}.part", mine)
        if self.rank == 0:
            while not all((part / rank_file(rank, self.world)).exists() for rank in range(self.world)):
                if self.stop.wait(POLL):
                    return  # a rank died: this one stays a part
            (part / STATE).write_text(json.dumps(state), encoding="utf-8")
            os.replace(part, folder)
            after()

    def close(self) -> None:
        """Wait for all that is being written."""
        for future in self.pending:
            self.result(future)
        self.pending = []
        self.thread.shutdown()

    def abandon(self) -> None:
        """After an error: let what can be finished be finished, and wait for no other rank."""
        self.stop.set()
        self.thread.shutdown(cancel_futures=True)


def publish(folder: Path, write: Callable[[str], None]) -> None:
    """Let `write(temporary folder)` fill a folder beside, then move it into place: a folder that exists is
    whole."""
    part = folder.with_name(folder.name + ".part")
    for stale in (part, folder):
        shutil.rmtree(stale, ignore_errors=True)
    write(str(part))
    os.replace(part, folder)


def steps_of(run: Path, prefix: str) -> dict[int, Path]:
    """Return the whole folders of a run named prefix-N by N, in order."""
    found = {path.name.removeprefix(f"{prefix}-"): path for path in run.glob(f"{prefix}-*")}
    return {int(step): found[step] for step in sorted(filter(str.isdigit, found), key=int)}


def prune(run: Path, keep: int, best: set[int]) -> None:
    """Remove all but the last `keep` checkpoints, and the exports that are no longer among the best."""
    for path in list(steps_of(run, "step").values())[:-keep]:
        shutil.rmtree(path)
    for step, path in steps_of(run, "best").items():
        if step not in best:
            shutil.rmtree(path)


def newest_checkpoint(run: Path) -> tuple[Path, dict] | None:
    """Return (folder, state) of the last checkpoint whose files are whole, None if there is none."""
    for path in reversed(steps_of(run, "step").values()):
        try:
            state = json.loads((path / STATE).read_text(encoding="utf-8"))
            for file in rank_files(path):
                with safe_open(file, "pt"):
                    pass  # reads the header and compares it with the file's length
            return path, state
        except (OSError, ValueError, SafetensorError, DataError) as error:
            log(f"{path} is left out, as it is damaged: {error}")
    return None


def rank_files(folder: Path) -> list[Path]:
    """Return the files of all ranks in order; DataError if one is missing."""
    files = sorted(folder.glob("rank-*-of-*.safetensors"), key=lambda path: int(path.name.split("-")[1]))
    if not files or [path.name for path in files] != [rank_file(rank, len(files))
                                                      for rank in range(len(files))]:
        raise DataError(f"{folder}: has {[path.name for path in files]}, expected one file of every rank")
    return files


def restore(folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put a checkpoint's weights and optimizer state into a model and an optimizer that were made as for a
    new run."""
    opened = [safe_open(path, "pt") for path in rank_files(folder)]
    parameters, there = trained(model), {key for file in opened for key in file.keys()}
    if missing := [name for name in parameters if f"model/{name}" not in there]:
        raise DataError(
            f"{folder}: holds no {missing[0]} (and {len(missing) - 1} more); was it written by another model?")
    by_parameter = {}
    for name, parameter in parameters.items():
        with torch.no_grad():
            parameter.copy_(read_piece(opened, f"model/{name}", parameter))
        keys = [key.split("/")[0] for key in there if key.endswith(f"/{name}")
                and not key.startswith("model/")]
        by_parameter[parameter] = {key: read_piece(opened, f"{key}/{name}", parameter) for key in keys}
    groups = optimizer.state_dict()["param_groups"]
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {n: by_parameter[parameter] for n, parameter in enumerate(order) if by_parameter[parameter]}
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def read_piece(files: list, key: str, like: torch.Tensor) -> torch.Tensor:
    """Return this rank's piece of a tensor that stands in files one behind the other along its first
    dimension."""
    slices = [file.get_slice(key) for file in files if key in file.keys()]
    if not slices[0].get_shape():  # a number, such as AdamW's count of steps
        return files[0].get_tensor(key)
    local = like.to_local() if isinstance(like, DTensor) else like
    start = -(-like.shape[0] // dist.get_world_size()) * dist.get_rank() if isinstance(like, DTensor) else 0
    parts, offset = [], 0
    for part in slices:
        n_rows = part.get_shape()[0]
        low, high = max(start, offset), min(start + local.shape[0], offset + n_rows)
        if low < high:
            parts.append(part[low - offset:high - offset])
        offset += n_rows
    if offset != like.shape[0]:
        raise DataError(f"{key}: {offset} rows in the checkpoint, {like.shape[0]} in the model")
    whole = torch.cat(parts) if parts else local  # no row of it is this rank's
    if not isinstance(like, DTensor):
        return whole.to(like.device)
    return DTensor.from_local(whole.to(local.device), like.device_mesh, like.placements, shape=like.shape,
                              stride=like.stride())
