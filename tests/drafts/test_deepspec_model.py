"""DeepSpec's own `Qwen3DSparkModel` and this draft: same folder, same numbers, in both directions.

Needs a DeepSpec checkout in DEEPSPEC_HOME; on a CPU its FlexAttention mask is replaced by the same mask, dense.
"""

import os
import sys

import pytest
import torch

from nemotron_dspark.config import TrainConfig
from nemotron_dspark.drafts.dspark import DSparkDraft
from nemotron_dspark.training.anchors import draw_anchors
from nemotron_dspark.training.batches import collate
from nemotron_dspark.training.objective import LossWeights, dspark_loss

HOME = os.environ.get("DEEPSPEC_HOME")
pytestmark = [
    pytest.mark.deepspec,
    pytest.mark.skipif(not HOME, reason="DEEPSPEC_HOME names no DeepSpec checkout"),
]


@pytest.fixture(scope="module")
def deepspec():
    """DeepSpec's modelling and loss modules, with a process group of one and a dense mask."""
    sys.path.insert(0, HOME)
    import deepspec.modeling.dspark.loss as loss
    import deepspec.modeling.dspark.qwen3.modeling as modeling
    import torch.distributed as dist

    def dense_mask(*, anchor_positions, block_keep_mask, seq_len, block_size, device):
        slots = anchor_positions.shape[1] * block_size
        block = torch.arange(slots) // block_size
        context = torch.arange(seq_len) < anchor_positions[:, block][:, :, None]
        own = (block[:, None] == block).expand(len(anchor_positions), -1, -1)
        return torch.cat((context, own), dim=-1)[:, None]

    original, modeling.create_dspark_attention_mask = modeling.create_dspark_attention_mask, dense_mask
    started = not dist.is_initialized()
    if started:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield modeling, loss
    modeling.create_dspark_attention_mask = original
    if started:
        dist.destroy_process_group()
    sys.path.remove(HOME)


def fixed_anchors(modeling, monkeypatch, batch):
    """Give DeepSpec's forward the anchors of ``batch`` in place of its own draw."""
    monkeypatch.setattr(modeling, "sample_anchor_positions", lambda **_: (batch.anchors, batch.valid))


def theirs_from(folder, modeling):
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    config._attn_implementation = "sdpa"
    return modeling.Qwen3DSparkModel.from_pretrained(folder, config=config, dtype=torch.float32)


@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn", "none"])
def test_deepspec_reads_our_folder_and_computes_the_same_loss_and_gradients(
    deepspec, make_draft, tmp_path, monkeypatch, kind
):
    modeling, loss_module = deepspec
    head = {"markov_rank": 0, "confidence_head_with_markov": False} if kind == "none" else {"markov_head_type": kind}
    draft = make_draft(spread=2.0, **head)
    draft.save(tmp_path / "ours")
    theirs = theirs_from(tmp_path / "ours", modeling)
    theirs.set_embedding_head_trainable(False)

    generator = torch.Generator().manual_seed(0)
    length, config = 40, draft.config
    mask = torch.arange(length) > 9
    mask[25] = False
    sample = type("Sample", (), {})()
    sample.input_ids = torch.randint(0, config.vocab_size, (length,), generator=generator)
    sample.loss_mask = mask
    sample.taps = torch.randn(length, config.num_taps * config.hidden_size, generator=generator)
    sample.last = torch.randn(length, config.hidden_size, generator=generator) * 0.3
    anchors = draw_anchors(mask, 6, seed=0, epoch=0, sample_id=0)
    batch = collate([sample], [anchors], config.block_size)
    fixed_anchors(modeling, monkeypatch, batch)

    outputs = theirs(
        input_ids=batch.input_ids,
        target_hidden_states=batch.taps,
        loss_mask=mask[None].float(),
        target_last_hidden_states=batch.last,
    )
    expected = loss_module.compute_dspark_loss(
        outputs=outputs, loss_decay_gamma=4.0, ce_loss_alpha=0.1, l1_loss_alpha=0.9, confidence_head_alpha=1.0
    )
    expected.backward()

    hidden = draft(batch.input_ids, batch.taps, batch.anchors, batch.valid)
    logits = draft.sequential.teacher_forced(
        draft.base_logits(hidden), hidden, batch.input_ids[0][(anchors[:, None] + torch.arange(5)).clamp(max=39)][None]
    )
    assert torch.equal(outputs.eval_mask, batch.counted)
    counted = batch.counted
    torch.testing.assert_close(logits[counted], outputs.draft_logits[counted], rtol=1e-4, atol=1e-4)
    loss = dspark_loss(draft, hidden, batch, LossWeights.of(TrainConfig(), draft))
    loss.value.backward()
    torch.testing.assert_close(loss.value, expected, rtol=1e-5, atol=1e-6)
    their_gradients = {name: p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    assert set(their_gradients) == set(draft.trainable_parameters())
    for name, parameter in draft.trainable_parameters().items():
        scale = float(their_gradients[name].abs().max())
        torch.testing.assert_close(parameter.grad, their_gradients[name], rtol=1e-3, atol=1e-4 * scale + 1e-9, msg=name)


def test_we_read_a_folder_that_deepspec_saved(deepspec, make_draft, tmp_path):
    modeling, _ = deepspec
    draft = make_draft()
    draft.save(tmp_path / "ours")
    theirs_from(tmp_path / "ours", modeling).save_pretrained(tmp_path / "theirs")
    loaded = DSparkDraft.load(tmp_path / "theirs")
    assert loaded.config == draft.config
    for name, value in draft.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
