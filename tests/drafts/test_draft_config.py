"""The draft's config.json, and how its values follow from a target."""

import json

import pytest

from nemotron_dspark.config import DraftSection
from nemotron_dspark.drafts.config import DraftConfig, build_draft_config
from nemotron_dspark.errors import InputError
from nemotron_dspark.recipe.tiny import decoder_config, nemotron_h_config
from nemotron_dspark.targets import spec_from_config


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"markov_head_type": "rnn"},
        {"markov_rank": 0, "confidence_head_with_markov": False},
        {"enable_confidence_head": False, "confidence_head_with_markov": False},
    ],
)
def test_config_survives_its_file(make_config, changes):
    config = make_config(**changes)
    assert DraftConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_file_has_every_key_that_deepspec_and_engines_read(make_config):
    values = make_config().to_json()
    needed = (
        "architectures model_type hidden_size intermediate_size num_hidden_layers "
        "num_attention_heads num_key_value_heads head_dim hidden_act rms_norm_eps "
        "rope_parameters max_position_embeddings vocab_size attention_bias layer_types "
        "block_size mask_token_id target_layer_ids markov_rank markov_head_type "
        "enable_confidence_head confidence_head_with_markov num_target_layers num_anchors tie_word_embeddings "
    )
    assert set(needed.split()) <= set(values)
    assert values["model_type"] == "qwen3"
    assert values["architectures"] == ["Qwen3DSparkModel"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_size": None}, "no block_size"),
        ({"target_layer_ids": [4, 1]}, "ascending"),
        ({"target_layer_ids": [1, 8]}, "layers 0 to 7"),
        ({"mask_token_id": 97}, "97 ids"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type"),
        ({"num_key_value_heads": 4}, "divide"),
        ({"markov_head_type": "lstm"}, "'vanilla', 'gated' or 'rnn'"),
        ({"hidden_size": "wide"}, "hidden_size = 'wide' .* valid integer"),
    ],
)
def test_impossible_values_are_named(make_config, change, message):
    with pytest.raises(InputError, match=message) as raised:
        DraftConfig.from_json(make_config().to_json() | change, "some/config.json")
    assert raised.value.what.startswith("some/config.json")
    assert raised.value.do == "Use the config.json that was saved with the draft."


def test_a_value_no_draft_can_have_is_named_without_a_file_too(make_config):
    with pytest.raises(InputError, match=r"DSpark draft's config: block_size = 0 is not accepted: .* greater than 0\."):
        make_config(block_size=0)


def test_nemotron_draft_follows_the_defaults():
    spec = spec_from_config(nemotron_h_config(pattern="M-*-M-*-M-*-", hidden_size=64), "tiny")
    config, notes = build_draft_config(spec, DraftSection(), mask_token_id=9)
    assert (config.hidden_size, config.vocab_size, config.head_dim) == (64, 384, 16)
    assert config.intermediate_size == 256  # two thirds of 256 is 171, rounded up to 256
    assert config.rope_theta == 10000.0
    assert config.rms_norm_eps == spec.norm_eps
    assert len(config.target_layer_ids) == 5
    assert config.target_layer_ids[-1] < spec.num_layers - 1
    text = " ".join(notes)
    assert "rope theta" in text
    assert "SwiGLU width 256" in text


def test_published_sizes_of_nemotron_drafts():
    plain = spec_from_config(nemotron_h_config(intermediate_size=21504), "8B")
    assert build_draft_config(plain, DraftSection(), mask_token_id=9)[0].intermediate_size == 14336
    moe = spec_from_config(nemotron_h_config(pattern="MEM*EMEM*E", hidden_size=2688, head_dim=128), "Nano")
    config, _ = build_draft_config(moe, DraftSection(), mask_token_id=9)
    assert config.intermediate_size == 6144
    assert config.head_dim == 128


def test_gated_target_gives_its_own_width_and_theta():
    spec = spec_from_config(decoder_config("qwen3"), "qwen")
    config, _ = build_draft_config(spec, DraftSection(markov_rank=0), mask_token_id=9)
    assert config.intermediate_size == spec.intermediate_size
    assert config.rope_theta == spec.rope_theta
    assert not config.confidence_head_with_markov


def test_section_wins_over_defaults():
    spec = spec_from_config(nemotron_h_config(), "tiny")
    section = DraftSection(taps=[0, 3], intermediate_size=100, rope_theta=5e5, block_size=3, num_layers=1)
    config, notes = build_draft_config(spec, section, mask_token_id=9)
    assert config.target_layer_ids == (0, 3)
    assert (config.intermediate_size, config.rope_theta, config.block_size) == (100, 5e5, 3)
    assert notes == spec.assumed
    with pytest.raises(InputError, match="last layer"):
        build_draft_config(spec, DraftSection(taps=[1, spec.num_layers - 1]), mask_token_id=9)


def test_draft_of_another_target_is_refused():
    spec = spec_from_config(nemotron_h_config(), "tiny")
    config, _ = build_draft_config(spec, DraftSection(), mask_token_id=9)
    config.check_target(spec)
    with pytest.raises(InputError, match="vocabulary is 384, that of other is 500"):
        config.check_target(spec_from_config(nemotron_h_config(vocab_size=500), "other"))
