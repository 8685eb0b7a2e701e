"""Small benchmark files in each published layout (tests/evaluate/files) and the items that they must give.

expected.jsonl has one item per line: its source, then its fields, with the SHA-256 of its pictures.
"""
import base64
import csv
import io
import json
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

from PIL import Image

from utils.evaluate.benchmarks import TABLE, prepare

FILES = Path(__file__).parent / "evaluate" / "files"
EXPECTED = defaultdict(dict)  # (benchmark, source) -> {id: fields}
for _line in (FILES / "expected.jsonl").read_text(encoding="utf-8").splitlines():
    _item = json.loads(_line)
    EXPECTED[_item.pop("benchmark"), _item.pop("source")][_item["id"]] = _item


def picture(n: int, kind: str = "JPEG") -> bytes:
    """Return the bytes of a 56 x 84 picture; another `n` gives other bytes."""
    file = io.BytesIO()
    image = Image.new("RGB", (56, 84), (40 * n % 256, 90, 200 - 30 * n % 200))
    image.paste("white", (0, 0, 20 + n, 30))
    image.save(file, kind, **({"quality": 61} if kind == "JPEG" else {}))
    return file.getvalue()


def text_of(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def struct(data: bytes) -> dict:
    """Return a picture as the `datasets` library stores it in parquet."""
    return {"bytes": data, "path": None}


def read_rows(source: str) -> list[dict]:
    """Return the rows of a .tsv or .parquet file of tests/evaluate/files."""
    if source.endswith(".parquet"):
        from pyarrow import parquet
        return parquet.read_table(FILES / source).to_pylist()
    with open(FILES / source, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def write_tsv(path: Path, rows: list[dict]) -> Path:
    """Write rows as pandas.DataFrame.to_csv(sep="\\t") does: minimal quoting, doubled quotes."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_parquet(path: Path, rows: list[dict]) -> Path:
    import pyarrow
    from pyarrow import parquet
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def sized(name, source):
    """The benchmark with the size of its file in tests/evaluate/files."""
    counts = Counter(item["category"] for item in EXPECTED[name, source].values())
    return replace(TABLE[name], n=counts.total(), counts=dict(counts))


def prepared(tmp_path, name, source):
    """The items of a file in tests/evaluate/files, with pictures in tmp_path / "out.images"."""
    return prepare(sized(name, source), tmp_path / "out.images", FILES / source)
