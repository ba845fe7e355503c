"""Capture, verify and commit against a fresh forward of transformers' own model."""

from pathlib import Path

import pytest
import torch

from nemotron_dspark.errors import InputError
from nemotron_dspark.recipe import tiny
from nemotron_dspark.targets import Target
from nemotron_dspark.targets import target as target_module
from tests.rows import join_rows

GAMMA = 7
TOLERANCE = 1e-5


@pytest.fixture(scope="module", params=["nemotron_h", "llama", "qwen3"])
def target(request, tmp_path_factory) -> Target:
    folder = tmp_path_factory.mktemp(request.param)
    extra = {"pattern": "ME*-M*-M"} if request.param == "nemotron_h" else {}
    return Target.load(str(tiny.random_target(folder, request.param, **extra)))


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory) -> Target:
    return Target.load(str(tiny.random_target(tmp_path_factory.mktemp("hybrid"), pattern="ME*-M*-M")))


def fresh_logits(target: Target, sequences: list[list[int]]) -> list[torch.Tensor]:
    """Logits of whole sequences by the model itself, without any cache."""
    longest = max(map(len, sequences))
    ids = torch.zeros(len(sequences), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence)
        mask[row, : len(sequence)] = 1
    with torch.no_grad():
        logits = target.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return [logits[row, : len(sequence)] for row, sequence in enumerate(sequences)]


def random_ids(generator: torch.Generator, count: int) -> list[int]:
    return torch.randint(32, 384, (count,), generator=generator).tolist()


@pytest.mark.slow
def test_rollback_equals_fresh_forward_for_every_acceptance_length(hybrid):
    """200 random blocks; rows of one batch keep 0, 1, … γ + 1 tokens of the same block."""
    generator = torch.Generator().manual_seed(1)
    worst = 0.0
    for _ in range(10):
        found, sequences = [], []
        for _ in range(20):
            prompt = random_ids(generator, int(torch.randint(1, 48, (), generator=generator)))
            block, following = random_ids(generator, GAMMA + 1), random_ids(generator, 3)
            kept = list(range(GAMMA + 2))
            state, _ = hybrid.prefill(prompt)
            state = state.select([0] * len(kept))
            hybrid.verify(state, torch.tensor([block] * len(kept)))
            hybrid.commit(state, kept)
            found += hybrid.verify(state, torch.tensor([following] * len(kept))).logits
            sequences += [prompt + block[:count] + following for count in kept]
        for row, expected in zip(found, fresh_logits(hybrid, sequences), strict=True):
            worst = max(worst, float((row - expected[-len(row) :]).abs().max()))
    assert worst < TOLERANCE


def test_rollback_is_exact_when_all_rows_keep_the_same_prefix(target):
    generator = torch.Generator().manual_seed(2)
    for count in range(GAMMA + 2):
        prompt, block, following = (random_ids(generator, n) for n in (37, GAMMA + 1, 3))
        state, _ = target.prefill(prompt)
        target.verify(state, torch.tensor([block]))
        target.commit(state, [count])
        found = target.verify(state, torch.tensor([following])).logits[0]
        expected = fresh_logits(target, [prompt + block[:count] + following])[0][-3:]
        torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


def test_verifying_twice_without_a_commit_gives_the_same_answer(target):
    """Verification commits nothing: a second block is seen from the same state as the first."""
    generator = torch.Generator().manual_seed(3)
    state, _ = target.prefill(random_ids(generator, 20))
    block, other = random_ids(generator, 8), random_ids(generator, 5)
    first = target.verify(state, torch.tensor([block])).logits
    target.verify(state, torch.tensor([other]))
    again = target.verify(state, torch.tensor([block])).logits
    torch.testing.assert_close(first, again, atol=1e-6, rtol=0)


def test_one_token_at_a_time_equals_the_whole_sequence(target):
    """The one-token form of transformers and its chunked form clamp the step size differently; here both are one."""
    generator = torch.Generator().manual_seed(4)
    ids = random_ids(generator, 60)
    state, verified = target.prefill(ids[:1])
    rows = [verified.logits[0, -1]]
    for token in ids[1:]:
        rows.append(target.verify(state, torch.tensor([[token]])).logits[0, 0])
        target.commit(state, [1])
    torch.testing.assert_close(torch.stack(rows), fresh_logits(target, [ids])[0], atol=TOLERANCE, rtol=0)


def test_prefill_in_pieces_equals_capture(target, monkeypatch):
    monkeypatch.setattr(target_module, "PREFILL_BLOCK", 16)
    generator = torch.Generator().manual_seed(5)
    ids = random_ids(generator, 75)
    captured = target.capture(torch.tensor([ids]), None, (0, 2))
    state, verified = target.prefill(ids, (0, 2))
    assert state.lengths == [75]
    torch.testing.assert_close(verified.taps, captured.taps, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(verified.logits[0, 0], fresh_logits(target, [ids])[0][-1], atol=TOLERANCE, rtol=0)


def test_rows_of_different_lengths_equal_rows_alone(target):
    generator = torch.Generator().manual_seed(6)
    prompts = [random_ids(generator, count) for count in (3, 70, 31)]
    block = [random_ids(generator, 6) for _ in prompts]
    kept = [2, 0, 6]
    state = join_rows([target.prefill(prompt, (1,))[0] for prompt in prompts])
    target.verify(state, torch.tensor(block))
    target.commit(state, kept)
    following = [random_ids(generator, 4) for _ in prompts]
    found = target.verify(state, torch.tensor(following))
    sequences = [p + b[:n] + f for p, b, n, f in zip(prompts, block, kept, following, strict=True)]
    for row, expected in enumerate(fresh_logits(target, sequences)):
        torch.testing.assert_close(found.logits[row], expected[-4:], atol=TOLERANCE, rtol=0)
        taps = target.capture(torch.tensor([sequences[row]]), None, (1,)).taps[0, -4:]
        torch.testing.assert_close(found.taps[row], taps, atol=TOLERANCE, rtol=0)


def test_selected_rows_go_on_as_if_they_were_alone(target):
    generator = torch.Generator().manual_seed(7)
    prompts = [random_ids(generator, count) for count in (9, 21, 14)]
    state = join_rows([target.prefill(prompt)[0] for prompt in prompts])
    state = state.select([2, 0])
    following = [random_ids(generator, 4) for _ in range(2)]
    found = target.verify(state, torch.tensor(following)).logits
    for row, prompt in enumerate((prompts[2], prompts[0])):
        expected = fresh_logits(target, [prompt + following[row]])[0][-4:]
        torch.testing.assert_close(found[row], expected, atol=TOLERANCE, rtol=0)


def test_taps_are_raw_layer_outputs_and_last_is_after_the_final_norm(target):
    ids = torch.randint(32, 384, (2, 64), generator=torch.Generator().manual_seed(8))  # whole chunks: the same bits
    captured = target.capture(ids, None, (-1, 0, 3))
    with torch.no_grad():
        output = target.model(input_ids=ids, use_cache=False, output_hidden_states=True)
    expected = torch.cat([output.hidden_states[tap + 1] for tap in (-1, 0, 3)], dim=-1)
    torch.testing.assert_close(captured.taps, expected, atol=0, rtol=0)
    torch.testing.assert_close(captured.last, output.hidden_states[-1], atol=0, rtol=0)
    torch.testing.assert_close(target.model.lm_head(captured.last), output.logits, atol=1e-6, rtol=0)


def test_padding_changes_nothing(target):
    generator = torch.Generator().manual_seed(9)
    ids = random_ids(generator, 70)
    padded = torch.tensor([ids, ids[:41] + [0] * 29])
    mask = padded.new_ones(padded.shape, dtype=torch.bool)
    mask[1, 41:] = False
    captured = target.capture(padded, mask, (1,))
    alone = target.capture(torch.tensor([ids[:41]]), None, (1,))
    torch.testing.assert_close(captured.last[1, :41], alone.last[0], atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(captured.taps[1, :41], alone.taps[0], atol=TOLERANCE, rtol=0)


def test_commit_refuses_what_no_block_can_keep(hybrid):
    state, _ = hybrid.prefill([40, 41, 42])
    with pytest.raises(ValueError, match="commit"):
        hybrid.commit(state, [1])
    hybrid.verify(state, torch.tensor([[50, 51]]))
    with pytest.raises(ValueError, match="commit"):
        hybrid.commit(state, [3])


def test_stop_ids_come_from_the_generation_config(tmp_path):
    folder = tiny.random_target(tmp_path / "t")
    settings = (folder / "generation_config.json").read_text()
    assert Target.load(str(folder)).stop_ids == {11}
    (folder / "generation_config.json").write_text(settings.replace('"eos_token_id": 11', '"eos_token_id": [2, 11]'))
    assert Target.load(str(folder)).stop_ids == {2, 11}


def _truncate(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])


def _drop_a_tensor(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors.pop("backbone.layers.0.mixer.A_log")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _drop_the_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _spoil_the_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


@pytest.mark.parametrize("damage", [_truncate, _drop_a_tensor, _drop_the_weights, _spoil_the_config])
def test_a_damaged_checkpoint_is_refused_in_two_sentences(tmp_path, damage):
    """A missing tensor above all: transformers itself would go on with random values."""
    folder = tiny.random_target(tmp_path / "t")
    damage(folder)
    with pytest.raises(InputError) as caught:
        Target.load(str(folder))
    assert caught.value.what.endswith(".")
    assert caught.value.do.endswith(".")


@pytest.mark.parametrize("upper", [float("inf"), 1e308], ids=["Infinity", "1e308"])
def test_an_open_step_size_limit_may_be_spelt_as_the_largest_double(tmp_path, upper):
    """Ultra's config writes the infinity of the others as 1e308, which does not fit into fp32."""
    target = Target.load(str(tiny.random_target(tmp_path, pattern="M*M", time_step_limit=[0.0, upper])))
    ids = random_ids(torch.Generator().manual_seed(3), 40)
    state, _ = target.prefill(ids[:-1])
    assert torch.isfinite(target.capture(torch.tensor([ids]), None, (0,)).last).all()
    assert (
        target.verify(state, torch.tensor([ids[-1:]])).logits - fresh_logits(target, [ids])[0][-1]
    ).abs().max() < 1e-4
