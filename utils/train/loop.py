"""The training loop: optimizer steps, held-out loss, log, checkpoints and exports."""
import argparse
import json
import math
import resource
import statistics
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from utils.images import ImageError, open_image
from utils.jsonl import DataError, disk_errors, find_checkpoint
from utils.qwen import Qwen
from utils.train.batching import Steps, Work, peak_flops
from utils.train.checkpoints import Run, Saver, keep_lines, prune, publish, snapshot
from utils.train.examples import Example
from utils.train.model import Objective, use_packed_attention
from utils.train.weights import file_dtype, save, whole_state

RECENT = 50  # steps whose median loss a spike is measured from


def open_pictures(acc: Accelerator, examples: list[Example]) -> dict[Path, ImageError]:
    """Decode every picture, each on one rank; return the faults, the same on all."""
    paths = sorted({path for example in examples for path in (*example.images, *example.steps)})
    own = paths[acc.process_index::acc.num_processes]

    def fault(path: Path) -> tuple[str, str] | None:
        try:
            open_image(path)
        except ImageError as error:
            return str(error), error.reason

    with ThreadPoolExecutor() as threads:
        found = [*zip(own, tqdm(threads.map(fault, own), "images", len(own), unit="image",
                                disable=not acc.is_main_process))]
    return {path: ImageError(*parts) for path, parts in gather_object(found) if parts}


def warmup_length(given: float, n_steps: int) -> int:
    """Return the steps of warm-up: `given` itself from 1 on, else that share of the run, rounded up."""
    return int(given) if given >= 1 else math.ceil(given * n_steps)


def learning_rate_at(step: int, n_steps: int, peak: float, warmup: int, schedule: str, floor: float) -> float:
    """Return the rate: a linear warm-up, then "linear" or "cosine" decay to `floor` * `peak` at `n_steps`, or
    "constant"."""
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    left = (n_steps - step) / max(1, n_steps - warmup)
    share = left if schedule == "linear" else (1 + math.cos(math.pi * (1 - left))) / 2
    return peak * (floor + (1 - floor) * share)


@dataclass
class Trainer:
    """A run on this rank. Once `stop` is set on any rank, all ranks stop after the same step."""

    acc: Accelerator
    qwen: Qwen
    objective: Objective
    optimizer: torch.optim.Optimizer
    run: Run
    saver: Saver
    stop: Event
    args: argparse.Namespace
    waited: float = 0.0  # seconds

    @property
    def folder(self) -> Path:
        return Path(f"{self.args.output}.run")

    def fit(self, train: Steps, held_out: Steps | None) -> None:
        """Train from run.step to the end. KeyboardInterrupt, after a checkpoint, if `stop` was set."""
        args, run = self.args, self.run
        n_steps = args.max_steps or args.epochs * train.per_epoch
        if self.acc.is_main_process:
            keep_lines(self.folder / "log.jsonl", run.step)
        batches = train.ahead(run.step, n_steps)
        bar = tqdm(total=n_steps, initial=run.step, desc=f"train {args.imagination}", unit="step",
                   disable=not self.acc.is_main_process)
        with bar, use_packed_attention(self.qwen.model):
            while run.step < n_steps:
                record, is_stopping = self.timed_step(train, batches, n_steps)
                is_last = run.step == n_steps
                if held_out and (is_last or run.step % args.eval_every == 0):
                    record["held_out_loss"] = self.held_out_loss(held_out)
                    if run.is_best(record["held_out_loss"]):
                        self.export()
                elif is_last:
                    self.export()
                self.write_record(record)
                bar.update()
                bar.set_postfix_str(status(record))
                if is_last or is_stopping or run.step % args.save_every == 0:
                    self.save(run.best.step if run.best else n_steps)
                self.saver.check()
                if is_stopping and not is_last:
                    raise KeyboardInterrupt

    def timed_step(self, train: Steps, batches: Iterator[dict], n_steps: int) -> tuple[dict, bool]:
        """Run an optimizer step; return its record with speed and memory, and whether to stop."""
        begun, self.waited = time.perf_counter(), 0.0
        args, acc, work = self.args, self.acc, train.work(self.run.step)
        rate = learning_rate_at(self.run.step, n_steps, args.learning_rate,
                                warmup_length(args.warmup_steps, n_steps), args.schedule, args.min_rate)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["rate"]
        record, is_stopping = self.step(self.take(batches, work.micro_steps), work)
        self.run.step += 1
        seconds = time.perf_counter() - begun
        peak = peak_flops(torch.cuda.get_device_name()) if acc.device.type == "cuda" else None
        return {"step": self.run.step, "lr": rate, **record, "seconds": round(seconds, 4),
                "data_wait": round(self.waited / seconds, 3),
                "tokens_per_s": round(work.tokens / seconds), "images_per_s": round(work.images / seconds, 1),
                "peak_gib": peak_memory(acc.device),
                "mfu": peak and round(work.flops / (seconds * acc.num_processes * peak), 4)}, is_stopping

    def take(self, batches: Iterator[dict], n: int) -> Iterator[dict]:
        """Yield the next n micro-batches; add up the seconds spent waiting for them."""
        for _ in range(n):
            begun = time.perf_counter()
            batch = next(batches)
            self.waited += time.perf_counter() - begun
            yield batch

    def step(self, batches: Iterable[dict], work: Work) -> tuple[dict, bool]:
        """Minimize the mean loss over a step's trained tokens; return its record, and whether to stop."""
        args, acc = self.args, self.acc
        # the dropout of adapters depends on seed and step alone
        torch.manual_seed(args.seed * 1_000_003 + self.run.step)
        sums, by_row = torch.zeros(4, device=acc.device), []
        for batch in batches:
            batch = send_to_device(batch, acc.device, non_blocking=True)
            losses, right, aligned = self.objective(batch)
            nll = losses.sum() * batch["weight"]
            alignment = args.align_weight * aligned / work.segments if work.segments else 0.0 * aligned
            # gradients are averaged over ranks, while the counts are of all ranks
            ((nll / work.trained_tokens + alignment) * acc.num_processes).backward()
            hits = right.sum() * batch["weight"]
            sums[:3] += torch.stack([nll.detach(), aligned.detach(), hits])
            by_row.append((batch["row_ids"], batch["row"], losses.detach()))
        if args.train_vision:
            average_replicated([p for p in self.objective.parameters() if p.requires_grad])
        norm = float(acc.clip_grad_norm_(self.objective.parameters(), args.clip or math.inf))
        sums[3] = float(self.stop.is_set())  # summed over ranks: all must leave at the same step
        nll, aligned, n_right, n_stopping = acc.reduce(sums, "sum").tolist()
        loss = nll / work.trained_tokens
        self.check_loss(loss, norm, by_row)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.run.recent = [*self.run.recent, loss][-RECENT:]
        counts = {name: value for name, value in asdict(work).items() if name != "segments"}
        return {"loss": loss, "accuracy": n_right / work.trained_tokens,
                "align": aligned / work.segments if work.segments else None,
                "grad_norm": norm, **counts}, n_stopping > 0

    def check_loss(self, loss: float, norm: float, by_row: list[tuple]) -> None:
        """Raise DataError with the worst rows if loss or gradient is not finite or the loss jumps."""
        recent, spike = self.run.recent, self.args.spike
        median = statistics.median(recent) if recent else math.inf
        if math.isfinite(loss) and math.isfinite(norm) and not (spike and loss > median + spike):
            return
        means = []
        for ids, rows, losses in by_row:
            for n, row_id in enumerate(ids):
                of_row = losses[rows == n]
                means.append((float(of_row.mean()) if len(of_row) else 0.0, row_id))
        means = gather_object(means)
        means.sort(key=lambda pair: -pair[0] if math.isfinite(pair[0]) else -math.inf)
        shown = ", ".join(f"{row_id} ({mean:.2f})" for mean, row_id in means[:8])
        raise DataError(
            f"step {self.run.step + 1}: loss {loss:.4g}, gradient norm {norm:.4g}, where the last "
            f"{len(recent)} losses had a median of {median:.4g}; nothing was updated. Rows of the highest "
            f"loss: {shown}. Check or remove them, or lower --learning_rate, in a new run; --spike 0 resumes "
            "this one")

    @torch.no_grad()
    def held_out_loss(self, held_out: Steps) -> float:
        self.objective.eval()
        sums = torch.zeros(2, device=self.acc.device)
        for batch in held_out.ahead(0, held_out.per_epoch):
            losses, _, _ = self.objective(send_to_device(batch, self.acc.device, non_blocking=True))
            sums += torch.stack([losses.sum(), losses.new_tensor(len(losses))]) * batch["weight"]
        self.objective.train()
        nll, n_tokens = self.acc.reduce(sums, "sum").tolist()
        return nll / n_tokens

    def export(self) -> None:
        """Have the whole weights written as best-N, in the type of the base's files."""
        qwen, is_main = self.qwen, self.acc.is_main_process
        state = whole_state(qwen.model, file_dtype(find_checkpoint(qwen.path)), keep=is_main)
        if is_main:
            folder = self.folder / f"best-{self.run.step}"
            self.saver.submit(publish, folder, lambda to: save(qwen, to, state))

    def save(self, best: int) -> None:
        """Have a checkpoint written, then older ones removed and exports of other steps than `best`."""
        tensors = snapshot(self.qwen.model, self.optimizer, self.acc.process_index)
        self.saver.submit(self.saver.checkpoint, self.folder / f"step-{self.run.step}", tensors,
                          asdict(self.run), lambda: prune(self.folder, self.args.keep, best))

    def write_record(self, record: dict) -> None:
        if self.acc.is_main_process:
            path = self.folder / "log.jsonl"
            with disk_errors(path), open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")


def average_replicated(parameters: list[torch.nn.Parameter]) -> None:
    """Average the gradients of weights that are not sharded over ranks, missing ones as 0."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        for parameter in parameters:
            if not isinstance(parameter, DTensor):
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                dist.all_reduce(parameter.grad)
                parameter.grad /= dist.get_world_size()


def peak_memory(device: torch.device) -> float:
    """Return the peak in GiB: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**30, 3)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3)  # Linux counts in KiB


def status(record: dict) -> str:
    text = (f"loss {record['loss']:.4f} acc {record['accuracy']:.3f} lr {record['lr']:.1e} "
            f"{record['tokens_per_s']} tok/s {record['images_per_s']} img/s, wait {record['data_wait']:.0%}, "
            f"balance {record['balance']:.2f}, {record['peak_gib']:.1f} GiB")
    return text + (f", MFU {record['mfu']:.1%}" if record["mfu"] else "")
