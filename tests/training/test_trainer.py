"""The loop: it learns, repeats itself exactly, stops cleanly, and keeps what was good."""

import errno
import hashlib
import json
import os
import signal
import threading

import pytest
import torch

from nemotron_dspark.drafts.config import Eagle3Config
from nemotron_dspark.drafts.eagle3 import Eagle3Draft
from nemotron_dspark.errors import CheckError, EnvironmentFault, InputError
from nemotron_dspark.training import trainer
from nemotron_dspark.training.callbacks import Callback
from nemotron_dspark.training.checkpoints import list_checkpoints
from nemotron_dspark.training.metrics import read_metrics
from nemotron_dspark.training.schedule import SampleSchedule
from nemotron_dspark.training.trainer import Trainer
from tests.training.conftest import new_draft

TIMED = ("tokens_per_second", "memory_mb")


def weights(draft):
    return {name: parameter.detach().clone() for name, parameter in draft.trainable_parameters().items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def lines(folder):
    return [{key: value for key, value in line.items() if key not in TIMED} for line in read_metrics(folder)]


class StopAt(Callback):
    """Sends this process a signal in the middle of a step."""

    def __init__(self, step, number=signal.SIGTERM):
        self._step, self._number = step, number

    def on_micro_batch(self, step, done):
        if (step, done) == (self._step, 2):
            os.kill(os.getpid(), self._number)


def test_loss_falls_and_acceptance_rises(make_cache, make_draft, make_settings, tmp_path):
    cache = make_cache()
    changes = {"max_steps": 60, "log_every": 1, "checkpoint_every": 60, "local_batch_size": 6, "lr": 3e-2}
    Trainer(cache, make_draft(cache=cache, markov_rank=24), make_settings(**changes), tmp_path).run()
    written = read_metrics(tmp_path)
    assert [line["step"] for line in written] == list(range(1, 61))
    assert written[-1]["loss"] < 0.3 * written[0]["loss"]
    assert written[-1]["tau"] > written[0]["tau"] + 1.5
    assert len(written[-1]["accept_rate"]) == 4
    assert {"ce", "l1", "confidence", "lr", "tokens_per_second", "memory_mb"} <= set(written[-1])


def five_taps(cache):
    for sample in cache:
        sample.taps = torch.cat((sample.taps, sample.taps, sample.last), dim=-1)
    return cache


def new_eagle3(cache, seed=0):
    shape = dict(new_draft().config) | {"target_layer_ids": (0, 1, 2, 3, 4), "num_target_layers": 6, "ttt_length": 3}
    config = Eagle3Config(**{key: shape[key] for key in Eagle3Config.model_fields if key in shape})
    draft = Eagle3Draft(config, seed=seed)
    draft.set_embeddings(cache.embedding, cache.embedding)
    return draft


def test_an_eagle3_draft_is_trained_by_the_same_loop(make_cache, make_settings, tmp_path):
    cache = five_taps(make_cache())
    changes = {"max_steps": 40, "log_every": 1, "checkpoint_every": 40, "local_batch_size": 6, "lr": 1e-2}
    Trainer(cache, new_eagle3(cache), make_settings(**changes), tmp_path).run()
    written = read_metrics(tmp_path)
    assert written[-1]["loss"] < 0.6 * written[0]["loss"]
    assert written[-1]["tau"] > written[0]["tau"] + 0.5
    assert written[-1]["confidence"] is None


def test_a_stopped_eagle3_run_resumes_to_the_same_bits(make_cache, make_settings, tmp_path):
    cache, settings = five_taps(make_cache()), make_settings()
    whole, resumed = new_eagle3(cache), new_eagle3(cache, seed=99)
    Trainer(cache, whole, settings, tmp_path / "whole").run()
    with pytest.raises(KeyboardInterrupt):
        Trainer(cache, new_eagle3(cache), settings, tmp_path / "cut", callbacks=[StopAt(5)]).run()
    assert Trainer(cache, resumed, settings, tmp_path / "cut").run().resumed_from == 5
    assert_same(weights(resumed), weights(whole))
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")


def test_anchors_of_a_sample_do_not_depend_on_its_batch(make_cache, make_draft, make_settings, tmp_path):
    """Six forwards of one sample and one of six: the same blocks, so the same slots count and are accepted alike."""
    cache, rates = make_cache(), []
    for local in (1, 6):
        folder = tmp_path / str(local)
        one_step = make_settings(local_batch_size=local, max_steps=1)
        Trainer(cache, make_draft(cache=cache, num_anchors=4), one_step, folder).run()
        rates.append(read_metrics(folder)[-1]["accept_rate"])
    assert rates[0] == pytest.approx(rates[1], rel=1e-5)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_the_resumed_run_equals_the_undisturbed_one(
    make_cache, make_draft, make_settings, tmp_path, number
):
    cache, settings = make_cache(), make_settings()
    whole = make_draft(cache=cache)
    Trainer(cache, whole, settings, tmp_path / "whole").run()
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        Trainer(cache, make_draft(cache=cache), settings, tmp_path / "cut", callbacks=[StopAt(5, number)]).run()
    assert signal.getsignal(number) is before
    assert list_checkpoints(tmp_path / "cut" / "checkpoints")[-1].name == "step-00000005"
    resumed = make_draft(seed=99, cache=cache)
    result = Trainer(cache, resumed, settings, tmp_path / "cut").run()
    assert result.resumed_from == 5  # between two lines of metrics
    assert_same(weights(resumed), weights(whole))
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")


def test_signal_that_comes_while_the_last_checkpoint_is_written_does_not_cost_it(
    make_cache, make_draft, make_settings, tmp_path, monkeypatch
):
    """As where another rank was signalled a moment before, and this one saves already."""
    cache, settings = make_cache(), make_settings(checkpoint_every=100)
    bad = int(SampleSchedule.of(settings, len(cache)).samples(2, settings)[0])
    real_item, real_save = type(cache).__getitem__, trainer.save_checkpoint

    def damaged(self, index):
        if index == bad:
            raise InputError(f"Sample {bad} is damaged.", "Restore it.")
        return real_item(self, index)

    def signalled(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return real_save(*arguments)

    monkeypatch.setattr(type(cache), "__getitem__", damaged)
    monkeypatch.setattr(trainer, "save_checkpoint", signalled)
    with pytest.raises((InputError, KeyboardInterrupt), match="Training stopped after step 2"):
        Trainer(cache, make_draft(cache=cache), settings, tmp_path).run()
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["step-00000002"]


def test_signal_handling_leaves_other_threads_alone(make_cache, make_draft, make_settings, tmp_path):
    cache, results = make_cache(), []
    thread = threading.Thread(
        target=lambda: results.append(
            Trainer(cache, make_draft(cache=cache), make_settings(max_steps=1), tmp_path).run()
        )
    )
    thread.start()
    thread.join()
    assert results[0].steps == 1


def test_bf16_arithmetic_trains_fp32_parameters_and_resumes_exactly(make_cache, make_draft, make_settings, tmp_path):
    """At this rate one step moves a weight of 1 by less than bf16 can show; only fp32 parameters add such steps up."""
    cache, settings = make_cache(), make_settings(lr=4e-4, max_steps=20, warmup_ratio=0.0, checkpoint_every=100)
    whole = make_draft(cache=cache).bfloat16()
    Trainer(cache, whole, settings, tmp_path / "whole").run()
    assert (whole.norm.weight.dtype, whole.compute_dtype) == (torch.float32, torch.bfloat16)
    assert (whole.norm.weight.bfloat16() != 1).float().mean() > 0.5
    with pytest.raises(KeyboardInterrupt):
        Trainer(cache, make_draft(cache=cache).bfloat16(), settings, tmp_path / "cut", callbacks=[StopAt(7)]).run()
    resumed = make_draft(cache=cache).bfloat16()
    Trainer(cache, resumed, settings, tmp_path / "cut").run()
    assert_same(weights(resumed), weights(whole))


def test_activation_checkpointing_changes_no_weight(make_cache, make_draft, make_settings, tmp_path):
    cache, drafts = make_cache(), []
    for wanted in (False, True):
        drafts.append(make_draft(cache=cache, recompute_layers=wanted))
        Trainer(cache, drafts[-1], make_settings(max_steps=2), tmp_path / str(wanted)).run()
    assert_same(weights(drafts[0]), weights(drafts[1]))


def test_cross_entropy_alone_never_reads_last_hidden_states(make_cache, make_draft, make_settings, tmp_path):
    cache = make_cache()
    for sample in cache._samples:
        sample.last = None
    draft = make_draft(cache=cache, enable_confidence_head=False)
    Trainer(cache, draft, make_settings(l1_alpha=0.0, max_steps=2), tmp_path).run()
    line = read_metrics(tmp_path)[-1]
    assert line["ce"] > 0
    assert line["l1"] is line["tau"] is line["accept_rate"] is None


def test_draft_with_an_untrained_confidence_head_resumes(make_cache, make_draft, make_settings, tmp_path):
    cache, settings = make_cache(), make_settings(confidence_alpha=0.0)
    whole = make_draft(cache=cache)
    Trainer(cache, whole, settings, tmp_path / "whole").run()
    with pytest.raises(KeyboardInterrupt):
        Trainer(cache, make_draft(cache=cache), settings, tmp_path / "cut", callbacks=[StopAt(5)]).run()
    resumed = make_draft(cache=cache)
    Trainer(cache, resumed, settings, tmp_path / "cut").run()
    assert_same(weights(resumed), weights(whole))


def test_loss_that_is_no_number_stops_before_it_reaches_a_weight(make_cache, make_draft, make_settings, tmp_path):
    cache, settings = make_cache(), make_settings(checkpoint_every=1)
    third_step = SampleSchedule.of(settings, len(cache)).micro_batches(2, settings, cache.lengths)
    sample = cache[int(third_step[1][0])]  # epochs are four steps long, so it comes first in the third
    sample.taps = torch.full_like(sample.taps, float("nan"))
    draft = make_draft(cache=cache)
    expected = rf"at step 3: loss nan because of sample {third_step[1][0]};.*step-00000002 is the last good"
    with pytest.raises(CheckError, match=expected):
        Trainer(cache, draft, settings, tmp_path).run()
    assert all(value.isfinite().all() for value in weights(draft).values())


def test_gradient_that_is_no_number_is_traced_to_its_sample(make_cache, make_draft, make_settings, tmp_path):
    """Taps so large that what they do is finite, and the gradient of the weight that makes it so is not."""
    cache, settings = make_cache(dtype=torch.float32), make_settings()
    ids = SampleSchedule.of(settings, len(cache)).samples(0, settings)
    cache[int(ids[2])].taps.fill_(3e38)
    draft = make_draft(cache=cache)
    draft.fc.weight.data.mul_(1e-38)
    expected = rf"at step 1: gradient norm \w+ because of sample {ids[2]}; there was no checkpoint yet"
    with pytest.raises(CheckError, match=expected):
        Trainer(cache, draft, settings, tmp_path).run()


def test_weights_that_have_diverged_are_not_blamed_on_the_samples(make_cache, make_draft, make_settings, tmp_path):
    cache = make_cache()
    draft = make_draft(cache=cache)
    draft.norm.weight.data.fill_(float("inf"))
    with pytest.raises(CheckError, match=r"at step 1: loss nan in every sample; .*Train into another --out"):
        Trainer(cache, draft, make_settings(), tmp_path).run()


def test_damaged_checkpoint_is_passed_over(make_cache, make_draft, make_settings, tmp_path):
    cache, settings = make_cache(), make_settings()
    whole = make_draft(cache=cache)
    Trainer(cache, whole, settings, tmp_path).run()
    last = list_checkpoints(tmp_path / "checkpoints")[-1]
    path = last / "optimiser.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    notes = []
    watcher = Callback()
    watcher.on_message = notes.append
    again = make_draft(cache=cache)
    result = Trainer(cache, again, settings, tmp_path, callbacks=[watcher]).run()
    assert result.resumed_from == 6
    assert "step-00000009 is passed over" in notes[0]
    assert_same(weights(again), weights(whole))
    assert [line["step"] for line in read_metrics(tmp_path)] == [2, 4, 6, 8, 9]


def test_checkpoint_whose_sums_have_no_names_is_refused(make_cache, make_draft, make_settings, tmp_path):
    cache, settings = make_cache(), make_settings(max_steps=3)
    Trainer(cache, make_draft(cache=cache), settings, tmp_path).run()
    (last,) = list_checkpoints(tmp_path / "checkpoints")
    state = json.loads((last / "state.json").read_text())
    assert set(state["sums"]) >= {"loss", "weight", "ce", "l1", "tau", "slots", "accepted"}
    state["window"] = list(range(15))
    del state["sums"]
    (last / "state.json").write_text(json.dumps(state))
    manifest = json.loads((last / "manifest.json").read_text())
    manifest["sha256"]["state.json"] = hashlib.sha256((last / "state.json").read_bytes()).hexdigest()
    (last / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="earlier version"):
        Trainer(cache, make_draft(cache=cache), settings, tmp_path).run()


def test_full_disk_keeps_the_checkpoints_before(make_cache, make_draft, make_settings, tmp_path, monkeypatch):
    cache, settings = make_cache(), make_settings()
    real, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > 18:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(EnvironmentFault, match="disk is full"):
        Trainer(cache, make_draft(cache=cache), settings, tmp_path).run()
    kept = list_checkpoints(tmp_path / "checkpoints")
    assert [path.name for path in kept] == ["step-00000003"]
    assert not list((tmp_path / "checkpoints").glob(".*"))
    monkeypatch.setattr(os, "fsync", real)
    resumed, whole = make_draft(cache=cache), make_draft(cache=cache)
    assert Trainer(cache, resumed, settings, tmp_path).run().resumed_from == 3
    Trainer(cache, whole, settings, tmp_path / "whole").run()
    assert_same(weights(resumed), weights(whole))


def test_batch_sizes_that_do_not_fit_are_named(make_cache, make_draft, make_settings, tmp_path):
    cache = make_cache(8)
    with pytest.raises(InputError, match="8 samples, but one optimiser step takes 9"):
        Trainer(cache, make_draft(), make_settings(local_batch_size=1, global_batch_size=9), tmp_path).run()
    with pytest.raises(InputError, match="not a multiple"):
        Trainer(cache, make_draft(), make_settings(local_batch_size=4), tmp_path).run()


def test_old_checkpoints_are_removed(make_cache, make_draft, make_settings, tmp_path):
    cache = make_cache()
    Trainer(cache, make_draft(cache=cache), make_settings(checkpoint_every=1, keep_checkpoints=3), tmp_path).run()
    names = [path.name for path in list_checkpoints(tmp_path / "checkpoints")]
    assert names == ["step-00000007", "step-00000008", "step-00000009"]
