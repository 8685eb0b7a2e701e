"""Benchmarks by name: their sources, their published sizes, and their rows as items with pictures.

A new benchmark is a function in utils/evaluate/layouts.py and an entry of TABLE.
"""
import hashlib
import io
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from PIL import Image

from utils.evaluate import layouts
from utils.evaluate.layouts import SameAs
from utils.evaluate.sources import (Hub, Rows, check_digest, dataset_rows, download, file_rows, pinned,
                                    vstar_folder_rows)
from utils.images import BROKEN, FORMATS, ImageError, read_bytes, resolve_image
from utils.items import ANSWER_TYPES, item_fault
from utils.jsonl import DataError, call_key, check_unique, disk_errors, replace_file

SUFFIXES = {"JPEG": ".jpg", "MPO": ".jpg", "PNG": ".png", "WEBP": ".webp", "GIF": ".gif", "BMP": ".bmp",
            "TIFF": ".tif"}


@dataclass(frozen=True)
class Benchmark:
    """A benchmark. `layouts`: (a column that only this layout has, its function in layouts.py).

    n, counts (category -> n) and n_images (pictures per item) are asserted unless None or {}. `group` names
    an item's cluster. `check` returns the fault of all items together. `digests`: file name -> its possible
    MD5 or SHA-256 digests.
    """

    name: str
    layouts: tuple[tuple[str, Callable], ...]
    hub: Hub | None = None
    n: int | None = None
    counts: dict[str, int] = field(default_factory=dict)
    n_images: int | None = 1
    subset: str | None = None
    group: Callable[[dict], str] | None = None
    check: Callable[[list[dict]], str | None] | None = None
    digests: dict[str, tuple[str, ...]] = field(default_factory=dict)


# ---- clusters
def by_question(item: dict) -> str:
    """One group for all rotations of a question."""
    key = call_key(images=[image["sha256"] for image in item["images"]], question=item["question"].strip(),
                   gold=dict(item["options"]).get(item["answer"]["value"]),
                   texts=sorted(text for _, text in item["options"]))
    return f"{item['benchmark']}/{key[:16]}"


def by_image(item: dict) -> str:
    return f"{item['benchmark']}/{item['category']}/{item['images'][0]['sha256'][:16]}"


def values_by_group(items: list[dict], value: Callable[[dict], str]) -> dict[str, list[str]]:
    groups = defaultdict(list)
    for item in items:
        groups[item["group_id"]].append(value(item))
    return groups


def rotations_fault(items: list[dict]) -> str | None:
    cycles = values_by_group(items, lambda item: str(item["raw"]["cycle_category"]))
    wrong = [group for group, cycle in cycles.items() if sorted(cycle) != ["0", "1", "2", "3"]]
    if not wrong:
        return None
    first = next(item["id"] for item in items if item["group_id"] == wrong[0])
    return (f"{len(wrong)} of {len(cycles)} questions do not occur in four rotations, first {first} with "
            f"{sorted(cycles[wrong[0]])}; expected 0, 1, 2, 3 of one picture, text and options")


def pairs_fault(items: list[dict]) -> str | None:
    golds = values_by_group(items, lambda item: item["answer"]["value"])
    wrong = [group for group, answers in golds.items() if answers.count("yes") != answers.count("no")]
    if not wrong:
        return None
    return (f"{len(wrong)} of {len(golds)} pictures have no pair, first {wrong[0]} with {golds[wrong[0]]}; "
            "expected as many golds 'yes' as 'no'")


# ---- the table
# Digests: VLMEvalKit vlmeval/dataset/image_mcq.py (V*, HR-Bench, MME-RealWorld-Lite, BLINK), image_vqa.py
# (TableVQABench, OCRBench-v2) and image_yorn.py (MME). Sizes: the data cards; V*'s from its 191 rows,
# OCRBench-v2's from arXiv 2501.00321, VSP's from UMass-Embodied-AGI/Mirage.
VSTAR = {"n": 191, "counts": {"direct_attributes": 115, "relative_position": 76}}
HRBENCH = {"layouts": (("cycle_category", layouts.hrbench),), "n": 800,
           "counts": {"single": 400, "cross": 400}, "group": by_question, "check": rotations_fault}
HRBENCH_HUB = Hub("DreamMr/HR-Bench", "83b9013d6293b85dc507e87199ca52517536939c",
                  config="hrbench_version_split")
# VLMEvalKit's file since 2026-05-11 and before it: only labels of Relative_Reflectance differ
BLINK_DIGESTS = {"BLINK.tsv": ("d5e8af148b10ac69f535ff7b23f3f989", "3b6649b6a662184ea046908e5506260e")}
BLINK_SIZES = {"Jigsaw": (150, 3), "Multi-view_Reasoning": (133, 2)}  # items, pictures per item
BLINK_SUBTASKS = ("Art_Style", "Counting", "Forensic_Detection", "Functional_Correspondence", "IQ_Test",
                  "Jigsaw", "Multi-view_Reasoning", "Object_Localization", "Relative_Depth",
                  "Relative_Reflectance", "Semantic_Correspondence", "Spatial_Relation",
                  "Visual_Correspondence", "Visual_Similarity")
TABLEVQA_SIZES = {"vwtq": 750, "vwtq_syn": 250, "vtabfact": 250}  # the paper leaves fintabnetqa out

TABLE = {bench.name: bench for bench in (
    Benchmark("vstar", (("index", layouts.choices_tsv),), **VSTAR,
              hub=Hub("xjtupanda/VStar_Bench", "b1312e6fbf89ace5a50cc5b0214010aeb0f69bdc",
                      file="VStarBench.tsv"),
              digests={"VStarBench.tsv": (
                  "9826a55e0e0992a59a91b28c991f07e0ac75be9f183ed3802151985425f4002e",)}),
    Benchmark("vstar_regions", (("test_type", layouts.vstar_original),), Hub("craigwu/vstar_bench"), **VSTAR),
    Benchmark("hrbench_4k", **HRBENCH, hub=replace(HRBENCH_HUB, split="hrbench_4k"),
              digests={"hr_bench_4k.tsv": (
                  "a2147a5525fd6c7246e1891b738e1987d16d6ce2df2ee0c4f96946a959e76e18",)}),
    Benchmark("hrbench_8k", **HRBENCH, hub=replace(HRBENCH_HUB, split="hrbench_8k"),
              digests={"hr_bench_8k.tsv": ("274c9c7f89329b804a4723178a00219c",)}),
    Benchmark("mme_realworld_lite", (("multi-choice options", layouts.mme_realworld),), n=1919,
              hub=Hub("yifanzhang114/MME-RealWorld-Base64", "93310bbe383ad164ef4afadd329090679c52d7c4",
                      file="mme_realworld_lite.tsv"),
              digests={"mme_realworld_lite.tsv": (
                  "d66abee0758232d75d1586c27a39a19059d7e9bb4c855d3ecceab283a7488065",)}),
    *(Benchmark(f"blink/{task}", (("sub_task", layouts.blink_hub), ("category", layouts.choices_tsv)),
                Hub("BLINK-Benchmark/BLINK", config=task, split="val"), n, n_images=n_images, subset=task,
                digests=BLINK_DIGESTS)
      for task in BLINK_SUBTASKS for n, n_images in [BLINK_SIZES.get(task, (None, None))]),
    *(Benchmark(f"tablevqa/{split}", (("qa_id", layouts.tablevqa), ("split", layouts.tablevqa)),
                Hub("terryoo/TableVQA-Bench", split=split), n, subset=split,
                digests={"tablevqa-bench.tsv": ("2550adc61bdc82d8e62f3b003de7c62d",)})
      for split, n in TABLEVQA_SIZES.items()),
    Benchmark("mme", (("question_id", layouts.mme), ("index", layouts.mme)),
              Hub("lmms-lab/MME", split="test"), 2374, group=by_image, check=pairs_fault,
              digests={"MME.tsv": ("b36b43c3f09801f5d368627fb92187c3",)}),
    Benchmark("ocrbench_v2", (("id", layouts.ocrbench_v2), ("index", layouts.ocrbench_v2)),
              Hub("ling99/OCRBench_v2", split="test"), 10000,
              digests={"OCRBench_v2.tsv": ("65d04fe07b4d4ee33e73fc8e7d4d46b0",)}),
    Benchmark("vsp", (("map_desc", layouts.vsp),), n=400,
              counts={f"level_{size}": 100 for size in (3, 4, 5, 6)}))}


# ---- rows -> items
def open_rows(bench: Benchmark, source: str | Path | None, revision: str | None) -> tuple[Rows, Path | None]:
    """Return the rows of a file, a folder or the hub, and the pictures' folder."""
    hub = bench.hub
    if source is None and hub is None:
        raise DataError(f"{bench.name}: not on the hub; expected its file as --source")
    if source is None and hub.split:
        return dataset_rows(hub.repo, hub.config, hub.split, pinned(hub, revision)), None
    path = Path(source) if source is not None else download(hub, revision)
    if path.is_file():
        if path.name in bench.digests:
            check_digest(path, bench.digests[path.name])
        return file_rows(path), path.parent
    if not path.is_dir():
        raise DataError(f"{path}: no such file or folder; expected the source of {bench.name}")
    if hub and hub.split:
        return dataset_rows(path.resolve(), hub.config, hub.split), path
    if bench.layouts[0][1] is not layouts.vstar_original:
        name = hub.file if hub else "the file"
        raise DataError(f"{path}: a folder; expected {name} of {bench.name}")
    return vstar_folder_rows(path), path


def read_row(bench: Benchmark, where: str, row: dict) -> dict | None:
    """Return a row's item; None for a row of another subset."""
    for column, read in bench.layouts:
        if column in row:
            return read(where, row, bench.name, bench.subset)
    raise DataError(f"{where}: columns {', '.join(row)} are not a known layout of {bench.name}; expected "
                    f"{' or '.join(repr(column) for column, _ in bench.layouts)}")


def prepare(bench: Benchmark, folder: str | Path, source: str | Path | None = None,
            image_root: str | Path | None = None, limit: int | None = None,
            revision: str | None = None) -> list[dict]:
    """Return a benchmark's checked items; pictures are written to `folder`, paths start at its parent.

    source: a file, a folder in the hub's layout, or None for the hub at `revision` or the pinned commit.
    image_root: where picture paths start (default: next to the source). limit: only the first items, whose
    counts are not checked.
    """
    rows, root = open_rows(bench, source, revision)
    root, folder = image_root or root, Path(folder)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    items, stored, seen = [], {}, {}
    for where, row in rows:
        if limit is not None and len(items) == limit:
            break
        item = read_row(bench, where, row)
        if item is None:
            continue
        check_unique(where, item["id"], seen)
        item["images"] = [store_any(where, image, root, folder) for image in item["images"]]
        if not any(isinstance(image, SameAs) for image in item["images"]):
            stored[str(row.get("index"))] = item["images"]
        items.append(item)
    for item in items:
        resolve_same(item, stored)
        check_item(item, bench)
        item["group_id"] = bench.group(item) if bench.group else item["group_id"]
    if limit is None:
        check_all(items, bench, source or bench.hub.repo)
    return items


# ---- pictures
def store_any(where: str, image: bytes | str | SameAs, root: str | Path | None,
              folder: Path) -> dict | SameAs:
    if isinstance(image, SameAs):
        return image  # resolved later
    if isinstance(image, bytes):
        return store(where, image, folder)
    if root is None:
        raise DataError(f"{where}: the picture is the path {image!r}, expected bytes; give --image_root")
    return store(where, read_bytes(resolve_image(root, image)), folder)


def store(where: str, data: bytes, folder: Path) -> dict:
    """Write a picture's bytes into `folder` under their hash; return {"path", "sha256"}."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:  # reads the header alone
            suffix = SUFFIXES[image.format]
    except BROKEN as error:
        raise ImageError("image_unreadable",
                         f"{where}: {len(data)} bytes are not a picture ({error})") from error
    digest = hashlib.sha256(data).hexdigest()
    path = folder / f"{digest[:16]}{suffix}"
    replace_file(path, lambda file: file.write(data), "wb")  # another process may be reading it
    return {"path": f"{folder.name}/{path.name}", "sha256": digest}


def resolve_same(item: dict, stored: dict[str, list[dict]]) -> None:
    """Give an item the pictures of the rows that its own row names."""
    images = []
    for image in item["images"]:
        if isinstance(image, SameAs) and image.index not in stored:
            raise DataError(f"{item['source']}: the picture is that of row {image.index!r}, which has none")
        images += stored[image.index] if isinstance(image, SameAs) else [image]
    item["images"] = [dict(image) for image in images]


# ---- checks
def check_item(item: dict, bench: Benchmark) -> None:
    if fault := item_fault(item, tuple(ANSWER_TYPES)):
        raise DataError(f"{item['source']}: item {item['id']!r}: {fault}")
    if bench.n_images not in (None, len(item["images"])) or not item["images"]:
        raise DataError(f"{item['source']}: item {item['id']!r}: {len(item['images'])} pictures, "
                        f"expected {bench.n_images or 'at least one'}")


def check_all(items: list[dict], bench: Benchmark, source: object) -> None:
    counts = Counter(item["category"] for item in items)
    if not items or bench.n not in (None, len(items)) or (bench.counts and counts != bench.counts):
        expected = f"{bench.n or 'at least one'}{f', {bench.counts}' if bench.counts else ''}"
        raise DataError(f"{source}: {len(items)} items, {dict(counts)}; expected {expected} of {bench.name}")
    if bench.check and (fault := bench.check(items)):
        raise DataError(f"{source}: {fault}")
