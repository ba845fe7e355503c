"""A target whose layers are read when they run: how much of it is in memory, which one is chosen, and what goes wrong.

That its hidden states are those of a whole forward is a promise about every family: `test_families`.
"""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemotron_dspark.config import load_config
from nemotron_dspark.errors import InputError
from nemotron_dspark.targets import Target, streamed
from nemotron_dspark.targets.layer_weights import LayerWeights
from nemotron_dspark.targets.proofs import PROOFS, run_proofs
from nemotron_dspark.targets.streamed import StreamedTarget, load_for_capture
from nemotron_dspark.targets.target import Sequences


@pytest.fixture
def hybrid(tiny_hybrid) -> StreamedTarget:
    return StreamedTarget.load(str(tiny_hybrid), dtype="float32")


@pytest.fixture
def copied(tiny_hybrid, tmp_path):
    return shutil.copytree(tiny_hybrid, tmp_path / "target")


def batches(count: int = 5) -> list[Sequences]:
    generator = torch.Generator().manual_seed(1)
    return [Sequences(torch.randint(32, 384, (2, 20 + 7 * at), generator=generator)) for at in range(count)]


def in_memory(target: Target) -> int:
    parameters = dict(target.model.named_parameters()).values()
    return sum(each.numel() * each.element_size() for each in parameters if not each.is_meta)


def test_never_more_than_two_layers_are_in_memory(hybrid):
    layers, seen = hybrid.model.get_submodule(hybrid.spec.names.layers), []
    resident = in_memory(hybrid)
    sizes = [sum(4 * parameter.numel() for parameter in layer.parameters()) for layer in layers]
    passed = hybrid.captures(batches(), (1, 4), lambda layer: seen.append(in_memory(hybrid) - resident))
    assert len([*passed]) == 5
    assert len(seen) == len(sizes)
    for at, (found, size) in enumerate(zip(seen, sizes, strict=True)):
        assert size <= found <= size + (sizes[at + 1] if at + 1 < len(sizes) else 0)
    assert in_memory(hybrid) == resident


def test_every_layer_is_read_once_for_all_batches(hybrid, monkeypatch):
    read, load = [], LayerWeights.load
    monkeypatch.setattr(LayerWeights, "load", lambda self, *part: (read.append(part[0]), load(self, *part)))
    assert len([*hybrid.captures(batches(), ())]) == 5
    assert read == list(range(8))


def test_the_hidden_states_of_a_streamed_target_are_proven(hybrid):
    results = run_proofs(hybrid, (1, 4))
    assert [result.name for result in results] == [proof.name for proof in PROOFS if not proof.decodes]
    assert all(result.passed for result in results)
    assert {"finite", "causality", "taps", "padding"} <= {result.name for result in results}


def test_a_tap_off_by_one_is_found(tiny_hybrid, monkeypatch):
    right = StreamedTarget._keep
    monkeypatch.setattr(StreamedTarget, "_keep", lambda self, at: right(self, at - 1))
    wrong = StreamedTarget.load(str(tiny_hybrid), dtype="float32")
    assert [result.name for result in run_proofs(wrong, (1, 4)) if not result.passed] == ["taps"]


@pytest.mark.parametrize(
    ("stream", "free", "kind"),
    [("auto", 10**10, Target), ("auto", 10**5, StreamedTarget), ("on", 10**10, StreamedTarget), ("off", 1, Target)],
)
def test_layers_are_streamed_when_asked_or_when_the_weights_do_not_fit(tiny_hybrid, monkeypatch, stream, free, kind):
    monkeypatch.setattr(streamed, "_free", lambda device: free)
    target = load_for_capture(load_config({"name": str(tiny_hybrid), "stream": stream}).target)
    assert type(target) is kind


def test_a_pass_is_as_long_as_the_memory_allows(hybrid, monkeypatch):
    monkeypatch.setattr(streamed, "_free", lambda device: 2 * 10**9)
    assert 10**5 < hybrid.pass_tokens((1, 4)) < 10**8
    assert hybrid.pass_tokens((1, 4)) > hybrid.pass_tokens((1, 2, 3, 4))
    monkeypatch.setattr(streamed, "_free", lambda device: 0)
    assert hybrid.pass_tokens((1, 4)) == 0  # a batch at a time


def test_it_does_not_decode(hybrid):
    with pytest.raises(InputError, match="does not decode"):
        hybrid.prefill([40, 41])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop(next(name for name in weights if "layers.3." in name)), "lack 1 tensors"),
        (
            lambda weights: weights.update({n: w[:-1] for n, w in weights.items() if "layers.5." in n}),
            "has not the shape",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_its_config_is_found_before_a_layer_is_read(
    copied, monkeypatch, change, message
):
    weights = load_file(copied / "model.safetensors")
    change(weights)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, copied / "model.safetensors")
    monkeypatch.setattr(LayerWeights, "load", lambda *_, **__: pytest.fail("a layer was read"))
    with pytest.raises(InputError, match=message):
        StreamedTarget.load(str(copied), dtype="float32")


def test_a_truncated_file_is_found_before_a_layer_is_read(copied, monkeypatch):
    path = copied / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    monkeypatch.setattr(LayerWeights, "load", lambda *_, **__: pytest.fail("a layer was read"))
    with pytest.raises(InputError, match="truncated"):
        StreamedTarget.load(str(copied), dtype="float32")


def test_a_file_that_vanishes_in_a_pass_ends_it(copied):
    target = StreamedTarget.load(str(copied), dtype="float32")
    with pytest.raises(InputError, match="holds no safetensors file"):
        list(target.captures(batches(), (), lambda layer: layer == 1 and (copied / "model.safetensors").unlink()))


def test_a_slow_disk_is_named_with_its_rate(hybrid, monkeypatch):
    assert hybrid.remarks() == () or "MB/s" in hybrid.remarks()[0]
    hybrid._waited, hybrid._captured = 0.05, 1.0
    assert hybrid.remarks() == ()
    hybrid._waited = 0.5
    assert "50% went by waiting" in hybrid.remarks()[0]
