"""A draft of a part of the vocabulary: which part, trained and gone on with, on disk, decoded, and what is refused."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from nemotron_dspark.chat.mask_token import special_ids
from nemotron_dspark.config import load_config
from nemotron_dspark.decoding.decoder import Decoder
from nemotron_dspark.decoding.pair import load_draft
from nemotron_dspark.decoding.sampling import Sampling
from nemotron_dspark.drafts import kinds
from nemotron_dspark.drafts.vocabulary import most_used
from nemotron_dspark.errors import InputError
from nemotron_dspark.targets import Target
from tests.caches import write_cache
from tests.training import small_cache
from tests.training.runs import train_run
from tests.training.test_trainer import StopAt

TAPS = (1, 2, 3, 4, 5)


@pytest.fixture(scope="module")
def cache(tmp_path_factory, tiny_hybrid):
    folder = tmp_path_factory.mktemp("vocabulary") / "cache"
    write_cache(folder, small_cache.samples(taps=TAPS), taps=TAPS, hidden_size=64)
    return folder


def config(*more):
    return load_config(assignments=[*small_cache.SETTINGS, "draft.intermediate_size=64", *more])


def test_the_tokens_that_carry_loss_most_often_are_taken_and_those_that_must_be_kept():
    samples = [(np.array([5, 5, 7, 7, 7, 9]), np.array([1, 1, 1, 1, 0, 0])), (torch.tensor([2, 3, 7]), [0, 1, 1])]
    tokens, share = most_used(samples, 3, 12, {11})  # 7 three times, 5 twice, 3 once
    assert tokens.tolist() == [5, 7, 11]
    assert share == 5 / 6
    assert most_used(samples, 5, 12, {11})[0].tolist() == [0, 3, 5, 7, 11]  # of those never seen the lowest


@pytest.mark.parametrize("kind", ["dspark", "eagle3"])
def test_a_kind_drafts_the_most_used_tokens_and_decodes_without_loss(tiny_hybrid, cache, tmp_path, kind):
    asked = config(f"draft.kind={kind}", "draft.vocabulary=80", "train.max_steps=1")
    report = train_run(str(tiny_hybrid), cache, tmp_path / "run", asked)
    assert any("80 of 384 tokens, which are " in note for note in report.notes)
    target = Target.load(str(tiny_hybrid))
    draft = load_draft(tmp_path / "run" / "draft", target)
    chosen = set(draft.vocabulary.tolist())
    kept = special_ids(target.tokenizer, target.spec) | {draft.config.mask_token_id} - {None}
    answers = torch.cat([sample.input_ids[sample.loss_mask] for sample in small_cache.samples(taps=TAPS)])
    counted = torch.bincount(answers, minlength=384)
    assert kept <= chosen  # special tokens, and the mask token where there is one
    assert counted[sorted(set(range(384)) - chosen)].max() <= counted[sorted(chosen - kept)].min()
    assert torch.equal(draft.lm_head.weight, target.head.weight[draft.vocabulary])
    prompt, greedy = list(range(40, 61)), Sampling(max_new_tokens=12)
    found = Decoder(target, draft).generate(prompt, greedy)
    assert found.tokens == Decoder(target).generate(prompt, greedy).tokens
    assert {token for block in found.drafted for token in block} <= chosen


def test_a_run_that_was_stopped_ends_in_the_same_draft_and_another_starts_from_it(tiny_hybrid, cache, tmp_path):
    asked = config("draft.vocabulary=80")
    with pytest.raises(KeyboardInterrupt):
        train_run(str(tiny_hybrid), cache, tmp_path / "run", asked, callbacks=[StopAt(2)])
    train_run(str(tiny_hybrid), cache, tmp_path / "run", asked)
    train_run(str(tiny_hybrid), cache, tmp_path / "whole", asked)
    first, second = (tmp_path / run / "draft" / "model.safetensors" for run in ("run", "whole"))
    assert first.read_bytes() == second.read_bytes()
    again = config("train.max_steps=1", f"train.init={tmp_path / 'run' / 'draft'}")
    train_run(str(tiny_hybrid), cache, tmp_path / "further", again)
    parts = [kinds.load(tmp_path / run / "draft").vocabulary for run in ("run", "further")]
    assert torch.equal(*parts)


@pytest.mark.parametrize(
    ("size", "sentence"),
    [
        (2, r"2, fewer than the target's \d+ special tokens"),
        (400, "400, and the target has 384 tokens"),
    ],
)
def test_a_vocabulary_that_no_draft_can_have_is_refused_before_the_folder_is_touched(
    tiny_hybrid, cache, tmp_path, size, sentence
):
    with pytest.raises(InputError, match=sentence):
        train_run(str(tiny_hybrid), cache, tmp_path / "run", config(f"draft.vocabulary={size}"))
    assert not (tmp_path / "run").exists()


def test_a_vocabulary_of_all_tokens_is_no_part_of_it(tiny_hybrid, cache, tmp_path):
    train_run(str(tiny_hybrid), cache, tmp_path / "run", config("draft.vocabulary=384"))
    assert kinds.load(tmp_path / "run" / "draft").vocabulary is None


def test_a_draft_whose_tokens_are_not_the_target_s_is_refused(tiny_hybrid, cache, tmp_path):
    report = train_run(str(tiny_hybrid), cache, tmp_path / "run", config("draft.vocabulary=100"))
    weights = tmp_path / "run" / "draft" / "model.safetensors"
    tensors = load_file(weights)
    save_file(tensors | {"d2t": tensors["d2t"] + 300}, weights)
    with pytest.raises(InputError, match="d2t does not name tokens of the target"):
        kinds.load(report.draft_folder)
