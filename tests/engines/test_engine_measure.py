"""`nds eval --engine`: accepted length from each engine's own counters, and plain answers beside them."""

import json

import pytest
from typer.testing import CliRunner

from nemotron_dspark.cli import app
from nemotron_dspark.config import load_config
from nemotron_dspark.engines.measure import evaluate_engine
from nemotron_dspark.errors import EnvironmentFault, InputError
from tests.engines.fakes import DRAFTED, KEPT, Fake, serving

OWNERS = ("vllm", "sglang", "llamacpp")
SMALL = {"max_new_tokens": 13, "temperatures": [0.0, 1.0]}


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"What is a state? {at}"}) + "\n" for at in range(4)))
    return path


def config(target=None, **sections):
    return load_config(str(target) if target else None, eval=SMALL, **sections)


@pytest.mark.parametrize("owner", OWNERS)
def test_the_accepted_length_is_that_of_our_requests_alone(owner, prompts, tiny_hybrid):
    with serving(Fake(owner)) as url:
        found = evaluate_engine(config(tiny_hybrid), url, prompts)
    assert [each.temperature for each in found.measurements] == [0.0, 1.0]
    for each in found.measurements:
        assert each.accepted_length == pytest.approx(1 + KEPT)
        assert each.rounds == 4 * 4
        assert each.tokens == 4 * SMALL["max_new_tokens"]
        assert each.tokens_per_second > 0
        assert each.standard_error == (None if owner == "vllm" else 0.0)
    if owner == "vllm":
        assert found.measurements[0].per_position == (1.0, 1.0, 0.0)[:DRAFTED]


@pytest.mark.parametrize("owner", OWNERS)
def test_prompts_reach_the_engine_as_the_targets_token_ids(owner, prompts, tiny_hybrid):
    from nemotron_dspark.chat.format import Message, render_prompt
    from nemotron_dspark.targets import Checkpoint

    fake = Fake(owner)
    with serving(fake) as url:
        evaluate_engine(config(tiny_hybrid), f"{url}/v1", prompts, limit=1)
    body = fake.requests[-1][1]
    tokenizer = Checkpoint.find(tiny_hybrid).load_tokenizer()
    assert body.get("prompt", body.get("input_ids")) == render_prompt(
        tokenizer, [Message("user", "What is a state? 0")]
    )


@pytest.mark.parametrize("owner", ["vllm", "llamacpp"])
def test_without_a_target_the_engine_renders_the_prompts(owner, prompts):
    fake = Fake(owner)
    with serving(fake) as url:
        evaluate_engine(config(), url, prompts, limit=2)
    assert fake.requests[-1][1]["prompt"] == [1, 2, 3]


def test_sglang_needs_the_target_for_that(prompts):
    with serving(Fake("sglang")) as url, pytest.raises(InputError, match="does not tell how it renders") as raised:
        evaluate_engine(config(), url, prompts)
    assert "--target" in raised.value.do


def test_answers_are_compared_with_a_plain_engines(prompts, tiny_hybrid):
    with serving(Fake("vllm")) as url, serving(Fake("llamacpp", drafts=False)) as plain:
        found = evaluate_engine(config(tiny_hybrid), url, prompts, plain_url=plain).plain
    assert (found.identical, found.prompts, found.first_difference) == (4, 4, None)
    assert found.engine == "llama.cpp"


def test_a_different_answer_is_found(prompts, tiny_hybrid):
    with serving(Fake("vllm")) as url, serving(Fake("vllm", drafts=False, changed_token=6)) as plain:
        found = evaluate_engine(config(tiny_hybrid), url, prompts, plain_url=plain).plain
    assert found.identical == 0
    assert found.first_difference == "prompt 0, token 6"


@pytest.mark.parametrize("owner", OWNERS)
def test_an_engine_without_a_draft_is_said(owner, prompts, tiny_hybrid):
    with serving(Fake(owner, drafts=False)) as url, pytest.raises(InputError, match="counted no draft"):
        evaluate_engine(config(tiny_hybrid), url, prompts)


def test_another_server_is_refused(prompts, tiny_hybrid):
    with (
        serving(Fake("somebody")) as url,
        pytest.raises(InputError, match=r"is no vLLM, .* or nds serve"),
    ):
        evaluate_engine(config(tiny_hybrid), url, prompts)


def test_a_server_that_is_not_there_is_said(prompts, tiny_hybrid):
    with serving(Fake("vllm")) as url:
        pass
    with pytest.raises(EnvironmentFault, match="does not answer"):
        evaluate_engine(config(tiny_hybrid), url, prompts)


def test_a_word_is_no_address(prompts, tiny_hybrid):
    with pytest.raises(InputError, match="is not the address"):
        evaluate_engine(config(tiny_hybrid), "vllm", prompts)


# --- the command line ---


def invoke(*arguments):
    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


def test_the_command_prints_and_writes_what_was_measured(prompts, tiny_hybrid, tmp_path):
    small = ("--set", "eval.max_new_tokens=13", "--set", "eval.temperatures=[0]")
    with serving(Fake("vllm")) as url, serving(Fake("vllm", drafts=False)) as plain:
        engines = ("--engine", url, "--plain-engine", plain)
        said = invoke("-t", tiny_hybrid, "-p", prompts, *engines, *small, "--out", tmp_path / "out")
        written = json.loads((tmp_path / "out" / "eval.json").read_text())
        as_json = json.loads(invoke("-t", tiny_hybrid, "-p", prompts, *engines, *small, "--json").stdout)
    assert "3.00" in said.stdout
    assert "4 of 4" in said.stdout
    assert written["measurements"][0]["accepted_length"] == as_json["measurements"][0]["accepted_length"] == 3.0


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ((), "There is no trained draft"),
        (("--draft", "d", "--plain-engine", "http://127.0.0.1:1"), "without --engine"),
        (("--draft", "d", "--engine", "http://127.0.0.1:1"), "Both --draft and --engine"),
        (("--schedule", "cost", "--engine", "http://127.0.0.1:1"), "Both --schedule and"),
        (("--confidence-threshold", "0.3", "--engine", "http://127.0.0.1:1"), "Both --schedule and"),
    ],
)
def test_options_that_do_not_fit_are_said(given, what, prompts, tiny_hybrid):
    error = invoke("-t", tiny_hybrid, "-p", prompts, *given).exception
    assert isinstance(error, InputError)
    assert what in error.what
