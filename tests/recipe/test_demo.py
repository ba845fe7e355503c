"""The demo, at a fraction of its budgets, leaves what it promises; the selftest can fail."""

import json

import pytest

from nemotron_dspark import cli
from nemotron_dspark.recipe import corpus
from nemotron_dspark.recipe.demo import STAGES, Budget, new_run_dir
from nemotron_dspark.recipe.selftest import run_selftest
from nemotron_dspark.targets.mamba2 import Mamba2States


@pytest.mark.slow
def test_the_demo_runs_every_stage_and_prints_its_keys(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["nds", "demo", "--json", "--scale", "0.03", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    value = json.loads(capsys.readouterr().out)
    assert set(value["accepted_length"]) == {"greedy", "sampled", "untrained_greedy", "untrained_sampled"}
    assert value["lossless"]["identical"] == value["lossless"]["prompts"] > 0
    assert set(value["tokens_per_second"]) == {"plain", "speculative"}
    assert tuple(value["stages"]) == STAGES
    run = tmp_path / "demo"
    assert value["run_dir"] == str(run)
    assert json.loads((run / "demo.json").read_text()) == value
    assert (run / "demo.png").read_bytes().startswith(b"\x89PNG")
    for made in ("target/model.safetensors", "conversations.jsonl", "cache/manifest.json", "run/draft/config.json"):
        assert (run / made).is_file()


def test_an_earlier_demo_is_never_touched(tmp_path):
    assert new_run_dir(tmp_path).name == "demo"
    (tmp_path / "demo").mkdir()
    assert new_run_dir(tmp_path).name == "demo-2"


def test_held_out_modules_are_in_no_training_text():
    assert not set(corpus.MODULES) & set(corpus.HELD_OUT)
    training = "\n".join(corpus.sources(corpus.MODULES))
    held_out = corpus.passages(corpus.sources(corpus.HELD_OUT), 50, seed=2)
    assert sum(item.question in training for item in held_out) <= 1  # a line of licence may stand anywhere


def test_passages_follow_the_text(tmp_path):
    text = corpus.sources(("textwrap",))[0]
    stripped = "\n".join(line.rstrip() for line in text.splitlines())
    for item in corpus.passages([text], 40, seed=1):
        assert item.question in stripped
        assert item.answer in stripped
        assert stripped.find(item.answer, stripped.find(item.question)) > 0


def test_a_smaller_scale_means_smaller_budgets():
    assert Budget().scaled(0.5).train_prompts == Budget().train_prompts // 2
    assert Budget().scaled(0.5).target_steps == Budget().target_steps / 2


def test_the_selftest_notices_a_broken_rollback(monkeypatch):
    commit = Mamba2States.commit

    def commit_all(self, kept):  # the rejected tokens too
        block = next(iter(self._records.values())).dt.shape[1]
        commit(self, [block] * len(kept))

    monkeypatch.setattr(Mamba2States, "commit", commit_all)
    results = []
    for result in run_selftest():
        results.append(result)
        if result.name == "proofs pass":
            break
    assert not results[-1].passed
    assert "rollback" in results[-1].detail
