"""Several processes train what one trains: any number of them, sharded or not, stopped, killed, and started again."""

import fcntl
import json
import os

import pytest
import torch
from safetensors.torch import load_file

from nemotron_dspark.drafts.dspark import DSparkDraft
from nemotron_dspark.training.checkpoints import list_checkpoints
from nemotron_dspark.training.metrics import read_metrics
from tests.caches import write_cache
from tests.kill9 import apart
from tests.training.several_ranks import run_all
from tests.training.small_cache import SETTINGS, TAPS, samples

LAST = "step-00000006"
TIMED = ("tokens_per_second", "memory_mb")


@pytest.fixture(scope="session")
def runs(tmp_path_factory, tiny_hybrid):
    """Folder of every run of several_ranks.py, and how its processes ended."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # one for all workers, so that the runs are made once
    folder, report = root / "ranks", root / "ranks.json"
    with open(root / "ranks.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not report.is_file():
            write_cache(folder / "cache", samples(), taps=TAPS, hidden_size=64)
            options = [part for setting in SETTINGS for part in ("--set", setting)]
            words = ["--target", str(tiny_hybrid), "--cache", str(folder / "cache"), *options]
            report.write_text(json.dumps(apart(run_all, folder, words)))
    return folder, json.loads(report.read_text())


def said(ended):
    return [process["err"] for process in ended if process["err"]]


def checkpoint(run, name=LAST):
    """Weights and optimiser state after the last step."""
    last = run / "checkpoints" / name
    return load_file(last / "draft" / "model.safetensors") | load_file(last / "optimiser.safetensors")


def assert_equal(runs, name, other, relative=1e-6):
    folder, ended = runs
    assert {process["code"] for process in ended[name][-1]} == {0}
    assert_same_training(folder / name, folder / other, relative)


def assert_same_training(run, other, relative=1e-6):
    last = list_checkpoints(other / "checkpoints")[-1].name
    found, expected = checkpoint(run, last), checkpoint(other, last)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert (found[key].double() - value.double()).norm() <= relative * value.double().norm(), key
    for here, there in zip(read_metrics(run), read_metrics(other), strict=True):
        for key in here.keys() - set(TIMED):
            like = there[key] if there[key] is None else pytest.approx(there[key], rel=relative, abs=relative / 100)
            assert here[key] == like, key


@pytest.mark.parametrize("name", ["two", "four"])
def test_several_ranks_equal_one(runs, name):
    assert_equal(runs, name, "one")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("name", ["two, cuda", "two, cuda, sharded"])
def test_two_gpus_equal_one_cpu(runs, name):
    assert_equal(runs, name, "one", relative=1e-4)


def test_size_of_a_forward_changes_nothing_but_rounding(runs):
    assert_equal(runs, "one, wide", "one")


def test_sharded_fp32_parameters_train_in_bf16_as_replicated_ones_do(runs):
    weights = checkpoint(runs[0] / "two, bf16, sharded")
    assert weights["fc.weight"].dtype == torch.float32
    assert_equal(runs, "two, bf16, sharded", "two, bf16")


def test_sharded_weights_are_a_part_on_every_rank(runs):
    parts = [int(process["out"]) for process in runs[1]["two, bf16, sharded"][0]]
    whole = int(runs[1]["one"][0][0]["out"])
    assert sum(parts) == whole
    assert max(parts) < 0.55 * whole


def test_stop_on_one_rank_stops_all_at_one_step_and_the_resumed_run_is_the_same_to_the_bit(runs):
    stopped, _ = runs[1]["two, stopped, two"]
    assert [process["code"] for process in stopped] == [130, 130]
    assert_equal(runs, "two, stopped, two", "two", relative=0.0)


@pytest.mark.parametrize("name", ["two, stopped, four", "sharded, stopped, one", "one, stopped, sharded"])
def test_checkpoint_resumes_with_another_number_of_ranks_sharded_or_not(runs, name):
    assert_equal(runs, name, "one")


@pytest.mark.parametrize(("name", "killed"), [("two, killed, two", 1), ("two, first killed", 0)])
def test_rank_that_dies_ends_the_others_with_a_sentence(runs, name, killed):
    ended = runs[1][name][0]
    assert ended[killed]["code"] == -9
    assert ended[1 - killed]["code"] == 3
    assert ended[1 - killed]["err"].startswith("Another process of this run has died.")


def test_rank_that_is_stuck_ends_the_run_with_a_sentence(runs):
    ended = runs[1]["two, one stuck"][0]
    assert [process["code"] for process in ended] == [3, 3]
    (words,) = said(ended)
    assert words.startswith("Another process of this run gives no sign of life.")


def test_run_whose_rank_was_killed_ends_in_the_same_bits_when_started_again(runs):
    assert_equal(runs, "two, killed, two", "two", relative=0.0)


@pytest.mark.parametrize("name", ["four, not a number", "sharded, not a number"])
def test_loss_that_is_no_number_is_traced_to_its_sample_and_said_once(runs, name):
    folder, ended = runs
    assert {process["code"] for process in ended[name][0]} == {1}
    (words,) = said(ended[name][0])
    assert "at step 3: loss nan because of sample 6;" in words
    assert "step-00000002 is the last good checkpoint" in words
    assert [path.name for path in list_checkpoints(folder / name / "checkpoints")] == ["step-00000002"]


def test_sample_that_one_rank_cannot_read_ends_the_run_behind_a_checkpoint(runs):
    folder, ended = runs
    assert {process["code"] for process in ended["two, one damaged sample"][0]} == {2}
    (words,) = said(ended["two, one damaged sample"][0])
    assert words.startswith("Training stopped after step 2: Sample 6 is damaged.")
    kept = list_checkpoints(folder / "two, one damaged sample" / "checkpoints")
    assert [path.name for path in kept] == ["step-00000002"]


def test_number_of_ranks_that_does_not_fit_is_refused_once(runs):
    ended = runs[1]["three"][0]
    assert {process["code"] for process in ended} == {2}
    assert said(ended) == [
        "train.global_batch_size 8 is not a multiple of train.local_batch_size 1 x 3 processes. "
        "Set train.global_batch_size to 6 or 9, or start 1 or 2 processes.\n"
    ]


def test_command_prints_and_writes_once_whatever_the_number_of_processes(runs):
    folder, (alone, together, _) = runs[0] / "command", runs[1]["command"]
    assert [process["code"] for process in alone + together] == [0, 0, 0]
    first, second = together
    assert (second["out"], second["err"]) == ("", "")
    reports = [json.loads(process["out"]) for process in (alone[0], first)]
    assert "step 4/4" in first["err"]
    assert [report["steps"] for report in reports] == [4, 4]
    assert reports[0]["tokens"] == reports[1]["tokens"]
    one, two = (DSparkDraft.load(folder / at / "draft").trainable_parameters() for at in ("alone/run", "run"))
    for name, value in one.items():
        assert (two[name] - value).norm() <= 1e-6 * value.norm(), name


def test_error_of_the_command_is_printed_once(runs):
    refused = runs[1]["command"][2]
    assert [process["code"] for process in refused] == [2, 2]
    (words,) = said(refused)
    assert words.startswith("error:")
    assert "already holds a run" in words
    assert "Traceback" not in words
