"""The DSpark draft: a few Qwen3 layers that fill a whole block at once from the target's hidden states.

Per block the input is the anchor's embedding and γ-1 mask tokens; slot k predicts the token k+1 after the anchor. The
context is RMSNorm(fc(taps)) at every position before the anchor. A sequential head ties the slots together. Tensor
names and ``config.json`` are DeepSpec's `Qwen3DSparkModel`.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional

from nemotron_dspark import files
from nemotron_dspark.drafts.attention import block_attention
from nemotron_dspark.drafts.config import DraftConfig
from nemotron_dspark.drafts.context import DraftContext
from nemotron_dspark.drafts.heads import ConfidenceHead, build_sequential_head
from nemotron_dspark.drafts.layers import Layer, RMSNorm, Rotary, rotate
from nemotron_dspark.errors import InputError
from nemotron_dspark.targets.kv import RaggedKV
from nemotron_dspark.targets.spec import finish_logits

WEIGHTS_FILE = "model.safetensors"
SHARED = ("embed_tokens.weight", "lm_head.weight")  # the target's own, frozen; a slim copy leaves them out
INITIAL_STD = 0.02


class DSparkDraft(nn.Module):
    """A draft with random weights (normal 0.02, norms 1, biases 0) and, until `set_embeddings`, no embedding or head.

    ``seed`` None leaves all weights unset, for a caller that fills them.
    """

    def __init__(self, config: DraftConfig, seed: int | None = 0):
        super().__init__()
        self.config = config
        with torch.device("meta"):
            # From an empty tensor: nn.Embedding would draw numbers, which on "meta" imports torch's compiler (seconds).
            self.embed_tokens = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.hidden_size))
            self.fc = nn.Linear(config.num_taps * config.hidden_size, config.hidden_size, bias=False)
            self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
            self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
            self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            self.markov_head = build_sequential_head(config)
            self.confidence_head = ConfidenceHead(config) if config.enable_confidence_head else None
        self.embed_tokens.requires_grad_(False)
        self.lm_head.requires_grad_(False)
        self.attention = "auto"  # kind of training attention, see drafts.attention.KINDS
        self._rotary = Rotary(config.head_dim, config.rope_theta)
        self._key_value_weights: Tensor | None = None  # [layers, 2·kv_heads·d, H], made by new_context
        self._key_norms: Tensor | None = None  # [layers, 1, d]
        if seed is not None:
            self._initialise(seed)

    # --- weights ---

    @property
    def sequential(self) -> nn.Module:
        """The sequential head: `start`, `step`, `teacher_forced`."""
        return self.markov_head

    @property
    def has_embeddings(self) -> bool:
        """False for a new draft or a slim copy until `set_embeddings`."""
        return not (self.embed_tokens.weight.is_meta or self.lm_head.weight.is_meta)

    @property
    def device(self) -> torch.device:
        return self.fc.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.fc.weight.dtype

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Every weight that training changes, by name, in a fixed order: all but the target's embedding and head."""
        return {name: parameter for name, parameter in self.named_parameters() if name not in SHARED}

    def set_embeddings(self, embedding: Tensor, head: Tensor) -> None:
        """Take the target's ``embedding`` and ``head`` (both [V, H]), frozen; memory is shared where types agree.

        Raises:
            InputError: another vocabulary or hidden size than the draft's.
        """
        expected = (self.config.vocab_size, self.config.hidden_size)
        for name, given in (("embedding", embedding), ("LM head", head)):
            if tuple(given.shape) != expected:
                raise InputError(
                    f"The draft was made for another target: it needs an {name} of {expected}, "
                    f"the target's is {tuple(given.shape)}.",
                    "Give the target the draft was trained for.",
                )
        for module, given in ((self.embed_tokens, embedding), (self.lm_head, head)):
            weight = given.detach().to(self.device, self.dtype)
            module.weight = nn.Parameter(weight, requires_grad=False)

    def save(self, folder: Path, *, slim: bool = False) -> None:
        """Write ``model.safetensors`` and ``config.json``; ``slim`` leaves out the target's two matrices."""
        if not slim:
            self._require_embeddings()
        tensors = {
            name: tensor.detach().cpu().contiguous()
            for name, tensor in self.state_dict().items()
            if not (slim and name in SHARED)
        }
        if not slim and tensors[SHARED[0]].data_ptr() == tensors[SHARED[1]].data_ptr():  # a target that ties them
            tensors[SHARED[1]] = tensors[SHARED[1]].clone()
        config = dataclasses.replace(self.config, dtype=str(self.dtype).removeprefix("torch."))
        content = save(tensors, metadata={"format": "pt"})
        files.write_whole(Path(folder) / WEIGHTS_FILE, lambda file: file.write(content))
        files.write_json(Path(folder) / "config.json", config.to_json())

    @classmethod
    def load(
        cls, folder: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> "DSparkDraft":
        """The draft in ``folder``, in eval mode; ``dtype`` None keeps the saved one.

        Raises:
            InputError: no draft there, a truncated file, missing or unknown tensors, or other shapes than the config's.
        """
        path = Path(folder) / WEIGHTS_FILE
        config = DraftConfig.from_folder(folder)
        if not path.is_file():
            raise InputError(f"{folder} has no {WEIGHTS_FILE}.", "Give a folder that training or export finished.")
        draft = cls(config, seed=None)
        again = "Copy the file again, or export the draft again from its run folder."
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                _check_tensors(file, draft.state_dict(), path, again)
                tensors = {name: file.get_tensor(name).to(dtype=dtype) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise InputError(f"{path} is damaged: {error}.", again) from None
        draft.load_state_dict(tensors, strict=False, assign=True)
        draft.embed_tokens.requires_grad_(False)
        draft.lm_head.requires_grad_(False)
        return draft.eval()

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
        context = self.hidden_norm(self.fc(taps.to(self.dtype)))  # [B, S, H]
        positions = (anchors[:, :, None] + torch.arange(slots, device=anchors.device)).flatten(1)  # [B, A·γ]
        cosines, sines = self._rotary.tables(length + slots, self.device, self.dtype)
        block_rotation = (cosines[positions][:, None], sines[positions][:, None])
        rows = input_ids.shape[0]
        all_rotation = (
            torch.cat((cosines[:length].expand(rows, 1, -1, -1), block_rotation[0]), dim=2),
            torch.cat((sines[:length].expand(rows, 1, -1, -1), block_rotation[1]), dim=2),
        )
        attend = block_attention(anchors, length, slots, self.attention)
        for layer in self.layers:
            hidden = layer(hidden, context, block_rotation, all_rotation, attend)
        return self.norm(hidden).unflatten(1, (-1, slots))

    def base_logits(self, hidden: Tensor) -> Tensor:
        """[..., H] to [..., V], before the sequential head."""
        return self.lm_head(hidden)

    def target_logits(self, last: Tensor) -> Tensor:
        """The target's logits [..., V] from its last hidden states [..., H], with its multiplier and its soft cap."""
        return finish_logits(self.lm_head(last), self.config.target_logit_multiplier, self.config.target_logit_softcap)

    def confidence(
        self,
        hidden: Tensor,  # [..., H]
        previous: Tensor,  # [...] token before each slot
    ) -> Tensor:
        """Logit of each slot's acceptance rate [...]; only for drafts with a confidence head."""
        embedded = self.markov_head.markov_w1(previous) if self.config.confidence_head_with_markov else None
        return self.confidence_head(hidden, embedded)

    # --- decoding ---

    def train(self, mode: bool = True) -> "DSparkDraft":
        self._key_value_weights = self._key_norms = None  # about to change
        return super().train(mode)

    def new_context(self, rows: int = 1) -> DraftContext:
        """An empty context of ``rows`` rows."""
        self._require_embeddings()
        fused = self._key_value_weights
        if fused is None or self.training or fused.device != self.device or fused.dtype != self.dtype:
            attentions = [layer.self_attn for layer in self.layers]
            with torch.no_grad():
                self._key_value_weights = torch.stack(
                    [torch.cat((attention.k_proj.weight, attention.v_proj.weight)) for attention in attentions]
                )
                self._key_norms = torch.stack([attention.k_norm.weight for attention in attentions])[:, None]
        return DraftContext([0] * rows, [RaggedKV() for _ in self.layers])

    @torch.no_grad()
    def extend(
        self,
        context: DraftContext,
        taps: Tensor,  # [B, n, T·H]
        counts: Sequence[int],
    ) -> None:
        """Append the first ``counts[b]`` of the n positions of each row; the others are ignored."""
        config = self.config
        rows, added, _ = taps.shape
        weights = self._key_value_weights
        projected = functional.linear(self.hidden_norm(self.fc(taps.to(self.dtype))), weights.flatten(0, 1))
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

    # --- parts ---

    def _block_embeddings(self, anchor_tokens: Tensor) -> Tensor:
        """[...] to [..., γ, H]: the anchor's embedding, then mask tokens'."""
        mask = self.embed_tokens.weight[self.config.mask_token_id]
        anchor = self.embed_tokens(anchor_tokens).unsqueeze(-2)
        filler = mask.expand(*anchor_tokens.shape, self.config.block_size - 1, -1)
        return torch.cat((anchor, filler), dim=-2)

    def _rotation(self, starts: Sequence[int], count: int) -> tuple[Tensor, Tensor]:
        """Tables [B or 1, 1, count, d] for ``count`` positions from each of ``starts``."""
        first, last = min(starts), max(starts)
        cosines, sines = self._rotary.tables(last + count, self.device, self.dtype)
        if first == last:
            return cosines[first : first + count], sines[first : first + count]
        at = torch.tensor(starts, device=self.device)[:, None] + torch.arange(count, device=self.device)
        return cosines[at][:, None], sines[at][:, None]

    def _require_embeddings(self) -> None:
        if not self.has_embeddings:
            raise InputError(
                "The draft has no embedding and LM head of its own.",
                "It is a slim copy: use it together with its target, or give a full copy.",
            )

    def _initialise(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in list(self.named_parameters()):
            if name in SHARED:
                continue
            if parameter.dim() >= 2:
                value = torch.empty(parameter.shape).normal_(0.0, INITIAL_STD, generator=generator)
            else:
                value = torch.zeros(parameter.shape) if name.endswith("bias") else torch.ones(parameter.shape)
            owner, _, leaf = name.rpartition(".")
            setattr(self.get_submodule(owner), leaf, nn.Parameter(value))
        # The LM head is the target's and is not multiplied here: the last norm gives its logits the target's scale.
        self.norm.weight.data.mul_(self.config.target_logit_multiplier)


def _check_tensors(file: safe_open, expected: dict[str, Tensor], path: Path, do: str) -> None:
    found = set(file.keys())
    missing = sorted(set(expected) - found - set(SHARED))
    unknown = sorted(found - set(expected))
    if missing:
        raise InputError(f"{path} lacks the tensor {missing[0]}" + _others(missing), do)
    if unknown:
        raise InputError(f"{path} holds a tensor this draft has not: {unknown[0]}" + _others(unknown), do)
    for name in sorted(found):
        shape = tuple(file.get_slice(name).get_shape())
        if shape != tuple(expected[name].shape):
            raise InputError(
                f"{path}: {name} has shape {shape}, its config.json asks for {tuple(expected[name].shape)}.", do
            )


def _others(names: list[str]) -> str:
    return f" and {len(names) - 1} more." if len(names) > 1 else "."
