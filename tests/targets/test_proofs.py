"""Every proof passes on a sound target and catches the fault it exists for."""

import pytest
import torch

from nemotron_dspark.errors import CheckError
from nemotron_dspark.recipe import tiny
from nemotron_dspark.targets import Captured, Target
from nemotron_dspark.targets.mamba2 import Mamba2States
from nemotron_dspark.targets.proofs import PROOFS, prove, run_proofs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.random_target(tmp_path_factory.mktemp("hybrid"), pattern="ME*-M*-M")


@pytest.fixture(params=["float32", "bfloat16"])
def target(request, folder) -> Target:
    return Target.load(str(folder), dtype=request.param)


def failures(target: Target) -> set[str]:
    return {result.name for result in run_proofs(target, (1, 3)) if not result.passed}


def test_a_sound_target_passes_every_proof(target):
    results = prove(target, (1, 3))
    assert [result.name for result in results] == [proof.name for proof in PROOFS]


def test_a_state_that_is_not_rolled_back_is_caught(target, monkeypatch):
    """The fault of `crop()` in transformers: attention is trimmed, the recurrent state keeps the rejected tokens."""
    right = Mamba2States.commit

    def keep_all(self, kept):
        block = next(iter(self._records.values())).dt.shape[1]
        right(self, [block] * len(kept))

    monkeypatch.setattr(Mamba2States, "commit", keep_all)
    assert failures(target) == {"rollback"}


def test_a_convolution_window_off_by_one_is_caught(target, monkeypatch):
    right = Mamba2States.commit

    def shifted(self, kept):
        before = self.conv
        right(self, kept)
        if max(kept) == 1:
            self.conv = before

    monkeypatch.setattr(Mamba2States, "commit", shifted)
    assert failures(target) == {"rollback"}


def test_taps_off_by_one_are_caught(target, monkeypatch):
    right = Target._tapped

    def shifted(self, taps):
        collected = right(self, [tap + 1 for tap in taps])
        collected._modules = {tap - 1: module for tap, module in collected._modules.items()}
        return collected

    monkeypatch.setattr(Target, "_tapped", shifted)
    assert failures(target) == {"taps"}


def test_a_missing_final_norm_is_caught(target, monkeypatch):
    right = Target.capture

    def before_the_norm(self, ids, mask, taps):
        last_layer = self.spec.num_layers - 1
        captured = right(self, ids, mask, (*taps, last_layer))
        width = self.spec.hidden_size
        return Captured(captured.taps[..., :-width] if taps else captured.taps[..., :0], captured.taps[..., -width:])

    monkeypatch.setattr(Target, "capture", before_the_norm)
    assert "head" in failures(target)


def test_a_scan_that_looks_ahead_is_caught(target):
    """What transformers 5.10 to 5.14 compute without CUDA kernels once a sequence is longer than one chunk."""
    mixer = target.model.model.layers[0].mixer
    right = mixer.forward

    def leaky(hidden_states, cache_params=None, **kwargs):
        output = right(hidden_states, cache_params=cache_params, **kwargs)
        if cache_params is None and hidden_states.shape[1] > mixer.chunk_size:
            output = output + 0.1 * output.roll(-mixer.chunk_size, 1)
        return output

    mixer.forward = leaky
    assert "causality" in failures(target)


def test_padding_that_leaks_is_caught(target):
    layer = target.model.model.layers[2].mixer
    right = layer.forward

    def leaky(hidden_states, **kwargs):
        output, weights = right(hidden_states, **kwargs)
        if hidden_states.shape[0] == 2:  # only a padded batch has two rows here
            output = output + output[:, -1:]
        return output, weights

    layer.forward = leaky
    assert "padding" in failures(target)


def test_a_failed_proof_stops_with_cause_and_cure(folder, monkeypatch):
    target = Target.load(str(folder))
    monkeypatch.setattr(Mamba2States, "commit", lambda self, kept: None)
    with pytest.raises(CheckError, match="rollback") as caught:
        prove(target, (1, 3))
    assert caught.value.exit_code == 1
    assert "Speculative decoding would change the output" in caught.value.do


def test_proofs_report_a_nan_as_a_failure(folder):
    target = Target.load(str(folder))
    with torch.no_grad():
        target.model.model.layers[0].norm.weight.fill_(float("nan"))
    assert "head" in failures(target)
