"""The DSpark draft: a few Qwen3 layers that fill a whole block at once from the target's hidden states.

What is notable in it:
- The input of a block is the anchor's embedding and γ-1 mask tokens; slot k predicts the token k+1 after the anchor.
  All slots pass through the layers together and see each other, unless the config has a causal block.
- The context is RMSNorm(fc(taps)) at every position before the anchor: hidden states of some layers of the target, side
  by side. Each layer makes keys and values of it with the weights it has for the block itself.
- In DFlash, and where the config says so, the anchor's slot predicts nothing: γ mask tokens follow it, and each
  predicts the token of its own place.
- With a sliding window a slot sees the last positions of the context only, and decoding remembers no others.
- A sequential head (heads.py) ties the slots together afterwards, token by token, at the price of a table lookup.
- Embedding and LM head are the target's, frozen. The type that they are held in is the type of the arithmetic.
- A draft may draft a part of the vocabulary only: it then holds that part of the head, and says which in ``d2t``.
- Training runs many blocks of a sample at once; decoding runs one block per row over stored keys and values. Both give
  the same numbers.

On disk a draft is ``config.json`` and ``model.safetensors``, with the keys and names of DeepSpec's `Qwen3DSparkModel`;
a slim copy leaves out the target's two matrices.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Generic, Protocol, Self, TypeVar, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from nemotron_dspark import files
from nemotron_dspark.config.run import AttentionKind
from nemotron_dspark.drafts.config import DraftConfig, Eagle3Config
from nemotron_dspark.drafts.costs import CostTable
from nemotron_dspark.drafts.heads import ConfidenceHead, IndependentSlots, VanillaHead, build_sequential_head
from nemotron_dspark.drafts.layers import (
    DraftContext,
    FarPiece,
    Layer,
    Linear,
    RMSNorm,
    Rotary,
    Rotation,
    Sight,
    block_attention,
    rotate,
)
from nemotron_dspark.errors import InputError
from nemotron_dspark.targets.kv import RaggedKV
from nemotron_dspark.targets.spec import finish_logits

WEIGHTS_FILE = "model.safetensors"
SHARED = ("embed_tokens.weight", "lm_head.weight")  # the target's, frozen; a slim copy leaves them out
INITIAL_STD = 0.02
FAR_PIECE = 4096  # positions whose taps are cast and projected at a time, where nothing of that is kept

ConfigT = TypeVar("ConfigT", DraftConfig, Eagle3Config)
ContextT = TypeVar("ContextT", bound=DraftContext)


class DraftBlock(Protocol):
    """The next block of each row, drafted slot by slot."""

    def next_logits(self, previous: Tensor) -> Tensor:
        """Logits [B, V] of the next slot, after ``previous`` [B], the anchor for slot 0."""
        ...

    def confidence(self, previous: Tensor) -> Tensor:
        """Logit [B] of the acceptance of the next slot, after ``previous`` [B]; for a draft with a confidence head."""
        ...


class Draft(nn.Module, Generic[ConfigT, ContextT]):
    """What every kind of draft is: weights around the target's frozen embedding and head.

    A new one has random weights (normal 0.02, norms 1, biases 0) and, until `set_embeddings`, no embedding or head.
    ``seed`` None leaves all weights unset, for a caller that fills them.
    """

    Config: type[ConfigT]
    fc: Linear  # [T·H] to [H]: the taps of a position to what the draft reads of it
    layers: nn.ModuleList
    norm: RMSNorm  # before the LM head
    d2t: Tensor | None  # int64 [N] by how much the target's id of each token exceeds the draft's; None: it drafts all V
    confidence_head: "ConfidenceHead | None"
    # What divides the confidence head's logits, by slot, for each temperature of sampling that it was calibrated at.
    temperatures: Mapping[float, tuple[float, ...]] | None = None
    # Weights and biases, by slot, likewise: of the head's logits, or of margins where there are no temperatures.
    lines: Mapping[float, tuple[tuple[float, ...], tuple[float, ...]]] | None = None
    costs: CostTable | None = None  # of rounds on this machine, where they were measured
    packed_head: Callable[[Tensor], Tensor] | None = None  # the LM head's product, where decoding has a faster one

    def __init__(
        self,
        config: ConfigT,
        seed: int | None = 0,
        *,
        attention: AttentionKind = "auto",
        recompute_layers: bool = False,
    ):
        """
        Args:
            attention: kind of training attention; auto: FlexAttention on CUDA, dense masks elsewhere.
            recompute_layers: compute the layers again in the backward instead of keeping their activations.
        """
        super().__init__()
        self.config: ConfigT = config
        self.attention: AttentionKind = attention
        self.recompute_layers = recompute_layers
        with torch.device("meta"):
            # From an empty tensor: nn.Embedding would draw numbers, which on "meta" imports torch's compiler (seconds).
            self.embed_tokens = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.hidden_size))
            self._build(config)
            self.lm_head = nn.Linear(config.hidden_size, config.num_drafted, bias=False)
        self.embed_tokens.requires_grad_(False)
        self.lm_head.requires_grad_(False)
        reduced = config.draft_vocab_size is not None
        self.register_buffer("d2t", torch.zeros(config.num_drafted, dtype=torch.long) if reduced else None)
        self.register_buffer("_target_head", None, persistent=False)  # [V, H], for training
        self._rotary = Rotary(config.head_dim, config.rope_theta)
        if seed is not None:
            self._initialise(seed)

    def _build(self, config: ConfigT) -> None:
        """Make every module but the embedding and the head."""
        raise NotImplementedError

    @property
    def has_embeddings(self) -> bool:
        """False for a new draft or a slim copy until `set_embeddings`."""
        return not (self.embed_tokens.weight.is_meta or self.lm_head.weight.is_meta)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.fc.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the parameters."""
        return self.fc.weight.dtype

    @property
    def compute_dtype(self) -> torch.dtype:
        """Type of the arithmetic: that in which the draft holds the target's embedding and head."""
        return self.embed_tokens.weight.dtype if self.has_embeddings else self.dtype

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Every weight that training changes, by name, in a fixed order: all but the target's embedding and head."""
        return {name: parameter for name, parameter in self.named_parameters() if name not in SHARED}

    @property
    def vocabulary(self) -> Tensor | None:
        """The target's ids of the tokens that it can draft, ascending [N]; None: all."""
        return None if self.d2t is None else self.d2t + torch.arange(len(self.d2t), device=self.d2t.device)

    @property
    def target_head(self) -> Tensor:
        """The target's whole LM head [V, H]; `InputError` where `set_embeddings` gave a part of it."""
        head = self.lm_head.weight if self.d2t is None else self._target_head
        if head is None:
            raise InputError("The draft has a part of the target's LM head.", "Give it all with `set_embeddings`.")
        return head

    def set_vocabulary(self, tokens: Tensor) -> None:
        """Draft ``tokens`` alone: the target's ids, ascending [N]. Comes before `set_embeddings`."""
        self.d2t = (tokens - torch.arange(len(tokens))).to(self.device)

    def set_embeddings(self, embedding: Tensor, head: Tensor, dtype: torch.dtype | None = None) -> None:
        """Take the target's ``embedding`` and ``head`` (both [V, H]), frozen; memory is shared where types agree.

        A draft of a part of the vocabulary also takes the part of the head that is its own [N, H], and then cannot
        train.

        ``dtype`` is what the draft then computes in; None: the parameters' own. Parameters of another type are cast
        where they are used: fp32 ones with bf16 here give the numbers of bf16 ones, and gradients in fp32.

        Raises:
            InputError: another vocabulary or hidden size than the draft's.
        """
        expected = (self.config.vocab_size, self.config.hidden_size)
        vocabulary = self.vocabulary
        own = vocabulary is not None and len(head) == len(vocabulary)
        for name, given in (("embedding", embedding), ("LM head", head)):
            if tuple(given.shape) != expected and not (own and given is head):
                raise InputError(
                    f"The draft was made for another target: it needs an {name} of {expected}, "
                    f"the target's is {tuple(given.shape)}.",
                    "Give the target the draft was trained for.",
                )
        embedding, head = (given.detach().to(self.device, dtype or self.dtype) for given in (embedding, head))
        if vocabulary is not None:
            self._target_head = None if own else head
            head = head if own else head[vocabulary]
        self.packed_head = None
        for module, weight in ((self.embed_tokens, embedding), (self.lm_head, head)):
            module.weight = nn.Parameter(weight, requires_grad=False)

    @property
    def shared(self) -> tuple[str, ...]:
        """Names of its weights that are the target's."""
        return SHARED[1:] if self.config.own_embedding else SHARED

    def save(self, folder: Path, *, slim: bool = False) -> None:
        """Write ``model.safetensors`` and ``config.json`` in the type that is computed in; ``slim`` leaves out the
        target's matrices."""
        if not slim:
            self._require_embeddings()
        kept = {name: tensor for name, tensor in self.state_dict().items() if not (slim and name in self.shared)}
        tensors = {name: _cast(tensor.detach(), self.compute_dtype) for name, tensor in kept.items()}
        if not slim and tensors[SHARED[0]].data_ptr() == tensors[SHARED[1]].data_ptr():  # a target that ties them
            tensors[SHARED[1]] = tensors[SHARED[1]].clone()
        write_draft(folder, self.config, tensors)

    @classmethod
    def load(cls, folder: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Self:
        """The draft in ``folder``, in eval mode; ``dtype`` None keeps the saved one.

        Raises:
            InputError: no draft there, a truncated file, missing or unknown tensors, or other shapes than the config's.
        """
        path = Path(folder) / WEIGHTS_FILE
        config = cls.Config.from_folder(folder)
        if not path.is_file():
            raise InputError(f"{folder} has no {WEIGHTS_FILE}.", "Give a folder that training or export finished.")
        draft = cls(config, seed=None)
        again = "Copy the file again, or export the draft again from its run folder."
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                _check_tensors(file, draft.state_dict(), path, again)
                tensors = {name: _cast(file.get_tensor(name), dtype) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise InputError(f"{path} is damaged: {error}.", again) from None
        draft.load_state_dict(tensors, strict=False, assign=True)
        if (tokens := draft.vocabulary) is not None:
            inside = (tokens >= 0) & (tokens < config.vocab_size)
            if not (inside.all() and (tokens.diff() > 0).all()):
                raise InputError(f"{path}: d2t does not name tokens of the target, ascending.", again)
        draft.embed_tokens.requires_grad_(False)
        draft.lm_head.requires_grad_(False)
        return draft.eval()

    def finish_target_logits(self, logits: Tensor) -> Tensor:
        """The target's logits [..., V] from the bare output of its LM head, with its multiplier and its soft cap."""
        return finish_logits(logits, self.config.target_logit_multiplier, self.config.target_logit_softcap)

    # --- decoding ---

    def new_context(self, rows: int = 1) -> ContextT:
        """An empty context of ``rows`` rows."""
        raise NotImplementedError

    def extend(self, context: ContextT, taps: Tensor, counts: Sequence[int], following: Tensor) -> None:
        """Append the first ``counts[b]`` of ``taps`` [B, n, T·H]; ``following`` [B, n] is the token after each."""
        raise NotImplementedError

    def begin(self, context: ContextT, anchor_tokens: Tensor) -> DraftBlock:
        """The next block of each row, behind ``context`` and the last accepted tokens ``anchor_tokens`` [B]."""
        raise NotImplementedError

    def over_target(self, logits: Tensor) -> Tensor:
        """Logits of the tokens that it can draft [..., N] among those of all [..., V]: -inf for the others.

        So these have probability 0 in what is drafted, and accepting stays exact (Leviathan et al. 2023, theorem 1).
        """
        if (tokens := self.vocabulary) is None:
            return logits
        return logits.new_full((*logits.shape[:-1], self.config.vocab_size), -torch.inf).index_copy_(-1, tokens, logits)

    def calibrated(self, sampled: Sequence[float]) -> list[tuple[Sequence[float], Sequence[float]]]:
        """Weights and biases [γ] with which σ(w z + b) is a slot's chance, for each row sampled at ``sampled`` [B].

        They are those of the nearest temperature of sampling that the draft is calibrated at: its `lines`, else its
        `temperatures`; and 1 and 0 for a head that is not calibrated.
        """
        slots = self.config.block_size
        heads = self.temperatures or {0.0: (1.0,) * slots}
        scaled = {at: (tuple(1 / each for each in fit), (0.0,) * slots) for at, fit in heads.items()}
        fitted = self.lines or scaled
        return [fitted[min(fitted, key=lambda at: abs(at - temperature))] for temperature in sampled]

    # --- parts ---

    def _rotation(self, starts: Sequence[int], count: int) -> Rotation:
        """Tables [B or 1, 1, count, d] for ``count`` positions from each of ``starts``."""
        first, last = min(starts), max(starts)
        cosines, sines = self._rotary.tables(last + count, self.device, self.compute_dtype)
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


@dataclasses.dataclass
class DSparkContext(DraftContext):
    """What decoding remembers, with the key and value weights of all layers: a new position takes one matrix product.

    They are the weights as they were when the context was made, shared by all contexts of that time.
    """

    key_value_weights: Tensor  # [layers, 2·kv_heads·d, H], k_proj over v_proj
    key_norms: Tensor  # [layers, 1, d]


class DSparkDraft(Draft[DraftConfig, DSparkContext]):
    """A DSpark draft, or with a `DFlashConfig` a DFlash draft; see `Draft` for its weights."""

    Config = DraftConfig

    _fused: tuple[tuple, Tensor, Tensor] | None = None

    def _build(self, config: DraftConfig) -> None:
        self.fc = Linear(config.num_taps * config.hidden_size, config.hidden_size, bias=False)
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.markov_head: VanillaHead | IndependentSlots = build_sequential_head(config)
        self.confidence_head = ConfidenceHead(config) if config.enable_confidence_head else None

    # --- training ---

    def forward(
        self,
        input_ids: Tensor,  # [B, S]
        taps: Tensor,  # [B, S, T·H]
        anchors: Tensor,  # [B, A] positions
        valid: Tensor,  # [B, A] bool; False: the block is a filler
        positions: Tensor | None = None,  # [B, S] of each token in its own sample; None: a row is one sample
        far: int = 0,  # first positions of a single row, before all anchors, that train nothing
    ) -> Tensor:
        """Hidden states of every slot of every block, after the final norm: [B, A, γ, H].

        A block sees positions strictly before its anchor, so right padding is never seen. Rows of fillers hold numbers
        without meaning. Of ``far`` positions only keys and values are kept for the backward, and they get no gradient;
        those of them that a sliding window hides are not looked at.
        """
        self._require_embeddings()
        length, slots = input_ids.shape[1], self.config.block_width
        # The blocks of a row lie one after the other: A·γ positions that count from their anchors on. (A·(γ + 1) where
        # the anchor's own slot predicts nothing; it is left out at the end.)
        tokens = input_ids.gather(1, anchors).masked_fill(~valid, self.config.mask_token_id)
        hidden = self._block_embeddings(tokens).flatten(1, 2)  # [B, A·γ, H]
        tables = self._rotary.tables(length + slots, self.device, self.compute_dtype)
        sight = Sight.of(self.config)
        if sight.reach is not None and (hidden_from_all := far - sight.reach) > 0:
            if positions is None:
                positions = torch.arange(length, device=anchors.device)[None]
            positions, taps = positions[:, hidden_from_all:], taps[:, hidden_from_all:]
            anchors, far, length = anchors - hidden_from_all, sight.reach, length - hidden_from_all
        own = anchors if positions is None else positions.gather(1, anchors)
        places = (own[:, :, None] + torch.arange(slots, device=anchors.device)).flatten(1)  # [B, A·γ]
        rows = input_ids.shape[0]
        block_rotation, context_rotation = [], []
        for table in tables:
            block_rotation.append(table[places][:, None])
            of_row = (
                table[None, None, :length].expand(rows, -1, -1, -1) if positions is None else table[positions][:, None]
            )
            context_rotation.append(of_row)
        all_rotation = [
            torch.cat((table[:, :, far:], own), dim=2)
            for table, own in zip(context_rotation, block_rotation, strict=True)
        ]
        pieces: list[FarPiece] = []
        with torch.no_grad():
            for first in range(0, far, FAR_PIECE):
                these = slice(first, min(far, first + FAR_PIECE))
                rotation = (context_rotation[0][:, :, these], context_rotation[1][:, :, these])
                pieces.append((self._project(taps[:, these]), rotation))
        context = self._project(taps[:, far:])  # [B, S - far, H]
        attend = block_attention(anchors, length, slots, self.attention, sight, positions, lean=far > 0)
        for layer in self._each_layer():
            inputs = (hidden, context, tuple(block_rotation), tuple(all_rotation), attend, pieces)
            if self.recompute_layers:
                hidden = checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                hidden = layer(*inputs)
        return self.norm(hidden).unflatten(1, (-1, slots))[:, :, -self.config.block_size :]

    def _project(self, taps: Tensor) -> Tensor:
        """[..., T·H] to [..., H], what keys and values of the context are made of."""
        return self.hidden_norm(self.fc(taps.to(self.compute_dtype)))

    def base_logits(self, hidden: Tensor) -> Tensor:
        """[..., H] to [..., N], before the sequential head."""
        return (self.packed_head or self.lm_head)(hidden)

    def confidence(
        self,
        hidden: Tensor,  # [..., H]
        previous: Tensor,  # [...] token before each slot
    ) -> Tensor:
        """Logit of each slot's acceptance rate [...]; only for drafts with a confidence head."""
        with_markov = self.config.confidence_head_with_markov
        embedded = self.markov_head.embed(previous, hidden.dtype) if with_markov else None
        if self.confidence_head is None:
            raise InputError("The draft has no confidence head.", "Set schedule to off or cost.")
        return self.confidence_head(hidden, embedded)

    # --- decoding ---

    def new_context(self, rows: int = 1) -> DSparkContext:
        """An empty context of ``rows`` rows, for the weights as they are now."""
        self._require_embeddings()
        layers = [RaggedKV(rows) for _ in self.layers]
        return DSparkContext([0] * rows, layers, [0] * rows, *self._fused_keys_and_values())

    @torch.no_grad()
    def _fused_keys_and_values(self) -> tuple[Tensor, Tensor]:
        """`DSparkContext`'s two tensors; made again when a weight they are made of has changed."""
        attentions, dtype = [layer.self_attn for layer in self._each_layer()], self.compute_dtype
        sources = [weight for each in attentions for weight in (each.k_proj.weight, each.v_proj.weight)]
        sources += [each.k_norm.weight for each in attentions]
        versions = (dtype, *((weight.data_ptr(), weight._version) for weight in sources))
        if self._fused is None or self._fused[0] != versions:
            weights = torch.stack([torch.cat((each.k_proj.weight, each.v_proj.weight)) for each in attentions])
            norms = torch.stack([each.k_norm.weight for each in attentions])[:, None]
            self._fused = versions, weights.to(dtype), norms.to(dtype)
        return self._fused[1:]

    @torch.no_grad()
    def extend(
        self,
        context: DSparkContext,
        taps: Tensor,  # [B, n, T·H]
        counts: Sequence[int],
        following: Tensor | None = None,  # [B, n] the token after each position; not looked at by this kind of draft
    ) -> None:
        """Append the first ``counts[b]`` of the n positions of each row; the others are ignored."""
        config, reach = self.config, Sight.of(self.config).reach
        if reach is not None and min(counts) == max(counts) > reach:  # a prompt: no slot will see its beginning
            skipped, taps, counts = counts[0] - reach, taps[:, counts[0] - reach : counts[0]], [reach] * len(counts)
            context.lengths = [length + skipped for length in context.lengths]
            context.forgotten = list(context.lengths)
        rows, added, _ = taps.shape
        of_all_layers = context.key_value_weights.flatten(0, 1)
        projected = functional.linear(self._project(taps), of_all_layers)
        projected = projected.view(rows, added, len(context.layers), 2, config.num_key_value_heads, config.head_dim)
        keys = functional.rms_norm(projected[:, :, :, 0], (config.head_dim,), None, config.rms_norm_eps)
        keys = (keys * context.key_norms).permute(2, 0, 3, 1, 4)  # [layers, B, kv_heads, n, d]
        keys = rotate(keys, self._rotation(context.lengths, added))
        values = projected[:, :, :, 1].permute(2, 0, 3, 1, 4)
        for layer, layer_keys, layer_values in zip(context.layers, keys, values, strict=True):
            layer.write(layer_keys, layer_values, context.stored)
        context.lengths = [length + count for length, count in zip(context.lengths, counts, strict=True)]
        if reach is not None:
            context.keep_last(reach, config.block_size + 1)

    @torch.no_grad()
    def block_hidden(
        self,
        context: DSparkContext,
        anchor_tokens: Tensor,  # [B] the last accepted token of each row, not yet in the context
    ) -> Tensor:
        """Hidden states of the next block of each row, after the final norm: [B, γ, H]."""
        slots, stored, sight = self.config.block_width, context.stored, Sight.of(self.config)
        rotation = self._rotation(context.lengths, slots)
        mask = None
        if min(stored) != max(stored) or not sight.whole:
            anchors = torch.tensor(stored, device=self.device)[:, None, None, None]
            places = torch.arange(max(stored) + slots, device=self.device) - anchors  # [B, 1, 1, keys]
            mask = places < slots
            if not sight.whole:
                mask = mask & sight.sees(torch.arange(slots, device=self.device)[:, None], places)
        hidden = self._block_embeddings(anchor_tokens)
        for layer, weight, kv in zip(self._each_layer(), context.key_value_weights, context.layers, strict=True):
            hidden = layer.decode(hidden, rotation, weight, kv, stored, mask)
        return self.norm(hidden[:, -self.config.block_size :])

    def begin(self, context: DSparkContext, anchor_tokens: Tensor) -> "DSparkBlock":
        """The next block of each row, to be drafted slot by slot; ``anchor_tokens`` [B] as for `block_hidden`."""
        hidden = self.block_hidden(context, anchor_tokens)
        return DSparkBlock(self, hidden, self.base_logits(hidden), self.markov_head.start(hidden))

    # --- parts ---

    def _each_layer(self) -> Iterable[Layer]:
        return cast("Iterable[Layer]", self.layers)  # nn.ModuleList does not say of what

    def _block_embeddings(self, anchor_tokens: Tensor) -> Tensor:
        """[...] to [..., width of a block, H]: the anchor's embedding, then mask tokens'."""
        mask = self.embed_tokens.weight[self.config.mask_token_id]
        anchor = self.embed_tokens(anchor_tokens).unsqueeze(-2)
        filler = mask.expand(*anchor_tokens.shape, self.config.block_width - 1, -1)
        return torch.cat((anchor, filler), dim=-2)


@dataclasses.dataclass
class DSparkBlock:
    """A block of each row: hidden states at once, tokens slot by slot."""

    draft: DSparkDraft
    hidden: Tensor  # [B, γ, H]
    base: Tensor  # [B, γ, N]
    state: Tensor  # the sequential head's, before ``slot``
    slot: int = 0

    def confidence(self, previous: Tensor) -> Tensor:
        """Logit [B] of the acceptance of the next slot, after ``previous`` [B] (the anchor for slot 0)."""
        return self.draft.confidence(self.hidden[:, self.slot], previous)

    def next_logits(self, previous: Tensor) -> Tensor:
        """Logits [B, V] of the next slot, after ``previous`` [B]."""
        at, self.slot = self.slot, self.slot + 1
        logits, self.state = self.draft.markov_head.step(self.base[:, at], self.hidden[:, at], previous, self.state)
        return self.draft.over_target(logits)


# --- files ---


def write_draft(folder: Path, config: DraftConfig | Eagle3Config, tensors: Mapping[str, Tensor]) -> None:
    """Write a draft's ``model.safetensors`` and ``config.json``; a slim copy without `SHARED` among ``tensors``."""
    config = config.model_copy(update={"dtype": str(tensors["fc.weight"].dtype).removeprefix("torch.")})
    content = save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, metadata={"format": "pt"})
    files.write_whole(Path(folder) / WEIGHTS_FILE, lambda file: file.write(content))
    files.write_json(Path(folder) / "config.json", config.to_json())


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Weights in ``dtype``, None: their own; ids stay what they are."""
    return tensor.to(dtype=dtype) if tensor.is_floating_point() else tensor


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
