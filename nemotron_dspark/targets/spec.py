"""What a target is, from its config alone: layers, dimensions, and where its parts lie.

`targets/families` fills it, by the target's type; nothing else in the project asks what family a target belongs to.
"""

import dataclasses
from collections.abc import Sequence
from enum import Enum
from typing import Literal, TypeAlias

import torch
from torch import Tensor

MLP: TypeAlias = Literal["gated", "plain", "moe", "none"]


class LayerKind(Enum):
    """What one decoder layer computes; the value is its character in a drawn layout."""

    MAMBA2 = "M"  # in most families followed by an MLP in the same layer
    ATTENTION = "*"
    MLP = "-"
    MOE = "E"
    DECODER = "D"  # attention and MLP in one layer, as in ordinary decoders
    MAMBA1 = "m"
    DELTA = "G"  # gated delta net
    CONV = "C"  # short convolution
    PARALLEL = "P"  # attention and Mamba-2 in one layer
    RECURRENT = "R"  # another recurrence, as RWKV's

    @property
    def attends(self) -> bool:
        """True when the layer keeps keys and values."""
        return self in (LayerKind.ATTENTION, LayerKind.DECODER, LayerKind.PARALLEL)

    @property
    def recurrent(self) -> bool:
        """True when the layer keeps a state that cannot be rewound by forgetting positions."""
        return self not in (LayerKind.ATTENTION, LayerKind.MLP, LayerKind.MOE, LayerKind.DECODER)


@dataclasses.dataclass(frozen=True)
class WeightNames:
    """Where parts of the target lie: in the loaded model (module paths) and in checkpoints (tensor names)."""

    layers: str  # module path of the list of decoder layers
    final_norm: str  # module path of the norm before the LM head
    embedding: str  # module path of the token embedding
    head: str  # module path of the LM head
    embedding_tensors: tuple[str, ...]  # names a checkpoint may give the embedding, most usual first
    head_tensors: tuple[str, ...]  # likewise for the LM head


def weight_names(
    base: str = "model", *, norm: str = "norm", embedding: str = "embed_tokens", stored: tuple[str, ...] = ()
) -> WeightNames:
    """Llama's names, which most have since, but for what is given; ``stored`` are tensor names of the embedding."""
    path = f"{base}.{embedding}"
    return WeightNames(
        f"{base}.layers", f"{base}.{norm}", path, "lm_head", stored or (f"{path}.weight",), ("lm_head.weight",)
    )


def finish_logits(logits: Tensor, multiplier: float, softcap: float | None) -> Tensor:
    """Logits from the bare output of an LM head: multiplied (Granite, Falcon-H1), then soft-capped (Gemma)."""
    if multiplier != 1.0:
        logits = logits * multiplier
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


@dataclasses.dataclass(frozen=True)
class TargetSpec:
    """Everything a stage needs to know of a target without loading a weight."""

    name: str
    model_type: str
    layers: tuple[LayerKind, ...]
    hidden_size: int
    vocab_size: int
    num_attention_heads: int  # this and the next two are 0 for a target without attention
    num_key_value_heads: int
    head_dim: int
    mlp: MLP
    intermediate_size: int | None  # MLP width; None without one, as in a pure mixture of experts
    norm_eps: float
    rope_theta: float | None  # None: the target has no rotary embedding
    max_position_embeddings: int
    tie_word_embeddings: bool
    names: WeightNames
    logit_multiplier: float = 1.0  # what the LM head's output is multiplied by
    logit_softcap: float | None = None  # then logits become cap·tanh(logits / cap)
    unequal_keys: int | None = None  # key channels of all layers together, where they differ from layer to layer
    assumed: tuple[str, ...] = ()  # sentences on every value the config did not give

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def layout(self) -> str:
        """The layers as one string, e.g. ``M-*-M-*-``."""
        return "".join(kind.value for kind in self.layers)

    @property
    def key_channels(self) -> int:
        """Channels of the keys that a position leaves in all layers together; its values have as many."""
        alike = sum(kind.attends for kind in self.layers) * self.num_key_value_heads * self.head_dim
        return alike if self.unequal_keys is None else self.unequal_keys

    def finish_logits(self, logits: Tensor) -> Tensor:
        """The target's logits [..., V] from the bare output of its LM head."""
        return finish_logits(logits, self.logit_multiplier, self.logit_softcap)


def first_stop_ids(*named: int | Sequence[int] | None) -> tuple[int, ...]:
    """Ids that end generation: the first of ``named`` that there are (a generation config's go before a config's)."""
    found = next((ids for ids in named if ids is not None), ())
    return (found,) if isinstance(found, int) else tuple(found)
