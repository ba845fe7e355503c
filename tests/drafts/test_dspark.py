"""The draft's forward, its decoding path, and its files."""

import json

import pytest
import torch

from nemotron_dspark.drafts.dspark import DSparkDraft
from nemotron_dspark.errors import InputError
from tests.drafts.conftest import block_logits
from tests.rows import join_rows

HEADS = [{"markov_head_type": kind} for kind in ("vanilla", "gated", "rnn")]
HEADS += [{"markov_rank": 0, "confidence_head_with_markov": False}]


def batch(draft: DSparkDraft, rows: int = 2, length: int = 40, seed: int = 7):
    generator = torch.Generator().manual_seed(seed)
    config = draft.config
    ids = torch.randint(0, config.vocab_size, (rows, length), generator=generator)
    taps = torch.randn(rows, length, config.num_taps * config.hidden_size, generator=generator)
    return ids, taps


def test_decoding_path_equals_training_forward(make_draft):
    draft = make_draft().eval()
    ids, taps = batch(draft, rows=3)
    anchors = torch.tensor([[4, 19, 30], [1, 7, 25], [0, 12, 39]])
    hidden = draft(ids, taps, anchors, torch.ones_like(anchors, dtype=torch.bool))
    for block in range(3):
        context = draft.new_context(rows=3)
        position = anchors[:, block]
        # In uneven pieces, with rubbish beyond each row's count that must not matter.
        for start in range(0, 40, 9):
            counts = (position - start).clamp(0, 9).tolist()
            piece = taps[:, start : start + 9].clone()
            for row, count in enumerate(counts):
                piece[row, count:] = 1e3
            draft.extend(context, piece, [min(count, piece.shape[1]) for count in counts])
        assert context.lengths == position.tolist()
        for _ in range(2):  # drafting twice from the same context gives the same block
            block_hidden = draft.block_hidden(context, ids.gather(1, position[:, None])[:, 0])
            torch.testing.assert_close(block_hidden, hidden[:, block], rtol=0, atol=1e-5)


def test_rows_can_be_joined_and_picked(make_draft):
    draft = make_draft().eval()
    ids, taps = batch(draft, rows=3)
    alone = []
    for row, length in enumerate((5, 17, 9)):
        context = draft.new_context()
        draft.extend(context, taps[row : row + 1, :length], [length])
        alone.append(context)
    expected = [draft.block_hidden(context, ids[row : row + 1, 0]) for row, context in enumerate(alone)]
    joined = join_rows(alone)
    torch.testing.assert_close(draft.block_hidden(joined, ids[:, 0]), torch.cat(expected), rtol=0, atol=1e-5)
    picked = joined.select([2, 0])
    both = draft.block_hidden(picked, ids[[2, 0], 0])
    torch.testing.assert_close(both, torch.cat([expected[2], expected[0]]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("assign", [False, True])
def test_a_new_context_has_the_weights_that_were_loaded_last(make_draft, assign):
    draft, other = make_draft().eval(), make_draft(seed=5).eval()
    ids, taps = batch(draft, rows=1)
    blocks = []
    draft.new_context()
    for model in (draft, other):
        draft.load_state_dict(other.state_dict(), assign=assign)
        context = model.new_context()
        model.extend(context, taps, [40])
        blocks.append(model.block_hidden(context, ids[:, 0]))
    assert torch.equal(*blocks)


def test_block_sees_only_what_lies_before_its_anchor(make_draft):
    draft = make_draft()
    ids, taps = batch(draft)
    anchors, valid = torch.tensor([[10, 20], [10, 20]]), torch.ones(2, 2, dtype=torch.bool)
    hidden = draft(ids, taps, anchors, valid)
    changed_taps, changed_ids = taps.clone(), ids.clone()
    changed_taps[:, 10:] += 1.0
    changed_ids[:, 11:] = 0
    later = draft(changed_ids, changed_taps, anchors, valid)
    assert torch.equal(hidden[:, 0], later[:, 0])
    assert not torch.allclose(hidden[:, 1], later[:, 1])
    changed_taps = taps.clone()
    changed_taps[:, 9] += 1.0
    assert not torch.allclose(hidden[:, 0], draft(ids, changed_taps, anchors, valid)[:, 0])


def test_filler_blocks_are_finite_and_leave_the_others_alone(make_draft):
    draft = make_draft()
    ids, taps = batch(draft)
    anchors = torch.tensor([[10, 20, 0], [10, 20, 0]])
    valid = torch.tensor([[True, True, False], [True, True, False]])
    hidden = draft(ids, taps, anchors, valid)
    assert hidden.isfinite().all()
    torch.testing.assert_close(hidden[:, :2], draft(ids, taps, anchors[:, :2], valid[:, :2]), rtol=0, atol=1e-6)


def test_flex_attention_equals_the_dense_mask(make_draft):
    draft = make_draft()
    ids, taps = batch(draft)
    anchors, valid = torch.tensor([[3, 20], [11, 33]]), torch.ones(2, 2, dtype=torch.bool)
    with torch.no_grad():  # FlexAttention has no backward on a CPU
        dense = draft(ids, taps, anchors, valid)
        draft = make_draft(attention="flex")
        torch.testing.assert_close(draft(ids, taps, anchors, valid), dense, rtol=0, atol=1e-5)


def test_a_block_does_not_depend_on_how_attention_lays_out_its_output(make_draft, monkeypatch):
    """CUDA's kernels return [B, heads, n, d] with the positions outermost in memory."""
    draft = make_draft().eval()
    ids, taps = batch(draft)
    blocks, attend = [], torch.nn.functional.scaled_dot_product_attention
    for laid_out in (lambda out: out, lambda out: out.transpose(1, 2).contiguous().transpose(1, 2)):
        monkeypatch.setattr(
            torch.nn.functional,
            "scaled_dot_product_attention",
            lambda *given, laid_out=laid_out, **named: laid_out(attend(*given, **named)),
        )
        context = draft.new_context(rows=2)
        draft.extend(context, taps[:, :20], [20, 11])
        with torch.no_grad():
            blocks.append(draft.begin(context, ids[:, 20]).next_logits(ids[:, 20]))
    assert torch.equal(*blocks)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_decoding_on_cuda_is_decoding_on_a_cpu(make_draft):
    blocks = []
    for device in ("cpu", "cuda"):
        draft = make_draft().to(device).eval()
        ids, taps = (tensor.to(device) for tensor in batch(draft))
        context = draft.new_context(rows=2)
        draft.extend(context, taps[:, :20], [20, 11])
        with torch.no_grad():
            blocks.append(draft.begin(context, ids[:, 20]).next_logits(ids[:, 20]).cpu())
    torch.testing.assert_close(blocks[1], blocks[0], rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_flex_attention_gradients_equal_the_dense_mask_on_cuda(make_draft):
    gradients = {}
    for kind in ("dense", "flex"):
        draft = make_draft(attention=kind).cuda()
        ids, taps = (tensor.cuda() for tensor in batch(draft, length=300))
        anchors = torch.arange(2, 290, 8, device="cuda").expand(2, -1)
        draft(ids, taps, anchors, torch.ones_like(anchors, dtype=torch.bool)).square().mean().backward()
        gradients[kind] = {name: p.grad for name, p in draft.trainable_parameters().items() if p.grad is not None}
    for name, gradient in gradients["dense"].items():
        torch.testing.assert_close(gradients["flex"][name], gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("changes", HEADS, ids=["vanilla", "gated", "rnn", "none"])
def test_drafting_slot_by_slot_equals_teacher_forcing(make_draft, changes):
    draft = make_draft(**changes)
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(4, draft.config.block_size, draft.config.hidden_size, generator=generator)
    previous = torch.randint(0, draft.config.vocab_size, hidden.shape[:2], generator=generator)
    base = draft.base_logits(hidden)
    whole = block_logits(draft, hidden, previous)
    state = draft.markov_head.start(hidden)
    for slot in range(draft.config.block_size):
        logits, state = draft.markov_head.step(base[:, slot], hidden[:, slot], previous[:, slot], state)
        torch.testing.assert_close(logits, whole[:, slot])
    if draft.config.markov_rank:
        assert not torch.allclose(whole, base)


@pytest.mark.parametrize("changes", [*HEADS, {"enable_confidence_head": False}])
def test_saved_draft_loads_equal(make_draft, tmp_path, changes):
    draft = make_draft(**changes).eval()
    draft.save(tmp_path)
    loaded = DSparkDraft.load(tmp_path)
    assert loaded.config == draft.config
    assert {name: tuple(t.shape) for name, t in loaded.state_dict().items()} == {
        name: tuple(t.shape) for name, t in draft.state_dict().items()
    }
    ids, taps = batch(draft)
    anchors, valid = torch.tensor([[3, 20], [11, 33]]), torch.ones(2, 2, dtype=torch.bool)
    assert torch.equal(loaded(ids, taps, anchors, valid), draft(ids, taps, anchors, valid))
    assert not loaded.embed_tokens.weight.requires_grad


def test_slim_copy_needs_the_target_and_then_equals_the_full_one(make_draft, tmp_path):
    draft = make_draft().eval()
    draft.save(tmp_path, slim=True)
    loaded = DSparkDraft.load(tmp_path)
    assert not loaded.has_embeddings
    with pytest.raises(InputError, match="slim copy"):
        loaded.new_context()
    loaded.set_embeddings(draft.embed_tokens.weight, draft.lm_head.weight)
    ids, taps = batch(draft)
    anchors, valid = torch.tensor([[3], [11]]), torch.ones(2, 1, dtype=torch.bool)
    assert torch.equal(loaded(ids, taps, anchors, valid), draft(ids, taps, anchors, valid))


def test_same_seed_same_weights(make_config):
    one, two, other = (DSparkDraft(make_config(), seed=seed).trainable_parameters() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["fc.weight"], other["fc.weight"])


def test_damaged_and_foreign_files_are_named(make_draft, tmp_path):
    make_draft().save(tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    content, values = weights.read_bytes(), json.loads(config.read_text())

    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"model\.safetensors is damaged"):
        DSparkDraft.load(tmp_path)
    weights.unlink()
    with pytest.raises(InputError, match=r"has no model\.safetensors"):
        DSparkDraft.load(tmp_path)
    weights.write_bytes(content)

    config.write_text(json.dumps(values | {"intermediate_size": 64}))
    with pytest.raises(InputError, match=r"gate_proj.weight has shape|down_proj.weight has shape"):
        DSparkDraft.load(tmp_path)
    config.write_text(json.dumps(values | {"markov_head_type": "gated"}))
    with pytest.raises(InputError, match=r"lacks the tensor markov_head.gate_proj"):
        DSparkDraft.load(tmp_path)
    config.write_text(json.dumps(values | {"architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(InputError, match="not a DSpark draft"):
        DSparkDraft.load(tmp_path)
    config.unlink()
    with pytest.raises(InputError, match=r"no config\.json"):
        DSparkDraft.load(tmp_path)


def test_embeddings_of_another_target_are_refused(make_draft):
    draft = make_draft()
    with pytest.raises(InputError, match="another target"):
        draft.set_embeddings(torch.zeros(98, 64), torch.zeros(97, 64))


def test_recomputed_layers_give_the_same_gradients_and_keep_less(make_draft):
    anchors = torch.tensor([[4, 19], [1, 25]])
    gradients, kept = [], []

    def keep(tensor):
        kept[-1] += tensor.numel()
        return tensor

    for recompute in (False, True):
        draft = make_draft(recompute_layers=recompute).train()
        ids, taps = batch(draft)
        kept.append(0)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            hidden = draft(ids, taps, anchors, torch.ones_like(anchors, dtype=torch.bool))
        parameters = [draft.fc.weight, *draft.layers.parameters()]
        gradients.append(torch.autograd.grad(hidden.square().sum(), parameters))
    for plain, again in zip(*gradients, strict=True):
        assert torch.equal(plain, again)
    assert kept[1] < kept[0] / 3
