"""DeepSpec's own `Qwen3DSparkModel` and our draft: same folder, same numbers, for every head and with terms off."""

import pytest
import torch
from safetensors.torch import save_file

from nemotron_dspark.config import TrainConfig
from nemotron_dspark.drafts.dspark import DSparkDraft
from nemotron_dspark.engines.draft_formats import FORMATS, Verifier
from nemotron_dspark.engines.exchange import import_draft
from nemotron_dspark.files import write_json
from nemotron_dspark.training.anchors import draw_anchors
from nemotron_dspark.training.batches import collate
from nemotron_dspark.training.objective import DSparkObjective, LossWeights
from tests.drafts.conftest import block_logits, small_config

LENGTH = 40
HEADS = {
    "vanilla": {},
    "gated": {"markov_head_type": "gated"},
    "rnn": {"markov_head_type": "rnn"},
    "none": {"markov_rank": 0, "confidence_head_with_markov": False},
    "hidden-only confidence": {"confidence_head_with_markov": False},
    "no confidence": {"enable_confidence_head": False},
}
TERMS = {
    "all": {},
    "no L1": {"l1_alpha": 0.0},
    "no CE": {"ce_alpha": 0.0},
    "no confidence": {"confidence_alpha": 0.0},
    "CE alone": {"l1_alpha": 0.0, "confidence_alpha": 0.0},
    "no decay": {"loss_decay_gamma": None},
}


def make_draft(**changes):
    """Heads x head_dim (96) is not the hidden size (64); weights so large that every part shows in the output."""
    draft = DSparkDraft(small_config(num_anchors=6, **changes))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in draft.trainable_parameters().values():
            if parameter.dim() > 1:
                parameter.mul_(2)
            else:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    matrices = torch.randn(2, 97, 64, generator=generator) * 0.3
    draft.set_embeddings(*matrices)
    return draft


def make_batch(config):
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(LENGTH) > 9
    mask[25] = False
    sample = type("Sample", (), {})()
    sample.input_ids = torch.randint(0, config.vocab_size, (LENGTH,), generator=generator)
    sample.loss_mask = mask
    sample.taps = torch.randn(LENGTH, config.num_taps * config.hidden_size, generator=generator)
    sample.last = torch.randn(LENGTH, config.hidden_size, generator=generator)
    anchors = draw_anchors(mask, config.num_anchors, seed=0, epoch=0, sample_id=0)
    return collate([sample], [anchors], config.block_size), mask


def read_by_deepspec(folder, modeling):
    return modeling.Qwen3DSparkModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")


CASES = [("vanilla", terms) for terms in TERMS] + [(head, "all") for head in HEADS if head != "vanilla"]
CASES += [(head, "CE alone") for head in ("gated", "rnn", "none")] + [("no confidence", "no L1")]


@pytest.mark.parametrize(("head", "terms"), CASES, ids=lambda value: value.replace(" ", "-"))
def test_loss_gradients_and_metrics_are_deepspecs(deepspec_on_cpu, tmp_path, monkeypatch, head, terms):
    from deepspec.modeling.dspark.loss import compute_dspark_loss
    from deepspec.utils import metrics

    draft = make_draft(**HEADS[head])
    draft.save(tmp_path)
    theirs = read_by_deepspec(tmp_path, deepspec_on_cpu.dspark)
    theirs.set_embedding_head_trainable(False)
    batch, mask = make_batch(draft.config)
    monkeypatch.setattr(
        deepspec_on_cpu.dspark, "sample_anchor_positions", lambda **_: (batch.anchors, batch.block_mask)
    )
    train = TrainConfig(**TERMS[terms])
    weights = LossWeights.of(train, draft)
    needs_target = weights.needs_target or draft.config.enable_confidence_head  # DeepSpec's head is never without

    metrics.reset()
    outputs = theirs(
        input_ids=batch.input_ids,
        target_hidden_states=batch.taps,
        loss_mask=mask[None].float(),
        target_last_hidden_states=batch.last if needs_target else None,
    )
    expected = compute_dspark_loss(
        outputs=outputs,
        loss_decay_gamma=train.loss_decay_gamma,
        ce_loss_alpha=train.ce_alpha,
        l1_loss_alpha=train.l1_alpha,
        confidence_head_alpha=train.confidence_alpha,
    )
    expected.backward()
    reported = metrics.flush()

    loss = DSparkObjective(draft, weights)(batch)
    loss.value.backward()
    assert torch.equal(outputs.eval_mask, batch.slot_mask)
    torch.testing.assert_close(loss.value, expected, rtol=1e-6, atol=1e-6)
    for name, parameter in theirs.named_parameters():
        if not parameter.requires_grad:
            continue
        mine = draft.get_parameter(name).grad
        wanted = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        mine = mine if mine is not None else torch.zeros_like(wanted)
        torch.testing.assert_close(mine, wanted, rtol=0, atol=1e-6 * max(1.0, float(wanted.abs().max())), msg=name)

    found = {"loss": loss.value.detach(), "ce_loss": loss.sums.ce / loss.sums.weight}
    if weights.l1:
        found["l1_loss"] = loss.sums.l1 / loss.sums.weight
    if weights.confidence:
        found["confidence_loss"] = loss.sums.confidence / loss.sums.weight
    if weights.needs_target:
        found["tau_probabilistic"] = loss.sums.tau / loss.sums.blocks
        found |= {
            f"accept_rate@{k}": loss.sums.accepted[k] / loss.sums.slots[k] for k in range(draft.config.block_size)
        }
    for name, value in found.items():
        assert float(value) == pytest.approx(reported[f"train/{name}"], rel=1e-6, abs=1e-6), name


@pytest.mark.parametrize("head", HEADS)
def test_folders_are_read_in_both_directions_with_equal_logits(deepspec_on_cpu, tmp_path, monkeypatch, head):
    draft = make_draft(**HEADS[head])
    draft.save(tmp_path / "ours")
    theirs = read_by_deepspec(tmp_path / "ours", deepspec_on_cpu.dspark)
    theirs.save_pretrained(tmp_path / "theirs")
    again = DSparkDraft.load(tmp_path / "theirs")
    assert again.config == draft.config
    for name, value in draft.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    batch, mask = make_batch(draft.config)
    monkeypatch.setattr(
        deepspec_on_cpu.dspark, "sample_anchor_positions", lambda **_: (batch.anchors, batch.block_mask)
    )
    with torch.no_grad():
        outputs = theirs(
            input_ids=batch.input_ids,
            target_hidden_states=batch.taps,
            loss_mask=mask[None],
            target_last_hidden_states=None,
        )
        hidden = again(batch.input_ids, batch.taps, batch.anchors, batch.block_mask)
        at = (batch.anchors[..., None] + torch.arange(draft.config.block_size)).clamp(max=LENGTH - 1)
        previous = batch.input_ids[0][at]
        logits = block_logits(again, hidden, previous)
        torch.testing.assert_close(logits[batch.slot_mask], outputs.draft_logits[batch.slot_mask], rtol=1e-5, atol=1e-5)
        if again.config.enable_confidence_head:
            confidence = again.confidence(hidden, previous)[batch.slot_mask]
            torch.testing.assert_close(confidence, outputs.confidence_pred[batch.slot_mask], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("format_name", ["speculators", "modelopt"])
@pytest.mark.parametrize("head", ["vanilla", "gated", "rnn"])
def test_a_draft_imported_from_another_layout_is_read_by_deepspec(deepspec_on_cpu, tmp_path, format_name, head):
    draft = make_draft(**HEADS[head])
    form = FORMATS[format_name]
    (tmp_path / "theirs").mkdir()
    values = form.write(draft.config, Verifier("somebody/target", ("NemotronHForCausalLM",)))
    write_json(tmp_path / "theirs" / "config.json", values)
    save_file(
        {form.tensor_name(k): v for k, v in draft.state_dict().items()}, tmp_path / "theirs" / "model.safetensors"
    )
    import_draft(tmp_path / "theirs", tmp_path / "ours")
    theirs = read_by_deepspec(tmp_path / "ours", deepspec_on_cpu.dspark)
    assert tuple(theirs.config.target_layer_ids) == draft.config.target_layer_ids
    held = theirs.state_dict()
    for name, tensor in draft.state_dict().items():
        assert torch.equal(held[name], tensor), name
