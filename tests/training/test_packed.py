"""Samples one behind the other are samples one by one; a stretch of a long sample learns from what lies before it."""

import dataclasses

import pytest
import torch

from nemotron_dspark.config import TrainConfig
from nemotron_dspark.drafts.config import DFlashConfig
from nemotron_dspark.errors import InputError
from nemotron_dspark.training.anchors import draw_anchors, draw_stretch
from nemotron_dspark.training.batches import Loader, collate, collate_packed, collate_unrolled
from nemotron_dspark.training.eagle3_objective import Eagle3Objective
from nemotron_dspark.training.objective import DSparkObjective, LossWeights
from nemotron_dspark.training.schedule import SampleSchedule
from nemotron_dspark.training.source import CacheSource
from nemotron_dspark.training.trainer import Trainer
from tests.training.test_trainer import five_taps, new_eagle3, weights


@pytest.fixture
def case(make_cache):
    """Samples and their anchors; the third has none."""
    cache = make_cache(5, dtype=torch.float32)
    samples = [cache[index] for index in range(5)]
    anchors = [draw_anchors(sample.loss_mask, 6, seed=1, epoch=0, sample_id=i) for i, sample in enumerate(samples)]
    anchors[2] = anchors[2][:0]
    return samples, anchors


def moved(draft):
    """``draft`` with weights that differ from what it starts with, so that every part of it matters."""
    with torch.no_grad():
        for index, parameter in enumerate(draft.trainable_parameters().values()):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)) * 0.2)
    return draft


def assert_same_loss_and_gradients(objective, *ways):
    """The micro-batches of each way have the same sums, and the same gradients to 1e-6 of their norms."""
    found = []
    for batches in ways:
        objective.draft.zero_grad()
        losses = [objective(batch) for batch in batches]
        torch.stack([loss.total for loss in losses]).sum().backward()
        gradients = [parameter.grad.clone() for parameter in objective.draft.trainable_parameters().values()]
        names = ("loss", "weight", "ce", "tau", "slots", "tokens", "blocks", "accepted")
        found.append(([sum(getattr(loss.sums, name) for loss in losses) for name in names], gradients))
    for together, alone in zip(found[0][0], found[1][0], strict=True):
        torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-6)
    for together, alone in zip(found[0][1], found[1][1], strict=True):
        assert (together - alone).norm() <= 1e-6 * alone.norm()


DRAFTS = {
    "whole": {},
    "causal": {"causal_block": True, "num_hidden_layers": 2},
    "window": {"sliding_window": 6, "causal_block": True, "recompute_layers": True},
    "sinks": {"attention_sinks": True, "sliding_window": 9},
    "masks alone": {"sample_from_anchor": False, "markov_head_type": "gated"},
    "dflash": {"kind": DFlashConfig},
    "part of the vocabulary": {"draft_vocab_size": 30, "markov_head_type": "rnn"},
}


@pytest.mark.parametrize("name", DRAFTS)
def test_packed_samples_have_the_loss_and_gradients_of_samples_one_by_one(make_draft, case, name):
    samples, anchors = case
    draft = moved(make_draft(**DRAFTS[name]))
    size = draft.config.block_size
    packed = collate_packed(samples, anchors, size)
    assert packed.input_ids.shape == (1, sum(len(sample.input_ids) for sample in samples))
    assert packed.block_mask.all()
    alone = [collate([one], [own], size) for one, own in zip(samples, anchors, strict=True)]
    assert_same_loss_and_gradients(DSparkObjective(draft, LossWeights.of(TrainConfig(), draft)), [packed], alone)


@pytest.mark.parametrize("recompute", [False, True])
def test_packed_samples_of_eagle3_have_the_loss_and_gradients_of_samples_one_by_one(make_cache, recompute):
    cache = five_taps(make_cache(4, dtype=torch.float32))
    draft, samples = moved(new_eagle3(cache)), [cache[index] for index in range(4)]
    draft.recompute_layers = recompute
    steps = draft.config.block_size
    alone = [collate_unrolled([sample], steps) for sample in samples]
    assert_same_loss_and_gradients(Eagle3Objective(draft), [collate_unrolled(samples, steps, packed=True)], alone)


@pytest.mark.slow
def test_flex_attention_packs_alike(make_draft, case):
    samples, anchors = case
    dense = make_draft(attention="dense", sliding_window=9)
    flex = make_draft(attention="flex", sliding_window=9)
    flex.load_state_dict(dense.state_dict())
    batch = collate_packed(samples, anchors, dense.config.block_size)
    placed = (batch.input_ids, batch.taps, batch.anchors, batch.block_mask, batch.positions)
    with torch.no_grad():
        torch.testing.assert_close(flex(*placed), dense(*placed), rtol=1e-4, atol=1e-5)


def test_a_run_may_pack_or_not(make_cache, make_draft, make_settings, tmp_path):
    drafts = {packed: make_draft(cache=make_cache(24)) for packed in (False, True)}
    for packed, draft in drafts.items():
        Trainer(make_cache(24), draft, make_settings(packed=packed, lr=1e-3, max_steps=3), tmp_path / str(packed)).run()
    for one, other in zip(*(weights(draft).values() for draft in drafts.values()), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)  # AdamW divides by small numbers


def loader(cache, config, window):
    schedule = SampleSchedule.of(config, len(cache))
    return Loader(CacheSource(cache), schedule, config.seed, 6, 4, with_last=True, window=window)


def test_blocks_of_a_long_sample_lie_in_one_stretch_that_moves(make_cache, make_settings):
    cache, config = make_cache(6), make_settings(local_batch_size=1)
    long = int(cache.lengths.argmax())
    length, beginnings = int(cache.lengths[long]), set()
    per_epoch = SampleSchedule.of(config, 6).steps_per_epoch
    for epoch in range(8):
        batch = loader(cache, config, 12)(epoch * per_epoch, torch.tensor([long]).numpy())
        beginnings.add(batch.far)
        assert batch.input_ids.shape[1] == min(length, batch.far + 12 + 4)
        assert torch.equal(batch.last[0], cache[long].last[batch.far : batch.far + 12 + 4])
        assert batch.far <= int(batch.anchors.min())
        assert int(batch.anchors.max()) < batch.far + 12
        assert batch.slot_mask.any()
    assert len(beginnings) > 2
    short = int(cache.lengths.argmin())
    whole, cut = (loader(cache, config, window)(0, torch.tensor([short]).numpy()) for window in (None, length))
    assert torch.equal(whole.anchors, cut.anchors)
    assert whole.far == cut.far == 0


def test_a_stretch_holds_a_place_where_a_block_may_start():
    mask = torch.zeros(200, dtype=torch.bool)
    mask[[90, 91, 190, 191]] = True
    for epoch in range(30):
        stretch = draw_stretch(mask, 4, seed=0, epoch=epoch, sample_id=3)
        assert stretch.stop - stretch.start == 4
        assert stretch.stop <= 200
        assert len(draw_anchors(mask[stretch], 5, seed=0, epoch=0, sample_id=0)) >= 1


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("packed", [False, True])
def test_what_lies_before_the_stretch_gives_context_and_no_gradient(make_draft, make_cache, window, packed):
    sample = make_cache(12, dtype=torch.float32)[3]
    draft = make_draft(num_hidden_layers=2, sliding_window=window)
    anchors = torch.nonzero(sample.loss_mask)[-8:-2, 0]
    batch = (collate_packed if packed else collate)([sample], [anchors], draft.config.block_size)
    far = int(anchors[0])
    assert far > 6
    objective, found = DSparkObjective(draft, LossWeights()), {}
    for before in (0, far):
        taps = batch.taps.clone().requires_grad_()
        draft.zero_grad()
        loss = objective(dataclasses.replace(batch, taps=taps, last=batch.last[:, before:], far=before))
        loss.total.backward()
        found[before] = loss.total.detach(), taps.grad[0]
    torch.testing.assert_close(found[far][0], found[0][0])
    assert found[0][1][:far].any()
    assert not found[far][1][:far].any()
    torch.testing.assert_close(found[far][1][far:], found[0][1][far:], rtol=1e-4, atol=1e-7)
    for place, counts in ((far - 1, True), (far - 5, True), (far - 6, window is None)):  # the first anchor sees 5
        changed = batch.taps.clone()
        changed[0, place] += 1.0
        given = dataclasses.replace(batch, taps=changed, last=batch.last[:, far:], far=far)
        loss = objective(given).total.detach()
        assert (float(loss) != float(found[far][0])) == counts


def test_a_window_with_several_samples_a_forward_is_refused(make_settings):
    with pytest.raises(InputError, match="a long sample has a forward of its own"):
        SampleSchedule.of(make_settings(window=100), 24)
