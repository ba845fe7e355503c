"""Schedule, masters and accumulation."""

import pytest
import torch
from torch import nn

from nemotron_dspark.training.optimiser import MasterAdamW, learning_rate


def test_rate_rises_linearly_and_falls_as_a_cosine_to_zero(make_settings):
    config = make_settings(lr=1.0, warmup_ratio=0.1)
    rates = [learning_rate(step, 100, config) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert rates[10] == 1.0
    assert rates[55] == pytest.approx(0.5)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[99] < 1e-3
    assert learning_rate(0, 100, make_settings(lr=1.0, warmup_ratio=0.0)) == 1.0
    assert learning_rate(99, 100, make_settings(lr=1.0, warmup_ratio=1.0)) == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_several_forwards_add_up_in_fp32(make_settings, dtype):
    """One large gradient and many small ones: bf16 would keep only the large one."""
    config = make_settings(lr=1e-2)
    weight = nn.Parameter(torch.ones(4, dtype=dtype))
    optimiser = MasterAdamW({"weight": weight}, config)
    reference = nn.Parameter(torch.ones(4))
    plain = torch.optim.AdamW([reference], lr=1e-2, weight_decay=0.0)
    for step in range(3):
        pieces = [torch.full((4,), 256.0)] + [torch.full((4,), 0.5)] * (200 + 400 * step)
        for piece in pieces:
            (weight * piece.to(dtype)).sum().backward()
            optimiser.accumulate()
        norm = optimiser.clip(1e9)
        assert norm == pytest.approx(2 * sum(float(piece[0]) for piece in pieces))
        optimiser.step(1e-2)
        reference.grad = sum(pieces)
        plain.step()
    torch.testing.assert_close(weight, reference.to(dtype))
    assert weight.grad is None


def test_clipping_scales_all_gradients_alike(make_settings):
    first, second = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimiser = MasterAdamW({"first": first, "second": second}, make_settings())
    first.grad, second.grad = torch.tensor([3.0]), torch.tensor([4.0])
    assert optimiser.clip(1.0) == pytest.approx(5.0)
    assert (first.grad.item(), second.grad.item()) == pytest.approx((0.6, 0.8), rel=1e-5)


def test_gradients_are_divided_by_what_the_slots_weigh(make_settings):
    first = nn.Parameter(torch.zeros(2))
    optimiser = MasterAdamW({"first": first}, make_settings())
    first.grad = torch.tensor([3.0, 6.0])
    optimiser.normalise(3.0)
    assert first.grad.tolist() == [1.0, 2.0]
