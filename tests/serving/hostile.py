"""Bodies that nobody means well: seeded, so that the same ones come again."""

import json
import random
from collections.abc import Iterator
from typing import Any

CHAT, COMPLETIONS = "/chat/completions", "/completions"


def deep(levels: int, kind: str = "[") -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value] if kind == "[" else {"a": value}
    return value


NASTY: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63) - 1, 10**400, 0.0, -0.0, 1e308, 5e-324,
    float("nan"), float("inf"), float("-inf"), "", " ", "\0", "\ud800", "x\udfff", "\ufeff", "é" * 5000, "\U0010ffff",
    "<|im_end|>", "{{ 7 * 7 }}", "{% for x in range(10**9) %}{% endfor %}", "../../etc/passwd", "'; drop table x; --",
    [], [None], [[]], [""], ["a", 1], [True], [-1], [2**40], [1.5], {}, {"": ""}, {"\ud800": 1}, {"type": "text"},
    {"role": "user"}, [{"role": "user", "content": None}], [{"type": "text", "text": "\ud800"}], list(range(3000)),
    deep(200), deep(900), deep(200, "{"), deep(900, "{"),
)  # fmt: skip
FIELDS = (
    "model", "messages", "prompt", "temperature", "top_p", "seed", "max_tokens", "max_completion_tokens", "stop",
    "stream", "stream_options", "return_token_ids", "chat_template_kwargs", "n", "logprobs", "top_logprobs", "tools",
    "tool_choice", "parallel_tool_calls", "response_format", "logit_bias", "frequency_penalty", "user", "metadata",
    "echo", "separate_reasoning", "speculative", "return_rounds", "__class__", "__proto__", "\ud800",
)  # fmt: skip
VALID = {
    CHAT: {"messages": [{"role": "user", "content": "What does a hybrid model keep?"}], "max_tokens": 3},
    COMPLETIONS: {"prompt": "The state of", "max_tokens": 3},
}


def spoiled(value: Any, chance: random.Random) -> Any:
    """``value`` with one thing in it, at any depth, put in another's place."""
    if isinstance(value, dict) and value and chance.random() < 0.8:
        key = chance.choice(list(value))
        return value | {key: spoiled(value[key], chance)}
    if isinstance(value, list) and value and chance.random() < 0.8:
        at = chance.randrange(len(value))
        return [*value[:at], spoiled(value[at], chance), *value[at + 1 :]]
    return chance.choice(NASTY)


def bodies(count: int, seed: int) -> Iterator[tuple[str, bytes, str]]:
    """``count`` times (path, body, content type)."""
    chance = random.Random(seed)
    for _ in range(count):
        path = chance.choice((CHAT, COMPLETIONS))
        body: Any = VALID[path]
        for _ in range(chance.randint(1, 3)):
            if chance.random() < 0.5:
                body = body | {chance.choice(FIELDS): chance.choice(NASTY)}
            elif isinstance(changed := spoiled(body, chance), dict):
                body = changed
        if chance.random() < 0.05:
            body = chance.choice(NASTY)
        raw = json.dumps(body).encode()
        kind = "application/json"
        for _ in range(chance.choice((0, 0, 0, 1, 4))):  # and some are damaged on the way
            at = chance.randrange(len(raw) + 1)
            raw = chance.choice((raw[:at], raw[:at] + bytes([chance.randrange(256)]) + raw[at + 1 :], raw[:at] * 2))
        if chance.random() < 0.1:
            kind = chance.choice(
                ("text/plain", "application/xml", "application/json; charset=utf-16", "", "multipart/form-data")
            )
        yield path, raw, kind
