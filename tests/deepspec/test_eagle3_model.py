"""DeepSpec's own `Qwen3Eagle3Model` and our EAGLE-3 draft: same folder, same numbers, in both directions."""

import pytest
import torch

from nemotron_dspark.cache.reader import TargetCache
from nemotron_dspark.drafts.config import Eagle3Config
from nemotron_dspark.drafts.eagle3 import Eagle3Draft
from nemotron_dspark.training.batches import collate_unrolled
from nemotron_dspark.training.eagle3_objective import Eagle3Objective


@pytest.fixture
def pair(make_config, tmp_path):
    """Their model with large weights, and ours from the folder it saved."""
    cfg = make_config("eagle3")
    torch.manual_seed(0)
    theirs = cfg.train.trainer_cls.__new__(cfg.train.trainer_cls)
    theirs.args, theirs.device, theirs.precision_dtype = cfg, "cpu", torch.float32
    model, _ = theirs.build_models()
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.mul_(4) if value.dim() > 1 else value.add_(torch.randn_like(value) * 0.1)
    model.save_pretrained(tmp_path / "theirs")
    return model, Eagle3Draft.load(tmp_path / "theirs"), cfg


def padded_batch(cfg, rows=2):
    from deepspec.data import CacheCollator

    cache = TargetCache(cfg.data.target_cache_path)
    samples = [cache[index] for index in range(rows)]
    theirs = CacheCollator()(
        [
            {
                "input_ids": s.input_ids,
                "loss_mask": s.loss_mask.to(torch.uint8),
                "target_hidden_states": s.taps.float(),
                "target_last_hidden_states": s.last.float(),
            }
            for s in samples
        ]
    )
    return theirs, collate_unrolled(samples, cfg.model.ttt_length)


def test_loss_gradients_and_metrics_are_deepspecs(pair, deepspec_on_cpu):
    from deepspec.utils import metrics

    model, draft, cfg = pair
    theirs, ours = padded_batch(cfg)
    metrics.reset()
    expected = deepspec_on_cpu.eagle3_loss.compute_eagle3_loss(
        model=model, batch=theirs, ttt_length=model.ttt_length, step_loss_decay=model.step_loss_decay
    )
    expected.backward()
    reported = metrics.flush()
    loss = Eagle3Objective(draft)(ours)
    loss.value.backward()
    torch.testing.assert_close(loss.value, expected, rtol=1e-6, atol=1e-6)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            mine = draft.get_parameter(name).grad
            scale = float(parameter.grad.abs().max())
            assert scale > 0, name
            torch.testing.assert_close(mine, parameter.grad, rtol=0, atol=1e-6 * max(scale, 1), msg=name)
    found = {
        "train/loss": loss.value.detach(),
        "train/tau_probabilistic": loss.sums.tau / loss.sums.slots[0],
        "train/tau_greedy": loss.details["tau_greedy"] / loss.sums.slots[0],
    }
    for step in range(model.ttt_length):
        found |= {
            f"train/ploss_{step}": loss.details["steps"][step] / loss.sums.weight,
            f"train/accuracy@{step}": loss.details["correct"][step] / loss.sums.slots[step],
            f"train/accept_rate@{step}": loss.sums.accepted[step] / loss.sums.slots[step],
            f"train/valid_tokens@{step}": loss.sums.slots[step],
        }
    assert {name: float(value) for name, value in found.items()} == pytest.approx(reported, rel=1e-6, abs=1e-6)


def test_folders_are_read_in_both_directions(pair, tmp_path):
    model, draft, _ = pair
    draft.save(tmp_path / "ours")
    again = type(model).from_pretrained(tmp_path / "ours", dtype=torch.float32, attn_implementation="sdpa")
    assert Eagle3Config.from_folder(tmp_path / "ours") == draft.config
    hidden = torch.randn(1, 9, 5 * draft.config.hidden_size)
    ids = torch.randint(0, draft.config.vocab_size, (1, 10))
    with torch.no_grad():
        theirs = again.compute_logits(again(hidden_states=hidden, input_ids=ids[:, 1:]))
        ours = draft.logits(draft(ids, torch.cat((hidden, hidden[:, :1]), 1))[0])[:, :9]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for name, value in draft.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_drafting_token_by_token_gives_deepspecs_logits(pair):
    from transformers import DynamicCache

    model, draft, cfg = pair
    model.config._attn_implementation = "sdpa"  # as its evaluator loads it
    sample = TargetCache(cfg.data.target_cache_path)[0]
    ids, taps = sample.input_ids, sample.taps.float()
    at, tokens = len(ids) - 4, [7, 40, 90]
    with torch.no_grad():
        context, cache = draft.new_context(), DynamicCache()
        for begin, end in ((0, at - 3), (at - 3, at)):  # a prompt, then one verified block
            draft.extend(context, taps[None, begin : end + 2], [end - begin], ids[None, begin + 1 : end + 3])
            hidden = model.extend_draft_cache(
                hidden_states=taps[None, begin:end],
                input_ids=ids[None, begin + 1 : end + 1],
                position_ids=torch.arange(begin, end)[None],
                past_key_values=cache,
            )
        block = draft.begin(context, ids[at : at + 1])
        for step, token in enumerate(tokens):
            ours = block.next_logits(torch.tensor([tokens[step - 1]]))
            torch.testing.assert_close(ours, model.compute_logits(hidden)[:, 0], rtol=1e-5, atol=1e-4)
            hidden = model(
                hidden_states=hidden,
                input_ids=torch.tensor([[token]]),
                position_ids=torch.tensor([[at + step]]),
                past_key_values=cache,
                use_cache=True,
            )
