"""Every kind of draft through one trainer, from one cache, and out of it: trained, resumed, decoded, evaluated."""

import json

import httpx
import pytest
import torch

from nemotron_dspark.config import EvalConfig, load_config
from nemotron_dspark.decoding.decoder import Decoder
from nemotron_dspark.decoding.pair import load_draft
from nemotron_dspark.decoding.sampling import Sampling
from nemotron_dspark.drafts import kinds
from nemotron_dspark.drafts.config import DFlashConfig, DraftConfig, Eagle3Config
from nemotron_dspark.drafts.dspark import DSparkDraft
from nemotron_dspark.errors import InputError
from nemotron_dspark.evaluation.measure import measure
from nemotron_dspark.stages import serve
from nemotron_dspark.targets import Target
from nemotron_dspark.training.metrics import read_metrics
from tests.caches import write_cache
from tests.training import small_cache
from tests.training.runs import train_run
from tests.training.small_cache import samples
from tests.training.test_trainer import StopAt

TAPS = (1, 2, 3, 4, 5)
CONFIGS = {"dspark": DraftConfig, "dflash": DFlashConfig, "eagle3": Eagle3Config}


@pytest.fixture(scope="module")
def cache(tmp_path_factory, tiny_hybrid):
    folder = tmp_path_factory.mktemp("kinds") / "cache"
    write_cache(folder, samples(taps=TAPS), taps=TAPS, hidden_size=64)
    return folder


def config(kind, *more):
    return load_config(assignments=[*small_cache.SETTINGS, f"draft.kind={kind}", *more])


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_kind_learns_from_the_cache_and_decodes_without_loss(tiny_hybrid, cache, tmp_path, kind):
    asked = config(kind, "train.max_steps=12", "train.log_every=1", "train.lr=3e-3", "draft.intermediate_size=64")
    report = train_run(str(tiny_hybrid), cache, tmp_path / "run", asked)
    losses = [line["loss"] for line in read_metrics(tmp_path / "run")]
    assert losses[-1] < losses[0]
    assert report.final is not None
    assert (report.final.l1 is None) == (kind == "eagle3")  # its loss has another weight
    target = Target.load(str(tiny_hybrid))
    draft = load_draft(tmp_path / "run" / "draft", target)
    assert type(draft.config) is CONFIGS[kind]
    assert draft.config.block_size == 3
    prompts, greedy = [list(range(40, 40 + length)) for length in (3, 21)], Sampling(max_new_tokens=12)
    decoder = Decoder(target, draft)
    running = [decoder.start(ids, greedy) for ids in prompts]
    while any(generation.finished is None for generation in running):
        decoder.step(running)
    assert [each.tokens for each in running] == [Decoder(target).generate(ids, greedy).tokens for ids in prompts]
    served = load_config({"name": str(tiny_hybrid)}, serve={"port": 0})
    with serve(served, tmp_path / "run" / "draft", target=target) as server:
        asked = {"model": tiny_hybrid.name, "prompt": prompts[1], "max_tokens": 12, "temperature": 0}
        said = httpx.post(f"{server.base_url}/completions", json=asked, timeout=60).json()
    assert said["choices"][0]["text"] == target.tokenizer.decode(running[1].tokens, skip_special_tokens=True)
    found = measure(target, draft, prompts, 1.0, EvalConfig(max_new_tokens=8, batch_size=2))
    assert len(found.per_position) == 3
    assert found.accepted_length >= 1


@pytest.mark.parametrize("kind", ["dflash", "eagle3"])
def test_a_run_of_a_kind_that_was_stopped_ends_in_the_same_draft(tiny_hybrid, cache, tmp_path, kind):
    asked = config(kind, "train.checkpoint_every=2", "train.activation_checkpointing=true")
    with pytest.raises(KeyboardInterrupt):
        train_run(str(tiny_hybrid), cache, tmp_path / "run", asked, callbacks=[StopAt(2)])
    train_run(str(tiny_hybrid), cache, tmp_path / "run", asked)
    train_run(str(tiny_hybrid), cache, tmp_path / "whole", config(kind))  # nor does recomputing change a bit
    first, second = (tmp_path / run / "draft" / "model.safetensors" for run in ("run", "whole"))
    assert first.read_bytes() == second.read_bytes()


def test_a_run_of_one_kind_is_not_gone_on_with_as_another(tiny_hybrid, cache, tmp_path):
    train_run(str(tiny_hybrid), cache, tmp_path / "run", config("dspark"))
    with pytest.raises(InputError, match=r"draft\.architectures"):
        train_run(str(tiny_hybrid), cache, tmp_path / "run", config("dflash"))
    with pytest.raises(InputError, match="Qwen3DSparkModel, not a EAGLE-3 draft"):
        kinds.draft_class(Eagle3Config).load(tmp_path / "run" / "draft")


def test_eagle3_says_what_it_needs_of_a_cache_and_of_settings(tiny_hybrid, cache, tmp_path):
    write_cache(tmp_path / "two", samples(), taps=(1, 4), hidden_size=64)
    with pytest.raises(InputError, match="exactly five"):
        train_run(str(tiny_hybrid), tmp_path / "two", tmp_path / "run", config("eagle3"))
    with pytest.raises(InputError, match="twice as wide"):
        train_run(str(tiny_hybrid), cache, tmp_path / "run", config("eagle3", "train.init=target"))


def test_a_confidence_head_that_is_not_trained_is_left_out(tiny_hybrid, cache, tmp_path):
    report = train_run(str(tiny_hybrid), cache, tmp_path / "run", config("dspark", "train.confidence_alpha=0"))
    assert DSparkDraft.load(report.draft_folder).confidence_head is None
    assert any("no confidence head" in note for note in report.notes)


def test_the_slots_of_dflash_are_the_mask_tokens_behind_the_anchor():
    """Against DSpark with one slot more and the same weights: DFlash is its slots but the first."""
    shape = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "vocab_size": 31,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e4,
        "max_position_embeddings": 64,
        "target_layer_ids": (1, 2),
        "num_target_layers": 4,
        "mask_token_id": 5,
    }
    flash = DSparkDraft(DFlashConfig(**shape, block_size=3))
    spark = DSparkDraft(DraftConfig(**shape, block_size=4, markov_rank=0, enable_confidence_head=False))
    spark.load_state_dict(flash.state_dict(), assign=True)
    table = torch.randn(2, 31, 16, generator=torch.Generator().manual_seed(0))
    for draft in (flash, spark):
        draft.set_embeddings(*table)
    ids, taps = torch.randint(6, 31, (1, 12)), torch.randn(1, 12, 32)
    with torch.no_grad():
        blocks = (ids, taps, torch.tensor([[4, 9]]), torch.ones(1, 2, dtype=torch.bool))
        assert torch.equal(flash(*blocks), spark(*blocks)[:, :, 1:])
        contexts = [draft.new_context() for draft in (flash, spark)]
        for draft, context in zip((flash, spark), contexts, strict=True):
            draft.extend(context, taps[:, :9], [9], ids[:, 1:10])
        decoded = flash.block_hidden(contexts[0], ids[:, 9])
        torch.testing.assert_close(decoded, flash(*blocks)[:, 1], rtol=1e-4, atol=1e-5)


def test_the_config_of_dflash_counts_the_anchor_on_disk_as_its_authors_do(tiny_hybrid, cache, tmp_path):
    report = train_run(str(tiny_hybrid), cache, tmp_path / "run", config("dflash"))
    with open(f"{report.draft_folder}/config.json") as file:
        values = json.load(file)
    assert (values["architectures"], values["block_size"]) == (["DFlashDraftModel"], 4)
    assert values["dflash_config"] == {"mask_token_id": 31, "target_layer_ids": list(TAPS)}
    assert not {"markov_rank", "enable_confidence_head", "sample_from_anchor"} & values.keys()
    theirs = {key: value for key, value in values.items() if key not in ("mask_token_id", "target_layer_ids")}
    assert DraftConfig.from_json(theirs) == DFlashConfig.from_json(values)
    with pytest.raises(InputError, match="block_size is 1, and it counts the anchor"):
        DraftConfig.from_json(values | {"block_size": 1})
