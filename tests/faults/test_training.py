"""What breaks while a draft trains: nothing computed is lost, and the same command goes on to the same bits."""

import os
import shutil
import signal
from pathlib import Path

import pytest

from nemotron_dspark.cache.reader import TargetCache
from nemotron_dspark.config import load_config
from nemotron_dspark.errors import InputError
from nemotron_dspark.training.callbacks import Callback
from nemotron_dspark.training.checkpoints import list_checkpoints
from nemotron_dspark.training.schedule import SampleSchedule
from tests.caches import write_cache
from tests.flips import flipped
from tests.training.runs import train_run
from tests.training.test_kill import ROLLING, SMALL, result
from tests.training.test_run import SETTINGS, TAPS, samples
from tests.training.test_without_cache import SETTINGS as WITHOUT_CACHE
from tests.training.test_without_cache import write_conversations

STEPS = 6
CONFIG = load_config(assignments=[*SETTINGS, f"train.max_steps={STEPS}", "train.checkpoint_every=100"])


@pytest.fixture(scope="module")
def cache(tiny_hybrid, tmp_path_factory):
    """Two epochs of three steps; several shards."""
    folder = tmp_path_factory.mktemp("faults") / "cache"
    extra = {"target_model_name_or_path": str(tiny_hybrid)}
    write_cache(folder, samples(12), taps=TAPS, hidden_size=64, extra=extra, shard_bytes=20_000)
    return folder


@pytest.fixture(scope="module")
def undisturbed(tiny_hybrid, cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults") / "whole"
    train_run(str(tiny_hybrid), cache, folder, CONFIG)
    return result(folder)


@pytest.fixture
def copy(cache, tmp_path):
    return Path(shutil.copytree(cache, tmp_path / "cache"))


def needed_at(cache, step):
    """A sample that is first read for this step, counted from 0."""
    lengths = TargetCache(cache).lengths
    plan = SampleSchedule.of(CONFIG.train, len(lengths))
    before = {sample for earlier in range(step) for sample in plan.samples(earlier, CONFIG.train).tolist()}
    return next(sample for sample in plan.samples(step, CONFIG.train).tolist() if sample not in before)


class Once(Callback):
    """Does something when the run begins."""

    def __init__(self, action):
        self.on_begin = lambda schedule, step: action()


@pytest.mark.parametrize("fault", ["flipped", "gone", "cut off"])
def test_a_fault_of_the_cache_costs_no_step_and_the_same_command_goes_on(
    tiny_hybrid, copy, undisturbed, tmp_path, fault
):
    sample = needed_at(copy, 2)
    opened = TargetCache(copy)
    shard = copy / opened.layout.shard_files[opened.layout.shards[sample]]
    offset, size = opened.layout.fields(sample)[-1]
    content = shard.read_bytes()

    def damage():
        if fault == "flipped":
            shard.write_bytes(content[: offset + 7] + bytes([content[offset + 7] ^ 4]) + content[offset + 8 :])
        elif fault == "gone":
            shard.unlink()
        else:
            os.truncate(shard, offset + size // 2)

    with pytest.raises(InputError, match=rf"{shard.name}: sample \d+") as stopped:
        train_run(str(tiny_hybrid), copy, tmp_path / "run", CONFIG, callbacks=[Once(damage)])
    reached = int(stopped.value.what.removeprefix("Training stopped after step ").split(":")[0])
    newest = [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")][-1:]
    assert newest == ([f"step-{reached:08d}"] if reached else [])
    if fault == "flipped":  # the others may touch samples before this one
        assert reached == 2
        assert f"sample {sample} is not what was written" in stopped.value.what
        assert "Everything until then is saved" in stopped.value.do
    shard.write_bytes(content)
    report = train_run(str(tiny_hybrid), copy, tmp_path / "run", CONFIG)
    assert report.resumed_from == reached
    assert result(tmp_path / "run") == undisturbed


def test_a_cache_that_is_damaged_before_is_refused_before_the_first_step(tiny_hybrid, copy, tmp_path):
    train_run(str(tiny_hybrid), copy, tmp_path / "run", CONFIG)
    with flipped(copy / "samples.idx", 99), pytest.raises(InputError, match=r"samples\.idx"):
        train_run(str(tiny_hybrid), copy, tmp_path / "new", CONFIG)
    assert not (tmp_path / "new").exists()
    (copy / "shard-00001.bin").unlink()
    with pytest.raises(InputError, match=r"shard-00001\.bin is missing"):
        train_run(str(tiny_hybrid), copy, tmp_path / "new", CONFIG)


class StopAt(Callback):
    def __init__(self, step):
        self.step, self.notes = step, []

    def on_micro_batch(self, step, done):
        if step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_message(self, text):
        self.notes.append(text)


def test_a_damaged_segment_of_a_rolling_cache_is_made_again(tiny_hybrid, tmp_path):
    data = write_conversations(tmp_path / "data.jsonl")
    config = load_config(assignments=[*WITHOUT_CACHE, *SMALL, *ROLLING])

    def run(name, *callbacks):
        train_run(str(tiny_hybrid), None, tmp_path / name, config, conversations=data, callbacks=callbacks)

    run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("cut", StopAt(3))
    segment = sorted((tmp_path / "cut" / "segments").iterdir())[0]
    shard = segment / TargetCache(segment).layout.shard_files[-1]
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1
    shard.write_bytes(content)
    with pytest.raises(InputError, match=rf"{shard.name}: sample \d+ is not what was written") as stopped:
        run("cut")
    assert f"Delete {segment}; the same command makes it again" in stopped.value.do
    shutil.rmtree(segment)
    with pytest.raises(KeyboardInterrupt):
        run("cut", StopAt(4))
    with open(segment / "manifest.json", "r+b") as file:
        file.truncate(40)
    watcher = StopAt(None)
    run("cut", watcher)
    assert any("manifest.json is not valid JSON" in note and "made again" in note for note in watcher.notes)
    assert result(tmp_path / "cut") == result(tmp_path / "whole")
