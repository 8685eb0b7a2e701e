"""Numeric flags of all scripts, found from the parsers, so that a new flag is tried too."""
import argparse
import importlib
import math
import re

import pytest
from processes import run_here

REQUIRED = {
    "rewrite_captions": "--input i --output o --image_root r",
    "filter_data": "--input i --output o --image_root r",
    "train_sft": "--data d --output o", "evaluate": "--items i --output o --model m",
    "intervene": "--items i --output o --model m", "probe": "--items i --output o --model m",
    "probe derive": "--items i --output o --image_root r"}
NEVER = ("-1", "nan", "inf", "1e308", str(10**30), "9" * 5000, "", "one")


def is_numeric(action: argparse.Action) -> bool:
    for text in ("1", "0.5"):  # a share may not be 1
        try:
            value = action.type(text) if action.type else text
        except (argparse.ArgumentTypeError, ValueError):
            continue
        if isinstance(value, (int, float)):
            return True
    return False


def numeric_flags(name: str) -> list[argparse.Action]:
    """Return the numeric flags of a script, or of a command of it, from its own parser."""
    script, *command = name.split()
    parsers = []

    def parse_args(parser, *args):
        parsers.append(parser)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        with pytest.raises(KeyboardInterrupt):
            importlib.import_module(script).parse_args(command)
    return [action for action in parsers[0]._actions if action.option_strings and is_numeric(action)]


FLAGS = [(name, action) for name in REQUIRED for action in numeric_flags(name)]


def parse(name: str, flag: str, text: str, n: int) -> argparse.Namespace:
    script, *command = name.split()
    return importlib.import_module(script).parse_args([*command, *REQUIRED[name].split(), flag, *[text] * n])


def test_the_flags_are_found():
    found = {(name, action.dest) for name, action in FLAGS}
    assert len(found) > 70 and {("train_sft", "clip"), ("probe derive", "questions"), ("probe", "crossed"),
                                ("intervene", "margin"), ("evaluate", "judge_wait")} <= found


@pytest.mark.parametrize("name, action", FLAGS, ids=[f"{name} {action.dest}" for name, action in FLAGS])
def test_a_number_out_of_bounds_ends_with_one_line_before_anything_is_read(name, action, capsys):
    """Zero is taken where it is a seed, the default, or where the help says what it means."""
    flag, n = action.option_strings[0], action.nargs or 1
    zero = action.dest == "seed" or action.default == 0 or re.search(r"\b0\b", action.help)
    for text in NEVER if zero else (*NEVER, "0"):
        script, *command = name.split()
        assert run_here(script, [*command, *REQUIRED[name].split(), flag, *[text] * n]) == 2, text
        error = capsys.readouterr().err
        assert "Traceback" not in error and len(error) < 6000, text
        assert re.search(rf"error: .*{flag}\b.*expected .*$", error.splitlines()[-1]), error.splitlines()[-1]
    if zero:
        assert getattr(parse(name, flag, "0", n), action.dest) == 0


@pytest.mark.parametrize("name, action", FLAGS, ids=[f"{name} {action.dest}" for name, action in FLAGS])
def test_a_default_is_within_the_bounds(name, action):
    if isinstance(action.default, (int, float)):
        assert math.isfinite(action.default) and action.type(str(action.default)) == action.default
