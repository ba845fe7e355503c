"""What `nds inspect` says follows from the config alone, and every kind of trouble in the folder is a warning."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from nemotron_dspark.chat.format import bundled_formats
from nemotron_dspark.config import load_config
from nemotron_dspark.config.known import KNOWN, RESEARCH_ONLY, known_target
from nemotron_dspark.errors import InputError
from nemotron_dspark.recipe.describe import inspect
from tests.recipe.hybrids import HYBRIDS
from tests.recipe.nemotrons import LLAMA_8B, MINI, NEMOTRONS, NEW_NAMES, OLD_NAMES, SUPER_49B, listed

H_8B = next(row for row in NEMOTRONS if row.name == "Nemotron-H-8B-Base-8K")


def bare(folder, config, name="target"):
    """A folder with nothing but a config.json."""
    (folder / name).mkdir()
    (folder / name / "config.json").write_text(json.dumps(config))
    return str(folder / name)


def described(folder, *settings):
    return inspect(load_config(assignments=settings, target=str(folder)))


def warned(found, words):
    return [warning for warning in found.warnings if words in warning]


@pytest.fixture
def copied(tiny_hybrid, tmp_path):
    """A copy of the tiny hybrid checkpoint that a test may damage."""
    shutil.copytree(tiny_hybrid, tmp_path / "target")
    return tmp_path / "target"


@pytest.mark.parametrize("row", NEMOTRONS, ids=lambda row: row.name)
def test_a_known_target_s_config_alone_gives_everything(tmp_path, row):
    found = described(bare(tmp_path, row.config(), row.name))
    known = known_target(row.repository)
    assert found.spec.layout == row.pattern
    assert tuple(layer for layer, kind in enumerate(found.spec.layers) if kind.attends) == row.attention
    assert found.parameters / 1e9 == pytest.approx(row.billions, rel=1e-3)
    assert known.billions == row.billions
    assert (found.known, found.preset, found.licence) == (row.repository, known.preset, known.licence)
    assert found.draft.target_layer_ids == row.taps
    assert found.draft.intermediate_size == row.swiglu
    shape = (found.draft.num_attention_heads, found.draft.num_key_value_heads, found.draft.head_dim)
    assert shape == (row.heads, row.kv_heads, 128)
    assert (found.draft.rope_theta, found.draft.rms_norm_eps) == (10000.0, 1e-5)
    assert found.spec.rope_theta is None
    assert found.cache_bytes_per_token == 12 * row.hidden + 6
    assert (found.mask_token, found.draft.mask_token_id) == (990, 990)
    assert "not checked" in found.mask_reason
    assert found.chat_format == known.chat_format
    assert ("not checked" if known.chat_format else "unknown") in found.chat_reason
    assert (found.tokens, found.stored_parameters, found.has_chat_template) == (None, None, None)
    assert warned(found, "no tokenizer files")
    assert bool(warned(found, "research only")) == (known.licence or "").endswith(RESEARCH_ONLY)
    assert bool(warned(found, "quantised")) == (known.weights != "BF16")
    assert bool(found.multi_token_layers) == ("Super" in row.name or "Ultra" in row.name or "3.5" in row.name)
    assert not warned(found, "cannot build")
    json.dumps(found.to_json())


@pytest.mark.parametrize("row", HYBRIDS, ids=lambda row: row.name)
def test_a_known_hybrid_s_config_alone_gives_everything_but_its_mask_token(tmp_path, row):
    found = described(bare(tmp_path, row.config(), row.name))
    known, spec = known_target(row.repository), found.spec
    assert tuple(layer for layer, kind in enumerate(spec.layers) if kind.attends) == row.attention
    assert found.parameters / 1e9 == pytest.approx(row.billions, rel=1e-3)
    assert (known.billions, known.layers) == (row.billions, spec.num_layers)
    assert (found.known, found.preset, found.licence) == (row.repository, known.preset, known.licence)
    assert (found.draft.target_layer_ids, found.draft.intermediate_size) == (row.taps, row.swiglu)
    assert (spec.rope_theta, found.draft.rope_theta) == (row.rope, row.rope or 10000.0)
    assert found.cache_bytes_per_token == 12 * spec.hidden_size + 6
    assert found.mask_token is None
    assert (found.experts is None) == (row.swiglu not in (9216, 4608))
    assert bool(found.multi_token_layers) == (row.name == "Qwen3.5-35B-A3B")
    assert found.chat_format == known.chat_format
    assert not warned(found, "cannot build")
    json.dumps(found.to_json())


def test_every_known_target_is_in_the_table_or_has_the_shape_of_one_that_is():
    shapes = {(len(row.pattern), row.billions) for row in NEMOTRONS} | {(32, 4.191), (32, 8.030), (80, 49.867)}
    shapes |= {(known_target(row.repository).layers, row.billions) for row in HYBRIDS}
    assert {(known.layers, known.billions) for known in KNOWN} == shapes


def test_every_known_chat_format_is_bundled():
    assert {known.chat_format for known in KNOWN} - {None} <= set(bundled_formats())


def test_a_config_of_no_known_name_leaves_unknown_what_it_cannot_say(tmp_path):
    found = described(bare(tmp_path, H_8B.config()))
    assert (found.known, found.preset, found.licence, found.chat_format) == (None, None, None, None)
    assert found.mask_token is None
    assert "990 if it is Nemotron's" in found.mask_reason
    assert "unknown" in found.chat_reason
    assert found.parameters / 1e9 == pytest.approx(8.101, rel=1e-3)
    assert found.draft.intermediate_size == 14336


def test_a_fine_tune_is_known_by_the_name_its_config_came_from(tmp_path):
    found = described(bare(tmp_path, H_8B.config() | {"_name_or_path": H_8B.repository}))
    assert (found.known, found.preset) == (H_8B.repository, None)
    assert found.mask_token == 990


def test_a_folder_named_like_a_target_it_is_not_is_said_to_be_another(tmp_path):
    pruned = H_8B.config() | {"hybrid_override_pattern": H_8B.pattern[:40]}
    found = described(bare(tmp_path, pruned, H_8B.name))
    assert (found.known, found.licence, found.chat_format) == (None, None, None)
    assert warned(found, "its size is another one")
    assert warned(found, "configs/nemotron_h_8b.yaml applies all the same")


@pytest.mark.parametrize("override", [31, 990])
def test_a_mask_token_that_was_set_is_shown_as_set_unless_it_is_the_documented_one(tmp_path, override):
    found = described(bare(tmp_path, H_8B.config(), H_8B.name), f"draft.mask_token_id={override}")
    assert found.mask_token == override
    assert ("set by draft.mask_token_id" in found.mask_reason) == (override == 31)


def test_published_stop_tokens_are_named_where_the_file_that_holds_them_is_missing(tmp_path):
    row = next(row for row in NEMOTRONS if "Lightning" in row.name)
    found = described(bare(tmp_path, row.config(), row.name))
    assert found.stop_ids == (2,)
    assert warned(found, "names 2 and 11")


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"quantization_config": {"quant_method": "fp8"}}, "(fp8)"),
        ({"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}, "(NVFP4)"),
        ({"hf_quant_config.json": {"quantization": {"quant_algo": "FP8"}}}, "(FP8)"),
    ],
    ids=["fp8", "modelopt", "hf_quant_config"],
)
def test_a_quantised_checkpoint_is_said_to_be_by_whichever_file_tells(tmp_path, files, words):
    folder = bare(tmp_path, H_8B.config() | {key: value for key, value in files.items() if "." not in key})
    for name, value in files.items():
        if "." in name:
            (Path(folder) / name).write_text(json.dumps(value))
    found = described(folder)
    assert warned(found, f"quantised {words}")
    assert warned(found, "the BF16 checkpoint holds them unrounded")
    assert warned(found, "stay BF16")
    assert found.parameters / 1e9 == pytest.approx(8.101, rel=1e-3)


def test_the_full_precision_checkpoint_of_a_quantised_one_is_named(tmp_path):
    row = next(row for row in NEMOTRONS if row.name.endswith("Lightning-30B-A3B-NVFP4"))
    assert warned(described(bare(tmp_path, row.config(), row.name)), "Lightning-30B-A3B-BF16 holds them unrounded")


@pytest.mark.parametrize(
    "spelling",
    [
        {"hybrid_override_pattern": H_8B.pattern},
        {"hybrid_override_pattern": H_8B.pattern, "num_hidden_layers": 52},
        listed(H_8B.pattern, OLD_NAMES),
        listed(H_8B.pattern, NEW_NAMES),
        listed(H_8B.pattern, NEW_NAMES) | {"hybrid_override_pattern": "M*"},  # the list goes first, as in transformers
        {"layer_types": [NEW_NAMES[kind] for kind in H_8B.pattern]},
    ],
    ids=["pattern", "pattern and count", "old list", "new list", "list over pattern", "layer_types"],
)
def test_every_spelling_of_the_layers_is_the_same_target(tmp_path, spelling):
    config = {key: value for key, value in H_8B.config().items() if key != "hybrid_override_pattern"}
    found = described(bare(tmp_path, config | {key: value for key, value in spelling.items() if value}))
    assert found.spec.layout == H_8B.pattern
    assert found.parameters / 1e9 == pytest.approx(8.101, rel=1e-3)


@pytest.mark.parametrize("spelling", [{"head_dim": 128}, {"attention_head_dim": 128}, {}], ids=str)
def test_every_spelling_of_the_head_dim_is_the_same_target(tmp_path, spelling):
    config = {key: value for key, value in H_8B.config().items() if "head_dim" not in key or "mamba" in key}
    found = described(bare(tmp_path, config | spelling))
    assert (found.spec.head_dim, found.draft.head_dim) == (128, 128)
    assert found.parameters / 1e9 == pytest.approx(8.101, rel=1e-3)


def test_nemotron_mini_is_an_ordinary_decoder_without_a_gate(tmp_path):
    found = described(bare(tmp_path, MINI, "Nemotron-Mini-4B-Instruct"))
    assert found.spec.layout == "D" * 32
    assert found.parameters / 1e9 == pytest.approx(4.191, rel=1e-3)
    assert (found.spec.mlp, found.draft.intermediate_size) == ("plain", 6144)
    assert (found.spec.rope_theta, found.draft.head_dim) == (10000.0, 128)
    assert found.known == "nvidia/Nemotron-Mini-4B-Instruct"
    assert (found.mask_token, found.stop_ids) == (None, (3,))


def test_llama_nemotron_nano_is_plain_llama(tmp_path):
    found = described(bare(tmp_path, LLAMA_8B, "Llama-3.1-Nemotron-Nano-8B-v1"))
    assert found.parameters / 1e9 == pytest.approx(8.030, rel=1e-3)
    assert (found.draft.intermediate_size, found.draft.rope_theta) == (14336, 500000.0)
    assert (found.chat_format, found.stop_ids) == ("llama_nemotron", (128001, 128008, 128009))


def test_super_49b_is_refused_unless_its_own_code_is_allowed(tmp_path):
    folder = bare(tmp_path, SUPER_49B, "Llama-3_3-Nemotron-Super-49B-v1")
    with pytest.raises(InputError, match="block_configs") as refused:
        described(folder)
    assert "--trust-remote-code" in refused.value.do
    with pytest.raises(InputError) as without_code:  # the folder holds a config and no code
        described(folder, "target.trust_remote_code=true")
    assert "configuration_decilm.py" in f"{without_code.value}"


def test_super_49b_s_own_code_builds_it_when_it_is_allowed(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", list(sys.path))
    monkeypatch.delitem(sys.modules, "transformers_modules", raising=False)  # another test's, of another folder
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6, "num_attention_heads": 4}
    folder = Path(bare(tmp_path, SUPER_49B | shape | {"num_key_value_heads": 2, "max_position_embeddings": 4096}))
    (folder / "configuration_decilm.py").write_text(
        "from transformers import LlamaConfig\n\n\nclass DeciLMConfig(LlamaConfig):\n    model_type = 'nemotron-nas'\n"
    )
    (folder / "modeling_decilm.py").write_text(
        "from transformers import LlamaForCausalLM\n\nfrom .configuration_decilm import DeciLMConfig\n\n\n"
        "class DeciLMForCausalLM(LlamaForCausalLM):\n    config_class = DeciLMConfig\n"
    )
    found = described(folder, "target.trust_remote_code=true")
    assert (found.spec.model_type, found.spec.layout) == ("nemotron-nas", "DDDDDD")
    assert found.parameters == 2 * 128256 * 64 + 6 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 96 + 2 * 64) + 64
    assert found.draft.num_key_value_heads == 2


def test_code_is_run_only_for_a_target_that_needs_it(tmp_path):
    """nemotron_h checkpoints bring code too; transformers has its own, and that is what runs."""
    found = described(bare(tmp_path, H_8B.config()), "target.trust_remote_code=true")
    assert found.parameters / 1e9 == pytest.approx(8.101, rel=1e-3)


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


@pytest.mark.parametrize("kind", ["mamba", "falcon_mamba", "rwkv"])
def test_a_target_without_attention_gets_a_draft_of_the_default_shape_and_says_so(tmp_path, kind):
    from transformers import AutoConfig

    values = AutoConfig.for_model(kind, hidden_size=1024, num_hidden_layers=8, vocab_size=1000).to_dict()
    draft = described(bare(tmp_path, values))
    assert (draft.draft.num_attention_heads, draft.draft.num_key_value_heads, draft.draft.head_dim) == (8, 8, 128)
    assert any("attention" in note for note in (*draft.notes, *draft.spec.assumed)), draft.notes
