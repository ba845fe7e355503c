"""Reasoning, content and calls of an answer: split the same however its text comes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_dspark.chat.tool_calls import ToolCall
from nemotron_dspark.serving.parts import Splitter

TAGS = ("<tool_call>", "</tool_call>")
CALL = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'


def split(pieces, *how):
    splitter = Splitter(*how)
    found = [part for piece in pieces for part in splitter.push(piece)] + splitter.finish()
    told = []
    for part in found:
        assert part.call or part.text  # nothing empty is delivered
        if part.call is None and told and told[-1][0] == part.kind:
            told[-1] = (part.kind, told[-1][1] + part.text)
        else:
            told.append((part.kind, part.call or part.text))
    return told


F = ToolCall("f", {"x": 1})
CASES = [
    ("Hm.\n</think>\n\nYes.", ("open",), [("reasoning", "Hm."), ("content", "Yes.")]),
    ("\nA\n\nB </think>C\n", ("open",), [("reasoning", "A\n\nB "), ("content", "C\n")]),
    ("cut off\n", ("open",), [("reasoning", "cut off")]),
    ("</think>Yes.", ("open",), [("content", "Yes.")]),
    ("<think>\nHm.\n</think>\n\nYes.", ("possible",), [("reasoning", "Hm."), ("content", "Yes.")]),
    ("\n<thinking> about", ("possible",), [("content", "\n<thinking> about")]),
    ("Yes. </think>", ("possible",), [("content", "Yes. </think>")]),
    ("", ("possible",), []),
    ("<think>Hm.</think>Yes.", (None,), [("content", "<think>Hm.</think>Yes.")]),
    (f"I look.\n{CALL}\n", (None, TAGS), [("content", "I look."), ("call", F)]),
    (f"{CALL}\n{CALL}", (None, TAGS), [("call", F), ("call", F)]),
    (f"Hm.</think>\n\n{CALL}", ("open", TAGS), [("reasoning", "Hm."), ("call", F)]),
    (f"{CALL} Done. ", (None, TAGS), [("call", F), ("content", " Done.")]),
    ("<tool_call>no json</tool_call> x", (None, TAGS), [("content", "<tool_call>no json</tool_call> x")]),
    (f"a {CALL[:-5]}", (None, TAGS), [("content", "a"), ("content", CALL[:-5])]),
    (CALL, (None, None), [("content", CALL)]),
    ("a < b \n", (None, TAGS), [("content", "a < b \n")]),
]


@pytest.mark.parametrize(("text", "how", "expected"), CASES)
def test_an_answer_is_split_into_its_parts(text, how, expected):
    merged = []
    for kind, value in expected:
        if merged and merged[-1][0] == kind == "content":
            merged[-1] = (kind, merged[-1][1] + value)
        else:
            merged.append((kind, value))
    assert split([text], *how) == merged


@given(data=st.data())
@settings(max_examples=150)
def test_parts_do_not_depend_on_how_the_text_comes(data):
    pieces = ["<think>", "</think>", "<tool_call>", "</tool_call>", CALL, "\n", " ", "a", "<", "<tool", "é"]
    text = "".join(data.draw(st.lists(st.sampled_from(pieces), max_size=12)))
    how = data.draw(st.tuples(st.sampled_from(["open", "possible", None]), st.sampled_from([TAGS, None])))
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=8)))
    chunks = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert split(chunks, *how) == split([text], *how)
