"""A journal that survives SIGKILL: one line per finished piece of work, appended and never rewritten.

Memory holds only the place of each record.
"""
import fcntl
import json
import mmap
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import BinaryIO

from utils.cli import log, rank_world
from utils.jsonl import DataError, disk_errors, load_object, load_text, write_json

FSYNC_EVERY_S = 1.0  # a kill loses nothing without fsync; this bounds the loss of a power cut


class Journal:
    """Records by their "key", in `folder/<name>-<shard>-of-<n>.jsonl`; the later of two with one key counts.

    This process appends to its own file, locked against a second writer, and reads those of all shards: their
    number may change between runs. `shard` is (index, number), by default torchrun's rank. `folder/meta.json`
    holds `settings`; others raise DataError. `is_valid` checks what is written and read: it raises for damage
    and is false for a reply that counts no more. `transient`: keys worth another try.
    """

    def __init__(self, folder: str | Path, settings: dict | None = None, name: str = "calls",
                 shard: tuple[int, int] | None = None, is_valid: Callable[[dict], bool] | None = None):
        self.folder, self.name, self.is_valid = Path(folder), name, is_valid
        index, n = shard or rank_world()[:2]
        self.path = self.folder / f"{name}-{index:05d}-of-{n:05d}.jsonl"
        self.places: dict[str, tuple[BinaryIO, int, int]] = {}  # key -> file, offset and length in bytes
        self.transient: set[str] = set()
        self.readers: dict[Path, tuple[BinaryIO, int, int]] = {}  # path -> file, bytes and lines read so far
        self.synced_at = time.monotonic()
        with ExitStack() as stack, disk_errors(self.path):
            self.folder.mkdir(parents=True, exist_ok=True)
            self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            stack.callback(os.close, self.fd)
            try:
                fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise DataError(f"{self.path}: another process writes here; wait for it, or give another "
                                "--output") from error
            if settings is not None:
                keep_settings(self.folder / "meta.json", settings)
            self.size = self.cut_torn_tail()
            stack.callback(lambda: [file.close() for file, _, _ in self.readers.values()])
            self.reload()
            self.stack = stack.pop_all()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *exception) -> None:
        os.fsync(self.fd)
        self.stack.close()

    def __contains__(self, key: str) -> bool:
        return key in self.places

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def cut_torn_tail(self) -> int:
        """Move the unfinished last line that a kill left to `*.torn`; return the size."""
        size = os.fstat(self.fd).st_size
        with mmap.mmap(self.fd, 0, prot=mmap.PROT_READ) if size else nullcontext(b"") as written:
            torn = written[written.rfind(b"\n") + 1:]
        if torn:
            with open(self.path.with_suffix(".torn"), "ab") as file:
                file.write(torn + b"\n")
            os.ftruncate(self.fd, size - len(torn))
            log(f"{self.path}: {len(torn)} bytes of a torn last line moved to *.torn")
        return size - len(torn)

    def reload(self) -> None:
        """Read what all shards have written since the last time; DataError for a damaged line."""
        for path in sorted(self.folder.glob(f"{self.name}-*.jsonl")):
            file, offset, n = self.readers.get(path) or (open(path, "rb", buffering=1 << 16), 0, 0)
            self.readers[path] = file, offset, n
            file.seek(offset)
            for n, line in enumerate(file, n + 1):
                if not line.endswith(b"\n"):
                    break  # another shard is writing it
                try:
                    self.note(load_text(line.decode("utf-8")), (file, offset, len(line)))
                except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
                    raise DataError(f"{path}:{n}: damaged journal line {line[:40]!r} ({error}); remove it to "
                                    "repeat its work, or use --fresh") from error
                offset += len(line)
                self.readers[path] = file, offset, n

    def get(self, key: str) -> dict | None:
        if key not in self.places:
            return None
        file, offset, length = self.places[key]
        file.seek(offset)  # buffered: the journal is mostly read in the order in which it was written
        return json.loads(file.read(length).decode("utf-8"))

    def forget(self, *keys: str) -> None:
        for key in keys:
            self.places.pop(key, None)

    def append(self, record: dict) -> None:
        """Write a record with its "key"; DataError if the disk refuses it, ValueError if its reader would."""
        if self.is_valid and not self.is_valid(record):
            raise ValueError(f"{self.path}: a record that its reader refuses: {record}")
        line = json.dumps(record).encode("ascii") + b"\n"
        rest = line
        with disk_errors(self.path):
            while rest:
                rest = rest[os.write(self.fd, rest):]
            if time.monotonic() - self.synced_at > FSYNC_EVERY_S:
                os.fsync(self.fd)
                self.synced_at = time.monotonic()
        self.note(record, (self.readers[self.path][0], self.size, len(line)))
        self.size += len(line)

    def note(self, record: dict, place: tuple[BinaryIO, int, int]) -> None:
        lost = record.get("transient") or self.is_valid and not self.is_valid(record)
        self.places[record["key"]] = place
        (self.transient.add if lost else self.transient.discard)(record["key"])


def move_aside(folder: Path, n_processes: int) -> None:
    """Rename the folder of an earlier run, if there is one (--fresh)."""
    if folder.exists():
        if n_processes > 1:
            raise DataError(f"--fresh with {n_processes} processes: they would race; move {folder} by hand")
        n = next(n for n in range(1, 10**6) if not folder.with_name(f"{folder.name}.old-{n}").exists())
        folder.rename(folder.with_name(f"{folder.name}.old-{n}"))


def keep_settings(path: Path, settings: dict) -> None:
    """Write the settings of a run; DataError if it was begun with others."""
    settings, before = json.loads(json.dumps(settings)), read_settings(path.parent, path.name)
    if before is None:
        return write_json(path, settings)
    changed = [name for name in sorted({*before, *settings}) if before.get(name) != settings.get(name)]
    if changed:
        table = [("", "there", "now"), *((name, before.get(name), settings.get(name)) for name in changed)]
        lines = [f"  {name:<16} {str(old)[:44]:<44}  {str(new)[:44]}" for name, old, new in table]
        raise DataError(f"{path}: begun with other settings; use the old ones or another --output, or move "
                        f"{path.parent} aside\n" + "\n".join(lines))


def read_settings(folder: str | Path, name: str = "meta.json") -> dict | None:
    """Return the object in `folder/<name>`, or None without it. NaN, which equals nothing, is damage."""
    path = Path(folder, name)
    if not path.is_file():
        return None
    return load_object(path, "restore it, or start over with another --output", exact=True)
