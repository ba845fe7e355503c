"""DeepSpec's own code reads our caches and we read its. Needs a checkout; none of it is copied here."""

import os
import sys

import pytest
import torch

from nemotron_dspark.cache.reader import TargetCache
from nemotron_dspark.cache.verify import verify

pytestmark = pytest.mark.deepspec


@pytest.fixture(scope="module")
def theirs():
    home = os.environ.get("DEEPSPEC_HOME")
    if not home:
        pytest.skip("DEEPSPEC_HOME does not point at a DeepSpec checkout")
    sys.path.insert(0, home)
    try:
        return pytest.importorskip("deepspec.data.target_cache_dataset", exc_type=ImportError)
    finally:
        sys.path.remove(home)


def test_deepspec_reads_our_cache(theirs, built):
    dataset, ours = theirs.CacheDataset(str(built)), TargetCache(built)
    assert len(dataset) == len(ours)
    for sample, found in zip(ours, (dataset[i] for i in range(len(dataset))), strict=True):
        assert torch.equal(found["input_ids"].long(), sample.input_ids)
        assert torch.equal(found["loss_mask"].bool(), sample.loss_mask)
        assert torch.equal(found["target_hidden_states"], sample.taps)
        assert torch.equal(found["target_last_hidden_states"], sample.last)
    dataset.close()


def test_deepspec_writes_the_same_bytes(theirs, built, tmp_path):
    """Its writer, given our samples and shard size, makes our shards, index and manifest, and we read what it wrote."""
    ours = TargetCache(built)
    rank = tmp_path / "_tmp" / "rank_0"
    rank.mkdir(parents=True)
    writer = theirs.LocalTargetCacheWriter(rank_dir=str(rank), max_shard_bytes=120_000)
    for number, sample in enumerate(ours):
        writer.write_sample(
            sample_id=number,
            input_ids=sample.input_ids,
            attention_mask=torch.ones_like(sample.input_ids),
            loss_mask=sample.loss_mask,
            target_hidden_states=sample.taps,
            target_last_hidden_states=sample.last,
        )
    writer.close()
    summary = theirs.LocalCacheWriteSummary(
        0, 0, len(ours), len(ours), len(writer.local_shard_files), writer.local_shard_files
    )
    summaries = [summary.to_json()]
    shard_map, shards = theirs.build_global_target_cache_shard_map(summaries)
    theirs.rename_local_target_cache_shards(
        output_dir=str(tmp_path), rank_dir=str(rank), summary=summaries[0], shard_map=shard_map
    )
    theirs.finalize_target_cache_index(output_dir=str(tmp_path), summaries=summaries, shard_map=shard_map)
    manifest = theirs.build_target_cache_manifest(
        num_samples=len(ours),
        shards=shards,
        target_layer_ids=ours.taps,
        hidden_size=ours.hidden_size,
        extra_fields=dict(ours.layout.extra),
    )
    theirs.write_target_cache_manifest(output_dir=str(tmp_path), manifest=manifest)
    theirs.cleanup_target_cache_tmp_dir(str(tmp_path))
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (built / path.name).read_bytes()
    assert len(list(tmp_path.iterdir())) == 2 + len(ours.layout.shard_files)
    assert verify(tmp_path).whole
    assert torch.equal(TargetCache(tmp_path)[3].taps, ours[3].taps)
