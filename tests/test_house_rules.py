"""The rules of the house, held by reading the source.    pytest tests/test_house_rules.py"""
import ast
import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STAGES = ("rewrite_captions", "filter_data", "train_sft", "evaluate", "intervene", "probe")
SCRIPTS = [ROOT / f"{name}.py" for name in STAGES]
ROOMS = sorted((ROOT / "utils").glob("*.py"))
SOURCES = SCRIPTS + ROOMS + sorted((ROOT / "toy").glob("*.py"))
each_source = pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
each_script = pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)


def nodes(path, *kinds):
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kinds)]


def imported(path):
    names = {alias.name for node in nodes(path, ast.Import) for alias in node.names}
    return names | {node.module for node in nodes(path, ast.ImportFrom)}


@each_source
def test_no_star_import_and_no_broad_except(path):
    assert not [node for node in nodes(path, ast.ImportFrom)
                if any(alias.name == "*" for alias in node.names)]
    for handler in nodes(path, ast.ExceptHandler):
        names = [handler.type] if not isinstance(handler.type, ast.Tuple) else handler.type.elts
        assert all(isinstance(n, (ast.Name, ast.Attribute)) and ast.unparse(n) not in ("Exception",
                                                                                       "BaseException")
                   for n in names), f"{path.name}:{handler.lineno}"


@each_source
def test_the_environment_is_read_in_one_room_only(path):
    uses = [node.lineno for node in nodes(path, ast.Attribute) if ast.unparse(node) in ("os.environ",
                                                                                        "os.getenv")]
    assert not uses or path.name == "rows.py"


@each_source
def test_no_token_id_is_written_as_an_integer(path):
    numbers = [node.value for node in nodes(path, ast.Constant) if isinstance(node.value, int)]
    assert not [n for n in numbers if 151643 <= n <= 152064]


@each_source
def test_lines_and_functions_keep_their_size(path):
    assert not [n for n, line in enumerate(path.read_text().splitlines(), 1) if len(line) > 128]
    for function in nodes(path, ast.FunctionDef):
        limit = 120 if function.name in ("main", "parse_args") else 60
        assert function.end_lineno - function.lineno < limit, f"{path.name}:{function.lineno} {function.name}"


@each_source
def test_names_in_public_have_a_docstring_at_the_top(path):
    assert ast.get_docstring(ast.parse(path.read_text())), path.name


@each_script
def test_a_script_imports_no_other_script(path):
    assert not imported(path) & set(STAGES)


@each_script
def test_the_docstring_tells_command_reads_writes_and_prints(path):
    text = ast.get_docstring(ast.parse(path.read_text()))
    assert all(word in text for word in ("Reads", "Writes", "Prints", f"python {path.name}"))
    assert re.search(r"Stage \d of 6", text)


@each_script
def test_every_flag_is_read_and_no_flag_is_a_typed_bool(path):
    flags, source = set(), path.read_text()
    for call in nodes(path, ast.Call):
        if ast.unparse(call.func).endswith("add_argument"):
            flags.add(call.args[0].value.removeprefix("--"))
            keywords = {k.arg: ast.unparse(k.value) for k in call.keywords}
            assert keywords.get("type") != "bool"
            assert "help" in keywords, f"{call.args[0].value} says nothing"
    for flag in flags:
        assert re.search(rf"args\.{flag}\b", source) or f'"{flag}"' in source, f"--{flag} is never read"


@pytest.mark.parametrize("room", ["rows", "answers", "stats", "planner", "mediation", "compat", "scores",
                                  "tables", "scoring",
                                  "summary", "comparison", "main_table", "judges", "protocols", "zoom",
                                  "measures",
                                  "run_report", "backends", "similarity", "geometry", "linear_probe",
                                  "states", "figures"])
def test_light_rooms_import_no_torch(room):
    code = f"import sys; import utils.{room}; sys.exit(bool({{'torch', 'transformers', 'matplotlib'}} & {{*sys.modules}}))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_importing_a_script_does_nothing():
    """The libraries that a script imports may set variables of their own; the script and the rooms may not.
    """
    code = ("import accelerate, matplotlib, os, sys, torch, transformers; from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration; "
            f"before = dict(os.environ); import {', '.join(STAGES)}; "
            "sys.exit(before != dict(os.environ) or 'matplotlib.pyplot' in sys.modules or torch.cuda.is_initialized())")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@each_script
def test_a_script_with_utils_alone_answers_help(path, tmp_path):
    shutil.copy(path, tmp_path)
    shutil.copytree(ROOT / "utils", tmp_path / "utils", ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run([sys.executable, path.name, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "Reads" in done.stdout and "--output" in done.stdout


@each_script
def test_help_tells_every_default(path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit):
        importlib.import_module(path.stem).parse_args(["--help"])
    told = dict(re.findall(r"^  --(\w+)(.*(?:\n {4,}.*)*)",
                           capsys.readouterr().out.partition("\noptions:")[2], re.MULTILINE))
    flags = {call.args[0].value.removeprefix("--"): {k.arg: k.value for k in call.keywords}.get("default")
             # a script's own come last
             for source in (ROOT / "utils" / "stage.py", path) for call in nodes(source, ast.Call)
             if ast.unparse(call.func).endswith("add_argument")}
    assert len(told) > 20
    for name, default in flags.items():
        if name in told and isinstance(default, ast.Constant) and default.value not in (None, ""):
            assert "(default: " in told[name], f"--{name}: {told[name]}"


def test_every_script_has_a_test_file_and_every_room_is_tested():
    tests = {path.stem: path.read_text() for path in (ROOT / "tests").glob("test_*.py")}
    assert {f"test_{name}" for name in STAGES} <= set(tests)
    for room in ROOMS:
        if room.stem != "__init__":
            assert any(re.search(rf"from utils(\.{room.stem} import| import .*\b{room.stem}\b)", text)
                       for text in tests.values())
