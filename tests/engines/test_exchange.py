"""A draft goes into the layouts of other projects and comes back, equal to the bit."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemotron_dspark.drafts.config import DFlashConfig, DraftConfig, Eagle3Config
from nemotron_dspark.drafts.dspark import SHARED, DSparkDraft
from nemotron_dspark.drafts.eagle3 import Eagle3Draft
from nemotron_dspark.engines.draft_formats import DFLASH_FORMATS, EAGLE3_FORMATS, FORMATS
from nemotron_dspark.engines.exchange import export_draft, import_draft
from nemotron_dspark.errors import InputError
from nemotron_dspark.targets import Checkpoint
from nemotron_dspark.targets.weights import read_embedding_and_head

SHAPE = {
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "rope_theta": 12345.0,
    "max_position_embeddings": 512,
    "block_size": 5,
    "mask_token_id": 20,
    "target_layer_ids": (1, 4),
    "num_anchors": 77,
    "markov_rank": 8,
}


@pytest.fixture
def target(tiny_hybrid):
    return Checkpoint.find(tiny_hybrid)


def saved(folder, target, *, slim=True, **changes):
    spec = target.read_spec()
    its = {"hidden_size": spec.hidden_size, "vocab_size": spec.vocab_size, "num_target_layers": spec.num_layers}
    draft = DSparkDraft(DraftConfig(**(SHAPE | its | changes)), seed=3)
    if not slim:
        draft.set_embeddings(*(torch.randn(spec.vocab_size, spec.hidden_size) for _ in range(2)))
    draft.save(folder, slim=slim)
    return folder


def saved_dflash(folder, target, **changes):
    spec = target.read_spec()
    its = {"hidden_size": spec.hidden_size, "vocab_size": spec.vocab_size, "num_target_layers": spec.num_layers}
    shape = {key: value for key, value in SHAPE.items() if key != "markov_rank"}
    DSparkDraft(DFlashConfig(**(shape | its | changes)), seed=3).save(folder, slim=True)
    return folder


def saved_eagle3(folder, target, **changes):
    spec = target.read_spec()
    its = {"hidden_size": spec.hidden_size, "vocab_size": spec.vocab_size, "num_target_layers": spec.num_layers}
    shape = {
        key: value for key, value in SHAPE.items() if key in Eagle3Config.model_fields and key != "num_hidden_layers"
    }
    config = Eagle3Config(**(shape | its | {"target_layer_ids": (0, 1, 2, 4, 6), "ttt_length": 3} | changes))
    Eagle3Draft(config, seed=3).save(folder, slim=True)
    return folder


def contents(folder):
    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


def assert_equal(first, second):
    assert first[0] == second[0]
    assert first[1].keys() == second[1].keys()
    for name, tensor in first[1].items():
        assert tensor.dtype == second[1][name].dtype
        assert torch.equal(tensor, second[1][name]), name


def assert_comes_back(draft, format_name, target, folder):
    """There and back, and there again."""
    found = export_draft(draft, format_name, folder / "there", target, slim=True)
    import_draft(folder / "there", folder / "back")
    assert_equal(contents(folder / "back"), contents(draft))
    export_draft(folder / "back", format_name, folder / "again", target, slim=True)
    assert_equal(contents(folder / "again"), contents(folder / "there"))
    return found


@pytest.mark.parametrize(
    ("format_name", "head"), [(form.name, head) for form in FORMATS.values() for head in form.heads]
)
def test_a_draft_comes_back_equal_to_the_bit(target, tmp_path, format_name, head):
    assert_comes_back(saved(tmp_path / "draft", target, markov_head_type=head), format_name, target, tmp_path)


@pytest.mark.parametrize("format_name", list(FORMATS))
@pytest.mark.parametrize(
    "changes",
    [
        {"markov_rank": 0, "enable_confidence_head": False},
        {"markov_rank": 0, "confidence_head_with_markov": False},
        {"confidence_head_with_markov": False},
        {"enable_confidence_head": False},
    ],
)
def test_heads_that_are_off_are_off_when_the_draft_comes_back(target, tmp_path, format_name, changes):
    draft = saved(tmp_path / "draft", target, **changes)
    found = assert_comes_back(draft, format_name, target, tmp_path)
    config, tensors = contents(tmp_path / "there")
    added = "markov_rank" in changes and FORMATS[format_name].needs_head
    assert bool(found.remarks) == added
    heads = {name: tensor for name, tensor in tensors.items() if "markov_w" in name}
    assert len(heads) == (2 if added or "markov_rank" not in changes else 0)
    if added:
        assert (config.get("dflash_config") or config)["markov_rank"] == 32
        assert not any(tensor.any() for tensor in heads.values())


def test_a_head_of_zeros_changes_no_logit_and_no_confidence(target, tmp_path):
    saved(tmp_path / "draft", target, markov_rank=0, confidence_head_with_markov=False, slim=False)
    export_draft(tmp_path / "draft", "vllm", tmp_path / "there", target)
    plain, padded = DSparkDraft.load(tmp_path / "draft"), DSparkDraft.load(tmp_path / "there")
    tokens = torch.arange(30, 42)[None]
    taps = torch.randn(1, 12, 2 * plain.config.hidden_size)
    with torch.no_grad():
        logits = []
        for draft in (plain, padded):
            context = draft.new_context()
            draft.extend(context, taps, [12], tokens)
            block = draft.begin(context, tokens[:, -1])
            logits.append((block.next_logits(tokens[:, -1]), block.confidence(tokens[:, -1])))
    assert torch.equal(logits[0][0], logits[1][0])
    torch.testing.assert_close(logits[0][1], logits[1][1])


@pytest.mark.parametrize("format_name", list(EAGLE3_FORMATS))
def test_an_eagle3_draft_comes_back_equal_to_the_bit(target, tmp_path, format_name):
    draft = saved_eagle3(tmp_path / "draft", target)
    assert_comes_back(draft, format_name, target, tmp_path)
    assert import_draft(tmp_path / "there", tmp_path / "full", target).embeddings


@pytest.mark.parametrize("format_name", list(DFLASH_FORMATS))
def test_a_dflash_draft_comes_back_equal_to_the_bit(target, tmp_path, format_name):
    draft = saved_dflash(tmp_path / "draft", target)
    assert not assert_comes_back(draft, format_name, target, tmp_path).remarks
    values, tensors = contents(tmp_path / "there")
    assert values["block_size"] == 6  # the anchor counted
    assert not any("markov" in name for name in tensors)
    if format_name == "speculators":
        assert values["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 5
        assert (values["aux_hidden_state_layer_ids"], values["sample_from_anchor"]) == ([2, 5], False)
    else:
        assert values["dflash_config"] == {"mask_token_id": 20, "target_layer_ids": [1, 4]}


BLOCKS = {"sliding_window": 32, "causal_block": True, "attention_sinks": True, "sample_from_anchor": False}


@pytest.mark.parametrize(
    ("format_name", "kinds"),
    [
        *(("vllm", kinds) for kinds in ("sliding_window", "causal_block", "attention_sinks", "sample_from_anchor")),
        ("vllm", tuple(BLOCKS)),
        ("sglang", tuple(BLOCKS)),
        ("modelopt", ("sliding_window", "attention_sinks")),
        ("modelopt", ("causal_block",)),
        ("speculators", ("sample_from_anchor",)),
    ],
)
def test_blocks_that_deepspec_has_not_come_back_equal_to_the_bit(target, tmp_path, format_name, kinds):
    kinds = (kinds,) if isinstance(kinds, str) else kinds
    draft = saved(tmp_path / "draft", target, **{kind: BLOCKS[kind] for kind in kinds})
    assert_comes_back(draft, format_name, target, tmp_path)
    values, tensors = contents(tmp_path / "there")
    assert ("layers.1.self_attn.attention_sink_bias" in tensors) == ("attention_sinks" in kinds)
    assert values["block_size"] == 5 + ("sample_from_anchor" in kinds)


def test_a_format_that_cannot_say_what_a_block_has_is_refused(target, tmp_path):
    whole = saved(tmp_path / "whole", target, **BLOCKS)
    sinks = saved(tmp_path / "sinks", target, attention_sinks=True)
    dflash = saved_dflash(tmp_path / "dflash", target, sliding_window=32)
    for draft, form, message in (
        (whole, "deepspec", "a sliding window or a causal block or attention sinks or a slot 0 that is not sampled"),
        (whole, "modelopt", "modelopt has no DSpark draft with a slot 0 .* Formats that hold this one are vllm"),
        (sinks, "specforge", "specforge has no DSpark draft with attention sinks"),
        (sinks, "speculators", "speculators has no DSpark draft with attention sinks"),
        (dflash, "speculators", "speculators has no DFlash draft with a sliding window"),
    ):
        with pytest.raises(InputError, match=message):
            export_draft(draft, form, tmp_path / "out", target)
    gated = saved(tmp_path / "rnn", target, markov_head_type="rnn", sample_from_anchor=False)
    with pytest.raises(InputError, match="begins an rnn head at the anchor's slot"):
        export_draft(gated, "speculators", tmp_path / "out", target)
    assert not (tmp_path / "out").exists()


def test_a_dflash_draft_takes_a_window_a_causal_block_and_sinks_along(target, tmp_path):
    changes = {key: value for key, value in BLOCKS.items() if key != "sample_from_anchor"}
    draft = saved_dflash(tmp_path / "draft", target, **changes)
    assert_comes_back(draft, "vllm", target, tmp_path)
    nested = contents(tmp_path / "there")[0]["dflash_config"]
    assert (nested["use_swa"], nested["swa_window_size"], nested["causal"]) == (True, 32, True)
    assert nested["attention_sink_bias"] is True


def test_a_dflash_draft_that_samples_from_its_anchor_is_refused(target, tmp_path):
    draft = saved_dflash(tmp_path / "draft", target)
    values = json.loads((draft / "config.json").read_text())
    values["dflash_config"]["sample_from_anchor"] = True
    (draft / "config.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"dflash_config.sample_from_anchor = True"):
        import_draft(draft, tmp_path / "back")


def test_vllm_s_eagle3_counts_taps_from_the_embedding(target, tmp_path):
    export_draft(saved_eagle3(tmp_path / "draft", target), "vllm", tmp_path / "there", slim=True)
    config, tensors = contents(tmp_path / "there")
    assert config["architectures"] == ["Eagle3Qwen3ForCausalLM"]
    assert config["model_type"] == "qwen3"
    assert config["eagle_aux_hidden_state_layer_ids"] == [1, 2, 3, 5, 7]
    assert config["draft_vocab_size"] == config["vocab_size"]
    assert {"fc.weight", "layers.0.hidden_norm.weight", "layers.0.self_attn.q_norm.weight"} <= tensors.keys()


def test_taps_count_from_the_embedding_in_speculators_and_not_elsewhere(target, tmp_path):
    draft = saved(tmp_path / "draft", target)
    for name in FORMATS:
        export_draft(draft, name, tmp_path / name, target, slim=True)
    assert contents(tmp_path / "vllm")[0] == contents(tmp_path / "deepspec")[0]
    configs = {name: contents(tmp_path / name)[0] for name in FORMATS}
    assert configs["speculators"]["aux_hidden_state_layer_ids"] == [2, 5]
    assert configs["modelopt"]["dflash_config"]["target_layer_ids"] == [1, 4]
    assert configs["deepspec"]["target_layer_ids"] == configs["sglang"]["target_layer_ids"] == [1, 4]
    assert configs["speculators"]["transformer_layer_config"]["rope_parameters"]["rope_theta"] == 12345.0
    assert configs["modelopt"]["rope_theta"] == 12345.0
    names = set(contents(tmp_path / "modelopt")[1])
    assert {"markov_w1.weight", "confidence_proj.bias", "layers.0.self_attn.q_norm.weight"} <= names
    assert not any(name.startswith(("markov_head", "confidence_head")) for name in names)


def test_a_head_that_specforge_only_trains_is_there_when_it_comes_in(target, tmp_path):
    """SpecForge says by its weight in the loss that there is a confidence head, and leaves out what it defaults to."""
    draft = saved(tmp_path / "draft", target, confidence_head_with_markov=False)
    export_draft(draft, "specforge", tmp_path / "there", target, slim=True)
    path = tmp_path / "there" / "config.json"
    values = json.loads(path.read_text())
    for key in ("enable_confidence_head", "confidence_head_with_markov", "markov_head_type"):
        del values["dflash_config"][key]
    values["dflash_config"]["confidence_head_alpha"] = 0.5
    path.write_text(json.dumps(values))
    import_draft(tmp_path / "there", tmp_path / "back")
    assert_equal(contents(tmp_path / "back"), contents(draft))


def test_a_slim_draft_becomes_full_with_its_target_and_slim_again(target, tmp_path):
    draft = saved(tmp_path / "draft", target)
    full = export_draft(draft, "deepspec", tmp_path / "full", target)
    assert full.embeddings
    stored = contents(tmp_path / "full")[1]
    its = read_embedding_and_head(target.folder, target.read_spec())
    assert torch.equal(stored[SHARED[0]], its.embedding)
    assert torch.equal(stored[SHARED[1]], its.head)
    assert not export_draft(tmp_path / "full", "deepspec", tmp_path / "slim", slim=True).embeddings
    assert_equal(contents(tmp_path / "slim"), contents(draft))
    imported = import_draft(tmp_path / "slim", tmp_path / "filled", target)
    assert imported.embeddings
    assert_equal(contents(tmp_path / "filled"), contents(tmp_path / "full"))


TOKENS = torch.arange(0, 384, 3)  # a part of the vocabulary


@pytest.mark.parametrize(
    ("make", "format_name"),
    [
        (make, name)
        for make, forms in ((saved, FORMATS), (saved_dflash, DFLASH_FORMATS), (saved_eagle3, EAGLE3_FORMATS))
        for name in forms
    ],
)
def test_a_part_of_the_vocabulary_goes_along_with_its_part_of_the_head_or_is_refused(
    target, tmp_path, make, format_name
):
    draft = make(tmp_path / "draft", target, draft_vocab_size=len(TOKENS))
    values, tensors = contents(draft)
    save_file(tensors | {"d2t": TOKENS - torch.arange(len(TOKENS))}, draft / "model.safetensors")
    if format_name not in ("vllm", "speculators"):
        with pytest.raises(InputError, match=f"{format_name} has no draft of a part of the vocabulary"):
            export_draft(draft, format_name, tmp_path / "there", target)
        return
    export_draft(draft, format_name, tmp_path / "there", target, slim=True)
    config, stored = contents(tmp_path / "there")
    assert config["draft_vocab_size"] == len(TOKENS)
    assert torch.equal(stored["d2t"] + torch.arange(len(TOKENS)), TOKENS)
    head = read_embedding_and_head(target.folder, target.read_spec()).head
    assert torch.equal(stored["lm_head.weight"], head[TOKENS])  # vLLM refuses one without
    assert "embed_tokens.weight" not in stored
    if format_name == "speculators":
        assert stored["t2d"].nonzero()[:, 0].tolist() == TOKENS.tolist()
    import_draft(tmp_path / "there", tmp_path / "back", target)
    config, stored = contents(tmp_path / "back")
    assert config == values
    assert torch.equal(stored.pop("lm_head.weight"), head[TOKENS])
    del stored["embed_tokens.weight"]
    assert_equal((config, stored), contents(draft))
    if format_name == "vllm" and make is not saved_eagle3:
        with pytest.raises(InputError, match="slim copy"):
            export_draft(draft, format_name, tmp_path / "again", slim=True)


def test_formats_that_share_the_target_s_matrices_never_hold_them(target, tmp_path):
    draft = saved(tmp_path / "draft", target, slim=False)
    for name in ("sglang", "speculators", "modelopt"):
        assert not export_draft(draft, name, tmp_path / name, target).embeddings
        assert not set(SHARED) & contents(tmp_path / name)[1].keys()


def test_the_target_s_layers_are_asked_for_where_a_format_lacks_them(target, tmp_path):
    draft = saved(tmp_path / "draft", target)
    export_draft(draft, "speculators", tmp_path / "there", target)
    file = tmp_path / "there" / "config.json"
    values = json.loads(file.read_text())
    del values["num_target_layers"], values["num_anchors"]
    file.write_text(json.dumps(values))
    with pytest.raises(InputError, match="how many layers"):
        import_draft(tmp_path / "there", tmp_path / "back")
    assert not (tmp_path / "back").exists()
    found = import_draft(tmp_path / "there", tmp_path / "back", target)
    assert found.remarks
    assert contents(tmp_path / "back")[0]["num_target_layers"] == target.read_spec().num_layers


@pytest.mark.parametrize(
    ("format_name", "path", "value", "message"),
    [
        ("speculators", ("transformer_layer_config", "layer_types"), ["sliding_attention"] * 2, "from the anchor, and"),
        ("speculators", ("draft_vocab_size",), 100, r"lacks d2t, which is not what its config describes"),
        ("modelopt", ("dflash_config", "shift_label"), False, "shift_label = False"),
        ("modelopt", ("dflash_config", "attention_sink_bias"), True, "lacks layers.0.self_attn.attention_sink_bias"),
        ("modelopt", ("dflash_config", "use_swa"), True, "does not say how long"),
        ("deepspec", ("layer_types",), ["sliding_attention", "full_attention"], "of different types"),
        ("deepspec", ("quantization_config",), {"quant_algo": "W4A16_NVFP4"}, "weights are quantised"),
        ("deepspec", ("architectures",), ["LlamaForCausalLM"], "describes LlamaForCausalLM, not a draft"),
        ("deepspec", ("target_layer_ids",), [1, 99], "target has layers 0 to 7"),
        ("deepspec", ("mask_token_id",), 10**6, "vocabulary has"),
        ("deepspec", ("vocab_size",), 999, "which is not what its config describes"),
    ],
)
def test_a_draft_that_drafts_here_cannot_be_is_refused(target, tmp_path, format_name, path, value, message):
    draft = saved(tmp_path / "draft", target)
    export_draft(draft, format_name, tmp_path / "there", target, slim=True)
    file = tmp_path / "there" / "config.json"
    values = json.loads(file.read_text())
    inner = values
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    file.write_text(json.dumps(values))
    with pytest.raises(InputError, match=message):
        import_draft(tmp_path / "there", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_what_does_not_fit_is_refused_and_nothing_is_lost(target, tiny_llama, tmp_path):
    draft, out = saved(tmp_path / "draft", target), tmp_path / "out"
    with pytest.raises(InputError, match="made for another target"):
        export_draft(draft, "deepspec", out, Checkpoint.find(tiny_llama))
    with pytest.raises(InputError, match="names its target"):
        export_draft(draft, "speculators", out)
    embedding = saved(tmp_path / "tap", target, target_layer_ids=(-1, 2))
    with pytest.raises(InputError, match="tap -1"):
        export_draft(embedding, "sglang", out, target)
    gated = saved(tmp_path / "gated", target, markov_head_type="gated")
    with pytest.raises(InputError, match="vllm reads no gated Markov head"):
        export_draft(gated, "vllm", out, target)
    eagle3 = saved_eagle3(tmp_path / "eagle3", target)
    with pytest.raises(InputError, match="sglang has no EAGLE-3 draft"):
        export_draft(eagle3, "sglang", out, target)
    with pytest.raises(InputError, match="deepspec has no DFlash draft"):
        export_draft(saved_dflash(tmp_path / "dflash", target), "deepspec", out, target)
    assert not out.exists()
    with pytest.raises(InputError, match="holds other files"):
        export_draft(draft, "deepspec", draft, target)
    with pytest.raises(InputError, match="holds other files"):
        import_draft(draft, eagle3)
    with pytest.raises(InputError, match="made for another target"):
        import_draft(draft, out, Checkpoint.find(tiny_llama))
    shutil.copytree(draft, tmp_path / "broken")
    tensors = load_file(draft / "model.safetensors")
    save_file(tensors | {"d2t": torch.zeros(4)}, tmp_path / "broken" / "model.safetensors")
    with pytest.raises(InputError, match="holds d2t, which is not what its config describes"):
        import_draft(tmp_path / "broken", out)
    del tensors["fc.weight"]
    save_file(tensors, tmp_path / "broken" / "model.safetensors")
    with pytest.raises(InputError, match=r"lacks fc\.weight"):
        import_draft(tmp_path / "broken", out)
    assert not out.exists()
