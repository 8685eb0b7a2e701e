"""JSON rows: read with checks, write by rename, describe the run beside its output.

No torch here: a script that only reads rows starts at once.
"""
import argparse
import gc
import hashlib
import importlib.metadata
import json
import os
import platform
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

from tqdm import tqdm

CANONICAL = json.JSONEncoder(sort_keys=True, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
BOM = b"\xef\xbb\xbf"
LONGEST_ROW = 1 << 20  # bytes; a chain has some thousands, and a tokenizer takes minutes over a text of many MB
LONGEST_ERROR = 8000  # characters shown of a message that quotes what it found
API_KEY = "OPENAI_API_KEY"  # the environment variable that every client of OpenAI-compatible servers reads
PACKAGES = ("torch", "transformers", "accelerate", "datasets", "pillow", "numpy")  # named in <output>.meta.json


class DataError(ValueError):
    """Something only the user can mend: a file, a flag, a setting. The message says where, what, and what to do."""


def rank_world() -> tuple[int, int, int]:
    """Return (rank, world size, local rank) as torchrun sets them; (0, 1, 0) in a plain process."""
    return tuple(int(os.environ.get(name, default))
                 for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")))


def log(message: str) -> None:
    """Write one line for people to stderr, from rank 0 only, without breaking a progress bar."""
    if rank_world()[0] == 0:
        tqdm.write(message, file=sys.stderr)


def cli(main: Callable[[], int]) -> int:
    """Run `main` and return its exit code: 2 after a DataError, 130 after Ctrl-C or SIGTERM, told in one line."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    gc.set_threshold(50_000, 20, 100)  # hundreds of thousands of rows without a cycle: looked at less often, -10 % time
    try:
        return main()
    except DataError as error:
        print(f"error: {shorten(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here where the stage keeps a journal", file=sys.stderr)
        return 130


class Help(argparse.RawDescriptionHelpFormatter):
    """--help with the description as it stands, and with every default that a flag's own words do not tell."""

    def _get_help_string(self, action: argparse.Action) -> str:
        told = action.help or ""
        empty = action.default is False or action.default in (None, "", [], {}, argparse.SUPPRESS)
        if action.required or empty or "default" in told:
            return told
        listed = isinstance(action.default, list)
        return f"{told} (default: {' '.join(action.default) if listed else '%(default)s'})"


def parse_count(text: str) -> int:
    """Return what a flag counts, for argparse to refuse anything below 1."""
    try:
        count = int(text)
    except ValueError:
        count = 0
    if count < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number of at least 1")
    return count


def shorten(message: str) -> str:
    """Return a message without control characters (an id or a path may hold them), and without its middle if it is long."""
    if len(message) > LONGEST_ERROR:
        message = f"{message[:LONGEST_ERROR // 2]} [...] {message[-LONGEST_ERROR // 2:]}"
    return "".join(char if char.isprintable() or char in "\n " else ascii(char)[1:-1] for char in message)


def read_api_key(path: str | None, flag: str = "--api_key_file") -> str | None:
    """Return the key from a file or, without one, from the environment; None if there is neither."""
    if path is None:
        return os.environ.get(API_KEY) or None
    try:
        key = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{flag} {path}: cannot be read ({error})") from error
    if not key:
        raise DataError(f"{flag} {path}: is empty; expected the key and nothing else")
    return key


@contextmanager
def stop_on_signals() -> Iterator[threading.Event]:
    """Yield an event that the first SIGINT or SIGTERM sets; the second one ends the process at once."""
    stop = threading.Event()

    def handle(number: int, frame: object) -> None:
        if stop.is_set():
            os._exit(130)  # as safe as SIGKILL, which journals and checkpoints survive
        stop.set()
        os.write(2, b"\nstopping: waiting for what is under way; once more to stop at once\n")

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ------------------------------------------------------------------------------------------------ reading
def located_rows(path: str | Path, limit: int | None = None, hint: str | None = None,
                 longest: int = LONGEST_ROW) -> Iterator[tuple[str, dict]]:
    """Yield ("path:line", object) for each row of a UTF-8 JSONL file, or of a file that is one JSON list.

    `hint` says which stage writes a missing file. Raises DataError for a file, a line or a row that is not one, or that has
    more than `longest` bytes; rows behind the first `limit` are not looked at.
    """
    try:
        with open(path, "rb") as file:
            begin = file.read(4096).removeprefix(BOM).lstrip()[:1]
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}{f'; {hint}' if hint else ''}") from error
    parsed = (parse_list if begin == b"[" else parse_lines)(str(path), longest)
    for line, row in islice(parsed, None if limit is None else max(limit, 0)):
        if not isinstance(row, dict):
            raise DataError(f"{path}:{line}: expected a JSON object, got {type(row).__name__} {str(row)[:40]!r}")
        yield f"{path}:{line}", row


def decode_text(path: str, line: int, data: bytes) -> str:
    """Decode UTF-8; DataError also for an escaped half of a surrogate pair, which no UTF-8 file can hold."""
    try:
        text = data.decode("utf-8")
        if "\\ud" in text.lower():
            json.dumps(json.loads(text), ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        line += data[:error.start].count(b"\n")
        raise DataError(f"{path}:{line}: byte {data[error.start]:#x} is not UTF-8") from error
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise DataError(f"{path}:{line}: {half!a} is half a surrogate pair, not a character") from error
    except (ValueError, RecursionError):
        pass  # the caller parses again and says where
    return text


def fault_of(error: ValueError | RecursionError) -> str:
    """Return in words why the parser refused a text: its grammar, an integer of thousands of digits, its depth."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def check_length(path: str, line: int, size: int, longest: int) -> None:
    if size > longest:
        raise DataError(f"{path}:{line}: a row of {size:,} bytes; expected {longest:,} at most, take it out")


def parse_lines(path: str, longest: int) -> Iterator[tuple[int, object]]:
    """Yield (line number, value) for every line that is not blank."""
    with open(path, "rb") as file:
        for line, text in enumerate(file, 1):
            text = text.removeprefix(BOM) if line == 1 else text
            if text.strip():
                check_length(path, line, len(text), longest)
                try:
                    value = json.loads(decode_text(path, line, text.removesuffix(b"\n")))
                except DataError:
                    raise
                except (ValueError, RecursionError) as error:
                    raise DataError(f"{path}:{line}: not JSON ({fault_of(error)}); expected one object a line") from error
                yield line, value


def parse_list(path: str, longest: int) -> Iterator[tuple[int, object]]:
    """Yield (line number, value) for every item of a JSON list that fills the file."""
    text = decode_text(path, 1, Path(path).read_bytes().removeprefix(BOM))
    try:
        items = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}:{getattr(error, 'lineno', 1)}: not JSON ({fault_of(error)}); expected one list of "
                        "objects") from error
    decoder, place, line, counted = json.JSONDecoder(), text.index("[") + 1, 1, 0
    for item in items:  # parsed a second time, item by item, only to learn the line where each begins
        while text[place] in " \t\r\n,":
            place += 1
        line, counted = line + text.count("\n", counted, place), place
        end = decoder.raw_decode(text, place)[1]
        check_length(path, line, end - place, longest)
        yield line, item
        place = end


def check_fields(where: str, row: dict, fields: dict[str, type | tuple], hint: str | None = None) -> None:
    """Raise DataError unless `row` holds every field with its type (a bool is not an int). `hint`: what writes such rows."""
    for name, kind in fields.items():
        kinds, value = kind if isinstance(kind, tuple) else (kind,), row.get(name)
        if name in row and isinstance(value, kinds) and not (isinstance(value, bool) and bool not in kinds):
            continue
        expected = " or ".join(k.__name__ for k in kinds)
        if name not in row:
            raise DataError(f"{where}: no field {name!r} (expected {expected}); it has {', '.join(row) or 'none'}"
                            + (f"; {hint}" if hint else ""))
        raise DataError(f"{where}: field {name!r} should be {expected}, got {type(value).__name__} {str(value)[:40]!r}")


def read_rows(path: str | Path, fields: dict[str, type | tuple], limit: int | None = None,
              hint: str | None = None) -> list[dict]:
    """Read rows, check that each has `fields` and, with "id" among them, that no two share it."""
    rows, seen = [], {}
    for where, row in located_rows(path, limit, hint):
        check_fields(where, row, fields, hint)
        if "id" in fields:
            if row["id"] in seen:
                raise DataError(f"{where}: id {row['id']!r} stands already at {seen[row['id']]}; expected it once")
            seen[row["id"]] = where
        rows.append(row)
    return rows


def load_object(path: str | Path, hint: str = "run what writes it again") -> dict:
    """Return the JSON object that fills a file. DataError for a file that cannot be read or holds anything else; `hint` says
    what to do then."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError(f"{type(value).__name__}, expected an object")
        return value
    except (OSError, ValueError, RecursionError) as error:
        why = fault_of(error) if isinstance(error, RecursionError) else error  # a file has lines: not only the column
        raise DataError(f"{path}: damaged ({why}); {hint}") from error


# ------------------------------------------------------------------------------------------------ writing
@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turn what the disk refuses while `path` is written into a DataError that names it."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}; make room, or name an --output that can be written, and run the "
                        "same command again") from error


def check_output(output: str | Path, inputs: Iterable[str | Path]) -> None:
    """DataError if writing `output` would replace one of the files that are read."""
    for path in inputs:
        if os.path.realpath(path) == os.path.realpath(output):
            raise DataError(f"--output {output}: is read too, as {path}, and would be replaced; name another --output")


def replace_file(path: str | Path, write: Callable, mode: str = "w") -> None:
    """Call `write(file)` on a file beside `path`, sync it, and rename it: a file that exists is whole. `mode` "w" or "wb"."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(beside, mode, **({} if mode == "wb" else {"encoding": "utf-8", "newline": "\n"})) as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)  # after a failure: it may be what fills the disk


def write_rows(path: str | Path, rows: Iterable[dict]) -> None:
    """Write UTF-8 JSONL, whole or not at all."""
    encode = json.JSONEncoder(ensure_ascii=False).encode
    replace_file(path, lambda file: file.writelines(encode(row) + "\n" for row in rows))


def write_json(path: str | Path, value: object) -> None:
    """Write one JSON value, indented, whole or not at all."""
    replace_file(path, lambda file: file.write(json.dumps(value, ensure_ascii=False, indent=2) + "\n"))


def write_meta(output: str | Path, args: argparse.Namespace, inputs: list[str | Path], seconds: float, **extra) -> None:
    """Write `<output>.meta.json`: flags, versions, sha256 of the input files, seconds, hardware, and `extra`."""
    installed = {dist.metadata["Name"].lower() for dist in importlib.metadata.distributions()}
    versions = {name: importlib.metadata.version(name) for name in PACKAGES if name in installed}
    write_json(f"{output}.meta.json", {
        "flags": {name: value if isinstance(value, (int, float, bool, list, dict, type(None))) else str(value)
                  for name, value in vars(args).items()},
        "versions": {"python": platform.python_version(), **versions},
        "inputs": {str(path): sha256_file(path) for path in inputs}, "seconds": round(seconds, 3),
        "hardware": {"platform": platform.platform(), "cpus": os.cpu_count()}, **extra})


def sha256_file(path: str | Path) -> str:
    """Return the hex digest of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def call_key(**parts) -> str:
    """Return the hex digest of the canonical JSON of `parts`: what a call is known by in the journal."""
    return hashlib.sha256(CANONICAL.encode(parts).encode("ascii")).hexdigest()
