"""Our reader of multiple-choice replies next to the extraction code of VLMEvalKit and lmms-eval.

    python speed/readers.py --replies choice.jsonl --vlmevalkit VLMEvalKit --lmms_eval lmms-eval \
      --output results/readers.json

Reads   rows {"output", "options", "expected", "finish_reason"}, where "expected" lists the letters that a
        careful reader takes from the reply, "-" for none; git checkouts of the two harnesses, whose own
        functions are called, with a stub for what they import to log. lmms-eval takes thoughts off first, as
        its flag --reasoning_tags does by default
Writes  --output: how many replies each reader reads as expected, leaves open or gives another letter
Prints  the same object
"""
import argparse
import importlib.util
import json
import logging
import subprocess
import sys
from pathlib import Path
from types import ModuleType

sys.path.insert(0, str(Path(__file__).parents[1]))

from utils.answers import extract_choice  # noqa: E402
from utils.display import table_lines  # noqa: E402
from utils.jsonl import read_rows, sha256_file, write_json  # noqa: E402

PEERS = {  # name: (flag, file, function)
    "VLMEvalKit, V*, HR-Bench, BLINK": ("vlmevalkit", "vlmeval/utils/matching_util.py", "can_infer"),
    "lmms-eval, MMStar, MMBench, RealWorldQA": (
        "lmms_eval", "lmms_eval/tasks/_task_utils/mcq_extract.py", "extract_mcq_answer"),
    "lmms-eval, V*": ("lmms_eval", "lmms_eval/tasks/vstar_bench/utils.py", "extract_answer_letter")}
THOUGHTS = "lmms_eval/api/reasoning.py", "strip_reasoning_tags"
TAGS = [["<think>", "</think>"], ["<analysis>", "</analysis>"]]  # lmms-eval's default


def stub_loggers() -> None:
    """Put modules in place of those that the peers import for their logs."""
    stubs = (("loguru", "logger", logging.getLogger("peer")), ("vlmeval", "", None),
             ("vlmeval.smp", "", None), ("vlmeval.smp.log", "get_logger", logging.getLogger))
    for name, attribute, value in stubs:
        module = ModuleType(name)
        setattr(module, attribute, value)
        sys.modules[name] = module


def load_function(path: Path, name: str):
    spec = importlib.util.spec_from_file_location(f"peer_{path.stem}_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def count(read: list[str | None], rows: list[dict]) -> dict:
    """Return how many replies were read as expected, left open and given a letter that is not expected."""
    pairs = [(letter if letter in row["options"] else "-", row["expected"])
             for letter, row in zip(read, rows)]
    right = sum(letter in expected for letter, expected in pairs)
    unresolved = sum(letter == "-" and letter not in expected for letter, expected in pairs)
    return {"right": right, "wrong_letter": len(pairs) - right - unresolved, "unresolved": unresolved}


def table(result: dict) -> str:
    """Return the table of docs/evaluation.md."""
    rows = []
    for name, row in result["readers"].items():
        commit = f", `{row['function']}` at {row['commit'][:7]}" if "commit" in row else ""
        rows.append([name + commit, *(str(row[key]) for key in ("right", "wrong_letter", "unresolved"))])
    header = [f"of {result['n']} replies", "as a careful reader", "another letter", "left open"]
    return "\n".join(table_lines(header, rows))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for flag in ("replies", "vlmevalkit", "lmms_eval", "output"):
        parser.add_argument(f"--{flag}", type=Path, required=True)
    args = parser.parse_args(argv)
    rows = read_rows(args.replies, {"output": str, "options": dict, "expected": list})
    stub_loggers()
    readers = {"ours": count([extract_choice(row["output"], row["options"], row.get("finish_reason")).letter
                              for row in rows], rows)}
    strip = load_function(args.lmms_eval / THOUGHTS[0], THOUGHTS[1])
    for name, (flag, file, function) in PEERS.items():
        checkout = getattr(args, flag)
        read = load_function(checkout / file, function)
        commit = subprocess.run(["git", "-C", checkout, "rev-parse", "HEAD"], capture_output=True, text=True,
                                check=True).stdout.strip()
        texts = [row["output"] if flag == "vlmevalkit" else strip(row["output"], TAGS) for row in rows]
        further = {"can_infer": lambda row: [dict(row["options"])], "extract_answer_letter": lambda row: [],
                   "extract_mcq_answer": lambda row: [list(row["options"])]}[function]
        readers[name] = {"function": function, "commit": commit} | count(
            [read(text, *further(row)) for text, row in zip(texts, rows)], rows)
    result = {"n": len(rows), "sha256": sha256_file(args.replies), "readers": readers}
    write_json(args.output, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
