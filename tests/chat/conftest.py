"""Tokenizers with any chat template, and conversations in one line."""

import pytest
from tokenizers import AddedToken, Regex, pre_tokenizers

from nemotron_dspark.chat.format import Conversation, Message
from nemotron_dspark.recipe import tiny

MARKERS = (  # of the families whose markers the tiny tokenizer does not have
    *("<SPECIAL_10>", "<SPECIAL_11>", "<SPECIAL_12>", "<extra_id_0>", "<extra_id_1>"),
    *("<start_of_turn>", "<end_of_turn>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"),
)
# Line breaks stay together whatever follows them, as in the tokenizers of these families; those of GPT-2 do not.
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@pytest.fixture
def make_tokenizer():
    """A tokenizer of the tiny targets; ``template`` None ships none, ``lines`` False splits text as GPT-2 does."""

    def make(template=tiny.CHAT_TEMPLATE, lines=True):
        tokenizer = tiny.make_tokenizer(["state of a hybrid model\n\n", "<think> and answer.\n"], 384)
        if lines:
            parts = [
                pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
            tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
        tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in MARKERS])
        tokenizer.chat_template = template
        return tokenizer

    return make


@pytest.fixture
def talk():
    """``talk("u:hi", "a:hello")`` is a conversation; roles s, u, a."""

    def make(*turns, complete=True):
        roles = {"s": "system", "u": "user", "a": "assistant"}
        messages = [Message(roles[turn[0]], turn[2:]) for turn in turns]
        return Conversation(tuple(messages), "test:1", complete)

    return make
