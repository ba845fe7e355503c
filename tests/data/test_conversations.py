"""Data files: everything usable is read, everything else is named by line and reason."""

import json

import pytest

from nemotron_dspark.chat.format import Conversation, Message
from nemotron_dspark.config.run import DataConfig
from nemotron_dspark.data.check import check_data
from nemotron_dspark.data.conversations import Skipped, SkipTally, read
from nemotron_dspark.data.prompts import Prompt, read_prompts
from nemotron_dspark.errors import InputError
from nemotron_dspark.recipe import tiny

GOOD = {"conversations": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "state"}]}


def called(function):
    return {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"function": function}]}]}


def write(path, *rows):
    path.write_bytes(b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows))
    return path


@pytest.mark.parametrize(
    "row",
    [
        GOOD,
        {"messages": GOOD["conversations"]},
        {"conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "state"}]},
        {"messages": [{"role": "user", "content": "What?"}, {"role": "model", "content": "state"}], "id": 4},
    ],
)
def test_every_spelling_is_the_same_conversation(tmp_path, row):
    (found,) = read(write(tmp_path / "data.jsonl", row))
    assert found == Conversation((Message("user", "What?"), Message("assistant", "state")), line=1)


def test_calls_results_reasoning_and_functions_are_read_in_every_spelling(tmp_path):
    call = {"id": "7", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {
            "role": "assistant",
            "reasoning": "r",
            "tool_calls": [call | {"function": {"name": "f", "arguments": '{"x": 1}'}}],
        },
        {"role": "tool", "content": "4", "tool_call_id": "7", "name": "f"},
        {"role": "assistant", "content": "four"},
    ]
    (found,) = read(write(tmp_path / "data.jsonl", {"messages": turns, "tools": json.dumps([{"name": "f"}])}))
    assert found.messages == (
        Message("user", "a\nb", parts=("a", "b")),
        Message("assistant", "", more={"tool_calls": [call], "reasoning_content": "r"}),
        Message("tool", "4", more={"tool_call_id": "7", "name": "f"}),
        Message("assistant", "four"),
    )
    assert found.tools == ({"name": "f"},)


def test_a_cut_answer_is_marked(tmp_path):
    (found,) = read(write(tmp_path / "data.jsonl", GOOD | {"finish": "length"}))
    assert not found.complete


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (b"{not json", "not valid JSON"),
        (b'{"conversations": "\xff"}', "not valid JSON"),
        ([1, 2], "not a JSON object"),
        ({"text": "state"}, "no list under conversations or messages"),
        ({"conversations": "state"}, "no list under conversations or messages"),
        ({"conversations": []}, "empty conversation"),
        ({"conversations": ["What?"]}, "a turn is not an object"),
        ({"conversations": [{"role": "judge", "content": "x"}]}, "a turn has an unknown role"),
        ({"conversations": [{"role": ["user"], "content": "x"}]}, "a turn has an unknown role"),
        ({"conversations": [{"role": "user", "content": [{"type": "text"}]}]}, "a turn's content is not text"),
        (
            {"conversations": [{"role": "user", "content": [{"type": "image"}]}]},
            "a turn has a part that is no text, but image",
        ),
        (called({"name": 3}), "tool_calls is not a list of calls of named functions"),
        (called({"name": "f", "arguments": "[1]"}), "a tool call's arguments are not a JSON object"),
        (GOOD | {"tools": [1]}, "tools is not a list of objects"),
        (
            {"conversations": [{"role": "assistant", "content": "x", "token_ids": "12"}]},
            "token ids that are not a list of numbers",
        ),
        ({"conversations": [{"role": "user", "content": "What?"}]}, "no assistant turn"),
        ({"conversations": [*GOOD["conversations"], {"role": "assistant", "content": " "}]}, "empty answer"),
    ],
)
def test_what_cannot_be_used_is_skipped_with_line_and_reason(tmp_path, row, reason):
    items = list(read(write(tmp_path / "data.jsonl", GOOD, b"", row, GOOD)))
    assert items[1] == Skipped(3, reason)
    assert [type(item) for item in items] == [Conversation, Skipped, Conversation]


def test_a_file_without_anything_usable_says_why(tmp_path):
    with pytest.raises(InputError, match=r"2 skipped: empty conversation \(lines 1, 3\)"):
        list(read(write(tmp_path / "data.jsonl", {"conversations": []}, b"", {"conversations": []})))
    with pytest.raises(InputError, match="it is empty"):
        list(read(write(tmp_path / "data.jsonl")))
    with pytest.raises(InputError, match="not a file"):
        list(read(tmp_path / "absent.jsonl"))


def test_a_tally_counts_all_and_shows_the_first_few():
    tally = SkipTally()
    for line in range(1, 9):
        tally.add(Skipped(line, "empty answer"))
    tally.add(Skipped(9, "not valid JSON"))
    assert tally.total == 9
    assert tally.sentences() == [
        "8 skipped: empty answer (lines 1, 2, 3, 4, 5, …)",
        "1 skipped: not valid JSON (line 9)",
    ]
    assert SkipTally.from_json(json.loads(json.dumps(tally.to_json()))).sentences() == tally.sentences()


SYSTEM, FIRST, SECOND = Message("system", "Be brief."), Message("user", "What?"), Message("user", "And?")


def turns(*messages):
    return [{"role": m.role, "content": m.content} for m in messages]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "What?"}, ((FIRST,),)),
        ({"turns": ["What?", "And?"]}, ((FIRST,), (SECOND,))),
        ({"messages": turns(SYSTEM, FIRST)}, ((SYSTEM, FIRST),)),
        ({"messages": turns(SYSTEM, FIRST, Message("assistant", "old"), SECOND)}, ((SYSTEM, FIRST), (SECOND,))),
        ({"messages": turns(FIRST, SECOND, Message("assistant", "old"))}, ((FIRST, SECOND),)),
        ({"messages": turns(SYSTEM, FIRST, SECOND)}, ((SYSTEM, FIRST), (SECOND,))),
    ],
)
def test_prompts_of_every_kind(tmp_path, row, expected):
    (found,) = read_prompts(write(tmp_path / "prompts.jsonl", row | {"id": "a"}))
    assert found == Prompt(expected, 1, "a")
    assert found.first == expected[0]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"question": "What?"}, "no conversations, messages, turns or prompt"),
        ({"turns": []}, "empty conversation"),
        ({"turns": ["What?", 3]}, "a prompt is not text"),
        ({"prompt": "  "}, "empty prompt"),
        ({"messages": turns(FIRST, Message("tool", "3"))}, "a tool result without a call before it"),
        ({"messages": turns(SYSTEM, Message("assistant", "hello"), FIRST)}, "a turn without a user message"),
    ],
)
def test_what_is_no_prompt_is_skipped(tmp_path, row, reason):
    items = list(read_prompts(write(tmp_path / "prompts.jsonl", {"prompt": "What?"}, row)))
    assert items[1] == Skipped(2, reason)


def test_a_file_without_a_prompt_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no prompt"):
        list(read_prompts(write(tmp_path / "prompts.jsonl", {"prompt": ""})))


def test_check_counts_what_a_build_would_use(tmp_path):
    long = {"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "state of it " * 9}]}
    path = write(tmp_path / "data.jsonl", GOOD, long, b"{", long | {"finish": "length"})
    plain = check_data(path)
    assert (plain.conversations, plain.answers, plain.cut_answers, plain.tokens) == (3, 3, 1, None)
    tokenizer = tiny.make_tokenizer(["state of it"], 320)
    report = check_data(path, tokenizer, DataConfig(max_length=60))
    assert report.conversations == 2
    assert report.skipped.counts == {"not valid JSON": 1, "fewer than 14 loss tokens": 1}
    assert 0 < report.loss_tokens < report.tokens <= 120
    assert report.longest <= 60
