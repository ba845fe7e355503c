"""Answers come from a server; nothing answered is ever asked again or lost."""

import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import typer
from typer.testing import CliRunner

from nemotron_dspark.chat.mask import tokenise
from nemotron_dspark.data.conversations import read
from nemotron_dspark.data.regenerate import regenerate
from nemotron_dspark.errors import EnvironmentFault, InputError
from nemotron_dspark.recipe import tiny


class Server(http.server.ThreadingHTTPServer):
    """Answers a chat with "<number of messages>: <last message>"; ``reply(messages)`` may change body and status."""

    daemon_threads = True

    def __init__(self):
        self.asked = []
        self.delay = 0.0
        self.refused = None
        self.model = "tiny"
        self.reply = lambda messages: (200, {})
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer(
            200,
            {"object": "list", "data": [{"id": self.server.model, "object": "model", "created": 0, "owned_by": ""}]},
        )

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(request)
        messages = request["messages"]
        time.sleep(self.server.delay)
        status, changes = self.server.reply(messages)
        if self.server.refused in request:
            status, changes = 400, f"{self.server.refused} is not supported"
        if status != 200:
            return self.answer(status, {"error": {"message": changes, "type": "x", "code": None, "param": None}})
        text = f"{len(messages)}: {messages[-1]['content']}"
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
        choice["finish_reason"] = changes.pop("finish_reason", "stop")
        if "token_ids" in changes:
            choice["token_ids"] = changes.pop("token_ids")
        more = {"prompt_token_ids": changes.pop("prompt_token_ids")} if "prompt_token_ids" in changes else {}
        choice["message"].update(changes)
        usage = {"prompt_tokens": 1, "completion_tokens": 3, "total_tokens": 4}
        self.answer(
            200,
            {
                "id": "x",
                "object": "chat.completion",
                "created": 0,
                "model": "tiny",
                "choices": [choice],
                "usage": usage,
                **more,
            },
        )

    def answer(self, status, body):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    instance = Server()
    thread = threading.Thread(target=instance.serve_forever, daemon=True)
    thread.start()
    yield instance
    instance.shutdown()
    instance.server_close()


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"turns": [f"q{n}", f"r{n}"][: 1 + n % 2]}) + "\n" for n in range(12)))
    return path


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_token_ids_of_a_server_that_gives_them_are_kept(server, prompts, tmp_path):
    server.reply = lambda messages: (200, {"token_ids": [7, len(messages)], "prompt_token_ids": [1, 2]})
    regenerate(prompts, tmp_path / "out.jsonl", base_url=server.url, top_p=0.9, top_k=20)
    assert {(r["return_token_ids"], r["top_p"], r["top_k"]) for r in server.asked} == {(True, 0.9, 20)}
    answers = [turn for turn in rows(tmp_path / "out.jsonl")[1]["conversations"] if turn["role"] == "assistant"]
    assert [(turn["token_ids"], turn["prompt_token_ids"]) for turn in answers] == [([7, 1], [1, 2]), ([7, 3], [1, 2])]
    assert all("token_ids" not in turn for request in server.asked for turn in request["messages"])
    assert next(iter(read(tmp_path / "out.jsonl"))).messages[1].token_ids == (7, 1)


def test_a_call_of_a_function_is_recorded_and_ends_its_conversation(server, tmp_path):
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "user", "content": "r"}], "tools": tools}
    prompts, out = tmp_path / "p.jsonl", tmp_path / "out.jsonl"
    prompts.write_text(json.dumps(row) + "\n")
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    server.reply = lambda messages: (200, {"content": None, "tool_calls": [call], "finish_reason": "tool_calls"})
    for reused in (0, 1):
        assert regenerate(prompts, out, base_url=server.url).reused == reused
    assert server.asked[0]["tools"] == tools
    (found,) = read(out)
    assert found.tools == tuple(tools)
    assert [message.role for message in found.messages] == ["user", "assistant"]
    assert found.messages[1].more["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}


def call_of(name="search", ids=True, **arguments):
    call = {"type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
    return call | {"id": f"id-{name}"} if ids else call


@pytest.fixture
def agentic(tmp_path):
    """A prompt whose file has two calls and their results, a question after that, and answers."""
    turns = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": [call_of("search", city="Rome"), call_of("date")]},
        {"role": "tool", "content": "friday", "tool_call_id": "id-date"},
        {"role": "tool", "content": "rain", "tool_call_id": "id-search"},
        {"role": "assistant", "content": "It rains."},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Yes."},
    ]
    path = tmp_path / "agentic.jsonl"
    tools = [{"type": "function", "function": {"name": name, "parameters": {}}} for name in ("search", "date")]
    path.write_text(json.dumps({"messages": turns, "tools": tools}) + "\n")
    return path


def test_results_of_tools_follow_an_answer_that_makes_the_same_call(server, agentic, tmp_path):
    calls = [{**call_of("search", city="Rome"), "id": "n1"}, {**call_of("date"), "id": "n2"}]
    server.reply = lambda messages: (200, {"content": "I look.", "tool_calls": calls} if len(messages) == 1 else {})
    report = regenerate(agentic, tmp_path / "out.jsonl", base_url=server.url)
    (row,) = rows(tmp_path / "out.jsonl")
    assert report.branches == 0
    assert [(turn["role"], turn["content"]) for turn in row["conversations"]] == [
        ("user", "Weather?"),
        ("assistant", "I look."),
        ("tool", "friday"),
        ("tool", "rain"),
        ("assistant", "4: rain"),
        ("user", "Sure?"),
        ("assistant", "6: Sure?"),
    ]
    assert [turn["tool_call_id"] for turn in row["conversations"][2:4]] == ["n2", "n1"]  # of the calls that were made
    assert not any("weight" in turn for turn in row["conversations"])
    assert server.asked[1]["messages"][1]["tool_calls"] == calls
    assert all(len(request["tools"]) == 2 for request in server.asked)


@pytest.mark.parametrize(
    "said", [{"tool_calls": [call_of("search", city="Oslo")]}, {"content": "No idea."}, {"finish_reason": "length"}]
)
def test_results_of_another_call_follow_the_recorded_one_which_does_not_train(server, agentic, tmp_path, said):
    server.reply = lambda messages: (200, dict(said) if len(messages) == 1 else {})
    out = tmp_path / "out.jsonl"
    report = regenerate(agentic, out, base_url=server.url)
    branch, row = rows(out)
    assert (report.answered, report.branches, report.cut) == (1, 1, 0)
    assert branch["branch"] is True
    assert [turn["role"] for turn in branch["conversations"]] == ["user", "assistant"]
    assert branch["finish"] == ("length" if "finish_reason" in said else "stop")
    assert [turn.get("weight", 1) for turn in row["conversations"]] == [1, 0, 1, 1, 1, 1, 1]
    assert [turn["content"] for turn in row["conversations"][-3:]] == ["4: rain", "Sure?", "6: Sure?"]
    sent = server.asked[1]["messages"][1]["tool_calls"]
    assert [call["function"]["arguments"] for call in sent] == ['{"city": "Rome"}', "{}"]  # JSON, as the API has it
    assert [conversation.messages[1].trains for conversation in read(out)] == [True, False]


def test_an_answer_with_a_branch_is_resumed_whole_or_asked_again(server, agentic, tmp_path):
    out = tmp_path / "out.jsonl"
    regenerate(agentic, out, base_url=server.url)
    whole = out.read_bytes()
    branch, row = whole.splitlines(keepends=True)
    for kept, reused in ((whole, 1), (branch, 0), (branch + row[:-9], 0)):
        out.write_bytes(kept)
        report = regenerate(agentic, out, base_url=server.url)
        assert (report.reused, report.branches) == (reused, 1)
        assert out.read_bytes() == whole


def test_a_recorded_call_is_context_and_the_answer_to_its_result_trains(server, agentic, tmp_path):
    out = tmp_path / "out.jsonl"
    regenerate(agentic, out, base_url=server.url)
    tokenizer = tiny.make_tokenizer(["Weather? Sure? rain 1: 4: 6: friday search Rome"], 320)
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}"
        "{{ eos_token if m.role == 'assistant' }}{% endfor %}{{ '[assistant]' if add_generation_prompt }}"
    )
    trained = []
    for conversation in read(out):
        for sample in tokenise(tokenizer, conversation, max_length=999).samples:
            trained.append(tokenizer.decode(sample.input_ids[sample.loss_mask == 1], skip_special_tokens=True))
    assert trained == ["1: Weather?", "4: rain6: Sure?"]


def test_results_without_ids_follow_their_calls_in_order(server, tmp_path):
    turns = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "tool_calls": [call_of("f", ids=False), call_of("g", ids=False)]},
        {"role": "tool", "content": "1"},
        {"role": "tool", "content": "2"},
    ]
    prompts = tmp_path / "p.jsonl"
    prompts.write_text(json.dumps({"messages": turns}))
    regenerate(prompts, tmp_path / "out.jsonl", base_url=server.url)
    sent = server.asked[1]["messages"]
    assert [call["id"] for call in sent[1]["tool_calls"]] == [turn["tool_call_id"] for turn in sent[2:]]


def test_a_prompt_that_a_server_fails_at_is_left_out_and_the_others_are_answered(
    server, prompts, tmp_path, monkeypatch
):
    monkeypatch.setattr("nemotron_dspark.data.servers._FIRST_PAUSE", 0.01)
    server.reply = lambda messages: (500, "no such role") if messages[0]["content"] == "q3" else (200, {})
    report = regenerate(prompts, tmp_path / "out.jsonl", base_url=server.url, concurrency=2)
    assert report.answered == 11
    (said,) = report.skipped.sentences()
    assert "the server fails at the prompt: Error code: 500" in said
    assert "no such role" in said


def test_servers_of_different_models_are_refused(server, prompts, tmp_path):
    other = Server()
    other.model = "large"
    threading.Thread(target=other.serve_forever, daemon=True).start()
    with pytest.raises(InputError, match="different models: large, tiny"):
        regenerate(prompts, tmp_path / "out.jsonl", base_url=[server.url, other.url])
    other.shutdown()
    other.server_close()


def test_every_answer_is_regenerated_in_the_order_of_the_prompts(server, prompts, tmp_path):
    out = tmp_path / "out.jsonl"
    report = regenerate(prompts, out, base_url=server.url, concurrency=4, temperature=0.5, max_tokens=9)
    assert (report.answered, report.reused, report.cut, report.tokens) == (12, 0, 0, 3 * 18)
    assert [row["conversations"][0]["content"] for row in rows(out)] == [f"q{n}" for n in range(12)]
    assert rows(out)[1]["conversations"] == [
        {"role": "user", "content": "q1"},
        {"role": "assistant", "content": "1: q1"},
        {"role": "user", "content": "r1"},
        {"role": "assistant", "content": "3: r1"},
    ]
    assert {(r["model"], r["temperature"], r["max_tokens"]) for r in server.asked} == {("tiny", 0.5, 9)}
    assert all("chat_template_kwargs" not in request for request in server.asked)


def test_the_models_own_answers_replace_those_of_the_file(server, tmp_path):
    prompts, out = tmp_path / "p.jsonl", tmp_path / "out.jsonl"
    messages = [("system", "S"), ("user", "q"), ("assistant", "old"), ("user", "r"), ("assistant", "older")]
    prompts.write_text(json.dumps({"id": "x7", "messages": [{"role": a, "content": b} for a, b in messages]}))
    regenerate(prompts, out, base_url=server.url, thinking=False)
    assert [turn["content"] for turn in rows(out)[0]["conversations"]] == ["S", "q", "2: q", "r", "4: r"]
    assert rows(out)[0]["id"] == "x7"
    assert server.asked[0]["chat_template_kwargs"] == {"enable_thinking": False}


def test_what_is_answered_is_not_asked_again(server, prompts, tmp_path):
    out = tmp_path / "out.jsonl"
    regenerate(prompts, out, base_url=server.url)
    whole = out.read_bytes()
    lines = whole.splitlines(keepends=True)
    out.write_bytes(lines[7] + lines[2] + lines[4][:-9])  # out of order, the last one torn by a kill
    server.asked.clear()
    report = regenerate(prompts, out, base_url=server.url)
    assert report.reused == 2
    asked = {request["messages"][0]["content"] for request in server.asked}
    assert asked == {f"q{n}" for n in range(12)} - {"q7", "q2"}
    assert out.read_bytes() == whole


def test_an_answer_cut_at_max_tokens_ends_its_conversation_without_an_end_token(server, prompts, tmp_path):
    server.reply = lambda messages: (200, {"finish_reason": "length"})
    out = tmp_path / "out.jsonl"
    assert regenerate(prompts, out, base_url=server.url).cut == 12
    assert all(row["finish"] == "length" and len(row["conversations"]) == 2 for row in rows(out))
    tokenizer = tiny.make_tokenizer(["q r 1: 3:"], 320)
    for conversation in read(out):
        (sample,) = tokenise(tokenizer, conversation, max_length=99).samples
        loss = tokenizer.decode(sample.input_ids[sample.loss_mask == 1])
        assert loss == conversation.messages[-1].content
        assert sample.input_ids[-1] != tokenizer.eos_token_id
    assert regenerate(prompts, out, base_url=server.url).reused == 12


def test_refused_prompts_and_empty_answers_are_skipped_and_counted(server, prompts, tmp_path):
    def reply(messages):
        if messages[0]["content"] == "q3":
            return 400, "too long"
        return 200, {"content": ""} if messages[0]["content"] == "q5" else {}

    server.reply = reply
    report = regenerate(prompts, tmp_path / "out.jsonl", base_url=server.url)
    assert report.answered == 10
    assert sorted(report.skipped.counts.values()) == [1, 1]
    assert any("too long" in sentence and "line 4" in sentence for sentence in report.skipped.sentences())
    assert any("empty answer (line 6)" in sentence for sentence in report.skipped.sentences())


def test_a_server_that_keeps_special_tokens_to_itself_is_used_all_the_same(server, prompts, tmp_path):
    server.refused = "skip_special_tokens"
    assert regenerate(prompts, tmp_path / "out.jsonl", base_url=server.url, concurrency=3).answered == 12


def test_an_answer_is_recorded_with_the_tag_that_the_generation_prompt_opened(server, tmp_path):
    """Else the template would not find the reasoning in the history, and keep it."""
    server.reply = lambda messages: (200, {"content": f"why\n</think>\n{len(messages)}"})
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text(json.dumps({"turns": ["a", "b"]}))
    regenerate(prompts, out, base_url=server.url)
    contents = [turn["content"] for turn in rows(out)[0]["conversations"]]
    assert contents == ["a", "<think>why\n</think>\n1", "b", "<think>why\n</think>\n3"]
    assert [message["content"] for message in server.asked[-1]["messages"]] == contents[:3]


def test_split_reasoning_is_refused(server, prompts, tmp_path):
    server.reply = lambda messages: (200, {"reasoning_content": "why"})
    with pytest.raises(InputError, match="reasoning parser"):
        regenerate(prompts, tmp_path / "out.jsonl", base_url=server.url)


def test_a_wrong_key_or_model_is_the_users_fault(server, prompts, tmp_path):
    server.reply = lambda messages: (404, "no such model")
    with pytest.raises(InputError, match="no such model"):
        regenerate(prompts, tmp_path / "out.jsonl", base_url=server.url, model="other")


def test_a_server_that_stops_loses_nothing(server, prompts, tmp_path, monkeypatch):
    monkeypatch.setattr("nemotron_dspark.data.servers._RETRIES", 0)
    out = tmp_path / "out.jsonl"
    server.reply = lambda messages: (200, {}) if len(server.asked) < 9 else (500, "broken")
    with pytest.raises(EnvironmentFault, match="kept"):
        regenerate(prompts, out, base_url=server.url, concurrency=2)
    kept = len(rows(out))
    assert 0 < kept < 12
    server.reply = lambda messages: (200, {})
    assert regenerate(prompts, out, base_url=server.url).reused == kept


def test_no_server_is_an_environment_fault(prompts, tmp_path, monkeypatch):
    monkeypatch.setattr("nemotron_dspark.data.servers._RETRIES", 0)
    with pytest.raises(EnvironmentFault, match="fails"):
        regenerate(prompts, tmp_path / "out.jsonl", base_url="http://127.0.0.1:9/v1")


@pytest.mark.parametrize(
    "line", ['{"text": "mine"}', '{"id": "1", "finish": "stop", "conversations": [{"role": "user", "content": "z"}]}']
)
def test_a_file_of_other_content_is_not_overwritten(server, prompts, tmp_path, line):
    out = tmp_path / "out.jsonl"
    out.write_text(line + "\n")
    with pytest.raises(InputError, match="Choose another"):
        regenerate(prompts, out, base_url=server.url)
    assert out.read_text() == line + "\n"


def test_without_the_client_the_package_to_install_is_named(prompts, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(EnvironmentFault, match=r"pip install 'nemotron-dspark\[data\]'"):
        regenerate(prompts, tmp_path / "out.jsonl", base_url="http://127.0.0.1:9/v1")


def test_with_nds_serve_itself(tiny_llama, prompts, tmp_path):
    """The project's own server answers, and every answer gives loss tokens."""
    from nemotron_dspark.serving.listen import Server
    from nemotron_dspark.targets import Target

    target, out = Target.load(str(tiny_llama)), tmp_path / "out.jsonl"
    with Server(target) as served:
        report = regenerate(prompts, out, base_url=served.base_url, temperature=0.0, max_tokens=6)
    assert report.answered + report.skipped.total == 12
    assert report.answered > 0
    for conversation in read(out):
        assert tokenise(target.tokenizer, conversation, max_length=99).samples[0].loss_tokens > 0


SCRIPT = """
import sys
from nemotron_dspark.data.regenerate import regenerate
regenerate(sys.argv[1], sys.argv[2], base_url=sys.argv[3], concurrency=3)
"""


def test_killed_anywhere_the_finished_file_is_the_same(server, prompts, tmp_path):
    undisturbed, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    regenerate(prompts, undisturbed, base_url=server.url)
    server.delay = 0.05
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(prompts), str(out), server.url])
    while process.poll() is None and (not out.exists() or out.read_bytes().count(b"\n") < 5):
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    server.delay = 0.0
    report = regenerate(prompts, out, base_url=server.url)
    assert 5 <= report.reused < 12
    assert out.read_bytes() == undisturbed.read_bytes()


@pytest.fixture
def nds():
    from nemotron_dspark.cli import data_command

    app = typer.Typer()
    data_command.register(app)
    return lambda *words: CliRunner().invoke(app, ["data", *map(str, words)], catch_exceptions=False)


def test_the_command_prints_one_json_object(server, prompts, tmp_path, nds):
    words = ("regenerate", "--prompts", prompts, "--out", tmp_path / "o.jsonl", "--base-url", server.url)
    result = nds(*words, "--json")
    assert json.loads(result.stdout)["answered"] == 12
    assert "12" in nds(*words).stdout


def test_check_with_a_targets_tokenizer(server, prompts, tmp_path, nds, tiny_llama):
    out = tmp_path / "o.jsonl"
    regenerate(prompts, out, base_url=server.url)
    words = ("check", out, "--target", tiny_llama, "--set", "data.min_loss_tokens=2")
    found = json.loads(nds(*words, "--json").stdout)
    assert found["conversations"] == 12
    assert 0 < found["loss_tokens"] < found["tokens"]
    assert "train the draft" in nds(*words).stdout
