"""JSON rows: read with checks, write by rename, describe the run beside its output.

No torch here: a script that only reads rows starts at once.
"""
import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

CANONICAL = json.JSONEncoder(sort_keys=True, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
BOM = b"\xef\xbb\xbf"
# bytes; a chain has some thousands, and a tokenizer takes minutes over a text of many MB
LONGEST_ROW = 1 << 20
# named in <output>.meta.json
PACKAGES = ("torch", "transformers", "accelerate", "datasets", "pillow", "numpy")


class DataError(ValueError):
    """Something only the user can mend: a file, a flag, a setting. The message says where, what, and what to
    do."""


# ------------------------------------------------------------------------------------------------ reading
def located_rows(path: str | Path, limit: int | None = None, hint: str | None = None,
                 longest: int = LONGEST_ROW) -> Iterator[tuple[str, dict]]:
    """Yield ("path:line", object) for each row of a UTF-8 JSONL file, or of a file that is one JSON list.

    `hint` says which stage writes a missing file. Raises DataError for a file, a line or a row that is not
    one, or that has more than `longest` bytes; rows behind the first `limit` are not looked at.
    """
    try:
        with open(path, "rb") as file:
            begin = file.read(4096).removeprefix(BOM).lstrip()[:1]
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}{f'; {hint}' if hint else ''}") from error
    parsed = (parse_list if begin == b"[" else parse_lines)(str(path), longest)
    for line, row in islice(parsed, None if limit is None else max(limit, 0)):
        if not isinstance(row, dict):
            raise DataError(
                f"{path}:{line}: expected a JSON object, got {type(row).__name__} {str(row)[:40]!r}")
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
    """Return in words why the parser refused a text: its grammar, an integer of thousands of digits, its
    depth."""
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
                    raise DataError(
                        f"{path}:{line}: not JSON ({fault_of(error)}); expected one object a line") from error
                yield line, value


def parse_list(path: str, longest: int) -> Iterator[tuple[int, object]]:
    """Yield (line number, value) for every item of a JSON list that fills the file."""
    text = decode_text(path, 1, Path(path).read_bytes().removeprefix(BOM))
    try:
        items = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path}:{getattr(error, 'lineno', 1)}: not JSON ({fault_of(error)}); expected one list of "
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
    """Raise DataError unless `row` holds every field with its type (a bool is not an int). `hint`: what
    writes such rows."""
    for name, kind in fields.items():
        kinds, value = kind if isinstance(kind, tuple) else (kind,), row.get(name)
        if name in row and isinstance(value, kinds) and not (isinstance(value, bool) and bool not in kinds):
            continue
        expected = " or ".join(k.__name__ for k in kinds)
        if name not in row:
            raise DataError(
                f"{where}: no field {name!r} (expected {expected}); it has {', '.join(row) or 'none'}"
                            + (f"; {hint}" if hint else ""))
        raise DataError(
            f"{where}: field {name!r} should be {expected}, got {type(value).__name__} {str(value)[:40]!r}")


def read_rows(path: str | Path, fields: dict[str, type | tuple], limit: int | None = None,
              hint: str | None = None) -> list[dict]:
    """Read rows, check that each has `fields` and, with "id" among them, that no two share it."""
    rows, seen = [], {}
    for where, row in located_rows(path, limit, hint):
        check_fields(where, row, fields, hint)
        if "id" in fields:
            if row["id"] in seen:
                raise DataError(
                    f"{where}: id {row['id']!r} stands already at {seen[row['id']]}; expected it once")
            seen[row["id"]] = where
        rows.append(row)
    return rows


def load_object(path: str | Path, hint: str = "run what writes it again") -> dict:
    """Return the JSON object that fills a file. DataError for a file that cannot be read or holds anything
    else; `hint` says what to do then."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError(f"{type(value).__name__}, expected an object")
        return value
    except (OSError, ValueError, RecursionError) as error:
        # a file has lines: not only the column
        why = fault_of(error) if isinstance(error, RecursionError) else error
        raise DataError(f"{path}: damaged ({why}); {hint}") from error


# ------------------------------------------------------------------------------------------------ writing
@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turn what the disk refuses while `path` is written into a DataError that names it."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{path}: {error.strerror or error}; make room, or name an --output that can be written, and run the "
                        "same command again") from error


def check_output(output: str | Path, inputs: Iterable[str | Path]) -> None:
    """DataError if writing `output` would replace one of the files that are read."""
    for path in inputs:
        if os.path.realpath(path) == os.path.realpath(output):
            raise DataError(
                f"--output {output}: is read too, as {path}, and would be replaced; name another --output")


def replace_file(path: str | Path, write: Callable, mode: str = "w") -> None:
    """Call `write(file)` on a file beside `path`, sync it, and rename it: a file that exists is whole. `mode`
    "w" or "wb"."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(beside, mode,
                      **({} if mode == "wb" else {"encoding": "utf-8", "newline": "\n"})) as file:
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


def write_meta(output: str | Path, args: argparse.Namespace, inputs: list[str | Path], seconds: float,
               **extra) -> None:
    """Write `<output>.meta.json`: flags, versions, sha256 of the input files, seconds, hardware, and `extra`.
    """
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


def check_folder(path: str) -> None:
    """DataError for a folder without a checkpoint; a name that is no folder is the hub's."""
    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        raise DataError(
            f"{path}: no config.json here; expected a checkpoint folder (train_sft.py writes one)")


def find_checkpoint(model_path: str) -> Path:
    """Return the folder of a checkpoint: the path itself, or the hub's snapshot, downloaded if need be."""
    check_folder(model_path)
    if Path(model_path).is_dir():
        return Path(model_path)
    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(model_path))
    except (OSError, ValueError) as error:
        raise DataError(
            f"--model {model_path}: neither a folder here nor to be had from the hub ({error})") from error


def model_identity(folder: Path) -> str:
    """Return a hash of what a checkpoint computes: configuration, tokenizer, template, names and sizes of the
    weights.

    Of each weight file the first and last megabyte count too: two trainings of one model differ in nothing
    else.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
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
