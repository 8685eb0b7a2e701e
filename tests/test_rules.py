"""The rules of this repository, checked by reading the source and by starting the scripts."""
import ast
import functools
import graphlib
import importlib
import json
import re
import subprocess
import symtable
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from samples import METRICS, result, row

from utils.jsonl import write_json, write_rows

ROOT = Path(__file__).parents[1]
SCRIPTS = ("rewrite_captions", "filter_data", "train_sft", "evaluate", "intervene", "probe")
STAGE_OF = {"train_sft": "train", "evaluate": "evaluate", "intervene": "intervene", "probe": "probe"}
STAGES = tuple(STAGE_OF.values())


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


PATTERNS = ("*.py", "utils/**/*.py", "toy/*.py", "speed/*.py", "tests/**/*.py")
FILES = {module_name(path): path for pattern in PATTERNS for path in sorted(ROOT.glob(pattern))
         if path.name != "__init__.py"}
CORE = [name for name in FILES if name.startswith("utils.") and name.count(".") == 1]
STAGE_MODULES = [name for name in FILES if name.startswith("utils.") and name.count(".") == 2]
MODULES = CORE + STAGE_MODULES
SOURCES = [*SCRIPTS, *MODULES, *(name for name in FILES if name.startswith("toy."))]
DOCUMENTS = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
TESTS = [name for name in FILES if name.startswith("tests.")]
each_source = pytest.mark.parametrize("name", SOURCES)
each_module = pytest.mark.parametrize("name", [*SCRIPTS, *MODULES])
each_script = pytest.mark.parametrize("script", SCRIPTS)


@functools.cache
def text_of(name: str) -> str:
    return FILES[name].read_text(encoding="utf-8")


@functools.cache
def tree_of(name: str) -> ast.Module:
    return ast.parse(text_of(name))


def nodes(name: str, *kinds: type) -> list:
    return [node for node in ast.walk(tree_of(name)) if isinstance(node, kinds)]


def length(name: str) -> int:
    return len(text_of(name).splitlines())


@functools.cache
def imports_of(name: str) -> dict[str, set[str]]:
    """Return {module of this repository: names taken from it, "*" for itself}, lazy imports included."""
    taken = defaultdict(set)
    for node in nodes(name, ast.Import):
        for alias in node.names:
            taken[alias.name].add("*")
    for node in nodes(name, ast.ImportFrom):
        for alias in node.names:
            whole = f"{node.module}.{alias.name}"
            taken[whole if whole in FILES else node.module].add("*" if whole in FILES else alias.name)
    return {module: names for module, names in taken.items() if module in FILES}


def stage_of(name: str) -> str:
    """Return the stage that a script or a module of a stage folder belongs to, "core" or the top folder."""
    parts = name.split(".")
    if parts[0] == "utils":
        return parts[1] if len(parts) == 3 else "core"
    return STAGE_OF.get(name, parts[0])


# ---- imports
@each_module
def test_scripts_and_stage_folders_are_private(name):
    taken = imports_of(name)
    assert not set(taken) & (set(SCRIPTS) | {"toy", "speed", "tests"}), name
    for module in taken:
        assert stage_of(module) in ("core", stage_of(name)), f"{name} imports {module}"


def is_small(module: str, name: str) -> bool:
    """Return whether a name of a module is a constant or a function of at most five lines."""
    for node in tree_of(module).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == name:
            return isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno < 6
    return name != "*"


@pytest.mark.parametrize("module", CORE)
def test_a_core_module_serves_two_stages_or_the_core(module):
    """A constant or a short function does not count. Stages 1 and 2 have no folder: the core has theirs."""
    users = set()
    for name in [*SCRIPTS, *MODULES]:
        taken = imports_of(name).get(module, set())
        if len(taken) > 1 or any(not is_small(module, one) for one in taken):
            users.add(stage_of(name))
    assert len(users) > 1 or not users <= set(STAGES), f"{module} is used by {sorted(users)} only"


def test_no_import_cycle():
    graphlib.TopologicalSorter({name: imports_of(name) for name in SOURCES}).prepare()  # the error names it


def test_top_level_names_of_the_core_are_unique():
    counts = Counter(symbol.get_name() for module in CORE
                     for symbol in symtable.symtable(text_of(module), module, "exec").get_symbols()
                     if symbol.is_assigned() and not symbol.is_imported())
    assert not [name for name, n in counts.items() if n > 1]


@each_source
def test_no_star_import_no_broad_except_and_no_global(name):
    assert not [node.lineno for node in nodes(name, ast.ImportFrom) if node.names[0].name == "*"]
    for handler in nodes(name, ast.ExceptHandler):
        types = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
        assert all(isinstance(one, (ast.Name, ast.Attribute)) for one in types), f"{name}:{handler.lineno}"
        assert not {"Exception", "BaseException"} & set(map(ast.unparse, types)), f"{name}:{handler.lineno}"
    assert not nodes(name, ast.Global)


@each_source
def test_no_token_id_figure_code_unsafe_loading_or_other_place_for_the_environment(name):
    numbers = [node.value for node in nodes(name, ast.Constant) if isinstance(node.value, int)]
    assert not [number for number in numbers if 151643 <= number <= 152064]
    unsafe = (r"trust_remote_code|\bimport pickle\b|\bpickle\.[a-z]|torch\.load\b|(?<![\w.])eval\("
              r"|weights_only|allow_pickle|\bF([1-9]|10)\b")
    assert not re.search(unsafe, text_of(name))
    read = {ast.unparse(node) for node in nodes(name, ast.Attribute)} & {"os.environ", "os.getenv"}
    assert not read or name == "utils.cli"


@each_source
def test_a_library_s_forward_is_replaced_only_inside_a_context_manager(name):
    safe = {id(node) for function in nodes(name, ast.FunctionDef)
            if any("contextmanager" in ast.unparse(decorator) for decorator in function.decorator_list)
            for node in ast.walk(function)}
    for node in nodes(name, ast.Attribute):
        stored = node.attr == "forward" and isinstance(node.ctx, ast.Store)
        assert not stored or id(node) in safe, f"{name}:{node.lineno}"
    assert not re.search(r"""setattr\([^)]*["']forward["']""", text_of(name))


# ---- sizes
def test_every_file_can_be_compiled():
    for name in FILES:
        compile(text_of(name), str(FILES[name]), "exec")


def test_lines_are_at_most_110_columns():
    assert not [f"{name}:{n}" for name in FILES for n, line in enumerate(text_of(name).splitlines(), 1)
                if len(line) > 110]


@each_source
def test_functions_are_short(name):
    for function in nodes(name, ast.FunctionDef):
        limit = 120 if function.name in ("main", "parse_args") else 60
        assert function.end_lineno - function.lineno < limit, f"{name}:{function.lineno} {function.name}"


@each_module
def test_files_are_neither_long_nor_tiny(name):
    low, high = (200, 420) if name in SCRIPTS else (60, 300)
    assert low <= length(name) <= high


def test_the_parts_keep_their_size():
    assert len(MODULES) <= 60
    assert sum(map(length, CORE)) <= 4800
    for stage in STAGES:
        assert sum(length(name) for name in STAGE_MODULES if stage_of(name) == stage) <= 3000, stage


# ---- documentation
@each_source
def test_a_file_says_what_it_is_for(name):
    text = ast.get_docstring(tree_of(name))
    assert text
    if name in SCRIPTS:
        assert all(word in text for word in ("Reads", "Writes", "Prints", f"python {name}.py"))
        assert re.search(r"Stage \d of 6", text)


# files of other projects that constants or rules come from, and files that our scripts write
FOREIGN = re.compile(r"vlmeval/|lmms_eval/|eval/|RL/|inference/|evaluation/|src/|vstar_bench_eval\.py"
                     r"|visual_search\.py|vqa_eval\.py|image_\w+\.py|tokenization_qwen2\.py|modeling_\w+\.py"
                     r"|vision_process\.py|^/?utils\.py|(report|table)\.md")
ALL_NAMES = {path.name for path in [*FILES.values(), *DOCUMENTS, *ROOT.glob("*/*.sh"), *ROOT.glob("*.sh")]}


@pytest.mark.parametrize("name", [*FILES, *(path.relative_to(ROOT).as_posix() for path in DOCUMENTS)])
def test_every_file_named_is_in_the_repository(name):
    path = FILES.get(name, ROOT / name)
    for word in re.findall(r"(?<![\w./*<{-])[\w./-]+\.(?:md|py|sh)\b", path.read_text(encoding="utf-8")):
        if stage_of(name) == "tests" and "/" not in word:
            continue  # a test names files of its own
        here = (ROOT / word).exists() or (path.parent / word).exists()
        assert here or word in ALL_NAMES or FOREIGN.search(word), f"{name} names {word}"
    if path.suffix == ".md":
        for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", path.read_text(encoding="utf-8")):
            assert (path.parent / link).exists(), f"{name} links to {link}"


def flags_of(name: str) -> dict[str, dict[str, ast.expr]]:
    """Return {flag: keywords} of the add_argument calls in a file; positional arguments are left out."""
    return {call.args[0].value: {keyword.arg: keyword.value for keyword in call.keywords}
            for call in nodes(name, ast.Call) if ast.unparse(call.func) in ("add", "parser.add_argument")
            and call.args[0].value.startswith("--")}


FLAGS = sorted({flag for name in [*SCRIPTS, *MODULES] for flag in flags_of(name)})


@pytest.mark.parametrize("flag", FLAGS)
def test_a_flag_is_documented_tested_and_read(flag):
    word = re.compile(rf"{flag}(?![\w-])")
    documented = any(word.search(path.read_text(encoding="utf-8")) for path in DOCUMENTS)
    assert documented, f"{flag} is in neither README.md nor docs/"
    assert any(word.search(text_of(name)) for name in TESTS), f"no test: {flag}"
    read = re.compile(rf"args\.{flag[2:]}\b|[\"']{flag[2:]}[\"']")
    assert any(read.search(text_of(name)) for name in [*SCRIPTS, *MODULES]), f"{flag} is never read"


@each_module
def test_a_flag_has_a_help_text_and_no_flag_is_a_typed_bool(name):
    for flag, keywords in flags_of(name).items():
        assert "help" in keywords, flag
        assert "type" not in keywords or ast.unparse(keywords["type"]) != "bool", flag


@each_script
def test_help_names_every_default(script, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit):
        importlib.import_module(script).parse_args(["--help"])
    listed = capsys.readouterr().out.partition("\noptions:")[2]
    shown = dict(re.findall(r"^  (--\w+)(.*(?:\n {4,}.*)*)", listed, re.MULTILINE))
    assert len(shown) > 15
    flags = flags_of("utils.call_flags") | flags_of("utils.cli") | flags_of(script)
    for flag, keywords in flags.items():
        default = keywords.get("default")
        if flag in shown and isinstance(default, ast.Constant) and default.value not in (None, ""):
            assert "(default: " in shown[flag], f"{flag}: {shown[flag]}"


# ---- tests
@each_module
def test_tests_mirror_the_tree(name):
    if name in SCRIPTS:
        assert f"tests.test_{name}" in FILES
        return
    folder, module = stage_of(name), name.rpartition(".")[2]
    script = next((script for script, stage in STAGE_OF.items() if stage == folder), r"\w+")
    tests = [test for test in FILES if re.fullmatch(rf"tests\.({folder}\.test_\w+|test_{script})", test)]
    assert f"tests.{folder}.test_{module}" in tests or any(name in imports_of(test) for test in tests)


def test_no_test_file_imports_another():
    for name in TESTS:
        assert not re.search(r"^\s*(from|import) (\w+\.)*test_", text_of(name), re.MULTILINE), name


# ---- start-up
LIBRARIES = ("torch", "transformers", "accelerate", "datasets", "matplotlib")
WATCHED = """
import atexit, json, runpy, sys
loaded = lambda: sorted(set({libraries}) & set(sys.modules))
atexit.register(lambda: print(json.dumps(loaded()), file=sys.stderr))
sys.argv = {argv}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def start(script: str, *flags: object) -> tuple[int, list[str], str]:
    """Run a script in a new process; return its exit code, the LIBRARIES it imported and its stderr."""
    code = WATCHED.format(libraries=LIBRARIES, argv=[f"{script}.py", *map(str, flags)])
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    return done.returncode, json.loads(done.stderr.splitlines()[-1]), done.stderr


@each_script
def test_help_and_wrong_flags_import_no_library(script):
    for flags, code in ((["--help"], 0), (["--no_such_flag"], 2)):
        assert start(script, *flags)[:2] == (code, [])


@pytest.fixture
def files(tmp_path, picture):
    """Make rows of our form with their pictures, and two result files with their metrics, in a new folder."""
    picture("a.png"), picture("b.png")
    write_rows(tmp_path / "rows.jsonl", [row()])
    for name in ("one.jsonl", "two.jsonl"):
        write_rows(tmp_path / name, [result("i/0"), result("i/1")])
        write_json(tmp_path / f"{name}.metrics.json", METRICS)
    write_json(tmp_path / "run" / "sft.jsonl.metrics.json", {"read": 2, "kept": 1})
    return tmp_path


ROWS = "--input {0}/rows.jsonl --image_root {0} --output {0}/out.jsonl"
LIGHT = [f"rewrite_captions {ROWS} --dry_run", f"filter_data {ROWS} --dry_run",
         f"filter_data {ROWS} --rules_only",
         "evaluate --compare {0}/one.jsonl {0}/two.jsonl --output {0}/compare.json",
         "evaluate --table Ours={0}/one.jsonl --output {0}/table.md", "probe report {0}/run"]


@pytest.mark.parametrize("command", LIGHT)
def test_commands_without_a_model_import_no_model_library(files, command):
    code, imported, err = start(*command.format(files).split())
    assert code == 0, err
    assert not {"torch", "transformers"} & set(imported)


def test_importing_all_scripts_changes_nothing_beyond_what_the_libraries_set():
    code = ("import accelerate, matplotlib, os, sys, torch, transformers; "
            "from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration; "
            "before = dict(os.environ), torch.initial_seed(); "
            f"import {', '.join(SCRIPTS)}; assert before == (dict(os.environ), torch.initial_seed()); "
            "sys.exit('matplotlib.pyplot' in sys.modules or torch.cuda.is_initialized())")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
