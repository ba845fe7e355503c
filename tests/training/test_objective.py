"""Loss and gradients against the formulas written out slot by slot: no mask, no batch, no vocabulary axis."""

import dataclasses
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nemotron_dspark.drafts.config import DraftConfig
from nemotron_dspark.drafts.dspark import DSparkDraft
from nemotron_dspark.errors import InputError
from nemotron_dspark.training import fused, tiling
from nemotron_dspark.training.anchors import draw_anchors
from nemotron_dspark.training.batches import collate
from nemotron_dspark.training.objective import DSparkObjective, LossWeights
from nemotron_dspark.training.tiling import Tiling
from tests.drafts.conftest import block_logits
from tests.training.conftest import VOCABULARY

CASES = [
    pytest.param({"markov_head_type": "vanilla"}, LossWeights(), id="vanilla"),
    pytest.param({"markov_head_type": "gated"}, LossWeights(), id="gated"),
    pytest.param({"markov_head_type": "rnn"}, LossWeights(), id="rnn"),
    pytest.param({"markov_rank": 0, "confidence_head_with_markov": False}, LossWeights(), id="no-head"),
    pytest.param({"confidence_head_with_markov": False}, LossWeights(), id="confidence-without-markov"),
    pytest.param({"enable_confidence_head": False}, LossWeights(confidence=0.0), id="no-confidence-head"),
    pytest.param({}, LossWeights(decay=None), id="no-decay"),
    pytest.param({}, LossWeights(l1=0.0), id="ce-and-confidence"),
    pytest.param({"markov_head_type": "rnn"}, LossWeights(l1=0.0, confidence=0.0), id="ce"),
    pytest.param({"markov_head_type": "gated"}, LossWeights(ce=0.0, confidence=0.0), id="l1"),
    pytest.param({"target_logit_multiplier": 0.25}, LossWeights(), id="target-multiplies-its-logits"),
    pytest.param({"target_logit_softcap": 1.5}, LossWeights(), id="target-caps-its-logits"),
    pytest.param({"draft_vocab_size": 26}, LossWeights(), id="part-of-the-vocabulary"),
    pytest.param(
        {"draft_vocab_size": 26, "target_logit_softcap": 1.5, "markov_head_type": "rnn"},
        LossWeights(),
        id="part-capped",
    ),
]


def norm(x, weight, eps):
    return x / torch.sqrt((x * x).mean() + eps) * weight


def turned(x, position, theta):
    """Rotary embedding of one head's vector, one pair at a time; angles in fp32, as in Qwen3."""
    half = len(x) // 2
    out = [None] * len(x)
    for i in range(half):
        angle = torch.tensor(float(position)) * torch.tensor(1 / theta ** (2 * i / len(x)))
        cosine, sine = angle.cos().double(), angle.sin().double()
        out[i] = x[i] * cosine - x[i + half] * sine
        out[i + half] = x[i + half] * cosine + x[i] * sine
    return torch.stack(out)


def plain_block(draft, sample, anchor):
    """Hidden states [γ, H] of one block, from the definition."""
    config, weight = draft.config, dict(draft.named_parameters())
    eps, size = config.rms_norm_eps, config.head_dim
    context = [
        norm(weight["fc.weight"] @ sample.taps[p], weight["hidden_norm.weight"], eps) for p in range(anchor)
    ]  # strictly before the anchor
    tokens = [int(sample.input_ids[anchor])] + [config.mask_token_id] * (config.block_size - 1)
    states = [weight["embed_tokens.weight"][token] for token in tokens]
    for layer in range(config.num_hidden_layers):
        w = {name: p for name, p in ((n.removeprefix(f"layers.{layer}."), p) for n, p in weight.items())}
        normed = [norm(state, w["input_layernorm.weight"], eps) for state in states]
        sources = [(p, source) for p, source in enumerate(context)]
        sources += [(anchor + k, source) for k, source in enumerate(normed)]
        per_head = []  # keys and values of every source
        for group in range(config.num_key_value_heads):
            rows = slice(group * size, (group + 1) * size)
            keys = [norm(w["self_attn.k_proj.weight"][rows] @ x, w["self_attn.k_norm.weight"], eps) for _, x in sources]
            turned_keys = [turned(key, p, config.rope_theta) for key, (p, _) in zip(keys, sources, strict=True)]
            per_head.append((turned_keys, [w["self_attn.v_proj.weight"][rows] @ x for _, x in sources]))
        new_states = []
        for k, state in enumerate(normed):
            heads = []
            for head in range(config.num_attention_heads):
                keys, values = per_head[head // (config.num_attention_heads // config.num_key_value_heads)]
                rows = slice(head * size, (head + 1) * size)
                query = norm(w["self_attn.q_proj.weight"][rows] @ state, w["self_attn.q_norm.weight"], eps)
                query = turned(query, anchor + k, config.rope_theta)
                shares = torch.softmax(torch.stack([query @ key for key in keys]) / math.sqrt(size), dim=0)
                heads.append(sum(share * value for share, value in zip(shares, values, strict=True)))
            attended = states[k] + w["self_attn.o_proj.weight"] @ torch.cat(heads)
            inner = norm(attended, w["post_attention_layernorm.weight"], eps)
            gate = w["mlp.gate_proj.weight"] @ inner
            gated = gate * torch.sigmoid(gate) * (w["mlp.up_proj.weight"] @ inner)
            new_states.append(attended + w["mlp.down_proj.weight"] @ gated)
        states = new_states
    return [norm(state, weight["norm.weight"], eps) for state in states]


def plain_slot_logits(draft, hidden, previous):
    """Logits of every slot of one block, teacher-forced."""
    config, weight = draft.config, dict(draft.named_parameters())
    rank = config.markov_rank
    recurrent = torch.zeros(rank, dtype=torch.float64)
    for h, token in zip(hidden, previous, strict=True):
        logits = weight["lm_head.weight"] @ h
        if rank:
            embedded = weight["markov_head.markov_w1.weight"][token]
            if config.markov_head_type == "vanilla":
                latent = embedded
            elif config.markov_head_type == "gated":
                g = weight["markov_head.gate_proj.weight"] @ torch.cat((h, embedded))
                latent = torch.sigmoid(g + weight["markov_head.gate_proj.bias"]) * embedded
            else:
                joint = weight["markov_head.joint_proj.weight"] @ torch.cat((recurrent, embedded, h))
                joint = joint + weight["markov_head.joint_proj.bias"]
                gate, candidate, output = joint[:rank], joint[rank : 2 * rank], joint[2 * rank :]
                gate = torch.sigmoid(gate)
                recurrent = gate * recurrent + (1 - gate) * torch.tanh(candidate)
                latent = torch.tanh(output)
            logits = logits + weight["markov_head.markov_w2.weight"] @ latent
        yield logits


def plain_loss(draft, samples, anchors, weights):
    """The loss of one forward, and tau, with loops over samples, blocks and slots."""
    config, weight = draft.config, dict(draft.named_parameters())
    kept = range(config.vocab_size) if draft.vocabulary is None else draft.vocabulary.tolist()
    numerators, denominator = {"ce": 0.0, "l1": 0.0, "confidence": 0.0}, 0.0
    taus, rates = [], {k: [] for k in range(config.block_size)}
    for sample, drawn in zip(samples, anchors, strict=True):
        for anchor in drawn.tolist():
            hidden = plain_block(draft, sample, anchor)
            tokens = [int(sample.input_ids[min(anchor + k, len(sample.input_ids) - 1)]) for k in range(99)]
            survival, tau = 1.0, 1.0
            for k, logits in enumerate(plain_slot_logits(draft, hidden, tokens[: config.block_size])):
                if anchor + k + 1 >= len(sample.input_ids) or not sample.loss_mask[anchor + k + 1]:
                    break  # this slot and all after it do not count
                w = math.exp(-k / weights.decay) if weights.decay else 1.0
                denominator += w
                own = torch.exp(logits) / torch.exp(logits).sum()
                p = [
                    own[kept.index(token)] if token in kept else own.new_zeros(()) for token in range(config.vocab_size)
                ]
                if tokens[k + 1] in kept:
                    numerators["ce"] = numerators["ce"] - w * torch.log(p[tokens[k + 1]])
                if weights.l1 == 0 and weights.confidence == 0:
                    continue
                q = draft.target_head @ sample.last[anchor + k] * config.target_logit_multiplier
                if config.target_logit_softcap is not None:
                    q = torch.tanh(q / config.target_logit_softcap) * config.target_logit_softcap
                q = torch.exp(q)
                l1 = (torch.stack(p) - q / q.sum()).abs().sum()
                numerators["l1"] = numerators["l1"] + w * l1
                rate = 1 - float(l1.detach()) / 2
                rates[k].append(rate)
                survival *= rate
                tau += survival
                if weights.confidence:
                    features = hidden[k]
                    if config.confidence_head_with_markov:
                        features = torch.cat((features, weight["markov_head.markov_w1.weight"][tokens[k]]))
                    logit = weight["confidence_head.proj.weight"][0] @ features + weight["confidence_head.proj.bias"][0]
                    c = torch.sigmoid(logit)
                    bce = -(rate * torch.log(c) + (1 - rate) * torch.log(1 - c))
                    numerators["confidence"] = numerators["confidence"] + w * bce
            taus.append(tau)
    terms = {name: value / (denominator + 1e-6) for name, value in numerators.items()}
    loss = weights.ce * terms["ce"] + weights.l1 * terms["l1"] + weights.confidence * terms["confidence"]
    return loss, terms, sum(taus) / len(taus), [sum(r) / len(r) if r else 0.0 for r in rates.values()]


@pytest.fixture
def case(make_cache):
    """Three samples of different lengths, one with two turns, and their anchors."""
    cache = make_cache(12, seed=4, dtype=torch.float64)
    order = sorted(range(12), key=lambda i: len(cache[i].input_ids))
    samples = [cache[order[0]], next(cache[i] for i in order if len(cache[i].input_ids) % 3 == 0), cache[order[2]]]
    anchors = [draw_anchors(sample.loss_mask, 2, seed=1, epoch=0, sample_id=i) for i, sample in enumerate(samples)]
    anchors[0] = anchors[0][:1]  # so that the batch holds a filler
    return samples, anchors


@pytest.mark.parametrize(("changes", "weights"), CASES)
def test_loss_and_gradients_equal_the_plain_implementation(make_draft, case, changes, weights):
    samples, anchors = case
    draft = make_draft(**changes).double()
    embedding = draft.embed_tokens.weight * 0.3  # distributions that overlap: acceptance far from 0 and from 1
    if draft.config.draft_vocab_size is not None:
        draft.set_vocabulary(torch.arange(1, VOCABULARY, 2))
    draft.set_embeddings(embedding, embedding)
    with torch.no_grad():
        for index, parameter in enumerate(draft.trainable_parameters().values()):
            generator = torch.Generator().manual_seed(index)
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.2)
    batch = collate(samples, anchors, draft.config.block_size, with_last=weights.needs_target)
    assert not batch.block_mask.all()
    expected, terms, tau, rates = plain_loss(draft, samples, anchors, weights)
    expected.backward()
    plain = {name: p.grad for name, p in draft.trainable_parameters().items()}

    for slots_at_once in (1000, 3):
        draft.zero_grad()
        loss = DSparkObjective(draft, weights, Tiling(slots_at_once, 2))(batch)
        loss.value.backward()
        torch.testing.assert_close(loss.value, expected, rtol=1e-9, atol=0)
        assert float(loss.sums.ce / (loss.sums.weight + 1e-6)) == pytest.approx(terms["ce"].item(), rel=1e-9)
        if weights.needs_target:
            assert float(loss.sums.l1 / (loss.sums.weight + 1e-6)) == pytest.approx(terms["l1"].item(), rel=1e-9)
            assert float(loss.sums.tau / loss.sums.blocks) == pytest.approx(tau, rel=1e-9)
            assert 1.05 < tau < 4.9
            assert (loss.sums.accepted / loss.sums.slots.clamp(min=1)).tolist() == pytest.approx(rates, rel=1e-9)
        reached = 0
        for name, parameter in draft.trainable_parameters().items():
            if plain[name] is None:
                assert parameter.grad is None or not parameter.grad.any(), name
                continue
            reached += 1
            torch.testing.assert_close(parameter.grad, plain[name], rtol=1e-7, atol=1e-12, msg=name)
        assert reached >= 14


def unfused_loss(draft, batch, weights):
    """The loss with every distribution whole, [B, A, γ, V], and autograd for all of it."""
    hidden = draft(batch.input_ids, batch.taps, batch.anchors, batch.block_mask)
    at = batch.anchors[..., None] + torch.arange(draft.config.block_size)
    rows = torch.arange(len(at))[:, None, None]
    previous, label = (batch.input_ids[rows, (at + k).clamp(max=batch.input_ids.shape[1] - 1)] for k in (0, 1))
    logits = block_logits(draft, hidden, previous)
    last = batch.last[rows, at.clamp(max=batch.input_ids.shape[1] - 1)]
    q = torch.softmax(draft.finish_target_logits(last @ draft.target_head.mT), dim=-1)
    w = batch.slot_mask * torch.exp(-torch.arange(draft.config.block_size) / weights.decay)
    ce = torch.nn.functional.cross_entropy(logits.flatten(0, 2), label.flatten(), reduction="none").view_as(w)
    l1 = (torch.softmax(logits, dim=-1) - q).abs().sum(-1)
    bce = torch.nn.functional.binary_cross_entropy_with_logits(
        draft.confidence(hidden, previous), (1 - l1 / 2).detach(), reduction="none"
    )
    return (w * (weights.ce * ce + weights.l1 * l1 + weights.confidence * bce)).sum() / (w.sum() + 1e-6)


@pytest.mark.parametrize("head", ["vanilla", "gated", "rnn"])
def test_every_gradient_in_fp32_is_that_of_whole_distributions(make_draft, make_cache, head):
    """With chunks, tiles and shared targets that all cut somewhere."""
    vocabulary, width = 3000, 24
    config = DraftConfig(
        **dict(make_draft().config) | {"vocab_size": vocabulary, "markov_head_type": head, "markov_rank": 16}
    )
    draft = DSparkDraft(config, seed=3)
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn(vocabulary, width, generator=generator) * 0.5
    draft.set_embeddings(embedding, embedding)
    with torch.no_grad():
        for parameter in draft.trainable_parameters().values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    cache = make_cache(8, dtype=torch.float32)
    samples = [cache[index] for index in range(8)]
    anchors = [draw_anchors(sample.loss_mask, 8, seed=1, epoch=0, sample_id=i) for i, sample in enumerate(samples)]
    batch = collate(samples, anchors, draft.config.block_size)
    assert batch.slot_mask.sum() > 150

    DSparkObjective(draft, LossWeights(), Tiling(50, 4, tiles=4))(batch).value.backward()
    found = {name: parameter.grad for name, parameter in draft.trainable_parameters().items()}
    draft.zero_grad()
    unfused_loss(draft, batch, LossWeights()).backward()
    for name, parameter in draft.trainable_parameters().items():
        assert (found[name] - parameter.grad).norm() <= 1e-5 * parameter.grad.norm(), name


@pytest.mark.parametrize("most", [1, 3, 7, 40, 1000])
@pytest.mark.parametrize("places", [[0], [0, 0, 0, 1, 2, 2, 3], sorted(i % 90 for i in range(200)), [*range(50)]])
def test_a_chunk_holds_whole_slots_with_their_positions_and_no_more_rows_than_allowed(places, most):
    for with_targets in (True, False):
        chunks = list(fused._chunks(places, most, with_targets=with_targets))
        assert [slot for slots, _ in chunks for slot in range(slots.start, slots.stop)] == list(range(len(places)))
        for slots, positions in chunks:
            needed = set(places[slots]) if with_targets else set()
            assert set(range(positions.start, positions.stop)) == needed
            rows = slots.stop - slots.start + len(needed)
            assert rows <= max(most, 2 if with_targets else 1)


def test_no_tensor_of_the_loss_is_larger_than_a_chunk_or_a_weight(make_draft, make_cache):
    """Neither forward nor backward ever holds slots x vocabulary."""

    class Sizes(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(result):
                if isinstance(tensor, torch.Tensor) and VOCABULARY in tensor.shape:
                    Sizes.largest = max(Sizes.largest, tensor.numel())
            return result

    cache = make_cache(24)
    draft = make_draft()
    samples = [cache[index] for index in range(24)]
    anchors = [draw_anchors(sample.loss_mask, 8, seed=1, epoch=0, sample_id=i) for i, sample in enumerate(samples)]
    batch = collate(samples, anchors, draft.config.block_size)
    hidden = draft(batch.input_ids, batch.taps.float(), batch.anchors, batch.block_mask).detach().requires_grad_()
    chunk = 16 * VOCABULARY
    slots = int(batch.slot_mask.sum())
    with Sizes():
        DSparkObjective(draft, LossWeights(), Tiling(16, 4)).loss(hidden, batch).value.backward()
    assert 0 < Sizes.largest <= max(chunk, draft.lm_head.weight.numel()) < slots * VOCABULARY / 10


def test_half_precision_loss_and_gradients_are_those_of_fp32_to_its_rounding(make_draft, case):
    samples, anchors = case
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        draft = make_draft(markov_head_type="gated").to(dtype)
        batch = collate(samples, anchors, draft.config.block_size)
        loss = DSparkObjective(draft, LossWeights())(batch)
        loss.value.backward()
        assert loss.value.dtype == torch.float32
        assert draft.markov_head.markov_w2.weight.grad.dtype == dtype
        found[dtype] = loss.value.item(), draft.markov_head.markov_w2.weight.grad.float()
    assert found[torch.bfloat16][0] == pytest.approx(found[torch.float32][0], rel=0.01)
    error = (found[torch.bfloat16][1] - found[torch.float32][1]).norm() / found[torch.float32][1].norm()
    assert error < 0.05


def test_cross_entropy_alone_needs_no_last_hidden_states(make_draft, case):
    samples, anchors = case
    draft = make_draft()
    batch = collate(samples, anchors, draft.config.block_size, with_last=False)
    batch = dataclasses.replace(batch, taps=batch.taps.float())
    loss = DSparkObjective(draft, LossWeights(l1=0.0, confidence=0.0))(batch)
    assert loss.value.isfinite()
    with pytest.raises(InputError, match="no last hidden states"):
        DSparkObjective(draft, LossWeights())(batch)


def test_a_batch_without_a_single_slot_has_loss_zero_and_finite_gradients(make_draft, case):
    samples, _ = case
    draft = make_draft()
    batch = collate(samples, [torch.zeros(0, dtype=torch.long)] * 3, draft.config.block_size)
    loss = DSparkObjective(draft, LossWeights())(batch)
    loss.value.backward()
    assert loss.value.item() == 0.0
    assert all(p.grad is None or p.grad.isfinite().all() for p in draft.trainable_parameters().values())


def test_tilings_change_only_the_order_of_summation(make_draft, case):
    samples, anchors = case
    found = []
    for cut in (Tiling(1000, 1000), Tiling(7, 3), Tiling(2, 1), Tiling(20, 4, tiles=VOCABULARY)):
        draft = make_draft().double()
        batch = collate(samples, anchors, draft.config.block_size)
        loss = DSparkObjective(draft, LossWeights(), cut)(batch)
        loss.value.backward()
        found.append([loss.value.detach(), *(p.grad for p in draft.trainable_parameters().values())])
    for others in found[1:]:
        torch.testing.assert_close(others, found[0], rtol=1e-9, atol=1e-12)


def test_a_chunk_fits_the_memory_of_its_device():
    gpu = Tiling.of(131072, 2, gpu=True, free=80 * 10**9)
    assert gpu.chunk >= 2048
    assert gpu.tiles == 1
    small = Tiling.of(131072, 2, gpu=True, free=10**9)
    assert small.chunk * 131072 * 2 <= 0.25 * 10**9
    cpu = Tiling.of(131072, 4, gpu=False)
    assert cpu.chunk * 131072 * 4 <= 64 * 2**20


def test_only_a_large_head_is_measured(monkeypatch):
    measured = []
    monkeypatch.setattr(tiling, "_fastest", lambda cases, rounds=4: (measured.append(cases), (4096, {}))[1])
    assert tiling.choose_tiling(torch.zeros(5000, 16)).tiles == 1
    assert tiling.choose_precision(5000, 16)[0] == torch.float32
    assert not measured
    assert tiling.choose_tiling(torch.zeros(1).expand(131072, 256)).tiles == 32
    assert len(measured) == 1


@pytest.mark.parametrize(("gain", "dtype"), [(2.0, torch.bfloat16), (1.1, torch.float32)])
def test_bf16_on_a_cpu_is_chosen_for_a_clear_gain_alone(monkeypatch, gain, dtype):
    seconds = {torch.float32: gain, torch.bfloat16: 1.0}
    monkeypatch.setattr(tiling, "_fastest", lambda cases: (torch.bfloat16, seconds))
    chosen, reason = tiling.choose_precision(131072, 128)
    assert chosen == dtype
    assert f"{gain} times" in reason
