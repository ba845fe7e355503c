"""Everything that can be wrong is said in a sentence before DeepSpec starts, and it is started as it wants to be."""

import json
import os
import sys
import types

import pytest
from typer.testing import CliRunner

from nemotron_dspark.cache.deepspec_layout import DeepSpecLayout, Manifest
from nemotron_dspark.cli import app
from nemotron_dspark.config import load_config
from nemotron_dspark.deepspec import checkout, launch, status
from nemotron_dspark.deepspec.config_file import config_for
from nemotron_dspark.errors import EnvironmentFault, InputError
from nemotron_dspark.targets import Checkpoint

SMALL = ("draft.num_layers=1", "draft.markov_rank=4", "train.global_batch_size=4", "draft.intermediate_size=64")


@pytest.fixture
def cfg(deepspec_on_cpu, tiny_hybrid, cache, tmp_path):
    """A config as `nds deepspec config` writes it, loaded by DeepSpec, for the cache at hand."""
    path = tmp_path / "config.py"
    run = load_config(str(tiny_hybrid), assignments=[*SMALL, "draft.taps=[1, 2, 3, 4, 5]"])
    path.write_text(config_for(run))
    opts = [f"data.target_cache_path={cache}", f"logging.checkpoint_dir={tmp_path}"]
    home = checkout.find()
    return launch.load_config(home, path, opts)


def test_a_run_that_fits_passes(cfg):
    assert launch.check_training(cfg, 2) == ()


def edited(cache, folder, **changes):
    """A copy of the cache whose manifest says something else."""
    import shutil

    shutil.copytree(cache, folder)
    values = json.loads((folder / "manifest.json").read_text()) | changes
    (folder / "manifest.json").write_text(json.dumps(values))
    return str(folder)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"target_model_name_or_path": "another/target"}, "was made from the target another/target"),
        ({"chat_template": "nemotron_3"}, "was made with the chat template 'nemotron_3'"),
        ({"target_layer_ids": [0, 2, 3, 4, 5]}, r"holds the taps \[0, 2, 3, 4, 5\]"),
        ({"hidden_size": 32}, "hidden states of size 32"),
    ],
)
def test_a_cache_from_something_else_is_refused(cfg, cache, tmp_path, changes, sentence):
    cfg.data.target_cache_path = edited(cache, tmp_path / "copy", **changes)
    with pytest.raises(InputError, match=sentence):
        launch.check_training(cfg, 1)
    with pytest.raises(InputError, match=sentence):  # and by every rank, should someone start train.py by hand
        cfg.train.trainer_cls(0, cfg)


@pytest.mark.parametrize(
    ("section", "key", "value", "sentence"),
    [
        ("data", "target_cache_path", None, "names no target cache"),
        ("data", "target_cache_path", "/nowhere", "does not exist"),
        ("train", "global_batch_size", 5, "not a multiple of 2 GPUs"),
        ("train", "global_batch_size", 400, "12 samples, but one optimiser step takes 400"),
        ("train", "trainer_cls", object, "not one of this project's trainers"),
        ("model", "target_layer_ids", [1, 2, 3, 4, 7], "last layer"),
        ("model", "mask_token_id", 400, "vocabulary has 384"),
        ("model", "target_model_name_or_path", None, "names no target"),
    ],
)
def test_a_config_that_cannot_run_is_refused(cfg, section, key, value, sentence):
    cfg[section][key] = value
    with pytest.raises(InputError, match=sentence):
        launch.check_training(cfg, 2)


def test_a_mask_token_that_the_data_contains_is_refused(cfg, cache):
    from nemotron_dspark.cache.reader import TargetCache

    cfg.model.mask_token_id = int(TargetCache(cache)[0].input_ids[5])
    with pytest.raises(InputError, match="contains the draft's mask token"):
        launch.check_training(cfg, 1)


def test_opts_that_name_nothing_and_files_that_are_no_config(deepspec_on_cpu, tmp_path):
    home = checkout.find()
    (tmp_path / "broken.py").write_text("model = {")
    (tmp_path / "half.py").write_text("model = {}")
    for name, opts, sentence in (
        ("none.py", [], "does not exist"),
        ("broken.py", [], "cannot be loaded"),
        ("half.py", [], "has no section train"),
    ):
        with pytest.raises(InputError, match=sentence):
            launch.load_config(home, tmp_path / name, opts)
    worked = launch.resource_config("dspark_nemotron_h_8b")
    with pytest.raises(InputError, match=r"train\.rate"):
        launch.load_config(home, worked, ["train.rate=1"])
    with pytest.raises(InputError, match="--opts"):
        launch.load_config(home, worked, ["train.lr"])


def test_without_cuda_the_command_says_so_at_once(monkeypatch, deepspec_on_cpu):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for command in ("train", "eval"):
        result = CliRunner().invoke(app, ["deepspec", command, "dspark_nemotron_h_8b"])
        assert isinstance(result.exception, EnvironmentFault), result.output
        assert "no CUDA device" in str(result.exception)


def test_nodes_are_deepspecs_variables(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    alone = {"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    assert launch.Nodes().variables() == alone
    third = {"WORLD_SIZE": "4", "RANK": "2", "MASTER_ADDR": "head", "MASTER_PORT": "1234"}
    assert launch.Nodes(4, 2, "head:1234").variables() == third
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "8")
    with pytest.raises(InputError, match="nodes count from 0"):
        launch.Nodes().variables()


@pytest.fixture
def executed(monkeypatch):
    """What the process would have become."""
    calls = []
    monkeypatch.setattr(os, "execve", lambda program, arguments, environment: calls.append((arguments, environment)))
    monkeypatch.setattr(launch, "require_gpus", lambda: 2)
    return calls


def test_train_becomes_deepspecs_script(cfg, executed, tmp_path, cache):
    opts = ["--opts", f"data.target_cache_path={cache}", "--opts", f"logging.checkpoint_dir={tmp_path}/run"]
    command = ["deepspec", "train", str(tmp_path / "config.py"), *opts, "--nodes", "1"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    ((arguments, environment),) = executed
    home = checkout.find().folder
    assert arguments == [sys.executable, str(home / "train.py"), "--config", str(tmp_path / "config.py"), *opts]
    assert environment["PYTHONPATH"].split(os.pathsep)[0] == str(home)
    assert (environment["RANK"], environment["WORLD_SIZE"]) == ("0", "1")


def test_nds_train_with_the_deepspec_engine_is_the_same_thing(deepspec_on_cpu, executed, tiny_hybrid, cache, tmp_path):
    out = tmp_path / "run"
    command = ["train", "--trainer", "deepspec", "--target", str(tiny_hybrid), "--cache", str(cache), "--out", str(out)]
    result = CliRunner().invoke(app, [*command, *(part for key in SMALL for part in ("--set", key))])
    assert result.exit_code == 0, result.output
    ((arguments, _),) = executed
    assert arguments[1].endswith("train.py")
    assert f"logging.checkpoint_dir={out / 'checkpoints'}" in arguments
    assert '"target_layer_ids": [1, 2, 3, 4, 5]' in (out / "deepspec_config.py").read_text()
    result = CliRunner().invoke(app, [*command[:2], "apex", *command[3:]])
    assert result.exit_code == 2
    assert "apex" in result.stderr
    assert "deepspec" in result.stderr.split("apex")[1]


def test_prepare_builds_what_train_then_accepts(cfg, conversations, tmp_path):
    out = tmp_path / "prepared"
    command = ["deepspec", "prepare", str(tmp_path / "config.py"), "--data", str(conversations), "--out", str(out)]
    for _ in range(2):  # the second time there is nothing left to do
        result = CliRunner().invoke(app, [*command, "--device", "cpu", "--min-loss-tokens", "4", "--json"])
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["samples"] == 12
    cfg.data.target_cache_path = str(out)
    assert launch.check_training(cfg, 1) == ()


def test_eval_becomes_our_entry_point_in_the_checkout(cfg, executed, monkeypatch, tmp_path):
    moved = []
    monkeypatch.setattr(os, "chdir", moved.append)
    draft = tmp_path / "draft"
    draft.mkdir()
    config = cfg.train.trainer_cls.draft_config(launch.spec_of(cfg), cfg.model)
    (draft / "config.json").write_text(config.to_json_string())
    command = ["deepspec", "eval", str(tmp_path / "config.py"), "--draft", str(draft), "--tasks", "gsm8k:3,math500"]
    result = CliRunner().invoke(app, [*command, "--temperature", "0"])
    assert result.exit_code == 0, result.output
    ((arguments, _),) = executed
    assert arguments[1:5] == ["-m", "nemotron_dspark.deepspec.evaluators", "--tasks", "gsm8k:3,math500"]
    assert arguments[arguments.index("--temperature") + 1] == "0.0"
    assert moved == [checkout.find().folder]
    result = CliRunner().invoke(app, [*command[:-1], "nothing:3"])
    assert isinstance(result.exception, InputError)
    assert "nothing.jsonl" in str(result.exception)


def test_the_entry_point_adds_our_evaluators_to_deepspecs_table(deepspec_on_cpu, monkeypatch):
    import importlib

    from nemotron_dspark.deepspec import evaluators

    entry = importlib.import_module("eval")
    command = ["eval", "--tasks", "gsm8k:3,math500", "--target_name_or_path", "T", "--draft_name_or_path", "D"]
    monkeypatch.setattr(sys, "argv", command)
    args = evaluators.parse()
    assert args.tasks == [("gsm8k", 3), ("math500", None)]
    assert args.target_name_or_path == "T"
    seen = []
    monkeypatch.setattr(entry, "EVALUATORS", dict(entry.EVALUATORS))
    monkeypatch.setattr(entry, "main", lambda rank, args: seen.append(dict(entry.EVALUATORS)))
    evaluators.worker(0, args)
    assert seen[0]["Qwen3DSparkModel"].__name__ == "NemotronDSparkEvaluator"
    assert seen[0]["Qwen3Eagle3Model"].__name__ == "NemotronEagle3Evaluator"


def test_check_lists_what_is_missing_and_explains_the_override(tiny_hybrid, monkeypatch, tmp_path):
    monkeypatch.delenv(checkout.HOME_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = CliRunner().invoke(app, ["deepspec", "check", "--target", str(tiny_hybrid), "--json"])
    assert result.exit_code == 3
    found = json.loads(result.stdout)
    assert {"checkout", "CUDA"} <= set(found["missing"])
    assert "5.10.2" in found["override"]
    scan = next(fault for fault in found["faults"] if fault["what"].startswith("later tokens"))
    assert scan["in_deepspecs_pin"]
    assert not scan["here"]
    table = CliRunner().invoke(app, ["deepspec", "check", "--target", str(tiny_hybrid)])
    assert table.exit_code == 3
    assert "what the bridge does" in table.output


def test_faults_are_those_of_the_family_and_the_version(tiny_hybrid, tiny_llama):
    hybrid, llama = (Checkpoint.find(folder).read_spec() for folder in (tiny_hybrid, tiny_llama))
    assert status.faults(llama, kernels=False) == []
    scan = "later tokens change earlier ones beyond chunk_size"
    plain, kernels = (
        {seen.what: (seen.in_deepspecs_pin, seen.here) for seen in status.faults(hybrid, kernels=installed)}
        for installed in (False, True)
    )
    assert plain[scan] == (True, False)
    assert kernels[scan] == (False, False)
    assert plain["crop() forgets attention and keeps the recurrent state"] == (True, True)


def test_a_cache_that_deepspec_wrote_has_no_template_to_compare(tiny_hybrid):
    spec = Checkpoint.find(tiny_hybrid).read_spec()
    layout = DeepSpecLayout.of([1], taps=(1,), hidden_size=spec.hidden_size, shard_bytes=1)
    manifest = Manifest.model_validate_json(layout.manifest())
    cfg = {"model": {"target_model_name_or_path": "x", "target_layer_ids": [1]}, "data": {"chat_template": "chatml"}}
    launch._check_manifest(manifest, cfg, spec, types.SimpleNamespace())
