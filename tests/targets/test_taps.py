"""Default taps follow the stated rule on real layouts and on small ones; bad taps are refused with the reason."""

import itertools

import pytest

from nemotron_dspark.errors import InputError
from nemotron_dspark.targets.spec import TargetSpec
from nemotron_dspark.targets.taps import check_taps, default_taps

LAYOUT_8B = "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"
LAYOUT_30B = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"


def hybrid(pattern: str) -> TargetSpec:
    return TargetSpec.from_config(
        {
            "model_type": "nemotron_h",
            "hybrid_override_pattern": pattern,
            "hidden_size": 64,
            "vocab_size": 384,
            "num_attention_heads": 4,
            "head_dim": 16,
            "intermediate_size": 128,
            "layer_norm_epsilon": 1e-5,
            "max_position_embeddings": 512,
        }
    )


def decoder(layers: int) -> TargetSpec:
    return TargetSpec.from_config(
        {
            "model_type": "llama",
            "num_hidden_layers": layers,
            "hidden_size": 64,
            "vocab_size": 384,
            "num_attention_heads": 4,
            "intermediate_size": 128,
            "max_position_embeddings": 512,
        }
    )


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (decoder(36), (1, 9, 17, 25, 33)),
        (hybrid(LAYOUT_8B), (1, 13, 25, 37, 49)),  # attention at 7, 18, 29, 40: none within 2
        (hybrid(LAYOUT_30B), (1, 12, 26, 37, 49)),  # 13 -> 12 and 25 -> 26
        (hybrid("M-*-M-*-"), (1, 2, 3, 4, 6)),  # 5 -> 6; 2 is a tap already, so 1 stays
    ],
)
def test_default_taps_follow_the_rule(spec, expected):
    assert default_taps(spec) == expected


@pytest.mark.parametrize("unit", ["M", "*", "M*", "MMM*", "-M*E"])
def test_default_taps_are_valid_for_every_size(unit):
    for layers, count in itertools.product(range(1, 24), [1, 2, 5, 9]):
        spec = hybrid((unit * layers)[:layers])
        taps = default_taps(spec, count)
        assert check_taps(spec, taps) == taps
        assert len(taps) == min(count, max(1, layers - 3))


@pytest.mark.parametrize(
    ("taps", "reason"),
    [
        ([], "no taps"),
        ([1, 7], "last layer"),
        ([1, 8], "out of range"),
        ([-2, 1], "out of range"),
        ([3, 1], "ascending"),
        ([1, 1], "ascending"),
        ([1, 2.5], "whole numbers"),
    ],
)
def test_bad_taps_are_refused_with_the_reason(taps, reason):
    with pytest.raises(InputError, match=reason) as caught:
        check_taps(decoder(8), taps)
    assert "1,2,3,4,5" in caught.value.do


def test_the_embedding_may_be_a_tap():
    assert check_taps(decoder(8), [-1, 3, 6]) == (-1, 3, 6)
