"""An OpenAI-compatible server (vLLM, SGLang, transformers serve), or several of them, as a backend.

One thread a request, of which at most `concurrency` are under way, and one scheduler: the caller's own loop.
What each answer of a server means is decided in one place, `HttpBackend.settle`.
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
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from threading import Event

from huggingface_hub.utils import httpx

from utils.backends import ErrorRateError, Reply, Request
from utils.cli import API_KEY, log
from utils.images import ImageError, Picture, picture_url
from utils.jsonl import DataError

BUSY, LOST = (429, 503), (408, 502, 504)  # statuses: of a server that wants less; of one that may be gone
RUN = (401, 402, 403, 404, 405)  # no call will do better: stop and say what the server said
TRIES_500 = 3  # a 500 may be the sample's fault (transformers serve gives it for a bad image) or the server's
TRIES_LOST = 5  # connections lost or timed out under one call: the sample may well break the server
TRIES_BUSY = 30  # busy answers to one call, with others answered in between
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0  # backoff: doubled each time, with jitter
SHORTEST_WAIT_S = 0.5  # whatever a server's Retry-After says
POLL_TIMEOUT_S, CONNECT_TIMEOUT_S = 10.0, 10.0
DRAIN_S = 30.0  # how long an interrupted run waits for the calls under way
TICK_S = 0.1


@dataclass
class Server:
    """What the scheduler knows of one server; `window` is how many calls it gets at once, halved when it is
    busy."""

    url: str
    window: int
    in_flight: int = 0
    n_refused: int = 0  # busy answers and failed polls in a row
    pause_until: float = 0.0
    is_dead: bool = False
    polling: bool = False


@dataclass(slots=True)
class Job:
    """One request on its way, with the tries that counted against it."""

    request: Request
    n_sent: int = 0
    n_500: int = 0
    n_lost: int = 0
    n_busy: int = 0
    n_answered: int = 0  # replies to all jobs, when a server last was too busy for this one


@dataclass
class Result:
    """What a thread brings back: `kind` is reply, sample, run, unclear (500), busy, alive, or what became of
    a server.

    lost: the connection broke, or timed out, and the server lives; died: it does not, and had the call; dead:
    it did not even take it.
    """

    kind: str
    message: str = ""
    reply: Reply | None = None
    wait_s: float | None = None


class HttpBackend:
    """Requests to one or more servers that hold the same model.

    Every server gets as many calls as the others; one that is gone is left out, and polled until it is back.
    """

    def __init__(self, model: str, base_urls: list[str], max_pixels: int, image_factor: int = 32,
                 concurrency: int = 64,
                 timeout_s: float = 300.0, server_wait_s: float = 1800.0, temperature: float = 0.0,
                 extra_body: dict | None = None, api_key: str | None = None):
        for url in base_urls:
            if not url.startswith(("http://", "https://")) or "@" in url:
                raise DataError(
                    f"--base_url {url}: expected http://host:port/v1 without a password in it; a key comes "
                                f"from ${API_KEY} or --api_key_file")
        self.model, self.max_pixels, self.image_factor = model, max_pixels, image_factor
        self.concurrency, self.server_wait_s = concurrency, server_wait_s
        self.sampling = {"temperature": temperature, "top_p": 1.0, **(extra_body or {})}
        self.identity = {"model": model, "image_factor": image_factor, "decoding": self.sampling}
        self.servers = [Server(url.rstrip("/"), concurrency) for url in base_urls]
        self.api_key, self.n_answered = api_key, 0
        self.client = httpx.Client(
            # no proxy before 127.0.0.1
            timeout=httpx.Timeout(timeout_s, connect=CONNECT_TIMEOUT_S), trust_env=False,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=concurrency),
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {})
        self.results: queue.SimpleQueue = queue.SimpleQueue()

    # ------------------------------------------------------------------------------------------ the scheduler
    def generate(self, requests: Iterable[Request], done: Container[str] = (), stop: Event | None = None
                 ) -> Iterator[Reply]:
        """Yield a reply for every request whose key is not in `done`, in the order in which they come.

        Once `stop` is set nothing more is sent, and what is under way gets DRAIN_S. Raises DataError for an
        answer that concerns the whole run, ErrorRateError if no server has answered for `server_wait_s`.
        """
        todo = deque(Job(request) for request in requests if request.key not in done)
        waiting: list[tuple[float, int, Job]] = []  # a heap: when to send again
        n_open, heard_at, stopped_at = len(todo), time.monotonic(), None
        while n_open:
            now = time.monotonic()
            if stop is not None and stop.is_set():
                stopped_at = stopped_at or now
                if not any(server.in_flight for server in self.servers) or now > stopped_at + DRAIN_S:
                    return
            else:
                while waiting and waiting[0][0] <= now:
                    todo.appendleft(heapq.heappop(waiting)[2])
                if now > heard_at + self.server_wait_s:
                    raise ErrorRateError(
                        f"no server has answered for {self.server_wait_s:.0f} s, {n_open} calls are "
                                         "left; start one and run the same command again")
                self.start(todo, now)
            try:
                job, server, result = self.results.get(timeout=TICK_S)
            except queue.Empty:
                continue
            reply, again_at = self.settle(job, server, result)
            if reply is not None:
                n_open, heard_at = n_open - 1, time.monotonic()
                yield reply
            elif job is not None:
                heapq.heappush(waiting, (again_at, id(job), job))

    def start(self, todo: deque, now: float) -> None:
        """Send as many jobs as the servers may take, to the least busy one first; poll the dead ones when it
        is time.
        """
        for server in self.servers:
            if server.is_dead and not server.polling and now >= server.pause_until:
                server.polling = True
                threading.Thread(target=self.work, args=(None, server), daemon=True).start()
        n_free = self.concurrency - sum(server.in_flight for server in self.servers)
        while todo and n_free > 0:
            free = [server for server in self.servers if not server.is_dead and now >= server.pause_until
                    and server.in_flight < server.window]
            if not free:
                return
            server, job = min(free, key=lambda server: server.in_flight), todo.popleft()
            server.in_flight, job.n_sent, n_free = server.in_flight + 1, job.n_sent + 1, n_free - 1
            # daemon: never holds up an exit
            threading.Thread(target=self.work, args=(job, server), daemon=True).start()

    def settle(self, job: Job | None, server: Server, result: Result) -> tuple[Reply | None, float]:
        """Return (the reply of a job that has come to its end, or None; when to send it again)."""
        now = time.monotonic()
        if result.kind == "crash":
            raise RuntimeError("a request's thread died; its traceback stands above")
        if job is None:  # a poll
            server.polling, server.is_dead = False, result.kind != "alive"
            self.pause(server, result, now) if server.is_dead else log(f"{server.url}: answers again")
            return None, now
        server.in_flight -= 1
        if result.kind == "run":
            raise DataError(f"{server.url}: {self.redact(result.message)}")
        if result.kind == "reply":
            self.n_answered, server.n_refused = self.n_answered + 1, 0
            server.window = min(self.concurrency, server.window + 1)
            return replace(result.reply, attempts=job.n_sent), now
        if result.kind == "sample":
            return self.error(job, result), now
        if result.kind == "unclear":
            job.n_500 += 1
            return (self.error(job, result), now) if job.n_500 == TRIES_500 else (None,
                                                                                  now + backoff(job.n_500))
        if result.kind in ("died", "dead") and not server.is_dead:
            log(f"{server.url}: gone ({self.redact(result.message)}); polling until it is back")
            server.is_dead = True
            self.pause(server, result, now)
        # a call that was there each time a server fell is not let in for ever
        if result.kind in ("died", "lost"):
            job.n_lost += 1
            enough = job.n_lost == TRIES_LOST
            return (self.error(job, result, transient=True), now) if enough else (None,
                                                                                  now + backoff(job.n_lost))
        if result.kind == "busy":
            job.n_busy += self.n_answered > job.n_answered  # others were answered since its last try
            job.n_answered = self.n_answered
            if job.n_busy == TRIES_BUSY:
                return self.error(job, result, transient=True), now
            if now >= server.pause_until:  # once for all that were under way together
                server.window = max(1, server.window // 2)
                self.pause(server, result, now)
            return None, server.pause_until
        return None, now

    def pause(self, server: Server, result: Result, now: float) -> None:
        server.n_refused += 1
        server.pause_until = now + (backoff(server.n_refused) if result.wait_s is None else result.wait_s)

    def error(self, job: Job, result: Result, transient: bool = False) -> Reply:
        return Reply(job.request.key, "", "error", 0, 0, 0.0, self.redact(result.message), job.n_sent,
                     transient)

    def redact(self, message: str) -> str:
        """Return a message of a server without the key that it may quote."""
        return message.replace(self.api_key, "(key)") if self.api_key else message

    # -------------------------------------------------------------------------------------------- in a thread
    def work(self, job: Job | None, server: Server) -> None:
        """Make one try at a job, or a poll if there is none, and hand over its result."""
        result = Result("crash")
        try:
            result = self.poll(server) if job is None else self.send(job.request, server)
        finally:
            self.results.put((job, server, result))

    def poll(self, server: Server) -> Result:
        """Ask for the list of models: any answer but that of a gateway before a dead server is a sign of
        life."""
        try:
            status = self.client.get(f"{server.url}/models", timeout=POLL_TIMEOUT_S).status_code
        except httpx.RequestError as error:
            return Result("dead", f"{type(error).__name__}: {error}")
        return Result("dead", f"status {status}") if status in (*BUSY, *LOST) else Result("alive")

    def send(self, request: Request, server: Server) -> Result:
        """Post one request and say what kind of result came back."""
        try:
            body = json.dumps(self.payload(request), separators=(",", ":")).encode("ascii")
        except ImageError as error:
            return Result("sample", error.reason)
        began = time.monotonic()
        try:
            response = self.client.post(f"{server.url}/chat/completions", content=body,
                                        headers={"Content-Type": "application/json"})
        except httpx.RequestError as error:
            gone = "dead" if isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout)) else "died"
            return Result("lost" if self.poll(server).kind == "alive" else gone,
                          f"{type(error).__name__}: {error}")
        status, seconds = response.status_code, round(time.monotonic() - began, 3)
        if status == 200:
            reply = read_reply(request.key, response, seconds)
            return Result("reply", reply=reply) if reply else Result("unclear",
                                                                     f"no completion: {response.text[:200]}")
        message = f"status {status}: {response.text[:500]}"
        if status in BUSY:
            return Result("busy", message, wait_s=retry_after(response.headers.get("Retry-After")))
        if status in LOST:
            return Result("lost" if self.poll(server).kind == "alive" else "dead", message)
        if status in RUN or status < 400:
            return Result("run", message)
        return Result("unclear" if status >= 500 else "sample", message)

    def payload(self, request: Request) -> dict:
        """Return the body: images first, then the text, under one system prompt; or the messages as they are
        given."""
        if request.messages:
            messages = [{"role": role, "content": parts if isinstance(parts, str) else self.content(parts)}
                        for role, parts in request.messages]
        else:
            messages = [{"role": "system", "content": request.system}] if request.system else []
            messages.append({"role": "user",
                             "content": self.content([*map(Picture, request.images), request.text])})
        body = {"model": self.model, "messages": messages, "max_tokens": request.max_tokens,
                "seed": request.seed,
                **self.sampling}
        if request.schema:
            body["response_format"] = {"type": "json_schema", "json_schema": {
                "name": "reply", "strict": True, "schema": request.schema}}
        return body

    def content(self, parts: Iterable[str | Picture]) -> list[dict]:
        """Return what a user's message holds, in order."""
        return [{"type": "text", "text": part} if isinstance(part, str) else
                {"type": "image_url",
                 "image_url": {"url": picture_url(part, self.max_pixels, self.image_factor)}}
                for part in parts]


def read_reply(key: str, response: httpx.Response, seconds: float) -> Reply | None:
    """Return the reply in a chat completion, or None if it is not one."""
    try:
        body = response.json()
        choice, usage = body["choices"][0], body.get("usage") or {}
        text, finish = choice["message"]["content"] or "", choice.get("finish_reason") or "stop"
        counts = [int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")]
        text.encode("utf-8")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return None
    served = {name: body[name] for name in ("model", "system_fingerprint") if isinstance(body.get(name), str)}
    return Reply(key, text, finish, *counts, seconds, served=served)


def retry_after(value: str | None) -> float | None:
    """Return the seconds of a Retry-After header (a number or an HTTP date), or None without a usable one."""
    if value is None:
        return None
    if value.strip().isdigit():
        return max(float(value), SHORTEST_WAIT_S)
    try:
        return max(SHORTEST_WAIT_S, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return None


def backoff(n: int) -> float:
    """Return the seconds to wait after the nth failure."""
    return min(LONGEST_WAIT_S, FIRST_WAIT_S * 2**(n - 1)) * random.uniform(0.75, 1.25)
