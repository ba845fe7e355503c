"""Every proof passes on sound targets, and a target with a fault fails the proof that exists for it.

`named` is what a person sees: the first proof that fails. Where one fault can fail one proof only, that is tested too.
"""

import contextlib
import dataclasses
from collections.abc import Callable

import pytest
import torch

from nemotron_dspark.errors import CheckError
from nemotron_dspark.recipe import tiny
from nemotron_dspark.targets import Target, proofs
from nemotron_dspark.targets.mamba2 import Mamba2States
from nemotron_dspark.targets.proofs import PROOFS, prove, run_proofs
from nemotron_dspark.targets.state import ReplayState, TargetState
from tests.targets.tiny_families import TINY, VOCAB, WINDOW

HYBRIDS = ("nemotron_h", "granitemoehybrid")
BOTH = [(family, "float32") for family in HYBRIDS] + [("nemotron_h", "bfloat16")]
TAPS = (0, 2)


@pytest.fixture(scope="module")
def load(tmp_path_factory) -> Callable[..., Target]:
    """A fresh `Target` of a tiny family: ``load(model_type, dtype)``. ``spread`` scales its weights."""
    folders = {}

    def loaded(model_type: str, dtype: str = "float32", spread: float = 3.0) -> Target:
        if (model_type, spread) not in folders:
            folder = tmp_path_factory.mktemp(model_type)
            model = tiny.random_model(TINY[model_type](), spread=spread)
            folders[model_type, spread] = tiny.save_target(folder, model, tiny.make_tokenizer(tiny._SENTENCES, VOCAB))
        return Target.load(str(folders[model_type, spread]), dtype=dtype)

    return loaded


def failing(target: Target) -> list[str]:
    return [result.name for result in run_proofs(target, TAPS) if not result.passed]


def named(target: Target) -> str:
    return failing(target)[0]


def layers(target: Target) -> list[torch.nn.Module]:
    return list(target.model.get_submodule(target.spec.names.layers))


def without_cache(module: torch.nn.Module, changed: Callable) -> None:
    """Let ``changed(right, args, kwargs)`` stand in for a module's forward, but not when it works on a state."""
    right = module.forward

    def forward(*args, **kwargs):
        if any(kwargs.get(name) is not None for name in ("cache_params", "past_key_values")):
            return right(*args, **kwargs)
        return changed(right, args, kwargs)

    module.forward = forward


@pytest.mark.parametrize(("model_type", "dtype"), [*BOTH, *((name, "bfloat16") for name in ("gemma2", "olmo2"))])
def test_a_sound_target_passes_every_proof(load, model_type, dtype):
    """Every family in fp32: `test_families`."""
    results = prove(load(model_type, dtype), TAPS)
    assert [result.name for result in results] == [proof.name for proof in PROOFS]
    assert [result.note for result in results if result.note] == []


def test_a_trained_like_target_passes_every_proof(load):
    """Small updates of a large residual stream, as in deep trained models."""
    assert failing(load("nemotron_h", "bfloat16", spread=0.5)) == []


@pytest.mark.parametrize(("model_type", "dtype"), BOTH)
def test_a_recurrent_state_that_is_not_rolled_back_is_named(load, monkeypatch, model_type, dtype):
    """The fault of `crop()` in transformers: attention is trimmed, the recurrent state keeps the rejected tokens."""

    def crop(self, kept):
        self.recurrent.commit([self.block] * self.rows)
        self.lengths = [length + count for length, count in zip(self.lengths, kept, strict=True)]

    monkeypatch.setattr(TargetState, "commit", crop)
    assert failing(load(model_type, dtype)) == ["rollback"]


@pytest.mark.parametrize(("model_type", "dtype"), [("mistral", "float32"), ("gemma2", "bfloat16")])
def test_keys_and_values_that_are_not_trimmed_are_named(load, monkeypatch, model_type, dtype):
    right = TargetState.commit
    monkeypatch.setattr(TargetState, "commit", lambda self, kept: right(self, [self.block] * self.rows))
    assert failing(load(model_type, dtype)) == ["rollback"]


def test_a_general_path_that_never_replays_is_named(load, monkeypatch):
    def keep_all(self, kept):
        self.caches = [grown for _, grown in self._seen]
        self.lengths = [length + self.block for length in self.lengths]

    monkeypatch.setattr(ReplayState, "commit", keep_all)
    assert failing(load("olmo2")) == ["rollback"]


@pytest.mark.parametrize(("model_type", "dtype"), BOTH)
def test_a_convolution_window_off_by_one_is_named(load, monkeypatch, model_type, dtype):
    right = Mamba2States.commit

    def late(self, kept):
        before = self.conv.clone()
        right(self, kept)
        if max(kept) == 1:
            self.conv.copy_(before)

    monkeypatch.setattr(Mamba2States, "commit", late)
    assert failing(load(model_type, dtype)) == ["rollback"]


@pytest.mark.parametrize(
    ("model_type", "dtype", "spread"),
    [("nemotron_h", "float32", 3.0), ("nemotron_h", "bfloat16", 0.5), ("mistral", "bfloat16", 3.0)],
)
def test_taps_off_by_one_are_named(load, monkeypatch, model_type, dtype, spread):
    """Also where neighbouring layers hardly differ, as in deep trained models."""
    right = Target._tapped

    @contextlib.contextmanager
    def shifted(self, taps):
        collected = {}
        with right(self, [tap + 1 for tap in taps]) as found:
            yield collected
        collected |= {tap - 1: output for tap, output in found.items()}

    monkeypatch.setattr(Target, "_tapped", shifted)
    assert failing(load(model_type, dtype, spread)) == ["taps"]


@pytest.mark.parametrize(("model_type", "dtype"), [*BOTH, ("gemma2", "bfloat16")])
def test_a_missing_final_norm_is_named(load, monkeypatch, model_type, dtype):
    """A base model whose last hidden state is raw, with the norm in front of the LM head."""
    target = load(model_type, dtype)
    norm = target.model.get_submodule(target.spec.names.final_norm)
    base, right = target._base, norm.forward

    def raw(**inputs):
        norm.forward = lambda hidden: hidden
        try:
            return base(**inputs)
        finally:
            norm.forward = right

    target._base = raw
    assert failing(target) == ["head"]


@pytest.mark.parametrize(
    ("model_type", "dtype", "field", "absent"),
    [
        ("granitemoehybrid", "float32", "logit_multiplier", 1.0),
        ("gemma2", "float32", "logit_softcap", None),
        ("gemma2", "bfloat16", "logit_softcap", None),
    ],
)
def test_a_missing_multiplier_or_soft_cap_is_named(load, model_type, dtype, field, absent):
    target = load(model_type, dtype)
    target.spec = dataclasses.replace(target.spec, **{field: absent})
    assert failing(target) == ["head"]


@pytest.mark.parametrize(("model_type", "dtype"), BOTH)
def test_a_scan_that_looks_ahead_is_named(load, model_type, dtype):
    """What transformers 5.10 to 5.14 compute without CUDA kernels once a sequence is longer than one chunk."""
    target = load(model_type, dtype)
    layer = layers(target)[0]
    mixer = getattr(layer, "mamba", None) or layer.mixer

    def leaky(right, args, kwargs):
        output = right(*args, **kwargs)
        ahead = 0.3 * output.roll(-mixer.chunk_size, 1)
        return output + ahead if output.shape[1] > mixer.chunk_size else output

    without_cache(mixer, leaky)
    assert named(target) == "causality"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attention_that_looks_ahead_is_named(load, dtype):
    target = load("mistral", dtype)

    def leaky(right, args, kwargs):
        output, weights = right(*args, **kwargs)
        return output + 0.3 * output.mean(1, keepdim=True), weights

    without_cache(layers(target)[2].self_attn, leaky)
    assert named(target) == "causality"


@pytest.mark.parametrize("model_type", ["nemotron_h", "mistral"])
def test_layers_that_pass_nothing_on_prove_nothing(load, model_type):
    """Every comparison would hold between tokens that do not know of each other."""
    target = load(model_type)
    for name, parameter in target.model.named_parameters():
        if "out_proj" in name or "o_proj" in name:
            parameter.zero_()
    assert named(target) == "causality"


@pytest.mark.parametrize(
    ("model_type", "dtype", "layer", "name"),
    [
        ("nemotron_h", "float32", 2, "mixer"),
        ("nemotron_h", "bfloat16", 2, "mixer"),
        ("gemma2", "float32", 1, "self_attn"),
    ],
)
def test_padding_that_leaks_is_named(load, model_type, dtype, layer, name):
    target = load(model_type, dtype)

    def leaky(right, args, kwargs):
        output, weights = right(*args, **kwargs)
        return (
            output + 5 * output[:, -1:] if len(output) == 2 else output
        ), weights  # only a padded batch has two rows

    without_cache(getattr(layers(target)[layer], name), leaky)
    assert failing(target) == ["padding"]


@pytest.mark.parametrize("model_type", HYBRIDS)
def test_step_sizes_clamped_in_one_form_only_are_named(load, model_type):
    """transformers clamps them in its chunked form and not for a single token; engines never do."""
    target = load(model_type)
    for layer in layers(target):
        mixer = getattr(layer, "mamba", None) or getattr(layer, "mixer", None)
        if hasattr(mixer, "time_step_limit"):

            def clamped(right, args, kwargs, mixer=mixer):
                limits, mixer.time_step_limit = mixer.time_step_limit, (2.0, float("inf"))
                try:
                    return right(*args, **kwargs)
                finally:
                    mixer.time_step_limit = limits

            without_cache(mixer, clamped)
    assert failing(target) == ["verify"]


@pytest.mark.parametrize("model_type", HYBRIDS)
def test_a_block_scan_that_forgets_its_state_is_named(load, monkeypatch, model_type):
    from nemotron_dspark.targets import mamba2

    right = mamba2.scan_block
    monkeypatch.setattr(mamba2, "scan_block", lambda *args: right(*args[:-1], torch.zeros_like(args[-1])))
    assert named(load(model_type)) == "verify"


@pytest.mark.parametrize(
    ("model_type", "dtype", "window"),
    [
        ("mistral", "float32", None),
        ("mistral", "float32", WINDOW - 1),
        ("mistral", "bfloat16", None),
        ("gemma2", "float32", None),
        ("gpt_oss", "float32", None),
    ],
)
def test_a_wrong_sliding_window_is_named(load, monkeypatch, model_type, dtype, window):
    right = TargetState.mask

    def wrong(self, block, device, sliding=None):
        return right(self, block, device, window if sliding else None)

    monkeypatch.setattr(TargetState, "mask", wrong)
    assert failing(load(model_type, dtype)) == ["verify"]


def test_a_window_beyond_reach_is_said(load, monkeypatch):
    monkeypatch.setitem(proofs._REACH, "cpu", WINDOW - 1)
    monkeypatch.setattr(proofs, "_chunk", lambda target: 4)
    notes = {result.name: result.note for result in run_proofs(load("mistral"), TAPS) if result.note}
    assert notes == {"verify": f"9 tokens did not reach the sliding window of {WINDOW}"}


def test_a_nan_is_named(load):
    target = load("nemotron_h")
    target.model.model.layers[0].norm.weight.fill_(float("nan"))
    assert named(target) == "finite"


def test_without_taps_the_default_ones_are_proven(load, monkeypatch):
    asked = []
    right = Target._tapped
    monkeypatch.setattr(Target, "_tapped", lambda self, taps: asked.append(tuple(taps)) or right(self, taps))
    run_proofs(load("llama"))
    assert (1, 2, 3) in asked


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("finite", "not numbers"),
        ("causality", "later tokens"),
        ("taps", "next layer receives"),
        ("head", "LM head"),
        ("padding", "right padding"),
        ("verify", "one forward of the whole sequence"),
        ("rollback", "never seen the rejected tokens"),
    ],
)
def test_a_failed_proof_stops_with_cause_and_cure(load, monkeypatch, name, cause):
    broken = [dataclasses.replace(p, measure=lambda *_: 1.0) if p.name == name else p for p in PROOFS]
    monkeypatch.setattr(proofs, "PROOFS", tuple(broken))
    with pytest.raises(CheckError, match=f"fails the {name} proof .*{cause}") as caught:
        prove(load("llama"), TAPS)
    assert caught.value.exit_code == 1
    assert caught.value.do.endswith(".")
