"""Who answers an item: a checkpoint in this process, or a server; in one reply, or in turns with a tool in
between.

    conversations = [Conversation(item, protocol, root, method) for item in items]
    answer_all(system, conversations, journal)      # a record a turn, by what was shown and said so far
    results = [conversation.result() for conversation in conversations]

The journal alone decides what was said: the same records lead to the same conversations, so that a run that
was killed, or was spread over processes, ends as one that was not. Seconds are in the journal's records and
in no result.
"""
import hashlib
import json
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from tqdm import tqdm

from utils.backends import Request
from utils.cli import log
from utils.decode import decode, prefill
from utils.evaluate.prompts import ASKED, MAX_TURNS, Protocol, read_turn, user_text
from utils.images import ImageError, Picture, open_picture, read_bytes, resolve_image, visual_tokens
from utils.items import plain, user_content
from utils.journal import Journal
from utils.jsonl import DataError, call_key
from utils.latent_families import Generation, LatentSpec, clean_text
from utils.qwen import Qwen, encode

NO_REPLY = {"raw_output": None, "clean_output": None, "finish_reason": None, "n_tokens": 0, "n_latent": 0,
            "image_grids": []}


# --------------------------------------------------------------------------------------------- a conversation
class Conversation:
    """An item and what was said about it. `messages`: (role, text) or (role, parts), each part a text or a
    Picture.

    `ended_by` is None while a turn is due, else reply, error, or how a tool's conversation ends
    (utils/evaluate/prompts.py); `prompt` and `key` are those of the next turn: the key stands for the words,
    the pictures' bytes and the regions shown.
    """

    def __init__(self, item: dict, protocol: Protocol, root: str, method: str, hashes: dict[str, str]):
        self.item, self.method, self.turns, self.boxes, self.ended_by = item, method, [], [], None
        self.hashes = [image_hash(root, image["path"], hashes) for image in item["images"]]
        self.fault = next((found.removeprefix("error: ") for found in self.hashes
                           if found.startswith("error: ")), None)
        pictures = iter([] if self.fault else [Picture(str(resolve_image(root, image["path"])))
                                               for image in item["images"]])
        words = user_text(item, protocol)
        try:
            content = user_content(words, len(item["images"]))
        except DataError as error:
            raise DataError(f"item {item['id']!r}: {error}") from error
        parts = tuple(part["text"] if part["type"] == "text" else next(pictures, None) for part in content)
        self.messages = ((("system", protocol.system),) if protocol.system else ()) + (("user", parts),)
        self.prompt = self.key = self.first_prompt = None

    @property
    def pictures(self) -> list[Picture]:
        return [part for _, parts in self.messages if not isinstance(parts, str) for part in parts
                if isinstance(part, Picture)]

    def ask(self, system: "Local | Served") -> str:
        """Settle and return the key of the turn that is due."""
        self.prompt = system.render(self.messages)
        self.first_prompt = self.first_prompt or self.prompt
        shown = {"images": self.hashes} | ({"boxes": self.boxes} if self.boxes else {})
        self.key = call_key(id=self.item["id"], prompt=self.prompt, **shown)
        return self.key

    def advance(self, record: dict) -> None:
        """Take a turn's record, and open the next turn if it asks for one."""
        self.turns.append(record)
        if "error" in record:
            self.ended_by = "error"
        elif self.method != "tool":
            self.ended_by = "reply"
        else:
            shown = self.pictures[0]
            turn = read_turn(record["clean_output"], open_picture(shown).size)
            self.ended_by = turn.ended_by or ("turns" if len(self.turns) == MAX_TURNS else None)
            if self.ended_by is None:
                self.boxes.append(list(turn.box))
                self.messages += (("assistant", record["clean_output"]), ("user", (
                    "<tool_response>", Picture(shown.path, turn.box), ASKED, "</tool_response>")))

    def result(self) -> dict:
        """Return the fields of a result that come from what was said; all tokens and pictures of all turns.
        """
        last = {name: value for name, value in self.turns[-1].items() if name in (*NO_REPLY, "error")}
        sums = {name: sum(turn.get(name, 0) for turn in self.turns) for name in ("n_tokens", "n_latent")}
        found = {"prompt": self.first_prompt, "prompt_sha": call_key(prompt=self.first_prompt)[:16],
                 **NO_REPLY, **last, **sums}
        if self.method == "tool":
            found |= {"ended_by": self.ended_by, "turns": [
                {"raw_output": turn.get("raw_output"), "box": box, "n_tokens": turn.get("n_tokens", 0)}
                for turn, box in zip(self.turns, [*self.boxes, None])]}
        return found

    def seconds(self, name: str = "seconds") -> float:
        """Return the sum over the turns; "prefill_seconds": of reading prompts, which a server does not tell.
        """
        return sum(turn.get(name, 0.0) for turn in self.turns)


def image_hash(root: str, path: str, known: dict[str, str]) -> str:
    """Return the sha256 of a picture's bytes, or "error: <reason>"; a picture that is mended is asked about
    again."""
    if path not in known:
        try:
            known[path] = hashlib.sha256(read_bytes(resolve_image(root, path))).hexdigest()
        except ImageError as error:
            known[path] = f"error: {error.reason}"
    return known[path]


# ------------------------------------------------------------------------------------------ a checkpoint here
class Local:
    """A checkpoint in this process: greedy, in left-padded batches of like length, one after the other.

    A batch holds at most `batch_size` conversations and, replies at full length, `batch_tokens` tokens.
    Batches are made of all conversations, whatever is done already and however many processes share them, so
    that replies are the same to the bit.
    """

    def __init__(self, qwen: Qwen, spec: LatentSpec | None, max_new_tokens: int, batch_size: int,
                 batch_tokens: int):
        self.qwen, self.spec, self.max_new_tokens = qwen, spec, max_new_tokens
        self.batch_size, self.batch_tokens = batch_size, batch_tokens
        self.pixels = [qwen.image_processor.size[edge] for edge in ("shortest_edge", "longest_edge")]

    def render(self, messages: tuple) -> str:
        """Return the prompt as the checkpoint's chat template writes it."""
        return render(self.qwen.tokenizer, messages)

    def batches(self, conversations: list[Conversation], rank: int, world: int) -> list[list[Conversation]]:
        """Return this process's batches, the longest prompts first."""
        sized = [(self.length(conversation) + self.max_new_tokens, conversation)
                 for conversation in conversations]
        sized.sort(key=lambda pair: (-pair[0], pair[1].item["id"]))
        return list(fill_batches(sized, self))[rank::world]

    def length(self, conversation: Conversation) -> int:
        """Return about how many tokens a prompt has: visual ones from the headers, and a quarter of the
        characters."""
        n_characters = sum(len(text) for _, parts in conversation.messages
                           for text in ([parts] if isinstance(parts, str) else parts)
                           if isinstance(text, str))
        low, high = self.pixels
        return n_characters // 4 + sum(visual_tokens(picture.path, high, low, self.qwen.factor)
                                       for picture in conversation.pictures)

    def prepare(self, batch: list[Conversation]) -> tuple[list[Conversation], dict | None, list[dict]]:
        """Return (conversations that can be asked, their tensors, records of those that cannot)."""
        ready, images, records = [], [], []
        for conversation in batch:
            try:
                if conversation.fault:
                    raise ImageError(conversation.fault, "its picture cannot be used; is --image_root right?")
                images.append([open_picture(picture) for picture in conversation.pictures])
                ready.append(conversation)
            except ImageError as error:
                log(f"{conversation.item['id']}: {error.reason}: {error}")
                records.append({"key": conversation.key, "error": error.reason})
        return ready, encode(self.qwen, [c.prompt for c in ready], images) if ready else None, records

    def answer(self, batch: list[Conversation], journal: Journal, prepared: tuple
               | None = None) -> Iterator[dict]:
        """Yield a record for each conversation of a batch; out of memory, it is split in two, down to single
        ones."""
        ready, inputs, records = prepared or self.prepare(batch)
        yield from records
        if not ready:
            return
        try:
            found = self.compute(ready, inputs)
        except torch.OutOfMemoryError:
            found = None
        if found is None:  # out of the handler, whose traceback would keep the tensors alive
            del inputs, prepared
            torch.cuda.empty_cache()
            if len(ready) == 1:
                raise DataError(
                    f"item {ready[0].item['id']!r}: out of memory with it alone; expected fewer --max_new_tokens, "
                                "a lower --max_pixels or a larger device")
            log(f"out of memory with {len(ready)} items in a batch; splitting it (lower --batch_tokens {self.batch_tokens})")
            half = len(ready) // 2
            found = [*self.answer(ready[:half], journal), *self.answer(ready[half:], journal)]
        yield from found

    def compute(self, ready: list[Conversation], inputs: dict) -> list[dict]:
        """Return the records of a batch that fits."""
        began = time.monotonic()
        state = prefill(self.qwen, inputs, self.spec)
        if state.hidden.is_cuda:
            torch.cuda.synchronize(state.hidden.device)
        read = time.monotonic()
        said = [self.describe(row) for row in decode(self.qwen, state, self.max_new_tokens, self.spec)[0]]
        seconds, prefill_seconds = ((until - began) / len(ready) for until in (time.monotonic(), read))
        grids = iter(inputs["image_grid_thw"].tolist() if "image_grid_thw" in inputs else [])
        return [{"key": c.key, **its, "image_grids": [next(grids) for _ in c.pictures],
                 "seconds": round(seconds, 6),
                 "prefill_seconds": round(prefill_seconds, 6)} for c, its in zip(ready, said)]

    def describe(self, row: Generation) -> dict:
        """Return what one reply was; its clean text holds no latent positions and no control tokens."""
        tokenizer = self.qwen.tokenizer
        return {"raw_output": tokenizer.decode(row.ids), "clean_output": clean_text(tokenizer, row.ids,
                                                                                    self.spec),
                "finish_reason": row.finish, "n_tokens": len(row.ids),
                "n_latent": sum(part.size for part in row.segments)}


def render(tokenizer, messages: tuple) -> str:
    """Return a conversation's prompt up to the start of the assistant's turn, an image pad a picture."""
    turns = []
    for role, parts in messages:
        texts = [plain(parts) if role == "assistant" else parts] if isinstance(parts, str) else parts
        turns.append({"role": role, "content": [{"type": "text", "text": part} if isinstance(part, str)
                                                else {"type": "image"}
                                                for part in texts]})
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


def show_messages(messages: tuple) -> str:
    """Return messages as JSON, "<image>" for a picture: which pictures those are is for the key to say."""
    shown = [[role, parts if isinstance(parts, str) else [part if isinstance(part, str) else "<image>"
                                                          for part in parts]]
             for role, parts in messages]
    return json.dumps(shown, ensure_ascii=False)


# ------------------------------------------------------------------------------------------------ a server
class Served:
    """A model behind an OpenAI-compatible server (utils/openai_backend.py): one call a turn, all
    conversations at once.

    The server resizes by settings of its own, of which only the upper bound is kept here, by shrinking what
    is sent.
    """

    def __init__(self, backend: object, max_new_tokens: int, max_pixels: int):
        self.backend, self.max_new_tokens, self.pixels = backend, max_new_tokens, [None, max_pixels]

    def render(self, messages: tuple) -> str:
        """Return the messages as text."""
        return show_messages(messages)

    def batches(self, conversations: list[Conversation], rank: int, world: int) -> list[list[Conversation]]:
        """Return this process's conversations, as one batch."""
        mine = conversations[rank::world]
        return [mine] if mine else []

    prepare = None  # pictures are encoded by the threads that send them

    def answer(self, batch: list[Conversation], journal: Journal, prepared: None = None) -> Iterator[dict]:
        """Yield a record for each conversation that the journal lacks, as replies come."""
        yield from ({"key": c.key, "error": c.fault} for c in batch if c.fault and c.key not in journal)
        requests = [Request(c.key, None, "", (), self.max_new_tokens, None, c.messages) for c in batch
                    if not c.fault]
        for reply in self.backend.generate(requests, journal):
            if reply.error:
                yield {"key": reply.key, "error": reply.error, "transient": reply.transient}
            else:
                yield {"key": reply.key, "raw_output": reply.text, "clean_output": reply.text.strip(),
                       "n_latent": 0,
                       "finish_reason": reply.finish_reason, "n_tokens": reply.n_new, "image_grids": [],
                       "seconds": reply.seconds, "served": reply.served}


# ------------------------------------------------------------------------------------------ all conversations
def is_turn(record: dict) -> bool:
    """Return whether a record of the journal is a turn, or an error, with fields of the types that are read
    here."""
    if type(record["key"]) is not str or "error" in record:
        return type(record["key"]) is str and type(record["error"]) is str
    return (all(type(record[name]) is str for name in ("raw_output", "clean_output", "finish_reason"))
            and all(type(record[name]) is int for name in ("n_tokens", "n_latent"))
            and all(isinstance(record.get(name, 0.0), (int, float)) for name in ("seconds",
                                                                                 "prefill_seconds"))
            and type(record["image_grids"]) is list)


def answer_all(system: Local | Served, conversations: list[Conversation], journal: Journal, rank: int,
               world: int) -> bool:
    """Answer this process's share and bring every conversation to its end; False if other processes have not
    done theirs."""
    batches = system.batches(conversations, rank, world)
    for batch in batches:
        for conversation in batch:
            conversation.ask(system)
    lacking = [batch for batch in batches if not replay(system, batch, journal)]
    for batch, prepared in tqdm(look_ahead(system, lacking, journal), total=len(lacking), desc="evaluate",
                                unit="batch",
                                disable=rank > 0):
        while live := [c for c in batch if c.ended_by is None]:
            keys = [c.ask(system) for c in live]
            if not all(key in journal for key in keys):
                for record in system.answer(live, journal, prepared and prepared.result()):
                    # a batch that a kill left half done is computed again whole
                    if record["key"] not in journal:
                        journal.append(record)
            prepared = None
            for conversation, key in zip(live, keys):
                conversation.advance(journal.get(key))
    if world > 1:
        journal.reload()
    return replay(system, conversations, journal)


def replay(system: Local | Served, conversations: list[Conversation], journal: Journal) -> bool:
    """Bring conversations to their ends from the journal alone, all or none of them; False if a record is
    missing."""
    open_ones, ends = [c for c in conversations if c.ended_by is None], True
    before = [(c, c.messages, len(c.turns), len(c.boxes)) for c in open_ones]
    for conversation in open_ones:
        while conversation.ended_by is None and conversation.ask(system) in journal:
            conversation.advance(journal.get(conversation.key))
        ends = ends and conversation.ended_by is not None
    if not ends:
        for conversation, messages, n_turns, n_boxes in before:
            conversation.messages, conversation.ended_by = messages, None
            del conversation.turns[n_turns:], conversation.boxes[n_boxes:]
            conversation.ask(system)
    return ends


def look_ahead(system: Local | Served, batches: list[list[Conversation]], journal: Journal
               ) -> Iterator[tuple[list[Conversation], Future | None]]:
    """Yield each batch with its first turn's tensors, made by a thread while the batch before it is computed.
    """
    with ThreadPoolExecutor(max_workers=1) as ahead:
        before = None
        for batch in batches:
            wanted = system.prepare and not all(c.key in journal for c in batch)
            after = batch, ahead.submit(system.prepare, batch) if wanted else None
            if before:
                yield before
            before = after
        if before:
            yield before


def fill_batches(sized, limits):
    batch, longest = [], 0
    for n_tokens, one in sized:
        longest = max(longest, n_tokens)
        if len(batch) == limits.batch_size or batch and (len(batch) + 1) * longest > limits.batch_tokens:
            yield batch
            batch, longest = [], n_tokens
        batch.append(one)
    if batch:
        yield batch
