"""Convert interleaved chains as published (Monet-SFT, Mirage), or in our own form, to our own form."""
import re
from dataclasses import dataclass, field

from utils.jsonl import DataError, call_key, check_fields
from utils.reply_text import last_boxed
from utils.rows import OWN_FIELDS, check_own

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
    """An input sample; rejected with a `reason`. `hashes`: of the images of the question, then of the steps.
    """

    row: dict
    reason: str | None = None
    detail: str = ""
    hashes: list[str] = field(default_factory=list)

    def reject(self, reason: str, detail: str = "") -> None:
        self.reason, self.detail = reason, detail


def convert(where: str, value: dict, operations: dict[str, str]) -> Sample:
    """Return a sample in our own form, rejected by Monet's rules; DataError for a wrong key or type."""
    form = next((name for name, fields in INPUTS.items() if fields.keys() <= value.keys()), None)
    if form is None:
        forms = " or ".join(f"{name} ({', '.join(fields)})" for name, fields in INPUTS.items())
        raise DataError(f"{where}: keys {', '.join(value) or 'none'} are of no known form; "
                        f"expected those of {forms}")
    check_fields(where, value, INPUTS[form])
    if form == "own":
        return convert_own(where, value)
    if form == "monet":
        return convert_monet(where, value, operations)
    return convert_mirage(where, value, operations)


def operation_of(where: str, subset: str, operations: dict[str, str]) -> str:
    """Return "zoom" or "draw" for a subset, by `operations` or its name."""
    if subset in operations:
        return operations[subset]
    if subset.startswith("Zebra_CoT_"):
        return "zoom"
    if subset.endswith(("_zoom", "_draw")):
        return subset[-4:]
    raise DataError(f"{where}: no operation is known for subset {subset!r}; give it with "
                    f"--operation {subset}=zoom or --operation {subset}=draw")


# ---- Monet-SFT
def convert_monet(where: str, value: dict, operations: dict[str, str]) -> Sample:
    """Convert a Monet-SFT sample as Monet does, without latent pairs and observation tags."""
    check_fields(where, value["metadata"], {"dataset_name": str, "sample_id": (int, str)})
    subset = value["metadata"]["dataset_name"]
    operation = operation_of(where, subset, operations)
    turns = [monet_turn(f"{where}: turn {n}", turn) for n, turn in enumerate(value["data"], 1)]
    sample = Sample({"id": f"{subset}/{value['metadata']['sample_id']}", "subset": subset, "images": [],
                     "question": "", "answer": "", "steps": []})
    if [role for role, _ in turns] != ["system", "user", "assistant"]:
        sample.reject("structure", "the turns are not system, user, assistant")
        return sample
    images, question = monet_question(turns[1][1], subset)
    steps = monet_steps(sample, turns[2][1], operation)
    sample.row |= {"images": images, "question": question, "steps": steps, "answer": final_answer(steps)}
    return sample


def monet_question(content: list[tuple[str, str]], subset: str) -> tuple[list[str], str]:
    """Return (images, question) of the user's turn; images after a text become <image> markers."""
    images = [text for kind, text in content if kind == "image"]
    images_first = all(kind == "image" for kind, _ in content[:len(images)])
    marker = "" if images_first else "<image>"
    question = "".join(text if kind == "text" else marker for kind, text in content)
    if not any(name in path for path in [subset, *images] for name in KEEPS_SUFFIX):
        question = question.replace(SUFFIX, "")
    return images, question


def monet_steps(sample: Sample, content: list[tuple[str, str]], operation: str) -> list[dict]:
    """Return the steps of the assistant's turn; reject the sample where Monet drops it."""
    steps, observed, text_before = [], False, None
    for kind, text in content:
        if kind == "image":
            if text_before is not None and LATENT_PAIR not in text_before:
                sample.reject("tag_missing", "an image follows a text without the latent pair")
            steps.append({"image": text, "operation": operation})
            text_before = None
        else:
            observed |= "<observation>" in text and any("image" in step for step in steps)
            clean = OBSERVATION.sub("", text.replace(LATENT_PAIR, "")).strip()
            steps += [{"text": clean}] if clean else []
            text_before = text
    n_pairs = sum(text.count(LATENT_PAIR) for kind, text in content if kind == "text")
    n_images = sum("image" in step for step in steps)
    if sample.reason is None and n_pairs != n_images:
        sample.reject("tag_count", f"{n_pairs} latent pairs for {n_images} images")
    elif sample.reason is None and not observed:
        sample.reject("no_observation", "no <observation> after an image")
    return steps


def monet_turn(where: str, turn: object) -> tuple[str, list[tuple[str, str]]]:
    if not isinstance(turn, dict):
        raise DataError(f"{where}: expected an object with role and content, got {str(turn)[:40]!r}")
    check_fields(where, turn, {"role": str, "content": list})
    content = []
    for n, part in enumerate(turn["content"], 1):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("text", "image"):
            raise DataError(f"{where}, item {n}: expected type \"text\" or \"image\", got {str(part)[:60]!r}")
        check_fields(f"{where}, item {n}", part, {kind: str})
        content.append((kind, part[kind]))
    return turn["role"], content


# ---- other forms
def convert_mirage(where: str, value: dict, operations: dict[str, str]) -> Sample:
    """Convert a Mirage sample: texts verbatim, one image at each <output_image>; the id is of its content."""
    paths = {}
    for name in ("image_input", "image_output"):
        paths[name] = [value[name]] if isinstance(value[name], str) else value[name]
        if not all(isinstance(path, str) for path in paths[name]):
            raise DataError(f"{where}: field {name!r} should be a path or a list of paths, "
                            f"got {str(value[name])[:60]!r}")
    texts, images, steps = value["text_output"].split("<output_image>"), paths["image_output"], []
    name = call_key(**{field: value[field] for field in INPUTS["mirage"]})[:12]
    sample = Sample({"id": f"mirage/{name}", "subset": "Mirage", "images": paths["image_input"],
                     "question": value["text_input"], "answer": "", "steps": steps})
    if len(texts) - 1 != len(images):
        sample.reject("tag_count", f"{len(texts) - 1} <output_image> for {len(images)} images")
        return sample
    operation = operation_of(where, "Mirage", operations)
    for n, text in enumerate(texts):
        steps += [{"text": text}] if text.strip() else []
        steps += [{"image": path, "operation": operation} for path in images[n:n + 1]]
    sample.row["answer"] = final_answer(steps)
    return sample


def convert_own(where: str, value: dict) -> Sample:
    """Take a row of our own form without its captions and chain."""
    check_own(where, value)
    steps = [{name: step[name] for name in ("text", "image", "operation") if name in step}
             for step in value["steps"]]
    return Sample({name: value[name] for name in OWN_FIELDS} | {"steps": steps})


def final_answer(steps: list[dict]) -> str:
    texts = [step["text"] for step in steps if "text" in step]
    return (last_boxed(texts[-1]) or "") if texts else ""
