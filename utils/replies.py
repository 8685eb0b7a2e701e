"""Prompts and replies as text: fill a template, find the JSON object in a reply, hold it against a schema."""
import json
import re
from functools import cache
from pathlib import Path

from utils.rows import DataError

DECODER = json.JSONDecoder(strict=False)  # servers let control characters pass inside strings
KINDS = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool}
MARKER = re.compile(r"<\|([^|<>\s]*)\|>|<(image)>")

def load_prompts(path: str | None, prompts: dict[str, str]) -> dict[str, str]:
    """Return `prompts` with those named in the JSON object at `path` replaced; DataError for an unknown name."""
    if path is None:
        return dict(prompts)
    try:
        changes = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        json.dumps(changes, ensure_ascii=False).encode("utf-8")  # half a surrogate pair is no character
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: no JSON object of prompts ({error})") from error
    if not isinstance(changes, dict) or not all(isinstance(text, str) for text in changes.values()):
        raise DataError(f"{path}: expected one JSON object of strings")
    if unknown := sorted(set(changes) - set(prompts)):
        raise DataError(f"{path}: no prompt is called {', '.join(unknown)}; expected {', '.join(prompts)}")
    return prompts | changes


def fill(template: str, **values: str) -> str:
    """Put values at their {names}, in one pass: braces in a value are text.

    So are markers: `<image>` becomes (image) and `<|im_end|>` (im_end), which a server's tokenizer would else take for
    a picture or the end of a turn.
    """
    return names_in_braces(tuple(values)).sub(lambda match: MARKER.sub(r"(\1\2)", values[match[1]]), template)


@cache
def names_in_braces(names: tuple[str, ...]) -> re.Pattern:
    return re.compile(rf"\{{({'|'.join(map(re.escape, names))})\}}")


def parse_json_reply(text: str) -> dict | None:
    """Return the last JSON object in a reply, whatever stands around it; None if there is none that UTF-8 can hold."""
    place, found, escapes = text.find("{"), None, "\\u" in text
    while place >= 0:
        try:
            value, end = DECODER.raw_decode(text, place)
            if escapes:  # they may stand for half a character
                json.dumps(value, ensure_ascii=False).encode("utf-8")
            found = value
        except (ValueError, RecursionError):
            end = place + 1
        place = text.find("{", end)
    return found


def schema_fault(value: object, schema: dict, where: str = "the reply") -> str | None:
    """Return in words where `value` breaks a JSON schema (object, array, string, enum, integer, boolean), or None."""
    kind = schema["type"]
    if type(value) is not KINDS[kind]:  # exact: JSON knows no subclasses, and a bool is no integer
        return f"{where} should be of type {kind}"
    if kind == "string" and "enum" not in schema and len(value) <= schema.get("maxLength", len(value)):
        return None
    if "enum" in schema and value not in schema["enum"]:
        return f"{where} should be one of {', '.join(schema['enum'])}, not {str(value)[:40]!r}"
    if kind == "string" and len(value) > schema.get("maxLength", len(value)):
        return f"{where} is too long: {len(value)} characters"
    if kind == "array":
        if len(value) > schema.get("maxItems", len(value)):
            return f"{where} has {len(value)} items, at most {schema['maxItems']} are allowed"
        for n, item in enumerate(value, 1):
            if fault := schema_fault(item, schema["items"], f"item {n} of {where}"):
                return fault
    if kind == "object":
        if missing := [name for name in schema["required"] if name not in value]:
            return f"{where} lacks {', '.join(missing)}"
        for name, part in schema["properties"].items():
            if fault := schema_fault(value[name], part, repr(name)):
                return fault
    return None


def object_schema(**properties: dict) -> dict:
    """Return the schema of an object whose properties are all required."""
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
