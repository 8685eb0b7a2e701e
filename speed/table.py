"""The table of README.md's section "Speed", made of what stands in results/.

    python speed/table.py

Reads   results/*.json as the programs beside this one write them; what has no file yet is said to be not yet
run
Prints  the table in Markdown; tests/test_readme.py holds README.md to it
"""
import json
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "results"
TOY = "--items toy/work/world/bench.jsonl"
EVALUATE = f"python speed/evaluate.py --model toy/work/text {TOY} --folder work/evaluate"
SWEEP = f"python speed/sweep.py --model toy/work/latent {TOY} --folder work/sweep"
PEERS = {"trainer": "transformers' Trainer", "trainer_rebalance": "its `batch_rebalance`", "trl": "TRL"}
SAME = "the same"


def spread(values: list[float]) -> str:
    return f"{min(values)} to {max(values)}" if len(set(values)) > 1 else f"{values[0]}"


def join(values) -> str:
    return ", ".join(str(value) for value in values)


# Each function takes the object of one file and returns (what, ours, peer) a row.
def client(found: dict) -> list[tuple]:
    rates = {name: f"{part['requests_per_s']:.0f}" for name, part in found["clients"].items()}
    return [(f"requests/s to a server, {found['in_flight']} under way, {found['request_kb']} kB each",
             rates["ours"],
             f"openai SDK {rates['openai']}, aiohttp {rates['aiohttp']}")]


def client_growth(found: dict) -> list[tuple]:
    points = found["points"]
    rates = {name: join(f"{point['clients'][name]['requests_per_s']:.0f}" for point in points)
             for name in ("ours", "openai", "aiohttp")}
    return [(f"requests/s: {join('{requests} of {request_kb} kB'.format(**point) for point in points)}",
             rates["ours"],
             f"openai SDK {rates['openai']}; aiohttp {rates['aiohttp']}")]


def export(found: dict) -> list[tuple]:
    peer = f"`json.loads` of every line {found['json_loads_s']:.1f} s"
    size = f"{found['export_s']:.0f} s, {found['export_gb']:.1f} GB"
    return [(f"export of {found['samples']:,} journalled samples", size, peer),
            ("opening the same journals after a kill", f"{found['scan_s']:.1f} s", SAME)]


def train(found: dict, what: str = "training") -> list[tuple]:
    its = found["contenders"]
    peers = {name: its[name] for name in PEERS}
    return [(f"{what}, tokens/s (median ratio of ours, range over {found['rounds']} rounds)",
             its["ours"]["tokens_per_s"],
             join(f"{PEERS[name]} {peer['tokens_per_s']} ({peer['ours_is_faster_by']}, {spread(peer['over_rounds'])})"
                  for name, peer in peers.items())),
            (f"{what}, peak memory, GiB", its["ours"]["peak_gib"],
             join(peer["peak_gib"] for peer in peers.values()))]


def train_profile(found: dict) -> list[tuple]:
    parts = join(f"{part} {seconds}" for part, seconds in found["parts_s"].items())
    return [(f"where {found['step_s']} s of a training step go, s", parts, "")]


def train_own_pixels(found: dict) -> list[tuple]:
    its = found["contenders"]
    return [("training, the peers with our code for pixels", its["ours"]["tokens_per_s"],
             join(f"{its[name]['tokens_per_s']} ({spread(its[name]['over_rounds'])})" for name in PEERS))]


def train_layers(found: dict) -> list[tuple]:
    return train(found, "training, ours with `--recompute layers`")


def train_none(found: dict) -> list[tuple]:
    its = found["contenders"]
    sides = [f"{side['tokens_per_s']}, {side['peak_gib']} GiB" for side in (its["ours"],
                                                                            its["trainer_rebalance"])]
    return [("training with activations kept on both sides", sides[0],
             f"`batch_rebalance` {sides[1]} ({spread(its['trainer_rebalance']['over_rounds'])})")]


def train_growth(found: dict) -> list[tuple]:
    rows = []
    for axis, words in (("rows", "{} rows a step"), ("visual_tokens", "8 rows of {} visual tokens")):
        points = [point for point in found["points"] if (axis == "rows") is (point["visual_tokens"] is None)]
        ours, peer = ([point["contenders"][name] for point in points]
                      for name in ("ours", "trainer_rebalance"))
        sides = [
            f"{join(its['tokens_per_s'] for its in side)} tokens/s, {join(its['peak_gib'] for its in side)} GiB"
                 for side in (ours, peer)]
        ratios = join(its["ours_is_faster_by"] for its in peer)
        rows.append((f"training, {words.format(join(point[axis] for point in points))}", sides[0],
                     f"`batch_rebalance` {sides[1]} ({ratios} times)"))
    return rows


def sweep(found: dict) -> list[tuple]:
    return [(
        f"{len(found['conditions'])} conditions on {found['items']} items of {found['visual_tokens']} visual tokens",
             f"{spread(found['together_s'])} s in one run",
             f"a run a condition {spread(found['apart_s'])} s ({found['ratio']} times)")]


def sweep_growth(found: dict) -> list[tuple]:
    points = found["points"]
    return [(f"the same on {join('{items} items of {visual_tokens}'.format(**point) for point in points)}",
             f"{join(point['together_s'][0] for point in points)} s",
             f"{join(point['apart_s'][0] for point in points)} s ({join(point['ratio'] for point in points)} times)")]


def evaluate(found: dict) -> list[tuple]:
    started, process = found["started"], found["same_process"]
    prefill, decode = (f"{100 * found['shares'][name]:.0f} %" for name in ("prefill", "decode"))
    return [(f"evaluating {found['items']} items, {found['tokens_per_item']} tokens a reply, as started",
             f"{started['ours_s'][0]} s",
             f"one `generate` an item {started['peer_s'][0]} s ({started['ratio']} times)"),
            ("the same in one process, imports apart",
             f"{process['ours_s'][0]} s: {prefill} prefill, {decode} decoding",
             f"{process['peer_s'][0]} s ({process['ratio']} times; {found['same_process_cpu']['ratio']} of processor time)")]


def growth(found: dict) -> list[tuple]:
    rows = []
    for axis, words in (("items", "{} items"), ("visual_tokens", "8 items of {} visual tokens")):
        points = found[axis]
        ours, peer = (
            f"{join(point[f'{side}_s'] for point in points)} s, {join(point[f'{side}_gib'] for point in points)} GiB"
                      for side in ("ours", "peer"))
        rows.append((f"evaluating {words.format(join(point[axis] for point in points))}", ours,
                     f"{peer} ({join(point['ratio'] for point in points)} times)"))
    return rows


def probe_memory(found: dict) -> list[tuple]:
    sizes = f"{found['instances']:,} x {found['steps']} x {found['layers']} x {found['hidden']:,}"
    return [(f"all measures of {sizes} states, {found['states_gb']} GB on disk",
             f"{found['analyse_s']:.0f} s, "
             f"{found['analyse_gb']} GB", f"reading them once {found['read_s']} s")]


def train_gpu(found: dict) -> list[tuple]:
    return [(
        f"training {run['size']}, rows of {run['row_tokens']} tokens in packs of {run['max_tokens']}, {found['device']}",
             run.get("error") or f"{run['tokens_per_s']} tokens/s, MFU {run['mfu']}, {run['peak_gib']} GiB",
             "")
            for run in found["runs"]]


def infer_gpu(found: dict) -> list[tuple]:
    return [(f"{run['what']}, {run['size']}, {run['visual_tokens']} visual tokens an item, {found['device']}",
             run.get("failed") or f"{run['items_per_s']} items/s", "") for run in found["runs"]]


ROWS = {client: "python speed/client.py", client_growth: "python speed/client.py --growth",
        export: "python speed/export.py --folder work/export",
        train: "python speed/train.py --folder work/train",
        train_profile: "python speed/train_profile.py --folder work/profile",
        train_own_pixels: "python speed/train.py --folder work/train_own_pixels --own_pixels --rounds 2",
        train_layers: "python speed/train.py --folder work/train_layers --recompute layers",
        train_none: "python speed/train.py --folder work/train_none --recompute none --contenders ours trainer_rebalance",
        train_growth: "python speed/train.py --folder work/train_growth --growth --rounds 1 --steps 3",
        train_gpu: "python speed/train_gpu.py --config Qwen2.5-VL-7B-Instruct --folder work/gpu",
        infer_gpu: "python speed/infer_gpu.py --config Qwen2.5-VL-7B-Instruct --folder work/gpu",
        sweep: f"{SWEEP} --limit 16 --rounds 2", sweep_growth: f"{SWEEP} --growth", evaluate: EVALUATE,
        growth: f"{EVALUATE} --growth", probe_memory: "python speed/probe.py --folder work/probe"}


def table() -> str:
    """Return the table: a function, a file of its name and the command that writes it, in the order of ROWS.
    """
    lines = ["| what | ours | peer | command, file |", "|---|---|---|---|"]
    for rows_of, command in ROWS.items():
        path = RESULTS / f"{rows_of.__name__}.json"
        if path.exists():
            rows, where = rows_of(
                json.loads(path.read_text(encoding="utf-8"))), f"`{command}`, `results/{path.name}`"
        else:
            rows, where = [(rows_of.__name__.replace("_", " "), "not yet run", "")], f"`{command}`"
        for n, row in enumerate(rows):
            lines.append(f"| {' | '.join(map(str, row))} | {SAME if n else where} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
