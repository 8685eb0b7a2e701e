"""Interleaved chains as they are published (Monet-SFT, Mirage) or in our own form, turned into rows of our
own form."""
import re
from dataclasses import dataclass, field

from utils.answers import last_boxed
from utils.jsonl import DataError, check_fields
from utils.row_rules import OWN_FIELDS, check_own

INPUTS = {"monet": {"metadata": dict, "data": list},
          "mirage": {"text_input": str, "image_input": (str, list), "text_output": str,
                     "image_output": (str, list)},
          "own": OWN_FIELDS}
# the paper's split
OPERATIONS = {"Visual_CoT": "zoom", "ReFocus": "draw", "CogCoM": "draw", "Mirage": "draw"}
SOURCE_REASONS = ("structure", "tag_missing", "tag_count", "no_observation")  # why a sample is not converted
# Monet-SFT's markup and rules: NOVAglow646/Monet src/task.py
LATENT_PAIR = "<abs_vis_token></abs_vis_token>"
OBSERVATION = re.compile(r"</?observation>")
SUFFIX = "\nPut your final answer within \\boxed{}."
KEEPS_SUFFIX = ("Zebra_CoT_visual_search", "Zebra_CoT_count")


@dataclass
class Sample:
    """One input sample on its way: `reason` is set once it is rejected; `hashes` of question images, then of
    steps."""

    row: dict
    reason: str | None = None
    detail: str = ""
    hashes: list[str] = field(default_factory=list)

    def reject(self, reason: str, detail: str = "") -> None:
        self.reason, self.detail = reason, detail


def convert(where: str, value: dict, index: int, operations: dict[str, str],
            need_observation: bool = True) -> Sample:
    """Return a sample in our own form, rejected if Monet's rules drop it; DataError for a wrong key or type.
    """
    form = next((name for name, fields in INPUTS.items() if all(key in value for key in fields)), None)
    if form is None:
        near, fields = min(INPUTS.items(), key=lambda form: len(set(form[1]) - set(value)) / len(form[1]))
        lacking = ", ".join(key for key in fields if key not in value)
        raise DataError(f"{where}: keys {', '.join(value) or 'none'} are of no known form; expected those of "
                        + " or ".join(f"{name} ({', '.join(fields)})" for name, fields in INPUTS.items())
                        + (f"; for {near} it lacks {lacking}" if len(lacking) < len(", ".join(fields))
                           else ""))
    check_fields(where, value, INPUTS[form])
    if form == "own":
        return convert_own(where, value)
    if form == "monet":
        return convert_monet(where, value, operations, need_observation)
    return convert_mirage(where, value, index, operations)


def operation_of(where: str, subset: str, operations: dict[str, str]) -> str:
    """Return "zoom" or "draw" for a subset: --operation, the paper's split, or the ending of its name."""
    if subset in operations:
        return operations[subset]
    if subset.startswith("Zebra_CoT_"):
        return "zoom"
    if subset.endswith(("_zoom", "_draw")):
        return subset[-4:]
    raise DataError(f"{where}: whether subset {subset!r} zooms or draws is not known; say it with "
                    f"--operation {subset}=zoom or --operation {subset}=draw")


def convert_monet(where: str, value: dict, operations: dict[str, str], need_observation: bool) -> Sample:
    """Convert a Monet-SFT sample by Monet's own preprocessing (latent pairs and observation tags are taken
    out)."""
    check_fields(where, value["metadata"], {"dataset_name": str, "sample_id": (int, str)})
    subset = value["metadata"]["dataset_name"]
    operation = operation_of(where, subset, operations)
    turns = [monet_turn(f"{where}: turn {n}", turn) for n, turn in enumerate(value["data"], 1)]
    sample = Sample({"id": f"{subset}/{value['metadata']['sample_id']}", "subset": subset, "images": [],
                     "question": "",
                     "answer": "", "steps": []})
    if [role for role, _ in turns] != ["system", "user", "assistant"]:
        sample.reject("structure", "the turns are not system, user, assistant")
        return sample
    user, assistant = turns[1][1], turns[2][1]
    images = [text for kind, text in user if kind == "image"]
    in_front = [kind for kind, _ in user[:len(images)]].count("image") == len(images)
    question = "".join(text if kind == "text" else "" if in_front else "<image>" for kind, text in user)
    if not any(name in path for path in [subset, *images] for name in KEEPS_SUFFIX):
        question = question.replace(SUFFIX, "")
    steps, seen_image, observed, before = [], False, False, None
    for kind, text in assistant:
        if kind == "image":
            if before is not None and LATENT_PAIR not in before:
                sample.reject("tag_missing", "an image follows a text without the latent pair")
            steps.append({"image": text, "operation": operation})
            seen_image, before = True, None
        else:
            observed |= seen_image and "<observation>" in text
            clean = OBSERVATION.sub("", text.replace(LATENT_PAIR, "")).strip()
            steps += [{"text": clean}] if clean else []
            before = text
    n_pairs = sum(text.count(LATENT_PAIR) for kind, text in assistant if kind == "text")
    if sample.reason is None and n_pairs != sum("image" in step for step in steps):
        sample.reject("tag_count",
                      f"{n_pairs} latent pairs for {sum('image' in step for step in steps)} images")
    elif sample.reason is None and need_observation and not observed:
        sample.reject("no_observation", "no <observation> after an image")
    sample.row |= {"images": images, "question": question, "steps": steps, "answer": final_answer(steps)}
    return sample


def monet_turn(where: str, turn: object) -> tuple[str, list[tuple[str, str]]]:
    """Return (role, [(kind, text or path)]) of one turn, checked."""
    if not isinstance(turn, dict):
        raise DataError(f"{where}: expected an object with role and content, got {str(turn)[:40]!r}")
    check_fields(where, turn, {"role": str, "content": list})
    content = []
    for n, part in enumerate(turn["content"], 1):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("text", "image"):
            raise DataError(f"{where}, item {n}: expected type \"text\" or \"image\", got {str(part)[:60]!r}")
        if not isinstance(part.get(kind), str):
            check_fields(f"{where}, item {n}", part, {kind: str})
        content.append((kind, part[kind]))
    return turn["role"], content


def convert_mirage(where: str, value: dict, index: int, operations: dict[str, str]) -> Sample:
    """Convert a Mirage sample: texts verbatim, one image at each <output_image>."""
    paths = {}
    for name in ("image_input", "image_output"):
        paths[name] = [value[name]] if isinstance(value[name], str) else value[name]
        if not all(isinstance(path, str) for path in paths[name]):
            raise DataError(f"{where}: field {name!r} should be a path or a list of paths, "
                            f"got {str(value[name])[:60]!r}")
    texts = value["text_output"].split("<output_image>")
    sample = Sample({"id": f"mirage/{index}", "subset": "Mirage", "images": paths["image_input"],
                     "question": value["text_input"], "answer": "", "steps": []})
    if len(texts) - 1 != len(paths["image_output"]):
        sample.reject("tag_count", f"{len(texts) - 1} <output_image> for {len(paths['image_output'])} images")
        return sample
    operation = operation_of(where, "Mirage", operations)
    for n, text in enumerate(texts):
        sample.row["steps"] += [{"text": text}] if text.strip() else []
        sample.row["steps"] += [{"image": path, "operation": operation}
                                for path in paths["image_output"][n:n + 1]]
    sample.row["answer"] = final_answer(sample.row["steps"])
    return sample


def convert_own(where: str, value: dict) -> Sample:
    """Take a row of our own form; captions that it may have are written anew."""
    check_own(where, value)
    steps = [{name: step[name] for name in ("text", "image", "operation") if name in step}
             for step in value["steps"]]
    return Sample({name: value[name] for name in OWN_FIELDS} | {"steps": steps})


def final_answer(steps: list[dict]) -> str:
    """Return what the last text step boxes, or ""."""
    texts = [step["text"] for step in steps if "text" in step]
    return (last_boxed(texts[-1]) or "") if texts else ""
