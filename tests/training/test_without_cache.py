"""The target beside the draft, in the loop or a segment ahead: the same training as on a cache, without the cache."""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from nemotron_dspark.cache.build import build_cache
from nemotron_dspark.cache.reader import TargetCache
from nemotron_dspark.cli import app
from nemotron_dspark.config import TrainConfig, load_config
from nemotron_dspark.drafts.dspark import DSparkDraft
from nemotron_dspark.errors import CheckError, EnvironmentFault, InputError
from nemotron_dspark.targets import Target, proofs
from nemotron_dspark.targets.streamed import StreamedTarget
from nemotron_dspark.training import run_folder
from nemotron_dspark.training.callbacks import Callback
from nemotron_dspark.training.display import Display
from nemotron_dspark.training.metrics import read_metrics
from nemotron_dspark.training.rolling import RollingSource
from nemotron_dspark.training.schedule import RollingSchedule, SampleSchedule
from nemotron_dspark.training.source import CacheSource
from nemotron_dspark.training.trainer import Trainer
from tests.training.runs import TINY, train_run

SETTINGS = (
    *TINY,
    "data.max_length=100",
    "train.max_steps=8",
    "train.local_batch_size=3",
    "train.global_batch_size=9",
    "train.checkpoint_every=2",
    "cache.shard_bytes=100000",
    "cache.batch_tokens=400",
)


def config(*more):
    return load_config(assignments=[*SETTINGS, *more])


def write_conversations(path, count=24):
    with open(path, "w") as file:
        for n in range(count):
            turns = [("user", f"question {n} " * (1 + n % 5)), ("assistant", "state of a hybrid " * (1 + n * 7 % 6))]
            file.write(json.dumps({"conversations": [{"role": r, "content": c} for r, c in turns]}) + "\n")
    return path


@pytest.fixture(scope="session")
def conversations(tmp_path_factory):
    return write_conversations(tmp_path_factory.mktemp("online") / "data.jsonl")


@pytest.fixture(scope="session")
def cache(tiny_hybrid, conversations, tmp_path_factory):
    folder, asked = tmp_path_factory.mktemp("online") / "cache", config()
    target = Target.load(str(tiny_hybrid), device="cpu")
    build_cache(target, conversations, folder, taps=(1, 4), data=asked.data, cache=asked.cache)
    return folder


@pytest.fixture(scope="session")
def cached_run(tiny_hybrid, cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("online") / "cached"
    train_run(str(tiny_hybrid), cache, folder, config())
    return folder


@pytest.fixture
def run(tiny_hybrid, conversations, tmp_path):
    """Train on conversations: run(folder name, settings)."""

    def run(name="run", *settings, data=conversations, **options):
        path = Path(tmp_path, name)
        return train_run(str(tiny_hybrid), None, path, config(*settings), conversations=data, **options)

    return run


def weights(folder):
    return DSparkDraft.load(Path(folder) / "draft").trainable_parameters()


def assert_close(found, expected):
    """Losses to 1e-5. Weights to 1e-4: where a hidden state is between two bf16 numbers, other company rounds it to the
    other one, and Adam's steps are as large for a gradient that is nearly nothing.
    """
    for name, value in weights(expected).items():
        assert (weights(found)[name] - value).norm() <= 1e-4 * value.norm(), name
    for here, there in zip(read_metrics(Path(found)), read_metrics(Path(expected)), strict=True):
        assert here["loss"] == pytest.approx(there["loss"], rel=1e-5)


def assert_same_bits(found, expected):
    name = "draft/model.safetensors"
    assert Path(found, name).read_bytes() == Path(expected, name).read_bytes()
    timed = ("tokens_per_second", "memory_mb")
    lines = [
        [{key: value for key, value in line.items() if key not in timed} for line in read_metrics(Path(folder))]
        for folder in (found, expected)
    ]
    assert lines[0] == lines[1]


def test_online_training_equals_cached_training(run, cache, cached_run):
    lengths, asked = TargetCache(cache).lengths, config().train
    forwards = SampleSchedule.of(asked, len(lengths)).micro_batches(0, asked, lengths)
    assert len(forwards) == 3
    assert any(len(set(lengths[ids])) > 1 for ids in forwards)  # there is padding
    report = run()
    assert (report.mode, report.samples, report.steps) == ("online", len(lengths), 8)
    assert_close(report.run_folder, cached_run)


def test_where_the_target_sees_one_sample_at_a_time_online_equals_cached_to_the_bit(
    run, tiny_hybrid, conversations, tmp_path
):
    alone = ("cache.batch_tokens=1", "train.local_batch_size=1")
    asked, cache = config(*alone), tmp_path / "cache"
    target = Target.load(str(tiny_hybrid), device="cpu")
    build_cache(target, conversations, cache, taps=(1, 4), data=asked.data, cache=asked.cache)
    train_run(str(tiny_hybrid), cache, tmp_path / "cached", asked)
    assert_same_bits(run("online", *alone).run_folder, tmp_path / "cached")


def test_no_hidden_state_is_written_and_the_target_runs_once_a_forward(run, monkeypatch):
    rows, capture = [], Target.capture

    def counted(self, input_ids, mask, taps):
        rows.append(len(input_ids))
        return capture(self, input_ids, mask, taps)

    monkeypatch.setattr(Target, "capture", counted)
    folder = Path(run().run_folder)
    assert rows == [3] * 24  # eight steps of three forwards
    files = {path.relative_to(folder).parts[0] for path in folder.rglob("*") if path.is_file()}
    assert files <= {"run.json", "config.yaml", "metrics.jsonl", "tensorboard", "checkpoints", "draft", "samples"}
    assert {path.name for path in (folder / "samples").iterdir()} == {"tokens.bin", "samples.bin", "samples.json"}


def test_finished_run_does_not_load_the_target_again(run, monkeypatch):
    run()
    monkeypatch.setattr(Target, "load", lambda *_, **__: pytest.fail("the target was loaded"))
    assert run().final is None


def test_training_on_a_cache_never_loads_the_target(tiny_hybrid, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(Target, "load", lambda *_, **__: pytest.fail("the target was loaded"))
    asked = config("target.proofs=true", "train.max_steps=1")
    assert train_run(str(tiny_hybrid), cache, tmp_path / "run", asked).mode == "cached"


def test_proofs_come_before_the_first_step(run, monkeypatch):
    def failing(target, taps):
        assert taps == (1, 4)
        raise CheckError("The target fails a proof.", "Do something.")

    class NoStep(Callback):
        def on_micro_batch(self, step, done):
            pytest.fail("a step was taken")

    monkeypatch.setattr(proofs, "prove", failing)
    with pytest.raises(CheckError, match="fails a proof"):
        run("run", "target.proofs=true", callbacks=[NoStep()])


def test_other_data_or_another_target_does_not_mix_into_a_run(run, tiny_hybrid, tmp_path, conversations, cache):
    run("run", "train.max_steps=1")
    before = (tmp_path / "run" / "samples" / "tokens.bin").read_bytes()
    with pytest.raises(InputError, match="a run made from other conversations"):
        run("run", "train.max_steps=1", data=write_conversations(tmp_path / "more.jsonl", 25))
    with pytest.raises(InputError, match=r"data\.max_length was 100, now it is 90"):
        run("run", "train.max_steps=1", "data.max_length=90")
    with pytest.raises(InputError, match="mode was 'online', now it is 'cached'"):
        train_run(str(tiny_hybrid), cache, tmp_path / "run", config("train.max_steps=1"))
    copy = shutil.copytree(tiny_hybrid, tmp_path / "target")
    begun = ("train.max_steps=1",)
    train_run(str(copy), None, tmp_path / "other", config(*begun), conversations=conversations)
    weights_file = copy / "model.safetensors"
    content = bytearray(weights_file.read_bytes())
    content[-1] ^= 1
    weights_file.write_bytes(content)
    with pytest.raises(InputError, match="a run made from a target with other weights"):
        train_run(str(copy), None, tmp_path / "other", config(*begun), conversations=conversations)
    assert (tmp_path / "run" / "samples" / "tokens.bin").read_bytes() == before


def test_data_that_cannot_be_used_leaves_the_folder_free_for_better_data(run, tmp_path, conversations):
    used = np.fromfile(Path(run("any", "train.max_steps=1").run_folder) / "samples" / "tokens.bin", "<i4", count=12)
    with pytest.raises(InputError, match=r"data.jsonl:1 contains the draft's mask token"):
        run("run", f"draft.mask_token_id={used[9]}")
    with pytest.raises(InputError, match="24 samples, but one optimiser step takes 30"):
        run("run", "train.global_batch_size=30")
    with pytest.raises(InputError, match="leaves no sample"):
        run("run", "data.min_loss_tokens=1000")
    with pytest.raises(InputError, match=r"missing.jsonl does not exist"):
        run("run", data=tmp_path / "missing.jsonl")
    assert not (tmp_path / "run" / run_folder.RUN_FILE).exists()
    assert run("run", "train.max_steps=1").steps == 1


def test_a_stop_is_heard_while_the_loop_waits_for_the_target(make_cache, make_draft, make_settings, tmp_path):
    class Blocking(CacheSource):
        released, over = threading.Event(), []

        def samples(self, ids, step):
            os.kill(os.getpid(), signal.SIGTERM)
            self.released.wait(60)
            self.over.append(step)
            return super().samples(ids, step)

    cache = make_cache()
    with pytest.raises(KeyboardInterrupt):
        Trainer(Blocking(cache), make_draft(cache=cache), make_settings(), tmp_path).run()
    assert Blocking.over == []
    Blocking.released.set()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("target", "draft"), [("cuda", "cuda"), ("cpu", "cuda"), ("cuda", "cpu")])
def test_target_and_draft_on_any_devices(run, cached_run, target, draft):
    devices = (f"target.device={target}", f"train.device={draft}", "target.dtype=float32", "train.precision=fp32")
    report = run("run", *devices, "train.attention=dense")
    last = read_metrics(cached_run)[-1]["loss"]
    assert report.final.loss == pytest.approx(last, rel=1e-3)


def test_a_terminal_shows_what_goes_on_before_and_beside_the_steps():
    shown = io.StringIO()
    with Display(Console(file=shown, force_terminal=True, width=160)) as watcher:
        watcher.on_status("loading the target [1]")
        watcher.on_begin(SampleSchedule(12, 4, 8, 3, rank=0, world_size=1), 0)
        watcher.on_micro_batch(0, 1)
        watcher.on_status("target, for steps 5-8: 40%")
    text = shown.getvalue()
    assert "loading the target [1]" in text
    last = text[text.rindex("step 0/8") :]
    assert "target, for steps 5-8: 40%" in last
    assert "loading" not in last


def nds(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_command_without_cache_and_data_names_both_ways(tiny_hybrid, conversations, cache):
    for given, named in (((), "`--data answers.jsonl`"), (("--data", conversations, "--cache", cache), "--data conv")):
        result = nds("train", "--target", tiny_hybrid, *given)
        assert isinstance(result.exception, InputError)
        assert result.exception.exit_code == 2
        assert f"nds cache build --target {tiny_hybrid} --data" in result.exception.do
        assert named in result.exception.do
    assert "both" in result.exception.what.lower()


def test_command_trains_on_conversations_and_says_what_it_does(tiny_hybrid, conversations, tmp_path):
    options = [part for setting in SETTINGS if "taps" not in setting for part in ("--set", setting)]
    out = tmp_path / "run"
    words = ("train", "-t", tiny_hybrid, "--data", conversations, "--taps", "1,4", "--out", out, *options)
    result = nds(*words, "--set", "train.max_steps=2", "--json")
    assert result.exit_code == 0, result.exception
    assert json.loads(result.stdout)["mode"] == "online"
    assert "online: the target runs in the training loop; 24 samples" in result.stderr
    assert "No hidden states are written" in result.stderr
    shown = nds(*words, "--set", "train.max_steps=2")
    assert "online" in shown.stdout


def test_checkpoints_take_the_disk_that_was_announced(cached_run):
    from nemotron_dspark.training.checkpoints import expected_disk

    draft = DSparkDraft.load(cached_run / "draft")
    kept = [path for path in (cached_run / "checkpoints").rglob("*") if path.is_file()]
    sizes = sum(path.stat().st_size for path in [*kept, *(cached_run / "draft").iterdir()])
    one = sum(path.stat().st_size for path in kept) / 2
    assert expected_disk(draft, config().train.keep_checkpoints + 1) == pytest.approx(sizes + one, rel=0.1)


def test_states_are_those_of_the_model(tiny_hybrid, cache):
    """What online training reads of a padded batch is, row by row, what the target says of the sample alone."""
    from nemotron_dspark.cache.capture import capture_states
    from nemotron_dspark.chat.mask import Tokenised

    target, stored = Target.load(str(tiny_hybrid), device="cpu"), TargetCache(cache)
    samples = [Tokenised(stored[n].input_ids.numpy(), stored[n].loss_mask.numpy()) for n in range(4)]
    (states,) = capture_states(target, [samples], (1, 4))
    states.check_finite(range(4))
    taps, last = states.taps, states.last
    assert taps.dtype == last.dtype == torch.bfloat16
    for row, sample in enumerate(samples):
        alone = target.capture(torch.from_numpy(sample.input_ids)[None], None, (1, 4))
        length = len(sample.input_ids)
        torch.testing.assert_close(taps[row, :length].float(), alone.taps[0], rtol=1e-2, atol=1e-3)
        torch.testing.assert_close(last[row, :length].float(), alone.last[0], rtol=1e-2, atol=1e-3)


# --- rolling ---

ROLLING = (
    "cache.mode=rolling",
    "cache.budget_gb=0.0006",
    "cache.reuse=2",
    "train.global_batch_size=6",
    "train.max_steps=null",
    "train.epochs=3",
)


def rolling_plan(budget, reuse=2, samples=40, **changes):
    values = {"global_batch_size": 4, "local_batch_size": 2, "epochs": 5} | changes
    sizes = np.random.default_rng(0).integers(1000, 9000, size=samples)
    asked = TrainConfig(**values)
    return RollingSchedule.rolling(asked, sizes, budget=budget, reuse=reuse), asked, sizes


def test_segments_fit_their_budget_and_cover_the_data_as_often_as_asked():
    plan, asked, sizes = rolling_plan(120_000)
    segments = list(plan.segments(0))
    assert plan.total_steps == 5 * 10 == sum(segment.steps * segment.epochs for segment in segments)
    assert [segment.first_step for segment in segments[1:]] == [segment.stop_step for segment in segments[:-1]]
    assert all(sizes[segment.ids].sum() == segment.size <= 60_000 for segment in segments)
    assert {segment.epochs for segment in segments} == {2, 1}  # two cycles of two epochs, one of one
    taken = np.zeros((5, 40), dtype=int)
    for step in range(plan.total_steps):
        ids = plan.samples(step, asked)
        assert set(ids.tolist()) <= set(plan.segment(step).ids.tolist())
        taken[plan.sample_epoch(step), ids] += 1
        assert plan.must_save(step + 1) == (plan.segment(step).stop_step == step + 1)
    assert (taken == 1).all()  # each epoch, each sample once
    first, other = (set(plan.segment(step).ids.tolist()) for step in (0, 20))
    assert first != other  # cycles mix the data anew


def test_a_budget_that_holds_everything_has_the_steps_of_a_cache():
    rolled, asked, sizes = rolling_plan(10**9, samples=42)
    plain = SampleSchedule.of(asked, 42)
    assert len(list(rolled.segments(0))) == 1
    lengths = sizes // 100
    for step in range(plain.total_steps):
        for one, other in zip(
            rolled.micro_batches(step, asked, lengths), plain.micro_batches(step, asked, lengths), strict=True
        ):
            assert one.tolist() == other.tolist()
        assert rolled.sample_epoch(step) == plain.sample_epoch(step)


def test_steps_that_end_early_end_the_last_segment():
    plan, _, _ = rolling_plan(120_000, max_steps=17)
    assert list(plan.segments(0))[-1].stop_step >= 17 == plan.total_steps
    assert plan.must_save(17)


def test_a_budget_below_two_steps_is_refused_with_the_one_that_is_needed():
    with pytest.raises(InputError, match=r"cache.budget_gb") as refused:
        rolling_plan(40_000)
    needed = float(refused.value.do.split("at least ")[1].split(",")[0])
    rolling_plan(int(needed * 1e9))


def test_rolling_over_a_budget_that_holds_everything_equals_cached_training_bit_for_bit(run, cached_run):
    report = run("run", "cache.mode=rolling")
    assert report.mode == "rolling"
    assert_same_bits(report.run_folder, cached_run)


def test_segments_of_a_streamed_target_train_the_same_bits_and_a_slow_disk_is_said(run, cached_run, monkeypatch):
    monkeypatch.setattr(StreamedTarget, "remarks", lambda self: ("A faster disk would help.",))
    told, watcher = [], Callback()
    watcher.on_message = told.append
    report = run("run", "cache.mode=rolling", "target.stream=on", callbacks=[watcher])
    assert_same_bits(report.run_folder, cached_run)
    assert told.count("A faster disk would help.") == 1


def test_a_rolling_cache_may_be_compact(run, tiny_hybrid, conversations, tmp_path):
    asked = config("cache.format=compact", "train.max_steps=4")
    target = Target.load(str(tiny_hybrid), device="cpu")
    build_cache(target, conversations, tmp_path / "cache", taps=(1, 4), data=asked.data, cache=asked.cache)
    train_run(str(tiny_hybrid), tmp_path / "cache", tmp_path / "cached", asked)
    told, watcher = [], Callback()
    watcher.on_message = told.append
    report = run("run", "cache.mode=rolling", "cache.format=compact", "train.max_steps=4", callbacks=[watcher])
    assert_same_bits(report.run_folder, tmp_path / "cached")
    whole = sum(path.stat().st_size for path in (tmp_path / "cache").glob("*.safetensors"))
    (said,) = (text for text in told if "of hidden states fit" in text)
    assert 0 < whole - 1000 * float(re.search(r"All ([\d.]+) kB", said).group(1)) < 3000


class Disk(Callback):
    """The most bytes of hidden states that were ever there; the first step leaves the target time to run too far."""

    def __init__(self, folder):
        self.folder, self.most, self.notes, self.third = folder, 0, [], threading.Event()

    def on_micro_batch(self, step, done):
        if (step, done) == (0, 1):
            assert not self.third.wait(2)
        self.look()

    def on_status(self, text):
        self.look()

    def on_message(self, text):
        self.notes.append(text)
        if sum(note.startswith("hidden states for") for note in self.notes) == 3:
            self.third.set()

    def look(self):
        found = 0
        for folder, _, names in os.walk(self.folder / "segments"):  # passes over what is being removed
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    found += os.stat(os.path.join(folder, name)).st_size if name.startswith("shard") else 0
        self.most = max(self.most, found)


def test_segments_are_replaced_within_the_budget(run, tmp_path, monkeypatch):
    rows, capture = [], Target.capture

    def counted(self, input_ids, mask, taps):
        rows.append(len(input_ids))
        return capture(self, input_ids, mask, taps)

    monkeypatch.setattr(Target, "capture", counted)
    disk = Disk(tmp_path / "run")
    report = run("run", *ROLLING, callbacks=[disk])
    assert report.steps == 12
    assert sum(rows) == 2 * 24  # two cycles over the data for three epochs
    made = [note for note in disk.notes if note.startswith("hidden states for steps")]
    assert len(made) >= 4
    assert 300_000 < disk.most <= 600_000
    assert not (tmp_path / "run" / "segments").exists()
    assert any("at most 600 kB are on the disk" in note for note in disk.notes)


def test_a_segment_that_is_gone_is_made_again(run, tmp_path):
    """A damaged checkpoint sends the run back to a segment that has been replaced."""
    run("whole", *ROLLING)

    class Stop(Callback):
        def on_micro_batch(self, step, done):
            if step == 9:
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        run("cut", *ROLLING, callbacks=[Stop()])
    checkpoints = sorted((tmp_path / "cut" / "checkpoints").iterdir())
    assert checkpoints[-1].name == "step-00000009"
    damaged = checkpoints[-1] / "optimiser.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    shutil.rmtree(tmp_path / "cut" / "segments")
    assert run("cut", *ROLLING).resumed_from == 8
    assert_same_bits(tmp_path / "cut", tmp_path / "whole")


def test_a_stop_leaves_a_segment_to_be_finished(run, tmp_path, monkeypatch):
    run("whole", *ROLLING)
    capture, close, closing, calls = Target.capture, RollingSource.close, threading.Event(), []

    def stopping(self, input_ids, mask, taps):
        calls.append(len(input_ids))
        while signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:  # the loop has not begun to listen
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)
        assert closing.wait(60)
        return capture(self, input_ids, mask, taps)

    with monkeypatch.context() as patched:
        patched.setattr(Target, "capture", stopping)
        patched.setattr(RollingSource, "close", lambda self: (closing.set(), close(self)))
        with pytest.raises(KeyboardInterrupt):
            run("cut", *ROLLING)
    assert len(calls) == 1
    run("cut", *ROLLING)
    assert_same_bits(tmp_path / "cut", tmp_path / "whole")


def test_what_stops_the_target_stops_the_training(run, monkeypatch):
    capture = Target.capture

    def broken(self, input_ids, mask, taps):
        found = capture(self, input_ids, mask, taps)
        found.last[0, 0] = float("nan")
        return found

    monkeypatch.setattr(Target, "capture", broken)
    with pytest.raises(CheckError, match="are not finite"):
        run("run", *ROLLING)


def test_a_disk_without_room_is_said_before_the_target_is_loaded(run, monkeypatch):
    monkeypatch.setattr(Target, "load", lambda *_, **__: pytest.fail("the target was loaded"))
    usage = shutil.disk_usage
    full = usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full if Path(path).name == "segments" else usage(path))
    with pytest.raises(EnvironmentFault, match=r"hidden states need .* more, and .* has 1 kB free"):
        run("run", *ROLLING)


def test_other_segments_do_not_mix_into_a_run(run):
    run("run", *ROLLING)
    with pytest.raises(InputError, match=r"cache\.reuse was 2, now it is 3"):
        run("run", *ROLLING, "cache.reuse=3")
