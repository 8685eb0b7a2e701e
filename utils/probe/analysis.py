"""All measures of a store of states: similarity, what cosines do not show, and a lens on single latents.

Spectrum and retrieval work on [n, n] products, so that d may be large. The lens alone needs the model.
"""
from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from utils.items import group_of, open_images
from utils.probe.figures import draw_curves, draw_heatmaps, draw_layers, draw_lens, draw_spectra
from utils.probe.linear_probe import FOLDS, LinearProbe, choose_testable, target_of
from utils.probe.similarity import LEVEL, Cell, CellSimilarity, correct, draw_halves, unit
from utils.probe.states import STORED, States
from utils.stats import holm, share_interval

if TYPE_CHECKING:
    from utils.qwen import Qwen

SHOWN = 100  # instances in a heat map, as in the paper
N_WORDS, N_PICTURES = 5, 8  # of the lens: words per latent in the CSV, pictures in the figure


# ---- spectrum, retrieval
def spectrum(states: np.ndarray) -> dict:
    """Return how many directions states [n, d] span around their mean: participation ratio (sum)^2 / sum of
    squares, effective rank exp(entropy) (Roy and Vetterli 2007), "top1" the largest share. The first two are
    bounded by n - 1. None where nothing varies."""
    offsets = states - states.mean(0, dtype=np.float64)
    values = np.linalg.eigvalsh(offsets @ offsets.T)[::-1].clip(0)
    if values[0] <= 1e-24 * max(float((states.astype(np.float64) ** 2).sum()), 1e-300):
        return {"n": len(states), "participation_ratio": None, "effective_rank": None, "top1": None}
    p = values / values.sum()
    positive = p[p > 0]
    return {"n": len(states), "participation_ratio": float(1 / (p**2).sum()),
            "effective_rank": float(np.exp(-(positive * np.log(positive)).sum())), "top1": float(p[0])}


def retrieval(queries: np.ndarray, keys: np.ndarray) -> dict:
    """Return how well row i of `queries` [n, d] retrieves row i of `keys` by cosine: top-1 accuracy, and
    that by chance. Tied keys are in random order."""
    scores = unit(queries) @ unit(keys).T
    own, n = np.diag(scores)[:, None], len(keys)
    above, ties = (scores > own + 1e-6).sum(1), (abs(scores - own) <= 1e-6).sum(1)  # ties include the own key
    return {"n": n, "top1": float(((above == 0) / ties).mean()), "top1_chance": 1 / n}


# ---- all cells of a store
class Analysis:
    """Measures the states of `items`: `rows` are the lines of probes.jsonl, `matrices` the heat maps."""

    def __init__(self, store: States, items: list[dict], n_steps: int, seed: int):
        self.store, self.n_steps, self.seed = store, n_steps, seed
        self.keys = [item["id"] for item in items]
        field = "benchmark" if len({item.get("benchmark") for item in items}) > 1 else "category"
        self.tasks = np.array([str(item.get(field) or "all") for item in items])
        self.halves, self.targets = draw_halves(len(items), seed), [target_of(item) for item in items]
        self.probes: dict[bytes, tuple[list[int], LinearProbe | None]] = {}  # by the instances of a cell
        shapes = [r["tensors"]["inner"] for r in store.records.values() if "inner" in r["tensors"]]
        self.middle = shapes[0][1] // 2 if shapes else -1  # layer
        self.rows: list[dict] = []
        self.matrices: dict[tuple[str, str, int], tuple[np.ndarray, np.ndarray]] = {}

    def run(self) -> None:
        for kind in STORED:
            if name := self.store.find(kind):
                self.measure_kind(kind, name)

    def measure_kind(self, kind: str, name: str) -> None:
        segments = {key: self.store.records[key]["segments"] for key in self.keys}
        sizes = {key: sizes[0] for key, sizes in segments.items() if sizes}
        similarity, before = CellSimilarity(self.halves, seed=self.seed), None
        for cell in self.store.cells(name, self.keys, self.n_steps,
                                     at_most=sizes if name in ("latent", "inner") else None):
            place = {"kind": kind, "layer": cell.layer, "step": cell.step, "form": "raw"}
            if len(cell.instances) >= 4:
                self.measure_cell(place, cell)
            if before is not None and (before.layer, before.step + 1) == (cell.layer, cell.step):
                self.compare_cells(place, before, cell)
            self.rows += [{"kind": kind, **row} for row in similarity.measure(cell)]
            if cell.layer in (-1, self.middle) and kind != "start":
                few = cell.instances < SHOWN
                for form, matrix in similarity.matrices.items():
                    if form in ("raw", "centred"):
                        self.matrices[kind, form, cell.step] = cell.instances[few], matrix[np.ix_(few, few)]
            before = cell

    def measure_cell(self, place: dict, cell: Cell) -> None:
        """Add the spectrum of a cell and what a linear probe reads from it."""
        self.rows.append({**place, "measure": "spectrum", **spectrum(cell.states)})
        testable, probe = self.probe_of(cell)
        if probe is not None:
            result = probe.measure(cell.states[testable])
            self.rows.append({**place, "measure": "decode", "value": result["above_shuffled"], **result})

    def probe_of(self, cell: Cell) -> tuple[list[int], LinearProbe | None]:
        """Return the places of a cell's instances that can be probed, and their probe if they are enough.
        Cells of the same instances share it: the shuffles take longer than what is read from one cell."""
        key = cell.instances.tobytes()
        if key not in self.probes:
            targets = [self.targets[i] for i in cell.instances]
            testable = choose_testable(targets)
            chosen = [targets[n] for n in testable]
            enough = len(chosen) >= 2 * FOLDS and len({target.gold for target in chosen}) > 1
            self.probes[key] = testable, LinearProbe(chosen, seed=self.seed) if enough else None
        return self.probes[key]

    def compare_cells(self, place: dict, before: Cell, cell: Cell) -> None:
        """Add the retrieval between a step and the one before."""
        both, now, earlier = np.intersect1d(cell.instances, before.instances, return_indices=True)
        if len(both) < 4:
            return
        centred = [correct(states, self.halves[both], ["centred"])
                   for states in (cell.states[now], before.states[earlier])]
        if None not in centred:
            result = retrieval(*(forms["centred"] for forms in centred))
            self.rows.append({**place, "form": "centred", "measure": "retrieval_adjacent",
                              "value": result["top1"], **result})

    def curves(self) -> dict:
        """Return {kind: {measure_form: [{"step", "mean", "low", "high", "n"}]}} of final states."""
        result = {}
        for row in final_cosines(self.rows):
            curve = result.setdefault(row["kind"], {}).setdefault(f"{row['measure']}_{row['form']}", [])
            curve.append({"step": row["step"] + 1, "mean": row["value"], "low": row["low"],
                          "high": row["high"], "n": row["n"]})
        return result

    def draw(self, output: Path) -> None:
        if self.matrices:
            draw_heatmaps(self.matrices, self.tasks, output / "heatmap.png")
            draw_curves(final_cosines(self.rows), output / "curves.png")
            draw_spectra(self.rows, output / "spectra.png")
        if any(row["kind"] == "inner" for row in self.rows):
            draw_layers(self.rows, output / "layers.png")


def final_cosines(rows: list[dict]) -> list[dict]:
    """Return the rows of final states' cosines."""
    return [row for row in rows if row["layer"] == -1 and row["measure"] in ("inter", "adjacent", "first")]


def summarise(rows: list[dict]) -> tuple[dict, dict]:
    """Return what tells the states of instances apart, and what a linear probe reads from them: {kind:
    {measure: mean over the steps}} of final states.

    Mean cosines between instances are raw only: those of corrected states are near 0 by
    construction, whatever the states. The p of the linear probe is the least over the steps after Holm.
    """
    similarity: dict[str, dict] = {}
    decoding: dict[str, dict] = {}
    final = [row for row in rows if row["layer"] == -1]
    for kind in dict.fromkeys(row["kind"] for row in final):
        of = {name: [row for row in final if (row["kind"], row["measure"]) == (kind, name)]
              for name in ("spread", "retrieval_adjacent", "decode")}
        similarity[kind] = {
            "spread": mean_of(of["spread"], "value"), "retrieval": mean_of(of["retrieval_adjacent"], "top1"),
            "retrieval_chance": mean_of(of["retrieval_adjacent"], "top1_chance")}
        cosines = [row for row in final_cosines(final) if row["kind"] == kind
                   and (row["measure"] != "inter" or row["form"] == "raw")]
        for name in dict.fromkeys((row["measure"], row["form"]) for row in cosines):
            same = [row for row in cosines if (row["measure"], row["form"]) == name]
            similarity[kind]["_".join(name)] = mean_of(same, "value")
        if of["decode"]:
            decoding[kind] = {name: mean_of(of["decode"], name)
                              for name in ("n", "accuracy", "question_only", "shuffled")}
            decoding[kind]["p"] = min(holm([row["p"] for row in of["decode"]]))
    return similarity, decoding


def mean_of(rows: list[dict], name: str) -> float | None:
    return float(np.mean([row[name] for row in rows])) if rows else None


# ---- the lens
class Seen(NamedTuple):
    """An item under the lens: its latents [k, hidden], its picture's visual tokens [n, hidden] in reading
    order, and how many of these are in a line."""

    item: dict
    latents: np.ndarray
    visual: np.ndarray
    n_columns: int


def nearest(latents: np.ndarray, visual: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the visual token of the greatest cosine to each latent, and that cosine."""
    cosines = unit(latents) @ unit(visual).T
    return cosines.argmax(1), cosines.max(1)


def words_of(qwen: Qwen, latents: np.ndarray) -> list[list[int]]:
    """Return the likeliest N_WORDS ids by the head for each latent [k, hidden], which is a state after the
    final norm."""
    import torch
    head = qwen.model.lm_head
    with torch.no_grad():
        logits = head(torch.from_numpy(latents).to(head.weight))[:, :len(qwen.tokenizer)]
    return logits.float().topk(N_WORDS).indices.tolist()


def see(qwen: Qwen, store: States, items: list[dict], n_steps: int) -> list[Seen]:
    """Return the items that have latents, with those of the first segment and the first picture's tokens."""
    import torch

    from utils.qwen import image_features, process_images
    seen = []
    for item in items:
        latents = store.first_latents(item["id"])
        if latents is None:
            continue
        pixels = process_images(qwen.image_processor, open_images(item, item["root"])[:1])
        with torch.no_grad():
            visual, = image_features(qwen, {name: x.to(qwen.device) for name, x in pixels.items()})
        n_columns = int(pixels["image_grid_thw"][0, 2]) // qwen.image_processor.merge_size
        seen.append(Seen(item, latents[:n_steps], visual.float().cpu().numpy(), n_columns))
    return seen


def look(qwen: Qwen, seen: list[Seen], output: Path, seed: int) -> dict | None:
    """Write lens.png and lens.csv: the words nearest to each latent, after the mean over all latents is taken
    off, and the patch of its item's picture. Return the control: how often patch and first word stay when an
    item has the latents of one of another group, None below two groups."""
    rng, groups = np.random.default_rng(seed), [group_of(one.item) for one in seen]
    if len(set(groups)) < 2:
        return None
    mean = np.concatenate([one.latents for one in seen]).mean(0)
    words = [words_of(qwen, one.latents - mean) for one in seen]
    rows, stays, members = [], {"patch": [], "word": []}, []
    for i, one in enumerate(seen):
        j = rng.choice([j for j, group in enumerate(groups) if group != groups[i]])
        (places, cosines), (others, _) = (nearest(x, one.visual) for x in (one.latents, seen[j].latents))
        n = min(len(places), len(others))
        stays["patch"] += (places[:n] == others[:n]).tolist()
        stays["word"] += [mine[0] == theirs[0] for mine, theirs in zip(words[i][:n], words[j][:n])]
        members += [groups[i]] * n
        for step, (place, cosine) in enumerate(zip(places, cosines)):
            word, *more = (repr(qwen.tokenizer.decode(token)) for token in words[i][step])
            rows.append({"id": one.item["id"], "latent": step + 1, "word": word, "next_words": " ".join(more),
                         "row": int(place) // one.n_columns, "column": int(place) % one.n_columns,
                         "cosine": f"{cosine:.4f}"})
    shown = {one.item["id"]: (open_images(one.item, one.item["root"])[0], one.n_columns,
                              len(one.visual) // one.n_columns) for one in seen[:N_PICTURES]}
    draw_lens(shown, rows, output / "lens.png")
    control = {name: {"share": float(np.mean(hits)), "ci": share_interval(hits, members, LEVEL)}
               for name, hits in stays.items()}
    return {"n": len(seen), "latents": len(members), "level": LEVEL, "stays": control,
            "patch_chance": float(np.mean([1 / len(one.visual) for one in seen]))}
