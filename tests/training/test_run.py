"""A whole run from `nds train`: its folder, its refusals, its resumption."""

import json
import shutil
import sys
import types

import pytest
import torch
from typer.testing import CliRunner

from nemotron_dspark.cli import app
from nemotron_dspark.config import load_config
from nemotron_dspark.drafts.dspark import DSparkDraft
from nemotron_dspark.errors import EnvironmentFault, InputError
from nemotron_dspark.targets import Checkpoint
from nemotron_dspark.targets.weights import read_embedding_and_head
from nemotron_dspark.training import run
from nemotron_dspark.training.metrics import read_metrics
from nemotron_dspark.training.tiling import Tiling
from tests.caches import write_cache
from tests.training import small_cache
from tests.training.runs import named, train_run
from tests.training.small_cache import TAPS, samples
from tests.training.test_trainer import StopAt

SETTINGS = (*small_cache.SETTINGS, "train.local_batch_size=2")


@pytest.fixture
def cache(tmp_path, tiny_hybrid):
    extra = {"target_model_name_or_path": str(tiny_hybrid)}
    write_cache(tmp_path / "cache", samples(), taps=TAPS, hidden_size=64, extra=extra)
    return tmp_path / "cache"


def config(*more):
    return load_config(assignments=[*SETTINGS, *more])


def nds(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_run_leaves_a_draft_of_the_target_and_explains_itself(tiny_hybrid, cache, tmp_path):
    report = train_run(str(tiny_hybrid), cache, tmp_path / "run", config())
    assert (report.steps, report.resumed_from, report.samples) == (4, 0, 8)
    draft = DSparkDraft.load(report.draft_folder)
    spec = Checkpoint.find(tiny_hybrid).read_spec()
    draft.config.check_target(spec)
    assert draft.config.target_layer_ids == TAPS  # the cache's, without being asked for
    embeddings = read_embedding_and_head(tiny_hybrid, spec)
    assert torch.equal(draft.embed_tokens.weight, embeddings.embedding)
    assert torch.equal(draft.lm_head.weight, embeddings.head)
    described = json.loads((tmp_path / "run" / "run.json").read_text())
    assert described["versions"]["torch"] == torch.__version__
    assert any("rope theta" in note for note in described["notes"])
    assert any("mask token 31" in note for note in described["notes"])
    assert load_config(str(tiny_hybrid), file=tmp_path / "run" / "config.yaml") == named(config(), tiny_hybrid)
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [2, 4]
    assert list((tmp_path / "run" / "tensorboard").iterdir())


class FakeTracker(types.ModuleType):
    """The three calls that trackio and wandb share."""

    def __init__(self, name):
        super().__init__(name)
        self.runs, self.lines, self.finished = [], [], 0

    def init(self, **given):
        self.runs.append(given)
        return given

    def log(self, values, step):
        self.lines.append((step, values))

    def finish(self):
        self.finished += 1


@pytest.mark.parametrize("package", ["trackio", "wandb"])
def test_a_tracker_gets_the_metrics_and_a_run_that_goes_on_is_the_same_one(
    tiny_hybrid, cache, tmp_path, monkeypatch, package
):
    tracker = FakeTracker(package)
    monkeypatch.setitem(sys.modules, package, tracker)
    asked = (
        f"train.tracker={package}",
        "train.validation=0.3",
        "train.global_batch_size=2",
        "train.local_batch_size=1",
        "train.checkpoint_every=2",
    )
    with pytest.raises(KeyboardInterrupt):
        train_run(str(tiny_hybrid), cache, tmp_path / "run", config(*asked), callbacks=[StopAt(2)])
    train_run(str(tiny_hybrid), cache, tmp_path / "run", config(*asked))
    first, second = tracker.runs
    assert first == second
    assert (first["project"], first["name"], first["resume"]) == ("nds", "run", "allow")
    assert first["config"]["num_anchors"] == 8
    assert tracker.finished == 2
    logged = {step: values for step, values in tracker.lines if "loss" in values}
    lines = {line["step"]: line for line in read_metrics(tmp_path / "run")}
    assert logged.keys() == lines.keys() == {2, 4}
    assert logged[4]["loss"] == lines[4]["loss"]
    assert logged[4]["accept_rate/1"] == lines[4]["accept_rate"][1]
    assert any("validation/tau" in values for _, values in tracker.lines)


def test_a_tracker_that_is_not_installed_is_named_before_anything_runs(tiny_hybrid, cache, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(EnvironmentFault, match=r"train\.tracker is wandb, which is not installed\. pip install wandb"):
        train_run(str(tiny_hybrid), cache, tmp_path / "run", config("train.tracker=wandb"))


def test_finished_run_is_left_as_it_is(tiny_hybrid, cache, tmp_path):
    train_run(str(tiny_hybrid), cache, tmp_path / "run", config())
    draft = tmp_path / "run" / "draft"
    before = (draft / "model.safetensors").read_bytes()
    (draft / "calibration").mkdir()
    (draft / "calibration" / "temperatures.json").write_text("{}")
    report = train_run(str(tiny_hybrid), cache, tmp_path / "run", config("train.log_every=1"))
    assert (report.resumed_from, report.final) == (4, None)
    assert (draft / "model.safetensors").read_bytes() == before
    assert (draft / "calibration" / "temperatures.json").read_text() == "{}"
    shutil.rmtree(draft)  # killed between the last checkpoint and the draft
    train_run(str(tiny_hybrid), cache, tmp_path / "run", config())
    assert (draft / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ("train.lr=1e-3", "train.lr was 0.0006, now it is 0.001"),
        ("draft.block_size=4", "draft.block_size was 3, now it is 4"),
        ("train.precision=bf16", "draft.dtype was 'float32', now it is 'bfloat16'"),
    ],
)
def test_other_settings_do_not_mix_into_a_run(tiny_hybrid, cache, tmp_path, change, key):
    train_run(str(tiny_hybrid), cache, tmp_path / "run", config())
    with pytest.raises(InputError, match=key):
        train_run(str(tiny_hybrid), cache, tmp_path / "run", config(change))


def test_a_run_goes_on_with_the_precision_and_the_tiling_it_measured(tiny_hybrid, cache, tmp_path, monkeypatch):
    """Measured again they could come out otherwise, and the weights would not be those of an undisturbed run."""
    used = []

    class Recorder(run.Trainer):
        def __init__(self, *args, tiling, **more):
            used.append(tiling)
            super().__init__(*args, tiling=tiling, **more)

    monkeypatch.setattr(run, "Trainer", Recorder)
    for dtype, tiling in (
        (torch.bfloat16, Tiling(chunk=5, group=2, tiles=3)),
        (torch.float32, Tiling(chunk=9, group=2)),
    ):
        monkeypatch.setattr(run, "choose_precision", lambda *_, dtype=dtype: (dtype, "measured"))
        monkeypatch.setattr(run, "choose_tiling", lambda _, tiling=tiling: tiling)
        report = train_run(str(tiny_hybrid), cache, tmp_path / "run", config())
        assert ("trains in bf16: measured (train.precision=fp32 rounds less)." in report.notes) == (len(used) == 1)
    assert used == [Tiling(chunk=5, group=2, tiles=3)] * 2
    assert json.loads((tmp_path / "run" / "run.json").read_text())["settings"]["draft"]["dtype"] == "bfloat16"


def test_another_cache_does_not_mix_into_a_run(tiny_hybrid, cache, tmp_path):
    train_run(str(tiny_hybrid), cache, tmp_path / "run", config())
    write_cache(tmp_path / "other", samples(9), taps=TAPS, hidden_size=64)
    with pytest.raises(InputError, match="a run made from another cache"):
        train_run(str(tiny_hybrid), tmp_path / "other", tmp_path / "run", config())


def test_fresh_and_foreign_folders_are_refused(tiny_hybrid, cache, tmp_path):
    train_run(str(tiny_hybrid), cache, tmp_path / "run", config())
    with pytest.raises(InputError, match="already holds a run"):
        train_run(str(tiny_hybrid), cache, tmp_path / "run", config(), resume=False)
    with pytest.raises(InputError, match="holds other files"):
        train_run(str(tiny_hybrid), cache, cache, config())


def test_cache_that_does_not_fit_is_named(tiny_hybrid, cache, tmp_path):
    def refused(folder, *settings):
        with pytest.raises(InputError) as error:
            train_run(str(tiny_hybrid), folder, tmp_path / "run", config(*settings))
        assert not (tmp_path / "run").exists()
        return error.value.what

    write_cache(tmp_path / "wide", samples(hidden=32), taps=TAPS, hidden_size=32)
    assert "hidden size is 32" in refused(tmp_path / "wide")
    assert "the cache holds [1, 4]" in refused(cache, "draft.taps=[1,3]")
    write_cache(tmp_path / "last", samples(), taps=(1, 7), hidden_size=64)
    assert "last layer" in refused(tmp_path / "last")
    assert "takes 16" in refused(cache, "train.global_batch_size=16")
    assert "not a target cache" in refused(tmp_path)
    (cache / "shard-00000.bin").unlink()
    assert "shard-00000.bin is missing" in refused(cache)


def test_mask_token_that_the_data_uses_is_refused(tiny_hybrid, tmp_path):
    used = list(samples())
    used[3].input_ids[5] = 31
    write_cache(tmp_path / "cache", used, taps=TAPS, hidden_size=64)
    with pytest.raises(InputError, match=r"Sample 3 .* mask token 31"):
        train_run(str(tiny_hybrid), tmp_path / "cache", tmp_path / "run", config())
    other = config("draft.mask_token_id=30")
    assert train_run(str(tiny_hybrid), tmp_path / "cache", tmp_path / "run", other).steps == 4


def test_device_that_is_not_there_is_the_environments_fault(tiny_hybrid, cache, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(EnvironmentFault, match="'cuda' cannot be used"):
        train_run(str(tiny_hybrid), cache, tmp_path / "run", config("train.device=cuda"))


def test_command_without_a_cache_prints_the_command_that_makes_one(tiny_hybrid):
    result = nds("train", "--target", tiny_hybrid)
    assert isinstance(result.exception, InputError)
    assert result.exception.exit_code == 2
    assert f"nds cache build --target {tiny_hybrid} --data" in result.exception.do


def test_command_prints_one_json_object(tiny_hybrid, cache, tmp_path):
    options = [part for setting in SETTINGS for part in ("--set", setting)]
    result = nds("train", "-t", tiny_hybrid, "--cache", cache, "--out", tmp_path / "run", "--json", *options)
    assert result.exit_code == 0, result.exception
    report = json.loads(result.stdout)
    assert report["steps"] == 4
    assert report["final"]["tau"] >= 1
    assert "step 4/4" in result.stderr
    table = nds("train", "-t", tiny_hybrid, "--cache", cache, "--out", tmp_path / "run", *options)
    assert "from 4" in table.stdout


def test_config_show_prints_yaml_that_it_reads_itself(tmp_path):
    shown = nds("config", "show", "--set", "train.lr=1e-4", "--set", "draft.taps=[1, 2]")
    assert "# peak learning rate" in shown.stdout
    path = tmp_path / "config.yaml"
    path.write_text(shown.stdout)
    expected = load_config(assignments=["train.lr=1e-4", "draft.taps=[1,2]"])
    assert load_config(file=path) == expected
    as_json = nds("config", "show", "--config", path, "--json")
    assert json.loads(as_json.stdout) == expected.model_dump(mode="json")


def test_too_little_disk_for_the_checkpoints_is_said_before_the_first_step(tiny_hybrid, cache, tmp_path, monkeypatch):
    whole = train_run(str(tiny_hybrid), cache, tmp_path / "whole", config("train.checkpoint_every=1"))
    one = max((tmp_path / "whole" / "checkpoints").iterdir())
    room = 3 * sum(path.stat().st_size for path in one.rglob("*") if path.is_file())
    usage = shutil.disk_usage("/")
    monkeypatch.setattr("nemotron_dspark.training.run.Trainer", lambda *_, **__: pytest.fail("it trained"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=room * 9 // 10))
    with pytest.raises(EnvironmentFault, match=r"checkpoints and the draft need .* free.*nds plan"):
        train_run(str(tiny_hybrid), cache, tmp_path / "run", config())
    monkeypatch.undo()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2 * room))
    train_run(str(tiny_hybrid), cache, tmp_path / "run", config("train.checkpoint_every=1"))
    assert whole.steps == 4
