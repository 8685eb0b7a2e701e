"""Who answers an item: a checkpoint in this process or a server, in one reply or in turns with a tool; or a
file of replies made elsewhere.

The journal, with one record per turn, alone decides what was said: a run that was killed, or spread over
processes, ends like any other. Seconds are in the journal and in no result.
"""
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from zipfile import BadZipFile

from tqdm import tqdm

from utils.backends import FINISHED, OUT_OF_MEMORY, TEXTLESS, LocalBackend, Prepared, Request, read_finish
from utils.cli import log
from utils.evaluate.prompts import Conversation, show_messages
from utils.evaluate.reference_scorers import NO_REPLY as FAILED_CALL
from utils.evaluate.sources import Row, Rows, as_text, file_rows, is_missing
from utils.items import render
from utils.journal import Journal
from utils.jsonl import DataError, check_fields, check_unique
from utils.model_calls import Guard

TURN_FIELDS = {"key": str, "raw_output": str, "clean_output": str, "finish_reason": object, "n_tokens": int,
               "n_latent": int, "image_grids": list}


# ---- systems
def sampler(temperature: float) -> Callable[[Request], Callable]:
    """Return request -> choose(logits [vocab], n) -> id, drawn from softmax(logits / temperature) by the
    request's own seed: neither its batch nor a restart changes what is drawn."""
    import torch

    def of_request(request: Request) -> Callable:
        generator = torch.Generator().manual_seed(request.seed)

        def choose(logits: torch.Tensor, n: int) -> int:
            summed = (logits.double() / temperature).softmax(-1).cumsum(-1)
            drawn = summed[-1] * float(torch.rand((), generator=generator, dtype=torch.float64))
            return min(int(torch.searchsorted(summed, drawn, right=True)), len(summed) - 1)
        return choose
    return of_request


class Local:
    """A checkpoint in this process. Batches are made of all conversations, whatever is done and however many
    processes share them: replies are the same to the bit."""

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
        by_key = {c.ask(self): c for c in sorted(conversations, key=lambda c: (c.item["id"], c.sample))}
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
    """A model behind an OpenAI-compatible server, all conversations at once. The server resizes pictures by
    its own settings, after they were shrunk to `max_pixels`."""

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
                continue
            text, calls = reply.text, reply.tool_calls
            if batch[0].method == "tool" and calls:
                text, calls = f"{text}\n{calls}".lstrip("\n"), ""
            yield {"key": reply.key, "raw_output": text, "clean_output": text.strip(), "n_latent": 0,
                   "finish_reason": reply.finish_reason, "n_tokens": reply.n_new, "image_grids": [],
                   "seconds": reply.seconds, "served": reply.served,
                   **{name: value for name, value in zip(TEXTLESS, (reply.reasoning, calls)) if value}}


# ---- all conversations
def is_turn(record: dict) -> bool:
    check_fields("turn", record, {"key": str, "error": str} if "error" in record else TURN_FIELDS)
    return "error" in record or record["finish_reason"] in FINISHED


def answer_all(system: Local | Served, conversations: list[Conversation], journal: Journal, rank: int,
               world: int, guarded: bool = False) -> bool:
    """Answer this process's share and end every conversation; return whether the others have done theirs."""
    guard = Guard(guarded)
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
                        guard.count(record.get("error"))
            prepared = None
            for c, key in zip(live, keys):
                c.advance(journal.get(key))
    if world > 1:
        journal.reload()
    return replay(system, conversations, journal)


def replay(system: Local | Served, conversations: list[Conversation], journal: Journal) -> bool:
    """End conversations from the journal alone, all or none; return whether no record is missing."""
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


# ---- replies made elsewhere
# form -> its columns: VLMEvalKit's predictions (vlmeval/inference.py), lmms-eval's samples
# (lmms_eval/loggers/evaluation_tracker.py), and ours
REPLY_FORMS = {"vlmevalkit": {"index": object, "prediction": object},
               "lmms-eval": {"doc_id": int, "target": object}, "ours": {"id": str, "text": str}}
GOLDS = {"vlmevalkit": "answer", "lmms-eval": "target"}  # columns


def read_replies(path: str, items: list[dict]) -> tuple[list[dict], dict]:
    """Return for every item {"raw_output", "clean_output", "finish_reason"} or {"error"}, and counts of rows.

    VLMEvalKit's index is that of the items' source; a doc_id of lmms-eval is an item's place. DataError for
    another form, and for golds that are not the items'.
    """
    read = xlsx_rows if Path(path).suffix == ".xlsx" else file_rows
    rows, found, differing = list(read(Path(path))), defaultdict(list), []
    if not rows:
        raise DataError(f"{path}: no rows; expected a reply per item")
    form = form_of(*rows[0])
    known = items_by_name(items, form)
    for where, row in rows:
        check_fields(where, row, REPLY_FORMS[form])
        if item := known.get(name_of(where, row, form)):
            gold = row.get(GOLDS.get(form))
            if gold is not None and is_other_gold(item, gold):
                differing.append(f"{where} has {gold!r}, {item['id']!r} {item['answer']['value']!r}")
            found[item["id"]].append(reply_of(where, row, form))
    if differing or not found:
        fault = f"{len(differing)} golds are not the items' ({differing[0]}, ...)" if differing else (
            f"no row belongs to an item such as {items[0]['id']!r}")
        raise DataError(f"{path}: {fault}; expected replies to these items, of lmms-eval in their order")
    replies = [settle(found.get(item["id"], [])) for item in items]
    errors = Counter(reply.get("error") for reply in replies)
    return replies, {
        "file": path, "form": form, "rows": len(rows),
        "of_no_item": len(rows) - sum(map(len, found.values())),
        "doubled": sum(len(several) > 1 for several in found.values()),
        **{error: errors[error] for error in ("no_response", "different_responses", "failed_call")}}


def xlsx_rows(path: Path) -> Rows:
    try:
        from openpyxl import load_workbook
    except ImportError as error:
        raise DataError(f"{path}: openpyxl is not installed; save as TSV or CSV, or install it") from error
    try:
        lines = load_workbook(path, read_only=True).worksheets[0].iter_rows(values_only=True)
        names = [str(name) for name in next(lines, ())]
    except (OSError, KeyError, BadZipFile) as error:
        raise DataError(f"{path}: not a workbook ({error}); save it again") from error
    yield from ((f"{path}:{n}", dict(zip(names, cells))) for n, cells in enumerate(lines, 2)
                if any(value is not None for value in cells))


def form_of(where: str, row: dict) -> str:
    for form, columns in REPLY_FORMS.items():
        if columns.keys() <= row.keys():
            return form
    expected = " or ".join(" and ".join(columns) for columns in REPLY_FORMS.values())
    raise DataError(f"{where}: columns {', '.join(row)}; expected {expected}")


def items_by_name(items: list[dict], form: str) -> dict[str, dict]:
    benchmarks = {item.get("benchmark") for item in items}
    if form == "lmms-eval" and len(benchmarks) > 1:
        raise DataError(f"items of {len(benchmarks)} benchmarks; expected one, in which doc_id is a place")
    names, known = {}, {}
    for n, item in enumerate(items):
        name = {"ours": item["id"], "lmms-eval": str(n)}.get(form) or item["id"].removeprefix(
            f"{item.get('benchmark')}/")
        check_unique(f"item {item['id']!r}", name, names)
        known[name] = item
    return known


def name_of(where: str, row: dict, form: str) -> str:
    if form != "vlmevalkit":
        return str(row["id" if form == "ours" else "doc_id"])
    return "/".join(Row(where, row).key(name) for name in ("index", "cycle_category") if name in row)


def reply_of(where: str, row: dict, form: str) -> dict:
    if form == "lmms-eval":  # without "resps" where its filters changed nothing
        text = row.get("resps", row.get("filtered_resps"))
        while isinstance(text, list) and len(text) == 1:
            text = text[0]
    else:
        value = row["text" if form == "ours" else "prediction"]
        text = "" if is_missing(value) else as_text(value)
    if not isinstance(text, str):
        raise DataError(f"{where}: reply {str(text)[:40]!r}, expected one text")
    given, finish = row.get("finish_reason"), read_finish(row.get("finish_reason"))
    if (form == "vlmevalkit" and FAILED_CALL in text) or (not is_missing(given) and finish not in FINISHED):
        return {"error": "failed_call"}
    return {"raw_output": text, "clean_output": text.strip(), "finish_reason": finish}


def is_other_gold(item: dict, gold: object) -> bool:
    """Return whether the gold of another file can be read and is not the item's."""
    text, own = str(gold).strip(" ().").lower(), item["answer"]["value"]
    if item["answer"]["type"] == "letter":
        options = {letter.lower(): words.strip(" ().").lower() for letter, words in item["options"]}
        others = {*options.values()} - {options[own.lower()]}
        return text != own.lower() if text in options else text in others
    values = {"yesno": {"yes": "yes", "no": "no"}, "bool": {"1": True, "0": False}}
    return values.get(item["answer"]["type"], {}).get(text, own) != own


def settle(replies: list[dict]) -> dict:
    if not replies:
        return {"error": "no_response"}
    return replies[0] if all(reply == replies[0] for reply in replies) else {"error": "different_responses"}
