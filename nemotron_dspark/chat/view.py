"""A sample as a person can read it: which stretches of it train."""

import dataclasses
import itertools
from typing import TYPE_CHECKING, cast

from nemotron_dspark.chat.mask import Tokenised

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class Stretch:
    """Consecutive tokens of one kind."""

    text: str
    trained: bool
    special: bool  # added tokens: markers, tags


def stretches(tokenizer: "PreTrainedTokenizerBase", sample: Tokenised) -> list[Stretch]:
    """``sample`` from its first token to its last; the texts together are the whole sample."""
    added = tokenizer.added_tokens_decoder.keys()
    tokens = zip(sample.input_ids.tolist(), sample.loss_mask.tolist(), strict=True)
    result = []
    for (trained, special), group in itertools.groupby(tokens, key=lambda token: (bool(token[1]), token[0] in added)):
        text = tokenizer.decode([index for index, _ in group], clean_up_tokenization_spaces=False)
        result.append(Stretch(cast(str, text), trained, special))  # one sequence gives one text
    return result
