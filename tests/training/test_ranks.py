"""Several processes train what one trains: any number of them, sharded or not, stopped, killed, and started again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nemotron_dspark.training.checkpoints import list_checkpoints
from nemotron_dspark.training.metrics import read_metrics

LAST = "step-00000006"
TIMED = ("tokens_per_second", "memory_mb")


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """Folder of every run of several_ranks.py, and how its processes ended."""
    folder = tmp_path_factory.mktemp("ranks")
    ended = subprocess.run(
        [sys.executable, Path(__file__).with_name("several_ranks.py"), folder],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert ended.returncode == 0, ended.stderr
    return folder, json.loads(ended.stdout)


def checkpoint(folder, name):
    """Weights and optimiser state after the last step."""
    last = folder / name / "checkpoints" / LAST
    return load_file(last / "draft" / "model.safetensors") | load_file(last / "optimiser.safetensors")


def assert_equal(runs, name, other, relative=1e-6):
    folder, ended = runs
    assert {process["code"] for process in ended[name][-1]} == {0}
    found, expected = checkpoint(folder, name), checkpoint(folder, other)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert (found[key].double() - value.double()).norm() <= relative * value.double().norm(), key
    for here, there in zip(read_metrics(folder / name), read_metrics(folder / other), strict=True):
        for key in here.keys() - set(TIMED):
            assert here[key] == pytest.approx(there[key], rel=relative, abs=relative / 100), key


@pytest.mark.parametrize("name", ["two", "four", "two, sharded"])
def test_several_ranks_equal_one(runs, name):
    assert_equal(runs, name, "one")


def test_size_of_a_forward_changes_nothing_but_rounding(runs):
    assert_equal(runs, "one, wide", "one")


def test_sharded_weights_train_in_bf16_on_fp32_masters_as_whole_ones_do(runs):
    weights = checkpoint(runs[0], "two, sharded, bf16")
    assert (weights["fc.weight"].dtype, weights["master.fc.weight"].dtype) == (torch.bfloat16, torch.float32)
    assert_equal(runs, "two, sharded, bf16", "two, bf16")


def test_stop_on_one_rank_stops_all_at_one_step_and_the_resumed_run_is_the_same_to_the_bit(runs):
    stopped, _ = runs[1]["two, stopped, two"]
    assert [process["code"] for process in stopped] == [130, 130]
    assert_equal(runs, "two, stopped, two", "two", relative=0.0)


@pytest.mark.parametrize("name", ["two, stopped, four", "sharded, stopped, one", "one, stopped, sharded"])
def test_checkpoint_resumes_with_another_number_of_ranks(runs, name):
    assert_equal(runs, name, "one")


@pytest.mark.parametrize(
    ("name", "killed"), [("two, killed, two", 1), ("two, first killed", 0), ("sharded, killed", 1)]
)
def test_rank_that_dies_ends_the_others_with_a_sentence(runs, name, killed):
    ended = runs[1][name][0]
    assert ended[killed]["code"] == -9
    assert ended[1 - killed]["code"] == 3
    assert ended[1 - killed]["words"].startswith("Another process of this run has died.")


def test_run_whose_rank_was_killed_ends_in_the_same_bits_when_started_again(runs):
    assert_equal(runs, "two, killed, two", "two", relative=0.0)


@pytest.mark.parametrize("name", ["four, not a number", "sharded, not a number"])
def test_loss_that_is_no_number_is_traced_to_its_sample_and_said_once(runs, name):
    folder, ended = runs
    assert {process["code"] for process in ended[name][0]} == {1}
    words = [process["words"] for process in ended[name][0] if process["words"]]
    assert len(words) == 1
    assert "at step 3: loss nan because of sample 6;" in words[0]
    assert "step-00000002 is the last good checkpoint" in words[0]
    assert [path.name for path in list_checkpoints(folder / name / "checkpoints")] == ["step-00000002"]


def test_number_of_ranks_that_does_not_fit_is_refused_once(runs):
    ended = runs[1]["three"][0]
    assert {process["code"] for process in ended} == {2}
    assert [process["words"] for process in ended if process["words"]] == [
        "train.global_batch_size 8 is not a multiple of train.local_batch_size 1 x 3 processes. "
        "Set train.global_batch_size to 6 or 9, or start 1 or 2 processes."
    ]
