"""A real OpenAI-compatible server process that misbehaves if a prompt asks for it: "fault:NAME" in its text,
or `raw(...)`, which spells out an answer.

Otherwise it answers by rule from the request alone: the same request, the same bytes. Without a schema it is
a model that is shown items, or a judge of its replies. Prints its port. Every POST is a line in its log:
{"text", "fault", "n" (how often this text came), "images" (sha256), "key" (Authorization), "model", ...}.
"""
import base64
import hashlib
import json
import os
import random
import re
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

TWICE = ("408", "429", "502", "503", "504")  # statuses that are followed by an answer; all others stay
SENT = ("model", "seed", "max_tokens", "max_completion_tokens", "temperature")
BODY = {"model": "served", "system_fingerprint": "stub-1",
        "usage": {"prompt_tokens": 20, "completion_tokens": 9}}
ZOOM = {"type": "function", "function": {
    "name": "image_zoom_in_tool", "arguments": '{"bbox_2d": [0, 0, 40, 30], "label": "it"}'}}
TEXTS = {"empty": "", "null": None, "prose": "I would rather talk about the weather.",
         "wrongschema": '{"caption": 7}'}


def raw(times: int = 10**6, status: int = 200, charset: str | None = None, retry_after: str | None = None,
        **body: object) -> str:
    """Return the words that ask for an answer with these fields, the first `times` that its text comes.
    Without "choices" the fields are those of one choice."""
    return "raw:" + json.dumps([times, status, charset, retry_after, body]).encode().hex()


def any_answer(rng: random.Random) -> str:
    """Return an answer of status 200 of a kind that some server sends, mostly a whole one."""
    content = rng.choice(["<answer>A</answer>", "", None, 7, "\ud800", [{"type": "text", "text": "B"}],
                          [{"type": "image_url"}], {"text": "A"}])
    message = {"content": content}
    for name, value in (("reasoning_content", "So red."), ("reasoning", "So blue."), ("tool_calls", [ZOOM]),
                        ("tool_calls", [{}]), ("refusal", "I cannot."), ("function_call", ZOOM["function"])):
        if rng.random() < 0.15:
            message[name] = value
    finish = rng.choice(["stop", "stop", "eos_token", {"type": "stop"}, "length", "tool_calls", "abort", None,
                         "content_filter", {"type": "abort"}, [], 3, {}])
    usage = rng.choice([None, {}, {"prompt_tokens": 3.0}, {"prompt_tokens": "many"}])
    choices = rng.choice([[], None, [[]], *[[{"message": message, "finish_reason": finish}]] * 30])
    charset = None if content == "\ud800" else rng.choice([None, "utf-8"])
    return raw(choices=choices, usage=usage, charset=charset)


@contextmanager
def serving(folder: Path, name: str = "calls.jsonl", port: int = 0, latency: float = 0.02, faults: bool = True
            ) -> Iterator[tuple[subprocess.Popen, str]]:
    """Run this server in a process of its own; yield it and its base URL."""
    command = [sys.executable, __file__, folder / name, port, latency, int(faults)]
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, text=True)
    try:
        yield process, f"http://127.0.0.1:{int(process.stdout.readline())}/v1"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def calls_of(folder: Path, name: str = "calls.jsonl") -> list[dict]:
    """Return what a server was asked so far."""
    path = folder / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 512

    def __init__(self, log: str, port: str, latency: str, faults: str):
        super().__init__(("127.0.0.1", int(port)), Handler)
        self.log, self.latency, self.faults = open(log, "a", encoding="utf-8"), float(latency), faults == "1"
        self.lock, self.counts = threading.Lock(), Counter()

    def handle_error(self, request: object, client_address: object) -> None:
        """Be silent about clients that were killed."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # one packet per answer

    def log_message(self, *args) -> None:
        pass

    def answer(self, status: int, body: bytes, length: int | None = None, charset: str | None = None,
               retry_after: str = "0") -> None:
        """Send a body, or less than the `length` that is announced."""
        self.send_response(status)
        self.send_header("Content-Type", "application/json" + (f"; charset={charset}" if charset else ""))
        self.send_header("Content-Length", str(length or len(body)))
        if status in (429, 503):
            self.send_header("Retry-After", retry_after)
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()
        self.close_connection |= length is not None

    def do_GET(self) -> None:
        # as transformers serve without a Hugging Face cache
        self.answer(500, b'{"detail": "no cache folder"}')

    def do_POST(self) -> None:
        data = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        parts = data["messages"][-1]["content"]
        text = "".join(part["text"] for part in parts if part["type"] == "text")
        images = [base64.b64decode(part["image_url"]["url"].partition(",")[2]) for part in parts
                  if part["type"] == "image_url"]
        match = re.search(r"fault:(\w+)", text)
        fault = match[1] if match and self.server.faults else None
        with self.server.lock:
            self.server.counts[text] += 1
            n = self.server.counts[text]
            line = {"text": text, "fault": fault, "n": n, "key": self.headers.get("Authorization"),
                    "images": [hashlib.sha256(image).hexdigest() for image in images],
                    **{name: data[name] for name in SENT if name in data}}
            self.server.log.write(json.dumps(line) + "\n")
            self.server.log.flush()
        time.sleep(self.server.latency)
        if spelled := re.search(r"raw:([0-9a-f]+)", text) if self.server.faults else None:
            times, status, charset, retry_after, body = json.loads(bytes.fromhex(spelled[1]))
            if n <= times:
                body = body if "choices" in body or status != 200 else BODY | {"choices": [body]}
                data = json.dumps(body, ensure_ascii=charset is None)
                data = data.encode("latin-1" if charset == "unknown" else charset or "ascii")
                return self.answer(status, data, charset=charset, retry_after=retry_after or "0")
        if not self.misbehave(fault, n):
            self.complete(reply(data, text) if "response_format" in data else say(data, text))

    def complete(self, content: str | None, finish: str = "stop") -> None:
        message = {"role": "assistant", "content": content}
        body = BODY | {"choices": [{"message": message, "finish_reason": finish}]}
        self.answer(200, json.dumps(body).encode())

    def misbehave(self, fault: str | None, n: int) -> bool:
        """Do what a fault asks for; return whether it was an answer (or the end of the connection)."""
        if fault in TWICE and n <= 2:
            self.answer(int(fault), b'{"error": "busy"}')
        elif fault and fault.isdigit() and fault not in TWICE or fault == "500once" and n == 1:
            body = f'{{"error": "fault {fault} for {self.headers["Authorization"]}"}}'
            self.answer(int(fault[:3]), body.encode())
        elif fault == "kill":
            os._exit(1)
        elif fault == "hang" and n <= 2:
            time.sleep(60)
        elif fault == "reset_always" or fault == "reset" and n <= 2:
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        elif fault == "half" and n <= 2:
            self.answer(200, b'{"choices": [{"mess', length=400)
        elif fault in ("notjson", "nochoices"):
            self.answer(200, b"hello" if fault == "notjson" else b'{"choices": []}')
        elif fault == "length":
            self.complete('{"caption": "never', "length")
        elif fault in TEXTS:
            self.complete(TEXTS[fault])
        elif fault == "late" and n == 1:  # a text that comes a second time is answered
            self.complete("Not yet.")
        else:
            return False
        return True


def reply(data: dict, text: str) -> str:
    """Return the reply of a good model, by the schema that was asked for."""
    asked = set(data["response_format"]["json_schema"]["schema"]["properties"])
    digest = hashlib.sha256(text.encode()).hexdigest()
    mark = "".join("abcdefghij"[int(digit, 16) % 10] for digit in digest[:6])
    if "fault:control" in text:
        mark += "\n\t and a tab"
    if "caption" in asked:
        value = {"caption": f"The hull shows a white 42 beside {mark}.", "legible": "yes"}
    elif "marks" in asked:
        value = {"marks": ["42"], "description": f"A box marks the 42 beside {mark}.", "changed": True}
    elif "segments" in asked:
        value = {"segments": [{"id": int(n), "text": f"Well, {part}"}
                              for n, part in re.findall(r"^\[(\d+)\] \w+: (.*)$", text, re.MULTILINE)]}
    elif "edited" in asked:  # the passages with the new value in place of the old one
        old, new = re.search(r"^From: (.*)\nTo: (.*)$", text, re.MULTILINE).groups()
        spans = [span if "fault:residual" in text else span.replace(old, new)
                 for span in json.loads(re.search(r"^Passages: (\[.*\])$", text, re.MULTILINE)[1])]
        value = {"edited": spans[1:] if "fault:missing" in text else spans, "changed_phrases": [new]}
    elif "stated" in asked:
        price = re.search(r"costs (\S+)\.", text)  # all other rows are about a 42
        value = {"reason": mark, "asked": "boat", "found": "boat", "seen": price[1] if price else "42",
                 "stated": price[1] if price else "42", "problems": []}
    elif "questions" in asked:
        value = {"questions": write_questions(text, mark)}
    else:
        value = {"letter": choose_letter(text)}
    if "fault:fenced" in text:  # the schema ignored
        return f"Sure!\n```json\n{json.dumps(value, indent=1)}\n```\nDone."
    # control characters unescaped inside strings, as xgrammar lets them pass
    return json.dumps(value).replace("\\n", "\n").replace("\\t", "\t")


# of a written question, and the reason that it must be given
DEFECTS = [tuple(json.loads(line).values()) for line in
           (Path(__file__).parent / "files" / "defects.jsonl").read_text(encoding="utf-8").splitlines()]


def write_questions(text: str, mark: str) -> list[dict]:
    """Return as many questions as are asked for, or one per DEFECT; the right option says "seen"."""
    good = {"attribute": "colour", "question": "Which colour has the rim?", "answer": "seen white",
            "wrong": ["blue", "green", "red"]}
    if "fault:rules" in text:
        source = re.search(r"^Someone was asked this about it:\n(.*)$", text, re.MULTILINE)[1]
        questions = [good | changes for changes, _ in DEFECTS]
        return [one | {"question": one["question"].replace("SOURCE", source)} for one in questions]
    n = int(re.search(r"Write (\d+) other", text)[1]) - ("fault:few" in text)
    attributes = "colour material shape size count text position pattern part state".split()
    return [good | {"question": f"What {name} has thing {mark}?", "attribute": name}
            for name in attributes[:n]]


def choose_letter(text: str) -> str:
    """Return the letter of the option that says "seen" if the picture is there, else of a wrong one."""
    options = dict(re.findall(r"^([A-D])\. (.*)$", text, re.MULTILINE))
    seen = next(letter for letter, option in options.items() if option.startswith("seen"))
    if "unclear" in text:
        return "none"
    is_right = "guessable" in text if "cannot see" in text else "misread" not in text
    return seen if is_right else next(letter for letter in options if letter != seen)


def say(data: dict, text: str) -> str:
    """Return a model's reply to an item, with the zoom tool if it has one, or a judge's to a reply."""
    judged = text.partition("\nReply: ")[2].partition("\n\nAnswer with one ")[0]
    if "Answer with one letter" in text:
        options = re.findall(r"^([A-Z])\. (.*)$", text.partition("\nReply: ")[0], re.MULTILINE)
        if tagged := re.search(r"<answer>([A-Z])</answer>", judged):
            return tagged[1]
        named = [(judged.rfind(option), letter) for letter, option in options if option in judged]
        return max(named)[1] + "." if named else "(Z)"
    if "Answer with one word" in text:
        gold = re.search(r"^Right answer: (?:[A-Z]\. )?(.*)$", text, re.MULTILINE)[1]
        return "Yes, it is." if gold in judged else "no"
    if "image_zoom_in_tool" in str(data["messages"][0]["content"]) and "<tool_response>" not in text:
        call = {"name": "image_zoom_in_tool", "arguments": {"bbox_2d": [0, 0, 40, 30], "label": "it"}}
        return f"<think>Closer.</think>\n<tool_call>\n{json.dumps(call)}\n</tool_call>"
    if "vague" in text:
        return "It is hardly red, and red it is not: I take it for something not unlike blue."
    return "<think>I see.</think> <answer>A</answer>"


if __name__ == "__main__":
    served = Server(*sys.argv[1:])
    print(served.server_address[1], flush=True)
    served.serve_forever()
