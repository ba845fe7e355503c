"""vLLM reads our drafts: its config, its loading, its model's numbers. NDS_VLLM_PYTHON is its interpreter."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.engines import free_port, running
from nemotron_dspark import Decoder, Sampling, Target, build_cache, load_config, regenerate
from nemotron_dspark.cache.reader import TargetCache
from nemotron_dspark.chat.format import Message, render_prompt
from nemotron_dspark.drafts.dspark import DSparkDraft
from nemotron_dspark.engines.clients import connect
from nemotron_dspark.engines.commands import hidden_states_command
from nemotron_dspark.engines.measure import evaluate_engine
from nemotron_dspark.recipe import tiny
from nemotron_dspark.targets import Checkpoint
from tests.engines.pairs import write_random_draft

PYTHON = os.environ.get("NDS_VLLM_PYTHON", "")
pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not PYTHON, reason="NDS_VLLM_PYTHON is not set; make test-engines sets it"),
]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"What is a state? {at}"}) + "\n" for at in range(4)))
    return path


@pytest.fixture(scope="module", params=["hybrid", "llama"])
def pair(request, tiny_hybrid, tiny_llama, tmp_path_factory):
    """Target folder, draft folder and draft."""
    target = {"hybrid": tiny_hybrid, "llama": tiny_llama}[request.param]
    folder = write_random_draft(tmp_path_factory.mktemp("draft") / "draft", target)
    return target, folder, DSparkDraft.load(folder)


def vllm(target: Path, draft: Path, states: Path, out: Path) -> dict:
    script = Path(__file__).with_name("vllm_draft.py")
    done = subprocess.run(
        [PYTHON, str(script), str(target), str(draft), str(states), str(out)],
        capture_output=True,
        text=True,
        timeout=600,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@torch.no_grad()
def test_vllms_draft_model_computes_what_ours_does(pair, tmp_path):
    target, folder, draft = pair
    length, block = 11, draft.config.block_size
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(32, draft.config.vocab_size, (1, length + 1), generator=generator)
    taps = torch.randn(1, length + 1, draft.config.num_taps * draft.config.hidden_size, generator=generator)
    ids = torch.full((block,), draft.config.mask_token_id)
    ids[0] = tokens[0, length]
    states = {"ids": ids, "taps": taps[0, :length].contiguous(), "position": torch.tensor(length)}
    save_file(states, tmp_path / "states.safetensors")

    said = vllm(target, folder, tmp_path / "states.safetensors", tmp_path / "out.safetensors")

    assert said["method"] == "dspark"
    assert said["architectures"] == ["Qwen3DSparkModel"]
    assert said["layers"] == [tap + 1 for tap in draft.config.target_layer_ids]
    assert "does not support: dspark" in said["refused"] or "requires Triton" in said["refused"]
    theirs = load_file(tmp_path / "out.safetensors")
    hidden = draft(tokens, taps, torch.tensor([[length]]), torch.tensor([[True]]))[0, 0]
    base = draft.base_logits(hidden)
    torch.testing.assert_close(theirs["base"], base, atol=2e-4, rtol=2e-4)
    previous = ids[:1]
    for slot in range(block):
        embedded = draft.markov_head.embed(previous, hidden.dtype)
        confidence = draft.confidence(hidden[slot : slot + 1], previous)[0].sigmoid()
        torch.testing.assert_close(theirs["confidences"][slot], confidence, atol=1e-4, rtol=1e-4)
        logits = base[slot] + (embedded @ draft.markov_head.markov_w2.weight.T)[0]
        torch.testing.assert_close(theirs["logits"][slot], logits, atol=2e-4, rtol=2e-4)
        previous = logits.argmax()[None]


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    """A small ordinary decoder with heads of 64, as vLLM wants them on a CPU."""
    return tiny.random_target(tmp_path_factory.mktemp("llama") / "target", family="llama", hidden_size=256)


@pytest.fixture(scope="module")
def server(decoder, tmp_path_factory):
    """The address of a vLLM that serves the decoder and drafts from its own text: no draft model runs on a CPU."""
    port = free_port()
    speculative = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    options = ["--model", str(decoder), "--dtype", "float32", "--enforce-eager", "--max-model-len", "512"]
    options += ["--max-num-seqs", "4", "--host", "127.0.0.1", "--port", str(port)]
    argv = [
        PYTHON,
        "-m",
        "vllm.entrypoints.openai.api_server",
        *options,
        "--speculative-config",
        json.dumps(speculative),
    ]
    environment = {"VLLM_TARGET_DEVICE": "cpu", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    with running(argv, port, tmp_path_factory.mktemp("vllm") / "server.log", environment) as url:
        yield url


def test_accepted_length_comes_from_vllms_counters(server, decoder, prompts):
    config = load_config(str(decoder), eval={"max_new_tokens": 48, "temperatures": [0.0]})
    found = evaluate_engine(config, server, prompts, plain_url=server)
    (measured,) = found.measurements
    assert found.engine == "vLLM"
    assert measured.rounds > 0
    assert measured.tokens == 4 * 48
    assert len(measured.per_position) == 3
    assert measured.accepted_length == pytest.approx(1 + sum(measured.per_position))
    assert measured.accepted_length > 1.05  # a model with random weights repeats itself
    assert found.plain is not None
    assert found.plain.identical == 4


def test_vllm_and_our_decoder_say_the_same(server, decoder, prompts):
    """Greedily and in fp32, from prompts that vLLM renders itself."""
    engine = connect(server)
    target = Target.of(load_config({"name": str(decoder), "dtype": "float32"}).target)
    ids = engine.render([{"role": "user", "content": "What is a state?"}])
    assert ids == render_prompt(target.tokenizer, [Message("user", "What is a state?")])
    ours = Decoder(target).generate(ids, Sampling(temperature=0.0, max_new_tokens=32))
    assert list(engine.answer(ids, max_tokens=32, temperature=0.0, seed=0).tokens) == ours.tokens


def test_answers_are_regenerated_with_their_token_ids(server, decoder, prompts, tmp_path):
    report = regenerate(prompts, tmp_path / "out.jsonl", base_url=f"{server}/v1", max_tokens=24, temperature=0.0)
    assert report.answered == 4
    engine = connect(server)
    tokenizer = Target.of(load_config({"name": str(decoder), "dtype": "float32"}).target).tokenizer
    for line in (tmp_path / "out.jsonl").read_text().splitlines():
        asked, said = json.loads(line)["conversations"]
        ids = render_prompt(tokenizer, [Message("user", asked["content"])])
        assert said["prompt_token_ids"] == ids
        assert said["token_ids"] == list(engine.answer(ids, max_tokens=24, temperature=0.0, seed=0).tokens)


def test_a_cache_of_its_hidden_states_is_that_of_our_own_capture(decoder, tmp_path):
    """`nds engine vllm --hidden-states --machine cpu` starts it, with a connector that needs no CUDA."""
    config = load_config(
        {"name": str(decoder), "dtype": "float32"}, draft={"taps": [0, 1]}, data={"min_loss_tokens": 4}
    )
    rows = [
        [{"role": "user", "content": f"What is state {at}?"}, {"role": "assistant", "content": "It is kept. " * at}]
        for at in range(2, 8)
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"conversations": row}) + "\n" for row in rows))
    (tmp_path / "states").mkdir()
    port, checkpoint = free_port(), Checkpoint.find(decoder)
    options = {"dtype": "float32", "max_length": 511, "machine": "cpu", "port": port}
    command = hidden_states_command(checkpoint, (0, 1), tmp_path / "states", **options)
    argv = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", *command.argv[2:], "--enforce-eager"]
    home = str(Path(__file__).parents[2])  # where vLLM finds the connector
    environment = {
        "VLLM_TARGET_DEVICE": "cpu",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": home,
    }
    with running(argv, port, tmp_path / "server.log", environment) as url:
        build_cache(config, data, tmp_path / "theirs", engines=[url])
    build_cache(config, data, tmp_path / "own")
    theirs, own = TargetCache(tmp_path / "theirs"), TargetCache(tmp_path / "own")
    assert len(theirs) == len(own) == 6
    for its, ours in zip(theirs, own, strict=True):
        assert torch.equal(its.input_ids, ours.input_ids)
        for one, other in ((its.taps, ours.taps), (its.last, ours.last)):
            torch.testing.assert_close(one.float(), other.float(), rtol=1e-2, atol=1e-2)  # a rounding of bf16
