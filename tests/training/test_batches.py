"""Which samples and which blocks a step takes."""

import collections

import numpy as np
import pytest
import torch

from nemotron_dspark.training.anchors import draw_anchors, loss_slots
from nemotron_dspark.training.batches import Loader, batches
from nemotron_dspark.training.schedule import SampleSchedule
from nemotron_dspark.training.source import CacheSource


def mask_of(text):
    return torch.tensor([character == "1" for character in text])


def test_anchors_are_positions_whose_own_token_and_next_carry_loss():
    mask = mask_of("0110111001")
    assert draw_anchors(mask, 10, seed=0, epoch=0, sample_id=0).tolist() == [1, 4, 5]
    assert draw_anchors(mask_of("0101"), 10, seed=0, epoch=0, sample_id=0).tolist() == []
    assert draw_anchors(mask_of("1"), 10, seed=0, epoch=0, sample_id=0).tolist() == []


def test_slots_count_as_long_as_the_loss_goes_on():
    mask = mask_of("0111101110")
    counted = loss_slots(mask, torch.tensor([1, 3, 6, 8]), 4)
    assert counted.int().tolist() == [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]]
    assert loss_slots(torch.ones(6, dtype=torch.bool), torch.tensor([3]), 4).int().tolist() == [[1, 1, 0, 0]]


def test_draw_is_uniform_ascending_and_repeats_itself():
    mask = torch.ones(21, dtype=torch.bool)
    times = collections.Counter()
    for sample_id in range(1000):
        drawn = draw_anchors(mask, 5, seed=3, epoch=1, sample_id=sample_id)
        assert drawn.tolist() == sorted(set(drawn.tolist()))
        assert torch.equal(drawn, draw_anchors(mask, 5, seed=3, epoch=1, sample_id=sample_id))
        times.update(drawn.tolist())
    assert sorted(times) == list(range(20))  # the last position has no next token
    assert max(times.values()) < 1.35 * min(times.values())  # 250 each, standard deviation 14
    one, other = (draw_anchors(mask, 5, seed=3, epoch=epoch, sample_id=0).tolist() for epoch in (0, 1))
    assert one != other


def test_an_epoch_takes_each_sample_once_in_an_order_of_its_own(make_settings):
    config = make_settings(global_batch_size=6, local_batch_size=2, epochs=3, max_steps=None)
    plan = SampleSchedule.of(config, 20)
    assert (plan.steps_per_epoch, plan.total_steps, plan.accumulation) == (3, 9, 3)
    lengths = np.arange(20)[::-1].copy()
    epochs = []
    for epoch in range(3):
        steps = [plan.micro_batches(step, config, lengths) for step in range(3 * epoch, 3 * epoch + 3)]
        taken = [int(i) for step in steps for ids in step for i in ids]
        assert len(taken) == len(set(taken)) == 18
        epochs.append(taken)
        for step in steps:
            in_order = [lengths[i] for ids in step for i in ids]
            assert in_order == sorted(in_order, reverse=True)
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("first_step", [0, 5])
def test_batches_go_on_at_any_step(make_cache, make_settings, first_step):
    cache, config = make_cache(), make_settings()
    plan = SampleSchedule.of(config, len(cache))

    def stream(start):
        return list(
            batches(Loader(CacheSource(cache), plan, config.seed, 6, 4, with_last=True), config, first_step=start)
        )

    whole, part = stream(0), stream(first_step)
    assert len(whole) == plan.total_steps * plan.accumulation
    for expected, found in zip(whole[first_step * plan.accumulation :], part, strict=True):
        assert torch.equal(expected.input_ids, found.input_ids)
        assert torch.equal(expected.anchors, found.anchors)
        assert torch.equal(expected.slot_mask, found.slot_mask)
