"""Several ranks make a rolling cache together: the training of one rank, stopped, killed and started again."""

import pytest

from nemotron_dspark.training.metrics import read_lines
from tests.kill9 import apart
from tests.training.rolling_ranks import run_all
from tests.training.test_distributed import assert_same_training
from tests.training.test_without_cache import write_conversations

BUDGET = 600_000


@pytest.fixture(scope="module")
def runs(tiny_hybrid, tmp_path_factory):
    """Folder of every run of rolling_ranks.py, and how its processes ended."""
    folder = tmp_path_factory.mktemp("rolling")
    data = write_conversations(folder / "data.jsonl")
    return folder, apart(run_all, folder, str(tiny_hybrid), str(data))


def test_several_ranks_train_as_one_does(runs):
    folder, ended = runs
    assert [process["code"] for process in ended["two"][0]] == [0, 0], ended["two"]
    assert_same_training(folder / "two" / "run", folder / "one" / "run")


def test_the_disk_holds_no_more_than_the_budget_and_nothing_when_all_is_over(runs):
    folder, ended = runs
    for name in ("one", "two"):
        assert BUDGET / 2 < int(ended[name][0][0]["out"].split()[-1]) <= BUDGET
        assert not (folder / name / "run" / "segments").exists()


def test_held_out_samples_are_measured_by_all_ranks(runs):
    one, two = (read_lines(runs[0] / name / "run" / "validation.jsonl") for name in ("one", "two"))
    assert len(one) == len(two) == 3
    for here, there in zip(one, two, strict=True):
        assert here["loss"] == pytest.approx(there["loss"], rel=1e-5)


def test_when_a_rank_is_killed_while_it_captures_the_resumed_run_is_the_same_to_the_bit(runs):
    folder, ended = runs
    before, after = ended["two, killed, two"]
    assert [process["code"] for process in before] == [3, -9]
    assert "Another process of this run has died." in before[0]["err"]
    assert [process["code"] for process in after] == [0, 0], after
    assert_same_training(folder / "two, killed, two" / "run", folder / "two" / "run", relative=0.0)


def test_what_stops_one_rank_s_target_is_said_once_and_stops_all(runs):
    ended = runs[1]["two, not finite"][0]
    assert [process["code"] for process in ended] == [1, 1]
    said = [process["err"] for process in ended if process["err"]]
    assert len(said) == 1
    assert "are not finite" in said[0]
