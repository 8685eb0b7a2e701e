"""Read files of JSON rows with checks, write them by rename, describe a run in <output>.meta.json."""
import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

CANONICAL = json.JSONEncoder(sort_keys=True, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
BOM = b"\xef\xbb\xbf"
SPACE = re.compile(r"[ \t\r\n]*")  # between the tokens of a JSON text
LONGEST_ROW = 1 << 20  # bytes; a chain has a few thousand
PACKAGES = ("torch", "transformers", "accelerate", "datasets", "pillow", "numpy")  # whose versions are kept


class DataError(ValueError):
    """An error that the user can fix; it names place, fault and remedy. `reason`: a word to count it by."""

    def __init__(self, message: str, reason: str | None = None):
        super().__init__(message)
        self.reason = reason


# ---- reading
def unique_keys(pairs: list[tuple[str, object]]) -> dict:
    if len(value := dict(pairs)) < len(pairs):
        [(name, n)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"key {name[:40]!r} {n} times in one object")
    return value


DECODER = json.JSONDecoder(object_pairs_hook=unique_keys)


def located_rows(path: str | Path, limit: int | None = None, hint: str | None = None,
                 longest: int = LONGEST_ROW, exact: bool = True) -> Iterator[tuple[str, dict]]:
    """Yield ("path:line", object) for each row of a UTF-8 JSONL file, or of a file that is one JSON list.

    `hint` names the writer of a missing file. DataError for a row that is not an object, has more than
    `longest` bytes, a key twice or, if `exact`, NaN.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(4096).removeprefix(BOM).lstrip()[:1]
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}{f'; {hint}' if hint else ''}") from error
    values = (parse_list if start == b"[" else parse_lines)(str(path), exact)
    for line, size, row in islice(values, None if limit is None else max(limit, 0)):
        if size > longest:
            raise DataError(f"{path}:{line}: a row of {size:,} bytes; expected at most {longest:,}")
        if not isinstance(row, dict):
            raise DataError(f"{path}:{line}: expected a JSON object, got {type(row).__name__} {row!r:.40}")
        yield f"{path}:{line}", row


def parse_lines(path: str, exact: bool) -> Iterator[tuple[int, int, object]]:
    """Yield (line number, bytes, value) of every line that is not blank."""
    with open(path, "rb") as file:
        for line, data in enumerate(file, 1):
            data = data.removeprefix(BOM) if line == 1 else data
            if data.strip():
                try:
                    value = load_text(data.removesuffix(b"\n").decode("utf-8"), exact)
                except (ValueError, RecursionError) as error:
                    raise DataError(json_fault(path, line, error, "one object per line")) from error
                yield line, len(data), value


def parse_list(path: str, exact: bool) -> Iterator[tuple[int, int, object]]:
    """Yield (line number, characters, value) of every item of a file that is one JSON list."""
    line, counted = 1, 0
    try:
        text = Path(path).read_bytes().removeprefix(BOM).decode("utf-8")
        place = text.index("[")
        while text[place] != "]":  # at the opening bracket or at a comma
            begin = SPACE.match(text, place + 1).end()
            if text[place] == "[" and text.startswith("]", begin):
                place = begin
                continue
            line, counted = line + text.count("\n", counted, begin), begin
            value, end = DECODER.raw_decode(text, begin)
            check_value(text[begin:end], value, exact)
            yield line, end - begin, value
            place = SPACE.match(text, end).end()
            if text[place:place + 1] not in (",", "]"):
                raise json.JSONDecodeError("Expecting ',' delimiter", text, place)
        place = SPACE.match(text, place + 1).end()
        if place < len(text):
            raise json.JSONDecodeError("Extra data", text, place)
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", line)
        raise DataError(json_fault(path, line, error, "one list of objects")) from error


def load_text(text: str, exact: bool = False) -> object:
    value = DECODER.decode(text)
    check_value(text, value, exact)
    return value


def check_value(text: str, value: object, exact: bool) -> None:
    """Raise UnicodeEncodeError for half a surrogate pair and, if `exact`, ValueError for NaN and infinity."""
    if exact or "\\ud" in text or "\\uD" in text:
        json.dumps(value, ensure_ascii=False, allow_nan=not exact).encode("utf-8")


def json_fault(path: str, line: int, error: ValueError | RecursionError, expected: str) -> str:
    if isinstance(error, UnicodeDecodeError):
        line += error.object[:error.start].count(b"\n")
        return f"{path}:{line}: byte {error.object[error.start]:#x} is not UTF-8"
    if isinstance(error, UnicodeEncodeError):
        return f"{path}:{line}: {error.object[error.start]!a} is half a surrogate pair, not a character"
    if isinstance(error, json.JSONDecodeError):
        error = f"{error.msg} at column {error.colno}"
    elif isinstance(error, RecursionError):
        error = "nested too deeply"
    return f"{path}:{line}: not JSON ({error}); expected {expected}"


def check_fields(where: str, row: dict, fields: dict[str, type | tuple], hint: str | None = None) -> None:
    """Raise DataError unless `row` has every field with its type (a bool is not an int)."""
    for name, kind in fields.items():
        kinds, value = kind if isinstance(kind, tuple) else (kind,), row.get(name)
        if name in row and isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool)):
            continue
        expected = " or ".join(k.__name__ for k in kinds)
        if name not in row:
            raise DataError(f"{where}: no field {name!r} (expected {expected}); it has "
                            f"{', '.join(row) or 'none'}{f'; {hint}' if hint else ''}")
        raise DataError(f"{where}: field {name!r} should be {expected}, got {type(value).__name__} "
                        f"{str(value)[:40]!r}")


def object_schema(**properties: dict) -> dict:
    """Return the JSON schema of an object whose properties are all required."""
    return {"type": "object", "properties": properties, "required": list(properties),
            "additionalProperties": False}


def check_unique(where: str, name: str, seen: dict[str, str]) -> None:
    """Note in `seen` where an id is; DataError if it was there before."""
    if name in seen:
        raise DataError(f"{where}: duplicate id {name!r}, first seen at {seen[name]}; expected it once")
    seen[name] = where


def read_rows(path: str | Path, fields: dict[str, type | tuple], limit: int | None = None,
              hint: str | None = None) -> list[dict]:
    """Read rows that have `fields`; an "id" among them is unique."""
    rows, seen = [], {}
    for where, row in located_rows(path, limit, hint):
        check_fields(where, row, fields, hint)
        if "id" in fields:
            check_unique(where, row["id"], seen)
        rows.append(row)
    return rows


def load_object(path: str | Path, hint: str = "run the stage that writes it again",
                fields: dict[str, type | tuple] | None = None, exact: bool = False) -> dict:
    """Return the JSON object in a file, which must have `fields`; `hint` ends the DataError."""
    try:
        value = load_text(Path(path).read_text(encoding="utf-8-sig"), exact)
        if not isinstance(value, dict):
            raise ValueError(f"{type(value).__name__}, expected an object")
    except (OSError, ValueError, RecursionError) as error:
        fault = "nested too deeply" if isinstance(error, RecursionError) else error
        raise DataError(f"{path}: damaged ({fault}); {hint}") from error
    check_fields(str(path), value, fields or {}, hint)
    return value


# ---- writing
@contextmanager
def disk_errors(path: str | Path) -> Iterator[None]:
    """Turn an OSError while `path` is written into a DataError."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}; make room, or name an --output that can be "
                        "written, and run the same command again") from error


def check_output(output: str | Path, inputs: Iterable[str | Path], flag: str = "--output") -> None:
    """Raise DataError if writing `output` would replace one of the inputs."""
    for path in inputs:
        if os.path.realpath(path) == os.path.realpath(output):
            raise DataError(f"{flag} {output}: is read too, as {path}; name another {flag}")


def replace_file(path: str | Path, write: Callable, mode: str = "w") -> None:
    """Call `write(file)` on a temporary file, sync it and rename it to `path`."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    text_mode = {} if mode == "wb" else {"encoding": "utf-8", "newline": "\n"}
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, mode, **text_mode) as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)  # after a failure it may be what fills the disk


def write_rows(path: str | Path, rows: Iterable[dict]) -> None:
    """Write UTF-8 JSONL, completely or not at all."""
    encode = json.JSONEncoder(ensure_ascii=False).encode
    replace_file(path, lambda file: file.writelines(encode(row) + "\n" for row in rows))


def write_json(path: str | Path, value: object) -> None:
    replace_file(path, lambda file: file.write(json.dumps(value, ensure_ascii=False, indent=2) + "\n"))


def write_meta(output: str | Path, args: argparse.Namespace, paths: list, seconds: float, **extra) -> None:
    """Write `<output>.meta.json`: flags, versions, sha256 of the files read, seconds, hardware, `extra`."""
    installed = {dist.metadata["Name"].lower() for dist in importlib.metadata.distributions()}
    versions = {name: importlib.metadata.version(name) for name in PACKAGES if name in installed}
    write_json(f"{output}.meta.json", {
        "flags": {name: value if isinstance(value, (int, float, bool, list, dict, type(None))) else str(value)
                  for name, value in vars(args).items()},
        "versions": {"python": platform.python_version(), **versions},
        "inputs": {str(path): sha256_file(path) for path in paths}, "seconds": round(seconds, 3),
        "hardware": {"platform": platform.platform(), "cpus": os.cpu_count()}, **extra})


# ---- identity
def sha256_file(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def call_key(**parts) -> str:
    """Return the SHA-256 of the canonical JSON of `parts`: the key of a call in the journal."""
    return hashlib.sha256(CANONICAL.encode(parts).encode("ascii")).hexdigest()


def check_folder(path: str) -> None:
    """Raise DataError for a folder without a checkpoint (any other path is a name on the hub)."""
    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        raise DataError(f"{path}: no config.json here; expected a checkpoint folder")


def find_checkpoint(model_path: str) -> Path:
    """Return a checkpoint's folder: the path itself, or the hub's snapshot, downloaded if needed."""
    check_folder(model_path)
    if Path(model_path).is_dir():
        return Path(model_path)
    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(model_path))
    except (OSError, ValueError) as error:
        raise DataError(f"--model {model_path}: neither a folder nor on the hub ({error})") from error


def model_identity(model_path: str | Path) -> str:
    """Return a hash of a checkpoint's configuration, tokenizer, template and weights, of which name, size,
    first and last megabyte count: two trainings of a model differ there."""
    digest = hashlib.sha256()
    for path in sorted(find_checkpoint(model_path).iterdir()):
        if path.suffix in (".json", ".jinja", ".txt") and path.is_file():
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
        elif path.suffix in (".safetensors", ".bin"):
            size = path.stat().st_size
            digest.update(f"{path.name}\0{size}".encode())
            with open(path, "rb") as file:
                digest.update(file.read(1 << 20))
                file.seek(max(size - (1 << 20), 0))
                digest.update(file.read())
    return digest.hexdigest()
