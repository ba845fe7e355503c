"""Linear layers whose weights lie as this CPU multiplies them.

PyTorch's product of bf16 states with few rows spends half its time on bringing the weight's rows into the order that
oneDNN multiplies in, each time anew. Brought into it once, the same product gives the same bits in half the time: a
round of decoding reads every weight once and is little else.
"""

import functools

import torch
from torch import Tensor, nn

_FEWEST = 1 << 14  # numbers of a weight; a smaller one is read in no time
_KEPT = ("dt_proj",)  # mixers that read this layer's weight without calling it
_ROWS = (1, 5, 33, 160)  # of the products that must come out the same


class PackedLinear(nn.Module):
    """An ``nn.Linear`` without bias whose weight is packed; the weight itself can be had back, at a cost."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach())

    @property
    def weight(self) -> Tensor:
        """[out, in], unpacked for whoever asks."""
        return self._packed.to_dense()

    def forward(self, states: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        return torch.ops.mkldnn._linear_pointwise(states, self._packed, None, "none", [], "")

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.weight


def pack(model: nn.Module, keep: nn.Module) -> None:
    """Pack every layer of ``model`` but ``keep`` that `packed` can, each in place of its own weight."""
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Linear) and layer is not keep and name not in _KEPT:
                setattr(parent, name, packed(layer))


def packed(layer: nn.Module) -> nn.Module:
    """A `PackedLinear` with a copy of the weight of ``layer``, or ``layer`` itself.

    That is packed which is a plain linear layer in bf16 on a CPU, without a bias, if its product is the same bits.
    """
    if type(layer) is not nn.Linear or layer.bias is not None or layer.weight.numel() < _FEWEST:
        return layer
    if layer.weight.device.type != "cpu" or layer.weight.dtype != torch.bfloat16 or not _supported():
        return layer
    return PackedLinear(layer.weight) if _same(*layer.weight.shape) else layer


@functools.cache
def _supported() -> bool:
    """Whether this PyTorch has the two operations, which are not public, and this CPU the arithmetic."""
    ops = torch.ops.mkldnn
    named = all(hasattr(ops, name) for name in ("_reorder_linear_weight", "_linear_pointwise"))
    return named and torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


@functools.cache
@torch.no_grad()
def _same(out: int, width: int) -> bool:
    """Whether packed products with a weight of this shape are those of `torch.nn.functional.linear`, bit for bit."""
    generator = torch.Generator().manual_seed(0)
    out = min(out, 4096)  # an output is a product of one row of the weight, however many there are
    weight = torch.randn(out, width, generator=generator).bfloat16()
    layer = PackedLinear(weight)
    inputs = [torch.randn(rows, width, generator=generator).bfloat16() for rows in _ROWS]
    return all(torch.equal(layer(states), nn.functional.linear(states, weight)) for states in inputs)
