"""The harness on models whose truth is known (`utils.known_truth`): conditions, intervals, verdicts and mediation at each site.

    masks   random weights: what a mask forbids must make no difference at all, what it allows must make one
    toys    trained: what is fed, what is in the slots and what the answer may see matter, or not, as each was built

The conditions are those of `utils.conditions`, the verdicts those of `utils.stats` and `utils.mediation`. A published protocol
with the fed vector as its only site reads "latents are not used" off the toy `slot_random`, whose answer comes through them.
"""
import time

import torch
import torch.nn.functional as F

from utils.cases import Case, Known
from utils.conditions import find_condition
from utils.decode import Arm
from utils.families import PRESETS
from utils.known_truth import (BATCH, MASKS, VOCABULARY, Run, Toy, answers, draw_items, make_toy, randomised, reproducible, run,
                               run_arms, train)
from utils.mediation import mediate
from utils.rows import log
from utils.stats import paired_interval, robust_mean, verdict

MARGIN = 0.05  # of accuracy; as a change of the answer's negative log-likelihood, in nats
NON_ZERO = 0.01  # of a logit: a difference that is allowed is larger in these models (the smallest measured is 0.07)
REMOVALS = ("tau", "tau_mean", "moment_noise", "norm_noise", "near_zero")  # content taken from what is fed
CONDITIONS = (*REMOVALS, "swap_random", "slot_swap_random", "cut_latent")
ZEROS = {  # columns of `compare` that are exactly 0 under each mask; all others exceed NON_ZERO
    "open": {"replay", "own_slots"}, "bypass": {"replay", "own_slots", "tau", "fed_swap", "slot_swap", "cut_latent"},
    "in": {"replay", "own_slots", "images_under_tau", "fed_swap_donor", "other_image", "slot_swap_donor"},
    "slot": {"replay", "own_slots", "slot_swap_donor"}}
TOYS = {  # mask, length of the direction that all latents share, whether what is fed is random in training, expected findings
    "in": ("in", 0, False, {"fed": "effect", "slot": "effect", "edge": "effect", "pm_fed": 1, "pm_slot": 1}),
    "bypass": ("bypass", 0, False, {"fed": "equivalent", "slot": "equivalent", "edge": "equivalent", "pm_fed": 0,
                                    "pm_slot": 0}),
    "slot_random": ("slot", 0, True, {"fed": "equivalent", "slot": "effect", "edge": "effect", "pm_fed": 0, "pm_slot": 1}),
    "in_shared": ("in", 45, False, {"fed": "effect", "slot": "effect", "edge": "effect", "pm_fed": 1, "pm_slot": 1}),
    "slot": ("slot", 0, False, {"slot": "effect", "edge": "effect", "pm_slot": 1}),  # what is fed may come to matter or not
    "open": ("open", 0, False, {"fed": "equivalent", "slot": "equivalent", "edge": "equivalent", "nll": (
        "equivalent", "small effect inside the margin")})}  # no mask forbids the latents: the score keeps a trace of them
QUICK = ("in", "bypass", "slot_random")
STEPS = {True: 80, False: 250}  # of training, quick and full
N_ITEMS = {True: 256, False: 512}


# ------------------------------------------------------------------------------------ masks
@torch.no_grad()
def compare(toy: Toy, pixels: torch.Tensor, other: torch.Tensor) -> dict[str, float]:
    """Return the largest |difference of a logit| between pairs of runs, x being `pixels` and x' `other`, item by item."""
    clean, donor = run(toy, pixels), run(toy, other)
    fixed = draw_items(len(pixels), torch.Generator().manual_seed(0))[:1].expand_as(pixels)
    tau = fed_of(run(toy, fixed))  # the latents of one picture for all

    def largest(one: Run, two: Run) -> float:
        return float((one.logits - two.logits).abs().max())

    swapped, swapped_slots = run(toy, pixels, fed_of(donor)), run(toy, pixels, slots=donor.slots)
    return {"replay": largest(run(toy, pixels, fed_of(clean)), clean),
            "own_slots": largest(run(toy, pixels, slots=clean.slots), clean),
            "TE": largest(clean, donor), "tau": largest(run(toy, pixels, tau), clean),
            "images_under_tau": largest(run(toy, pixels, tau), run(toy, other, tau)),
            "fed_swap": largest(swapped, clean), "fed_swap_donor": largest(swapped, donor),
            "other_image": largest(run(toy, other, fed_of(clean)), clean),  # Y(x', Z(x)) against Y(x, Z(x))
            "slot_swap": largest(swapped_slots, clean), "slot_swap_donor": largest(swapped_slots, donor),
            "cut_latent": largest(run(toy, pixels, cut=True), clean)}


def fed_of(source: Run):
    """Return what feeds the vectors of a run to the same rows of another."""
    return lambda z, step: source.fed[:, step]


def check_masks(seed: int = 0) -> dict:
    """Return {"columns": {mask: `compare`}, "wrong": the cells that are not as ZEROS says, "ok"}."""
    columns = {}
    with reproducible(seed):
        for mask in MASKS:
            pixels = draw_items(8, torch.Generator().manual_seed(seed))
            columns[mask] = compare(make_toy(mask), pixels, pixels.roll(1, 0))
    wrong = [f"{mask} {name} {value:.3g}" for mask, cells in columns.items() for name, value in cells.items()
             if not (value == 0 if name in ZEROS[mask] else value > NON_ZERO)]
    return {"columns": columns, "wrong": wrong, "ok": not wrong}


# ------------------------------------------------------------------------------------ trained toys
def train_toy(name: str, steps: int) -> Toy:
    """Return a trained toy of TOYS; the global seed and dtype stay as they were."""
    mask, shared, random, _ = TOYS[name]
    with reproducible(0):
        toy = make_toy(mask, shared)
        began, loss = time.monotonic(), train(toy, steps, randomised if random else None)
    log(f"{name}: {steps} steps of {BATCH} in {time.monotonic() - began:.1f} s, last loss {loss:.4f} nats")
    return toy


def make_arms(name: str, runs: Run, donors: Run, known: Known | None) -> list[Arm]:
    """Return the arms of a condition of the catalogue, item by item, with another run's rows as their donors."""
    found, number = find_condition(name)
    pad = torch.zeros(runs.fed.shape[-1])
    cases = [Case({"id": str(i)}, mine, PRESETS["mirage"], pad, VOCABULARY["start"], 0, known, {"random": its})
             for i, (mine, its) in enumerate(zip(runs.rows(), donors.rows()))]
    return [found.make(case, number) for case in cases]


def measure(toy: Toy, n: int) -> dict:
    """Return the columns of one toy, and what is found at each site: verdicts and proportions mediated.

    x' shows another colour than x, and its runs are the donors: with them no answer of x' is right for x.
    """
    generator = torch.Generator().manual_seed(1)
    calibration, pixels, shades = (draw_items(n, generator) for _ in range(3))
    other, gold, its_gold = shades.roll(3, 0), answers(n), answers(n).roll(3)  # eight colours in turn: never one's own
    with torch.no_grad():
        known = Known.from_runs(run(toy, calibration).rows())
        clean, donor = run(toy, pixels), run(toy, other)
    runs = {name: run_arms(toy, pixels, make_arms(name, clean, donor, known)) for name in CONDITIONS}
    back = {"fed": run_arms(toy, other, make_arms("replay", clean, donor, known)),  # Y(x', Z(x))
            "slot": run_arms(toy, other, make_arms("slot_swap_random", donor, clean, known))}
    right = {name: (one.logits.argmax(-1) == gold).int().tolist()
             for name, one in {"clean": clean, "donor": donor, **runs}.items()}
    found, mediation = {}, {}
    for site, name in (("fed", "swap_random"), ("slot", "slot_swap_random")):
        worlds = [right["clean"], right[name], (back[site].logits.argmax(-1) == gold).int().tolist(), right["donor"]]
        mediation[site] = mediate(*worlds, range(n), binary=True, n_boot=1000)
        found[f"pm_{site}"] = mediation[site]["proportion_mediated"]["value"]
    verdicts = {name: verdict_of(right["clean"], right[name]) for name in CONDITIONS}
    at_fed = {verdicts[name] for name in (*REMOVALS, "swap_random")}
    nll, before = (F.cross_entropy(one.logits, gold, reduction="none") for one in (runs["tau_mean"], clean))
    nll = nll - before
    bounds = [robust_mean(nll.tolist(), range(n), level) for level in (0.90, 0.95)]
    found |= {"fed": at_fed.pop() if len(at_fed) == 1 else "mixed", "slot": verdicts["slot_swap_random"],
              "edge": verdicts["cut_latent"], "nll": verdict(bounds[0][1:], bounds[1][1:], MARGIN)}
    columns = {name: sum(values) / n for name, values in right.items() if name != "donor"}
    columns |= {f"{name}_donor": share(runs[name], its_gold) for name in ("swap_random", "slot_swap_random")}
    columns |= {"other_image_keeps": share(back["fed"], gold), "delta_nll_tau_mean": bounds[0][0], **likeness(clean.fed, known)}
    return {"n": n, "columns": columns, "verdicts": verdicts, "found": found,
            "mediation": {site: {name: its[name] for name in ("TE", "NIE", "NIE0", "proportion_mediated")}
                          for site, its in mediation.items()}}


def share(one: Run, answer: torch.Tensor) -> float:
    return float((one.logits.argmax(-1) == answer).double().mean())


def verdict_of(clean: list[int], after: list[int]) -> str:
    return verdict(*(paired_interval(clean, after, range(len(clean)), level) for level in (0.90, 0.95)), MARGIN)


def likeness(fed: torch.Tensor, known: Known) -> dict[str, float]:
    """Return the mean cosine of two items' latents, raw and from the calibration mean, over positions, and the participation
    ratio of their variance (at the first position)."""
    cosines, n = {}, len(fed)
    for name, latents in (("raw_cosine", fed), ("centred_cosine", fed - known.mu_t)):
        unit = F.normalize(latents.double(), dim=-1).transpose(0, 1)  # [K, n, hidden]
        cosines[name] = float((unit.sum(1).square().sum(-1) - n).mean() / (n * (n - 1)))
    spectrum = torch.linalg.eigvalsh(fed[:, 0].double().T.cov())
    return {**cosines, "participation_ratio": float(spectrum.sum().square() / spectrum.square().sum())}


def agrees(found: str | float | None, expected: str | tuple[str, ...] | float) -> bool:
    """Return whether a finding is the expected verdict, one of them, or within 0.02 of the expected proportion."""
    if isinstance(expected, (str, tuple)):
        return found in ((expected,) if isinstance(expected, str) else expected)
    return found is not None and abs(found - expected) < 0.02


def selftest(full: bool = False) -> dict:
    """Return {"masks", "toys": {name: columns, verdicts, "expected", "found", "ok"}, "ok", "seconds"}, ready for JSON.

    The quick form trains QUICK, the full one all TOYS. The model is the CPU's, in float32, and the global seed of torch and its
    default dtype are as before afterwards.
    """
    began, toys = time.monotonic(), {}
    masks = check_masks()
    log(f"masks: {'as expected' if masks['ok'] else 'WRONG: ' + ', '.join(masks['wrong'])}")
    for name in TOYS if full else QUICK:
        toy, expected = train_toy(name, STEPS[not full]), TOYS[name][-1]
        result = measure(toy, N_ITEMS[not full])
        wrong = [key for key, value in expected.items() if not agrees(result["found"][key], value)]
        toys[name] = {**result, "expected": expected, "wrong": wrong, "ok": not wrong}
        said = "as expected" if not wrong else f"WRONG: {', '.join(wrong)}"
        log(f"{name}: {said} | clean {100 * result['columns']['clean']:.1f} % | "
            + " | ".join(f"{key} {value}" for key, value in result["found"].items()))
    return {"masks": masks, "toys": toys, "ok": masks["ok"] and all(toy["ok"] for toy in toys.values()),
            "seconds": round(time.monotonic() - began, 1)}
