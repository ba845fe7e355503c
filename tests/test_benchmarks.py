"""The comparison of training steps runs and says what it promises, with whatever peers are installed."""

import json
import os
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).resolve().parent.parent / "benchmarks" / "train_step.py"


def test_train_step_gives_a_row_for_us_and_a_reason_for_a_peer_that_is_not_here():
    environment = {name: value for name, value in os.environ.items() if name not in ("NDS_PEERS", "DEEPSPEC_HOME")}
    options = ["--vocab", "512", "--threads", "1", "--repetitions", "1", "--only", "nds,deepspec", "--json"]
    done = subprocess.run([sys.executable, BENCHMARK, *options], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    (row,) = [row for row in result["rows"] if row["name"] == "nds"]
    assert row["vocab"] == 512
    assert 0.5 < row["loss"] < 20
    assert row["ms"] > 0
    assert 5 < row["step_mb"] < 500
    assert "deepspec" in result["absent"]["deepspec"]
