"""Several machines build the cache that one builds, byte for byte; here they are processes that meet over gloo."""

import json

import pytest

from nemotron_dspark.cache.verify import verify
from tests.cache.conftest import write_conversations
from tests.cache.several_ranks import run_all
from tests.kill9 import apart, contents

SETTINGS = {
    "target.proofs": "false",
    "target.dtype": "float32",
    "data.min_loss_tokens": 4,
    "data.max_length": 160,
    "cache.shard_bytes": 120_000,
    "cache.batch_tokens": 256,
}


@pytest.fixture(scope="module")
def runs(tiny_hybrid, tmp_path_factory):
    """Folder of every run of several_ranks.py, and how its processes ended."""
    folder = tmp_path_factory.mktemp("ranks")
    data = write_conversations(folder / "data.jsonl")
    options = [part for key, value in SETTINGS.items() for part in ("--set", f"{key}={value}")]
    words = ["cache", "build", "--target", str(tiny_hybrid), "--data", str(data), "--taps", "1,4", "--json", *options]
    return folder, apart(run_all, folder, words)


@pytest.mark.parametrize("name", ["three", "streamed, killed, two"])
def test_several_ranks_build_the_bytes_of_one(runs, name):
    folder, ended = runs
    assert {process["code"] for process in ended[name][-1]} == {0}, ended[name]
    assert contents(folder / name / "cache") == contents(folder / "one" / "cache")
    assert verify(folder / name / "cache").whole


def test_the_command_prints_once_and_leaves_a_finished_cache_alone(runs):
    reports = []
    for first, *others in runs[1]["three"]:
        reports.append(json.loads(first["out"]))
        assert [(other["out"], other["err"]) for other in others] == [("", "")] * len(others)
    assert [report["reused_samples"] for report in reports] == [0, 36]


def test_when_one_is_killed_the_other_ends_with_a_sentence_and_one_pass_is_done_again(runs):
    (main, killed), (first, _) = runs[1]["streamed, killed, two"]
    assert (main["code"], killed["code"]) == (3, -9)
    assert "Another process of this run has died." in main["err"]
    assert 36 > json.loads(first["out"])["reused_samples"] > 18  # a half, and the first pass of the other


def test_machines_that_do_not_share_the_folder_are_told(runs):
    folder, ended = runs
    (main, other) = ended["two disks"][0]
    assert (main["code"], other["code"]) == (3, 3)
    assert "does not see what the first one wrote to" in other["err"]
    assert "Give --out on a disk that all machines share." in other["err"]
    assert main["err"] == ""
    assert not (folder / "two disks" / "cache-1").exists()


def test_helpers_of_processes_that_share_a_machine_are_refused(runs):
    main, other = runs[1]["two, helped"][0]
    assert (main["code"], other["code"]) == (2, 2)
    assert "2 processes share this machine" in main["err"] + other["err"]
