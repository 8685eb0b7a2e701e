"""SIGKILL at random moments changes nothing: tests/kills.py, with a kill of some scripts or 25 of each."""
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# four ways to resume: calls to a server, checkpoints, answers, decodings; test_faults.py stops every script
SOME = ["rewrite_captions openai", "train_sft", "evaluate", "intervene"]
SLOW = [pytest.param(25, seed, [], marks=pytest.mark.slow) for seed in (1, 2)]


@pytest.mark.parametrize("n, seed, cases", [(1, 0, ["--cases", *SOME]), *SLOW])
def test_kills(n, seed, cases):
    done = subprocess.run([sys.executable, str(ROOT / "tests" / "kills.py"), "--kills", str(n), "--seed",
                           str(seed), *cases], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    results = json.loads(done.stdout)
    assert len(results) == (len(SOME) if cases else 8)
    for name, its in results.items():
        assert its["kills"] >= 0.8 * n and its["records"] > 0 and its["files"] > 1, name
        assert (its["lost"], its["doubled"], its["identical"]) == (0, 0, True), name
        assert 0 <= its.get("calls_made_again", 0) <= 8 * its["kills"], name  # 8 are under way
