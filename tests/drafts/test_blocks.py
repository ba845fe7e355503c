"""Windows, causal blocks, sinks and blocks whose anchor predicts nothing: trained and decoded as in plain loops."""

import itertools

import pytest
import torch

from nemotron_dspark.config import DraftSection
from nemotron_dspark.drafts.config import DFlashConfig, DraftConfig, build_draft_config, build_eagle3_config
from nemotron_dspark.drafts.dspark import DSparkDraft
from nemotron_dspark.drafts.layers import Sight, attend_with_sinks, block_attention, context_bytes
from nemotron_dspark.errors import InputError
from nemotron_dspark.targets import Checkpoint
from nemotron_dspark.training.batches import collate
from nemotron_dspark.training.objective import DSparkObjective, LossWeights
from tests.drafts import plain
from tests.drafts.conftest import SHAPE
from tests.drafts.test_dspark import batch
from tests.rows import join_rows
from tests.training.conftest import Sample

ALONE = [{"sliding_window": 7}, {"causal_block": True}, {"attention_sinks": True}, {"sample_from_anchor": False}]
TOGETHER = {"sliding_window": 8, "causal_block": True, "attention_sinks": True, "sample_from_anchor": False}
ALL = pytest.mark.parametrize("changes", [{}, *ALONE, TOGETHER], ids=lambda changes: "-".join(changes) or "none")


def with_sinks_in_use(draft):
    """Sinks start at 0; others tell more."""
    with torch.no_grad():
        for layer in draft.layers:
            if layer.self_attn.attention_sink_bias is not None:
                layer.self_attn.attention_sink_bias.add_(torch.linspace(-1, 3, 6))
    return draft


@ALL
@torch.no_grad()
def test_every_slot_is_what_plain_loops_give(make_draft, changes):
    draft = with_sinks_in_use(make_draft(**changes)).eval()
    ids, taps = batch(draft, length=16)
    anchors, valid = torch.tensor([[3, 11], [9, 0]]), torch.ones(2, 2, dtype=torch.bool)
    trained = {}
    for kind in ("dense", "flex"):
        draft.attention = kind
        trained[kind] = draft(ids, taps, anchors, valid)
    torch.testing.assert_close(trained["flex"], trained["dense"], rtol=0, atol=1e-5)
    expected = plain.block_hidden(draft, ids[0], taps[0], 11).float()
    torch.testing.assert_close(trained["dense"][0, 1], expected, rtol=0, atol=1e-4)
    context = draft.new_context()
    draft.extend(context, taps[:1, :11], [11])
    torch.testing.assert_close(draft.block_hidden(context, ids[:1, 11])[0], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("changes", [{"sliding_window": 7}, TOGETHER], ids=["window", "all"])
@torch.no_grad()
def test_decoding_in_pieces_forgets_what_no_slot_sees_and_gives_the_numbers_of_training(make_draft, changes):
    draft = with_sinks_in_use(make_draft(**changes)).eval()
    ids, taps = batch(draft, rows=3, length=90)
    reach = draft.config.sliding_window - 1
    lengths = [0, 0, 0]
    contexts = [draft.new_context() for _ in range(3)]
    for row, first in enumerate((40, 5, 17)):  # prompts, longer and shorter than the window
        draft.extend(contexts[row], taps[row : row + 1, : first + 2], [first])
        lengths[row] = first
    together = join_rows(contexts)
    for counts in [(1, 6, 3), (6, 6, 6), (2, 1, 6), (1, 1, 1), (6, 2, 5), (5, 6, 1), (6, 6, 6), (3, 4, 5)]:
        piece = torch.stack([taps[row, at : at + 6] for row, at in enumerate(lengths)])
        draft.extend(together, piece, counts)
        lengths = [length + count for length, count in zip(lengths, counts, strict=True)]
        assert together.lengths == lengths
        anchors = torch.tensor(lengths)[:, None]
        expected = draft(ids, taps, anchors, torch.ones_like(anchors, dtype=torch.bool))[:, 0]
        found = draft.block_hidden(together, ids.gather(1, anchors)[:, 0])
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        picked = together.select([2, 0])
        again = draft.block_hidden(picked, ids.gather(1, anchors)[[2, 0], 0])
        torch.testing.assert_close(again, expected[[2, 0]], rtol=0, atol=1e-5)
    assert all(min(reach, length) <= kept <= 2 * reach for kept, length in zip(together.stored, lengths, strict=True))
    together.leave(0)
    assert together.lengths == [lengths[2], lengths[1]]
    torch.testing.assert_close(
        draft.block_hidden(together, ids.gather(1, anchors)[[2, 1], 0]), expected[[2, 1]], rtol=0, atol=1e-5
    )


@torch.no_grad()
def test_a_window_bounds_what_decoding_remembers(make_draft):
    """A prompt of many windows and as much again in rounds: as many bytes as after one window."""
    draft = make_draft(sliding_window=65).eval()
    context = draft.new_context()
    taps = torch.randn(1, 600, 2 * 64)
    draft.extend(context, taps, [600])
    for at in range(40):
        draft.extend(context, taps[:, at : at + 6], [6])
        draft.block_hidden(context, torch.tensor([1]))
    held = sum(part.untyped_storage().nbytes() for kv in context.layers for part in kv._stored)
    assert context.lengths == [840]
    assert held <= 2 * context_bytes(draft.config, 64, 4)  # no buffer is smaller than 64 positions
    assert context_bytes(draft.config, 840, 4) == context_bytes(draft.config, 64, 4)


def test_sinks_have_the_gradients_that_their_formula_has():
    generator = torch.Generator().manual_seed(0)
    queries, keys, values = (torch.randn(2, heads, n, 8, generator=generator) for heads, n in ((4, 3), (2, 5), (2, 5)))
    mask = torch.rand(2, 1, 3, 5, generator=generator) < 0.7
    given = [tensor.requires_grad_() for tensor in (queries, keys, values, torch.linspace(-2, 2, 4))]
    found = attend_with_sinks(*given[:3], mask, given[3])
    scores = queries @ keys.repeat_interleave(2, 1).mT / 8**0.5
    scores = scores.masked_fill(~mask, -torch.inf).exp()
    mass = scores.sum(-1, keepdim=True) + given[3].exp()[:, None, None]
    expected = scores / mass @ values.repeat_interleave(2, 1)
    torch.testing.assert_close(found, expected)
    weight = torch.randn(found.shape, generator=generator)
    for ours, theirs in zip(
        torch.autograd.grad(found, given, weight), torch.autograd.grad(expected, given, weight), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_flex_attention_with_sinks_has_the_gradients_of_the_dense_mask_on_cuda(make_draft):
    gradients = {}
    for kind in ("dense", "flex"):
        draft = with_sinks_in_use(make_draft(attention=kind, **TOGETHER)).cuda()
        ids, taps = (tensor.cuda() for tensor in batch(draft, length=300))
        anchors = torch.arange(2, 290, 8, device="cuda").expand(2, -1)
        draft(ids, taps, anchors, torch.ones_like(anchors, dtype=torch.bool)).square().mean().backward()
        gradients[kind] = {name: p.grad for name, p in draft.trainable_parameters().items() if p.grad is not None}
    assert "layers.0.self_attn.attention_sink_bias" in gradients["dense"]
    for name, gradient in gradients["dense"].items():
        torch.testing.assert_close(gradients["flex"][name], gradient, rtol=1e-3, atol=1e-5)


def test_dense_chunks_leave_out_context_that_no_block_of_theirs_sees():
    """Keys that no window reaches may hold anything, and are never looked at."""
    anchors, sight = torch.tensor([[5, 60, 90, 120]]), Sight(window=6, causal=True)
    queries, keys, values = torch.randn(1, 2, 16, 8), torch.randn(1, 2, 144, 8), torch.randn(1, 2, 144, 8)
    attend = block_attention(anchors, 128, 4, "dense", sight)
    assert [chunk.seen for chunk in attend.args[0]] == [slice(0, 5), slice(55, 60), slice(85, 90), slice(115, 120)]
    found = attend(queries, keys, values, None)
    keys[:, :, 5:55], values[:, :, 90:115] = torch.nan, torch.nan
    assert torch.equal(attend(queries, keys, values, None), found)


def test_the_loss_of_a_slot_behind_the_anchor_is_of_the_token_of_its_own_place(make_draft):
    """Slot k of either kind predicts the token k + 1 behind the anchor, from the one before it."""
    draft = make_draft(sample_from_anchor=False, enable_confidence_head=False, confidence_head_with_markov=False)
    ids, taps = batch(draft, rows=1, length=16)
    last = torch.randn(16, 64, generator=torch.Generator().manual_seed(1))
    anchors = torch.tensor([2, 8])
    made = collate([Sample(ids[0], torch.ones(16, dtype=torch.bool), taps[0], last)], [anchors], 5)
    loss = DSparkObjective(draft, LossWeights(ce=1.0, l1=0.0, confidence=0.0, decay=None))(made)
    expected = 0.0
    with torch.no_grad():
        for anchor in anchors.tolist():
            hidden = plain.block_hidden(draft, ids[0], taps[0], anchor).float()
            for slot in range(5):
                before, label = ids[0, anchor + slot], ids[0, anchor + slot + 1]
                head = draft.markov_head
                logits = draft.lm_head(hidden[slot]) + head.markov_w2(head.markov_w1(before))
                expected += torch.nn.functional.cross_entropy(logits, label)
    torch.testing.assert_close(loss.total.detach(), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", [DraftConfig, DFlashConfig])
def test_what_a_block_has_comes_back_from_its_config_and_what_it_has_not_is_not_written(make_config, kind):
    shape = make_config().model_dump()
    if kind is DFlashConfig:
        shape = {key: value for key, value in shape.items() if not key.startswith(("markov", "enable", "confidence"))}
        del shape["sample_from_anchor"]
    choices = [(None, 9), (False, True), (False, True), (True, False) if kind is DraftConfig else (False,)]
    for window, causal, sinks, anchored in itertools.product(*choices):
        changes = {"sliding_window": window, "causal_block": causal, "attention_sinks": sinks}
        config = kind(**(shape | changes | {"sample_from_anchor": anchored}))
        values = config.to_json()
        assert DraftConfig.from_json(values) == config
        nested = values.get("dflash_config", {})
        assert {"use_swa", "swa_window_size"} <= nested.keys() or window is None
        assert nested.get("causal", False) is causal
        assert nested.get("attention_sink_bias", False) is values.get("attention_sink_bias", False) is sinks
        assert values["block_size"] == (5 if anchored else 6)
        if not (window or causal or sinks) and anchored:
            assert not {"dflash_config", "sample_from_anchor", "causal_block", "attention_sinks"} & values.keys()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": ["sliding_attention", "full_attention"]}, "layers are of different types, full_attention and"),
        ({"layer_types": ["sliding_attention"] * 2}, "does not say how long"),
        ({"layer_types": ["sliding_attention"] * 2, "sliding_window": 5}, "sliding_window = 5 is not accepted"),
        ({"layer_types": ["chunked_attention"] * 2}, "layer_types is .'chunked_attention'."),
        ({"sample_from_anchor": False, "block_size": 1}, "block_size is 1, and it counts the anchor"),
    ],
)
def test_blocks_that_drafts_here_cannot_have_are_refused(make_config, changes, message):
    with pytest.raises(InputError, match=message):
        DraftConfig.from_json(make_config().to_json() | changes)


def test_layers_of_sliding_type_are_causal_unless_the_config_says_otherwise(make_config):
    """As vLLM reads them."""
    values = make_config().to_json() | {"layer_types": ["sliding_attention"] * 2, "sliding_window": 16}
    assert DraftConfig.from_json(values).causal_block
    assert not DraftConfig.from_json(values | {"is_causal": False}).causal_block
    assert DraftConfig.from_json(values).sliding_window == 16


def test_a_new_draft_takes_them_from_the_configuration(tiny_hybrid):
    spec = Checkpoint.find(tiny_hybrid).read_spec()
    section = DraftSection(sliding_window=64, causal_block=True, attention_sinks=True, sample_from_anchor=False)
    config, _ = build_draft_config(spec, section, mask_token_id=3)
    assert list(config.beyond_deepspec) == ["sliding_window", "causal_block", "attention_sinks", "sample_from_anchor"]
    draft = DSparkDraft(config)
    assert draft.layers[0].self_attn.attention_sink_bias.tolist() == [0.0] * 4
    dflash, _ = build_draft_config(spec, DraftSection(kind="dflash", sliding_window=64), mask_token_id=3)
    assert dflash.sliding_window == 64
    with pytest.raises(InputError, match="EAGLE-3 drafts have no sliding_window"):
        build_eagle3_config(spec, DraftSection(sliding_window=64))
    with pytest.raises(InputError, match="a block has 7 positions, and a window must hold more"):
        build_draft_config(spec, DraftSection(sliding_window=7), mask_token_id=3)


def test_a_shape_without_them_has_the_weights_it_always_had():
    config = DraftConfig(
        **SHAPE, num_hidden_layers=2, block_size=5, mask_token_id=3, target_layer_ids=(1, 4), markov_rank=12
    )
    assert not any("sink" in name for name in DSparkDraft(config).trainable_parameters())
