"""Two optional judges behind an OpenAI-compatible server, asked in words alone, at temperature 0.

    map     what VLMEvalKit's judge does (vlmeval/dataset/utils/multiple_choice.py, build_prompt and
            extract_answer_from_item):
            it sees question, options and reply, never the gold answer, and names the option that the reply
    means, or Z
    grade   what Monet's reward does (RL/tools/api_judge.py): it sees question, gold answer and reply and says
    yes or no

A reply counts only if it is one letter, or one of the two words. Anything else is asked again, three times in
all, and is then a failure that is counted: no option is drawn, none is a default. The words are our own;
theirs differ. Usable replies are kept in a journal by judge and prompt; a failed call is not kept, so that a
judge that was mended is asked again.
"""
import re
from dataclasses import asdict

from utils.backends import ErrorRateError, Request
from utils.cli import log
from utils.journal import Journal
from utils.jsonl import DataError, call_key
from utils.model_calls import fill

KINDS = ("map", "grade")
TRIES = 3  # as VLMEvalKit's
NONE_OF_THEM = "Z"  # VLMEvalKit's name for "no option is meant"
MAP = """\
Below are a multiple-choice question, its options and a reply to it. Name the option that the reply means in the end, even if \
it is worded differently there. If the reply means none of the options, gives no answer, or cannot be told to mean one, \
name Z. Do not answer the question yourself.

Question: {question}
Options:
{options}
Reply: {reply}

Answer with one letter and nothing else: {letters} or Z."""
GRADE = """\
Below are a question, its right answer and a reply to it. Say whether the final answer of the reply is the right one. Wording \
and format do not matter; a reply that gives no answer, or several that differ, is not right.

Question: {question}
Right answer: {gold}
Reply: {reply}

Answer with one word and nothing else: yes or no."""
GRADED = ("mcq", "wtq", "tabfact", "yesno_pair")  # metrics whose gold answer can be shown in words
TEST_ITEM = {"id": "preflight", "metric": "mcq", "question": "What colour is the kite?",
             "options": [["A", "green"], ["B", "blue"]], "answer": {"type": "letter", "value": "B"}}
TEST_REPLY = "The kite in the picture is clearly blue."
THOUGHT = re.compile(r"<think>.*?</think>", re.DOTALL)
MARKS = " \t\r\n.,:;!*_#`'\"()[]{}"


def question_for(kind: str, item: dict, reply: str) -> str | None:
    """Return a judge's prompt for a reply, None where it has none: map knows multiple choice alone."""
    if item["metric"] not in (("mcq",) if kind == "map" else GRADED):
        return None
    options = dict(item["options"])
    if kind == "map":
        return fill(MAP, question=item["question"], options="\n".join(f"{letter}. {text}" for letter,
                                                                      text in options.items()),
                    reply=reply, letters=", ".join(options))
    gold = item["answer"]["value"]
    shown = f"{gold}. {options[gold]}" if item["metric"] == "mcq" else ", ".join(gold) if isinstance(
        gold, list) else str(gold)
    listed = "".join(f"\n{letter}. {text}" for letter, text in options.items())
    return fill(GRADE, question=item["question"] + listed, gold=shown, reply=reply)


def parse(kind: str, item: dict, text: str) -> str | None:
    """Return the letter (or Z), or yes or no, that a judge's reply is; None for anything else."""
    text = THOUGHT.sub("", text)
    if kind == "map":
        letter = text.strip(MARKS).upper()
        return letter if letter in (*dict(item["options"]), NONE_OF_THEM) else None
    words = set(re.findall(r"\b(?:yes|no)\b", text.lower()))
    return words.pop() if len(words) == 1 else None


class Judge:
    """Judges replies; `backend` is a utils.openai_backend.HttpBackend, `journal` keeps what it said."""

    def __init__(self, kind: str, backend: object, journal: Journal, max_tokens: int):
        self.kind, self.backend, self.journal, self.max_tokens = kind, backend, journal, max_tokens

    def request(self, prompt: str, attempt: int) -> Request:
        key = call_key(judge=self.backend.identity, prompt=prompt, attempt=attempt,
                       max_tokens=self.max_tokens)
        return Request(key, None, prompt, (), self.max_tokens)

    def preflight(self) -> None:
        """Ask one question with a plain answer; DataError for a judge that does not answer it so,
        ErrorRateError for none."""
        prompt, replies = question_for(self.kind, TEST_ITEM, TEST_REPLY), []
        wanted = "B" if self.kind == "map" else "yes"
        for attempt in range(TRIES):
            replies += [reply.error or reply.text
                        for reply in self.backend.generate([self.request(prompt, attempt)])]
            if parse(self.kind, TEST_ITEM, replies[-1]) == wanted:
                return
        raise DataError(
            f"--judge {self.kind} {self.backend.model}: asked which of two options {TEST_REPLY!r} means, it said "
                        f"{replies[-1][:200]!r}, expected {wanted!r}; mend the judge, name another, or use --judge none")

    def decide(self, asked: list[tuple[dict, str]]) -> list[dict | None]:
        """Return for each (item, reply) what a result's "judge" holds, None where this kind of judge has no
        question.

        {"kind", "model", "prompt_sha", "reply", "parsed", "attempts", "error", "right"}; `error` says why
        nothing is parsed, and `right` is None then.
        """
        prompts = [question_for(self.kind, item, reply) for item, reply in asked]
        items = {prompt: item for prompt, (item, _) in zip(prompts, asked) if prompt is not None}
        found = {prompt: self.known(prompt, item) for prompt, item in items.items()}
        for attempt in range(TRIES):
            lacking = {self.request(prompt, attempt).key: prompt for prompt, its in found.items()
                       if its["parsed"] is None}
            try:
                for reply in self.backend.generate([self.request(prompt, attempt)
                                                    for prompt in lacking.values()]):
                    prompt = lacking[reply.key]
                    found[prompt] = self.read(items[prompt], asdict(reply), attempt + 1)
                    if not reply.error:
                        self.journal.append(asdict(reply))
            except ErrorRateError as error:
                log(f"the judge: {error}")
                for prompt in lacking.values():
                    if found[prompt]["parsed"] is None:
                        found[prompt]["error"] = "no server answered"
                break
        return [prompt and self.describe(item, prompt, found[prompt]) for prompt,
                (item, _) in zip(prompts, asked)]

    def known(self, prompt: str, item: dict) -> dict:
        """Return what the journal holds on a prompt: the first usable reply, else nothing."""
        for attempt in range(TRIES):
            record = self.journal.get(self.request(prompt, attempt).key)
            if record and (its := self.read(item, record, attempt + 1))["parsed"] is not None:
                return its
        return {"reply": None, "parsed": None, "attempts": 0, "error": "not asked"}

    def read(self, item: dict, record: dict, attempts: int) -> dict:
        parsed = None if record["error"] else parse(self.kind, item, record["text"])
        return {"reply": record["text"], "parsed": parsed, "attempts": attempts,
                "error": record["error"] or (None if parsed else "no usable reply")}

    def describe(self, item: dict, prompt: str, found: dict) -> dict:
        right = None if found["parsed"] is None else \
            found["parsed"] == (item["answer"]["value"] if self.kind == "map" else "yes")
        return {"kind": self.kind, "model": self.backend.model, "prompt_sha": call_key(prompt=prompt)[:16],
                **found,
                "right": right}


def add_verdicts(judge: Judge, items: list[dict], results: list[dict], ask_all: bool) -> None:
    """Give results in place "judge" and "judged": the verdict with the judge's in the place of an unresolved
    one.

    Asked is where our rules, or with map VLMEvalKit's, resolve nothing (its own score needs the judge too),
    or everywhere with `ask_all`, which shows where judge and rules disagree; a verdict of ours is never
    overruled. A failure is "judge_error".
    """
    def wants(result: dict) -> bool:
        # an empty reply means nothing: no need to ask
        if result["verdict"] == "error" or not result["clean_output"]:
            return False
        lacks = judge.kind == "map" and any(value is None for value in result["compat"].values())
        return ask_all or lacks or result["verdict"] == "unresolved"

    asked = [(item, result) for item, result in zip(items, results, strict=True) if wants(result)]
    for result in results:
        result |= {"judge": None, "judged": result["verdict"]}
    decided = judge.decide([(item, result["clean_output"]) for item, result in asked])
    for (_, result), found in zip(asked, decided, strict=True):
        result["judge"] = found
        if found and result["verdict"] == "unresolved":
            result["judged"] = "judge_error" if found["error"] else "correct" if found[
                "right"] else "incorrect"
