"""What one reply is worth: the strict verdict by our rules, and beside it what other harnesses' rules make of it.

    fields = score(item, record)     # {"extraction", "verdict", "compat"} and, where there are some, "numeric", "scores"

Unresolved is a verdict of its own; nothing here chooses an option that a reply does not name. `compat` holds verdicts of
utils.compat alone, for comparison, and never decides one of ours.
"""
from utils import compat
from utils.answers import extract_choice, vsp_moves, walk_vsp
from utils.items import group_of, rotation_of
from utils.rows import DataError
from utils.scores import ROTATIONS
from utils.tables import read_truth, read_value, read_yes_no, vwtq_numeric

VERDICTS = ("correct", "incorrect", "unresolved", "error")
MATCHERS = ("vlmevalkit_0bac5c0", "vlmevalkit_e8e78f0")  # VLMEvalKit's at two commits, for its multiple choice


def score_mcq(item: dict, record: dict) -> dict:
    """Multiple choice: the option that `extract_choice` finds. compat: VLMEvalKit's letters, or MME-RealWorld's."""
    options, text = dict(item["options"]), record["clean_output"]
    found = extract_choice(text, options, record["finish_reason"])
    if item.get("benchmark") == "mme_realworld_lite":
        others = {"mme_realworld": compat.mme_realworld(text, options),
                  "vlmevalkit_e8e78f0": compat.mme_realworld(text, repaired=True)}
    else:
        others = {name: getattr(compat, name)(text, options) for name in MATCHERS}
    return verdict(found.letter, found.rule, found.letter == item["answer"]["value"]) | {"compat": others}


def score_likelihood(item: dict, record: dict) -> dict:
    """The likeliest option a token, as its authors score V*; compat: the likeliest in all."""
    letter = likeliest(item["options"], record["scores"])
    return verdict(letter, "likelihood", letter == item["answer"]["value"]) | {
        "compat": {"likelihood_sum": likeliest(item["options"], record["scores"], "sum")}, "scores": record["scores"]}


def likeliest(options: list[list[str]], scores: list[dict], by: str = "mean") -> str:
    """Return the letter of the option with the greatest log-probability, a token ("mean", the benchmark's) or in all ("sum").

    Of equal ones the first, as argmin takes it there.
    """
    values = [score["logp"] / (score["n"] if by == "mean" else 1) for score in scores]
    return options[values.index(max(values))][0]


def score_vsp(item: dict, record: dict) -> dict:
    """A path, walked on the map as Mirage's simulate_vsp does; no box is unresolved."""
    text = record["clean_output"]
    moves = vsp_moves(text)
    return verdict(moves, "no_box" if moves is None else "boxed_path",
                   moves is not None and walk_vsp(item["answer"]["value"], text)) | {"compat": {}}


def score_wtq(item: dict, record: dict) -> dict:
    """VWTQ: the denotation of the value read; numeric: marks off, ours. compat: of the whole output, as the benchmark does."""
    gold, text = gold_text(item["answer"]["value"]), record["clean_output"]
    found = read_value(text)
    known = found.value is not None
    return verdict(found.value, found.rule, known and compat.vwtq(found.value, gold)) | {
        "numeric": known and vwtq_numeric(found.value, gold),
        "compat": {"tablevqabench": compat.vwtq(compat.without_label(text), gold)}}


def score_tabfact(item: dict, record: dict) -> dict:
    """VTabFact: true or false. compat: the words anywhere, as the benchmark does."""
    gold, text = "1" if item["answer"]["value"] else "0", record["clean_output"]
    found = read_truth(text, record["finish_reason"])
    return verdict(found.value, found.rule, found.value == gold) | {
        "compat": {"tablevqabench": compat.vtabfact(compat.without_label(text), gold)}}


def score_yes_no(item: dict, record: dict) -> dict:
    """MME: yes or no. compat: VLMEvalKit's rule."""
    found = read_yes_no(record["clean_output"], record["finish_reason"])
    return verdict(found.value, found.rule, found.value == item["answer"]["value"]) | {
        "compat": {"vlmevalkit": compat.yes_or_no(record["clean_output"])}}


SCORE = {"mcq": score_mcq, "likelihood": score_likelihood, "vsp_path": score_vsp, "wtq": score_wtq, "tabfact": score_tabfact,
         "yesno_pair": score_yes_no}


def verdict(value: str | None, rule: str, right: bool) -> dict:
    """Return {"extraction", "verdict"} of what was read, None if nothing was."""
    return {"extraction": {"value": value, "rule": rule},
            "verdict": "unresolved" if value is None else "correct" if right else "incorrect"}


def gold_text(values: list[str]) -> str:
    """Return VWTQ's gold as its scorer takes it: values joined by bars, the bars and line ends in them escaped."""
    return "|".join(text.replace("\\", r"\\").replace("|", r"\p").replace("\n", r"\n") for text in values)


def score(item: dict, record: dict) -> dict:
    """Return an item's extraction, verdict and compat; a record with an error has the verdict error and no compat."""
    if "error" in record:
        return {"extraction": {"value": None, "rule": record["error"]}, "verdict": "error", "compat": {}}
    return SCORE[item["metric"]](item, record)


def check_scorable(items: list[dict]) -> None:
    """Raise DataError for items that have no score here."""
    if odd := [item for item in items if item["metric"] not in SCORE]:
        raise DataError(f"item {odd[0]['id']!r} and {len(odd) - 1} more: metric {odd[0]['metric']!r} has no scorer "
                        "(OCRBench-v2's task metrics are not here: its items are a source of latents for probe.py alone); "
                        f"expected one of {', '.join(SCORE)}")
    seen = set()
    for item in items:  # said now, and not when all is answered
        rotation = rotation_of(item)
        place = item.get("benchmark"), group_of(item), rotation
        if rotation is not None and (rotation >= ROTATIONS or place in seen):
            raise DataError(f"item {item['id']!r}: rotation {rotation} of question {place[1]!r}; expected each of 0 to "
                            f"{ROTATIONS - 1} once")
        seen.add(place)


def n_options(item: dict) -> int:
    """Return between how many answers blind guessing chooses; 0 where there are no options."""
    return 2 if item["metric"] in ("tabfact", "yesno_pair") else len(item["options"])


def compat_right(record: dict, name: str) -> bool:
    """Return whether another harness's verdict of a result is right; None (no verdict) is wrong there."""
    value = record["compat"].get(name)
    return value if isinstance(value, bool) else value is not None and value == record["gold"]
