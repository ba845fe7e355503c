"""A draft that starts from the target's last layers computes with them what the target computes."""

import pytest
import torch

from nemotron_dspark.config import DraftSection
from nemotron_dspark.drafts.config import build_draft_config
from nemotron_dspark.drafts.dspark import DSparkDraft
from nemotron_dspark.drafts.from_target import start_from_target
from nemotron_dspark.errors import InputError
from nemotron_dspark.recipe import tiny
from nemotron_dspark.targets import Target


def started(target, **section):
    config, _ = build_draft_config(target.spec, DraftSection(markov_rank=0, **section), mask_token_id=5)
    draft = DSparkDraft(config)
    draft.set_embeddings(target.model.get_input_embeddings().weight, target.head.weight)
    start_from_target(draft, target.folder, target.spec)
    return draft.eval()


def test_a_layer_makes_the_target_s_keys_and_values_of_the_last_tap(tiny_llama):
    target = Target.load(str(tiny_llama))
    last = target.spec.num_layers - 1
    draft = started(target, num_layers=1, taps=[1, last - 1])
    draft.fc.weight.data[:, : target.spec.hidden_size] = 0  # the other tap
    ids = torch.arange(40, 60)[None]
    captured = target.capture(ids, None, (1, last - 1))
    layer = target.model.model.layers[last]
    with torch.no_grad():
        seen = layer.input_layernorm(captured.taps[..., target.spec.hidden_size :])
        context = draft.hidden_norm(draft.fc(captured.taps))
        ours, theirs = draft.layers[0].self_attn, layer.self_attn
        for part in ("q_proj", "k_proj", "v_proj"):
            found, expected = getattr(ours, part)(context), getattr(theirs, part)(seen)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            draft.layers[0].mlp(draft.layers[0].post_attention_layernorm(seen)),
            layer.mlp(layer.post_attention_layernorm(seen)),
            rtol=1e-4,
            atol=1e-4,
        )


def test_layers_of_another_kind_or_shape_are_refused(tiny_hybrid, tiny_llama, tmp_path):
    with pytest.raises(InputError, match="is not one of Llama's or Qwen3's kind"):
        started(Target.load(str(tiny_hybrid)), num_layers=1)
    with pytest.raises(InputError, match="do not have the draft's shape"):
        started(Target.load(str(tiny_llama)), num_layers=1, intermediate_size=96)
    qwen = Target.load(str(tiny.random_target(tmp_path / "qwen", "qwen3")))
    norm = qwen.model.model.layers[-1].self_attn.q_norm.weight
    assert torch.equal(started(qwen, num_layers=1).layers[0].self_attn.q_norm.weight, norm)
