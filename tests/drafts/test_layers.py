"""The draft's layer in its parts."""

import pytest
import torch
from torch.nn import functional

from nemotron_dspark.drafts.layers import MLP


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mlp_and_its_gradients_are_those_that_autograd_derives(make_config, dtype):
    torch.manual_seed(0)
    mlp = MLP(make_config()).to(dtype)
    x = torch.randn(2, 5, mlp.gate_proj.in_features, dtype=dtype, requires_grad=True)
    tensors, found = [x, *mlp.parameters()], mlp(x)
    plain = mlp.down_proj(functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x))
    assert torch.equal(found, plain)
    grad = torch.randn_like(plain)
    for ours, theirs in zip(
        torch.autograd.grad(found, tensors, grad), torch.autograd.grad(plain, tensors, grad), strict=True
    ):
        assert torch.equal(ours, theirs)
