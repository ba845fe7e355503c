"""The benchmark of the server runs and says what it promises."""

import json
import runpy
from pathlib import Path

import pytest

from nemotron_dspark.recipe import tiny

BENCHMARK = Path(__file__).resolve().parent.parent / "benchmarks" / "serve.py"


@pytest.mark.slow
def test_every_system_gets_a_row_with_latencies(tmp_path, monkeypatch, capfd):
    target = tiny.random_target(tmp_path / "target", pattern="M*-")
    options = ["--target", str(target), "--dtype", "float32", "--requests", "2", "--tokens", "24"]
    monkeypatch.setattr("sys.argv", [str(BENCHMARK), *options, "--seconds", "1", "--rounds", "1", "--json"])
    monkeypatch.delenv("NDS_VLLM_PYTHON", raising=False)
    runpy.run_path(str(BENCHMARK), run_name="__main__")
    loop, served = json.loads(capfd.readouterr().out)["2"]
    assert (loop["name"], served["name"]) == ("loop, plain", "nds serve, plain")
    assert loop["tokens_per_second"] > 10
    assert 0.01 < served["of_the_loop"] < 100
    assert 0 < served["between"][0] <= served["between"][1]
    assert 0 < served["first"][0] <= served["first"][1]
