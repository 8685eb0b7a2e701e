"""The table of docs/speed.md, made from results/.

    python speed/table.py

Reads   results/*.json as the programs of this folder write them; a missing file gives a row "not yet run"
Prints  the table in Markdown; tests/test_readme.py compares docs/speed.md with it
"""
import json
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "results"
PEERS = {"trainer": "transformers' Trainer", "trainer_rebalance": "its `batch_rebalance`", "trl": "TRL"}
SAME = "the same"


def spread(values: list[float]) -> str:
    return f"{min(values)} to {max(values)}" if len(set(values)) > 1 else f"{values[0]}"


def join(values) -> str:
    return ", ".join(str(value) for value in values)


# Each function takes the object of one results file and returns [(what, ours, peer)], one per row.
def train(result: dict, what: str = "training") -> list[tuple]:
    ours = result["contenders"]["ours"]
    peers = {name: result["contenders"][name] for name in PEERS}
    ratios = join(f"{PEERS[name]} {peer['tokens_per_s']} ({peer['ours_is_faster_by']}, "
                  f"{spread(peer['over_rounds'])})" for name, peer in peers.items())
    return [(f"{what}, tokens/s (median ratio of ours, range over {result['rounds']} rounds)",
             ours["tokens_per_s"], ratios),
            (f"{what}, peak memory, GiB", ours["peak_gib"],
             join(peer["peak_gib"] for peer in peers.values()))]


def train_own_pixels(result: dict) -> list[tuple]:
    peers = [result["contenders"][name] for name in PEERS]
    return [("training, the peers with our code for pixels", result["contenders"]["ours"]["tokens_per_s"],
             join(f"{peer['tokens_per_s']} ({spread(peer['over_rounds'])})" for peer in peers))]


def train_layers(result: dict) -> list[tuple]:
    return train(result, "training, ours with `--recompute layers`")


def train_none(result: dict) -> list[tuple]:
    ours, peer = (result["contenders"][name] for name in ("ours", "trainer_rebalance"))
    sides = [f"{side['tokens_per_s']}, {side['peak_gib']} GiB" for side in (ours, peer)]
    return [("training with activations kept on both sides", sides[0],
             f"`batch_rebalance` {sides[1]} ({spread(peer['over_rounds'])})")]


def train_growth(result: dict) -> list[tuple]:
    rows = []
    for axis, words in (("rows", "{} rows a step"), ("visual_tokens", "8 rows of {} visual tokens")):
        points = [point for point in result["points"] if (axis == "rows") is (point["visual_tokens"] is None)]
        ours, peer = ([point["contenders"][name] for point in points]
                      for name in ("ours", "trainer_rebalance"))
        speed, memory = ([join(run[name] for run in side) for side in (ours, peer)]
                         for name in ("tokens_per_s", "peak_gib"))
        ratios = join(run["ours_is_faster_by"] for run in peer)
        rows.append((f"training, {words.format(join(point[axis] for point in points))}",
                     f"{speed[0]} tokens/s, {memory[0]} GiB",
                     f"`batch_rebalance` {speed[1]} tokens/s, {memory[1]} GiB ({ratios} times)"))
    return rows


def train_latents(result: dict) -> list[tuple]:
    numbers = "{seconds} s, {passes} passes, {columns} columns, {peak_gib} GiB"
    ours = numbers.format(**result["contenders"]["packed"])
    what = f"training with latents, {result['rows']} rows of {spread(result['row_tokens'])} tokens, packed"
    rows = []
    for name, run in list(result["contenders"].items())[1:]:
        kind, _, size = name.partition("_")
        peer = f"{kind}, {size} rows a batch" if size else kind
        rows.append((what, ours, f"{peer}: {numbers.format(**run)} ({run['packed_is_faster_by']}, "
                     f"{spread(run['over_rounds'])})"))
    return rows


def evaluate(result: dict) -> list[tuple]:
    started, process = result["started"], result["same_process"]
    prefill, decode = (f"{100 * result['shares'][name]:.0f} %" for name in ("prefill", "decode"))
    return [(f"evaluating {result['items']} items, {result['tokens_per_item']} tokens a reply, as started",
             f"{started['ours_s'][0]} s",
             f"one `generate` an item {started['peer_s'][0]} s ({started['ratio']} times)"),
            ("the same in one process, imports apart",
             f"{process['ours_s'][0]} s: {prefill} prefill, {decode} decoding",
             f"{process['peer_s'][0]} s ({process['ratio']} times; "
             f"{result['same_process_cpu']['ratio']} of processor time)")]


def evaluate_lengths(result: dict) -> list[tuple]:
    what = f"local replies to {result['items']} items, {result['batch_size']} a batch, tokens {{}}"
    return [(what.format(kind), "rows that have ended leave",
             f"rows stay: {run['ratio']} times as long ({spread(run['over_rounds'])}); {run['cpu_ratio']} of "
             f"processor time ({spread(run['cpu_over_rounds'])})")
            for kind, run in result["lengths"].items()]


def train_gpu(result: dict) -> list[tuple]:
    what = f"training {{size}}, rows of {{row_tokens}} tokens in packs of {{max_tokens}}, {result['device']}"
    return [(what.format(**run), run.get("error") or
             f"{run['tokens_per_s']} tokens/s, MFU {run['mfu']}, {run['peak_gib']} GiB", "")
            for run in result["runs"]]


def infer_gpu(result: dict) -> list[tuple]:
    what = f"{{what}}, {{size}}, {{visual_tokens}} visual tokens an item, {result['device']}"
    return [(what.format(**run), run.get("failed") or f"{run['items_per_s']} items/s", "")
            for run in result["runs"]]


EVALUATE = "python speed/evaluate.py --model toy/work/text --items toy/work/world/bench.jsonl"
TRAIN = "python speed/train.py --folder work/train"
ROWS = {train: TRAIN, train_own_pixels: f"{TRAIN}_own_pixels --own_pixels --rounds 2",
        train_layers: f"{TRAIN}_layers --recompute layers",
        train_none: f"{TRAIN}_none --recompute none --contenders ours trainer_rebalance",
        train_growth: f"{TRAIN}_growth --growth --rounds 1 --steps 3",
        train_latents: "python speed/latents.py --folder work/latents",
        train_gpu: "python speed/train_gpu.py --config Qwen2.5-VL-7B-Instruct --folder work/gpu",
        infer_gpu: "python speed/infer_gpu.py --config Qwen2.5-VL-7B-Instruct --folder work/gpu",
        evaluate: f"{EVALUATE} --folder work/evaluate",
        evaluate_lengths: f"{EVALUATE} --folder work/lengths --limit 64 --lengths"}


def table() -> str:
    """Return the table: the rows of each results file, with the command that writes it."""
    lines = ["| what | ours | peer | command, file |", "|---|---|---|---|"]
    for make_rows, command in ROWS.items():
        name, source = make_rows.__name__, f"`{command}`"
        rows, path = [(name.replace("_", " "), "not yet run", "")], RESULTS / f"{name}.json"
        if path.exists():
            rows = make_rows(json.loads(path.read_text(encoding="utf-8")))
            source += f", `results/{path.name}`"
        for n, row in enumerate(rows):
            lines.append(f"| {' | '.join(map(str, row))} | {SAME if n else source} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
