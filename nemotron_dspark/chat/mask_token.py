"""Which token fills the slots of a block that are not drafted yet.

It must be an id of the target's embedding that never occurs in text: a reserved token that no template prints. A
tokenizer without one lends a token that the training data never uses.
"""

import dataclasses
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from nemotron_dspark.chat.format import template_source
from nemotron_dspark.errors import InputError
from nemotron_dspark.targets.spec import TargetSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NEMOTRON_MASK = 990  # what NVIDIA's own drafts use
NEMOTRON_AVOID = frozenset({18, 19, 20, 233, 999})  # used by multimodal variants, or as padding
_NEMOTRON_VOCABULARY = 131072
_RESERVED = re.compile(
    r"<SPECIAL_\d+>|<\|?reserved[\w ]*\d+\|?>|<\|?unused_?\d*\|?>|\[unused_?\d+\]"
    r"|<\|?extra_id_\d+\|?>|<\|?placeholder_?\d+\|?>|>>UNUSED_\d+<<"
)


@dataclasses.dataclass(frozen=True)
class MaskToken:
    id: int
    reason: str


def choose_mask_token(
    tokenizer: "PreTrainedTokenizerBase",
    spec: TargetSpec,
    *,
    override: int | None = None,
    samples: Iterable[np.ndarray | Tensor] | None = None,
) -> MaskToken:
    """The mask token of drafts for this target, and why this one.

    In order: ``override``; what `reserved_mask_token` finds; else, counted over the ids of ``samples``, the highest
    special token, or else the highest token at all, that neither they nor the chat template use.

    Raises:
        InputError: ``override`` is outside the vocabulary or printed by the chat template, or no token is suitable.
    """
    added = {index: token.content for index, token in tokenizer.added_tokens_decoder.items()}
    used = _used_ids(tokenizer, added)
    if override is not None:
        if not 0 <= override < spec.vocab_size:
            raise InputError(
                f"The mask token {override} is outside the target's vocabulary of {spec.vocab_size}.",
                f"Set draft.mask_token_id to an id from 0 to {spec.vocab_size - 1}, or leave it out.",
            )
        if override in used:
            raise InputError(
                f"The mask token {override} ({added.get(override)!r}) is one that the target's chats use.",
                "Set draft.mask_token_id to a reserved token, or leave it out.",
            )
        return MaskToken(override, "set by draft.mask_token_id")
    if reserved := reserved_mask_token(tokenizer, spec):
        return reserved
    if samples is None:
        raise InputError(
            "The target's tokenizer has no mask token and no reserved token, and there is no data here to count which "
            "token is never used.",
            "Set draft.mask_token_id to a token that your data never uses.",
        )
    counts = np.zeros(spec.vocab_size, dtype=np.int64)
    for ids in samples:
        counts += np.bincount(np.asarray(ids), minlength=spec.vocab_size)
    unused = set(np.flatnonzero(counts == 0).tolist()) - used
    special = [index for index in added if index in unused]
    if not unused:
        raise InputError("Every token of the target's vocabulary occurs in the data.", "Take fewer conversations.")
    # Ids of a byte-pair vocabulary are in the order in which it was learned: the highest is the rarest.
    chosen = max(special or unused)
    kind, text = ("special token", added[chosen]) if special else ("token", tokenizer.convert_ids_to_tokens(chosen))
    return MaskToken(
        chosen,
        f"{text}, the last {kind} that neither the chat template nor the {int(counts.sum()):,} tokens of data use: the "
        "tokenizer has none to spare",
    )


def reserved_mask_token(tokenizer: "PreTrainedTokenizerBase", spec: TargetSpec) -> MaskToken | None:
    """The mask token where there is one to spare whatever the data holds, else None.

    In order: 990 for Nemotron tokenizers; the tokenizer's mask token; its highest reserved token; the first row of the
    embedding that the tokenizer has no token for (DeepSpec's choice for Qwen3).
    """
    added = {index: token.content for index, token in tokenizer.added_tokens_decoder.items()}
    used = _used_ids(tokenizer, added)
    nemotron = spec.vocab_size == _NEMOTRON_VOCABULARY and all(index in added for index in range(1000))
    if nemotron and NEMOTRON_MASK not in used:
        return MaskToken(NEMOTRON_MASK, "NVIDIA's choice for Nemotron tokenizers")
    own = tokenizer.mask_token_id
    if own is not None and own < spec.vocab_size and own not in used:
        return MaskToken(own, "the tokenizer's mask token")
    avoid = used | NEMOTRON_AVOID if nemotron else used
    reserved = [i for i, text in added.items() if _RESERVED.fullmatch(text) and i < spec.vocab_size and i not in avoid]
    if reserved:
        return MaskToken(max(reserved), f"the highest reserved token, {added[max(reserved)]}")
    if len(tokenizer) < spec.vocab_size:
        return MaskToken(len(tokenizer), "the first row of the embedding that the tokenizer has no token for")
    return None


def special_ids(tokenizer: "PreTrainedTokenizerBase", spec: TargetSpec) -> set[int]:
    """Tokens that are no text: those that the chat template prints, and those that the tokenizer has a role for."""
    added = {index: token.content for index, token in tokenizer.added_tokens_decoder.items()}
    return {index for index in _used_ids(tokenizer, added) | set(tokenizer.all_special_ids) if index < spec.vocab_size}


def _used_ids(tokenizer: "PreTrainedTokenizerBase", added: dict[int, str]) -> set[int]:
    """Added tokens that the chat template prints, and those with a role of their own (the mask token's is free)."""
    source = template_source(tokenizer)
    printed = {index for index, text in added.items() if text in source}
    roles = (getattr(tokenizer, f"{role}_token_id", None) for role in ("bos", "eos", "pad", "unk", "sep", "cls"))
    return printed | {index for index in roles if index is not None}
