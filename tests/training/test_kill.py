"""kill -9 anywhere in a run, however it gets its hidden states: what comes out is what an undisturbed run leaves."""

import json
from pathlib import Path

import pytest

from nemotron_dspark.cache.build import build_cache
from nemotron_dspark.config import RunConfig, load_config
from nemotron_dspark.targets import Target
from nemotron_dspark.training.checkpoints import list_checkpoints
from nemotron_dspark.training.metrics import read_metrics
from tests.kill9 import apart, kill_often
from tests.training.runs import train_run
from tests.training.test_without_cache import SETTINGS, write_conversations

SMALL = (
    "train.global_batch_size=6",
    "train.max_steps=8",
    "train.log_every=2",
    "train.checkpoint_every=2",
    "data.max_length=60",
)
ROLLING = (
    "cache.mode=rolling",
    "cache.budget_gb=0.0006",
    "cache.reuse=2",
    "train.max_steps=null",
    "train.epochs=3",
)


def train_and_kill(target: str, conversations: Path, folder: Path, config: RunConfig, cached: bool, kills: int):
    cache = folder / "cache" if cached else None
    loaded = Target.load(target, device="cpu")  # once, what can be remembered is remembered in every fork
    if cached:
        build_cache(loaded, conversations, cache, taps=(1, 4), data=config.data, cache=config.cache)

    def run(folder: Path) -> None:
        train_run(target, cache, folder, config, conversations=None if cached else conversations)

    return kill_often(run, folder, kills, seed=3, look=newest_step)


def newest_step(folder: Path) -> int:
    found = list_checkpoints(folder / "checkpoints")
    return int(found[-1].name.removeprefix("step-")) if found else 0


def result(folder: Path) -> tuple[bytes, bytes, list[dict]]:
    timed = ("tokens_per_second", "memory_mb")
    lines = [{key: value for key, value in line.items() if key not in timed} for line in read_metrics(folder)]
    last = list_checkpoints(folder / "checkpoints")[-1]
    moments = (last / "optimiser.safetensors").read_bytes()
    return (folder / "draft" / "model.safetensors").read_bytes(), moments, lines


@pytest.mark.parametrize(
    ("kills", "settings"),
    [
        pytest.param(20, ("cache.mode=online",), id="cached"),
        pytest.param(4, ("cache.mode=online",), id="online"),
        pytest.param(6, ROLLING, id="rolling"),
    ],
)
def test_a_run_killed_again_and_again_equals_the_undisturbed_one(kills, settings, request, tiny_hybrid, tmp_path):
    data = write_conversations(tmp_path / "data.jsonl")
    config = load_config(assignments=[*SETTINGS, *SMALL, *settings])
    cached = request.node.callspec.id == "cached"
    folders, reached = apart(train_and_kill, str(tiny_hybrid), data, tmp_path, config, cached, kills)
    assert len(reached) == kills
    assert len(set(reached)) > 1  # the kills fell into different steps
    undisturbed = result(folders[0])
    steps = [json.loads(line)["step"] for line in (folders[0] / "metrics.jsonl").read_text().splitlines()]
    assert steps == [*range(2, steps[-1], 2), steps[-1]]
    for folder in folders[1:]:
        assert result(folder) == undisturbed
