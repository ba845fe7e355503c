"""What `nds inspect` says follows from the config alone, and every kind of trouble in the folder is a warning."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from nemotron_dspark.config import load_run_config
from nemotron_dspark.errors import InputError
from nemotron_dspark.recipe.describe import describe

# The fields of the published configs that shape the model; parameter counts as published by building them.
NEMOTRON_H = {
    "model_type": "nemotron_h",
    "vocab_size": 131072,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "ssm_state_size": 128,
    "n_groups": 8,
    "conv_kernel": 4,
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "eos_token_id": 2,
    "time_step_limit": [0.0, float("inf")],
}
H_8B = NEMOTRON_H | {
    "hybrid_override_pattern": "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-",
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "intermediate_size": 21504,
    "mamba_num_heads": 128,
    "mamba_head_dim": 64,
    "max_position_embeddings": 8192,
}
H_4B = H_8B | {"hidden_size": 3072, "intermediate_size": 12288, "mamba_num_heads": 112}
NANO_9B_V2 = NEMOTRON_H | {
    "hybrid_override_pattern": "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-",
    "hidden_size": 4480,
    "num_attention_heads": 40,
    "intermediate_size": 15680,
    "mamba_num_heads": 128,
    "mamba_head_dim": 80,
    "max_position_embeddings": 131072,
}
NANO_12B_V2 = NANO_9B_V2 | {
    "hybrid_override_pattern": "M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M-",
    "hidden_size": 5120,
    "intermediate_size": 20480,
}
NANO_3_4B = NANO_9B_V2 | {
    "hybrid_override_pattern": "M-M-M-MM-M-M*-M-M*-M-M-M*-M-M-MM*-MMM-M-M-",
    "hidden_size": 3136,
    "intermediate_size": 12544,
    "mamba_num_heads": 96,
}
NANO_3_30B = NEMOTRON_H | {
    "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    "hidden_size": 2688,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "intermediate_size": 1856,
    "mamba_num_heads": 64,
    "mamba_head_dim": 64,
    "max_position_embeddings": 262144,
    "n_routed_experts": 128,
    "moe_intermediate_size": 1856,
    "moe_shared_expert_intermediate_size": 3712,
}


def bare(folder, config, name="target"):
    """A folder with nothing but a config.json."""
    (folder / name).mkdir()
    (folder / name / "config.json").write_text(json.dumps(config))
    return str(folder / name)


def described(folder, *settings):
    return describe(str(folder), load_run_config(assignments=settings, target=str(folder)))


def warned(found, words):
    return [warning for warning in found.warnings if words in warning]


@pytest.fixture
def copied(tiny_hybrid, tmp_path):
    """A copy of the tiny hybrid checkpoint that a test may damage."""
    shutil.copytree(tiny_hybrid, tmp_path / "target")
    return tmp_path / "target"


@pytest.mark.parametrize(
    ("config", "billions", "width", "taps", "bytes_per_token"),
    [
        (H_4B, 4.489, 8192, (1, 13, 25, 37, 49), 36_870),
        (H_8B, 8.101, 14336, (1, 13, 25, 37, 49), 49_158),
        (NANO_9B_V2, 8.888, 10496, (1, 14, 27, 39, 53), 53_766),
        (NANO_12B_V2, 12.310, 13824, (1, 16, 30, 43, 59), 61_446),
        (NANO_3_4B, 3.974, 8448, (1, 12, 20, 32, 39), 37_638),
        (NANO_3_30B, 31.578, 6144, (1, 12, 26, 37, 49), 32_262),
    ],
    ids=["H-4B", "H-8B", "Nano-9B-v2", "Nano-12B-v2", "3-Nano-4B", "3-Nano-30B"],
)
def test_a_config_alone_gives_size_draft_taps_and_cache(tmp_path, config, billions, width, taps, bytes_per_token):
    found = described(bare(tmp_path, config))
    assert found.parameters / 1e9 == pytest.approx(billions, rel=1e-3)
    assert found.draft.intermediate_size == width
    assert found.draft.target_layer_ids == taps
    assert found.draft.head_dim == 128
    assert found.draft.rope_theta == 10000.0
    assert found.cache_bytes_per_token == bytes_per_token
    assert (found.tokens, found.stored_parameters, found.has_chat_template) == (None, None, None)
    assert "990" in found.mask_reason
    assert found.mask_token is None
    assert found.stop_ids == (2,)
    assert warned(found, "no tokenizer files")
    assert warned(found, "generation_config.json")
    json.dumps(found.to_json())


def test_the_licence_is_known_by_name_and_research_only_is_said(tmp_path):
    found = described(bare(tmp_path, H_8B, "Nemotron-H-8B-Base-8K"))
    assert "research only" in found.licence
    assert warned(found, "research only")
    assert found.mask_token == 990  # from the preset
    assert described(bare(tmp_path, H_8B, "mine")).licence is None


def test_a_whole_checkpoint_has_nothing_unknown(tiny_hybrid):
    found = described(tiny_hybrid)
    assert found.spec.layout == "ME*-M*-M"
    assert found.tokens == found.spec.vocab_size == 384
    assert (found.has_chat_template, found.chat_format) == (True, "chatml")
    assert found.mask_token == 31
    assert found.stop_ids == (11,)
    assert found.stored_parameters == pytest.approx(found.parameters, rel=1e-3)
    assert [warning for warning in found.warnings if "positions" not in warning] == []


def test_an_ordinary_decoder_keeps_its_own_mlp_and_rope(tiny_llama):
    found = described(tiny_llama)
    assert found.draft.intermediate_size == found.spec.intermediate_size == 128
    assert found.draft.rope_theta == found.spec.rope_theta
    assert found.stored_parameters == found.parameters


def test_settings_reach_the_draft(tiny_hybrid):
    found = described(tiny_hybrid, "draft.taps=[2,5]", "draft.block_size=4")
    assert found.draft.target_layer_ids == (2, 5)
    assert found.draft.block_size == 4
    assert found.cache_bytes_per_token == 2 * 64 * 3 + 6
    with pytest.raises(InputError, match="last layer"):
        described(tiny_hybrid, "draft.taps=[2,7]")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vocab_size": 300}, "do not belong together"),
        ({"max_position_embeddings": 2048}, "beyond the target's 2048 positions"),
        ({"tie_word_embeddings": True}, "tied"),
        ({"hidden_size": 128}, "do not belong together"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_config_that_spells_trouble_is_warned_of(copied, change, words):
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | change))
    assert warned(described(copied), words)


def test_files_that_are_missing_or_damaged_are_warned_of(copied):
    tensors = load_file(copied / "model.safetensors")
    (copied / "model.safetensors").unlink()
    save_file({"lm_head.weight": tensors["lm_head.weight"]}, copied / "a.safetensors")
    index = {"weight_map": {"lm_head.weight": "a.safetensors", "other": "b.safetensors"}}
    (copied / "model.safetensors.index.json").write_text(json.dumps(index))
    (copied / "generation_config.json").unlink()
    (copied / "tokenizer.json").write_text("{")
    found = described(copied)
    assert warned(found, "1 of the shards")
    assert warned(found, "b.safetensors")
    assert warned(found, "generation_config.json")
    assert warned(found, "tokenizer cannot be loaded")
    (copied / "a.safetensors").write_bytes(b"short")
    assert warned(described(copied), "a.safetensors is truncated")


def test_a_base_model_without_a_template_is_plain_text(copied):
    (copied / "chat_template.jinja").unlink()
    found = described(copied)
    assert (found.has_chat_template, found.chat_format) == (False, "plain")
    assert warned(found, "no chat template")


def test_a_target_that_only_its_own_code_can_build_is_refused(tmp_path):
    with pytest.raises(InputError, match="block_configs"):
        described(bare(tmp_path, {"model_type": "nemotron-nas", "block_configs": []}))
