"""A draft of fp32 parameters that computes in bf16 has the numbers of one whose parameters were copied to bf16."""

import copy

import pytest
import torch

from nemotron_dspark.drafts.dspark import DSparkDraft
from nemotron_dspark.drafts.eagle3 import Eagle3Draft
from nemotron_dspark.training.anchors import LossSlots
from nemotron_dspark.training.batches import Batch
from nemotron_dspark.training.eagle3_objective import Eagle3Objective
from nemotron_dspark.training.objective import DSparkObjective, LossWeights
from tests.drafts.test_dspark import HEADS
from tests.drafts.test_eagle3 import batch_of as batch_of_all_positions
from tests.drafts.test_eagle3 import draft as eagle3_draft  # noqa: F401


def two_of(draft):
    """``draft`` in bf16 arithmetic twice: parameters in fp32, and copied to bf16."""
    masters = copy.deepcopy(draft)
    masters.set_embeddings(draft.embed_tokens.weight, draft.lm_head.weight, torch.bfloat16)
    return masters, draft.to(torch.bfloat16)


def batch_of(draft: DSparkDraft) -> Batch:
    generator = torch.Generator().manual_seed(7)
    config = draft.config
    anchors = torch.tensor([[3, 20, 30], [11, 33, 0]])
    valid = torch.tensor([[True, True, True], [True, True, False]])
    counted = valid[..., None].expand(-1, -1, config.block_size)
    return Batch(
        torch.randint(0, config.vocab_size, (2, 40), generator=generator),
        torch.randn(2, 40, config.num_taps * config.hidden_size, generator=generator).bfloat16(),
        torch.randn(2, 40, config.hidden_size, generator=generator).bfloat16(),
        anchors,
        valid,
        counted,
        LossSlots.of(anchors, counted, 40),
        80,
    )


def assert_same_gradients(masters, copied):
    copied = copied.trainable_parameters()
    for name, parameter in masters.trainable_parameters().items():
        assert parameter.dtype == torch.float32
        assert copied[name].dtype == torch.bfloat16
        if copied[name].grad is None:
            assert parameter.grad is None
        else:
            assert parameter.grad.dtype == torch.float32
            assert torch.equal(parameter.grad, copied[name].grad.float()), name


@pytest.mark.parametrize("changes", [*HEADS, {"enable_confidence_head": False}])
@pytest.mark.parametrize("recompute", [False, True])
def test_fp32_parameters_give_the_loss_and_the_gradients_of_bf16_copies(make_draft, changes, recompute):
    drafts = two_of(make_draft(spread=1.0, recompute_layers=recompute, **changes))
    confidence = 1.0 if drafts[0].confidence_head is not None else 0.0
    losses = []
    for draft in drafts:
        assert draft.compute_dtype == torch.bfloat16
        loss = DSparkObjective(draft.train(), LossWeights(confidence=confidence))(batch_of(draft))
        loss.total.backward()
        losses.append(loss.sums.to_tensor())
    assert torch.equal(*losses)
    assert_same_gradients(*drafts)


def test_eagle3_in_bf16_arithmetic_likewise(eagle3_draft):  # noqa: F811
    drafts = two_of(eagle3_draft)
    generator = torch.Generator().manual_seed(3)
    ids, lengths = torch.randint(0, 97, (2, 12), generator=generator), torch.tensor([12, 8])
    taps, last = (torch.randn(2, 12, size * 64, generator=generator).bfloat16() for size in (5, 1))
    mask = torch.arange(12) < lengths[:, None]
    batch, losses = batch_of_all_positions(ids, mask, lengths, taps, last), []
    for draft in drafts:
        loss = Eagle3Objective(draft)(batch)
        loss.value.backward()
        losses.append(loss.details["steps"])
    assert torch.equal(*losses)
    assert isinstance(drafts[0], Eagle3Draft)
    # Its layer is used at every unrolled step: bf16 sums those gradients in bf16, fp32 parameters in fp32.
    copied = drafts[1].trainable_parameters()
    for name, parameter in drafts[0].trainable_parameters().items():
        assert parameter.grad.dtype == torch.float32
        assert (parameter.grad - copied[name].grad.float()).norm() < 0.005 * parameter.grad.norm(), name


@pytest.mark.parametrize("changes", HEADS, ids=["vanilla", "gated", "rnn", "none"])
def test_fp32_parameters_draft_as_bf16_copies_do(make_draft, changes):
    blocks = []
    for draft in two_of(make_draft(spread=1.0, **changes)):
        batch, draft = batch_of(draft), draft.eval()
        context = draft.new_context(rows=2)
        draft.extend(context, batch.taps[:, :20], [20, 11])
        block, previous = draft.begin(context, batch.input_ids[:, 0]), batch.input_ids[:, 0]
        with torch.no_grad():
            blocks.append(torch.stack([block.next_logits(previous) for _ in range(draft.config.block_size)]))
    assert blocks[0].dtype == torch.bfloat16
    assert torch.equal(*blocks)


def test_a_draft_is_saved_in_the_type_that_it_computes_in(make_draft, tmp_path):
    masters, copied = two_of(make_draft())
    for slim in (False, True):
        masters.save(tmp_path / "masters", slim=slim)
        copied.save(tmp_path / "copied", slim=slim)
        for name in ("config.json", "model.safetensors"):
            assert (tmp_path / "masters" / name).read_bytes() == (tmp_path / "copied" / name).read_bytes()
