"""Tokenizers with any chat template, and conversations in one line."""

import pytest

from nemotron_dspark.chat.format import Conversation, Message
from nemotron_dspark.recipe import tiny


@pytest.fixture
def make_tokenizer():
    """A tokenizer of the tiny targets; ``template`` None ships none."""

    def make(template=tiny.CHAT_TEMPLATE):
        tokenizer = tiny.make_tokenizer(["state of a hybrid model\n\n", "<think> and answer.\n"], 384)
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
