"""Every promise about a target, for every family, against transformers' own uncached forward on whole sequences.

With NDS_FAMILY_REPORT set to a file, what was measured is appended there as JSON lines: docs/targets.md's table is made
of it (`python docs/make_families.py`).
"""

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch

from nemotron_dspark.config.run import DraftSection
from nemotron_dspark.decoding.decoder import Decoder
from nemotron_dspark.decoding.sampling import Sampling
from nemotron_dspark.drafts.config import build_draft_config
from nemotron_dspark.drafts.dspark import DSparkDraft
from nemotron_dspark.recipe import tiny
from nemotron_dspark.targets import Checkpoint, Target, spec_from_config
from nemotron_dspark.targets.experts import mixtures
from nemotron_dspark.targets.families import FAMILIES
from nemotron_dspark.targets.proofs import run_proofs
from nemotron_dspark.targets.streamed import StreamedTarget, _pause
from nemotron_dspark.targets.taps import default_taps
from nemotron_dspark.targets.target import Sequences
from nemotron_dspark.targets.weights import read_embedding_and_head
from tests.rows import join_rows
from tests.targets.tiny_families import TINY, VOCAB, whole_model

GAMMA = 7
TOLERANCE = 1e-5  # of the largest logit of the fresh forward
PROMPTS = 10


@pytest.fixture(scope="module", params=list(TINY))
def target(request, tmp_path_factory) -> Target:
    folder = tmp_path_factory.mktemp(request.param)
    model = whole_model(TINY[request.param]())
    return Target.load(str(tiny.save_target(folder, model, tiny.make_tokenizer(tiny._SENTENCES, VOCAB))))


def random_ids(generator: torch.Generator, count: int) -> list[int]:
    return torch.randint(32, VOCAB, (count,), generator=generator).tolist()


def fresh(target: Target, sequence: list[int]) -> torch.Tensor:
    """Logits [S, V] of a whole sequence by the model itself, without any cache."""
    with torch.no_grad():
        return target.model(input_ids=torch.tensor([sequence]), use_cache=False).logits[0]


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def report(target: Target, **values) -> None:
    if path := os.environ.get("NDS_FAMILY_REPORT"):
        with open(path, "a") as file:
            file.write(json.dumps({"model_type": target.spec.model_type, **values}) + "\n")


def test_every_family_module_is_tested():
    assert set(FAMILIES) <= set(TINY)


def test_spec_of_the_config_alone_describes_the_loaded_model(target):
    spec, model = Checkpoint.find(target.folder).read_spec(), target.model
    alone = spec_from_config(model.config, spec.name)  # of a checkpoint of several modalities, the language model's
    assert spec == dataclasses.replace(alone, model_type=spec.model_type, names=spec.names)
    layers = model.get_submodule(spec.names.layers)
    assert len(layers) == spec.num_layers
    assert model.get_submodule(spec.names.embedding) is model.get_input_embeddings()
    assert model.get_submodule(spec.names.head) is model.get_output_embeddings()
    assert tuple(model.get_input_embeddings().weight.shape) == (spec.vocab_size, spec.hidden_size)
    keys = [m for m in layers.modules() if hasattr(m, "k_proj")]
    for attention in [module for module in keys if not hasattr(module, "conv1d")]:  # delta nets have keys, too
        if "gemma4" in spec.model_type and not attention.is_sliding:
            continue  # these have heads of their own
        assert attention.k_proj.out_features == spec.num_key_value_heads * spec.head_dim
        assert attention.q_proj.out_features % (spec.num_attention_heads * spec.head_dim) == 0  # gated ones have two
    assert any(kind.attends for kind in spec.layers) == (spec.num_attention_heads > 0)
    report(target, layout=spec.layout, general=spec.model_type not in FAMILIES)


def test_capture_is_the_layers_raw_outputs_and_the_final_norm(target):
    ids = torch.tensor([random_ids(torch.Generator().manual_seed(1), 90)])
    first = -1 if target.spec.num_attention_heads else 0  # Mambas do not list what enters the first layer
    taps = tuple(range(first, first + target.spec.num_layers))
    with torch.no_grad():
        output = target.model(input_ids=ids, use_cache=False, output_hidden_states=True)
    captured = target.capture(ids, None, taps)
    worst = 0.0
    for tapped, hidden in zip(captured.taps.chunk(len(taps), -1), output.hidden_states[:-1], strict=True):
        worst = max(worst, error(tapped, hidden))
    assert worst < TOLERANCE
    assert error(target.logits(captured.last), output.logits) < TOLERANCE
    report(target, taps_error=worst)


def test_prefill_in_pieces_equals_one_forward(target, monkeypatch):
    from nemotron_dspark.targets import target as target_module

    monkeypatch.setattr(target_module, "PREFILL_BLOCK", 16)
    prompt = random_ids(torch.Generator().manual_seed(2), 75)
    taps = default_taps(target.spec)
    _, seen = target.prefill(prompt, taps)
    assert error(seen.logits[0, -1], fresh(target, prompt)[-1]) < TOLERANCE
    assert error(seen.taps, target.capture(torch.tensor([prompt]), None, taps).taps) < TOLERANCE


def test_rollback_equals_a_fresh_forward_for_every_acceptance_length(target):
    """Rows of one batch keep 0, 1, … γ + 1 tokens of a block, twice, from prompts of two lengths."""
    generator = torch.Generator().manual_seed(3)
    worst, kept = 0.0, list(range(GAMMA + 2))
    for length in (3, 70):
        prompt, first, second = (random_ids(generator, n) for n in (length, GAMMA + 1, GAMMA + 1))
        state, _ = target.prefill(prompt)
        state = state.select([0] * len(kept))
        target.verify(state, torch.tensor([first] * len(kept)))
        target.commit(state, kept)
        target.verify(state, torch.tensor([second] * len(kept)))
        target.commit(state, kept[::-1])
        block = random_ids(generator, GAMMA + 1)
        found = target.verify(state, torch.tensor([block] * len(kept))).logits
        for row, count in enumerate(kept):
            whole = prompt + first[:count] + second[: kept[-1] - count] + block
            worst = max(worst, error(found[row], fresh(target, whole)[-len(block) :]))
    assert worst < TOLERANCE
    report(target, rollback_error=worst)


def test_rows_of_different_lengths_verify_together(target):
    generator = torch.Generator().manual_seed(4)
    prompts = [random_ids(generator, n) for n in (5, 61, 33)]
    states = [target.prefill(prompt)[0] for prompt in prompts]
    state = join_rows(states)
    block = random_ids(generator, GAMMA + 1)
    found = target.verify(state, torch.tensor([block] * 3)).logits
    for row, prompt in enumerate(prompts):
        assert error(found[row], fresh(target, prompt + block)[-len(block) :]) < TOLERANCE


def test_right_padding_changes_nothing(target):
    ids = torch.tensor([random_ids(torch.Generator().manual_seed(5), 80)])
    padded, mask = torch.cat([ids, ids]), torch.ones(2, 80, dtype=torch.bool)
    padded[1, 47:], mask[1, 47:] = 0, False
    both, alone = target.capture(padded, mask, (1,)), target.capture(ids[:, :47], None, (1,))
    assert error(both.last[1:, :47], alone.last) < TOLERANCE
    assert error(both.taps[1:, :47], alone.taps) < TOLERANCE


def test_all_proofs_pass(target):
    assert [proof for proof in run_proofs(target, default_taps(target.spec)) if not proof.passed] == []


def test_embedding_and_head_are_found_in_the_checkpoint(target):
    found = read_embedding_and_head(Path(target.folder), target.spec)
    assert torch.equal(found.embedding, target.model.get_input_embeddings().weight)
    assert torch.equal(found.head, target.head.weight)


def test_greedy_speculative_decoding_is_lossless(target):
    """With a random draft whose head is the target's, against the choices of whole uncached forwards."""
    config, _ = build_draft_config(
        target.spec, DraftSection(num_layers=1, markov_rank=16), mask_token_id=5, num_anchors=8
    )
    draft = DSparkDraft(config, seed=0)
    draft.set_embeddings(target.model.get_input_embeddings().weight, target.head.weight)
    decoder = Decoder(target, draft.eval())
    generator = torch.Generator().manual_seed(6)
    prompts = [random_ids(generator, 4 + 5 * index) for index in range(PROMPTS)]
    sampling = Sampling(max_new_tokens=10)
    found = [decoder.start(prompt, sampling, stop_ids=frozenset()) for prompt in prompts]
    while active := [generation for generation in found if generation.finished is None]:
        decoder.step(active)
    identical = 0
    for prompt, generation in zip(prompts, found, strict=True):
        # If each token is the plain choice after what precedes it, all of them are what plain decoding gives.
        plain = fresh(target, prompt + generation.tokens)[len(prompt) - 1 : -1].argmax(-1)
        identical += len(generation.tokens) == 10 and plain.tolist() == generation.tokens
    report(target, prompts=PROMPTS, identical=identical)
    assert identical == PROMPTS


def test_layers_that_are_streamed_give_the_bits_of_a_whole_forward(target):
    """Batches of several lengths go through the layers together; no layer stays in memory."""
    streamed = StreamedTarget.load(str(target.folder), dtype="float32")
    generator = torch.Generator().manual_seed(6)
    batches = [
        Sequences(torch.randint(32, VOCAB, (rows, length), generator=generator))
        for rows, length in ((1, 90), (3, 40), (2, 133))
    ]
    first = -1 if target.spec.num_attention_heads else 0
    taps = tuple(range(first, target.spec.num_layers - 1))
    for whole, found in zip(target.captures(batches, taps), streamed.captures(batches, taps), strict=True):
        assert torch.equal(found.taps, whole.taps)
        assert torch.equal(found.last, whole.last)
    assert torch.equal(streamed.logits(found.last), target.logits(whole.last))
    layers = streamed.model.get_submodule(target.spec.names.layers)
    if mixtures(streamed.model):  # once more, an expert at a time
        streamed._weights.divide(0, _pause)
        assert len(streamed._weights.parts) > len(layers)
        for whole, found in zip(target.captures(batches, taps), streamed.captures(batches, taps), strict=True):
            assert torch.equal(found.taps, whole.taps)
            assert torch.equal(found.last, whole.last)
    left = [name for name, parameter in layers.named_parameters() if not parameter.is_meta]
    assert all("shared" in name for name in left)  # Zamba2's transformer, which several layers share
