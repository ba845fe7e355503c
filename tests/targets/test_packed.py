"""Packed weights change nothing but the time."""

import pytest
import torch
from torch import nn

from nemotron_dspark.config import DraftSection
from nemotron_dspark.decoding.decoder import Decoder
from nemotron_dspark.decoding.pair import load_draft
from nemotron_dspark.decoding.sampling import Sampling
from nemotron_dspark.drafts.config import build_draft_config
from nemotron_dspark.drafts.dspark import DSparkDraft
from nemotron_dspark.recipe import tiny
from nemotron_dspark.targets import Target
from nemotron_dspark.targets import packed as module
from nemotron_dspark.targets.packed import PackedLinear

pytestmark = pytest.mark.skipif(not module._supported(), reason="this CPU has no arithmetic in bf16")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.random_target(tmp_path_factory.mktemp("packed") / "target", pattern="M*-", hidden_size=256)


@pytest.fixture(scope="module")
def target(folder) -> Target:
    return Target.load(str(folder), dtype="bfloat16")


def packed_layers(model: nn.Module) -> list[str]:
    return [name for name, layer in model.named_modules() if isinstance(layer, PackedLinear)]


def test_a_packed_target_says_the_same_bits(folder, target, monkeypatch):
    monkeypatch.setattr(module, "_supported", lambda: False)
    plain = Target.load(str(folder), dtype="bfloat16")
    assert packed_layers(target.model)
    assert isinstance(target.packed_head, PackedLinear)
    assert not packed_layers(plain.model)
    ids = torch.randint(32, 200, (70,)).tolist()
    found = []
    for each in (target, plain):
        state, read = each.prefill(ids, [0])
        block = each.verify(state, torch.tensor([[40, 41, 42]]))
        found.append([read.logits, read.taps, block.logits, each.capture(torch.tensor([ids]), None, [1]).last])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))


def test_a_packed_weight_can_be_had_back(folder, target):
    whole = Target.load(str(folder), dtype="float32").model.state_dict()
    held = target.model.state_dict()
    assert whole.keys() == held.keys()
    assert all(torch.equal(tensor, whole[name].to(tensor.dtype)) for name, tensor in held.items())


def test_a_slim_draft_shares_the_targets_packed_head(target, tmp_path):
    section = DraftSection(num_layers=1, block_size=4, taps=[0], markov_rank=8)
    DSparkDraft(build_draft_config(target.spec, section, mask_token_id=5)[0], seed=0).save(tmp_path, slim=True)
    draft = load_draft(tmp_path, target)
    assert draft.packed_head == target.packed_head.forward
    hidden = torch.randn(2, 256).bfloat16()
    assert torch.equal(draft.base_logits(hidden), nn.functional.linear(hidden, target.head.weight))
    assert draft.state_dict().keys() == DSparkDraft(draft.config, seed=0).state_dict().keys()


def test_no_weight_is_unpacked_while_decoding(target, tmp_path, monkeypatch):
    section = DraftSection(num_layers=1, block_size=4, taps=[0], markov_rank=8)
    DSparkDraft(build_draft_config(target.spec, section, mask_token_id=5)[0], seed=0).save(tmp_path, slim=True)
    decoder = Decoder(target, load_draft(tmp_path, target))
    monkeypatch.setattr(PackedLinear, "weight", property(lambda layer: pytest.fail("unpacked")))
    assert len(decoder.generate([40, 41, 42], Sampling(temperature=0.0, max_new_tokens=6)).tokens) == 6


@pytest.mark.parametrize("layer", [nn.Linear(256, 256), nn.Linear(256, 256, bias=False), nn.Linear(8, 8, bias=False)])
def test_what_would_not_gain_or_not_be_the_same_stays(layer):
    kind = torch.float32 if layer.bias is None and layer.in_features == 256 else torch.bfloat16
    assert module.packed(layer.to(kind)) is layer
