"""The catalogue of interventions on latents: one function per condition.

    site fed    the vector that a latent step feeds; the position still attends to the image and writes its
                own keys
    site slot   every layer's input at the latent positions: the position carries a donor's state
    site edge   what tokens after the latents may attend to
    site none   the latents are left out, or the prompt is changed: do(X)

A condition is named `tau` or, with a number, `add_noise:0.3`. Conditions on another prompt name it: "blank"
(grey images of the same size), "counterfactual" (the item's own answer-changing edit), "other_image",
"other_question" (another item's), "masked" (the item's region greyed). Worlds of a mediation keep the words
before the latents (`forced_prefix`). Conditions for sweeps are in `utils.intervene.sweeps`.
"""
from dataclasses import replace
from functools import partial

from utils.intervene.latent_case import (Case, Condition, NotPossible, declare, feed, feed_constant, feed_run,
                                         forced_prefix, has_latent, latent_at, put_slots)
from utils.intervene.sweeps import SWEEPS
from utils.latent_families import Intervention

NEAR_ZERO = 1e-3  # of the mean latent: the "constant near 0" of the paper's Mirage condition
# do(X), all words generated again under another prompt
DO_X = {"x_blank": "blank", "x_counterfactual": "counterfactual", "x_image": "other_image",
        "x_question": "other_question", "x_region": "masked"}
CONTROLS = ("identity", "replay")  # change nothing: outside the family of Holm's correction
CONDITIONS: dict[str, Condition] = {}
condition = partial(declare, CONDITIONS)


def find_condition(name: str) -> tuple[Condition, object]:
    """Return the condition of a name such as "tau" or "add_noise:0.3", and its number; ValueError for a name
    that is not in the catalogue."""
    base, colon, number = name.partition(":")
    if base not in CONDITIONS:
        raise ValueError(f"{name!r}, expected some of {' '.join(CONDITIONS)}")
    entry = CONDITIONS[base]
    if colon and entry.default is None:
        raise ValueError(f"{name!r}: {base} takes no number")
    return entry, entry.parse(number) if colon else entry.default


# ------------------------------------------------------------------------------------ controls
@condition("fed")
def identity(case: Case) -> Intervention:
    """The latent itself, through the hook: must reproduce the clean ids."""
    return feed(lambda z, segment, step: z)


@condition("fed")
def replay(case: Case) -> Intervention:
    """The latents captured in the clean run."""
    return feed_run(case.clean)


# ------------------------------------------------------------------------------------ fed: content removed
@condition("fed")
def tau(case: Case) -> Intervention:
    """One calibration latent, the nearest to their mean, at all positions of all items: the paper's Monet
    condition."""
    return feed_constant(case.calibrated().tau)


@condition("fed")
def tau_mean(case: Case) -> Intervention:
    """The mean of the calibration latents at all positions."""
    return feed_constant(case.calibrated().mu)


@condition("fed")
def tau_first(case: Case) -> Intervention:
    """The first calibration latent at all positions."""
    return feed_constant(case.calibrated().first)


@condition("fed")
def mean_t(case: Case) -> Intervention:
    """The mean of each position, which keeps what marks the position."""
    mean = case.mean_at()
    return feed(lambda z, segment, step: mean(step))


@condition("fed")
def near_zero(case: Case) -> Intervention:
    """0.001 of the mean latent: the paper's Mirage condition. Compare the share of degenerate replies."""
    return feed_constant(NEAR_ZERO * case.calibrated().mu)


@condition("fed", default=1.0)
def add_noise(case: Case, number: float) -> Intervention:
    """z + number * rms(z) * N(0, I)."""
    return feed(lambda z, segment, step:
                z + number * z.norm() / len(z)**0.5 * case.noise(len(z), segment, step))


@condition("fed")
def norm_noise(case: Case) -> Intervention:
    """N(0, I) scaled to the norm of z (the paper's "noise")."""
    def vector(z, segment, step):
        noise = case.noise(len(z), segment, step)
        return z.norm() * noise / noise.norm()
    return feed(vector)


@condition("fed")
def moment_noise(case: Case) -> Intervention:
    """Normal noise with the mean and standard deviation of each coordinate at each position."""
    calibration = case.calibrated()

    def vector(z, segment, step):
        t = min(step, len(calibration.mu_t) - 1)
        return calibration.mu_t[t] + calibration.sigma_t[t] * case.noise(len(z), segment, step)
    return feed(vector)


@condition("fed", default=0.5)
def mix(case: Case, number: float) -> Intervention:
    """(1 - number) z + number tau: whether the effect grows with the dose."""
    tau_latent = case.calibrated().tau
    return feed(lambda z, segment, step: (1 - number) * z + number * tau_latent)


@condition("fed")
def dummy_pad(case: Case) -> Intervention:
    """The embedding of the latent pad: as many tokens, but nothing fed back."""
    return feed_constant(case.pad.float().cpu())


# ------------------------------------------------------------------------------------ fed: order
@condition("fed")
def first_repeat(case: Case) -> Intervention:
    """The segment's first latent at all its positions."""
    return feed(lambda z, segment, step:
                latent_at(case.clean, segment, 0) if has_latent(case.clean, segment, 0) else z)


@condition("fed")
def permute(case: Case) -> Intervention:
    """The clean latents of a segment, rotated by one position."""
    segments = case.clean.segments
    if all(segment.size < 2 for segment in segments):
        raise NotPossible("one_latent")

    def vector(z, segment, step):
        if not has_latent(case.clean, segment, step):
            return z
        return latent_at(case.clean, segment, (step + 1) % segments[segment].size)
    return feed(vector)


# ------------------------------------------------------------------------------------ donors
@condition("fed", needs=("random",))
def swap_random(case: Case) -> Intervention:
    """The latents of another item, with another right answer where possible."""
    return feed_run(case.donor("random"))


@condition("fed", needs=("question",))
def swap_question(case: Case) -> Intervention:
    """The latents of an item with the same question about another image."""
    return feed_run(case.donor("question"))


@condition("fed", needs=("image",))
def swap_image(case: Case) -> Intervention:
    """The latents of an item with another question about the same image."""
    return feed_run(case.donor("image"))


@condition("fed", needs=("counterfactual",))
def swap_counterfactual(case: Case) -> Intervention:
    """The latents under the item's own answer-changing edit: does the answer follow them?"""
    return feed_run(case.donor("counterfactual"))


@condition("fed", needs=("blank",))
def swap_blank(case: Case) -> Intervention:
    """World Y(x, Z(x')): the latents that a blank image yields."""
    return forced_prefix(case.clean, case.pick, feed_run(case.donor("blank")))


@condition("slot")
def slot_mean_t(case: Case) -> Intervention:
    """The mean layer inputs of each position."""
    slots_t = case.calibrated().slots_t
    return Intervention(slot=lambda segment, step: slots_t[min(step, len(slots_t) - 1)])


@condition("slot", needs=("random",))
def slot_swap_random(case: Case) -> Intervention:
    """The layer inputs of another item."""
    return put_slots(case.donor("random"))


@condition("slot", needs=("counterfactual",))
def slot_swap_counterfactual(case: Case) -> Intervention:
    """The layer inputs under the item's own answer-changing edit."""
    return put_slots(case.donor("counterfactual"))


@condition("slot", needs=("blank",))
def slot_swap_blank(case: Case) -> Intervention:
    """World Y(x, Z(x')) at the slots."""
    return forced_prefix(case.clean, case.pick, put_slots(case.donor("blank")))


# ------------------------------------------------------------------------------------ edges
@condition("edge")
def cut_latent(case: Case) -> Intervention:
    """Tokens after the latents cannot attend to them."""
    return Intervention(hide=("latents",))


@condition("edge")
def cut_image_after(case: Case) -> Intervention:
    """Tokens after the latents cannot attend to the image."""
    return Intervention(hide=("images",))


@condition("edge")
def cut_both(case: Case) -> Intervention:
    """Neither: the positive control, which must move the answer of any model that uses the image."""
    return Intervention(hide=("latents", "images"))


# ------------------------------------------------------------------------------------ no latents
@condition("none")
def markers_only(case: Case) -> Intervention:
    """A segment without latents: start, end."""
    return Intervention(spec=replace(case.spec, size=0, overwrite_start=False))


@condition("none")
def no_segment(case: Case) -> Intervention:
    """The start token cannot be generated: another policy rather than do(Z), for the words change too."""
    def choose(logits, n):
        logits = logits.clone()
        logits[case.start_id] = float("-inf")
        return case.pick(logits, n)
    return Intervention(choose=choose)


# ------------------------------------------------------------------------------------ other prompts
@condition("none", prompt="blank")
def blank(case: Case) -> Intervention:
    """World Y(x', Z(x')): a blank image and the latents that it yields, after the item's own words."""
    return forced_prefix(case.clean, case.pick)


@condition("fed", prompt="blank")
def blank_x(case: Case) -> Intervention:
    """World Y(x', Z(x)): a blank image and the item's own latents: are they sufficient?"""
    return forced_prefix(case.clean, case.pick, replay(case))


@condition("slot", prompt="blank")
def slot_blank_x(case: Case) -> Intervention:
    """World Y(x', Z(x)) at the slots."""
    return forced_prefix(case.clean, case.pick, put_slots(case.clean))


CONDITIONS |= {name: Condition(name, "none", lambda case: Intervention(), prompt=kind)
               for name, kind in DO_X.items()}
# the paper's conditions: Monet (Fig. 2(c), Table 4) is tau; Mirage is tau, + noise, noise, near zero
PRESET_CONDITIONS = {
    "paper": ["identity", "tau", "add_noise", "norm_noise", "near_zero"],
    "full": [name for name in CONDITIONS if name != "x_region"]}
CONDITIONS |= SWEEPS
