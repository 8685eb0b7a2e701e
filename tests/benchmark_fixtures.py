"""Tiny benchmarks in each source's own columns, with pictures made on the spot; tests/test_benchmarks.py
reads them.

Every `write_*` returns (path, expected): for each item, by its id, what must come out of the file.
"""
import base64
import csv
import io
import json
from pathlib import Path

from PIL import Image

# stem, options, gold, category: four options and two, a stem that comes twice, text that a TSV must quote
VSTAR = [
    ("What is the material of the glove?", ["rubber", "cotton", "kevlar", "leather"], "A",
     "direct_attributes"),
    ('What does the "sign" say?', ["None", "NA", "left.", 'a "quoted" word'], "B", "direct_attributes"),
    ("Is the dog left\tor right of the tree?", ["left", "right"], "B", "relative_position"),
    ("Is the dog left\tor right of the tree?", ["left", "right"], "A", "relative_position")]
BAKED = "\nAnswer with the option's letter from the given choices directly."


def picture(n: int, kind: str = "JPEG") -> bytes:
    """Bytes of a 56 x 84 picture; another `n` gives other bytes. JPEG of a quality that no library writes by
    default."""
    file = io.BytesIO()
    image = Image.new("RGB", (56, 84), (40 * n % 256, 90, 200 - 30 * n % 200))
    image.paste("white", (0, 0, 20 + n, 30))
    image.save(file, kind, **({"quality": 61} if kind == "JPEG" else {}))
    return file.getvalue()


def text_of(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def write_tsv(path: Path, rows: list[dict]) -> Path:
    """As pandas.DataFrame.to_csv(sep="\\t") writes it: minimal quoting, doubled quotes."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_parquet(path: Path, rows: list[dict], pictures: tuple[str, ...] = ("image",)) -> Path:
    """As the `datasets` library writes it: pictures as {"bytes", "path"} and a note of their columns for its
    reader."""
    from datasets import Dataset, Features
    from datasets import Image as Picture
    from datasets import List, Value

    kinds = {str: Value("string"), int: Value("int64"), list: List(Value("string"))}
    features = {name: Picture() if name in pictures else kinds[type(value)] for name,
                value in rows[0].items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(rows, features=Features(features)).to_parquet(str(path))
    return path


def struct(data: bytes | None) -> dict | None:
    return None if data is None else {"bytes": data, "path": None}


def lettered(texts: list[str]) -> list[list[str]]:
    return [list(pair) for pair in zip("ABCDE", texts)]


def mcq(question, texts, gold, category, *images) -> dict:
    return {"question": question, "options": lettered(texts), "answer": {"type": "letter", "value": gold},
            "category": category, "metric": "mcq", "bytes": list(images)}


# ------------------------------------------------------------------------------------------------ V*
def vstar_rows() -> list[dict]:
    """VStarBench.tsv: index, image, question, A, B, C, D, answer, category."""
    return [{"index": n, "image": text_of(picture(n)), "question": stem,
             **{letter: dict(lettered(texts)).get(letter, "") for letter in "ABCD"}, "answer": gold,
             "category": category}
            for n, (stem, texts, gold, category) in enumerate(VSTAR)]


def vstar_expected(name: str = "vstar") -> dict:
    return {f"{name}/{n}": mcq(*parts, picture(n)) for n, parts in enumerate(VSTAR)}


def write_vstar(folder: Path) -> tuple[Path, dict]:
    return write_tsv(folder / "vstar.tsv", vstar_rows()), vstar_expected()


def inline_rows() -> list[dict]:
    return [{"text": stem + "".join(f"\n({letter}) {text}" for letter, text in lettered(texts)) + BAKED,
             "category": category, "label": gold, "question_id": str(n)}
            for n, (stem, texts, gold, category) in enumerate(VSTAR)]


def write_vstar_inline(folder: Path) -> tuple[Path, dict]:
    """lmms-lab/vstar-bench: image, text, category, label, question_id; a folder in the hub's layout."""
    rows = [{"image": struct(picture(n)), **row} for n, row in enumerate(inline_rows())]
    write_parquet(folder / "vstar_inline" / "data" / "test-00000-of-00001.parquet", rows)
    return folder / "vstar_inline", vstar_expected("vstar_inline")


def write_vstar_questions(folder: Path) -> tuple[Path, dict]:
    """The authors' test_questions.jsonl: pictures as paths beside it."""
    rows = []
    for n, row in enumerate(inline_rows()):
        path = folder / row["category"] / f"sa_{n}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(picture(n))
        rows.append({"image": str(path.relative_to(folder)), **row})
    return write_jsonl(folder / "test_questions.jsonl", rows), vstar_expected("vstar_inline")


def write_vstar_original(folder: Path) -> tuple[Path, dict]:
    """craigwu/vstar_bench: a JSON beside each picture, options are sentences, the first is right; other
    folders unused."""
    root, expected = folder / "vstar_bench", {}
    for n, category in enumerate(["direct_attributes", "relative_position", "GPT4V-hard"]):
        place = root / category
        place.mkdir(parents=True)
        texts = [f"The dog is on the {side}." for side in ("left", "right")]
        (place / f"sa_{n}.jpg").write_bytes(picture(n))
        (place / f"sa_{n}.json").write_text(json.dumps({"target_object": ["dog", "cat"],
                                                        "bbox": [[1, 2, 3, 4], [9, 1, 5.5, 6]],
                                                        "question": "Where is the dog?", "options": texts}))
        expected[f"vstar_likelihood/{category}/sa_{n}"] = mcq("Where is the dog?", texts, "A", category,
                                                              picture(n)) | {
            "metric": "likelihood", "region": [1, 1, 15, 7]}
    del expected["vstar_likelihood/GPT4V-hard/sa_2"]
    return root, expected


# ------------------------------------------------------------------------------------------------ HR-Bench
def hrbench_rows() -> list[dict]:
    """index, question, answer, category, A to D, cycle_category, image (base64); two questions, rotation by
    rotation."""
    rows = []
    for cycle in range(4):
        for n, category in enumerate(("single", "cross")):
            texts = [f"the {colour} one" for colour in ("red", "blue", "green", "black")]
            turned = texts[cycle:] + texts[:cycle]
            rows.append({"index": len(rows), "question": f"Which kiosk is nearest to gate {n}?",
                         "answer": "ABCD"[turned.index(texts[n])], "category": category,
                         **dict(lettered(turned)),
                         "cycle_category": str(cycle), "image": text_of(picture(n))})
    return rows


def hrbench_expected() -> dict:
    return {f"hrbench_4k/{row['index']}/{row['cycle_category']}": mcq(
        row["question"], [row[letter] for letter in "ABCD"], row["answer"], row["category"],
        base64.b64decode(row["image"])) for row in hrbench_rows()}


def write_hrbench(folder: Path) -> tuple[Path, dict]:
    return write_tsv(folder / "hrbench.tsv", hrbench_rows()), hrbench_expected()


def write_hrbench_repeated(folder: Path) -> tuple[Path, dict]:
    """Options stand in the question and in the columns, as in a copy that has been posted."""
    rows = [row | {"question": row["question"] + "".join(f"\n({letter}) {row[letter]}" for letter in "ABCD")}
            for row in hrbench_rows()]
    return write_tsv(folder / "hrbench_repeated.tsv", rows), hrbench_expected()


def write_hrbench_parquet(folder: Path) -> tuple[Path, dict]:
    return write_parquet(folder / "hrbench.parquet", hrbench_rows(), ()), hrbench_expected()


def write_hrbench_hub(folder: Path) -> tuple[Path, dict]:
    """The hub's folder: a card that names the config and its splits."""
    root = folder / "HR-Bench"
    write_parquet(root / "hr_bench_4k.parquet", hrbench_rows(), ())
    (root / "README.md").write_text("---\nconfigs:\n- config_name: hrbench_version_split\n  data_files:\n"
                                    "  - split: hrbench_4k\n    path: hr_bench_4k.parquet\n---\n")
    return root, hrbench_expected()


# ----------------------------------------------------------------------------------------- MME-RealWorld-Lite
REALWORLD = [("What colour is the car?", ["Red", "Green, dark", "White", "(none)",
                                          "The image does not feature the colour"],
              "E", "Perception/Remote Sensing"),
             ("How many signs?", ["1", "2", "3", "4", "This image doesn't feature signs."], "C",
              "Reasoning/Monitoring")]


def realworld_rows(column: str = "image") -> list[dict]:
    """The picture, as base64, stands in `column`."""
    return [{"index": n, column: text_of(picture(n)), "question": question,
             "multi-choice options": [f"({letter}) {text}" for letter, text in lettered(texts)],
             "answer": gold,
             "category": category, "l2-category": "color"} for n,
             (question, texts, gold, category) in enumerate(REALWORLD)]


def realworld_expected() -> dict:
    return {f"mme_realworld_lite/{n}": mcq(*parts, picture(n)) for n, parts in enumerate(REALWORLD)}


def write_realworld(folder: Path) -> tuple[Path, dict]:
    """mme_realworld_lite.tsv: the options are a Python list, written as text."""
    rows = [row | {"multi-choice options": repr(row["multi-choice options"])} for row in realworld_rows()]
    return write_tsv(folder / "realworld.tsv", rows), realworld_expected()


def write_realworld_parquet(folder: Path) -> tuple[Path, dict]:
    return write_parquet(folder / "realworld.parquet", realworld_rows("bytes"), ()), realworld_expected()


# ------------------------------------------------------------------------------------------------ BLINK
JIGSAW = ["the second image", "the third image"]
JIGSAW_QUESTION = "Given the first image with one part missing, can you tell which one of the others completes it?"


def blink_rows() -> list[dict]:
    """Hub: idx, question, sub_task, image_1 to image_4, choices, answer, prompt, and columns that are not
    used."""
    options = "".join(f"\n({letter}) {text}" for letter, text in lettered(JIGSAW))
    return [{"idx": f"val_Jigsaw_{n}", "question": JIGSAW_QUESTION, "sub_task": "Jigsaw",
             **{f"image_{k}": struct(picture(3 * n + k, "PNG")) for k in (1, 2, 3)}, "image_4": None,
             "choices": JIGSAW,
             "answer": "(B)" if n else "(A)",
             "prompt": f"{JIGSAW_QUESTION}\nSelect from the following choices.{options}"}
            for n in range(2)]


def write_blink(folder: Path) -> tuple[Path, dict]:
    write_parquet(folder / "BLINK" / "Jigsaw" / "val-00000-of-00001.parquet", blink_rows(),
                  tuple(f"image_{k}" for k in range(1, 5)))
    (folder / "BLINK"
     / "README.md").write_text("---\nconfigs:\n- config_name: Jigsaw\n  data_files:\n  - split: val\n"
                                                "    path: Jigsaw/val-*\n---\n")
    return folder / "BLINK", {f"blink/Jigsaw/val_Jigsaw_{n}": mcq(
        JIGSAW_QUESTION, JIGSAW, "AB"[n], "Jigsaw", *(picture(3 * n + k, "PNG") for k in (1, 2, 3)))
        for n in range(2)}


def write_blink_tsv(folder: Path) -> tuple[Path, dict]:
    """BLINK.tsv: all subtasks in one file, pictures as a Python list of base64."""
    rows = [{"index": n, "question": JIGSAW_QUESTION, **dict(lettered(JIGSAW)), "C": "", "D": "",
             "answer": "AB"[n % 2],
             "category": category, "image": repr([text_of(picture(3 * n + k, "PNG")) for k in (1, 2, 3)])}
            for n, category in enumerate(["Jigsaw", "Counting", "Jigsaw"])]
    return write_tsv(folder / "blink.tsv", rows), {f"blink/Jigsaw/{n}": mcq(
        JIGSAW_QUESTION, JIGSAW, "A", "Jigsaw", *(picture(3 * n + k, "PNG") for k in (1, 2, 3)))
        for n in (0, 2)}


# ---------------------------------------------------------------------------------------------- TableVQABench
TABLES = {"vwtq": [("who won?", "Freeman"), ("which two?", r"Apple|10\p20"), ("note?", r"a\nb")],
          "vtabfact": [("the bucks win 6 games", "1"), ("all scores are above 8.8", "0")]}
TABLE_GOLDS = {"Freeman": ["Freeman"], r"Apple|10\p20": ["Apple", "10|20"], r"a\nb": ["a\nb"], "1": True,
               "0": False}


def table_item(split: str, question: str, gold: str, n: int) -> dict:
    kind, metric = ("bool", "tabfact") if split == "vtabfact" else ("values", "wtq")
    return {"question": question, "options": [], "answer": {"type": kind, "value": TABLE_GOLDS[gold]},
            "category": split,
            "metric": metric, "bytes": [picture(n, "PNG")]}


def write_tablevqa(folder: Path, split: str = "vwtq") -> tuple[Path, dict]:
    """terryoo/TableVQA-Bench: qa_id, image, question, text_markdown_table, text_html_table, gt; a split is a
    file."""
    for name, rows in TABLES.items():
        write_parquet(folder / "tables" / "data" / f"{name}-00000-of-00001.parquet",
                      [{"qa_id": f"{name}_{n}", "image": struct(picture(n, "PNG")), "question": question,
                        "text_markdown_table": "| a |", "text_html_table": "<table/>", "gt": gold}
                       for n, (question, gold) in enumerate(rows)])
    card = "".join(f"  - split: {name}\n    path: data/{name}-*\n" for name in TABLES)
    (folder / "tables"
     / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files:\n{card}---\n")
    return folder / "tables", {f"tablevqa/{split}/{split}_{n}": table_item(split, *row, n)
                               for n, row in enumerate(TABLES[split])}


def write_tablevqa_tsv(folder: Path, split: str = "vtabfact") -> tuple[Path, dict]:
    """tablevqa-bench.tsv: index, image, question, answer, split; all splits in one file."""
    rows = [(name, *row) for name in TABLES for row in TABLES[name]]
    tsv = [{"index": n, "image": text_of(picture(n, "PNG")), "question": question, "answer": gold,
            "split": name}
           for n, (name, question, gold) in enumerate(rows)]
    return write_tsv(folder / "tables.tsv", tsv), {f"tablevqa/{split}/{n}": table_item(split, question, gold,
                                                                                       n)
                                                   for n, (name, question, gold) in enumerate(rows) if name
                                                   == split}


# ----------------------------------------------------------------------------------------- sources of latents
def yes_no(question: str, gold: str, n: int) -> dict:
    return {"question": question, "options": [], "answer": {"type": "yesno", "value": gold.lower()},
            "category": "count",
            "metric": "yesno_pair", "bytes": [picture(n)]}


MME = [(f"Is there {what} in the picture? Please answer yes or no.", gold, n)
       for n in range(2) for what, gold in (("a dog", "Yes"), ("a cat", "No"))]


def write_mme(folder: Path) -> tuple[Path, dict]:
    rows = [{"question_id": f"count/{n}.jpg", "image": struct(picture(n)), "question": question,
             "answer": gold,
             "category": "count"} for question, gold, n in MME]
    return write_parquet(folder / "mme.parquet", rows), {
        f"mme/count/{n}.jpg/{gold.lower()}": yes_no(question, gold, n) for question, gold, n in MME}


def write_mme_tsv(folder: Path) -> tuple[Path, dict]:
    """MME.tsv: a picture that two rows share may stand in one of them; the other's cell is that row's index.
    """
    rows = [{"index": k, "image": (1 if k == 0 else 2) if k in (0, 3) else text_of(picture(n)),
             "question": question,
             "answer": gold, "category": "count"} for k, (question, gold, n) in enumerate(MME)]
    return write_tsv(folder / "mme.tsv", rows), {f"mme/{k}": yes_no(*parts) for k, parts in enumerate(MME)}


def ocr_expected(*answers: str) -> dict:
    return {f"ocrbench_v2/{n}": {
        "question": "What is written?", "options": [], "answer": {"type": "values", "value": list(answers)},
        "category": "text recognition en", "metric": "unscored", "bytes": [picture(n)]} for n in range(2)}


def write_ocrbench(folder: Path) -> tuple[Path, dict]:
    rows = [{"id": n, "dataset_name": "x", "question": "What is written?", "type": "text recognition en",
             "answers": ["Stop", "STOP"], "image": struct(picture(n))} for n in range(2)]
    return write_parquet(folder / "ocr.parquet", rows), ocr_expected("Stop", "STOP")


def write_ocrbench_tsv(folder: Path) -> tuple[Path, dict]:
    rows = [{"index": n, "image": text_of(picture(n)), "question": "What is written?", "answers": "['Stop']",
             "type": "text recognition en"} for n in range(2)]
    return write_tsv(folder / "ocr.tsv", rows), ocr_expected("['Stop']")
