"""A target on several devices: which layer goes where, and that it computes what it does on one, to the bit."""

from pathlib import Path

import accelerate
import pytest
import torch
from transformers import AutoModelForCausalLM

from nemotron_dspark.decoding.decoder import Decoder
from nemotron_dspark.decoding.sampling import Sampling
from nemotron_dspark.drafts.config import DraftConfig
from nemotron_dspark.drafts.dspark import DSparkDraft
from nemotron_dspark.errors import EnvironmentFault
from nemotron_dspark.recipe import tiny
from nemotron_dspark.targets import Target, placement, spec_from_config
from nemotron_dspark.targets import target as target_module
from tests.devices import Devices, device, put, values
from tests.targets.tiny_families import TINY, VOCAB

GPUS = [torch.device("cuda", index) for index in range(3)]
TAPS = (-1, 0, 2)


def skeleton(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def sizes(model, layers):
    """Bytes of every layer, and of what belongs to none; what layers share counts for the first of them."""
    seen, each = set(), []
    for part in [*model.get_submodule(layers), model]:
        fresh = {id(parameter): parameter.numel() * parameter.element_size() for parameter in part.parameters()}
        each.append(sum(size for key, size in fresh.items() if key not in seen))
        seen |= fresh.keys()
    *each, outside = each
    return each, outside


def test_whole_layers_lie_in_their_order_and_everything_else_on_the_first_device():
    for name in TINY:
        config = TINY[name]()
        model, layers = skeleton(config), spec_from_config(config).names.layers
        each, outside = sizes(model, layers)
        room = dict.fromkeys(GPUS[:2], 4 * (sum(each) + outside))  # balanced all the same
        placed = placement.place(model, layers, room)
        assert placed is not None, name
        unplaced = [
            path
            for path, _ in model.named_parameters()
            if not any(path == part or path.startswith(f"{part}.") for part in placed)
        ]
        assert unplaced == [], name
        at = [placed.pop(f"{layers}.{index}").index for index in range(len(each))]
        assert set(placed.values()) == {GPUS[0]}, name
        assert at == sorted(at), name
        assert set(at) == {0, 1}, name


def test_layers_are_balanced_over_the_memory_that_there_is():
    config = TINY["mistral"]()
    model, layers = skeleton(config), spec_from_config(config).names.layers
    each, outside = sizes(model, layers)
    size = each[0]
    assert each == [size] * 5

    def at(*rooms):
        room = {gpu: amount * size for gpu, amount in zip(GPUS, rooms, strict=False)}
        placed = placement.place(model, layers, room | {GPUS[0]: room[GPUS[0]] + outside})
        return placed and [placed[f"{layers}.{index}"].index for index in range(5)]

    assert at(9, 9) == [0, 0, 1, 1, 1]
    assert at(3, 4) == [0, 1, 1, 1, 1]  # accelerate keeps room for the largest layer on the first
    assert at(3, 2, 2) == [0, 1, 1, 2, 2]
    assert at(2, 2, 1) is None


def walked(target):
    """What is computed on two rows along capture, prefill, verify, roll-back, a row that leaves."""
    ids = torch.randint(12, VOCAB, (2, 40), generator=torch.Generator().manual_seed(1))
    found = []
    for mask in (None, torch.arange(40) < torch.tensor([[40], [33]])):
        captured = target.capture(ids, mask, TAPS)
        found += [captured.taps, captured.last]
    state, _ = target.prefill(ids[0, :19].tolist(), TAPS)
    state.join(target.prefill(ids[1, :9].tolist(), TAPS)[0])
    for kept in ([3, 0], [5, 5]):
        verified = target.verify(state, ids[:, 20:25])
        found += [verified.logits, verified.taps]
        target.commit(state, kept)
    state.leave(0)
    verified = target.verify(state, ids[:1, 20:25])
    assert {tensor.device for tensor in [*found, verified.logits, verified.taps]} == {target.device}
    return [values(tensor) for tensor in [*found, verified.logits, verified.taps]], state


def answered(target):
    """Tokens that a draft on the target's device helps to make, greedy and sampled."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    more = {"head_dim": 16, "vocab_size": VOCAB, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "num_target_layers": 8}
    shape = sizes | more | {"max_position_embeddings": 256, "num_hidden_layers": 1, "block_size": 4, "markov_rank": 4}
    draft = DSparkDraft(DraftConfig(**shape, mask_token_id=31, target_layer_ids=(0, 2), num_anchors=4), seed=0)
    draft.set_embeddings(*[torch.randn(VOCAB, 64, generator=torch.Generator().manual_seed(2))] * 2)
    put(draft, {"": target.device})
    decoder = Decoder(target, draft)
    samplings = (Sampling(temperature=temperature, max_new_tokens=6, seed=3) for temperature in (0.0, 1.0))
    return [decoder.generate(range(20, 40), sampling).tokens for sampling in samplings]


@pytest.mark.parametrize("name", ["nemotron_h", "gemma3_text", "olmo2"])
def test_layers_on_two_devices_compute_what_they_do_on_one_to_the_bit(name):
    config, results = TINY[name](), []
    for devices in ([device(0)], [device(0), device(1)]):
        model, spec = tiny.random_model(config), spec_from_config(config)
        layers = spec.names.layers
        each, outside = sizes(model, layers)
        placed = placement.place(model, layers, dict.fromkeys(devices, 4 * (sum(each) + outside)))
        assert set(placed.values()) == set(devices)
        put(model, placed)
        with Devices(), torch.no_grad():
            if len(devices) > 1:
                skipped = model._skip_keys_device_placement
                accelerate.dispatch_model(model, placed, main_device=device(0), skip_keys=skipped)
            tokenizer = tiny.make_tokenizer(["some words"], VOCAB)
            target = Target(model, tokenizer, spec, Path())
            found, state = walked(target)
            results.append((found, answered(target) if name == "nemotron_h" else None))
    (one, tokens), (two, same_tokens) = results
    assert all(torch.equal(here, there) for here, there in zip(one, two, strict=True))
    assert tokens == same_tokens
    if name == "nemotron_h":
        for layer, kv in state.attention.items():
            assert kv._stored[0].device == placed[f"{layers}.{layer}"]
        assert [part.conv.device for part in state.recurrent.parts] == devices
        for part in state.recurrent.parts:
            assert {placed[f"{layers}.{layer}"] for layer in part.layers} == {part.conv.device}


def test_mixed_devices_raise_where_the_tests_say_they_would():
    with Devices():
        one, two = (torch.ones(3, device=device(index)) for index in range(2))
        with pytest.raises(RuntimeError, match="add of tensors on privateuseone:0 and privateuseone:1"):
            one + two
        assert values(one + two.to(one.device)).tolist() == [2.0, 2.0, 2.0]


def test_target_loaded_by_a_placement_computes_the_same_bits(tiny_hybrid, monkeypatch):
    plain = Target.load(str(tiny_hybrid), device="cpu")
    placed = placement.place(plain.model, plain.spec.names.layers, {torch.device("cpu"): 10**9})
    monkeypatch.setattr(target_module, "_placed", lambda *_: placed)
    monkeypatch.setattr(type(plain.model), "to", lambda *_: pytest.fail("layers are moved together"))
    loaded = Target.load(str(tiny_hybrid), device="cpu")
    accelerate.dispatch_model(loaded.model, placed, main_device="cpu", force_hooks=True)
    for here, there in zip(walked(plain)[0], walked(loaded)[0], strict=True):
        assert torch.equal(here, there)


@pytest.mark.parametrize(
    ("free", "taken"),
    [([2.0, 2.0], None), ([1.1, 1.2], {0, 1}), ([0.9, 0.7, 0.7], {0, 1, 2}), ([0.6, 0.6], "too large"), ([0.9], "too")],
)
def test_several_devices_are_taken_only_where_the_first_does_not_hold_the_weights(
    tiny_hybrid, monkeypatch, free, taken
):
    checkpoint = target_module.Checkpoint.find(str(tiny_hybrid), weights=True)
    spec, size = checkpoint.read_spec(), placement.weight_bytes(checkpoint, "float32")
    memory = dict(zip(GPUS, (int(share * size) for share in free), strict=False))
    monkeypatch.setattr(target_module, "free_memory", memory.__getitem__)
    if isinstance(taken, str):
        with pytest.raises(EnvironmentFault) as refused:
            target_module._placed(checkpoint, spec, "float32", list(memory))
        assert "does not fit into what is free" in refused.value.what
        assert "`nds cache build --stream on`" in refused.value.do
        assert "quantised checkpoint" in refused.value.do
        return
    placed = target_module._placed(checkpoint, spec, "float32", list(memory))
    assert placed is None if taken is None else {where.index for where in placed.values()} == taken
