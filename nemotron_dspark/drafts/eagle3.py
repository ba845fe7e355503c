"""The EAGLE-3 draft: one layer that drafts token by token, each step reading the hidden state of the step before.

At position i the layer reads [norm(embedding of token i+1) ; norm(hidden)], where hidden is fc of the target's taps at
i for verified positions and the draft's own output from there on; its output predicts token i+2. Tensor names and
``config.json`` are DeepSpec's `Qwen3Eagle3Model`.
"""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from nemotron_dspark.drafts.config import Eagle3Config
from nemotron_dspark.drafts.dspark import Draft
from nemotron_dspark.drafts.layers import (
    MLP,
    Attention,
    DraftContext,
    Linear,
    RMSNorm,
    Rotation,
    rotate,
)
from nemotron_dspark.errors import InputError
from nemotron_dspark.targets.kv import RaggedKV


class Eagle3Layer(nn.Module):
    """The decoder layer of the EAGLE-3 draft."""

    def __init__(self, config: Eagle3Config):
        super().__init__()
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, 2 * config.hidden_size)  # embedding and hidden state side by side
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self,
        embedded: Tensor,  # [B, S, H] of the token each position reads
        hidden: Tensor,  # [B, S, H]
        rotation: Rotation,
        causal: Tensor,  # bool, as long as the longest sample
        lengths: Sequence[int],  # of the samples that lie one behind the other in each row
        keys: Sequence[Tensor],  # [B, heads, S, d] of every step before
        values: Sequence[Tensor],
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """One unrolled step of training: its output [B, S, H], and keys and values with its own behind them."""
        source = self.read(embedded, hidden)
        groups = self.self_attn.heads // self.self_attn.kv_heads
        new = [part.repeat_interleave(groups, dim=1) for part in self.keys_values(source, rotation)]
        keys, values = [*keys, new[0]], [*values, new[1]]
        queries = self.self_attn.queries(source, rotation)
        return self.finish(hidden, _attend(queries, keys, values, causal, lengths)), keys, values

    def read(self, embedded: Tensor, hidden: Tensor) -> Tensor:
        """What attention projects: [..., 2H] from two [..., H]."""
        return torch.cat((self.input_layernorm(embedded), self.hidden_norm(hidden)), dim=-1)

    def keys_values(self, source: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """[B, n, 2H] to two [B, kv_heads, n, d]."""
        attention = self.self_attn
        keys = attention.k_norm(attention.k_proj(source).unflatten(-1, (attention.kv_heads, -1))).transpose(1, 2)
        values = attention.v_proj(source).unflatten(-1, (attention.kv_heads, -1)).transpose(1, 2)
        return rotate(keys, rotation), values

    def finish(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """[B, n, H] from the residual [B, n, H] and the heads' outputs [B, heads, n, d]."""
        hidden = hidden + self.self_attn.o_proj(attended.transpose(1, 2).flatten(2))
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


@dataclasses.dataclass
class Eagle3Context(DraftContext):
    """What decoding remembers, with the layer's output at the last verified position of each row."""

    looks_ahead: ClassVar[bool] = True

    hidden: Tensor  # [B, H]

    def select(self, rows: Sequence[int]) -> Self:
        return dataclasses.replace(super().select(rows), hidden=self.hidden[list(rows)])

    def join(self, other: Self) -> None:
        super().join(other)
        self.hidden = torch.cat([self.hidden, other.hidden])

    def leave(self, row: int) -> None:
        super().leave(row)
        self.hidden[row] = self.hidden[-1]
        self.hidden = self.hidden[:-1]


class Eagle3Draft(Draft[Eagle3Config, Eagle3Context]):
    """An EAGLE-3 draft; see `Draft` for its weights."""

    Config = Eagle3Config

    def _build(self, config: Eagle3Config) -> None:
        self.fc = Linear(config.num_taps * config.hidden_size, config.hidden_size, bias=False)
        self.layers = nn.ModuleList([Eagle3Layer(config)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.confidence_head = None

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., H] to [..., N], the tokens that it can draft."""
        return (self.packed_head or self.lm_head)(self.norm(hidden))

    @property
    def _layer(self) -> Eagle3Layer:
        return cast("Eagle3Layer", self.layers[0])  # nn.ModuleList does not say of what

    # --- training ---

    def forward(
        self,
        input_ids: Tensor,  # [B, S], right padded
        taps: Tensor,  # [B, S, T·H]
        lengths: Sequence[int] | None = None,  # of the samples of one row; None: a row is one sample
    ) -> list[Tensor]:
        """Hidden states [B, S, H] of every unrolled step, before the final norm: ``ttt_length`` of them.

        Step s reads at position i token i+1+s and its own output of step s-1, and predicts token i+2+s. It sees the
        first step's keys up to i, and of every later step the key at i alone. The last positions of a sample read
        tokens that are not its own; their numbers mean nothing, and none that means something is made of them.
        """
        self._require_embeddings()
        layer, length = self.layers[0], input_ids.shape[1]
        cosines, sines = self._rotary.tables(length + self.config.ttt_length, self.device, self.compute_dtype)
        hidden = self.fc(taps.to(self.compute_dtype))
        lengths = lengths or [length]
        causal = torch.ones(max(lengths), max(lengths), dtype=torch.bool, device=hidden.device).tril()
        places = torch.cat([torch.arange(own, device=hidden.device) for own in lengths])
        keys: list[Tensor] = []  # [B, heads, S, d] of every step so far
        values: list[Tensor] = []
        outputs = []
        for step in range(self.config.ttt_length):
            tokens = functional.pad(input_ids[:, 1 + step :], (0, min(1 + step, length)))
            rotation = (cosines[places + step], sines[places + step])
            inputs = (self.embed_tokens(tokens), hidden, rotation, causal, lengths, keys, values)
            if self.recompute_layers:
                found = checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                found = layer(*inputs)
            hidden, keys, values = found
            outputs.append(hidden)
        return outputs

    # --- decoding ---

    def new_context(self, rows: int = 1) -> Eagle3Context:
        """An empty context of ``rows`` rows."""
        self._require_embeddings()
        hidden = torch.zeros(rows, self.config.hidden_size, device=self.device)
        return Eagle3Context([0] * rows, [RaggedKV(rows)], [0] * rows, hidden)

    @torch.no_grad()
    def extend(
        self,
        context: Eagle3Context,
        taps: Tensor,  # [B, n, T·H]
        counts: Sequence[int],
        following: Tensor,  # [B, n] the token after each position
    ) -> None:
        """Append the first ``counts[b]`` of the n positions of each row; the others are ignored."""
        layer = self._layer
        hidden = self.fc(taps.to(self.compute_dtype))
        source = layer.read(self.embed_tokens(following), hidden)
        rows = torch.arange(len(counts), device=hidden.device)
        last = torch.tensor(counts, device=hidden.device) - 1
        positions = [length + count - 1 for length, count in zip(context.lengths, counts, strict=True)]
        keys, values = layer.keys_values(source, self._rotation(context.lengths, taps.shape[1]))
        stored = context.layers[0].write(keys, values, context.lengths)
        context.hidden = self._look_back(hidden[rows, last], source[rows, last], stored, positions)
        context.lengths = [position + 1 for position in positions]

    def begin(self, context: Eagle3Context, anchor_tokens: Tensor) -> "Eagle3Block":
        """The next block of each row, to be drafted token by token. ``anchor_tokens`` were read by `extend`."""
        return Eagle3Block(self, context, context.hidden)

    @torch.no_grad()
    def advance(
        self,
        context: Eagle3Context,
        hidden: Tensor,  # [B, H] output of the step before
        tokens: Tensor,  # [B] drafted by it
        step: int,  # positions beyond the context
    ) -> Tensor:
        """Output [B, H] of one more step. Its key lies behind the stored ones and is overwritten by what comes next."""
        layer = self._layer
        positions = [length + step for length in context.lengths]
        source = layer.read(self.embed_tokens(tokens), hidden)
        keys, values = layer.keys_values(source[:, None], self._rotation(positions, 1))
        stored = context.layers[0].write(keys, values, positions)
        return self._look_back(hidden, source, stored, positions)

    def _look_back(
        self,
        hidden: Tensor,  # [B, H] the residual at one position per row
        source: Tensor,  # [B, 2H] what is read there
        stored: tuple[Tensor, Tensor],  # keys and values [B, kv_heads, at least max(positions) + 1, d]
        positions: Sequence[int],  # [B]
    ) -> Tensor:
        """The layer's output [B, H] at ``positions``, which see everything up to themselves."""
        layer = self._layer
        queries = layer.self_attn.queries(source[:, None], self._rotation(positions, 1))
        ends = torch.tensor(positions, device=hidden.device)[:, None, None, None]
        seen = torch.arange(stored[0].shape[2], device=hidden.device) <= ends  # [B, 1, 1, stored]
        attended = functional.scaled_dot_product_attention(queries, *stored, attn_mask=seen, enable_gqa=True)
        return layer.finish(hidden[:, None], attended)[:, 0]


@dataclasses.dataclass
class Eagle3Block:
    """A block of each row, drafted token by token."""

    draft: Eagle3Draft
    context: Eagle3Context
    hidden: Tensor  # [B, H]
    slot: int = 0

    def confidence(self, previous: Tensor) -> Tensor:
        raise InputError("An EAGLE-3 draft predicts no acceptance.", "Set schedule to off or cost.")

    def next_logits(self, previous: Tensor) -> Tensor:
        """Logits [B, V] of the next slot, after ``previous`` [B]."""
        if self.slot:
            self.hidden = self.draft.advance(self.context, self.hidden, previous, self.slot - 1)
        self.slot += 1
        return self.draft.over_target(self.draft.logits(self.hidden))


def _attend(
    queries: Tensor,  # [B, heads, S, d] of the newest step
    keys: Sequence[Tensor],  # per step [B, heads, S, d]
    values: Sequence[Tensor],
    causal: Tensor,  # bool, as long as the longest sample
    lengths: Sequence[int],
) -> Tensor:
    """[B, heads, S, d], sample by sample: what is not seen of the others in a row is not computed."""
    attended, steps = [], len(keys)
    for size, query, *own in zip(
        lengths, *(part.split(lengths, dim=2) for part in (queries, *keys, *values)), strict=True
    ):
        attended.append(_attend_sample(query, own[:steps], own[steps:], causal[:size, :size]))
    return torch.cat(attended, dim=2)


def _attend_sample(queries: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], causal: Tensor) -> Tensor:
    """One softmax over the first step's keys, causally, and the own key of each later step."""
    scale = queries.shape[-1] ** -0.5
    first = (queries @ keys[0].transpose(-1, -2)).masked_fill(~causal, -torch.inf)  # [B, heads, S, S]
    own = [(queries * key).sum(-1, keepdim=True) for key in keys[1:]]  # [B, heads, S, 1] each
    weights = torch.softmax(torch.cat((first, *own), dim=-1).float() * scale, dim=-1).to(queries.dtype)
    length = first.shape[-1]
    attended = weights[..., :length] @ values[0]
    for at, value in enumerate(values[1:]):
        attended = attended + weights[..., length + at : length + at + 1] * value
    return attended
