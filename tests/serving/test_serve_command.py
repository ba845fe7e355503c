"""`nds serve` as a process: it starts, answers the `openai` client speculatively, and ends with 0 when told to."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import httpx
import openai
import pytest
import typer
from typer.testing import CliRunner

from nemotron_dspark.chat.format import Message, render_prompt
from nemotron_dspark.cli import serve_command
from nemotron_dspark.config.run import DraftSection
from nemotron_dspark.decoding.decoder import Decoder
from nemotron_dspark.decoding.sampling import Sampling
from nemotron_dspark.drafts.config import build_draft_config
from nemotron_dspark.drafts.dspark import DSparkDraft
from nemotron_dspark.errors import EnvironmentFault, InputError
from nemotron_dspark.serving import listen
from nemotron_dspark.serving.text import Spelling

HELLO = [{"role": "user", "content": "What does a hybrid model keep?"}]
WAIT = 60
KEY = "a-key-of-a-test"


@pytest.fixture(scope="module")
def draft_folder(target, tmp_path_factory):
    """An untrained draft, saved slim: the target lends it embedding and head."""
    section = DraftSection(num_layers=1, block_size=4, taps=[0, 1], markov_rank=8)
    config, _ = build_draft_config(target.spec, section, mask_token_id=5)
    draft = DSparkDraft(config, seed=0)
    folder = tmp_path_factory.mktemp("draft") / "draft"
    draft.save(folder, slim=True)
    return folder


def start(target, draft_folder, port=0):
    code = "from nemotron_dspark.cli import main; main()"
    arguments = ["serve", "-t", str(target.folder), "-d", str(draft_folder), "--port", str(port), "--json"]
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"NDS_API_KEY": KEY},
    )


@pytest.fixture(scope="module")
def processes(target, draft_folder):
    """One that is killed, and the one that takes its port."""
    first = start(target, draft_folder)
    said = json.loads(first.stdout.readline())
    with openai.OpenAI(base_url=said["url"], api_key=KEY, max_retries=0, timeout=WAIT) as client:
        stream = client.completions.create(model=said["model"], prompt="The state", max_tokens=2000, stream=True)
        next(stream)
        first.kill()
        with pytest.raises((openai.APIError, httpx.HTTPError)):  # at once, not after a time limit
            list(stream)
    first.wait()
    second = start(target, draft_folder, port=said["url"].rpartition(":")[2].removesuffix("/v1"))
    yield said, second
    second.kill()
    second.wait()


def test_a_server_that_was_killed_starts_on_its_port_answers_speculatively_and_stops_cleanly(processes, target):
    before, process = processes
    said = json.loads(process.stdout.readline())
    assert said == before
    health = httpx.get(said["url"].removesuffix("/v1") + "/health").json()
    assert health == {"status": "ok", "active": 0, "waiting": 0}
    ids = render_prompt(target.tokenizer, [Message(**message) for message in HELLO])
    plain = Decoder(target).generate(ids, Sampling(max_new_tokens=40))
    expected = Spelling(target.tokenizer).decode(plain.tokens)
    with openai.OpenAI(base_url=said["url"], api_key=KEY, max_retries=0, timeout=WAIT) as client:
        asked = {"model": said["model"], "messages": HELLO, "temperature": 0, "max_tokens": 40}
        answer = client.chat.completions.create(**asked)
        assert answer.choices[0].message.content == expected
        assert answer.usage.speculative["rounds"] <= 39
        assert answer.usage.speculative["accepted_length"] >= 1
        streamed = client.chat.completions.create(**asked, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == expected
    for told in (signal.SIGTERM, signal.SIGINT, signal.SIGINT):  # whoever is impatient gets no traceback either
        process.send_signal(told)
        time.sleep(0.05)
    said, complained = process.communicate(timeout=WAIT)
    assert process.returncode == 0
    assert said == ""  # one JSON object, nothing else
    assert "Traceback" not in complained
    assert KEY not in complained


def invoke(*arguments):
    app = typer.Typer()
    serve_command.register(app)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_a_port_in_use_is_said_before_the_target_is_loaded():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        error = invoke("-t", "/no/such/target", "--port", port).exception
    assert isinstance(error, EnvironmentFault)
    assert (error.exit_code, str(port) in error.what, "--port" in error.do) == (3, True, True)


def test_an_address_of_another_machine_is_refused():
    for host in ("192.0.2.1", "no.such.host.invalid"):
        with pytest.raises(InputError, match="--host"):
            listen.bind(host, 0)


def test_a_missing_draft_and_a_draft_for_another_target_are_said(target, draft_folder, tiny_llama, tmp_path):
    error = invoke("-t", target.folder, "-d", tmp_path, "--port", 0).exception
    assert isinstance(error, InputError)
    error = invoke("-t", tiny_llama, "-d", draft_folder, "--port", 0).exception
    assert isinstance(error, InputError)
    assert "another target" in error.what


def test_other_machines_are_answered_only_with_a_key_or_when_it_is_said(monkeypatch):
    monkeypatch.delenv("NDS_API_KEY", raising=False)
    everywhere = ("-t", "/no/such/target", "--host", "0.0.0.0", "--port", 0)
    refused = invoke(*everywhere)
    assert isinstance(refused.exception, InputError)
    assert "--no-auth" in refused.exception.do
    for given, warned in (["--api-key", KEY], False), (["--no-auth"], True):
        allowed = invoke(*everywhere, *given)
        assert "/no/such/target" in allowed.exception.what  # it went on to the target
        assert ("which need no key" in allowed.stderr) == warned
    monkeypatch.setenv("NDS_API_KEY", KEY)
    assert "/no/such/target" in invoke(*everywhere).exception.what


def test_urls_are_reachable_from_this_machine():
    with listen.bind("0.0.0.0", 0) as bound:
        assert listen.url_of(bound) == f"http://127.0.0.1:{bound.getsockname()[1]}"


def test_a_missing_package_is_said_in_two_sentences():
    code = (
        "import sys; sys.modules['uvicorn'] = None\n"
        "from nemotron_dspark.errors import EnvironmentFault\n"
        "try:\n    import nemotron_dspark.serving.listen\n"
        "except EnvironmentFault as error:\n    print(error)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "uvicorn" in said
    assert "pip install 'nemotron-dspark[serve]'" in said
