"""Every choice of taps follows its rule on real layouts and on small ones; bad taps are refused with the reason."""

import itertools

import pytest
from typer.testing import CliRunner

from nemotron_dspark.cli import app
from nemotron_dspark.config import DraftSection, load_config
from nemotron_dspark.drafts.config import build_draft_config
from nemotron_dspark.errors import InputError
from nemotron_dspark.recipe.tiny import decoder_config, nemotron_h_config
from nemotron_dspark.targets import spec_from_config
from nemotron_dspark.targets.spec import TargetSpec
from nemotron_dspark.targets.taps import attention_taps, check_taps, chosen_taps, default_taps, even_taps

LAYOUT_8B = "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"
LAYOUT_30B = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"


def hybrid(pattern: str) -> TargetSpec:
    return spec_from_config(nemotron_h_config(pattern).to_dict())


def decoder(layers: int) -> TargetSpec:
    return spec_from_config(decoder_config("llama", num_layers=layers).to_dict())


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


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (decoder(36), (1, 9, 17, 25, 33)),
        (hybrid(LAYOUT_8B), (1, 13, 25, 37, 49)),
        (hybrid(LAYOUT_30B), (1, 13, 25, 37, 49)),
        (hybrid("M-*-M-*-"), (1, 2, 3, 4, 5)),
    ],
)
def test_even_taps_are_the_spread_without_the_pull(spec, expected):
    assert even_taps(spec) == expected


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (decoder(36), (1, 9, 17, 25, 33)),  # every layer attends
        (hybrid(LAYOUT_8B), (7, 18, 29, 40, 49)),  # four attention layers; 49 is farther from them than 1
        (hybrid(LAYOUT_30B), (5, 12, 26, 33, 42)),  # five of 5, 12, 19, 26, 33, 42
        (hybrid("M-*-M-*-"), (2, 3, 4, 5, 6)),  # 2 and 6, then 4, then the later of equals
        (hybrid("*MMMMMM**"), (0, 2, 4, 6, 7)),  # 0 and 7, then 4 (the later of 3 and 4), 2, 6
    ],
)
def test_attention_taps_are_attention_layers_and_then_the_farthest(spec, expected):
    assert attention_taps(spec) == expected


@pytest.mark.parametrize("unit", ["*", "M*", "MMM*", "-M*E"])
def test_attention_taps_are_valid_for_every_size(unit):
    for layers, count in itertools.product(range(len(unit) + 1, 24), [1, 2, 5, 9]):
        spec = hybrid((unit * layers)[:layers])
        taps = attention_taps(spec, count)
        assert check_taps(spec, taps) == taps
        assert len(taps) == len(even_taps(spec, count))
        attention = sum(kind.attends for kind in spec.layers[:-1])
        assert sum(spec.layers[tap].attends for tap in taps) == min(len(taps), attention)


def test_attention_taps_of_a_target_without_attention_are_refused():
    with pytest.raises(InputError, match=r"No layer of .* has attention"):
        attention_taps(hybrid("MMMM-M"))


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


@pytest.mark.parametrize(
    ("text", "taps", "meant"),
    [
        ("even", "even", (1, 13, 25, 37, 49)),
        (" Attention ", "attention", (7, 18, 29, 40, 49)),
        ("1,5,19", [1, 5, 19], (1, 5, 19)),
        ("-1, 18", [-1, 18], (-1, 18)),
        ("7", [7], (7,)),
        ("null", None, (1, 13, 25, 37, 49)),
    ],
)
def test_the_config_accepts_what_the_flag_accepts(text, taps, meant):
    section = load_config(assignments=[f"draft.taps={text}"]).draft
    assert section.taps == taps
    assert chosen_taps(hybrid(LAYOUT_8B), section) == meant
    config, _ = build_draft_config(hybrid(LAYOUT_8B), section, mask_token_id=3)
    assert config.target_layer_ids == meant


def test_a_named_choice_takes_num_taps():
    assert chosen_taps(hybrid(LAYOUT_8B), DraftSection(taps="attention", num_taps=2)) == (7, 40)


@pytest.mark.parametrize("value", ["evn", "1,x", "1;2", "[1, 2.5]", "[a]", "true", "{a: 1}"])
def test_an_unknown_word_for_taps_is_refused(value):
    with pytest.raises(InputError, match=r"draft.taps = .* neither even nor attention nor a list"):
        load_config(assignments=[f"draft.taps={value}"])


@pytest.mark.parametrize(
    ("flag", "reason"),
    [("evn", "draft.taps = 'evn' is not"), ("1,7", "last layer"), ("1,8", "out of range")],
)
@pytest.mark.parametrize("command", ["inspect", "cache"])
def test_bad_taps_on_the_command_line_name_the_fault(command, flag, reason, tiny_hybrid, tmp_path):
    conversations = tmp_path / "conversations.jsonl"
    conversations.write_text("")
    more = ["build", "--data", str(conversations), "--out", str(tmp_path / "cache")] if command == "cache" else []
    result = CliRunner().invoke(app, [command, *more, "--target", str(tiny_hybrid), "--taps", flag])
    assert isinstance(result.exception, InputError)
    assert reason in result.exception.what
