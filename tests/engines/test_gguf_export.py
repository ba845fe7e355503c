"""Exported GGUF files hold what llama.cpp's loaders look for, and what is read back from them is the same model."""

import dataclasses
import sys

import numpy as np
import pytest
import torch

from nemotron_dspark.drafts.config import DFlashConfig, DraftConfig
from nemotron_dspark.drafts.dspark import DSparkDraft
from nemotron_dspark.engines.gguf_checkpoint import import_gguf
from nemotron_dspark.engines.gguf_export import export_draft, export_target
from nemotron_dspark.errors import EnvironmentFault, InputError
from nemotron_dspark.recipe import tiny
from nemotron_dspark.targets import Checkpoint, Target
from nemotron_dspark.targets.weights import open_tensors

gguf = pytest.importorskip("gguf")


def draft_config(spec, **changes):
    values = {
        "hidden_size": spec.hidden_size,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": spec.vocab_size,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 512,
        "block_size": 5,
        "mask_token_id": 20,
        "target_layer_ids": (1, 2),
        "num_target_layers": spec.num_layers,
        "markov_rank": 8,
    }
    return DraftConfig(**(values | changes))


def saved_draft(folder, spec, **changes):
    draft = DSparkDraft(draft_config(spec, **changes), seed=1)
    draft.save(folder, slim=True)
    return draft


def read(path):
    reader = gguf.GGUFReader(path)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    return fields, {tensor.name: tensor for tensor in reader.tensors}


def test_a_llama_that_is_exported_and_imported_says_the_same(tiny_llama, tmp_path):
    target = Target.load(str(tiny_llama))
    export_target(Checkpoint.find(tiny_llama), tmp_path / "t.gguf", "float32")
    import_gguf(str(tmp_path / "t.gguf"), tmp_path / "back", "float32")
    back = Target.load(str(tmp_path / "back"))
    ids = torch.arange(40, 100)[None]
    ours, theirs = (one.logits(one.capture(ids, None, ()).last) for one in (target, back))
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)
    text = "def f(x): return 12 + x"
    assert back.tokenizer(text)["input_ids"] == target.tokenizer(text)["input_ids"]


@pytest.mark.parametrize(("pattern", "arch"), [("M-*-M-*-", "nemotron_h"), ("ME*EM*", "nemotron_h_moe")])
def test_a_nemotron_h_has_llama_cpp_s_layout(tmp_path, pattern, arch):
    folder = tiny.random_target(tmp_path / "target", pattern=pattern)
    export_target(Checkpoint.find(folder), tmp_path / "t.gguf", "bfloat16")
    fields, tensors = read(tmp_path / "t.gguf")
    config = Checkpoint.find(folder).config
    stored = open_tensors(folder)
    assert fields["general.architecture"] == arch
    assert fields[f"{arch}.attention.head_count_kv"] == [2 if kind == "*" else 0 for kind in pattern]
    assert [width > 0 for width in fields[f"{arch}.feed_forward_length"]] == [kind in "-E" for kind in pattern]
    assert fields[f"{arch}.ssm.inner_size"] == config["mamba_num_heads"] * config["mamba_head_dim"]
    assert fields[f"{arch}.ssm.time_step_rank"] == config["mamba_num_heads"]
    a = -np.exp(stored["backbone.layers.0.mixer.A_log"]().float().numpy())
    np.testing.assert_allclose(tensors["blk.0.ssm_a"].data[:, 0], a, rtol=1e-6)
    conv = stored["backbone.layers.0.mixer.conv1d.weight"]().float().numpy()[:, 0]
    np.testing.assert_array_equal(tensors["blk.0.ssm_conv1d.weight"].data, conv)
    assert list(tensors["blk.0.ssm_norm.weight"].shape) == [128 // config["n_groups"], config["n_groups"]]
    assert tensors["blk.0.ssm_in.weight"].tensor_type.name == "BF16"
    if arch == "nemotron_h_moe":
        experts = [stored[f"backbone.layers.1.mixer.experts.{e}.up_proj.weight"]() for e in range(4)]
        up = torch.from_numpy(np.array(tensors["blk.1.ffn_up_exps.weight"].data)).view(torch.bfloat16)
        assert torch.equal(up, torch.stack(experts).to(torch.bfloat16))


def test_a_draft_brings_taps_block_and_heads_and_leaves_the_target_s_matrices(tiny_hybrid, tmp_path):
    target = Checkpoint.find(tiny_hybrid)
    draft = saved_draft(tmp_path / "draft", target.read_spec())
    export_draft(draft.config, open_tensors(tmp_path / "draft"), target, tmp_path / "d.gguf", "float32")
    fields, tensors = read(tmp_path / "d.gguf")
    expected = {
        "general.architecture": "dflash",
        "dflash.target_layers": [2, 3],  # counted from the embedding, as llama.cpp does
        "dflash.block_size": 5,
        "dflash.sample_from_anchor": True,
        "dflash.has_confidence_head": True,
        "tokenizer.ggml.mask_token_id": 20,
        "tokenizer.ggml.pre": "gpt-2",
    }
    assert {key: fields[key] for key in expected} == expected
    weights = draft.state_dict()
    assert len(tensors) == len(weights) - 2
    for there, here in (
        ("fc.weight", "fc.weight"),
        ("enc.output_norm.weight", "hidden_norm.weight"),
        ("blk.1.ffn_norm.weight", "layers.1.post_attention_layernorm.weight"),
        ("blk.0.attn_k_norm.weight", "layers.0.self_attn.k_norm.weight"),
        ("markov_w2.weight", "markov_head.markov_w2.weight"),
        ("conf_proj.weight", "confidence_head.proj.weight"),
    ):
        np.testing.assert_array_equal(tensors[there].data, weights[here].numpy())


def test_a_draft_without_a_markov_head_gets_one_that_adds_nothing(tiny_hybrid, tmp_path):
    target = Checkpoint.find(tiny_hybrid)
    draft = saved_draft(tmp_path / "draft", target.read_spec(), markov_rank=0, confidence_head_with_markov=False)
    export_draft(draft.config, open_tensors(tmp_path / "draft"), target, tmp_path / "d.gguf", "float32")
    tensors = read(tmp_path / "d.gguf")[1]
    assert not tensors["markov_w1.weight"].data.any()
    assert not tensors["markov_w2.weight"].data.any()
    confidence = tensors["conf_proj.weight"].data
    np.testing.assert_array_equal(confidence[:, :64], draft.confidence_head.proj.weight.detach().numpy())
    assert not confidence[:, 64:].any()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"enable_confidence_head": False},
        {"confidence_head_with_markov": False},
        {"markov_rank": 0, "confidence_head_with_markov": False},
        {"target_layer_ids": (-1, 2), "num_anchors": 33, "rms_norm_eps": 1e-6, "rope_theta": 12345.0},
        {"sliding_window": 32, "causal_block": True, "attention_sinks": True, "sample_from_anchor": False},
    ],
)
def test_an_exported_draft_comes_back_equal_to_the_bit(tiny_hybrid, tmp_path, changes):
    target = Checkpoint.find(tiny_hybrid)
    draft = saved_draft(tmp_path / "draft", target.read_spec(), **changes)
    export_draft(draft.config, open_tensors(tmp_path / "draft"), target, tmp_path / "d.gguf", "float32")
    import_gguf(str(tmp_path / "d.gguf"), tmp_path / "back")
    back = DSparkDraft.load(tmp_path / "back")
    assert back.config == draft.config
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (
        tmp_path / "draft" / "model.safetensors"
    ).read_bytes()
    export_draft(draft.config, open_tensors(tmp_path / "draft"), target, tmp_path / "half.gguf", "bfloat16")
    found = import_gguf(str(tmp_path / "half.gguf"), tmp_path / "full", target=target)
    assert found.embeddings


def test_llama_cpp_is_told_of_windows_causal_blocks_and_sinks_where_it_looks(tiny_hybrid, tmp_path):
    target = Checkpoint.find(tiny_hybrid)
    blocks = {"sliding_window": 32, "causal_block": True, "attention_sinks": True, "sample_from_anchor": False}
    draft = saved_draft(tmp_path / "draft", target.read_spec(), **blocks)
    export_draft(draft.config, open_tensors(tmp_path / "draft"), target, tmp_path / "d.gguf", "bfloat16")
    fields, tensors = read(tmp_path / "d.gguf")
    expected = {
        "dflash.block_size": draft.config.block_size + 1,
        "dflash.sample_from_anchor": False,
        "dflash.attention.causal": True,
        "dflash.attention.sliding_window": 32,
        "dflash.attention.sliding_window_pattern": [True] * draft.config.num_hidden_layers,
    }
    assert {key: fields[key] for key in expected} == expected
    assert tensors["blk.1.attn_sinks.weight"].tensor_type.name == "F32"


def test_a_dflash_draft_has_no_markov_head_and_comes_back_equal_to_the_bit(tiny_hybrid, tmp_path):
    target = Checkpoint.find(tiny_hybrid)
    values = draft_config(target.read_spec()).model_dump()
    changed = ("markov_rank", "markov_head_type", "sample_from_anchor", "enable_confidence_head")
    kept = {key: value for key, value in values.items() if key not in (*changed, "confidence_head_with_markov")}
    draft = DSparkDraft(DFlashConfig(**kept), seed=1)
    draft.save(tmp_path / "draft", slim=True)
    export_draft(draft.config, open_tensors(tmp_path / "draft"), target, tmp_path / "d.gguf", "float32")
    reader = gguf.GGUFReader(tmp_path / "d.gguf")
    assert reader.fields["dflash.block_size"].contents() == values["block_size"] + 1
    assert reader.fields["dflash.sample_from_anchor"].contents() is False
    assert not any("markov" in tensor.name for tensor in reader.tensors)
    import_gguf(str(tmp_path / "d.gguf"), tmp_path / "back")
    assert (tmp_path / "back" / "config.json").read_bytes() == (tmp_path / "draft" / "config.json").read_bytes()
    name = "model.safetensors"
    assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "draft" / name).read_bytes()


def test_what_llama_cpp_cannot_serve_is_refused_and_nothing_is_written(tiny_hybrid, tiny_llama, tmp_path):
    hybrid, out = Checkpoint.find(tiny_hybrid), tmp_path / "d.gguf"
    config = draft_config(hybrid.read_spec())
    for changes, message in (
        ({"markov_head_type": "gated"}, "no gated Markov head"),
        ({"target_logit_multiplier": 0.5}, "scales or caps"),
    ):
        with pytest.raises(InputError, match=message):
            export_draft(DraftConfig(**(config.model_dump() | changes)), {}, hybrid, out, "float32")
    with pytest.raises(InputError, match="both mixtures of experts and plain MLPs"):
        export_target(hybrid, out, "float32")
    with pytest.raises(InputError, match="of type gemma3_text is not written"):
        export_target(dataclasses.replace(hybrid, config={"model_type": "gemma3_text"}), out, "float32")
    assert list(tmp_path.iterdir()) == []
    out.write_bytes(b"mine")
    with pytest.raises(InputError, match="exists"):
        export_target(Checkpoint.find(tiny_llama), out, "float32")
    assert out.read_bytes() == b"mine"


def test_without_the_gguf_package_both_ways_say_what_to_install(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)  # an import of it fails
    with pytest.raises(EnvironmentFault, match=r"Writing a GGUF file needs.*\n?.*nemotron-dspark\[gguf\]"):
        export_target(Checkpoint.find(tiny_llama), tmp_path / "t.gguf", "float32")
    with pytest.raises(EnvironmentFault, match=r"Reading a GGUF file needs.*\n?.*nemotron-dspark\[gguf\]"):
        import_gguf("t.gguf", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
