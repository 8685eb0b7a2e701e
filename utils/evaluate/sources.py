"""Rows and cells of a published benchmark: a TSV, CSV, parquet, JSONL, a folder, or a data set on the hub.

Rows come one by one as (where, cells): the largest file has 4.6 GB. A `Row` reads what pandas and the
datasets library make of a cell; its errors name the place and the column.
"""
import ast
import base64
import binascii
import csv
import hashlib
import math
import re
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from string import ascii_uppercase
from tempfile import TemporaryDirectory

from utils.jsonl import DataError, load_object, located_rows

Rows = Iterator[tuple[str, dict]]
MAX_CELL = 2**31 - 1  # characters; csv's own limit is 131,072
SHORTEST_PICTURE = 65  # a shorter cell names another row (VLMEvalKit vlmeval/dataset/image_base.py)
PICTURES = ("image", "image_path", "bytes")  # the first that is filled; VLMEvalKit writes image_path
ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")  # base64 has no "."
DATA_URL = re.compile(r"^data:[^,]{0,100},")
URL_SAFE = str.maketrans("-_", "+/")
VSTAR_FOLDERS = ("direct_attributes", "relative_position")  # as vstar_bench_eval.py reads


@dataclass(frozen=True)
class SameAs:
    index: str


@dataclass(frozen=True)
class Hub:
    """A place on the Hugging Face hub: one `file`, or a data set's `config` and `split`. Without a `revision`
    (a commit of 40 hex digits) the caller must name one."""

    repo: str
    revision: str | None = None
    file: str | None = None
    config: str | None = None
    split: str | None = None


# ---- files
def file_rows(path: Path) -> Rows:
    json_rows = partial(located_rows, longest=MAX_CELL, exact=False)  # lines may hold pictures
    readers = {".tsv": table_rows, ".csv": partial(table_rows, delimiter=","), ".parquet": parquet_rows,
               ".jsonl": json_rows, ".json": json_rows}
    if path.suffix not in readers:
        raise DataError(f"{path}: kind {path.suffix!r}, expected one of {', '.join(readers)} or a folder")
    return readers[path.suffix](path)


def table_rows(path: Path, delimiter: str = "\t") -> Rows:
    """Yield a TSV's or CSV's rows. Every cell is text: pandas turns the option "None" into a missing value
    and the gold "1" into an integer."""
    before, line = csv.field_size_limit(MAX_CELL), 1
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            names = next(reader, [])
            if len(set(names)) < max(2, len(names)):
                raise DataError(f"{path}:1: columns {str(names)[:80]}, expected two or more different names")
            line = reader.line_num + 1
            for cells in reader:
                if len(cells) not in (0, len(names)):
                    raise DataError(f"{path}:{line}: {len(cells)} cells, expected {len(names)}: "
                                    f"{', '.join(names)}")
                if cells:  # not a blank line
                    yield f"{path}:{line}", dict(zip(names, cells))
                line = reader.line_num + 1
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    except csv.Error as error:
        raise DataError(f"{path}:{line}: not a row of a TSV or CSV ({error}); expected quotes around a cell "
                        "that holds a quote, and the inner one doubled") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}:{line}: not UTF-8 ({error}); fetch the file again") from error
    finally:
        csv.field_size_limit(before)


def parquet_rows(path: Path) -> Rows:
    """Yield a parquet file's rows; a picture is {"bytes", "path"}."""
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches(batch_size=16) for row in batch.to_pylist())
            yield from ((f"{path}: row {n}", row) for n, row in enumerate(rows))
    except (OSError, UnicodeDecodeError, OverflowError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: not a parquet file ({error}); fetch the file again") from error


def vstar_folder_rows(root: Path) -> Rows:
    """Yield V* as its authors publish it: pictures in two folders, each with a JSON file; `image_file` and
    `test_type` (the folder) are added, as in penghao-wu/vstar vstar_bench_eval.py."""
    for folder in VSTAR_FOLDERS:
        notes = sorted(Path(root, folder).glob("*.json"))
        if not notes:
            raise DataError(f"{root}: no {folder}/*.json; expected the folders {' and '.join(VSTAR_FOLDERS)}")
        for note in notes:
            pictures = [path for path in sorted(note.parent.glob(f"{note.stem}.*")) if path != note]
            if len(pictures) != 1:
                raise DataError(f"{note}: {len(pictures)} pictures named {note.stem}.*, expected one")
            row = load_object(note, "copy it from its source again")
            yield str(note), {**row, "image_file": str(pictures[0].relative_to(root)), "test_type": folder}


def check_digest(path: Path, accepted: tuple[str, ...]) -> None:
    with open(path, "rb") as file:
        actual = hashlib.file_digest(file, "md5").hexdigest()
    if actual not in accepted:
        raise DataError(f"{path}: md5 {actual}, expected {' or '.join(accepted)}; fetch it again")


# ---- hub
def dataset_rows(place: str | Path, config: str | None, split: str | None,
                 revision: str | None = None) -> Rows:
    """Yield the rows of a data set on the hub, or of a folder in the same layout."""
    from datasets import Image, load_dataset
    from datasets.exceptions import DatasetsError

    # the library caches a folder by its name alone and would return rows of another folder
    with nullcontext() if revision else TemporaryDirectory(prefix="datasets-") as cache:
        try:
            table = load_dataset(str(place), name=config, split=split, revision=revision, cache_dir=cache)
        except (OSError, ValueError, DatasetsError) as error:
            raise DataError(f"{place}: config {config!r}, split {split!r}, revision {revision} cannot be "
                            f"loaded ({error})") from error
        for name, feature in table.features.items():
            if isinstance(feature, Image):
                table = table.cast_column(name, Image(decode=False))
        yield from ((f"{place}: {split} row {n}", row) for n, row in enumerate(table))


def pinned(hub: Hub, revision: str | None) -> str:
    chosen = revision or hub.revision
    if chosen is None:
        raise DataError(f"{hub.repo}: no revision is pinned; give --revision, a commit of 40 hex digits")
    if not re.fullmatch("[0-9a-f]{40}", chosen):
        raise DataError(f"{hub.repo}: revision {chosen!r}, expected a commit of 40 hex digits")
    return chosen


def download(hub: Hub, revision: str | None) -> Path:
    """Return the local copy of a file on the hub, or of V*'s folders."""
    from huggingface_hub import constants, hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    commit = pinned(hub, revision)
    try:
        if hub.file:
            return Path(hf_hub_download(hub.repo, hub.file, repo_type="dataset", revision=commit))
        # into a separate folder: pictures in the cache are links that lead out of it
        return Path(snapshot_download(hub.repo, repo_type="dataset", revision=commit,
                                      local_dir=Path(constants.HF_HUB_CACHE,
                                                     f"{hub.repo.replace('/', '--')}-{commit}"),
                                      allow_patterns=[f"{folder}/*" for folder in VSTAR_FOLDERS]))
    except (OSError, HfHubHTTPError) as error:
        raise DataError(f"{hub.repo}@{commit}: cannot be fetched ({error})") from error


# ---- cells
def is_nan(value: object) -> bool:
    return isinstance(value, float) and math.isnan(value)


def is_missing(value: object) -> bool:
    return value is None or is_nan(value) or (isinstance(value, str) and not value.strip())


def as_text(value: object) -> str | None:
    """Return a string as it is, a number as it was before pandas gave its column a NaN (1.0 is 1); None for
    anything else."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and not is_nan(value)
    return value if isinstance(value, str) else str(value) if is_number else None


def option_text(value: object) -> str | None:
    """Return the text of an option or a hint, None for a missing one; "nan" is one (MMStar issue 12)."""
    text = None if is_missing(value) else as_text(value)
    return None if text is None or text.strip().lower() == "nan" else text


@dataclass(frozen=True)
class Row:
    """A published row: its place, its cells by column, the name of its benchmark."""

    where: str
    cells: dict
    name: str = ""

    def fault(self, message: str) -> DataError:
        return DataError(f"{self.where}: {message}")

    def text(self, *columns: str) -> str:
        """Return the text of the first of `columns` that the row has."""
        column = next((column for column in columns if column in self.cells), None)
        if column is None:
            raise self.fault(f"no column {' or '.join(map(repr, columns))}; it has {', '.join(self.cells)}")
        value = self.cells[column]
        if is_missing(value):
            raise self.fault(f"column {column!r} is empty; expected text")
        if (text := as_text(value)) is None:
            raise self.fault(f"column {column!r} is {type(value).__name__} {str(value)[:40]!r}, expected "
                             "text or a number")
        return text

    def key(self, *columns: str) -> str:
        """Return an index or a rotation: 0, "0", 0.0 and "0.0" are one."""
        return re.sub(r"^(\d+)\.0+$", r"\1", self.text(*columns).strip())

    def letter(self, column: str) -> str:
        """Return a gold letter: "B", "b" or "(B)"."""
        match = re.fullmatch(r"\(?([A-Za-z])\)?", text := self.text(column).strip())
        if not match:
            raise self.fault(f"answer {text[:40]!r}, expected a letter such as 'B' or '(B)'")
        return match[1].upper()

    def lettered(self, column: str, values: list) -> list[list[str]]:
        """Return [[letter, text]] of the values that are not missing; a letter belongs to its place."""
        if len(values) > len(ascii_uppercase):
            raise self.fault(f"{len(values)} options in {column}, expected at most 26")
        if wrong := [value for value in values if not is_missing(value) and as_text(value) is None]:
            raise self.fault(f"option {str(wrong[0])[:40]!r} in {column} is {type(wrong[0]).__name__}, "
                             "expected text or a number")
        return [[letter, text] for letter, value in zip(ascii_uppercase, values)
                if (text := option_text(value)) is not None]

    def options(self) -> list[list[str]]:
        """Return [[letter, text]] of the columns A, B and so on that are not empty."""
        n = next(n for n, letter in enumerate(f"{ascii_uppercase}.") if letter not in self.cells)
        if late := [letter for letter in ascii_uppercase[n:] if not is_missing(self.cells.get(letter))]:
            raise self.fault(f"option column {late[0]!r} without {ascii_uppercase[n]!r}; expected A, B, ... "
                             "without a gap")
        return self.lettered("columns A, B, ...", [self.cells[letter] for letter in ascii_uppercase[:n]])

    def choices(self) -> list[list[str]]:
        return self.lettered("'choices'", self.as_list("choices", self.cells.get("choices")))

    def as_list(self, column: str, value: object) -> list:
        """Return a list, possibly written as a Python literal."""
        if isinstance(value, str):
            try:
                value = ast.literal_eval(value)
            except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
                raise self.fault(f"column {column!r} {value[:40]!r} is not a Python list "
                                 f"({error})") from error
        if not isinstance(value, list) or not value:
            raise self.fault(f"column {column!r} is {str(value)[:40]!r}, expected a list of texts")
        return value

    # ---- pictures
    def pictures(self, *columns: str) -> list:
        """Return the pictures of the first of `columns` (default: PICTURES) that is filled."""
        columns = columns or PICTURES
        for column in columns:
            if not is_missing(self.cells.get(column)):
                return self.read_pictures(column, self.cells[column])
        found = [column for column in columns if column in self.cells]
        raise self.fault(f"{f'column {found[0]!r} is empty' if found else 'no picture'}; expected it in "
                         f"{' or '.join(columns)}: bytes, base64, a path, a list of them, or a row's index")

    def read_pictures(self, column: str, value: object) -> list:
        """Return the pictures of a cell: bytes, {"bytes", "path"}, a path, base64 (as a data URL, wrapped,
        unpadded or URL-safe too), another row's index, or a list of these, also as a Python literal."""
        if isinstance(value, dict):  # as the datasets library stores it
            value = value.get("bytes") or value.get("path")
        if isinstance(value, str) and value.lstrip().startswith("["):
            value = self.as_list(column, value.strip())
        if isinstance(value, list) and value:
            return [picture for part in value for picture in self.read_pictures(column, part)]
        if isinstance(value, bytes) and value:
            return [value]
        if (text := as_text(value)) is None or not text.strip():
            raise self.fault(f"column {column!r} holds {type(value).__name__} {str(value)[:20]!r}, expected "
                             "bytes, base64 or a path")
        text = text.strip()
        if column == "image_path" or text[-5:].lower().endswith(ENDINGS):
            return [text]
        if len(text) < SHORTEST_PICTURE and not text.startswith("data:"):
            return [SameAs(text)]
        data = "".join(DATA_URL.sub("", text).split()).translate(URL_SAFE)
        try:
            return [base64.b64decode(data + "=" * (-len(data) % 4), validate=True)]
        except (binascii.Error, ValueError) as error:
            raise self.fault(f"column {column!r}: the picture {text[:20]!r}... is neither base64 ({error}) "
                             "nor a path that ends as a picture's") from error
