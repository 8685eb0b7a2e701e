"""The catalogue of interventions on latents: one function a condition, from what is known of an item to what
is done to it.

    site fed    the vector that a latent step feeds; the position still attends to the image and writes its
    own keys
    site slot   what every layer reads at the latent positions: the position speaks for a donor
    site edge   what tokens after the latents may attend to
    site none   the latents are left out, or the prompt is another: do(X)

A condition is named as it is asked for: `tau`, or with its number, `add_noise:0.3`. It returns an
Intervention, or raises NotPossible with the reason. A condition on another prompt names it (`prompt`): "blank" (grey images of
the same size), "counterfactual" (the item's own answer-changing edit), "other_image", "other_question"
(another item's), "masked" (the item's region greyed). Worlds of a mediation keep the words before the latents
as they were (`forced_prefix`). Sweeps over a number are listed by `map_conditions` and drawn by
`utils.intervene.sweeps`.
"""
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from utils.intervene.latent_case import Case, NotPossible, latent, seeded, within
from utils.jsonl import DataError
from utils.latent_families import Generation, Intervention, last_latent

NEAR_ZERO = 1e-3  # of the mean latent: the "constant near 0" of the paper's Mirage arm
WINDOWS = 8  # of layers in a map, at most
# do(X), everything said anew: a blank image, the item's answer-changing edit, another item's image or
# question, the region grey
DO_X = {"x_blank": "blank", "x_counterfactual": "counterfactual", "x_image": "other_image",
        "x_question": "other_question",
        "x_region": "masked"}
CONTROLS = ("identity", "replay")  # change nothing: outside the family that Holm's correction spans


@dataclass(frozen=True)
class Condition:
    """`make(case, number)` gives the arm; `default` is the number if the condition takes one, read by `parse`
    (ValueError); see the module for the rest."""

    name: str
    site: str
    make: Callable[[Case, object], Intervention]
    default: object = None
    prompt: str = "own"
    needs: tuple[str, ...] = ()  # kinds of donors
    parse: Callable[[str], object] = float


CONDITIONS: dict[str, Condition] = {}


def condition(site: str, **more) -> Callable:
    def register(make: Callable) -> Callable:
        CONDITIONS[make.__name__] = Condition(make.__name__, site, make, **more)
        return make
    return register


def find_condition(name: str) -> tuple[Condition, object]:
    """Return the condition of a name such as "tau" or "add_noise:0.3", and its number; ValueError says what
    is wrong."""
    base, colon, number = name.partition(":")
    if base not in CONDITIONS:
        raise ValueError(f"{name!r}, expected some of {' '.join(CONDITIONS)}")
    found = CONDITIONS[base]
    if colon and found.default is None:
        raise ValueError(f"{name!r}: {base} takes no number")
    return found, found.parse(number) if colon else found.default


def parse_place(word: str) -> tuple[range, range]:
    """Return the positions and the layers of a place in a map, from 0: "2/4" is one of each, "0-3/4-7" four
    of each."""
    ends = [part.split("-") for part in word.split("/")]
    if len(ends) != 2 or any(len(pair) > 2 or not all(end.isdecimal() for end in pair) for pair in ends):
        raise ValueError(
            f"{word!r}, expected a position or a range of them, a slash and the same of layers: 2/4-7")
    place = tuple(range(int(pair[0]), int(pair[-1]) + 1) for pair in ends)
    if not all(place):
        raise ValueError(f"{word!r}, expected ranges that rise")
    return place


def fed(vector: Callable[[torch.Tensor, int, int], torch.Tensor]) -> Intervention:
    """Return the arm that feeds vector(z, segment, step), computed in float32 on the CPU."""
    def feed(z: torch.Tensor, segment: int, step: int) -> torch.Tensor:
        return vector(z.float().cpu(), segment, step).to(z.device, z.dtype)
    return Intervention(feed=feed)


def everywhere(vector: torch.Tensor) -> Intervention:
    return fed(lambda z, segment, step: vector)


def fed_from(row: Generation) -> Intervention:
    """Return the arm that feeds a captured run's latents at the same positions, as far as it has them."""
    return fed(lambda z, segment, step: latent(row, segment, step) if within(row, segment, step) else z)


def slot(row: Generation) -> Intervention:
    """Return the arm that puts a captured run's layer inputs at the same latent positions, as far as it has
    them."""
    def states(segment: int, step: int) -> torch.Tensor | None:
        place = sum(s.size for s in row.segments[:segment]) + step
        # the last may be unread
        return row.slots[place] if within(row, segment, step) and place < len(row.slots) else None
    return Intervention(slot=states)


def forced_prefix(clean: Generation, pick: Callable[[torch.Tensor, int], int],
                  arm: Intervention = Intervention()) -> Intervention:
    """Return an arm that also says what the clean run said, up to the end of its last segment, and then goes
    on by `pick`.

    Where the clean run itself ended the segment before its K latents, that end is said too.
    """
    ended = bool(clean.segments) and clean.segments[-1].closed_by == "end"
    ids = clean.ids[:last_latent(clean) + ended]
    return replace(arm, choose=lambda logits, n: ids[n] if n < len(ids) else pick(logits, n))


# ------------------------------------------------------------------------------------ controls
@condition("fed")
def identity(case, number):
    """The latent itself, through the hook: must reproduce the clean ids."""
    return fed(lambda z, segment, step: z)


@condition("fed")
def replay(case, number):
    """The latents captured in the clean run."""
    return fed_from(case.clean)


# ------------------------------------------------------------------------------------ fed: content taken away
@condition("fed")
def tau(case, number):
    """One calibration latent, the nearest to their mean, for all samples and positions: the paper's Monet
    arm."""
    return everywhere(case.calibrated().tau)


@condition("fed")
def tau_mean(case, number):
    """The mean of the calibration latents everywhere."""
    return everywhere(case.calibrated().mu)


@condition("fed")
def tau_first(case, number):
    """The first latent of the calibration items everywhere."""
    return everywhere(case.calibrated().first)


@condition("fed")
def mean_t(case, number):
    """The mean at each position: the position's mark stays."""
    mean = case.means()
    return fed(lambda z, segment, step: mean(step))


@condition("fed")
def near_zero(case, number):
    """0.001 of the mean latent: the paper's Mirage arm; read it beside the share of degenerate replies."""
    return everywhere(NEAR_ZERO * case.calibrated().mu)


@condition("fed", default=1.0)
def add_noise(case, number):
    """z + number * rms(z) * N(0, I)."""
    return fed(lambda z, segment, step: z + number * z.norm() / len(z)**0.5 * case.noise(len(z), segment,
                                                                                         step))


@condition("fed")
def norm_noise(case, number):
    """N(0, I) at the norm of z (the paper's "noise")."""
    def vector(z, segment, step):
        eps = case.noise(len(z), segment, step)
        return z.norm() * eps / eps.norm()
    return fed(vector)


@condition("fed")
def moment_noise(case, number):
    """Normal with each position's mean and standard deviations: in distribution, coordinate by coordinate."""
    known = case.calibrated()

    def vector(z, segment, step):
        t = min(step, len(known.mu_t) - 1)
        return known.mu_t[t] + known.sigma_t[t] * case.noise(len(z), segment, step)
    return fed(vector)


@condition("fed", default=0.5)
def mix(case, number):
    """(1 - number) z + number tau: whether the effect grows with the dose."""
    known = case.calibrated()
    return fed(lambda z, segment, step: (1 - number) * z + number * known.tau)


@condition("fed")
def dummy_pad(case, number):
    """The embedding of the latent pad: as many tokens, nothing fed back."""
    return everywhere(case.pad.float().cpu())


# ------------------------------------------------------------------------------------ fed: order and position
@condition("fed")
def first_repeat(case, number):
    """The segment's first latent at all its positions."""
    return fed(lambda z, segment, step: latent(case.clean, segment, 0) if within(case.clean, segment, 0)
               else z)


@condition("fed")
def permute(case, number):
    """The clean latents of a segment, each moved on by one position."""
    if all(segment.size < 2 for segment in case.clean.segments):
        raise NotPossible("one_latent")

    def vector(z, segment, step):
        if not within(case.clean, segment, step):
            return z
        return latent(case.clean, segment, (step + 1) % case.clean.segments[segment].size)
    return fed(vector)


@condition("fed", default=0)
def keep_one(case, number):
    """The position's mean everywhere but at position `number` (from 0)."""
    case.need_position(number)
    mean = case.means()
    return fed(lambda z, segment, step: z if step == number else mean(step))


@condition("fed", default=0)
def drop_one(case, number):
    """The position's mean at position `number` (from 0) alone."""
    case.need_position(number)
    mean = case.means()
    return fed(lambda z, segment, step: mean(step) if step == number else z)


@condition("fed", default=1)
def top_k(case, number):
    """The position's mean everywhere but at the `number` positions of each segment that the answer's stem
    attends to most."""
    if case.attention is None:
        raise NotPossible("no_attention")
    mass = iter(case.attention)
    ranked = [sorted(range(segment.size), key=[next(mass) for _ in range(segment.size)].__getitem__,
                     reverse=True)
              for segment in case.clean.segments]
    return keep_ranked(case, ranked, number)


@condition("fed", default=1)
def top_random(case, number):
    """As top_k by a random ranking: what any `number` positions keep, the control of top_k."""
    ranked = [torch.randperm(segment.size, generator=seeded("rank", case.seed, case.item["id"], n)).tolist()
              for n, segment in enumerate(case.clean.segments)]
    return keep_ranked(case, ranked, number)


def keep_ranked(case: Case, ranked: list[list[int]], number: float) -> Intervention:
    """Return the arm that feeds the position's mean but at the first `number` positions of each segment's
    ranking."""
    case.need_position(number)  # else all are kept
    mean = case.means()
    kept = {(segment, step) for segment, steps in enumerate(ranked) for step in steps[:int(number)]}
    return fed(lambda z, segment, step: z if (segment, step) in kept else mean(step))


# ------------------------------------------------------------------------------- donors, fed and in the slots
@condition("fed", needs=("random",))
def swap_random(case, number):
    """The latents of another item, with another right answer where there is one."""
    return fed_from(case.donor("random"))


@condition("fed", needs=("question",))
def swap_question(case, number):
    """The latents of an item with the same question about another image."""
    return fed_from(case.donor("question"))


@condition("fed", needs=("image",))
def swap_image(case, number):
    """The latents of an item with another question about the same image."""
    return fed_from(case.donor("image"))


@condition("fed", needs=("counterfactual",))
def swap_counterfactual(case, number):
    """The latents under the item's own answer-changing edit: does the answer follow them?"""
    return fed_from(case.donor("counterfactual"))


@condition("fed", needs=("blank",))
def swap_blank(case, number):
    """World Y(x, Z(x')): the latents that a blank image brings about."""
    return forced_prefix(case.clean, case.pick, fed_from(case.donor("blank")))


@condition("slot")
def slot_mean_t(case, number):
    """The mean layer inputs of each position."""
    known = case.calibrated()
    return Intervention(slot=lambda segment, step: known.slots_t[min(step, len(known.slots_t) - 1)])


@condition("slot", needs=("random",))
def slot_swap_random(case, number):
    return slot(case.donor("random"))


@condition("slot", default=(range(1), range(1)), needs=("random",), parse=parse_place)
def slot_swap_at(case, place):
    """`slot_swap_random` at some positions and layers alone, "2/4-7"; what the layers above read follows from
    it."""
    steps, layers = place
    donor = case.donor("random")
    case.need_position(steps[0])
    if layers[-1] >= len(donor.slots[0]):
        raise DataError(
            f"slot_swap_at: layer {layers[-1]} of a model with {len(donor.slots[0])} layers, counted from 0")
    whole = slot(donor).slot

    def states(segment: int, step: int) -> list[torch.Tensor | None] | None:
        found = whole(segment, step) if step in steps else None
        return found if found is None else [state if n in layers else None for n, state in enumerate(found)]
    return Intervention(slot=states)


@condition("slot", needs=("counterfactual",))
def slot_swap_counterfactual(case, number):
    return slot(case.donor("counterfactual"))


@condition("slot", needs=("blank",))
def slot_swap_blank(case, number):
    """World Y(x, Z(x')) at the slots."""
    return forced_prefix(case.clean, case.pick, slot(case.donor("blank")))


# ------------------------------------------------------------------------------------ edges
@condition("edge")
def cut_latent(case, number):
    """What follows the latents cannot see them."""
    return Intervention(hide=("latents",))


@condition("edge")
def cut_image_after(case, number):
    """What follows the latents cannot see the image."""
    return Intervention(hide=("images",))


@condition("edge")
def cut_both(case, number):
    """Neither: the positive control, which must move the answer of any model that looks."""
    return Intervention(hide=("latents", "images"))


# ------------------------------------------------------------------------------------ no latents
@condition("none")
def markers_only(case, number):
    """A segment of no latents: start, end."""
    return Intervention(spec=replace(case.spec, size=0, overwrite_start=False))


@condition("none", default=1)
def keep_first(case, number):
    """The first `number` latents of each segment, then its end: when the answer is settled (the text's
    `truncate_N`)."""
    return Intervention(spec=replace(case.spec, size=int(number)))


@condition("none")
def no_segment(case, number):
    """The start token cannot be said: another policy rather than do(Z), for the words change too."""
    def choose(logits, n):
        return case.pick(logits.index_fill(0, torch.tensor([case.start_id], device=logits.device),
                                           -torch.inf), n)
    return Intervention(choose=choose)


# ------------------------------------------------------------------------------------ other prompts
@condition("none", prompt="blank")
def blank(case, number):
    """World Y(x', Z(x')): a blank image, and the latents that it brings about, after the item's own words."""
    return forced_prefix(case.clean, case.pick)


@condition("fed", prompt="blank")
def blank_x(case, number):
    """World Y(x', Z(x)): a blank image and the item's own latents: are they enough?"""
    return forced_prefix(case.clean, case.pick, replay(case, None))


@condition("slot", prompt="blank")
def slot_blank_x(case, number):
    """World Y(x', Z(x)) at the slots."""
    return forced_prefix(case.clean, case.pick, slot(case.clean))


CONDITIONS |= {name: Condition(name, "none", lambda case, number: Intervention(), prompt=kind) for name,
               kind in DO_X.items()}


# the paper's arms: Monet (Fig. 2c, App. B Table 4) is tau; Mirage tau, + noise, noise, near zero
PRESET_CONDITIONS = {
    "paper": ["identity", "tau", "add_noise", "norm_noise", "near_zero"],
    "full": [name for name, one in CONDITIONS.items() if name in ("add_noise", "mix") or one.default is None
             and name != "x_region"]}


def map_conditions(size: int, n_layers: int) -> list[str]:
    """Return the sweeps that F8 and F9 draw, for `size` latents a segment: a map of positions by windows of
    layers, each position kept and dropped alone, the first few by rank kept, the first few decoded at all,
    and two doses; with what their curves begin and end with."""
    width = -(-n_layers // WINDOWS)
    windows = [(low, min(low + width, n_layers) - 1) for low in range(0, n_layers, width)]
    return ["identity", "mean_t", "slot_swap_random",
            *(f"slot_swap_at:{step}/{low}-{high}" for step in range(size) for low, high in windows),
            *(f"{name}:{step}" for name in ("keep_one", "drop_one") for step in range(size)),
            *(f"{name}:{k}" for name in ("top_k", "top_random") for k in range(1, size)),
            "markers_only", *(f"keep_first:{k}" for k in range(1, size)),
            *(f"mix:{dose}" for dose in (0.25, 0.5, 0.75, 1)),
            *(f"add_noise:{dose}" for dose in (0.1, 0.3, 1, 3))]
