"""What could be silently wrong in a Mamba-2 family: multipliers, bounds of the step size, forms of the gated norm."""

from pathlib import Path

import pytest
import torch

from nemotron_dspark.errors import InputError
from nemotron_dspark.recipe import tiny
from nemotron_dspark.targets import Checkpoint, Target, spec_from_config
from nemotron_dspark.targets.proofs import run_proofs
from tests.recipe.hybrids import BAMBA_9B
from tests.targets.tiny_families import VOCAB, bamba, falcon_h1, granitemoehybrid, zamba2

FAMILIES = {"granitemoehybrid": granitemoehybrid, "bamba": bamba, "falcon_h1": falcon_h1, "zamba2": zamba2}
TOLERANCE = 1e-5
OPEN = (0.0, float("inf"))


def target_of(config, weights_of: Target | None = None, dtype: torch.dtype = torch.float32) -> Target:
    """A target of ``config`` with random weights, or with those of another target."""
    model = tiny.random_model(config)
    if weights_of is not None:
        model.load_state_dict(weights_of.model.state_dict())
    return Target(model.to(dtype), None, spec_from_config(config), Path())


def ids_of(seed: int, count: int) -> list[int]:
    return torch.randint(0, VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1.0))


def logits_behind_a_rollback(target: Target) -> torch.Tensor:
    """Logits of 8 tokens behind a prompt and the 3 of 8 that were kept, once they equal the model's own."""
    prompt, first, second = ids_of(1, 40), ids_of(2, 8), ids_of(3, 8)
    state, _ = target.prefill(prompt)
    target.verify(state, torch.tensor([first]))
    target.commit(state, [3])
    found = target.verify(state, torch.tensor([second])).logits[0]
    with torch.no_grad():
        whole = target.model(input_ids=torch.tensor([prompt + first[:3] + second]), use_cache=False).logits[0]
    assert error(found, whole[-8:]) < TOLERANCE
    return found


MULTIPLIERS = [
    *(("granitemoehybrid", f"{name}_multiplier", 1.0) for name in ("embedding", "attention", "residual")),
    ("granitemoehybrid", "logits_scaling", 1.0),
    *(("falcon_h1", f"{name}_multiplier", 1.0) for name in ("embedding", "lm_head", "key", "ssm_in", "ssm_out")),
    *(("falcon_h1", f"attention_{side}_multiplier", 1.7) for side in ("in", "out")),
    *(("falcon_h1", "ssm_multipliers", [1.7 if at == part else 1.0 for at in range(5)]) for part in range(5)),
    *(("falcon_h1", "mlp_multipliers", pair) for pair in ([1.7, 0.6], [0.8, 1.7])),
]


@pytest.mark.parametrize(("family", "field", "value"), MULTIPLIERS)
def test_every_multiplier_reaches_the_logits(family, field, value):
    neutral = {"ssm_multipliers": [1.0] * 5} if field == "ssm_multipliers" else {}
    target = target_of(FAMILIES[family](**neutral))
    other = target_of(FAMILIES[family](**{field: value}), weights_of=target)
    assert error(logits_behind_a_rollback(other), logits_behind_a_rollback(target)) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_the_bounds_of_the_step_size_are_the_configs(family):
    """Also for a single token, and with no bounds where the config has none: transformers' forms differ in both."""
    bounded = target_of(FAMILIES[family](time_step_limit=[0.5, 1.5]))
    absent = target_of(FAMILIES[family](time_step_limit=None), weights_of=bounded)
    unbounded = target_of(FAMILIES[family](time_step_limit=list(OPEN)), weights_of=bounded)
    found = [logits_behind_a_rollback(target) for target in (bounded, absent, unbounded)]
    assert error(found[0], found[2]) > 1e-3
    assert torch.equal(found[1], found[2])
    prompt, tokens = ids_of(4, 5), ids_of(5, 5)
    state, _ = bounded.prefill(prompt)
    whole = bounded.logits(bounded.capture(torch.tensor([prompt + tokens]), None, ()).last)[0]
    for token, expected in zip(tokens, whole[-5:], strict=True):
        assert error(bounded.verify(state, torch.tensor([[token]])).logits[0, 0], expected) < TOLERANCE
        bounded.commit(state, [1])


def test_zamba2_does_not_bound_the_step_size_by_a_value_for_initialisation():
    target = target_of(zamba2())
    other = target_of(zamba2(time_step_min=5.0, time_step_max=9.0), weights_of=target)
    assert torch.equal(logits_behind_a_rollback(target), logits_behind_a_rollback(other))


@pytest.mark.parametrize("before", [True, False])
def test_falcons_norm_goes_before_or_after_the_gate(before):
    target = target_of(falcon_h1(mamba_rms_norm=True, mamba_norm_before_gate=before))
    other = target_of(falcon_h1(mamba_rms_norm=True, mamba_norm_before_gate=not before), weights_of=target)
    assert error(logits_behind_a_rollback(other), logits_behind_a_rollback(target)) > 1e-3


def test_a_granite_without_experts_and_without_mamba_layers():
    config = granitemoehybrid(["attention"] * 3, num_local_experts=0, position_embedding_type=None)
    target = target_of(config)
    assert (target.spec.layout, target.spec.mlp, target.spec.intermediate_size) == ("DDD", "gated", 96)
    assert target.spec.rope_theta is None
    assert target.prefill([5, 6])[0].recurrent is None
    logits_behind_a_rollback(target)


def test_a_zamba2_without_adapters_rope_or_tied_head():
    target = target_of(zamba2(use_shared_attention_adapter=False, use_mem_rope=False, tie_word_embeddings=False))
    assert target.spec.rope_theta is None
    assert not target.spec.tie_word_embeddings
    logits_behind_a_rollback(target)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_proofs_pass_in_half_precision(family):
    target = target_of(FAMILIES[family](), dtype=torch.bfloat16)
    assert [proof for proof in run_proofs(target, (1, 2)) if not proof.passed] == []


def test_a_prompt_in_one_block_is_as_exact_as_token_by_token():
    """For heads that forget fast, as those of large models, the summed decays of a block go beyond 10000."""
    target = target_of(bamba(time_step_limit=OPEN))
    for mixer in (module for module in target.model.modules() if hasattr(module, "A_log")):
        mixer.A_log.copy_(torch.linspace(0, 4.85, mixer.num_heads))
        mixer.dt_bias.fill_(-3.0)
        mixer.in_proj.weight[-mixer.num_heads :].mul_(6)
    ids = ids_of(7, 200)
    stepped, _ = target.prefill(ids[:1])
    for token in ids[1:]:
        target.verify(stepped, torch.tensor([[token]]))
        target.commit(stepped, [1])
    found, expected = target.prefill(ids)[0].recurrent.ssm, stepped.recurrent.ssm
    assert float(((found - expected).norm(dim=(-1, -2)) / expected.norm(dim=(-1, -2))).max()) < 3e-5


@pytest.mark.parametrize(
    ("config", "layout"),
    [
        (lambda: granitemoehybrid(["mamba", "attention", "mamba"]), "MDM"),
        (lambda: bamba(attn_layer_indices=None), "MMMMMM"),
        (lambda: falcon_h1(num_hidden_layers=2), "PP"),
        (lambda: zamba2(), "MMPPMMPM"),
    ],
)
def test_layers_by_the_names_on_the_hub_and_by_transformers_own(config, layout):
    saved = config().to_dict()
    spelt = {"linear_attention": "mamba", "full_attention": "attention"}
    for key in ("layer_types", "layers_block_type"):
        if saved.get(key):
            saved[key] = [spelt.get(kind, kind) for kind in saved[key]]
    assert spec_from_config(saved).layout == spec_from_config(config()).layout == layout


def test_bamba_as_published_leaves_out_its_positions():
    spec = spec_from_config(BAMBA_9B)
    assert [layer for layer, kind in enumerate(spec.layers) if kind.attends] == [9, 18, 27]
    assert (spec.max_position_embeddings, spec.head_dim, spec.rope_theta) == (262144, 128, 10000.0)
    assert spec.assumed == (
        "max_position_embeddings 262144: the config gives none and that is the transformers default.",
    )


def test_an_infinity_as_transformers_writes_it_is_read(tmp_path):
    """``"time_step_limit": [0.0, {"__float__": "Infinity"}]``."""
    granitemoehybrid().save_pretrained(tmp_path)
    assert "__float__" in (tmp_path / "config.json").read_text()
    assert Checkpoint.find(tmp_path).read_spec() == spec_from_config(granitemoehybrid(), str(tmp_path))


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("granitemoehybrid", {"layer_types": ["mamba", "mlp"]}, "unknown layer kind 'mlp'"),
        ("zamba2", {"num_hidden_layers": 9}, "lists 8 layers, but num_hidden_layers says 9"),
        ("bamba", {"attn_layer_indices": [2, 6]}, "outside 0 to 5"),
        ("falcon_h1", {"num_hidden_layers": None}, "no num_hidden_layers"),
    ],
)
def test_a_config_whose_layers_contradict_each_other_is_refused(family, changes, message):
    config = FAMILIES[family]().to_dict() | changes
    with pytest.raises(InputError, match=message):
        spec_from_config(config)
