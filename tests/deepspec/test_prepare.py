"""Target-cache preparation: our builder with the values of a DeepSpec config."""

import contextlib
import json
import os

import pytest

from nemotron_dspark import stages
from nemotron_dspark.cache.build import build_cache
from nemotron_dspark.cache.verify import verify
from nemotron_dspark.config.run import CacheConfig, DataConfig
from nemotron_dspark.deepspec import launch, prepare
from nemotron_dspark.distributed import SINGLE
from nemotron_dspark.errors import CheckError, InputError

TAPS = (1, 2, 3, 4, 5)
ALONE = {"WORLD_SIZE": "1", "RANK": "0"}


@pytest.fixture
def cfg(tiny_hybrid):
    return {
        "model": {"target_model_name_or_path": str(tiny_hybrid), "target_layer_ids": list(TAPS), "mask_token_id": 31},
        "data": {"chat_template": "chatml", "max_length": 96},
    }


def config_of(cfg):
    return prepare.run_config(cfg, min_loss_tokens=4, shard_bytes=60_000, device="cpu")


def test_the_bytes_are_those_of_our_builder(cfg, target, conversations, tmp_path):
    config = config_of(cfg)
    report = prepare.prepare(config, str(conversations), tmp_path / "out", ALONE)  # loads and proves the target itself
    data, cache = DataConfig(max_length=96, min_loss_tokens=4), CacheConfig(shard_bytes=60_000)
    build_cache(target, conversations, tmp_path / "direct", taps=TAPS, data=data, cache=cache)
    shards = [path.name for path in (tmp_path / "direct").glob("shard-*")]
    assert len(shards) == report.build.shards > 1
    for name in (*shards, "samples.idx"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "direct" / name).read_bytes()
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["source_jsonl_paths"] == [str(conversations)]
    assert verify(tmp_path / "out").whole
    again = prepare.prepare(config, str(conversations), tmp_path / "out", ALONE)  # nothing is left to do
    assert again.build.reused_samples == again.build.samples == 12


def test_machines_build_one_cache_together(cfg, conversations, tmp_path, monkeypatch):
    expected = {"WORLD_SIZE": "4", "RANK": "1", "MASTER_ADDR": "head", "MASTER_PORT": "29500", "LOCAL_WORLD_SIZE": "1"}
    variables, asked = {}, {}

    class Second(type(SINGLE)):
        rank, world_size, is_main = 1, 4, False

    @contextlib.contextmanager
    def join():
        variables.update({name: os.environ[name] for name in expected})
        yield Second()

    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(prepare, "init_distributed", join)
    monkeypatch.setattr(stages, "build_cache", lambda *_, **given: asked.update(given))
    places = launch.Nodes(4, 1, "head:29500").variables()
    assert prepare.prepare(config_of(cfg), str(conversations), tmp_path / "out", places, print) is None
    assert variables == expected
    assert asked["context"].world_size == 4
    assert asked["on_progress"] is None  # the first machine shows it


def test_eagle3_has_no_mask_token(cfg, conversations, tmp_path, monkeypatch):
    given = {}
    monkeypatch.setattr(stages, "build_cache", lambda *_, **options: given.update(options))
    del cfg["model"]["mask_token_id"]
    prepare.prepare(config_of(cfg), str(conversations), tmp_path / "out", ALONE)
    assert given["masked"] is False


def test_a_failed_proof_stops_before_anything_is_captured(cfg, conversations, tmp_path, target, monkeypatch):
    def fail(target, taps):
        raise CheckError("The target fails the causality proof.", "Upgrade transformers.")

    monkeypatch.setattr(stages.Target, "of", staticmethod(lambda config: target))
    monkeypatch.setattr(stages.proofs, "prove", fail)
    with pytest.raises(CheckError, match="causality"):
        prepare.prepare(config_of(cfg), str(conversations), tmp_path / "out", ALONE)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_another_template_and_taps_that_are_not_there_are_refused(cfg, conversations, tmp_path):
    with pytest.raises(InputError, match="says the chat template 'nemotron_3'"):
        config_of(cfg | {"data": cfg["data"] | {"chat_template": "nemotron_3"}})
    cfg["model"]["target_layer_ids"] = [1, 99]
    with pytest.raises(InputError, match="out of range"):
        prepare.prepare(config_of(cfg), str(conversations), tmp_path / "out", ALONE)
