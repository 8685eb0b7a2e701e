"""Checkpoints to resume from, written in the background and renamed when complete.

A folder step-N holds state.json and one safetensors file per rank: its shards of trained weights and of the
optimizer's state. Another number of ranks may read it.
"""
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from utils.cli import log
from utils.journal import keep_settings
from utils.jsonl import DataError, disk_errors, replace_file, sha256_file

SETTINGS, STATE = "settings.json", "state.json"
POLL = 0.05  # seconds between looks at the other ranks' files
GRACE = 5.0  # seconds


@dataclass
class Best:
    loss: float
    step: int


@dataclass
class Run:
    """The progress of a run: steps done, the export with the lowest held-out loss, the last losses."""

    step: int = 0
    best: Best | None = None
    recent: list[float] = field(default_factory=list)

    def is_best(self, loss: float) -> bool:
        """Enter the current step's held-out loss; return whether it is the lowest so far."""
        if self.best is None or loss < self.best.loss:
            self.best = Best(loss, self.step)
        return self.best.step == self.step

    @classmethod
    def from_state(cls, state: dict, where: object) -> "Run":
        try:
            return cls(state["step"], state["best"] and Best(**state["best"]), state["recent"])
        except (KeyError, TypeError) as error:
            raise DataError(f"{where}: written by another version ({type(error).__name__}: {error}); move "
                            "the .run folder away") from error


@contextmanager
def lock_run_folder(folder: Path) -> Iterator[None]:
    """Make and lock the folder of a run; DataError if another process holds it. Forks do not inherit this
    lock: workers outlive a killed run by seconds."""
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / "lock", "w")
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise DataError(f"{folder}: another process trains here; give another --output") from error
        yield


def enter_run_folder(folder: Path, settings: dict, is_first: bool) -> tuple[Path, dict] | None:
    """Make or re-enter the folder of a run, first on rank 0, which checks for all; return (folder, state) of
    the last complete checkpoint. DataError if the run began with other settings."""
    if is_first:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob("*.part"):
            shutil.rmtree(stale)
        keep_settings(folder / SETTINGS, settings)
    return newest_checkpoint(folder)


def identify(files: dict[str, Path], before: dict) -> dict[str, str]:
    """Return "name SHA-256 size times" of each file, or its entry in `before` if the content is the same.

    All bytes are hashed once. Later a file with the same size and times is not read again; the second time is
    the inode's, which copying and `touch` renew.
    """
    def entry(name: str) -> str:
        path, old = files[name], str(before.get(name)).rsplit(" ", 4)
        stat = path.stat()
        now = [str(number) for number in (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)]
        if old[2:] == now or (digest := sha256_file(path)) == "".join(old[1:2]):
            return before[name]
        return " ".join([path.name[-20:], digest, *now])

    with ThreadPoolExecutor() as threads:
        return dict(zip(files, [*tqdm(threads.map(entry, files), "inputs", len(files), unit="file")]))


def keep_lines(path: Path, n_lines: int) -> None:
    """Cut a log back to the step resumed from."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)[:n_lines] if path.exists() else []
    replace_file(path, lambda file: file.writelines(lines))  # by rename: a kill does not lose the curve


# ---- writing
def trained_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def snapshot(model: torch.nn.Module, optimizer: torch.optim.Optimizer, rank: int) -> dict[str, torch.Tensor]:
    """Return CPU copies of this rank's trained shards; rank 0 also has what is not sharded."""
    copies = {}
    for name, parameter in trained_parameters(model).items():
        for key, tensor in {"model": parameter, **optimizer.state.get(parameter, {})}.items():
            is_sharded = isinstance(tensor, DTensor)
            if rank == 0 or is_sharded:
                local = tensor.detach().to_local() if is_sharded else tensor.detach()
                copies[f"{key}/{name}"] = local.to("cpu", copy=True).contiguous()
    return copies


def rank_file(rank: int, world: int) -> str:
    return f"rank-{rank}-of-{world}.safetensors"


class Saver:
    """Writes in the background, in order; the next call raises the error of a write that failed."""

    def __init__(self, rank: int, world: int):
        self.rank, self.world, self.stop = rank, world, Event()
        self.thread, self.pending = ThreadPoolExecutor(1), []

    def submit(self, write: Callable, *arguments) -> None:
        self.check()
        self.pending.append(self.thread.submit(write, *arguments))

    def check(self, wait_for_all: bool = False) -> None:
        for future in [future for future in self.pending if wait_for_all or future.done()]:
            self.pending.remove(future)
            try:
                future.result()
            except (OSError, SafetensorError) as error:
                raise DataError(f"a checkpoint could not be written: {error}; the last complete one is kept, "
                                "run the same command again") from error

    def checkpoint(self, folder: Path, tensors: dict[str, torch.Tensor], state: dict,
                   after: Callable[[], None]) -> None:
        """Write this rank's part; rank 0 waits for all parts, renames, and calls `after`."""
        part = folder.with_name(folder.name + ".part")
        part.mkdir(exist_ok=True)
        path = part / rank_file(self.rank, self.world)
        save_file(tensors, f"{path}.part")
        os.replace(f"{path}.part", path)
        if self.rank == 0:
            while not all((part / rank_file(rank, self.world)).exists() for rank in range(self.world)):
                if self.stop.wait(POLL):
                    return  # another rank died: the checkpoint stays incomplete
            (part / STATE).write_text(json.dumps(state), encoding="utf-8")
            os.replace(part, folder)
            after()

    def close(self) -> None:
        self.check(wait_for_all=True)
        self.thread.shutdown()

    def abandon(self) -> None:
        """After an error: write what is queued; other ranks, which may have died, have GRACE for theirs."""
        wait(self.pending, GRACE)
        self.stop.set()
        self.thread.shutdown()


def publish(folder: Path, write: Callable[[str], None]) -> None:
    """Have `write` fill a temporary folder, then move it into place."""
    part = folder.with_name(folder.name + ".part")
    for stale in (part, folder):
        shutil.rmtree(stale, ignore_errors=True)
    write(str(part))
    os.replace(part, folder)


def numbered_folders(run: Path, prefix: str) -> dict[int, Path]:
    """Return the complete folders prefix-N of a run by N, in order."""
    folders = {path.name.removeprefix(f"{prefix}-"): path for path in run.glob(f"{prefix}-*")}
    return {int(step): folders[step] for step in sorted(filter(str.isdigit, folders), key=int)}


def prune(run: Path, keep: int, best: int) -> None:
    """Remove all but the last `keep` checkpoints and the export of step `best`."""
    for path in list(numbered_folders(run, "step").values())[:-keep]:
        shutil.rmtree(path)
    for step, path in numbered_folders(run, "best").items():
        if step != best:
            shutil.rmtree(path)


# ---- reading
def newest_checkpoint(run: Path) -> tuple[Path, dict] | None:
    """Return (folder, state) of the last complete checkpoint."""
    for path in reversed(numbered_folders(run, "step").values()):
        try:
            state = json.loads((path / STATE).read_text(encoding="utf-8"))
            for file in rank_files(path):
                with safe_open(file, "pt"):
                    pass  # reads the header and compares it with the file's length
            return path, state
        except (OSError, ValueError, SafetensorError, DataError) as error:
            log(f"{path} is skipped, because it is damaged: {error}")
    return None


def rank_files(folder: Path) -> list[Path]:
    """Return the files of all ranks in order."""
    files = sorted(folder.glob("rank-*-of-*.safetensors"), key=lambda path: int(path.name.split("-")[1]))
    names = [path.name for path in files]
    if not files or names != [rank_file(rank, len(files)) for rank in range(len(files))]:
        raise DataError(f"{folder}: has {names}, expected one file of every rank")
    return files


def restore(folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load a checkpoint into a model and an optimizer made as for a new run."""
    files = [safe_open(path, "pt") for path in rank_files(folder)]
    parameters, saved = trained_parameters(model), {key for file in files for key in file.keys()}
    if missing := [name for name in parameters if f"model/{name}" not in saved]:
        raise DataError(f"{folder}: holds no {missing[0]} (and {len(missing) - 1} more); expected those of "
                        "this model")
    by_parameter = {}
    for name, parameter in parameters.items():
        with torch.no_grad():
            parameter.copy_(read_shard(files, f"model/{name}", parameter))
        keys = {key.split("/")[0] for key in saved if key.endswith(f"/{name}")} - {"model"}
        by_parameter[parameter] = {key: read_shard(files, f"{key}/{name}", parameter) for key in keys}
    groups = optimizer.state_dict()["param_groups"]
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {n: by_parameter[parameter] for n, parameter in enumerate(order) if by_parameter[parameter]}
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def read_shard(files: list, key: str, like: torch.Tensor) -> torch.Tensor:
    """Return this rank's shard of a tensor, whose rows the files hold one after the other."""
    slices = [file.get_slice(key) for file in files if key in file.keys()]
    if not slices[0].get_shape():  # a number, such as AdamW's count of steps
        return files[0].get_tensor(key)
    is_sharded = isinstance(like, DTensor)
    local = like.to_local() if is_sharded else like
    start = -(-like.shape[0] // dist.get_world_size()) * dist.get_rank() if is_sharded else 0
    parts, offset = [], 0
    for part in slices:
        n_rows = part.get_shape()[0]
        low, high = max(start, offset), min(start + local.shape[0], offset + n_rows)
        if low < high:
            parts.append(part[low - offset:high - offset])
        offset += n_rows
    if offset != like.shape[0]:
        raise DataError(f"{key}: {offset} rows in the checkpoint, {like.shape[0]} in the model")
    whole = torch.cat(parts) if parts else local  # this rank may hold no row
    if not is_sharded:
        return whole.to(like.device)
    return DTensor.from_local(whole.to(local.device), like.device_mesh, like.placements, shape=like.shape,
                              stride=like.stride())
