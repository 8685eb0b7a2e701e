"""Two optional judges behind an OpenAI-compatible server, asked in words alone at temperature 0.

    map     VLMEvalKit's (vlmeval/dataset/utils/multiple_choice.py, build_prompt, extract_answer_from_item):
            sees question, options and reply, names the option that the reply means, or Z
    grade   Monet's reward (RL/tools/api_judge.py): sees the gold answer too, answers yes or no

After three unusable replies the judge has failed: no option is drawn. The words are our own. The next run
repeats what failed.
"""
import re
from dataclasses import replace

from utils.answers import extract_choice
from utils.backends import Request
from utils.cli import ErrorRateError, log
from utils.evaluate.scoring import read_yes_no
from utils.journal import Journal
from utils.jsonl import DataError, call_key
from utils.model_calls import Call, Caller, Check, IncompleteError, Outcome, ask, fill
from utils.reply_text import visible

KINDS = ("map", "grade")
TRIES = 3  # as VLMEvalKit's
NONE_OF_THEM = "Z"  # VLMEvalKit's name for "no option is meant"
MAP = """\
Below are a multiple-choice question, its options and a reply to it. Name the option that the reply means in \
the end, even if it is worded differently there. If the reply means none of the options, gives no answer, or \
cannot be told to mean one, name Z. Do not answer the question yourself.

Question: {question}
Options:
{options}
Reply: {reply}

Answer with one letter and nothing else: {letters} or Z."""
GRADE = """\
Below are a question, its right answer and a reply to it. Say whether the final answer of the reply is the \
right one. Wording and format do not matter; a reply that gives no answer, or several that differ, is not \
right.

Question: {question}
Right answer: {gold}
Reply: {reply}

Answer with one word and nothing else: yes or no."""
GRADED = ("mcq", "wtq", "tabfact", "yesno_pair")  # metrics whose gold answer can be shown in words
TEST_ITEM = {"id": "preflight", "metric": "mcq", "question": "What colour is the kite?",
             "options": [["A", "green"], ["B", "blue"]], "answer": {"type": "letter", "value": "B"}}
TEST_REPLY = "The kite in the picture is clearly blue."


def question_for(kind: str, item: dict, reply: str) -> str | None:
    """Return a judge's prompt; None for a metric unknown to this kind of judge."""
    if item["metric"] not in (("mcq",) if kind == "map" else GRADED):
        return None
    options = dict(item["options"])
    lines = [f"{letter}. {text}" for letter, text in options.items()]
    if kind == "map":
        return fill(MAP, question=item["question"], options="\n".join(lines), reply=reply,
                    letters=", ".join(options))
    gold = item["answer"]["value"]
    if item["metric"] == "mcq":
        gold = f"{gold}. {options[gold]}"
    elif isinstance(gold, list):
        gold = ", ".join(gold)
    return fill(GRADE, question="\n".join([item["question"], *lines]), gold=str(gold), reply=reply)


def parse(kind: str, item: dict, text: str, finish_reason: str | None = None) -> str | None:
    """Return the letter (or Z), or the yes or no, of a judge's reply, if it is one. Of a reply that was cut
    off only a first word counts as yes or no."""
    if kind == "map":
        choice = extract_choice(text, dict(item["options"]) | {NONE_OF_THEM: "none of them"}, finish_reason)
        by_words = choice.rule.endswith(("text", "text_in")) and not choice.rule.endswith("letter_text")
        return None if by_words else choice.letter
    found = read_yes_no(text)
    if finish_reason == "length":
        return found.value if found.rule == "first_word" else None
    words = {word.lower() for word in re.findall(r"\b(?:yes|no)\b", visible(text), re.IGNORECASE)}
    return found.value or (words.pop() if len(words) == 1 else None)


class JudgeCaller(Caller):
    """Asks without a system prompt, and again in the same words after an unusable reply."""

    def request(self, call: Call, attempt: int, before: Outcome | None = None) -> Request:
        key = call_key(judge=self.identity, prompt=call.text, attempt=attempt, max_tokens=self.max_new_tokens)
        return Request(key, None, call.text, (), self.max_new_tokens)


class Judge:
    def __init__(self, kind: str, backend: object, journal: Journal, max_tokens: int):
        self.kind = kind
        self.caller = JudgeCaller(journal, None, backend, backend.identity, {"SYSTEM": ""}, max_tokens,
                                  guarded=False, retry_errors=True)
        self.model = backend.model

    def preflight(self) -> None:
        """Ask a question with a plain answer; DataError for another answer, ErrorRateError for none."""
        call = Call(TEST_ITEM["id"], self.kind, -1, question_for(self.kind, TEST_ITEM, TEST_REPLY))
        wanted, text = "B" if self.kind == "map" else "yes", ""
        for attempt in range(TRIES):
            for reply in self.caller.backend.generate([self.caller.request(call, attempt)]):
                text, finish = reply.error or reply.text, reply.finish_reason
            if parse(self.kind, TEST_ITEM, text, finish) == wanted:
                return
        raise DataError(f"--judge {self.kind} {self.model}: asked about {TEST_REPLY!r}, it said "
                        f"{text[:200]!r}, expected {wanted!r}; name another, or use --judge none")

    def decide(self, asked: list[tuple[dict, str]]) -> list[dict | None]:
        """Return a result's "judge" for each (item, reply), None without a question."""
        prompts = [question_for(self.kind, item, reply) for item, reply in asked]
        items = {prompt: item for prompt, (item, _) in zip(prompts, asked) if prompt is not None}
        calls = [Call(item["id"], self.kind, -1, prompt) for prompt, item in items.items()]

        def check(call: Call, value: dict) -> tuple[str, str] | None:
            usable = parse(self.kind, items[call.text], **value)
            return None if usable else ("bad_schema", "no usable reply")

        try:
            outcomes = ask(self.caller, calls, check, "judge", retries=TRIES - 1)
        except ErrorRateError as error:
            log(f"the judge: {error}")
            outcomes = [self.recall(call, check, str(error)) for call in calls]
        found = dict(zip(items, outcomes))
        return [prompt and self.describe(item, prompt, found[prompt])
                for prompt, (item, _) in zip(prompts, asked)]

    def recall(self, call: Call, check: Check, words: str) -> Outcome:
        try:
            return ask(replace(self.caller, backend=None), [call], check, "judge", retries=TRIES - 1)[0]
        except IncompleteError:
            return Outcome(None, "backend_error", words)

    def describe(self, item: dict, prompt: str, outcome: Outcome) -> dict:
        parsed = outcome.value and parse(self.kind, item, **outcome.value)
        wanted = item["answer"]["value"] if self.kind == "map" else "yes"
        return {"kind": self.kind, "model": self.model, "prompt_sha": call_key(prompt=prompt)[:16],
                "reply": outcome.text, "parsed": parsed, "attempts": outcome.attempts,
                "error": outcome.detail or None, "right": None if parsed is None else parsed == wanted}


def add_verdicts(judge: Judge, items: list[dict], results: list[dict]) -> None:
    """Give results in place "judge" and "judged": the verdict, or the judge's for an unresolved one. It is
    asked where our rules, or with map VLMEvalKit's, resolve nothing."""
    def wants(result: dict) -> bool:
        if result["verdict"] == "error" or not result["clean_output"]:
            return False
        lacks = judge.kind == "map" and any(value is None for value in result["compat"].values())
        return lacks or result["verdict"] == "unresolved"

    asked = [(item, result) for item, result in zip(items, results, strict=True) if wants(result)]
    for result in results:
        result |= {"judge": None, "judged": result["verdict"]}
    decided = judge.decide([(item, result["clean_output"]) for item, result in asked])
    for (_, result), found in zip(asked, decided, strict=True):
        result["judge"] = found
        if found and result["verdict"] == "unresolved":
            verdict = "correct" if found["right"] else "incorrect"
            result["judged"] = "judge_error" if found["error"] else verdict
