"""The catalogue of interventions on latents.

    site fed    the vector that a latent step feeds; the position still attends to the image and writes its
                own keys
    site slot   every layer's input at the latent positions: the position carries a donor's state
    site edge   what tokens after the latents may attend to
    site none   the latents are left out, or the prompt is changed: do(X)

A condition is named `tau` or, with a number, `add_noise:0.3`. Conditions on another prompt name it: "blank"
(grey images of the same size), "blind" (no images), "helper" (the item's helper image in their place),
"counterfactual" (the item's own answer-changing edit), "other_image", "other_question" (another item's).
Worlds of a mediation, Y(x, Z(x')) and so on, keep the words before the latents (`forced_prefix`).

`strict` hides the image, and all but the latents that has read it, from the question, which is read again
after the latents, and from the answer. cut_image_after does not: the question's tokens have read the image.
`oracle` feeds what training aligns latents to, so that their use is seen apart from their making.

A model may imagine again after an intervention and so undo it: `again` in its record, docs/interventions.md.
"""
from dataclasses import replace
from functools import partial

from utils.intervene.latent_case import (Case, Condition, NotPossible, feed, feed_constant, feed_run,
                                         forced_prefix, has_latent, latent_at, latents_alone, markers_only,
                                         no_more_segments, put_slots)
from utils.intervene.sweeps import SWEEPS
from utils.latent_families import Intervention

NEAR_ZERO = 1e-3  # of the mean latent: the "constant near 0" of the paper's Mirage condition
# do(X), all words generated again under another prompt
DO_X = {"x_blank": "blank", "x_counterfactual": "counterfactual", "x_image": "other_image",
        "x_question": "other_question"}
CONTROLS = ("identity", "replay")  # change nothing: outside the family of Holm's correction


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


def canonical(name: str) -> str:
    """Return the one name of a condition and its number: "mix:0.50" is "mix:0.5"; ValueError as above."""
    number = find_condition(name)[1]
    base, colon, _ = name.partition(":")
    return f"{base}:{number:g}" if colon and isinstance(number, (int, float)) else name


# ---- longer builders
def mean_t(case: Case) -> Intervention:
    mean = case.mean_at()
    return feed(lambda z, segment, step: mean(step))


def add_noise(case: Case, number: float) -> Intervention:
    return feed(lambda z, segment, step:
                z + number * z.norm() / len(z)**0.5 * case.noise(len(z), segment, step))


def norm_noise(case: Case) -> Intervention:
    def vector(z, segment, step):
        noise = case.noise(len(z), segment, step)
        return z.norm() * noise / noise.norm()
    return feed(vector)


def moment_noise(case: Case) -> Intervention:
    calibration = case.calibrated()

    def vector(z, segment, step):
        t = min(step, len(calibration.mu_t) - 1)
        return calibration.mu_t[t] + calibration.sigma_t[t] * case.noise(len(z), segment, step)
    return feed(vector)


def mix(case: Case, number: float) -> Intervention:
    tau = case.calibrated().tau
    return feed(lambda z, segment, step: (1 - number) * z + number * tau)


def first_repeat(case: Case) -> Intervention:
    fed = feed(lambda z, segment, step:
               latent_at(case.clean, segment, 0) if has_latent(case.clean, segment, 0) else z)
    return replace(fed, covers=lambda segment, step: has_latent(case.clean, segment, 0))


def permute(case: Case) -> Intervention:
    segments = case.clean.segments
    if all(segment.size < 2 for segment in segments):
        raise NotPossible("one_latent")

    def vector(z, segment, step):
        if not has_latent(case.clean, segment, step):
            return z
        return latent_at(case.clean, segment, (step + 1) % segments[segment].size)
    return replace(feed(vector), covers=partial(has_latent, case.clean))


def slot_mean_t(case: Case) -> Intervention:
    slots_t = case.calibrated().slots_t
    return Intervention(slot=lambda segment, step: slots_t[min(step, len(slots_t) - 1)])


def world(case: Case, *intervention: Intervention) -> Intervention:
    """Return an intervention of a mediation: the words before the latents stay."""
    return forced_prefix(case.clean, case.pick, *intervention)


# ---- the catalogue
CONDITIONS = {
    # through the hook, the latents stay: the clean ids must come again
    "identity": Condition("fed", lambda case: feed(lambda z, segment, step: z)),
    "replay": Condition("fed", lambda case: feed_run(case.clean)),
    # content removed; tau, the calibration latent nearest to their mean, is the paper's Monet condition
    "tau": Condition("fed", lambda case: feed_constant(case.calibrated().tau)),
    "tau_mean": Condition("fed", lambda case: feed_constant(case.calibrated().mu)),
    "tau_first": Condition("fed", lambda case: feed_constant(case.calibrated().first)),
    "mean_t": Condition("fed", mean_t),  # the mean of each position keeps what marks the position
    "near_zero": Condition("fed", lambda case: feed_constant(NEAR_ZERO * case.calibrated().mu)),
    "add_noise": Condition("fed", add_noise, default=1.0),  # z + number * rms(z) * N(0, I)
    "norm_noise": Condition("fed", norm_noise),  # N(0, I) scaled to the norm of z (the paper's "noise")
    "moment_noise": Condition("fed", moment_noise),  # mean and deviation of each coordinate and position
    "mix": Condition("fed", mix, default=0.5),  # (1 - number) z + number tau: a dose
    # the embedding of the latent pad: as many tokens, but nothing fed back
    "dummy_pad": Condition("fed", lambda case: feed_constant(case.pad.float().cpu())),
    # order: a segment's first latent at all its positions; its latents rotated by one position
    "first_repeat": Condition("fed", first_repeat),
    "permute": Condition("fed", permute),
    # donors: any item, one with the same question or the same image, the item's own edit, its blank image
    **{f"swap_{kind}": Condition("fed", lambda case, kind=kind: feed_run(case.donor(kind)), needs=(kind,))
       for kind in ("random", "question", "image", "counterfactual")},
    "swap_blank": Condition("fed", lambda case: world(case, feed_run(case.donor("blank"))), needs=("blank",)),
    # what training would have taught: the helper image's features, or its run's states
    "oracle": Condition("fed", lambda case: feed_run(case.donor("features")), needs=("features",)),
    "slot_oracle": Condition("slot", lambda case: world(case, put_slots(case.donor("helper"))),
                             needs=("helper",)),
    "slot_mean_t": Condition("slot", slot_mean_t),
    **{f"slot_swap_{kind}": Condition("slot", lambda case, kind=kind: put_slots(case.donor(kind)),
                                      needs=(kind,)) for kind in ("random", "counterfactual")},
    "slot_swap_blank": Condition("slot", lambda case: world(case, put_slots(case.donor("blank"))),
                                 needs=("blank",)),
    # what later tokens cannot attend to; cut_both need not move the answer of every model that looks
    "cut_latent": Condition("edge", lambda case: Intervention(hide=("latents",))),
    "cut_image_after": Condition("edge", lambda case: Intervention(hide=("images",))),
    "cut_both": Condition("edge", lambda case: Intervention(hide=("latents", "images"))),
    # the latents alone can carry the image: by their keys and values, or as vectors that are fed again
    "strict": Condition("edge", lambda case: Intervention(), strict=True),
    "strict_fed": Condition("fed", latents_alone, prompt="blind"),
    # segments without latents; a start token that cannot be generated, so that the words change too
    "markers_only": Condition("none", markers_only),
    "no_segment": Condition("none", lambda case: no_more_segments(case, 0)),
    # worlds Y(x', Z(x')) and, at both sites, Y(x', Z(x)): are the item's own latents sufficient?
    "blank": Condition("none", world, prompt="blank"),
    "blank_x": Condition("fed", lambda case: world(case, feed_run(case.clean)), prompt="blank"),
    "slot_blank_x": Condition("slot", lambda case: world(case, put_slots(case.clean)), prompt="blank"),
    **{name: Condition("none", lambda case: Intervention(), prompt=kind) for name, kind in DO_X.items()}}
# the paper's conditions: Monet (Fig. 2(c), Table 4) is tau; Mirage is tau, + noise, noise, near zero
PRESET_CONDITIONS = {
    "paper": ["identity", "tau", "add_noise", "norm_noise", "near_zero"],
    # what critiques agree to ask of a checkpoint: arXiv 2605.18445, 2605.21642, 2606.01287, 2609.06746
    "standard": ["identity", "tau", "norm_noise", "near_zero", "first_repeat", "markers_only", "no_segment",
                 "oracle", "slot_swap_random", "cut_latent", "strict", "strict_fed", "cut_image_after",
                 "swap_blank", "blank_x", "slot_swap_blank", "slot_blank_x",
                 *(f"mix:{dose:g}" for dose in (0.25, 0.5, 0.75, 1))],
    "full": [name for name in CONDITIONS if name not in ("oracle", "slot_oracle")]}
CONDITIONS |= SWEEPS
