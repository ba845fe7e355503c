"""The mask token is one that neither text nor chat template ever uses."""

import numpy as np
import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from nemotron_dspark.chat.mask_token import choose_mask_token, reserved_mask_token
from nemotron_dspark.errors import InputError
from nemotron_dspark.recipe import tiny
from nemotron_dspark.targets import spec_from_config


def make(added, template="{{ messages }}", words=0, **roles):
    vocabulary = {text: index for index, text in enumerate(added)} | {f"w{n}": len(added) + n for n in range(words)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token=added[0]))
    inner.add_special_tokens(added)
    return PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=template, **roles)


def spec(vocab_size):
    return spec_from_config(tiny.decoder_config("llama", vocab_size=vocab_size), "target")


def nemotron(template="{{ messages }}"):
    return make([f"<SPECIAL_{n}>" for n in range(1000)], template)


def test_nvidias_choice_for_nemotron_tokenizers():
    assert choose_mask_token(nemotron(), spec(131072)).id == 990


def test_nemotron_ids_that_others_use_are_avoided():
    chosen = choose_mask_token(nemotron("{{ '<SPECIAL_990>' }}"), spec(131072)).id
    assert chosen == 998  # 999 is padding in variants


def test_the_tokenizers_own_mask_token():
    tokenizer = make(["<unk>", "[MASK]", "<SPECIAL_5>"], mask_token="[MASK]")
    assert choose_mask_token(tokenizer, spec(64)).id == 1


@pytest.mark.parametrize(
    "name", ["<SPECIAL_14>", "<|reserved_special_token_7|>", "<|unused_1|>", "<unused17>", ">>UNUSED_9<<"]
)
def test_the_highest_reserved_token(name):
    chosen = choose_mask_token(make(["<unk>", "<SPECIAL_3>", name, "<|im_end|>"]), spec(64))
    assert chosen.id == 2
    assert name in chosen.reason


def test_never_a_token_that_the_template_prints_or_that_ends_a_text():
    tokenizer = make(
        ["<unk>", "<SPECIAL_3>", "<SPECIAL_11>", "<SPECIAL_12>"], "{{ '<SPECIAL_11>' }}", eos_token="<SPECIAL_12>"
    )
    assert choose_mask_token(tokenizer, spec(64)).id == 1


def test_a_row_without_a_token_when_nothing_is_reserved():
    assert choose_mask_token(make(["<unk>", "<|im_end|>"], words=10), spec(64)).id == 12


def test_nothing_suitable_is_said():
    with pytest.raises(InputError, match="no reserved token"):
        choose_mask_token(make(["<unk>", "<|im_end|>"], words=62), spec(64))


def test_a_tokenizer_without_one_to_spare_lends_what_the_data_never_uses():
    tokenizer = make(["<unk>", "<|im_end|>", "<gh_stars>", "<file_sep>"], "{{ '<|im_end|>' }}", words=60)
    assert reserved_mask_token(tokenizer, spec(64)) is None
    samples = [np.array([0, 1, 7, 63]), np.array([3, 7])]
    chosen = choose_mask_token(tokenizer, spec(64), samples=samples)
    assert chosen.id == 2
    assert "<gh_stars>" in chosen.reason
    assert "6 tokens" in chosen.reason
    chosen = choose_mask_token(tokenizer, spec(64), samples=[*samples, np.array([2])])
    assert chosen.id == 62  # 63 is used
    with pytest.raises(InputError, match="Every token"):
        choose_mask_token(tokenizer, spec(64), samples=[np.arange(64)])


def test_a_reserved_token_beyond_the_embedding_is_no_choice():
    with pytest.raises(InputError, match="no reserved token"):
        choose_mask_token(make(["<unk>", "a", "b", "<SPECIAL_3>"]), spec(3))


@pytest.mark.parametrize(("override", "said"), [(64, "outside"), (-1, "outside"), (2, "SPECIAL_11")])
def test_an_override_must_be_a_free_id_of_the_vocabulary(override, said):
    tokenizer = make(["<unk>", "<SPECIAL_3>", "<SPECIAL_11>"], "{{ '<SPECIAL_11>' }}")
    with pytest.raises(InputError, match=said):
        choose_mask_token(tokenizer, spec(64), override=override)


def test_an_override_is_taken():
    assert choose_mask_token(make(["<unk>", "<SPECIAL_3>"]), spec(64), override=40).id == 40
