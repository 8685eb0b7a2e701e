"""An OpenAI-compatible server (vLLM, SGLang, transformers serve) as a backend.

Each call has a thread; the scheduler is the caller's loop.
"""
import heapq
import json
import queue
import random
import threading
import time
from collections import deque
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, replace
from enum import Enum
from threading import Event

from huggingface_hub.utils import httpx

from utils.backends import FILTERED, FINISHED, Reply, Request, read_finish, write_calls
from utils.cli import API_KEY, ErrorRateError, log
from utils.images import ImageError, Picture, picture_url
from utils.jsonl import DataError

BUSY_STATUSES = (429, 503)  # the server wants fewer calls
GATEWAY_STATUSES = (408, 502, 504)  # the server may be gone
RUN_STATUSES = (401, 402, 403, 404, 405)  # every call would get the same answer: stop and show it
TRIES_500 = 3  # the fault of the sample or of the server
TRIES_LOST = 5  # the call may break the server
TRIES_BUSY = 30  # with other calls answered in between
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0  # backoff: doubled each time, with jitter
SHORTEST_WAIT_S = 0.5  # even if Retry-After asks for less
CONNECT_TIMEOUT_S = 10.0
DRAIN_S, TICK_S = 30.0, 0.1  # how long an interrupted run waits for running calls; between two looks


# LOST: the connection broke or timed out, or the reply did not end by itself, and the server is up; DIED: it
# is not; DOWN: it did not take the call; UNCLEAR: status 500 or no completion; CRASH: of the call's thread
Result = Enum("Result", "REPLY BAD_SAMPLE BAD_RUN UNCLEAR BUSY LOST DIED DOWN CRASH")


@dataclass
class Try:
    """What a thread brings back; wait_s: as the server asks."""

    result: Result
    message: str = ""
    reply: Reply | None = None
    wait_s: float | None = None


@dataclass(slots=True)
class Job:
    """One request on its way, with the tries that count against it."""

    request: Request
    send_at: float = 0.0
    n_sent: int = 0
    n_500: int = 0
    n_lost: int = 0
    n_busy: int = 0
    n_answered: int = 0  # replies to all jobs when the server was last too busy for this one


class HttpBackend:
    """Requests to one server, `window` at once: half as many after a busy answer, one when it is down, one
    more after every reply. `settle` decides what an answer of the server means."""

    def __init__(self, model: str, base_url: str, max_pixels: int, image_factor: int = 32,
                 concurrency: int = 64, timeout_s: float = 300.0, server_wait_s: float = 1800.0,
                 temperature: float = 0.0, extra_body: dict | None = None, api_key: str | None = None):
        if not base_url.startswith(("http://", "https://")) or "@" in base_url:
            raise DataError(f"--base_url {base_url}: expected http://host:port/v1 without a password in it; "
                            f"a key comes from ${API_KEY} or --api_key_file")
        self.model, self.max_pixels, self.image_factor = model, max_pixels, image_factor
        self.url, self.concurrency, self.server_wait_s = base_url.rstrip("/"), concurrency, server_wait_s
        self.sampling = {"temperature": temperature, "top_p": 1.0, **(extra_body or {})}
        self.identity = {"model": model, "image_factor": image_factor, "decoding": self.sampling}
        self.window, self.in_flight, self.n_answered, self.n_refused = concurrency, 0, 0, 0
        self.pause_until, self.is_down, self.api_key, self.last_words = 0.0, False, api_key, ""
        self.client = httpx.Client(  # trust_env: no proxy in front of 127.0.0.1
            timeout=httpx.Timeout(timeout_s, connect=CONNECT_TIMEOUT_S), trust_env=False,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=concurrency),
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {})
        self.tries: queue.SimpleQueue[tuple[Job, Try]] = queue.SimpleQueue()

    # ---- the scheduler
    def generate(self, requests: Iterable[Request], done: Container[str] = (), stop: Event | None = None
                 ) -> Iterator[Reply]:
        """Yield replies to all requests whose key is not in `done`, as they come.

        After `stop` running calls get DRAIN_S. Raises DataError for an answer about the whole run,
        ErrorRateError without an answer for `server_wait_s`.
        """
        todo = deque(Job(request) for request in requests if request.key not in done)
        waiting: list[tuple[float, int, Job]] = []  # a heap, by the time to send again
        n_open, heard_at, stopped_at = len(todo), time.monotonic(), None
        self.tries, self.in_flight = queue.SimpleQueue(), 0  # calls of an earlier run may still come back
        while n_open:
            now = time.monotonic()
            if stop is not None and stop.is_set():
                stopped_at = stopped_at or now
                if not self.in_flight or now > stopped_at + DRAIN_S:
                    return
            else:
                while waiting and waiting[0][0] <= now:
                    todo.appendleft(heapq.heappop(waiting)[2])
                until = now if self.is_down or self.in_flight else max(now, self.pause_until)
                if until > heard_at + self.server_wait_s:
                    raise ErrorRateError(self.silence(now - heard_at, n_open))
                self.start(todo, now)
            try:
                job, attempt = self.tries.get(timeout=TICK_S)
            except queue.Empty:
                continue
            self.in_flight -= 1
            if reply := self.settle(job, attempt):
                n_open, heard_at = n_open - 1, time.monotonic()
                yield reply
            else:
                heapq.heappush(waiting, (job.send_at, id(job), job))

    def start(self, todo: deque[Job], now: float) -> None:
        while todo and now >= self.pause_until and self.in_flight < min(self.window, self.concurrency):
            job = todo.popleft()
            self.in_flight, job.n_sent = self.in_flight + 1, job.n_sent + 1
            threading.Thread(target=self.work, args=(job, self.tries), daemon=True).start()

    def settle(self, job: Job, attempt: Try) -> Reply | None:
        """Return the reply of a job that ends here, else send it again at `job.send_at`."""
        result, job.send_at, self.last_words = attempt.result, time.monotonic(), attempt.message
        if self.api_key:  # which a server may quote
            self.last_words = self.last_words.replace(self.api_key, "(key)")
        if self.is_down and result in (Result.REPLY, Result.BUSY, Result.UNCLEAR, Result.BAD_SAMPLE):
            log(f"{self.url}: answers again")
            self.is_down = False
        if result is Result.BAD_RUN:
            raise DataError(f"{self.url}: {self.last_words}")
        if result is Result.CRASH:
            raise RuntimeError("the thread of a request died; its traceback is above")
        if result is Result.REPLY:
            self.n_refused, self.n_answered = 0, self.n_answered + 1
            self.window = min(self.concurrency, self.window + 1)
            return replace(attempt.reply, attempts=job.n_sent)
        if result is Result.BUSY:
            job.n_busy += self.n_answered > job.n_answered  # other calls were answered since its last try
            job.n_answered = self.n_answered
            if job.n_busy < TRIES_BUSY:
                self.pause(attempt, window=max(1, self.window // 2))
                job.send_at = self.pause_until
        if result in (Result.DOWN, Result.DIED):
            if not self.is_down:
                log(f"{self.url}: gone ({self.last_words}); waiting until it is back")
            self.is_down = True
            self.pause(attempt, window=1)  # the next call shows whether it is back
        if result in (Result.LOST, Result.DIED):  # a call that runs whenever the server dies is given up
            job.n_lost += 1
            job.send_at += backoff(job.n_lost)
        if result is Result.UNCLEAR:
            job.n_500 += 1
            job.send_at += backoff(job.n_500)
        if result is Result.BAD_SAMPLE or job.n_500 == TRIES_500:
            return self.error(job)
        given_up = job.n_lost == TRIES_LOST or job.n_busy == TRIES_BUSY
        return self.error(job, transient=True) if given_up else None

    def pause(self, attempt: Try, window: int) -> None:
        """Send nothing for a while; calls that fail together count once."""
        if (now := time.monotonic()) >= self.pause_until:
            self.n_refused, self.window = self.n_refused + 1, window
            self.pause_until = now + (backoff(self.n_refused) if attempt.wait_s is None else attempt.wait_s)

    def error(self, job: Job, transient: bool = False) -> Reply:
        return Reply(job.request.key, "", "error", 0, 0, 0.0, self.last_words, job.n_sent, transient)

    def silence(self, seconds: float, n_open: int) -> str:
        """Return in words that no call was answered for so long, with the last answer."""
        fault = "no server has answered" if self.is_down else "the server is up, but gave no reply"
        waited = f"{seconds:.0f} of --server_wait {self.server_wait_s:.0f} s"
        return (f"{self.url}: {fault} for {waited}, {n_open} call{'s' * (n_open > 1)} left; the last one: "
                f"{self.last_words or 'no answer'}; start or repair it, then run the same command again")

    # ---- in a thread
    def work(self, job: Job, tries: queue.SimpleQueue) -> None:
        attempt = Try(Result.CRASH)
        try:
            attempt = self.send(job.request)
        finally:
            tries.put((job, attempt))

    def is_up(self) -> bool:
        """Ask for the models: any answer but a gateway's shows life."""
        try:
            status = self.client.get(f"{self.url}/models", timeout=CONNECT_TIMEOUT_S).status_code
        except httpx.RequestError:
            return False
        return status not in (*BUSY_STATUSES, *GATEWAY_STATUSES)

    def send(self, request: Request) -> Try:
        try:
            body = json.dumps(self.payload(request), separators=(",", ":")).encode("ascii")
            began = time.monotonic()
            response = self.client.post(f"{self.url}/chat/completions", content=body,
                                        headers={"Content-Type": "application/json"})
        except ImageError as error:
            return Try(Result.BAD_SAMPLE, error.reason)
        except httpx.RequestError as error:
            refused = isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout))
            result = Result.LOST if self.is_up() else Result.DOWN if refused else Result.DIED
            return Try(result, f"{type(error).__name__}: {error}")
        status = response.status_code
        if status == 200:
            return read_reply(request.key, response, round(time.monotonic() - began, 3))
        message, after = f"status {status}: {response.text[:500]}", response.headers.get("Retry-After")
        if status in BUSY_STATUSES:
            return Try(Result.BUSY, f"{message} (Retry-After: {after})", wait_s=retry_after(after))
        if status in GATEWAY_STATUSES:
            return Try(Result.LOST if self.is_up() else Result.DOWN, message)
        if status in RUN_STATUSES or status < 400:
            return Try(Result.BAD_RUN, message)
        return Try(Result.UNCLEAR if status >= 500 else Result.BAD_SAMPLE, message)

    def payload(self, request: Request) -> dict:
        if request.messages:
            messages = [{"role": role, "content": parts if isinstance(parts, str) else self.content(parts)}
                        for role, parts in request.messages]
        else:
            messages = [{"role": "system", "content": request.system}] if request.system else []
            messages.append({"role": "user", "content": self.content([*request.pictures, request.text])})
        schema = request.schema and {"type": "json_schema", "json_schema": {
            "name": "reply", "strict": True, "schema": request.schema}}
        body = {"model": self.model, "messages": messages, "max_tokens": request.max_tokens,
                "seed": request.seed, "response_format": schema, **self.sampling}
        return {name: value for name, value in body.items() if value is not None}  # null in --extra_body

    def content(self, parts: Iterable[str | Picture]) -> list[dict]:
        return [{"type": "text", "text": part} if isinstance(part, str) else
                {"type": "image_url",
                 "image_url": {"url": picture_url(part, self.max_pixels, self.image_factor)}}
                for part in parts]


def read_reply(key: str, response: httpx.Response, seconds: float) -> Try:
    """Return what an answer of status 200 means: a reply, a refusal, a lost call or no completion."""
    words = response.text[max(response.text.find('"choices"'), 0):][:500]
    try:
        body = json.loads(response.content.decode(response.charset_encoding or "utf-8").lstrip("\ufeff"))
        choice, usage = body["choices"][0], body.get("usage") or {}
        finish, message = choice.get("finish_reason"), choice.get("message") or {}
        reason = read_finish(finish)
        if reason == FILTERED or message.get("refusal"):
            return Try(Result.BAD_SAMPLE, f"the server refused: {words}")
        if reason is None:
            return Try(Result.LOST, f"finish_reason {finish!r}, expected {' or '.join(FINISHED)}: {words}")
        calls = write_calls(message)
        thought = message.get("reasoning_content") or message.get("reasoning") or ""
        parts = message.get("content") if calls or thought else message["content"]
        parts = [{"type": "text", "text": parts or ""}] if parts is None or isinstance(parts, str) else parts
        if odd := [part["type"] for part in parts if part["type"] != "text"]:
            return Try(Result.BAD_SAMPLE, f"a part of type {odd[0]!r}, expected 'text': {words}")
        text = "".join(part["text"] for part in parts)
        counts = [int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")]
        "".join((text, thought, calls)).encode("utf-8")
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError):
        return Try(Result.UNCLEAR, f"no completion: {words}")
    served = {name: body[name] for name in ("model", "system_fingerprint") if isinstance(body.get(name), str)}
    reply = Reply(key, text, reason, *counts, seconds, served=served, reasoning=thought, tool_calls=calls)
    return Try(Result.REPLY, reply=reply)


def retry_after(value: str | None) -> float | None:
    """Return the seconds of a Retry-After header, if it is a number."""
    value = (value or "").strip()
    return max(SHORTEST_WAIT_S, float(value)) if value.isdecimal() else None


def backoff(n: int) -> float:
    return min(LONGEST_WAIT_S, FIRST_WAIT_S * 2**(n - 1)) * random.uniform(0.75, 1.25)
