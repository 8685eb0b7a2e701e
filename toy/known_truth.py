"""The interventions of stage 5 on models whose truth is known: conditions, intervals, verdicts, mediation.

    python -m toy.known_truth             the masks and three trained toys; under 2 minutes on a CPU
    python -m toy.known_truth --full      all six toys, on more items

Prints  one line per toy on stderr; on stdout one JSON object; exit code 0 if all is as expected, else 2

A toy is a tiny real Qwen2.5-VL whose attention masks decide how the image can reach the answer. The prompt
is `[bos vs I I I I ve | Q cell | start z1 z2 end]`, the image one flat colour, the answer is read at `end`.
No weights can use a path that the mask forbids: for random weights some differences are exactly 0, and for
trained ones every verdict is known beforehand:

    open     causal attention: image and latents both reach the answer
    bypass   `end` cannot see the latents: they are irrelevant at every site
    in       only `start` sees the image, and only `start` sees itself: only the fed vectors carry the image
    slot     as `in`, but the latent positions read the image too: they are needed, fed vectors need not be
"""
import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from utils.cli import cli, log
from utils.decode import layer_inputs
from utils.intervene.latent_case import Calibration, Case
from utils.intervene.latent_conditions import find_condition
from utils.intervene.mediation import mediate
from utils.latent_families import PRESETS, Generation, Intervention, Segment
from utils.stats import paired_interval, robust_mean, verdict

COLORS = {"red": (230, 30, 30), "green": (20, 160, 60), "blue": (30, 60, 230), "yellow": (230, 220, 40),
          "purple": (140, 40, 170), "cyan": (40, 200, 220), "black": (15, 15, 15), "white": (240, 240, 240)}
LAYOUT = ("bos", "vs", "I", "I", "I", "I", "ve", "Q", "cell", "start", "z", "z", "end")
VOCABULARY = {name: i for i, name in enumerate((*COLORS, *dict.fromkeys(LAYOUT)))}  # the answers come first
MASKS = ("open", "bypass", "in", "slot")
IMAGE = [i for i, name in enumerate(LAYOUT) if name in ("I", "ve")]  # `ve` has read the image
LATENTS = [i for i, name in enumerate(LAYOUT) if name == "z"]
START, END = LAYOUT.index("start"), LAYOUT.index("end")
N_PROMPT, N_LATENTS = START + 1, len(LATENTS)
PATCH, GRID = 14, 4  # pixels per side of a patch, patches per side of the picture: 2 x 2 tokens after merging
SHADE = 0.03  # standard deviation of each item's own shade, as a share of the full range
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2}
VISION_SIZES = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64,
                "fullatt_block_indexes": [0]}
SPREAD = 0.08  # standard deviation of the first weights: 0.02, the release's, learns far slower at this width
BATCH, RATE = 64, 3e-3  # of training

MARGIN = 0.05  # of accuracy; of the answer's negative log-likelihood in nats
NON_ZERO = 0.01  # of a logit: allowed differences are larger in these models (the smallest measured is 0.07)
REMOVALS = ("tau", "tau_mean", "moment_noise", "norm_noise", "near_zero")  # remove the content of fed vectors
CONDITIONS = (*REMOVALS, "swap_random", "slot_swap_random", "cut_latent")
ZEROS = {  # columns of `compare` that are exactly 0 under each mask; all others exceed NON_ZERO
    "open": {"replay", "own_slots"},
    "bypass": {"replay", "own_slots", "tau", "fed_swap", "slot_swap", "cut_latent"},
    "in": {"replay", "own_slots", "images_under_tau", "fed_swap_donor", "other_image", "slot_swap_donor"},
    "slot": {"replay", "own_slots", "slot_swap_donor"}}
QUICK = ("in", "bypass", "slot_random")
STEPS = {True: 80, False: 250}  # of training, quick and full
N_ITEMS = {True: 256, False: 512}


@dataclass(frozen=True)
class Plan:
    """How a toy is made and the findings expected: a verdict or any of several, proportions mediated."""

    mask: str
    expected: dict[str, str | tuple[str, ...] | float]
    shared: float = 0  # length of a direction that all latents share
    random: bool = False  # whether the fed vectors are random in training


NEEDED = {"fed": "effect", "slot": "effect", "edge": "effect", "pm_fed": 1, "pm_slot": 1}
UNUSED = {"fed": "equivalent", "slot": "equivalent", "edge": "equivalent", "pm_fed": 0, "pm_slot": 0}
TOYS = {
    "in": Plan("in", NEEDED),
    "bypass": Plan("bypass", UNUSED),
    "slot_random": Plan("slot", NEEDED | {"fed": "equivalent", "pm_fed": 0}, random=True),
    "in_shared": Plan("in", NEEDED, shared=45),
    # the fed vectors may come to matter or not
    "slot": Plan("slot", {"slot": "effect", "edge": "effect", "pm_slot": 1}),
    # no mask forbids the latents: the score keeps a trace of them
    "open": Plan("open", {"fed": "equivalent", "slot": "equivalent", "edge": "equivalent",
                          "nll": ("equivalent", "small effect inside the margin")})}


# ---- models and items
@dataclass
class Toy:
    """A model, the name of its mask, and a vector [hidden] (or 0) added to every latent."""

    model: Qwen2_5_VLForConditionalGeneration
    mask: str
    shared: torch.Tensor | float = 0.0


@dataclass
class Run:
    """logits [B, colours] at `end`; latents and fed [B, K, hidden]; slots [B, K, layers, hidden]."""

    logits: torch.Tensor
    latents: torch.Tensor
    fed: torch.Tensor
    slots: torch.Tensor

    def rows(self) -> list[Generation]:
        """Return the runs as the decoding loop would."""
        return [Generation([VOCABULARY["z"]] * N_LATENTS, segments=[Segment(0, N_LATENTS, "limit")], fed=fed,
                           slots=list(slots)) for fed, slots in zip(self.fed, self.slots)]


@contextmanager
def reproducible(seed: int) -> Iterator[None]:
    """Seed torch on the CPU, compute in float32 with gradients; restore both at the end."""
    dtype = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)


def make_toy(mask: str, shared: float = 0.0) -> Toy:
    """Return a model with random weights; `shared`: length of the latents' common direction."""
    if mask not in MASKS:
        raise ValueError(f"mask {mask!r}, expected one of {' '.join(MASKS)}")
    head = SIZES["hidden_size"] // SIZES["num_attention_heads"]
    rope = {"rope_type": "default", "rope_theta": 1e6,
            "mrope_section": [head // 8, *[(head // 2 - head // 8) // 2] * 2]}
    config = Qwen2_5_VLConfig(
        text_config={**SIZES, "vocab_size": len(VOCABULARY), "initializer_range": SPREAD,
                     "bos_token_id": VOCABULARY["bos"], "eos_token_id": VOCABULARY["end"],
                     "pad_token_id": VOCABULARY["bos"], "rope_parameters": rope},
        vision_config={**VISION_SIZES, "initializer_range": SPREAD},
        image_token_id=VOCABULARY["I"], vision_start_token_id=VOCABULARY["vs"],
        vision_end_token_id=VOCABULARY["ve"],
        video_token_id=len(VOCABULARY), tie_word_embeddings=False)  # no video: an id that no prompt holds
    direction = torch.randn(SIZES["hidden_size"])
    return Toy(Qwen2_5_VLForConditionalGeneration(config).eval(), mask,
               shared * direction / direction.norm() if shared else 0.0)


def draw_items(n: int, generator: torch.Generator) -> torch.Tensor:
    """Return pictures [n, 16 patches, pixels] of the eight colours in turn, each in its own shade."""
    colors = torch.tensor(list(COLORS.values()))[torch.arange(n) % len(COLORS)] / 255 - 0.5  # [n, 3]
    colors = 2 * (colors + SHADE * torch.randn(n, 3, generator=generator))
    # channel, frame, row, column
    return colors.repeat_interleave(2 * PATCH**2, dim=1)[:, None].repeat(1, GRID**2, 1)


def answers(n: int) -> torch.Tensor:
    return torch.arange(n) % len(COLORS)


def allowed(mask: str, cut: bool = False) -> torch.Tensor:
    """Return which column each row may see, [L, L] bool; `cut`: `end` sees no latents."""
    see = torch.ones(len(LAYOUT), len(LAYOUT)).tril().bool()
    if mask in ("in", "slot"):
        see[START + 1:, START] = False
        for row in (LAYOUT.index("Q"), LAYOUT.index("cell"), END, *(LATENTS if mask == "in" else ())):
            see[row, IMAGE] = False
    if mask == "bypass" or cut:
        see[END, LATENTS] = False
    return see


def additive(see: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the mask [1, 1, rows, columns] of 0 and the lowest float."""
    mask = torch.zeros(see.shape).masked_fill(~see, torch.finfo(torch.float32).min)
    return {"full_attention": mask[None, None]}


def positions(n: int, shift: int = 0) -> torch.Tensor:
    """Return M-RoPE positions [3, n, L]: the picture's tokens share one time and differ in row and column."""
    image, side = LAYOUT.index("I"), GRID // 2
    before, grid, after = torch.arange(image), torch.arange(side), torch.arange(len(LAYOUT) - image - side**2)
    time, row = torch.zeros(side**2, dtype=torch.long), grid.repeat_interleave(side)
    axes = [torch.cat([before, image + axis, image + side + after])
            for axis in (time, row, grid.repeat(side))]
    return shift + torch.stack(axes)[:, None].expand(3, n, -1)


def run(toy: Toy, pixels: torch.Tensor, feed: Callable[[torch.Tensor, int], torch.Tensor] | None = None,
        slots: torch.Tensor | None = None, cut: bool = False, shift: int = 0) -> Run:
    """Read the pictures up to `start`, then two latent steps and `end`, one at a time over the cache. feed(z
    [B, hidden], step) acts at site `fed`, slots [B, K, layers, hidden] at `slot`, `cut` at `edge`; `shift`
    moves all positions. Equal inputs give equal bits."""
    n, model, see, places = len(pixels), toy.model, allowed(toy.mask, cut), positions(len(pixels), shift)
    ids = torch.tensor([VOCABULARY[name] for name in LAYOUT])
    out = model.model(input_ids=ids[:N_PROMPT].expand(n, -1), pixel_values=pixels.flatten(0, 1),
                      image_grid_thw=torch.tensor([[1, GRID, GRID]]).expand(n, -1), use_cache=True,
                      attention_mask=additive(see[:N_PROMPT, :N_PROMPT]), position_ids=places[..., :N_PROMPT])
    latents, fed, read = [], [], []
    for step, place in enumerate((*LATENTS, END)):
        if place == END:
            vector, put, seen = model.get_input_embeddings()(ids[END]).expand(n, -1), {}, None
        else:
            latents.append(out.last_hidden_state[:, -1] + toy.shared)
            vector = feed(latents[-1], step) if feed else latents[-1]
            fed.append(vector)
            put, seen = {} if slots is None else {i: slots[i, step] for i in range(n)}, []
        with layer_inputs(model, put, seen):
            out = model.model(inputs_embeds=vector[:, None], position_ids=places[..., place:place + 1],
                              attention_mask=additive(see[place:place + 1, :place + 1]),
                              past_key_values=out.past_key_values, use_cache=True)
        if seen:
            read.append(torch.stack(seen, dim=1))
    return Run(model.lm_head(out.last_hidden_state[:, -1])[:, :len(COLORS)], torch.stack(latents, 1),
               torch.stack(fed, 1), torch.stack(read, 1))


@torch.no_grad()
def run_interventions(toy: Toy, pixels: torch.Tensor, interventions: list[Intervention]) -> Run:
    """Return the run with one intervention per row; all hide the latents, or none does."""
    cut = {each.hide == ("latents",) for each in interventions}
    if len(cut) != 1 or any(each.hide not in ((), ("latents",)) or each.choose or each.spec
                            for each in interventions):
        raise ValueError("expected interventions that neither choose ids, change the family, nor hide the "
                         "latents in a part of the rows")
    slots = None
    if interventions[0].slot:
        slots = torch.stack([torch.stack([each.slot(0, step) for step in range(N_LATENTS)])
                             for each in interventions])

    def feed(z: torch.Tensor, step: int) -> torch.Tensor:
        return torch.stack([each.feed(row, 0, step) if each.feed else row
                            for each, row in zip(interventions, z)])

    return run(toy, pixels, feed, slots, cut.pop())


def randomised(z: torch.Tensor, step: int) -> torch.Tensor:
    """Return vectors that carry nothing of the item: mixtures of other rows' latents, or normal noise of up
    to twice their length. A model trained on them answers whatever is fed."""
    n, others = len(z), z.detach()[torch.randint(len(z), (len(z),))]
    # up to the mean of all
    mixed = others + torch.rand(n, 1).round() * torch.rand(n, 1) * (z.detach().mean(0) - others)
    noise = torch.randn_like(z) * 2 * torch.rand(n, 1) * others.norm(dim=1, keepdim=True) / z.shape[1]**0.5
    return torch.where(torch.rand(n, 1) < 0.5, mixed, noise)


def train_toy(name: str, steps: int) -> Toy:
    """Return a toy trained to name the colour, gradients going back through the latents."""
    plan, began = TOYS[name], time.monotonic()
    with reproducible(0):
        toy = make_toy(plan.mask, plan.shared)
        optimizer = torch.optim.AdamW(toy.model.parameters(), lr=RATE)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
        generator, gold = torch.Generator().manual_seed(torch.initial_seed()), answers(BATCH)
        for _ in range(steps):
            seen = run(toy, draw_items(BATCH, generator), randomised if plan.random else None)
            loss = F.cross_entropy(seen.logits, gold)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(toy.model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    log(f"{name}: {steps} steps of {BATCH} in {time.monotonic() - began:.1f} s, last loss {loss:.4f} nats")
    return toy


# ---- masks
def fed_of(source: Run) -> Callable[[torch.Tensor, int], torch.Tensor]:
    return lambda z, step: source.fed[:, step]


@torch.no_grad()
def compare(toy: Toy, pixels: torch.Tensor, other: torch.Tensor) -> dict[str, float]:
    """Return the largest |difference of a logit| between pairs of runs of x and x'."""
    clean, donor = run(toy, pixels), run(toy, other)
    fixed = draw_items(len(pixels), torch.Generator().manual_seed(0))[:1].expand_as(pixels)
    tau = fed_of(run(toy, fixed))  # the latents of one picture for all

    swapped, swapped_slots = run(toy, pixels, fed_of(donor)), run(toy, pixels, slots=donor.slots)
    pairs = {"replay": (run(toy, pixels, fed_of(clean)), clean),
             "own_slots": (run(toy, pixels, slots=clean.slots), clean), "TE": (clean, donor),
             "tau": (run(toy, pixels, tau), clean),
             "images_under_tau": (run(toy, pixels, tau), run(toy, other, tau)),
             "fed_swap": (swapped, clean), "fed_swap_donor": (swapped, donor),
             "other_image": (run(toy, other, fed_of(clean)), clean),  # Y(x', Z(x)) against Y(x, Z(x))
             "slot_swap": (swapped_slots, clean), "slot_swap_donor": (swapped_slots, donor),
             "cut_latent": (run(toy, pixels, cut=True), clean)}
    return {name: float((a.logits - b.logits).abs().max()) for name, (a, b) in pairs.items()}


def check_masks(seed: int = 0) -> dict:
    """Return `compare` of each mask and the cells that differ from ZEROS."""
    columns = {}
    with reproducible(seed):
        for mask in MASKS:
            pixels = draw_items(8, torch.Generator().manual_seed(seed))
            columns[mask] = compare(make_toy(mask), pixels, pixels.roll(1, 0))
    wrong = [f"{mask} {name} {value:.3g}" for mask, cells in columns.items() for name, value in cells.items()
             if not (value == 0 if name in ZEROS[mask] else value > NON_ZERO)]
    return {"columns": columns, "wrong": wrong, "ok": not wrong}


# ---- trained toys
def make_interventions(name: str, runs: Run, donors: Run, known: Calibration | None) -> list[Intervention]:
    """Return a condition for each item, the donor being the same row of another run."""
    condition, number = find_condition(name)
    pad = torch.zeros(runs.fed.shape[-1])
    return [condition.make(Case({"id": str(i)}, row, PRESETS["mirage"], pad, VOCABULARY["start"], 0, known,
                                {"random": donor}), number)
            for i, (row, donor) in enumerate(zip(runs.rows(), donors.rows()))]


def measure(toy: Toy, n: int) -> dict:
    """Return columns, verdicts and proportions mediated; donors show another colour."""
    generator = torch.Generator().manual_seed(1)
    calibration, pixels, shades = (draw_items(n, generator) for _ in range(3))
    # eight colours in turn: never the same
    other, gold, donor_gold = shades.roll(3, 0), answers(n), answers(n).roll(3)
    with torch.no_grad():
        known = Calibration.from_runs(run(toy, calibration).rows())
        clean, donor = run(toy, pixels), run(toy, other)
    runs = {name: run_interventions(toy, pixels, make_interventions(name, clean, donor, known))
            for name in CONDITIONS}
    back = {  # Y(x', Z(x)) at both sites
        "fed": run_interventions(toy, other, make_interventions("replay", clean, donor, known)),
        "slot": run_interventions(toy, other, make_interventions("slot_swap_random", donor, clean, known))}
    right = {name: (each.logits.argmax(-1) == gold).int().tolist()
             for name, each in {"clean": clean, "donor": donor, **runs}.items()}
    verdicts = {name: verdict(*(paired_interval(right["clean"], right[name], range(n), level)
                                for level in (0.90, 0.95)), MARGIN) for name in CONDITIONS}
    found, mediation = {}, {}
    for site, name in (("fed", "swap_random"), ("slot", "slot_swap_random")):
        crossed = (back[site].logits.argmax(-1) == gold).int().tolist()
        parts = mediate(right["clean"], right[name], crossed, right["donor"], range(n), binary=True)
        mediation[site] = {part: parts[part] for part in ("TE", "NIE", "NIE0", "proportion_mediated")}
        found[f"pm_{site}"] = parts["proportion_mediated"]["value"]
    at_fed = {verdicts[name] for name in (*REMOVALS, "swap_random")}
    nll, before = (F.cross_entropy(each.logits, gold, reduction="none") for each in (runs["tau_mean"], clean))
    bounds = [robust_mean((nll - before).tolist(), range(n), level) for level in (0.90, 0.95)]
    found |= {"fed": at_fed.pop() if len(at_fed) == 1 else "mixed", "slot": verdicts["slot_swap_random"],
              "edge": verdicts["cut_latent"], "nll": verdict(bounds[0][1:], bounds[1][1:], MARGIN)}

    def share(each: Run, answer: torch.Tensor) -> float:
        return float((each.logits.argmax(-1) == answer).double().mean())

    columns = {name: sum(values) / n for name, values in right.items() if name != "donor"}
    columns |= {f"{name}_donor": share(runs[name], donor_gold)
                for name in ("swap_random", "slot_swap_random")}
    columns |= {"other_image_keeps": share(back["fed"], gold), "delta_nll_tau_mean": bounds[0][0],
                **likeness(clean.fed, known)}
    return {"n": n, "columns": columns, "verdicts": verdicts, "found": found, "mediation": mediation}


def likeness(fed: torch.Tensor, known: Calibration) -> dict[str, float]:
    """Return mean cosines of two items' latents and the participation ratio."""
    cosines, n = {}, len(fed)
    for name, latents in (("raw_cosine", fed), ("centred_cosine", fed - known.mu_t)):
        unit = F.normalize(latents.double(), dim=-1).transpose(0, 1)  # [K, n, hidden]
        cosines[name] = float((unit.sum(1).square().sum(-1) - n).mean() / (n * (n - 1)))
    spectrum = torch.linalg.eigvalsh(fed[:, 0].double().T.cov())
    return {**cosines, "participation_ratio": float(spectrum.sum().square() / spectrum.square().sum())}


def agrees(found: str | float | None, expected: str | tuple[str, ...] | float) -> bool:
    if isinstance(expected, (str, tuple)):
        return found in ((expected,) if isinstance(expected, str) else expected)
    return found is not None and abs(found - expected) < 0.02


def check_toys(full: bool = False) -> dict:
    """Return the results of the masks and of QUICK or all TOYS."""
    began, toys = time.monotonic(), {}
    masks = check_masks()
    log(f"masks: {'as expected' if masks['ok'] else 'WRONG: ' + ', '.join(masks['wrong'])}")
    for name in TOYS if full else QUICK:
        toy, expected = train_toy(name, STEPS[not full]), TOYS[name].expected
        result = measure(toy, N_ITEMS[not full])
        wrong = [key for key, value in expected.items() if not agrees(result["found"][key], value)]
        toys[name] = {**result, "expected": expected, "wrong": wrong, "ok": not wrong}
        log(f"{name}: {'WRONG: ' + ', '.join(wrong) if wrong else 'as expected'} | "
            f"clean {100 * result['columns']['clean']:.1f} % | "
            + " | ".join(f"{key} {value}" for key, value in result["found"].items()))
    return {"masks": masks, "toys": toys, "ok": masks["ok"] and all(toy["ok"] for toy in toys.values()),
            "seconds": round(time.monotonic() - began, 1)}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m toy.known_truth", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="train all six toys, on more items")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    result = check_toys(parse_args(argv).full)
    print(json.dumps(result))
    return 0 if result["ok"] else 2


if __name__ == "__main__":
    raise SystemExit(cli(main))
