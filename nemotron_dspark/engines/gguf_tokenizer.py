"""A byte-level BPE tokenizer as llama.cpp stores it, and what cuts text before it: llama.cpp knows that by name."""

import json
from typing import TYPE_CHECKING, Any

from nemotron_dspark.errors import InputError
from nemotron_dspark.targets import Checkpoint

if TYPE_CHECKING:
    from gguf import GGUFWriter

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_NAMES: dict[tuple[str, ...], str] = {  # what a tokenizer.json cuts with, in order: llama.cpp's name
    ("ByteLevel",): "gpt-2",
    ("Digits", "ByteLevel"): "smollm",
    (_LLAMA3,): "llama-bpe",
    (_LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"),): "qwen2",
    (_TEKKEN,): "tekken",
}


def write(writer: "GGUFWriter", target: Checkpoint, vocab_size: int) -> None:
    """Tokens, merges, special tokens and chat template of the target's tokenizer.

    Raises:
        InputError: it is no byte-level BPE, or it cuts text in a way that llama.cpp has no name for.
    """
    import gguf

    tokenizer: Any = target.load_tokenizer()
    whole = json.loads(tokenizer.backend_tokenizer.to_str())
    model = whole["model"]
    name = _NAMES.get(_cuts(whole.get("pre_tokenizer")))
    if model["type"] != "BPE" or model.get("byte_fallback") or name is None:
        raise InputError(
            f"{target.name} has a tokenizer that is not written as GGUF here.",
            "Convert target and draft with llama.cpp's convert_hf_to_gguf.py, which knows more of them.",
        )
    texts = {index: text for text, index in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    kinds = gguf.TokenType
    tokens, types = [], []
    for index in range(vocab_size):
        tokens.append(texts.get(index, f"[PAD{index}]"))
        if index not in texts:
            types.append(kinds.UNUSED)
        elif index in added:
            types.append(kinds.CONTROL if added[index].special else kinds.USER_DEFINED)
        else:
            types.append(kinds.NORMAL)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])
    for role in ("bos", "eos", "pad", "unk"):
        index = getattr(tokenizer, f"{role}_token_id", None)
        if index is not None:
            getattr(writer, f"add_{role}_token_id")(index)
    begun = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(len(begun) > 0 and begun[0] == tokenizer.bos_token_id)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _cuts(pre_tokenizer: dict[str, Any] | None) -> tuple[str, ...]:
    """Steps of a pre-tokenizer: a Split's pattern, the names of others; without a ByteLevel that cuts nothing."""
    if pre_tokenizer is None:
        return ()
    if pre_tokenizer["type"] == "Sequence":
        return tuple(step for part in pre_tokenizer["pretokenizers"] for step in _cuts(part))
    if pre_tokenizer["type"] == "Split":
        return (pre_tokenizer["pattern"].get("Regex", ""),)
    if pre_tokenizer["type"] == "ByteLevel" and not pre_tokenizer.get("use_regex", True):
        return ()
    return (pre_tokenizer["type"],)
