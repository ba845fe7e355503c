"""The comparison of training steps runs and says what it promises, with whatever peers are installed."""

import json
import runpy
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).resolve().parent.parent / "benchmarks" / "train_step.py"


def test_train_step_gives_a_row_for_us_and_a_reason_for_a_peer_that_is_not_here(monkeypatch, capfd):
    options = ["--vocab", "512", "--threads", "1", "--repetitions", "1", "--only", "nds,deepspec", "--json"]
    monkeypatch.setattr("sys.argv", [str(BENCHMARK), *options])
    monkeypatch.syspath_prepend(BENCHMARK.parent)
    for name in ("NDS_PEERS", "DEEPSPEC_HOME"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(BENCHMARK), run_name="__main__")
    said = capfd.readouterr()
    assert ended.value.code == 0, said.err
    result = json.loads(said.out)
    (row,) = [row for row in result["rows"] if row["name"] == "nds"]
    assert row["vocab"] == 512
    assert 0.5 < row["loss"] < 20
    assert row["ms"] > 0
    assert 5 < row["step_mb"] < 500
    assert "deepspec" in result["absent"]["deepspec"]
