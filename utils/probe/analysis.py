"""All measures of a store of states: similarity, and what cosines do not show. numpy only.

Spectrum and retrieval work on [n, n] products, so that d may be large.
"""
from pathlib import Path

import numpy as np

from utils.probe.figures import draw_curves, draw_heatmaps, draw_layers, draw_spectra
from utils.probe.linear_probe import FOLDS, LinearProbe, choose_testable, target_of
from utils.probe.similarity import Cell, CellSimilarity, correct, draw_halves, unit
from utils.probe.states import STORED, States
from utils.stats import holm

SHOWN = 100  # instances in a heat map, as in the paper


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
