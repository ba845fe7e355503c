"""The DSpark draft: a few Qwen3 layers that fill a whole block at once from the target's hidden states.

Per block the input is the anchor's embedding and γ-1 mask tokens; slot k predicts the token k+1 after the anchor. The
context is RMSNorm(fc(taps)) at every position before the anchor. A sequential head ties the slots together. Tensor
names and ``config.json`` are DeepSpec's `Qwen3DSparkModel`.
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from nemotron_dspark.drafts.attention import block_attention
from nemotron_dspark.drafts.base import Draft
from nemotron_dspark.drafts.config import DraftConfig
from nemotron_dspark.drafts.context import DraftContext
from nemotron_dspark.drafts.heads import ConfidenceHead, build_sequential_head
from nemotron_dspark.drafts.layers import Layer, Linear, RMSNorm, rotate
from nemotron_dspark.targets.kv import RaggedKV


class DSparkDraft(Draft):
    """A DSpark draft; see `Draft` for its weights."""

    Config = DraftConfig

    def _build(self, config: DraftConfig) -> None:
        self.fc = Linear(config.num_taps * config.hidden_size, config.hidden_size, bias=False)
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.markov_head = build_sequential_head(config)
        self.confidence_head = ConfidenceHead(config) if config.enable_confidence_head else None
        self.attention = "auto"  # kind of training attention, see drafts.attention.KINDS
        self.recompute_layers = False  # in the backward, instead of keeping their activations
        self._key_value_weights: Tensor | None = None  # [layers, 2·kv_heads·d, H], made by new_context
        self._key_norms: Tensor | None = None  # [layers, 1, d]

    @property
    def sequential(self) -> nn.Module:
        """The sequential head: `start`, `step`, `teacher_forced`."""
        return self.markov_head

    # --- training ---

    def forward(
        self,
        input_ids: Tensor,  # [B, S]
        taps: Tensor,  # [B, S, T·H]
        anchors: Tensor,  # [B, A] positions
        valid: Tensor,  # [B, A] bool; False: the block is a filler
    ) -> Tensor:
        """Hidden states of every slot of every block, after the final norm: [B, A, γ, H].

        A block sees positions strictly before its anchor, so right padding is never seen. Rows of fillers hold numbers
        without meaning.
        """
        self._require_embeddings()
        length, slots = input_ids.shape[1], self.config.block_size
        tokens = input_ids.gather(1, anchors).masked_fill(~valid, self.config.mask_token_id)
        hidden = self._block_embeddings(tokens).flatten(1, 2)  # [B, A·γ, H]
        context = self.hidden_norm(self.fc(taps.to(self.compute_dtype)))  # [B, S, H]
        positions = (anchors[:, :, None] + torch.arange(slots, device=anchors.device)).flatten(1)  # [B, A·γ]
        cosines, sines = self._rotary.tables(length + slots, self.device, self.compute_dtype)
        block_rotation = (cosines[positions][:, None], sines[positions][:, None])
        rows = input_ids.shape[0]
        all_rotation = (
            torch.cat((cosines[:length].expand(rows, 1, -1, -1), block_rotation[0]), dim=2),
            torch.cat((sines[:length].expand(rows, 1, -1, -1), block_rotation[1]), dim=2),
        )
        attend = block_attention(anchors, length, slots, self.attention)
        for layer in self.layers:
            inputs = (hidden, context, block_rotation, all_rotation, attend)
            if self.recompute_layers:
                hidden = checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                hidden = layer(*inputs)
        return self.norm(hidden).unflatten(1, (-1, slots))

    def base_logits(self, hidden: Tensor) -> Tensor:
        """[..., H] to [..., V], before the sequential head."""
        return self.lm_head(hidden)

    def confidence(
        self,
        hidden: Tensor,  # [..., H]
        previous: Tensor,  # [...] token before each slot
    ) -> Tensor:
        """Logit of each slot's acceptance rate [...]; only for drafts with a confidence head."""
        with_markov = self.config.confidence_head_with_markov
        embedded = self.markov_head.embed(previous, hidden.dtype) if with_markov else None
        return self.confidence_head(hidden, embedded)

    # --- decoding ---

    def train(self, mode: bool = True) -> "DSparkDraft":
        self._key_value_weights = self._key_norms = None  # about to change
        return super().train(mode)

    def new_context(self, rows: int = 1) -> DraftContext:
        """An empty context of ``rows`` rows."""
        self._require_embeddings()
        fused = self._key_value_weights
        if fused is None or self.training or fused.device != self.device or fused.dtype != self.compute_dtype:
            attentions = [layer.self_attn for layer in self.layers]
            with torch.no_grad():
                self._key_value_weights = torch.stack(
                    [torch.cat((attention.k_proj.weight, attention.v_proj.weight)) for attention in attentions]
                ).to(self.compute_dtype)
                norms = torch.stack([attention.k_norm.weight for attention in attentions])[:, None]
                self._key_norms = norms.to(self.compute_dtype)
        return DraftContext([0] * rows, [RaggedKV() for _ in self.layers])

    @torch.no_grad()
    def extend(
        self,
        context: DraftContext,
        taps: Tensor,  # [B, n, T·H]
        counts: Sequence[int],
        following: Tensor | None = None,  # [B, n] the token after each position; not looked at by this kind of draft
    ) -> None:
        """Append the first ``counts[b]`` of the n positions of each row; the others are ignored."""
        config = self.config
        rows, added, _ = taps.shape
        weights = self._key_value_weights
        projected = functional.linear(self.hidden_norm(self.fc(taps.to(self.compute_dtype))), weights.flatten(0, 1))
        projected = projected.view(rows, added, len(self.layers), 2, config.num_key_value_heads, config.head_dim)
        keys = functional.rms_norm(projected[:, :, :, 0], (config.head_dim,), None, config.rms_norm_eps)
        keys = (keys * self._key_norms).permute(2, 0, 3, 1, 4)  # [layers, B, kv_heads, n, d]
        keys = rotate(keys, self._rotation(context.lengths, added))
        values = projected[:, :, :, 1].permute(2, 0, 3, 1, 4)
        for layer, layer_keys, layer_values in zip(context.layers, keys, values, strict=True):
            layer.write(layer_keys, layer_values, context.lengths)
        context.lengths = [length + count for length, count in zip(context.lengths, counts, strict=True)]

    @torch.no_grad()
    def block_hidden(
        self,
        context: DraftContext,
        anchor_tokens: Tensor,  # [B] the last accepted token of each row, not yet in the context
    ) -> Tensor:
        """Hidden states of the next block of each row, after the final norm: [B, γ, H]."""
        slots, lengths = self.config.block_size, context.lengths
        rotation = self._rotation(lengths, slots)
        mask = None
        if min(lengths) != max(lengths):
            ends = torch.tensor(lengths, device=self.device)[:, None] + slots
            mask = (torch.arange(max(lengths) + slots, device=self.device) < ends)[:, None, None]
        hidden = self._block_embeddings(anchor_tokens)
        for layer, weight, stored in zip(self.layers, self._key_value_weights, context.layers, strict=True):
            hidden = layer.decode(hidden, rotation, weight, stored, lengths, mask)
        return self.norm(hidden)

    def begin(self, context: DraftContext, anchor_tokens: Tensor) -> "DSparkBlock":
        """The next block of each row, to be drafted slot by slot; ``anchor_tokens`` [B] as for `block_hidden`."""
        hidden = self.block_hidden(context, anchor_tokens)
        return DSparkBlock(self, hidden, self.base_logits(hidden), self.sequential.start(hidden))

    # --- parts ---

    def _block_embeddings(self, anchor_tokens: Tensor) -> Tensor:
        """[...] to [..., γ, H]: the anchor's embedding, then mask tokens'."""
        mask = self.embed_tokens.weight[self.config.mask_token_id]
        anchor = self.embed_tokens(anchor_tokens).unsqueeze(-2)
        filler = mask.expand(*anchor_tokens.shape, self.config.block_size - 1, -1)
        return torch.cat((anchor, filler), dim=-2)


@dataclasses.dataclass
class DSparkBlock:
    """A block of each row: hidden states at once, tokens slot by slot."""

    draft: DSparkDraft
    hidden: Tensor  # [B, γ, H]
    base: Tensor  # [B, γ, V]
    state: Tensor | None  # the sequential head's, before ``slot``
    slot: int = 0

    def confidence(self, previous: Tensor) -> Tensor:
        """Logit [B] of the acceptance of the next slot, after ``previous`` [B] (the anchor for slot 0)."""
        return self.draft.confidence(self.hidden[:, self.slot], previous)

    def next_logits(self, previous: Tensor) -> Tensor:
        """Logits [B, V] of the next slot, after ``previous`` [B]."""
        at, self.slot = self.slot, self.slot + 1
        logits, self.state = self.draft.sequential.step(self.base[:, at], self.hidden[:, at], previous, self.state)
        return logits
