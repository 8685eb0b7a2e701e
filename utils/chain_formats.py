"""Convert rows in published forms to our own: interleaved chains (Monet-SFT, Mirage), conversations.

Keys show the form. A last reply without images becomes the row's "chain" as it is; one with
images becomes "steps", of which stage 1 makes a chain. Earlier turns become "history".
"""
import re
from collections import Counter
from collections.abc import Iterable, Iterator

from utils.jsonl import DataError, call_key, check_fields, check_unique, located_rows
from utils.reply_text import last_boxed
from utils.rows import OWN_FIELDS, check_own

INPUTS = {"monet": {"metadata": dict, "data": list},
          "mirage": {"text_input": str, "image_input": (str, list), "text_output": str,
                     "image_output": (str, list)},
          "conversations": {"conversations": list}, "messages": {"messages": list},
          "own": {"id": str, "images": list, "question": str}}
SOURCE_REASONS = ("structure", "tag_missing", "tag_count", "no_observation")  # why a row is not converted
ROLES = dict(system="s", developer="s", human="u", user="u", gpt="a", model="a", assistant="a")
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")  # a drive has one letter
# Monet-SFT's markup and rules: NOVAglow646/Monet src/task.py
LATENT_PAIR = "<abs_vis_token></abs_vis_token>"
OBSERVATION = re.compile(r"</?observation>")
SUFFIX = "\nPut your final answer within \\boxed{}."
KEEPS_SUFFIX = ("Zebra_CoT_visual_search", "Zebra_CoT_count")
Content = list[tuple[str, str]]  # of a turn: ("text", text) or ("image", path)
Fault = tuple[str, str]  # one of SOURCE_REASONS, and a detail


def read_chains(paths: Iterable[str], limit: int | None = None,
                hint: str | None = None) -> Iterator[tuple[int, str, dict, Fault | None]]:
    """Yield (number of the file, where, row, fault) of all files, at most `limit` rows of each; DataError for
    a repeated id. Sets that have no ids, or one for all questions about a picture, get a number at the second
    and later ones."""
    seen, copies = {}, Counter()
    for number, path in enumerate(paths):
        for where, value in located_rows(path, limit, hint):
            row, fault = convert(where, value := without_nulls(value))
            name = row["id"]
            while row["id"] in seen and value.keys() & {"text_input", "conversations", "messages"}:
                copies[name] += 1
                row["id"] = f"{name}-{copies[name] + 1}"
            check_unique(where, row["id"], seen)
            yield number, where, row, fault


def without_nulls(value: object) -> object:
    """Return JSON without keys that hold null: a table's export gives every object every key."""
    if isinstance(value, dict):
        return {name: without_nulls(part) for name, part in value.items() if part is not None}
    return [without_nulls(part) for part in value] if isinstance(value, list) else value


def convert(where: str, value: dict) -> tuple[dict, Fault | None]:
    """Return a row in our own form, steps still without operation and caption, and its fault, if any: odd
    turns, or what Monet drops. DataError for a wrong key or type."""
    form = next((name for name, fields in INPUTS.items() if fields.keys() <= value.keys()), None)
    if form is None:
        forms = " or ".join(f"{name} ({', '.join(fields)})" for name, fields in INPUTS.items())
        raise DataError(f"{where}: keys {', '.join(value) or 'none'} are of no known form; "
                        f"expected those of {forms}")
    check_fields(where, value, INPUTS[form])
    if form == "own":
        return convert_own(where, value), None
    if form == "monet":
        check_fields(where, value["metadata"], {"dataset_name": str, "sample_id": (int, str)})
        subset, turns, paths = value["metadata"]["dataset_name"], value["data"], []
        name = f"{subset}/{value['metadata']['sample_id']}"
    elif form == "mirage":
        subset, turns, paths = "Mirage", [], []
        name = "mirage/" + call_key(**{field: value[field] for field in INPUTS["mirage"]})[:12]
    else:
        subset, turns, name = str(value.get("subset") or form), value[form], value.get("id")
        paths = value.get("images") or value.get("image") or []
        if type(name) not in (str, int) or name == "":
            name = f"{form}/{call_key(content=str((turns, paths)))[:12]}"
    row = {"id": str(name), "subset": subset, "images": [], "question": "", "answer": "", "steps": []}
    try:
        if form == "mirage":
            turns, paths = mirage_turns(value)
        paths = paths if isinstance(paths, list) else [paths]
        system, contents = read_turns(turns, [path_of({"image": path}) for path in paths])
        system = system or join(read_content("system", value.get("system", ""), []))
    except DataError as error:
        return row, ("structure", str(error))
    return fill_row(row, value, system, contents, form == "monet")


def fill_row(row: dict, value: dict, system: str, contents: list[Content],
             monet: bool) -> tuple[dict, Fault | None]:
    reply = contents[-1]
    row["images"] = [text for content in contents[::2] for kind, text in content if kind == "image"]
    row["question"] = join(contents[-2])
    if monet:
        if fault := monet_fault(reply):
            return row, fault
        reply = [(kind, OBSERVATION.sub("", text.replace(LATENT_PAIR, ""))) for kind, text in reply]
        if not any(name in path for path in [row["subset"], *row["images"]] for name in KEEPS_SUFFIX):
            row["question"] = row["question"].replace(SUFFIX, "")
    elif system:
        row["system"] = system
    if any(kind == "image" for kind, _ in reply):
        row["steps"] = [{kind: text.strip()} for kind, text in reply if text.strip()]
    else:
        row["chain"] = join(reply)
    if len(contents) > 2:
        row["history"] = [[join(asked), join(said)] for asked, said in zip(contents[:-2:2], contents[1:-2:2])]
    else:  # images that come first need no marks
        row["question"] = row["question"].removeprefix("<image>" * len(row["images"]))
    answer = value.get("answer")  # True may say that it is right
    row["answer"] = (str(answer) if type(answer) in (str, int, float) else "").strip() or final_answer(row)
    return row, None


# ---- turns
def read_turns(turns: list, paths: list[str]) -> tuple[str, list[Content]]:
    """Return (system prompt or "", contents of the user's turns and of the replies to them). Each <image>
    mark takes the next of `paths`; without a mark all come first. DataError for anything else."""
    if odd := [turn for turn in turns if not isinstance(turn, dict)]:
        raise DataError(f"turn {str(odd[0])[:40]!r}, expected an object with role and content")
    names, left = [str(turn.get("role", turn.get("from"))) for turn in turns], list(paths)
    if not re.fullmatch("s?(?:ua)+", "".join(ROLES.get(name.lower(), "?") for name in names)):
        raise DataError(f"turns of {', '.join(names)[:60] or 'nobody'}; expected those of user (human) and "
                        "assistant (gpt) by turns, after a system turn if any")
    contents = [read_content(f"turn {n}", turn.get("content", turn.get("value")), left)
                for n, turn in enumerate(turns, 1)]
    system = contents.pop(0) if len(contents) % 2 else []
    used = [text for content in contents for kind, text in content if kind == "image"]
    if left and used and used != paths:
        raise DataError(f"{len(paths)} images for {len(used)} <image> marks or image parts")
    if not used:
        contents[0] = [("image", check_path(path)) for path in left] + contents[0]
    if any(kind == "image" for content in [system, *contents[1:-1:2]] for kind, _ in content):
        raise DataError("an image in a reply before the last or in the system turn; expected none there")
    return join(system), contents


def read_content(where: str, content: object, left: list[str]) -> Content:
    """Return a turn's parts; marks and image parts without a path take from the paths that are `left`."""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list):
        raise DataError(f"{where}: content {str(content)[:40]!r}, expected a text or a list of parts")
    own, n_marks = list(filter(None, map(path_of, parts))), str(parts).count("<image>")
    if own and len(own) == n_marks:  # the marks place the parts' images
        left[:0], parts = own, [part for part in parts if path_of(part) is None]
    found = []
    for n, part in enumerate(parts, 1):
        fields = part if isinstance(part, dict) else {}
        kind = fields.get("type", next(iter(fields), None))
        if kind == "text" and isinstance(fields.get("text"), str):
            first, *others = fields["text"].split("<image>")
            found.append(("text", first))
            for text in others:
                found += [("image", check_path(left.pop(0) if left else None)), ("text", text)]
        elif kind in ("image", "image_url"):
            found.append(("image", check_path(path_of(part) or (left.pop(0) if left else None))))
        else:
            raise DataError(f"{where}, item {n}: expected a text, image or image_url, got {str(part)[:60]!r}")
    return [(kind, text) for kind, text in found if text]


def path_of(part: object) -> object:
    """Return what an image part holds, also in an object such as {"url"} or {"bytes", "path"}, or None."""
    fields = part if isinstance(part, dict) else {}
    path = next((fields[name] for name in ("image", "image_url", "path", "url") if name in fields), None)
    return path_of(path) if isinstance(path, dict) else path


def check_path(path: object) -> str:
    if not isinstance(path, str) or not path or URL.match(path):
        raise DataError(f"image {str(path)[:40]!r}, expected a file under --image_root for each <image> mark "
                        "or image part, no URL and no data")
    return path


def join(content: Content) -> str:
    return "".join(text if kind == "text" else "<image>" for kind, text in content)


# ---- Monet, Mirage, our own form
def monet_fault(reply: Content) -> Fault | None:
    """Return why Monet drops a sample with this reply, or None."""
    n_images, observed, before = 0, False, LATENT_PAIR
    for kind, text in reply:
        if kind == "image" and LATENT_PAIR not in before:
            return "tag_missing", "an image follows a text without the latent pair"
        n_images += kind == "image"
        observed |= kind == "text" and n_images > 0 and "<observation>" in text
        before = text if kind == "text" else LATENT_PAIR
    n_pairs = join(reply).count(LATENT_PAIR)
    if n_pairs != n_images:
        return "tag_count", f"{n_pairs} latent pairs for {n_images} images"
    return ("no_observation", "no <observation> after an image") if n_images and not observed else None


def mirage_turns(value: dict) -> tuple[list[dict], list[str]]:
    """Return a Mirage sample as turns and the images of their <image> marks."""
    asked, replied = value["text_input"], value["text_output"].replace("<output_image>", "<image>")
    given, drawn = ([value[name]] if isinstance(value[name], str) else value[name]
                    for name in ("image_input", "image_output"))
    if "<image>" not in asked:
        asked = "<image>" * len(given) + asked
    if (asked.count("<image>"), replied.count("<image>")) != (len(given), len(drawn)):
        raise DataError(f"{asked.count('<image>')} <image> and {replied.count('<image>')} <output_image> "
                        f"marks for {len(given)} and {len(drawn)} images")
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": replied}], given + drawn


def convert_own(where: str, value: dict) -> dict:
    """Return a row of our own form, which may hold steps, a finished chain, or both."""
    row = {"id": "", "subset": "own", "images": [], "question": "", "answer": "", "steps": []}
    row |= {name: value[name] for name in (*OWN_FIELDS, "chain", "system") if name in value}
    check_fields(where, row, OWN_FIELDS | {name: str for name in row.keys() - OWN_FIELDS.keys()})
    check_own(where, row)
    return row if "answer" in value else row | {"answer": final_answer(row)}


def final_answer(row: dict) -> str:
    """Return what the last box of the chain holds, or that of the last text of the steps, or ""."""
    texts = [step["text"] for step in row["steps"] if "text" in step]
    return last_boxed(row.get("chain", "".join(texts[-1:]))) or ""
