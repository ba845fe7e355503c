"""Schedule, gradients and their accumulation."""

import pytest
import torch
from torch import nn

from nemotron_dspark.drafts.layers import Linear
from nemotron_dspark.training.optimiser import Optimiser, learning_rate


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
def test_gradients_of_several_micro_batches_add_up_in_fp32(make_settings, dtype):
    """One large gradient and many small ones: bf16 would keep only the large one."""
    config = make_settings(lr=1e-2)
    layer = Linear(4, 1, bias=False)
    layer.weight.data.fill_(1.0)
    optimiser = Optimiser({"weight": layer.weight}, config)
    reference = nn.Parameter(torch.ones(1, 4))
    plain = torch.optim.AdamW([reference], lr=1e-2, weight_decay=0.0)
    for step in range(3):
        inputs = [torch.full((4,), 256.0)] + [torch.full((4,), 0.5)] * (200 + 400 * step)
        for one in inputs:
            layer(one.to(dtype)).sum().backward()
        assert layer.weight.grad.dtype == torch.float32
        norm = optimiser.clip(1e9)
        assert norm == pytest.approx(2 * sum(float(one[0]) for one in inputs))
        optimiser.step(1e-2)
        reference.grad = sum(inputs)[None]
        plain.step()
    torch.testing.assert_close(layer.weight, reference)
    assert layer.weight.grad is None


def test_clipping_scales_all_gradients_alike(make_settings):
    first, second = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimiser = Optimiser({"first": first, "second": second}, make_settings())
    first.grad, second.grad = torch.tensor([3.0]), torch.tensor([4.0])
    assert optimiser.clip(1.0) == pytest.approx(5.0)
    assert (first.grad.item(), second.grad.item()) == pytest.approx((0.6, 0.8), rel=1e-5)


def test_gradients_are_divided_by_what_the_slots_weigh(make_settings):
    first = nn.Parameter(torch.zeros(2))
    optimiser = Optimiser({"first": first}, make_settings())
    first.grad = torch.tensor([3.0, 6.0])
    optimiser.normalise(3.0)
    assert first.grad.tolist() == [1.0, 2.0]
