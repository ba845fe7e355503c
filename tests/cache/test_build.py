"""A cache holds what the target computes for each conversation, in DeepSpec's bytes, whatever interrupts the build."""

import copy
import json
import shutil
import struct

import numpy as np
import pytest
import torch

from nemotron_dspark.cache import build as room
from nemotron_dspark.cache.batches import batches
from nemotron_dspark.cache.build import build_cache
from nemotron_dspark.cache.deepspec_layout import bytes_per_token
from nemotron_dspark.cache.reader import TargetCache
from nemotron_dspark.cache.verify import verify
from nemotron_dspark.chat.mask import tokenise
from nemotron_dspark.config.run import CacheConfig, DataConfig
from nemotron_dspark.data.conversations import Skipped, read
from nemotron_dspark.errors import CheckError, EnvironmentFault, InputError
from tests.cache.conftest import CACHE, DATA, SAMPLES, TAPS, write_conversations
from tests.chat.chat_templates import NEMOTRON_3


class Interrupting:
    """A target that stops with ``error`` at forward number ``at``."""

    def __init__(self, target, at, error=KeyboardInterrupt):
        self._target, self._left, self._error = target, at, error

    def __getattr__(self, name):
        return getattr(self._target, name)

    def captures(self, batches, *given):
        for batch in batches:
            if self._left == 0:
                raise self._error
            self._left -= 1
            yield from self._target.captures([batch], *given)


def build(target, conversations, folder, **changes):
    return build_cache(target, conversations, folder, **{"taps": TAPS, "data": DATA, "cache": CACHE, **changes})


def test_samples_are_the_targets_own_hidden_states(target, conversations, built):
    cache = TargetCache(built)
    usable = [item for item in read(conversations) if not isinstance(item, Skipped)]
    assert len(cache) == len(usable) == SAMPLES
    assert cache.layout.shard_files[2:]  # several shards
    for sample_id, conversation in enumerate(usable):
        (expected,) = tokenise(target.tokenizer, conversation, max_length=DATA.max_length).samples
        sample = cache[sample_id]
        assert sample.input_ids.tolist() == expected.input_ids.tolist()
        assert sample.loss_mask.tolist() == expected.loss_mask.astype(bool).tolist()
        assert sample.input_ids.dtype == torch.int64
        assert sample.loss_mask.dtype == torch.bool
        captured = target.capture(sample.input_ids[None], None, TAPS)  # alone, not padded in a batch
        for found, exact in ((sample.taps, captured.taps[0]), (sample.last, captured.last[0])):
            assert found.dtype == torch.bfloat16
            torch.testing.assert_close(found.float(), exact, rtol=2**-7, atol=1e-4)


def test_the_files_are_the_format_byte_for_byte(built):
    """Read with nothing but the description of the format."""
    manifest = json.loads((built / "manifest.json").read_bytes())
    layers, hidden = len(manifest["target_layer_ids"]), manifest["hidden_size"]
    index = (built / "samples.idx").read_bytes()
    record = struct.Struct("<QIIQQQQQ")
    assert manifest["index_record_size"] == record.size
    assert len(index) == manifest["num_samples"] * record.size
    cache, expected_shard, end = TargetCache(built), 0, 0
    for number, fields in enumerate(record.iter_unpack(index)):
        sample_id, shard_id, length, *offsets = fields
        assert sample_id == number
        if shard_id != expected_shard:
            assert (built / f"shard-{expected_shard:05d}.bin").stat().st_size == end
            expected_shard, end = shard_id, 0
        sizes = [4 * length, length, length, 2 * length * layers * hidden, 2 * length * hidden]
        assert offsets == [end + sum(sizes[:k]) for k in range(5)]
        data = (built / manifest["shards"][shard_id]["file_name"]).read_bytes()
        parts = [data[offset : offset + size] for offset, size in zip(offsets, sizes, strict=True)]
        sample = cache[number]
        assert parts[0] == sample.input_ids.to(torch.int32).numpy().tobytes()
        assert parts[1] == b"\x01" * length
        assert parts[2] == sample.loss_mask.numpy().astype(np.uint8).tobytes()
        assert parts[3] == sample.taps.view(torch.uint16).numpy().tobytes()
        assert parts[4] == sample.last.view(torch.uint16).numpy().tobytes()
        end += sum(sizes)
        assert end <= CACHE.shard_bytes


def test_the_report_counts_and_lists_what_was_skipped(target, conversations, tmp_path):
    report = build(target, conversations, tmp_path / "c", data=DATA.model_copy(update={"min_loss_tokens": 30}))
    reasons = report.skipped.to_json()
    assert {reason["reason"] for reason in reasons} == {
        "not valid JSON",
        "empty conversation",
        "fewer than 30 loss tokens",
    }
    assert report.samples + report.skipped.total == SAMPLES + 2
    assert report.bytes == report.tokens * bytes_per_token(len(TAPS), target.spec.hidden_size)


def test_long_conversations_are_cut_and_counted(target, conversations, tmp_path):
    report = build(target, conversations, tmp_path / "c", data=DATA.model_copy(update={"max_length": 40}))
    lengths = TargetCache(tmp_path / "c").lengths
    assert lengths.max() == 40
    assert report.cut == (lengths == 40).sum() > 0


def test_batches_cover_every_sample_once_within_their_budget():
    lengths = np.random.default_rng(0).integers(1, 300, size=2000)
    found = list(batches(lengths, 1024))
    assert sorted(sample for batch in found for sample in batch) == list(range(2000))
    assert all(len(batch) * max(lengths[batch]) <= 1024 for batch in found)
    padded = sum(len(batch) * int(max(lengths[batch])) for batch in found)
    assert padded < 1.04 * lengths.sum()


def test_batches_are_known_before_what_follows_them_is():
    lengths = np.random.default_rng(1).integers(1, 300, size=4000)
    found, beginning = list(batches(lengths, 1024)), list(batches(lengths[:2000], 1024))
    assert found[: len(beginning) // 2] == beginning[: len(beginning) // 2]


@pytest.mark.parametrize("at", [0, 1, 4])
def test_an_interrupted_build_ends_in_the_same_bytes(target, conversations, built, contents, tmp_path, at):
    folder = tmp_path / "c"
    with pytest.raises(KeyboardInterrupt):
        build(Interrupting(target, at), conversations, folder)
    with pytest.raises(InputError, match="unfinished"):
        TargetCache(folder)
    steps = []
    report = build(target, conversations, folder, on_progress=steps.append)
    assert contents(folder) == contents(built)
    assert (report.reused_samples > 0) == (at > 0)
    assert steps[-1].samples == steps[-1].total_samples == SAMPLES


def test_what_is_durable_is_not_computed_again(target, conversations, built, tmp_path):
    total = len(list(batches(TargetCache(built).lengths, CACHE.batch_tokens)))
    with pytest.raises(KeyboardInterrupt):
        build(Interrupting(target, total - 1), conversations, tmp_path / "c")
    build(Interrupting(target, 1), conversations, tmp_path / "c")  # one forward is all that was left


def test_a_finished_build_is_left_alone(target, conversations, built, contents, tmp_path):
    folder = shutil.copytree(built, tmp_path / "c")
    report = build(Interrupting(target, 0), conversations, folder)
    assert report.reused_samples == SAMPLES
    assert contents(folder) == contents(built)


@pytest.mark.parametrize("lost", ["shard", "partial", "journal tail", "truncated shard"])
def test_damage_to_unfinished_work_costs_only_that_work(target, conversations, built, contents, tmp_path, lost):
    folder = tmp_path / "c"
    total = len(list(batches(TargetCache(built).lengths, CACHE.batch_tokens)))
    with pytest.raises(KeyboardInterrupt):
        build(Interrupting(target, total - 2), conversations, folder)
    done, partial = sorted(folder.glob("shard-*.bin")), sorted(folder.glob(".build/*.partial"))
    assert done
    if lost == "shard":
        done[0].unlink()
    elif lost == "truncated shard":
        done[0].write_bytes(done[0].read_bytes()[:-10])
    elif lost == "journal tail":
        journal = folder / ".build/written.journal"
        journal.write_bytes(journal.read_bytes()[:-5] + b"\0" * 40)
    else:
        assert partial
        partial[0].unlink()
    build(target, conversations, folder)
    assert contents(folder) == contents(built)


def test_a_full_disk_stops_the_build_and_loses_nothing(target, conversations, built, contents, tmp_path, monkeypatch):
    folder, written = tmp_path / "c", 0
    real = room.CacheWriter.commit.__globals__["os"].pwrite

    def pwrite(descriptor, data, offset):
        nonlocal written
        written += len(data)
        if written > 300_000:
            raise OSError(28, "No space left on device")
        return real(descriptor, data, offset)

    with monkeypatch.context() as patched:
        patched.setattr("os.pwrite", pwrite)
        with pytest.raises(EnvironmentFault, match="disk is full") as caught:
            build(target, conversations, folder)
    assert caught.value.exit_code == 3
    report = build(target, conversations, folder)
    assert report.reused_samples > 0
    assert contents(folder) == contents(built)


def test_too_little_space_is_known_before_the_target_runs(target, conversations, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(EnvironmentFault, match="kB free"):
        build(Interrupting(target, 0), conversations, tmp_path / "c")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"taps": (1, 5)}, r"taps was \[1, 4\], now it is \[1, 5\]"),
        ({"data": DATA.model_copy(update={"max_length": 99})}, r"data\.max_length was 160, now it is 99"),
        ({"cache": CacheConfig(shard_bytes=120_000, batch_tokens=300)}, r"cache\.batch_tokens was 256, now it is 300"),
    ],
)
def test_a_folder_of_other_inputs_is_refused(target, conversations, built, changes, named):
    with pytest.raises(InputError, match=f"a cache with other settings: {named}"):
        build(target, conversations, built, **changes)


def test_changed_data_or_weights_are_seen(target, conversations, built, tmp_path):
    with pytest.raises(InputError, match="a cache made from other conversations"):
        build(target, write_conversations(tmp_path / "other.jsonl", 9), built)
    folder = shutil.copytree(target.folder, tmp_path / "target")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    tuned = Interrupting(target, 0)
    tuned.folder = folder
    with pytest.raises(InputError, match="a cache made from a target with other weights"):
        build(tuned, conversations, built)


def test_a_folder_with_other_files_is_refused(target, conversations, tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(InputError, match=r"mine\.txt"):
        build(target, conversations, tmp_path)
    with pytest.raises(InputError, match="is a file"):
        build(target, conversations, tmp_path / "mine.txt")


def test_two_builds_of_one_folder_are_refused(target, conversations, tmp_path):
    class Nested(Interrupting):
        def captures(self, *given):
            with pytest.raises(EnvironmentFault, match="Another process"):
                build(target, conversations, tmp_path / "c")
            return target.captures(*given)

    build(Nested(target, 99), conversations, tmp_path / "c")


def test_data_with_the_mask_token_is_refused_by_line(target, tmp_path):
    path = tmp_path / "data.jsonl"
    answer = "state of a hybrid " * 3
    lines = [
        {"conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": a}]}
        for a in (answer, answer + "<SPECIAL_31>")
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(InputError, match=r"data.jsonl:2 contains the draft's mask token 31"):
        build(target, path, tmp_path / "c", mask_token_id=31)
    report = build(target, path, tmp_path / "c", mask_token_id=30)  # nothing of the refused one is in the way
    assert report.samples == 2


def test_hidden_states_that_are_not_finite_stop_the_build(target, conversations, tmp_path):
    class Broken(Interrupting):
        def captures(self, *given):
            for captured in target.captures(*given):
                captured.last[0, 0, 0] = float("nan")
                yield captured

    with pytest.raises(CheckError, match="not finite"):
        build(Broken(target, 9), conversations, tmp_path / "c")


def test_no_usable_sample_is_said(target, conversations, tmp_path):
    with pytest.raises(InputError, match="fewer than 999 loss tokens"):
        build(target, conversations, tmp_path / "c", data=DataConfig(min_loss_tokens=999))


def test_checksums_name_every_file_of_the_cache(built):
    assert verify(built).files_with_checksums == len(list(built.iterdir())) - 1  # all but the checksums themselves
    assert verify(built).whole


def test_a_conversation_of_several_samples_is_built_and_resumed_like_any_other(target, tmp_path, contents):
    class Reasoning(Interrupting):
        """The target with a chat template that drops the reasoning of earlier turns."""

        def __init__(self, at):
            super().__init__(target, at)
            self.tokenizer = copy.deepcopy(target.tokenizer)
            self.tokenizer.chat_template = NEMOTRON_3

    path = tmp_path / "data.jsonl"
    answer = "<think>why</think>state of a hybrid"
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}]
    path.write_text("\n".join(json.dumps({"conversations": turns * (1 + n % 3)}) for n in range(9)))
    report = build(Reasoning(99), path, tmp_path / "whole")
    assert report.samples == 3 * (1 + 2 + 3)
    cache = TargetCache(tmp_path / "whole")
    losses = [target.tokenizer.decode(sample.input_ids[sample.loss_mask]) for sample in cache]
    assert losses == ["why</think>state of a hybrid<|im_end|>"] * 18
    with pytest.raises(KeyboardInterrupt):
        build(Reasoning(1), path, tmp_path / "stopped")
    build(Reasoning(99), path, tmp_path / "stopped")
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")
