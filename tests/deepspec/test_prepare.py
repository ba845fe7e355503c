"""Target-cache preparation: our builder in parts, init_distributed into one in DeepSpec's format."""

import dataclasses
import json
import shutil

import pytest
import torch

from nemotron_dspark import stages
from nemotron_dspark.cache.build import build_cache
from nemotron_dspark.cache.reader import TargetCache
from nemotron_dspark.cache.verify import summarise, verify
from nemotron_dspark.config.run import CacheConfig, DataConfig
from nemotron_dspark.deepspec import prepare
from nemotron_dspark.errors import CheckError, InputError

TAPS = (1, 2, 3, 4, 5)


@pytest.fixture
def job(tiny_hybrid, conversations, tmp_path):
    cfg = {
        "model": {"target_model_name_or_path": str(tiny_hybrid), "target_layer_ids": list(TAPS), "mask_token_id": 31},
        "data": {"chat_template": "chatml", "max_length": 96},
        "project_name": "tests",
        "exp_name": "prepare",
    }
    return prepare.Preparation.of(cfg, [conversations], tmp_path / "out", 1, min_loss_tokens=4, shard_bytes=60_000)


@pytest.fixture
def reused_target(target, monkeypatch):
    """Loading and proving the same tiny target for every part would only take time; both are tested elsewhere."""
    monkeypatch.setattr(stages, "load_target", lambda config, load: target)


def with_taps(job, *taps):
    draft = job.config.draft.model_copy(update={"taps": list(taps)})
    return dataclasses.replace(job, config=job.config.model_copy(update={"draft": draft}))


def build(job):
    prepare.begin(job)
    for part in range(job.parts):
        prepare.build_part(job, part)


def same_samples(left, right):
    left, right = TargetCache(left), TargetCache(right)
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a.input_ids, b.input_ids)
        assert torch.equal(a.loss_mask, b.loss_mask)
        # Batches differ, and with them the last bit of a bfloat16.
        torch.testing.assert_close(a.taps.float(), b.taps.float(), rtol=0.02, atol=0.02)
        torch.testing.assert_close(a.last.float(), b.last.float(), rtol=0.02, atol=0.02)


def test_one_machine_writes_the_bytes_of_our_builder(job, target, conversations, tmp_path):
    build(job)  # loads and proves the target itself
    prepare.join(job)
    data, cache = DataConfig(max_length=96, min_loss_tokens=4), CacheConfig(shard_bytes=60_000)
    build_cache(target, conversations, tmp_path / "direct", taps=TAPS, data=data, cache=cache)
    shards = [path.name for path in (tmp_path / "direct").glob("shard-*")]
    assert len(shards) > 1
    for name in (*shards, "samples.idx"):
        assert (job.out / name).read_bytes() == (tmp_path / "direct" / name).read_bytes()
    manifest = json.loads((job.out / "manifest.json").read_text())
    assert manifest["source_jsonl_paths"] == [str(conversations)]
    assert manifest["exp_name"] == "prepare"
    assert verify(job.out).whole
    assert not (job.out / prepare.PARTS).exists()
    assert prepare.begin(job)  # nothing is left to do


def test_parts_of_several_machines_become_one_whole_cache(job, cache, reused_target):
    job = dataclasses.replace(job, parts=3)
    build(job)
    assert prepare.missing_parts(job) == []
    whole = prepare.join(job)
    assert whole.samples == 12
    assert verify(job.out).whole
    assert verify(job.out).files_with_checksums >= whole.shards + 2
    assert summarise(job.out).loss_tokens > 0
    same_samples(job.out, cache)


def test_a_join_that_is_interrupted_is_finished_by_the_next(job, reused_target, monkeypatch):
    job = dataclasses.replace(job, parts=2)
    build(job)
    write = prepare.write_json

    def stop(path, value):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "write_json", stop)  # shards have moved, the index is there, nothing else
    with pytest.raises(KeyboardInterrupt):
        prepare.join(job)
    monkeypatch.setattr(prepare, "write_json", write)
    assert not prepare.begin(job)
    build(job)
    prepare.join(job)
    assert verify(job.out).whole


def test_a_part_that_is_missing_is_waited_for(job, reused_target):
    job = dataclasses.replace(job, parts=2)
    prepare.begin(job)
    prepare.build_part(job, 0)
    told = []

    def other_machine(missing):
        told.append(missing)
        prepare.build_part(job, 1)

    prepare.wait_for_parts(job, other_machine, seconds=0)
    assert told == [[1]]


def test_a_failed_proof_stops_before_anything_is_captured(job, target, monkeypatch):
    def fail(target, taps):
        raise CheckError("The target fails the causality proof.", "Upgrade transformers.")

    monkeypatch.setattr(stages.Target, "of", staticmethod(lambda config: target))
    monkeypatch.setattr(stages.proofs, "prove", fail)
    prepare.begin(job)
    with pytest.raises(CheckError, match="causality"):
        prepare.build_part(job, 0)
    assert prepare.missing_parts(job) == [0]


def test_another_template_other_inputs_and_other_files_are_refused(job, tmp_path):
    with pytest.raises(InputError, match="says the chat template 'nemotron_3'"):
        prepare.begin(dataclasses.replace(job, chat_template="nemotron_3"))
    with pytest.raises(InputError, match="out of range"):
        prepare.begin(with_taps(job, 1, 99))
    with pytest.raises(InputError, match="12 conversations for 13 machines"):
        prepare.begin(dataclasses.replace(job, parts=13))
    with pytest.raises(InputError, match="does not exist"):
        prepare.begin(dataclasses.replace(job, conversations=(tmp_path / "none.jsonl",)))
    prepare.begin(job)
    with pytest.raises(InputError, match="with other settings: taps"):
        prepare.begin(with_taps(job, 1, 3))
    shutil.rmtree(job.out)
    job.out.mkdir()
    (job.out / "thesis.tex").touch()
    with pytest.raises(InputError, match="holds other files"):
        prepare.begin(job)


def test_deepspec_reads_the_joined_cache(deepspec_on_cpu, job, reused_target):
    from deepspec.data import CacheDataset

    job = dataclasses.replace(job, parts=2)
    build(job)
    prepare.join(job)
    ours, theirs = TargetCache(job.out), CacheDataset(str(job.out))
    for index, sample in enumerate(ours):
        found = theirs[index]
        assert torch.equal(found["input_ids"].long(), sample.input_ids)
        assert torch.equal(found["target_hidden_states"], sample.taps)
        assert torch.equal(found["target_last_hidden_states"], sample.last)
    theirs.close()
