"""Benchmarks by name: their sources, their published sizes, and their rows as items with pictures.

A new benchmark is a function in utils/evaluate/layouts.py and an entry of TABLE.
"""
import hashlib
import io
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from PIL import Image

from utils.cli import log
from utils.evaluate import layouts
from utils.evaluate.scoring import rotation_of
from utils.evaluate.sources import (Hub, Row, Rows, SameAs, check_digest, dataset_rows, download, file_rows,
                                    pinned, vstar_folder_rows)
from utils.images import BROKEN, FORMATS, ImageError, read_bytes, resolve_image
from utils.items import ANSWER_TYPES, item_fault
from utils.jsonl import DataError, call_key, check_unique, disk_errors, replace_file

SUFFIXES = {"JPEG": ".jpg", "MPO": ".jpg", "PNG": ".png", "WEBP": ".webp", "GIF": ".gif", "BMP": ".bmp",
            "TIFF": ".tif"}


@dataclass(frozen=True)
class Benchmark:
    """A benchmark. `layouts`: (a column that only this layout has, its function in layouts.py).

    n, counts (category -> n) and n_images (pictures per item) are asserted unless None or {}. `subset`: the
    value of the first of `subset_columns` that its rows have. `group` names an item's cluster, from the item
    and its place. `check` returns the fault of all items together. `digests`: file name -> its possible MD5
    digests.
    """

    name: str
    layouts: tuple[tuple[str, Callable], ...]
    hub: Hub | None = None
    n: int | None = None
    counts: dict[str, int] = field(default_factory=dict)
    n_images: int | None = 1
    subset: str | None = None
    subset_columns: tuple[str, ...] = ()
    group: Callable[[dict, int], str] | None = None
    check: Callable[[list[dict]], str | None] | None = None
    digests: dict[str, tuple[str, ...]] = field(default_factory=dict)


# ---- the table
# MD5 digests: VLMEvalKit, commit e8e78f05, vlmeval/dataset/image_mcq.py (V*, HR-Bench, MME-RealWorld-Lite,
# BLINK, MMVP, CV-Bench, MMStar), image_vqa.py (TableVQABench, OCRBench-v2) and image_yorn.py (MME). Sizes:
# the data cards; V*'s from its 191 rows, OCRBench-v2's from arXiv 2501.00321, MMVP's from lmms-eval
# (lmms_eval/tasks/mmvp), CV-Bench's halves from arXiv 2406.16860, VSP's from UMass-Embodied-AGI/Mirage.
VSTAR = {"n": 191, "counts": {"direct_attributes": 115, "relative_position": 76}}
HRBENCH = {"layouts": (("cycle_category", layouts.hrbench),), "n": 800,
           "counts": {"single": 400, "cross": 400}, "group": layouts.by_question,
           "check": layouts.rotations_fault}
HRBENCH_HUB = Hub("DreamMr/HR-Bench", "83b9013d6293b85dc507e87199ca52517536939c",
                  config="hrbench_version_split")
# VLMEvalKit's file since commit fbd4d504 and before it: only labels of Relative_Reflectance differ
BLINK_DIGESTS = {"BLINK.tsv": ("d5e8af148b10ac69f535ff7b23f3f989", "3b6649b6a662184ea046908e5506260e")}
BLINK_SIZES = {"Jigsaw": (150, 3), "Multi-view_Reasoning": (133, 2)}  # items, pictures per item
BLINK_SUBTASKS = ("Art_Style", "Counting", "Forensic_Detection", "Functional_Correspondence", "IQ_Test",
                  "Jigsaw", "Multi-view_Reasoning", "Object_Localization", "Relative_Depth",
                  "Relative_Reflectance", "Semantic_Correspondence", "Spatial_Relation",
                  "Visual_Correspondence", "Visual_Similarity")
MMSTAR_ABILITIES = ("coarse perception", "fine-grained perception", "instance reasoning",
                    "logical reasoning", "math", "science & technology")
TABLEVQA_SIZES = {"vwtq": 750, "vwtq_syn": 250, "vtabfact": 250}  # the paper leaves fintabnetqa out

TABLE = {bench.name: bench for bench in (
    Benchmark("mcq", (("question", layouts.choices),), n_images=None),  # a file of one's own
    Benchmark("vstar", (("index", layouts.choices),), **VSTAR,
              hub=Hub("xjtupanda/VStar_Bench", "b1312e6fbf89ace5a50cc5b0214010aeb0f69bdc",
                      file="VStarBench.tsv"),
              digests={"VStarBench.tsv": ("b18854d7075574be06b631cd5f7d2d6a",)}),
    Benchmark("vstar_regions", (("test_type", layouts.vstar_original),), Hub("craigwu/vstar_bench"), **VSTAR),
    Benchmark("hrbench_4k", **HRBENCH, hub=replace(HRBENCH_HUB, split="hrbench_4k"),
              digests={"hr_bench_4k.tsv": ("f6b041b03d49543494b8a56d2e35be65",)}),
    Benchmark("hrbench_8k", **HRBENCH, hub=replace(HRBENCH_HUB, split="hrbench_8k"),
              digests={"hr_bench_8k.tsv": ("274c9c7f89329b804a4723178a00219c",)}),
    Benchmark("mme_realworld_lite", (("multi-choice options", layouts.mme_realworld),
                                     ("Answer choices", layouts.mme_realworld_official)), n=1919,
              hub=Hub("yifanzhang114/MME-RealWorld-Base64", "93310bbe383ad164ef4afadd329090679c52d7c4",
                      file="mme_realworld_lite.tsv"),
              digests={"mme_realworld_lite.tsv": ("4c17057d7d3b6c4a0d4397c3dae0881c",)}),
    *(Benchmark(f"blink/{task}", (("sub_task", layouts.blink_hub), ("category", layouts.choices)),
                Hub("BLINK-Benchmark/BLINK", config=task, split="val"), n, n_images=n_images, subset=task,
                subset_columns=("sub_task", "category"), digests=BLINK_DIGESTS)
      for task in BLINK_SUBTASKS for n, n_images in [BLINK_SIZES.get(task, (None, None))]),
    *(Benchmark(f"tablevqa/{split}", (("qa_id", layouts.tablevqa), ("split", layouts.tablevqa)),
                Hub("terryoo/TableVQA-Bench", split=split), n, subset=split, subset_columns=("split",),
                digests={"tablevqa-bench.tsv": ("2550adc61bdc82d8e62f3b003de7c62d",)})
      for split, n in TABLEVQA_SIZES.items()),
    Benchmark("mmvp", (("Index", layouts.mmvp), ("lndex", layouts.mmvp), ("index", layouts.choices)),
              Hub("lmms-lab-eval/MMVP", split="train"), 300, group=layouts.by_two, check=layouts.halves_fault,
              digests={"MMVP.tsv": ("8cb732b141a0cba5b42159df2839e557",)}),
    *(Benchmark(f"cv_bench/{half}", (("source", layouts.cv_bench),),
                Hub("nyu-visionx/CV-Bench", config=half, split="test"), n, subset=half,
                subset_columns=("type", "split"), digests={f"CV-Bench-{half}.tsv": (digest,)})
      for half, n, digest in (("2D", 1438, "a7cff4cc2857cc237ee2b89e62bccb2d"),
                              ("3D", 1200, "bb94c0d568d652d15b60e001ac40a170"))),
    Benchmark("mmstar", (("category", layouts.mmstar),),
              Hub("Lin-Chen/MMStar", "bc98d668301da7b14f648724866e57302778ab27", split="val"), 1500,
              counts=dict.fromkeys(MMSTAR_ABILITIES, 250),
              digests={"MMStar.tsv": ("e1ecd2140806c1b1bbf54b43372efb9e",)}),
    Benchmark("mme", (("question_id", layouts.mme), ("index", layouts.mme)),
              Hub("lmms-lab/MME", split="test"), 2374, group=layouts.by_image, check=layouts.pairs_fault,
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


def read_row(bench: Benchmark, row: Row) -> dict:
    for column, read in bench.layouts:
        if column in row.cells:
            return read(row)
    raise row.fault(f"columns {', '.join(row.cells)} are not a known layout of {bench.name}; expected "
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
    items, stored, seen, kept, others = [], {}, {}, {}, Counter()
    for where, cells in rows:
        if limit is not None and len(items) == limit:
            break
        subset = next((cells[column] for column in bench.subset_columns if column in cells), bench.subset)
        if subset != bench.subset:
            others[subset] += 1
            continue
        row = Row(where, cells, bench.name)
        item = read_row(bench, row)
        check_unique(where, item["id"], seen)
        item["images"] = [store_any(where, image, root, folder, kept) for image in item["images"]]
        if not any(isinstance(image, SameAs) for image in item["images"]):
            stored[row.key("index") if "index" in cells else ""] = item["images"]
        items.append(item)
    if not items:
        found = f"{others.total()} rows of {', '.join(map(repr, others))}" if others else "no rows"
        raise DataError(f"{source or bench.hub.repo}: {found}; expected rows of {bench.name}")
    for place, item in enumerate(items):
        resolve_same(item, stored)
        check_item(item, bench)
        item["group_id"] = bench.group(item, place) if bench.group else item["group_id"]
    tell_equal_options(items)
    if limit is None:
        check_all(items, bench, source or bench.hub.repo)
    return items


# ---- pictures
def store_any(where: str, image: bytes | str | SameAs, root: str | Path | None, folder: Path,
              kept: dict[str, dict]) -> dict | SameAs:
    if isinstance(image, SameAs):
        return image  # resolved later
    if isinstance(image, bytes):
        return store(where, image, folder, kept)
    if root is None:
        raise DataError(f"{where}: the picture is the path {image!r}, expected bytes; give --image_root")
    try:
        return store(where, read_bytes(resolve_image(root, image)), folder, kept)
    except ImageError as error:
        raise ImageError(f"{where}: {error}", error.reason) from error


def store(where: str, data: bytes, folder: Path, kept: dict[str, dict]) -> dict:
    """Write a picture's bytes into `folder` under their hash, decoded once to find damage; return {"path",
    "sha256"}. `kept`: the pictures of this run by hash."""
    digest = hashlib.sha256(data).hexdigest()
    if digest in kept:
        return kept[digest]
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            image.load()
            suffix = SUFFIXES[image.format]
    except BROKEN as error:
        raise ImageError(f"{where}: {len(data)} bytes are not a whole picture ({error})",
                         "image_unreadable") from error
    path = folder / f"{digest[:16]}{suffix}"
    replace_file(path, lambda file: file.write(data), "wb")  # another process may be reading it
    kept[digest] = {"path": f"{folder.name}/{path.name}", "sha256": digest}
    return kept[digest]


def resolve_same(item: dict, stored: dict[str, list[dict]]) -> None:
    """Replace each `SameAs` by the pictures of that row."""
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


def tell_equal_options(items: list[dict]) -> None:
    """Log how many items have options of the same text, between which no answer can decide."""
    equal = [item for item in items
             if len({text.strip() for _, text in item["options"]}) < len(item["options"])]
    if equal:
        log(f"{len(equal)} of {len(items)} items have equal options, first {equal[0]['id']} at "
            f"{equal[0]['source']}: {equal[0]['options']}")


def check_all(items: list[dict], bench: Benchmark, source: object) -> None:
    counts = Counter(item["category"] for item in items)
    if not items or bench.n not in (None, len(items)) or (bench.counts and counts != bench.counts):
        expected = f"{bench.n or 'at least one'}{f', {bench.counts}' if bench.counts else ''}"
        raise DataError(f"{source}: {len(items)} items, {dict(counts)}; expected {expected} of {bench.name}")
    if bench.check and (fault := bench.check(items)):
        raise DataError(f"{source}: {fault}")


# ---- options in another order
def shuffle_options(items: list[dict], seed: int) -> list[dict]:
    """Return items with the options of each multiple-choice item in an order that its id and the seed decide,
    and "letters" {as shown: as published}. DataError for HR-Bench, which asks in four orders by itself."""
    if rotated := [item["id"] for item in items if rotation_of(item) is not None]:
        raise DataError(f"--shuffle_options: item {rotated[0]!r} and {len(rotated) - 1} more are rotations "
                        "of their options; expected items with one order")
    if not any(item["metric"] == "mcq" for item in items):
        raise DataError("--shuffle_options: no item has options; expected multiple choice")
    return [shuffled(item, seed) if item["metric"] == "mcq" else item for item in items]


def shuffled(item: dict, seed: int) -> dict:
    order = sorted(item["options"], key=lambda option: call_key(seed=seed, id=item["id"], letter=option[0]))
    letters = {shown: letter for (shown, _), (letter, _) in zip(item["options"], order)}
    gold = next(shown for shown, letter in letters.items() if letter == item["answer"]["value"])
    options = [[shown, text] for shown, (_, text) in zip(letters, order)]
    # a published prompt lists the options
    raw = {name: value for name, value in (item.get("raw") or {}).items() if name != "prompt"}
    return item | {"options": options, "answer": item["answer"] | {"value": gold}, "letters": letters,
                   "raw": raw}
