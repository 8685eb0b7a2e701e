"""SIGKILL at random moments changes nothing, in any script.

    python -m pytest tests/test_kills.py            # a few kills of each
    python -m pytest tests/test_kills.py -m slow    # 25 kills of each, three trials
"""
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = {"rewrite_captions", "filter_data", "train_sft", "evaluate", "intervene", "probe"}


def kill(tmp_path, n: int, seed: int) -> None:
    done = subprocess.run([sys.executable, str(ROOT / "tests" / "kills.py"), "--kills", str(n), "--seed",
                           str(seed), "--folder",
                           str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    results = json.loads(done.stdout)
    assert {name.split()[0] for name in results} == SCRIPTS
    for name, its in results.items():
        assert its["kills"] >= 0.8 * n and its["records"] > 0 and its["files"] > 1, name
        assert (its["lost"], its["doubled"], its["identical"]) == (0, 0, True), name
        assert 0 <= its.get("calls_made_again", 0) <= 8 * its["kills"], name  # 8 are under way


def test_a_few_kills(tmp_path):
    kill(tmp_path, 1, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_25_kills(tmp_path, seed):
    kill(tmp_path, 25, seed)
