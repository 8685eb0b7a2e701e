"""Replies of a known answer: planted once, in one of many forms, among sentences that choose nothing."""
import random
from collections.abc import Iterator

from harness_table import OPTIONS

NOUNS = ("cup", "helmet", "scooter", "sign", "door")
# {L} the letter, {l} in lower case, {T} its text; {X}, {Y} two options' texts, {O} any letter, {N} a thing
BOXED = ("\\boxed{{{L}}}", "\\boxed{{{l}}}", "\\boxed{{({L})}}", "\\boxed{{\\text{{{L}}}}}",
         "$\\boxed{{{L}}}$", "\\fbox{{{L}}}", "\\boxed{{{T}}}", "\\boxed{{{L}. {T}}}", "\\boxed{{{L}: {T}}}",
         "\\boxed{{\\textbf{{({L}) {T}}}}}", "So the answer is \\boxed{{{T}}}.", "\\boxed{{Option {L}}}",
         "<answer>{L}</answer>", "<answer>{L}. {T}</answer>", "<answer>\n{T}\n</answer>")
PHRASE = ("The answer is {L}.", "Answer: {L}", "The correct answer is ({L}).", "The correct option is {L}.",
          "I choose {L}.", "Therefore, the final answer is **{L}**.", "答案是{L}。", "The answer is ({L}) {T}.",
          "The answer is {L}: {T}", "Answer: {L}. {T}", "The answer is: {L}", "the answer is option {L}",
          "ANSWER: {L}", "My final answer: ({L})", "The right choice is {L}, because of the {N}.",
          "The answer is $\\text{{{L}}}$.", 'The answer is "{L}".')
BARE = ("{L}", "({L})", "{L}.", "{l}", "**{L}**", "{T}", "{T}.", "{L}. {T}", "({L}) {T}", "**{L}. {T}**",
        "{L}) {T}", "Option {L}")
TAIL = ("It is {T}.", "The answer is {T}.", "So I would say {T}.", "What I see there is {T}.",
        "It must be {T}, I think.", 'It is "{T}."', "Hence: {T}.",
        "The {N} is {T} rather than anything else.", "Clearly {T}!", "{T}", "{L}",
        "I am sure that it is {T}, as in option {L}.", "So it is {L}.", "Final: ({L})", "I go for {L}, {T}.",
        "The right one is {L}.")
NOTHING = ("It is not {X}.", "Is it {X}?", "{X} or {Y}, I cannot tell.", "The {N} is hidden.",
           "I will look at the {N}.", "The {N} cannot be {X}.", "The answer is unclear.",
           "The answer is not {O}.", "Answer: none of them.", "\\boxed{{?}}", "A matter of taste.",
           "\\boxed{{{O}}} or \\boxed{{unclear}}", "<answer>unsure</answer>", "No {N} is {X}.",
           "It is never {X}.", "I see no {X} {N}.")
FORMS = {"boxed": BOXED, "phrase": PHRASE, "bare": BARE, "tail": TAIL, "nothing": NOTHING}
PROSE = ("A closer look shows the {N}.", "I need to look at the {N} first.", "The {N} stands next to a {N}.",
         "B is for the {N}.", "Zooming in on the lower part, one sees the {N}.",
         "Suppose a box had been drawn around the {N}.", "It isn't {X}.", "There is a {N} at the edge.",
         "Both {X} and {Y} are thinkable.", "Is it {X}? It could be {Y}.", "The options are A and B.",
         "It is not {X}.", "DETAIL C of the {N} is hidden.", "The answer is not {O}.",
         "The answer is {O}? No.", "Whether it is {X} is unclear.", "Options: A. {X} B. {Y}",
         "At first I thought {X}, then {Y}.", "The {N} is neither {X} nor {Y}.", "Could the answer be {O}?",
         "A {N} near E, F and G.", "I choose a {N} to look at.", "Answer: I have to look closer.",
         "The answer is a matter of the {N}.", "{X} or {Y}?", "Best answer: unclear so far.")
CLAIM = ("Option {O} says {X}.",)  # names an option: never among sentences that choose nothing
LATENT = ("", "", "<|latent_start|> {O} {X} <|latent_end|> ", "<abs_vis_token>{O}. {X}</abs_vis_token>")
END = ("", "", "", "\n<ltnt:1>", "<|im_end|>", " \n")


def planted(count: int, seed: int) -> Iterator[tuple[str, dict[str, str], str | None, str]]:
    """Yield (form, options in a random order, the planted letter or None, reply)."""
    rng = random.Random(seed)
    for _ in range(count):
        texts = list(OPTIONS[rng.choice(sorted(OPTIONS))].values())
        rng.shuffle(texts)
        options, form = dict(zip("ABCDE", texts)), rng.choice(sorted(FORMS))
        letter = rng.choice(list(options))

        def fill(templates):
            x, y = rng.sample(texts, 2)
            return rng.choice(templates).format(L=letter, l=letter.lower(), T=options[letter], X=x, Y=y,
                                                N=rng.choice(NOUNS), O=rng.choice(list(options)))
        prose = PROSE if form == "nothing" else PROSE + CLAIM
        before = [fill(prose) for _ in range(0 if form == "bare" else rng.randint(0, 4))]
        after = [fill(PROSE) for _ in range(rng.randint(0, 2) if form == "boxed" else 0)]
        text = rng.choice((" ", "\n", "\n\n")).join([*before, fill(FORMS[form]), *after])
        yield form, options, None if form == "nothing" else letter, fill(LATENT) + text + rng.choice(END)
