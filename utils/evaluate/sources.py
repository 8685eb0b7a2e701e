"""Rows of a benchmark as it is published: a TSV, parquet, JSONL, a folder, or a data set on the hub.

Every reader yields (where, row) one by one: the largest file has 4.6 GB. Pictures stay as they are stored.
"""
import csv
import hashlib
import re
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from utils.jsonl import DataError, load_object, located_rows

Rows = Iterator[tuple[str, dict]]
MAX_CELL = 2**31 - 1  # characters; csv's own limit is 131,072
VSTAR_FOLDERS = ("direct_attributes", "relative_position")  # as vstar_bench_eval.py reads


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
    json_rows = partial(located_rows, longest=MAX_CELL)  # lines may hold pictures
    readers = {".tsv": tsv_rows, ".parquet": parquet_rows, ".jsonl": json_rows, ".json": json_rows}
    if path.suffix not in readers:
        raise DataError(f"{path}: kind {path.suffix!r}, expected one of {', '.join(readers)} or a folder")
    return readers[path.suffix](path)


def tsv_rows(path: Path) -> Rows:
    """Yield a TSV's rows, quoted as pandas writes them. Every cell is text: pandas' own reader turns the
    option "None" into a missing value and the gold "1" into an integer."""
    before = csv.field_size_limit(MAX_CELL)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter="\t", strict=True)
            names = next(reader, [])
            if len(set(names)) < max(2, len(names)):
                raise DataError(f"{path}:1: columns {str(names)[:80]}, expected two or more different names")
            for cells in reader:
                where = f"{path}:{reader.line_num}"
                if len(cells) != len(names):
                    raise DataError(f"{where}: {len(cells)} cells, expected {len(names)}: {', '.join(names)}")
                yield where, dict(zip(names, cells))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a TSV in UTF-8 ({error}); fetch the file again") from error
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
    """Yield V* as its authors publish it: pictures in two folders, each with a JSON file of its name;
    `image_file` and `test_type` (the folder) are added, as in penghao-wu/vstar vstar_bench_eval.py."""
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
    """Raise DataError unless the file has one of these digests: MD5 (32 digits) or SHA-256."""
    for kind in {"md5" if len(digest) == 32 else "sha256" for digest in accepted}:
        with open(path, "rb") as file:
            actual = hashlib.file_digest(file, kind).hexdigest()
        if actual in accepted:
            return
    raise DataError(f"{path}: {kind} {actual}, expected {' or '.join(accepted)}; fetch it again")


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
    """Return the commit to read: the caller's, or the pinned one."""
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
