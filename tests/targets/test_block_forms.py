"""The block form of each recurrent layer against the plain recurrence, one token after the other, in float64."""

import pytest
import torch
from torch import Tensor

from nemotron_dspark.targets import delta, mamba1, shortconv
from nemotron_dspark.targets.kv import RaggedKV, take_out
from nemotron_dspark.targets.recurrent import advance_window, convolve

ROWS, HEADS = 3, 4


@pytest.fixture
def normal():
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator)


def delta_loop(queries, keys, values, beta, gates, state) -> tuple[Tensor, Tensor]:
    """Outputs [B, m, heads, value], and the states [B, heads, key, value] after 0, 1, … m tokens."""
    queries, keys, values, beta, gates, state = (part.double() for part in (queries, keys, values, beta, gates, state))
    outputs, states = [], [state]
    for at in range(keys.shape[1]):
        state = state * gates[:, at].exp()[..., None, None]
        seen = torch.einsum("bhkv,bhk->bhv", state, keys[:, at])
        update = beta[:, at][..., None] * (values[:, at] - seen)
        state = state + keys[:, at][..., None] * update[..., None, :]
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, queries[:, at]))
        states.append(state)
    return torch.stack(outputs, 1), torch.stack(states)


def delta_inputs(normal, block: int, gate_scale: float) -> tuple[Tensor, ...]:
    queries, keys = (torch.nn.functional.normalize(normal(ROWS, block, HEADS, 12), dim=-1) for _ in range(2))
    values, state = normal(ROWS, block, HEADS, 20), normal(ROWS, HEADS, 12, 20)
    beta = normal(ROWS, block, HEADS).sigmoid()
    return queries, keys, values, beta, -gate_scale * normal(ROWS, block, HEADS).exp(), state


@pytest.mark.parametrize(("block", "gate_scale"), [(1, 0.1), (8, 0.1), (8, 5.0), (256, 0.01), (256, 20.0)])
def test_a_block_of_the_delta_rule_equals_one_token_after_the_other(normal, block, gate_scale):
    queries, keys, values, beta, gates, state = delta_inputs(normal, block, gate_scale)
    before = state.clone()
    found, _ = delta.delta_block(queries, keys, values, beta, gates.double().cumsum(1), state)
    expected, _ = delta_loop(queries, keys, values, beta, gates, state)
    assert torch.equal(state, before)
    torch.testing.assert_close(found.double(), expected, atol=5e-6, rtol=0)


def test_a_block_of_the_delta_rule_equals_the_chunks_of_transformers(normal):
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    queries, keys, values, beta, gates, state = delta_inputs(normal, 100, 0.1)
    found, _ = delta.delta_block(queries * 12**-0.5, keys, values, beta, gates.double().cumsum(1), state)
    expected, _ = torch_chunk_gated_delta_rule(queries, keys, values, gates, beta, 16, initial_state=state)
    torch.testing.assert_close(found, expected, atol=5e-6, rtol=0)


@pytest.mark.parametrize("kept", [[0, 3, 8], [5, 5, 5], [0, 0, 0], [8, 8, 8]])
def test_committing_the_delta_rule_leaves_the_state_after_the_kept_tokens(normal, kept):
    layers, (block, channels) = (1, 4), (8, 5)
    window, inputs = normal(2, ROWS, 3, channels), normal(2, ROWS, block, channels)
    states = delta.DeltaStates(layers, window, normal(2, ROWS, HEADS, 12, 20))
    expected = []
    for index, layer in enumerate(layers):
        queries, keys, values, beta, gates, _ = delta_inputs(normal, block, 0.5)
        decay, state = gates.double().cumsum(1), states.delta[index].clone()
        _, updates = delta.delta_block(queries, keys, values, beta, decay, state)
        states.record(layer, delta._BlockRecord(inputs[index], keys, updates, decay))
        after = delta_loop(queries, keys, values, beta, gates, state)[1]
        expected.append(torch.stack([after[count, row] for row, count in enumerate(kept)]))
    states.commit(kept)
    torch.testing.assert_close(states.delta.double(), torch.stack(expected), atol=5e-6, rtol=0)
    for row, count in enumerate(kept):
        history = torch.cat([window[:, row], inputs[:, row, :count]], dim=1)
        assert torch.equal(states.conv[:, row], history[:, -3:])


def mamba1_loop(x, dt, a, b, c, state) -> tuple[Tensor, Tensor]:
    """C_t·h_t [B, m, channels], and the states [B, channels, state] after 0, 1, … m tokens."""
    x, dt, a, b, c, state = (part.double() for part in (x, dt, a, b, c, state))
    outputs, states = [], [state]
    for at in range(dt.shape[1]):
        grown = (dt[:, at] * x[:, at])[..., None] * b[:, at, None]
        state = (dt[:, at, :, None] * a).exp() * state + grown
        outputs.append((state * c[:, at, None]).sum(-1))
        states.append(state)
    return torch.stack(outputs, 1), torch.stack(states)


def mamba1_inputs(normal, block: int) -> tuple[Tensor, ...]:
    x, dt = normal(ROWS, block, 10), torch.nn.functional.softplus(normal(ROWS, block, 10) - 2)
    return x, dt, -normal(10, 6).exp(), normal(ROWS, block, 6), normal(ROWS, block, 6)


@pytest.mark.parametrize("block", [1, 8, 16, 17, 75, 256])
def test_a_block_of_mamba1_equals_one_token_after_the_other(normal, block):
    inputs, state = mamba1_inputs(normal, block), normal(ROWS, 10, 6)
    before = state.clone()
    found, behind = mamba1.scan_block(*inputs, state)
    expected, states = mamba1_loop(*inputs, state)
    assert torch.equal(state, before)
    torch.testing.assert_close(found.double(), expected, atol=5e-6, rtol=0)
    torch.testing.assert_close(behind.double(), states[-1], atol=5e-6, rtol=0)


@pytest.mark.parametrize("kept", [[0, 3, 8], [5, 5, 5], [0, 0, 0], [8, 8, 8]])
def test_committing_mamba1_leaves_the_state_after_the_kept_tokens(normal, kept):
    layers, block = (0, 3), 8
    window, conv_inputs = normal(2, ROWS, 3, 10), normal(2, ROWS, block, 10)
    states = mamba1.Mamba1States(layers, window, normal(2, ROWS, 10, 6))
    expected = []
    for index, layer in enumerate(layers):
        x, dt, a, b, c = mamba1_inputs(normal, block)
        _, behind = mamba1.scan_block(x, dt, a, b, c, states.ssm[index])
        states.record(layer, mamba1._BlockRecord(conv_inputs[index], x, b, dt, a[None], behind))
        after = mamba1_loop(x, dt, a, b, c, states.ssm[index])[1]
        expected.append(torch.stack([after[count, row] for row, count in enumerate(kept)]))
    states.commit(kept)
    torch.testing.assert_close(states.ssm.double(), torch.stack(expected), atol=5e-6, rtol=0)
    assert torch.equal(states.conv, advance_window(window, conv_inputs, kept))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("block", [1, 2, 8, 30])
def test_a_convolved_block_equals_the_convolution_of_the_whole_sequence(normal, block, bias):
    convolution = torch.nn.Conv1d(5, 5, 4, groups=5, padding=3, bias=bias).requires_grad_(False)
    sequence = normal(ROWS, 11 + block, 5)
    found = convolve(sequence[:, 8:11], sequence[:, 11:], convolution)
    expected = convolution(sequence.mT)[..., : 11 + block].mT[:, 11:]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("block", [1, 8])
def test_a_window_advances_by_each_rows_own_prefix(normal, block):
    window, inputs = normal(2, ROWS, 3, 5), normal(2, ROWS, block, 5)
    for kept in ([0, 1, block], [block] * ROWS, [0] * ROWS):
        found = advance_window(window, inputs, kept)
        for row, count in enumerate(kept):
            assert torch.equal(found[:, row], torch.cat([window[:, row], inputs[:, row, :count]], 1)[:, -3:])


def test_recurrent_rows_join_and_leave_without_sharing_memory(normal):
    """Ten rows come and go, so that the buffer grows and shrinks; each keeps its own states."""
    states = shortconv.ConvStates((2, 5), normal(2, ROWS, 3, 5))
    expected = list(states.conv.clone().unbind(1))
    for _ in range(4):
        joining = shortconv.ConvStates((2, 5), normal(2, 2, 3, 5))
        expected += joining.conv.clone().unbind(1)
        states.join(joining)
        joining.conv.zero_()
    picked = states.select([10, 0])
    assert torch.equal(picked.conv, torch.stack([expected[10], expected[0]], 1))
    picked.conv.zero_()
    for row in (10, 0, 3, 3, 6, 0, 1, 0, 1):
        states.leave(row)
        take_out(expected, row)
        assert torch.equal(states.tensors()[0], torch.stack(expected, 1))
        assert states.of(5)[0].shape == (len(expected), 3, 5)
    assert states.conv.shape[1] <= 4 * len(expected)


def test_rows_of_keys_join_and_leave_whatever_their_lengths(normal):
    """Against a list of tensors: rows of 1 to 900 positions come, go and grow, and memory follows them down."""
    generator = torch.Generator().manual_seed(1)
    kv, lengths, expected = RaggedKV(0), [], []

    def draw(count: int) -> int:
        return int(torch.randint(count, (1,), generator=generator))

    for turn in range(120):
        if len(expected) < 2 or draw(5) < 2:
            length = 1 + draw(30) if turn % 10 else 900
            new = normal(1, 2, length, 4)
            joining = RaggedKV()
            joining.write(new, -new, [0])
            kv.join(joining, length)
            lengths.append(length)
            expected.append(new[0])
        elif draw(2):
            row = draw(len(expected))
            take_out(lengths, row)
            take_out(expected, row)
            kv.leave(row, max(lengths))
        block = normal(len(expected), 2, 3, 4)
        keys, values = kv.write(block, -block, lengths)
        for row, length in enumerate(lengths):
            assert torch.equal(keys[row, :, :length], expected[row])
            assert torch.equal(keys[row, :, length : length + 3], block[row])
        assert torch.equal(values, -keys)
        kept = [draw(4) for _ in lengths]
        expected = [torch.cat([old, new[:, :count]], 1) for old, new, count in zip(expected, block, kept, strict=True)]
        lengths = [length + count for length, count in zip(lengths, kept, strict=True)]
    while len(expected) > 1:
        row = max(range(len(lengths)), key=lengths.__getitem__)
        take_out(lengths, row)
        take_out(expected, row)
        kv.leave(row, max(lengths))
    rows, _, positions, _ = kv._stored[0].shape
    assert rows <= 4
    assert positions <= 4 * max(64, lengths[0])
