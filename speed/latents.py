"""Training with latents, packed as in train_sft.py, against the padded form and against text.

    python speed/latents.py --folder work/latents

64 rows of about 60 to 400 tokens drawn by a seed, each with a picture of 4 to 300 visual tokens and 1 to 3
imagined ones; a random Qwen2.5-VL of 2.5 million parameters, float32, one thread. A turn is the loss and the
gradient of all rows. Contenders take turns in one process, --rounds times after one that does not count.
Seconds are the processor's, as other processes share the machine. Peak memory is that of one turn in a
process of its own.

  packed      train_sft.py's packs, of at most 8,192 tokens
  padded_N    batches of N rows of like length, whose text blocks and latents have columns in common
              (speed/padded.py: the same loss and gradient)
  text        the same rows with text in place of the latents (--imagination text), packed

Writes  results/train_latents.json
Prints  the same JSON object
"""
import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from speed.padded import PaddedObjective, make_batch  # noqa: E402
from speed.train import SIZES, VISION_SIZES, VOCABULARY, words  # noqa: E402
from toy.make_model import make_model  # noqa: E402
from utils.jsonl import read_rows, write_json, write_rows  # noqa: E402
from utils.latent_families import PRESETS  # noqa: E402
from utils.qwen import load  # noqa: E402
from utils.train.batching import plan_packs  # noqa: E402
from utils.train.examples import Target, make_examples, make_pack  # noqa: E402
from utils.train.model import Objective, use_packed_attention  # noqa: E402
from utils.train.weights import add_tokens  # noqa: E402

NAMES = ("packed", "padded_4", "padded_8", "padded_16", "text")
SPEC = PRESETS["mirage"]
N_ROWS, PACK = 64, 8192


def make_world(folder: Path) -> None:
    """Write rows.jsonl, their pictures and the checkpoint."""
    folder.mkdir(parents=True)
    rng, rows = random.Random(0), []

    def draw(name: str, visual_tokens: int) -> str:
        width = max(2, round(visual_tokens ** 0.5))
        size = 28 * width, 28 * max(2, round(visual_tokens / width))
        Image.effect_noise(size, 80).convert("RGB").save(folder / name)
        return name

    for n in range(N_ROWS):
        steps = []
        for k in range(rng.randint(1, 3)):
            steps += [{"text": words(rng, rng.randint(1, 16))},
                      {"image": draw(f"{n}-{k}.png", 16), "operation": "zoom", "caption": words(rng, 3)}]
        steps.append({"text": f"{words(rng, rng.randint(1, 16))}. The answer is \\boxed{{7}}."})
        chain = " ".join(step.get("text") or f"<think_image>{step['caption']}</think_image>"
                         for step in steps)
        rows.append({"id": f"latents/{n}", "images": [draw(f"{n}.png", rng.randint(4, 300))], "answer": "7",
                     "question": words(rng, rng.randint(1, 3)) + "?", "steps": steps, "chain": chain})
    write_rows(folder / "rows.jsonl", rows)
    prompt = "system\nYou are a helpful assistant. user assistant. The answer is \\boxed{"
    texts = [words(rng, 400) for _ in range(60)] + [prompt] * 99  # often enough to become tokens
    make_model(texts, folder / "model", n_tokens=VOCABULARY, sizes=SIZES, vision_sizes=VISION_SIZES)


class Contender:
    """One way to run all rows, its batches made before the clock runs."""

    def __init__(self, name: str, folder: Path):
        self.qwen, self.padded_size = load(str(folder / "model"), "float32", "cpu"), int("0" + name[7:])
        self.qwen.model.train().model.visual.requires_grad_(False)
        add_tokens(self.qwen, SPEC.tokens)
        target = Target("text", str(folder)) if name == "text" else Target("latent", str(folder), SPEC)
        examples = make_examples(self.qwen, read_rows(folder / "rows.jsonl", {}), target)
        self.lengths, size = [example.n_tokens for example in examples], self.padded_size
        if size:
            examples.sort(key=lambda example: (len(example.steps), example.n_tokens))
            self.batches = [make_batch(self.qwen, examples[k:k + size], target)
                            for k in range(0, N_ROWS, size)]
            self.objective = PaddedObjective(self.qwen, SPEC.size)
            passes = [len(batch["blocks"]) * (SPEC.size + 1) - SPEC.size for batch in self.batches]
        else:
            self.batches = [make_pack(self.qwen, [examples[i] for i in rows], target)
                            for rows, in plan_packs(self.lengths, PACK, 1)]
            self.objective = Objective(self.qwen)
            passes = [len(batch["passes"]) for batch in self.batches]
        self.size = {"tokens": sum(self.lengths), "passes": sum(passes),
                     "columns": sum(batch["input_ids"].numel() for batch in self.batches)}

    def turn(self) -> tuple[float, float]:
        """Return (processor seconds, loss) of the loss and the gradient of all rows."""
        begun, total = time.process_time(), 0.0
        with nullcontext() if self.padded_size else use_packed_attention(self.qwen.model):
            for batch in self.batches:
                losses, _, aligned = self.objective(batch)
                loss = losses.sum() + aligned
                loss.backward()
                total += float(loss.detach())
        self.qwen.model.zero_grad()
        return time.process_time() - begun, total


def peak_of_own(name: str, folder: Path) -> float:
    """Return the GiB that a process takes at most for one turn."""
    code = (f"import sys; sys.path[:0] = [{str(ROOT)!r}]; import torch; torch.set_num_threads(1); "
            "from pathlib import Path; from speed.latents import Contender; "
            f"Contender({name!r}, Path({str(folder)!r})).turn(); print(open('/proc/self/status').read())")
    done = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True)
    return round(int(done.stdout.partition("VmHWM:")[2].split()[0]) / 2**20, 3)  # of kB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True, help="a new folder to work in; 20 MB")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(args.folder).resolve()
    make_world(folder)
    contenders, turns = {name: Contender(name, folder) for name in NAMES}, {name: [] for name in NAMES}
    for n in range(args.rounds + 1):
        for name, contender in contenders.items():
            turns[name].append(contender.turn())
            print(n, name, turns[name][-1], file=sys.stderr)
    lengths = contenders["packed"].lengths
    result = {"rows": N_ROWS, "row_tokens": [min(lengths), max(lengths)], "rounds": args.rounds,
              "contenders": {}}
    for name, contender in contenders.items():
        assert name == "text" or abs(turns[name][0][1] / turns["packed"][0][1] - 1) < 1e-5, turns
        ours, theirs = ([seconds for seconds, _ in turns[of][1:]] for of in ("packed", name))
        ratios = [their / our for our, their in zip(ours, theirs)]
        result["contenders"][name] = {
            **contender.size, "seconds": round(statistics.median(theirs), 2),
            "peak_gib": peak_of_own(name, folder), "packed_is_faster_by": round(statistics.median(ratios), 2),
            "over_rounds": [round(ratio, 2) for ratio in ratios]}
    write_json(ROOT / "results" / "train_latents.json", result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
