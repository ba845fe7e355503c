"""What recurrent layers of every kind share: states that a block reads, and prefixes of it that advance them.

A block writes no state. Every layer leaves a record of the block's own inputs, which are small; a commit advances all
layers together by the accepted prefix, whose length may differ from row to row.
"""

import abc
import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemotron_dspark.targets.kv import resized, shrunk
from nemotron_dspark.targets.spec import LayerKind, TargetSpec


@dataclasses.dataclass
class LayerStates(abc.ABC):
    """The committed states of every recurrent layer, for B rows, and the records of the block in flight.

    A kind adds a field per tensor in fp32 that its layers keep beside the convolution's inputs. Rows are slots, as in
    `RaggedKV`: a field is [L, B or more, …], and `tensors` gives what counts.
    """

    layers: tuple[int, ...]  # layer ids; the first dimension of every tensor
    conv: Tensor  # [L, B, kernel - 1, channels], the last inputs of each convolution

    def __post_init__(self) -> None:
        self._rows = self.conv.shape[1]
        self._index = {layer: position for position, layer in enumerate(self.layers)}
        self._records: dict[int, Any] = {}

    @staticmethod
    @abc.abstractmethod
    def shapes(mixer: Any) -> tuple[tuple[int, ...], ...]:
        """Shapes of the tensors that one layer with ``mixer`` keeps for one row, in the order of the fields."""

    @abc.abstractmethod
    def commit(self, kept: Sequence[int]) -> None:
        """Advance every layer by the first ``kept[b]`` tokens of the block last recorded; 0 leaves a row as it was."""

    @classmethod
    def zeros(cls, mixers: Mapping[int, Any], device: torch.device, dtype: torch.dtype) -> Self:
        """The states of one row before any token. ``mixers`` maps layer ids to mixers of one shape."""
        conv, *states = ((len(mixers), 1, *shape) for shape in cls.shapes(next(iter(mixers.values()))))
        tensors = (torch.zeros(shape, device=device, dtype=torch.float32) for shape in states)
        return cls(tuple(mixers), torch.zeros(conv, device=device, dtype=dtype), *tensors)

    def of(self, layer: int) -> list[Tensor]:
        """The committed tensors [B, …] of one layer, in the order of the fields."""
        return [tensor[self._index[layer]] for tensor in self.tensors()]

    def tensors(self) -> list[Tensor]:
        """Views [L, B, …] of the committed tensors, in the order of the fields; a commit writes into them."""
        return [getattr(self, name)[:, : self._rows] for name in self._names()]

    def part(self, layer: int) -> "LayerStates":
        """The states that ``layer`` is among."""
        return self

    def record(self, layer: int, record: Any) -> None:
        """Keep what ``layer`` leaves of its block: a dataclass of tensors [B, m, …]."""
        self._records[layer] = record

    def take_records(self) -> Any:
        """One record whose tensors are those of all layers, stacked [L, B, m, …]; none is left in flight."""
        records = [self._records[layer] for layer in self.layers]
        self._records = {}
        names = [field.name for field in dataclasses.fields(records[0])]
        return type(records[0])(*(torch.stack([getattr(record, name) for record in records]) for name in names))

    def select(self, rows: Sequence[int]) -> Self:
        """A copy of ``rows`` in that order."""
        index = torch.tensor(rows, device=self.conv.device)
        return type(self)(self.layers, *(tensor.index_select(1, index) for tensor in self.tensors()))

    def join(self, other: Any) -> None:
        """Put the rows of ``other``, of the same layers, behind these."""
        rows, self._rows = self._rows, self._rows + other._rows
        for name, new in zip(self._names(), other.tensors(), strict=True):
            stored = resized(getattr(self, name), 1, self._rows)
            stored[:, rows : self._rows] = new
            setattr(self, name, stored)

    def leave(self, row: int) -> None:
        """Take ``row`` out; the last row gets its place."""
        self._rows -= 1
        for name in self._names():
            stored = getattr(self, name)
            stored[:, row] = stored[:, self._rows]
            if self._rows:
                setattr(self, name, shrunk(stored, 1, self._rows))

    def _names(self) -> list[str]:
        return [field.name for field in dataclasses.fields(self)[1:]]


class SpreadStates:
    """The states of layers on several devices: a `LayerStates` for each device."""

    def __init__(self, parts: Iterable[LayerStates]):
        self.parts = tuple(parts)

    def part(self, layer: int) -> LayerStates:
        return next(part for part in self.parts if layer in part.layers)

    def tensors(self) -> list[Tensor]:
        return [tensor for part in self.parts for tensor in part.tensors()]

    def commit(self, kept: Sequence[int]) -> None:
        for part in self.parts:
            part.commit(kept)

    def select(self, rows: Sequence[int]) -> "SpreadStates":
        return SpreadStates(part.select(rows) for part in self.parts)

    def join(self, other: Any) -> None:
        for part, joining in zip(self.parts, other.parts, strict=True):
            part.join(joining)

    def leave(self, row: int) -> None:
        for part in self.parts:
            part.leave(row)


RecurrentStates: TypeAlias = LayerStates | SpreadStates
NewRecurrent: TypeAlias = Callable[[torch.device, torch.dtype], RecurrentStates]  # of one row before any token


def advance_window(window: Tensor, inputs: Tensor, kept: Sequence[int]) -> Tensor:
    """The last inputs of a convolution after ``kept[b]`` more.

    Args:
        window: [L, B, w, C], the last inputs before the block.
        inputs: [L, B, m, C], the block's.

    Returns:
        [L, B, w, C].
    """
    width = window.shape[2]
    history = torch.cat([window, inputs], dim=2)  # [L, B, w + m, C]
    if min(kept) == max(kept):  # all rows keep the same prefix: a plain slice
        return history[:, :, kept[0] : kept[0] + width].contiguous()
    at = torch.tensor(kept, device=window.device)[:, None] + torch.arange(width, device=window.device)  # [B, w]
    return history.gather(2, at[None, :, :, None].expand(history.shape[0], -1, -1, history.shape[3]))


def convolve(window: Tensor, inputs: Tensor, convolution: Any) -> Tensor:
    """fp32 [B, m, C]: a causal depthwise ``nn.Conv1d`` on ``inputs`` [B, m, C] that follow ``window`` [B, w, C]."""
    block = inputs.shape[1]
    history = torch.cat([window, inputs], dim=1).float()  # [B, w + m, C]
    kernel = convolution.weight[:, 0].float().t()  # [w + 1, C]
    convolved = history[:, :block] * kernel[0]
    for tap in range(1, len(kernel)):  # a depthwise convolution of few positions is slower than its few products
        convolved = torch.addcmul(convolved, history[:, tap : tap + block], kernel[tap])
    return convolved if convolution.bias is None else convolved + convolution.bias.float()


def prefix_decay(decay: Tensor, kept: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Log decays after the first ``kept[b]`` tokens of a block, of the state before it and of each token's addition.

    Args:
        decay: [L, B, m, heads], summed log decay up to and with each token.

    Returns:
        [L, B, heads] for the state, and [L, B, n, heads] for the first n = max(kept) tokens, -inf for those that a row
        does not keep.
    """
    count = max(kept)
    if count == 0:
        return torch.zeros_like(decay[:, :, 0]), decay[:, :, :0]
    if min(kept) == count:
        total = decay[:, :, count - 1]
        return total, total[:, :, None] - decay[:, :, :count]
    counts = torch.tensor(kept, device=decay.device)
    padded = F.pad(decay, (0, 0, 1, 0))  # 0 for rows that keep nothing
    last = counts[None, :, None, None].expand(decay.shape[0], -1, 1, decay.shape[3])
    total = padded.gather(2, last)[:, :, 0]
    outside = (torch.arange(count, device=decay.device) >= counts[:, None])[None, :, :, None]  # [1, B, n, 1]
    # Outside the prefix the difference may be large and positive: it must not meet the exponential.
    return total, (total[:, :, None] - decay[:, :, :count]).masked_fill(outside, -torch.inf)


def mixers_of(model: nn.Module, spec: TargetSpec, paths: Mapping[LayerKind, str]) -> dict[int, Any]:
    """The recurrent mixers by layer id; ``paths`` says where they lie in a layer of which kind."""
    layers = cast(nn.ModuleList, model.get_submodule(spec.names.layers))
    return {at: layers[at].get_submodule(paths[kind]) for at, kind in enumerate(spec.layers) if kind in paths}


def prepare(
    model: nn.Module,
    spec: TargetSpec,
    *,
    paths: Mapping[LayerKind, str],
    states: type[LayerStates],
    block_forward: Callable[[Any, Tensor, Any, int], Tensor],
) -> NewRecurrent | None:
    """Let the mixers at ``paths`` run ``block_forward(mixer, hidden, states, layer)`` where the cache holds ``states``.

    Given any other cache a mixer runs its own forward. Returns how to make the states of a row without tokens, None if
    there are no mixers.
    """
    mixers = mixers_of(model, spec, paths)
    for layer, mixer in mixers.items():
        mixer.forward = _either_forward(mixer, layer, states, block_forward)
    return functools.partial(_no_tokens, states, mixers) if mixers else None


def _no_tokens(
    kind: type[LayerStates], mixers: Mapping[int, Any], device: torch.device, dtype: torch.dtype
) -> RecurrentStates:
    by_device: dict[torch.device, dict[int, Any]] = {}
    for layer, mixer in mixers.items():
        by_device.setdefault(next(mixer.parameters()).device, {})[layer] = mixer
    if len(by_device) == 1:
        return kind.zeros(mixers, device, dtype)
    return SpreadStates(kind.zeros(own, where, dtype) for where, own in by_device.items())


def _either_forward(mixer: Any, layer: int, kind: type[LayerStates], block_forward: Callable) -> Callable[..., Any]:
    own_forward = mixer.forward

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get("cache_params", kwargs.get("past_key_values"))  # transformers has both names for it
        spread = getattr(cache, "recurrent", None)
        states = None if spread is None else spread.part(layer)
        if isinstance(states, kind):
            return block_forward(mixer, hidden_states, states, layer)
        return own_forward(hidden_states, *args, **kwargs)

    return forward
