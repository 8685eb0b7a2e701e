"""Who answers an item: a checkpoint in this process or a server, in one reply or in turns with a tool.

The journal alone, with one record per turn, decides what was said, so that a run that was killed, or spread
over processes, ends like one that was not. Seconds are in the journal and in no result.
"""
import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from tqdm import tqdm

from utils.backends import OUT_OF_MEMORY, LocalBackend, Prepared, Request, pictures_of, render
from utils.cli import log
from utils.evaluate.prompts import ASKED, MAX_TURNS, Protocol, read_turn, user_text
from utils.images import ImageError, Picture, open_picture, read_bytes, resolve_image
from utils.items import user_content
from utils.journal import Journal
from utils.jsonl import DataError, call_key

NO_REPLY = {"raw_output": None, "clean_output": None, "finish_reason": None, "n_tokens": 0, "n_latent": 0,
            "image_grids": []}


# ---- a conversation
class Conversation:
    """An item and its `messages`: (role, text) or (role, parts), each part a text or a Picture.

    `ended_by` is None while a turn is due, else reply, error, or how the tool's conversation ended. `prompt`
    and `key` (a hash of words, pictures and regions) are those of the next turn.
    """

    def __init__(self, item: dict, protocol: Protocol, root: str, method: str, hashes: dict[str, str]):
        self.item, self.method = item, method
        self.hashes = [image_hash(root, image["path"], hashes) for image in item["images"]]
        self.fault = next((digest.removeprefix("error: ") for digest in self.hashes
                           if digest.startswith("error: ")), None)
        pictures = iter([] if self.fault else [Picture(str(resolve_image(root, image["path"])))
                                               for image in item["images"]])
        try:
            content = user_content(user_text(item, protocol), len(item["images"]))
        except DataError as error:
            raise DataError(f"item {item['id']!r}: {error}") from error
        parts = tuple(part["text"] if part["type"] == "text" else next(pictures, None) for part in content)
        self.opening = ((("system", protocol.system),) if protocol.system else ()) + (("user", parts),)
        self.prompt = self.key = self.first_prompt = None
        self.reset()

    def reset(self) -> None:
        self.messages, self.turns, self.boxes, self.ended_by = self.opening, [], [], None

    def ask(self, system: "Local | Served") -> str:
        """Settle and return the next turn's key."""
        self.prompt = system.render(self.messages)
        self.first_prompt = self.first_prompt or self.prompt
        shown = {"images": self.hashes} | ({"boxes": self.boxes} if self.boxes else {})
        self.key = call_key(id=self.item["id"], prompt=self.prompt, **shown)
        return self.key

    def request(self, max_new_tokens: int) -> Request:
        return Request(self.key, None, "", (), max_new_tokens, messages=self.messages)

    def advance(self, record: dict) -> None:
        """Take a turn's record; open the next turn if it asks for one."""
        self.turns.append(record)
        if "error" in record:
            self.ended_by = "error"
        elif self.method != "tool":
            self.ended_by = "reply"
        else:
            shown = pictures_of(self.messages)[0]
            turn = read_turn(record["clean_output"], open_picture(shown).size)
            self.ended_by = turn.ended_by or ("turns" if len(self.turns) == MAX_TURNS else None)
            if self.ended_by is None:
                self.boxes.append(list(turn.box))
                self.messages += (("assistant", record["clean_output"]), ("user", (
                    "<tool_response>", Picture(shown.path, turn.box), ASKED, "</tool_response>")))

    def result(self) -> dict:
        """Return the last turn's fields of a result, with the tokens of all turns."""
        last = {name: value for name, value in self.turns[-1].items() if name in (*NO_REPLY, "error")}
        sums = {name: sum(turn.get(name, 0) for turn in self.turns) for name in ("n_tokens", "n_latent")}
        result = {"prompt": self.first_prompt, "prompt_sha": call_key(prompt=self.first_prompt)[:16],
                  **NO_REPLY, **last, **sums}
        if self.method == "tool":
            result |= {"ended_by": self.ended_by, "turns": [
                {"raw_output": turn.get("raw_output"), "box": box, "n_tokens": turn.get("n_tokens", 0)}
                for turn, box in zip(self.turns, [*self.boxes, None])]}
        return result

    def seconds(self, name: str = "seconds") -> float:
        """Return the sum over the turns; servers report no "prefill_seconds"."""
        return sum(turn.get(name, 0.0) for turn in self.turns)


def image_hash(root: str, path: str, known: dict[str, str]) -> str:
    """Return the sha256 of a file, or "error: <reason>"."""
    if path not in known:
        try:
            known[path] = hashlib.sha256(read_bytes(resolve_image(root, path))).hexdigest()
        except ImageError as error:
            known[path] = f"error: {error.reason}"
    return known[path]


def show_messages(messages: tuple) -> str:
    """Return messages as JSON, "<image>" for a picture."""
    shown = [[role, parts if isinstance(parts, str) else [part if isinstance(part, str) else "<image>"
                                                          for part in parts]]
             for role, parts in messages]
    return json.dumps(shown, ensure_ascii=False)


# ---- systems
class Local:
    """A checkpoint in this process. Batches are made of all conversations, whatever is done and however many
    processes share them, so that replies are the same to the bit."""

    def __init__(self, backend: LocalBackend, max_new_tokens: int):
        backend.load()
        self.backend, self.max_new_tokens = backend, max_new_tokens
        size = backend.qwen.image_processor.size
        self.pixels = [size["shortest_edge"], size["longest_edge"]]
        backend.image_limits = self.pixels[1], self.pixels[0], backend.qwen.factor

    def render(self, messages: tuple) -> str:
        return render(self.backend.qwen.tokenizer, messages)

    def requests(self, batch: list[Conversation]) -> list[Request]:
        return [c.request(self.max_new_tokens) for c in batch]

    def batches(self, conversations: list[Conversation], rank: int, world: int) -> list[list[Conversation]]:
        by_key = {c.ask(self): c for c in sorted(conversations, key=lambda c: c.item["id"])}
        batches = list(self.backend.batches(self.requests(by_key.values())))
        return [[by_key[request.key] for request in batch] for batch in batches[rank::world]]

    def prepare(self, batch: list[Conversation]) -> Prepared:
        return self.backend.prepare(self.requests(batch))

    def answer(self, batch: list[Conversation], journal: Journal, prepared: Prepared | None = None
               ) -> Iterator[dict]:
        items = {c.key: c.item["id"] for c in batch}
        for reply in self.backend.answer(self.requests(batch), prepared):
            if reply.error == OUT_OF_MEMORY:
                raise DataError(f"item {items[reply.key]!r}: out of memory with it alone; lower "
                                "--max_new_tokens or --max_pixels")
            if reply.error:
                log(f"{items[reply.key]}: {reply.error}")
                yield {"key": reply.key, "error": reply.error}
            else:
                yield {"key": reply.key, "raw_output": reply.raw_text, "clean_output": reply.text,
                       "finish_reason": reply.finish_reason, "n_tokens": reply.n_new,
                       "n_latent": reply.n_latent, "image_grids": list(reply.image_grids),
                       "seconds": round(reply.seconds / reply.n_rows, 6),
                       "prefill_seconds": round(reply.prefill_seconds / reply.n_rows, 6)}


class Served:
    """A model behind an OpenAI-compatible server: one call per turn, all conversations at once. The server
    resizes pictures by its own settings, after they were shrunk to `max_pixels`."""

    def __init__(self, backend: object, max_new_tokens: int, max_pixels: int):
        self.backend, self.max_new_tokens, self.pixels = backend, max_new_tokens, [None, max_pixels]

    def render(self, messages: tuple) -> str:
        return show_messages(messages)

    def batches(self, conversations: list[Conversation], rank: int, world: int) -> list[list[Conversation]]:
        share = conversations[rank::world]
        return [share] if share else []

    prepare = None  # pictures are encoded by the threads that send them

    def answer(self, batch: list[Conversation], journal: Journal, prepared: None = None) -> Iterator[dict]:
        for reply in self.backend.generate([c.request(self.max_new_tokens) for c in batch], journal):
            if reply.error:
                yield {"key": reply.key, "error": reply.error, "transient": reply.transient}
            else:
                yield {"key": reply.key, "raw_output": reply.text, "clean_output": reply.text.strip(),
                       "n_latent": 0, "finish_reason": reply.finish_reason, "n_tokens": reply.n_new,
                       "image_grids": [], "seconds": reply.seconds, "served": reply.served}


# ---- all conversations
def is_turn(record: dict) -> bool:
    return "error" in record or NO_REPLY.keys() <= record.keys()


def answer_all(system: Local | Served, conversations: list[Conversation], journal: Journal, rank: int,
               world: int) -> bool:
    """Answer this process's share and end every conversation; False if others have not done theirs."""
    batches = system.batches(conversations, rank, world)
    for c in (c for batch in batches for c in batch):
        if c.fault and c.ask(system) not in journal:
            log(f"{c.item['id']}: {c.fault}: cannot use its picture; is --image_root right?")
            journal.append({"key": c.key, "error": c.fault})
    lacking = [batch for batch in batches if not replay(system, batch, journal)]
    for batch, prepared in tqdm(look_ahead(system, lacking, journal), total=len(lacking), desc="evaluate",
                                unit="batch", disable=rank > 0):
        while live := [c for c in batch if c.ended_by is None]:
            keys = [c.ask(system) for c in live]
            if not all(key in journal for key in keys):
                for record in system.answer([c for c in live if not c.fault], journal,
                                            prepared and prepared.result()):
                    if record["key"] not in journal:  # a batch cut short by a kill is computed whole
                        journal.append(record)
            prepared = None
            for c, key in zip(live, keys):
                c.advance(journal.get(key))
    if world > 1:
        journal.reload()
    return replay(system, conversations, journal)


def replay(system: Local | Served, conversations: list[Conversation], journal: Journal) -> bool:
    """End conversations from the journal alone, all or none; False if a record is missing."""
    unfinished = [c for c in conversations if c.ended_by is None]
    for c in unfinished:
        while c.ended_by is None and c.ask(system) in journal:
            c.advance(journal.get(c.key))
    if all(c.ended_by for c in unfinished):
        return True
    for c in unfinished:
        c.reset()
    return False


def look_ahead(system: Local | Served, batches: list[list[Conversation]], journal: Journal
               ) -> Iterator[tuple[list[Conversation], Future | None]]:
    """Yield each batch with its first turn's tensors, made by a thread during the batch before."""
    with ThreadPoolExecutor(max_workers=1) as ahead:
        before = None
        for batch in batches:
            wanted = system.prepare and not all(c.ask(system) in journal for c in batch)
            after = batch, ahead.submit(system.prepare, [c for c in batch if not c.fault]) if wanted else None
            if before:
                yield before
            before = after
        if before:
            yield before
