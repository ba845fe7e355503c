"""A target whose layers are read when they run: how much of it is in memory, which one is chosen, and what goes wrong.

That its hidden states are those of a whole forward is a promise about every family: `test_families`.
"""

import ctypes
import json
import mmap
import os
import re
import shutil
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemotron_dspark.config import load_config
from nemotron_dspark.errors import InputError
from nemotron_dspark.targets import Target, placement, streamed
from nemotron_dspark.targets.layer_weights import LayerWeights
from nemotron_dspark.targets.proofs import PROOFS, run_proofs
from nemotron_dspark.targets.shards import Stored
from nemotron_dspark.targets.spec import LayerKind
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
    monkeypatch.setattr(streamed, "free_memory", lambda device: free)
    target = load_for_capture(load_config({"name": str(tiny_hybrid), "stream": stream}).target)
    assert type(target) is kind


def test_a_pass_is_as_long_as_the_memory_allows(hybrid, monkeypatch):
    monkeypatch.setattr(streamed, "free_memory", lambda device: 2 * 10**9)
    assert 10**5 < hybrid.pass_tokens((1, 4)) < 10**8
    assert hybrid.pass_tokens((1, 4)) > hybrid.pass_tokens((1, 2, 3, 4))
    monkeypatch.setattr(streamed, "free_memory", lambda device: 0)
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


def test_a_shard_that_is_missing_is_found_before_a_layer_is_read(copied, monkeypatch):
    names = load_file(copied / "model.safetensors")
    weight_map = {name: f"model-{int('layers.6.' in name)}.safetensors" for name in names}
    (copied / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (copied / "model.safetensors").rename(copied / "model-0.safetensors")
    monkeypatch.setattr(LayerWeights, "load", lambda *_, **__: pytest.fail("a layer was read"))
    with pytest.raises(InputError, match=r"The shard .*model-1\.safetensors, which holds .*layers\.6\."):
        StreamedTarget.load(str(copied), dtype="float32")


def test_a_disk_that_is_slower_than_the_layers_is_named_with_its_rate(hybrid, monkeypatch):
    read = Stored.read
    monkeypatch.setattr(Stored, "read", lambda self: (time.sleep(0.01), read(self))[1])
    assert len([*hybrid.captures(batches(1), ())]) == 1
    (said,) = hybrid.remarks()
    waited, rate = re.search(r"Of the target's time (\d+)% went by waiting .* come at (\d+) MB/s", said).groups()
    layers = range(hybrid.spec.num_layers)
    slept = 0.01 * len(load_file(hybrid.folder / "model.safetensors"))
    assert 10 < int(waited) <= 100
    assert int(rate) <= sum(map(hybrid._weights.bytes_of, layers)) / (0.9 * slept) / 1e6 + 0.5  # it is rounded


def test_a_fast_disk_is_not_named(hybrid):
    hybrid._waited, hybrid._captured = 0.05, 1.0
    assert hybrid.remarks() == ()


def test_where_memory_is_shared_the_pages_of_read_files_are_given_back_and_some_memory_stays_free(copied, monkeypatch):
    """As on a GB10: what was read would count as free memory, and is the GPU's."""
    file = copied / "model.safetensors"
    with open(file, "rb") as written:
        os.fsync(written.fileno())
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(is_integrated=1))
    monkeypatch.setattr(placement, "available_memory", lambda: 20 * 10**9)
    assert streamed.free_memory(cuda) == 12 * 10**9
    target = StreamedTarget.load(str(copied), dtype="float32")
    target._weights._drops_pages = False
    list(target.captures(batches(1), ()))
    assert pages_in_memory(file) > 0.9
    target._weights._drops_pages = True
    list(target.captures(batches(1), ()))
    assert pages_in_memory(file) < 0.1


def pages_in_memory(file) -> float:
    """The share of the file's pages that the system keeps."""
    size = file.stat().st_size
    with open(file, "rb") as opened, mmap.mmap(opened.fileno(), size, access=mmap.ACCESS_COPY) as mapped:
        vector = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        start = ctypes.c_ubyte.from_buffer(mapped)
        failed = ctypes.CDLL(None, use_errno=True).mincore(ctypes.c_void_p(ctypes.addressof(start)), size, vector)
        del start
    assert not failed
    return sum(page & 1 for page in vector) / len(vector)


def test_of_a_layer_that_is_too_large_only_some_experts_are_in_memory(tiny_hybrid, monkeypatch):
    whole = StreamedTarget.load(str(tiny_hybrid), dtype="float32")
    (layer,) = (at for at, kind in enumerate(whole.spec.layers) if kind is LayerKind.MOE)
    assert all(part.experts is None for part in whole._weights.parts)
    others = max(whole._weights.bytes_of(at) for at in range(whole.spec.num_layers) if at != layer)
    room = max(int(1.6 * whole._weights.bytes_of(layer)), 2 * others)
    monkeypatch.setattr(streamed, "free_memory", lambda device: 2 * room)
    divided = StreamedTarget.load(str(tiny_hybrid), dtype="float32")
    assert {part.layer for part in divided._weights.parts if part.experts} == {layer}
    assert divided.pass_tokens((1, 4)) < whole.pass_tokens((1, 4))
    resident, seen, use = in_memory(divided), [], LayerWeights.use

    def looked(self, part):
        use(self, part)
        held = self._divided[layer].compute._now if self is divided._weights else None
        twins = [each for each in held[1].parameters()] if held and part.experts else []
        seen.append(in_memory(divided) - resident + sum(4 * each.numel() for each in twins))

    monkeypatch.setattr(LayerWeights, "use", looked)
    found = [captured.last for captured in divided.captures(batches(), ())]
    assert max(seen) <= divided._weights.peak_bytes <= room < 2 * whole._weights.bytes_of(layer)
    expected = [captured.last for captured in whole.captures(batches(), ())]
    assert all(map(torch.equal, found, expected))
    assert in_memory(divided) == resident


def test_conversions_of_names_are_found_once_and_not_for_every_layer(tiny_hybrid, monkeypatch):
    from transformers import conversion_mapping

    calls, find = [], conversion_mapping.get_model_conversion_mapping
    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda *a: (calls.append(a), find(*a))[1])
    list(StreamedTarget.load(str(tiny_hybrid), dtype="float32").captures(batches(1), ()))
    assert len(calls) == 1
