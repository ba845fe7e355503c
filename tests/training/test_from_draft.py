"""A run that starts from a draft has its shape and its weights, whatever kind it is of."""

import pytest
import torch

from nemotron_dspark import files
from nemotron_dspark.config import load_config
from nemotron_dspark.drafts import kinds
from nemotron_dspark.drafts.config import read_draft_config
from nemotron_dspark.errors import InputError
from nemotron_dspark.training.metrics import read_metrics
from tests.caches import write_cache
from tests.training.runs import train_run
from tests.training.small_cache import samples

TAPS = {"dspark": (1, 4), "dflash": (1, 4), "eagle3": (1, 2, 3, 4, 5)}
TRAIN = ("train.global_batch_size=4", "train.num_anchors=8", "train.device=cpu", "train.log_every=1")
SHAPE = ("draft.block_size=3", "draft.intermediate_size=64", "train.precision=fp32")


def config(*more):
    return load_config(assignments=[*TRAIN, *more])


@pytest.fixture(params=list(TAPS))
def kind(request):
    return request.param


@pytest.fixture
def cache(kind, tmp_path, tiny_hybrid):
    extra = {"target_model_name_or_path": str(tiny_hybrid)}
    write_cache(tmp_path / "cache", samples(taps=TAPS[kind]), taps=TAPS[kind], hidden_size=64, extra=extra)
    return tmp_path / "cache"


@pytest.fixture
def draft(kind, cache, tiny_hybrid, tmp_path):
    """One of another shape than the settings below would give."""
    shape = [*SHAPE, f"draft.kind={kind}", *(["draft.num_layers=1"] if kind != "eagle3" else [])]
    settings = config(*shape, "train.max_steps=6", "train.lr=3e-2")
    return train_run(str(tiny_hybrid), cache, tmp_path / "first", settings).draft_folder


def test_it_begins_where_the_other_ended_and_then_learns(kind, draft, cache, tiny_hybrid, tmp_path):
    started = ("train.max_steps=2", "train.precision=fp32", f"train.init={draft}")
    still = train_run(str(tiny_hybrid), cache, tmp_path / "still", config(*started, "train.lr=1e-12"))
    given, found = kinds.load(draft), kinds.load(still.draft_folder)
    assert found.config.model_dump(exclude={"num_anchors"}) == given.config.model_dump(exclude={"num_anchors"})
    for name, parameter in found.trainable_parameters().items():
        torch.testing.assert_close(parameter, given.trainable_parameters()[name], rtol=1e-5, atol=1e-6)
    assert any("the draft starts as the one in" in note for note in still.notes)
    moved = train_run(str(tiny_hybrid), cache, tmp_path / "moved", config(*started, "train.lr=1e-2"))
    again = kinds.load(moved.draft_folder).trainable_parameters()
    assert any(not torch.equal(parameter, again[name]) for name, parameter in found.trainable_parameters().items())


def test_its_first_loss_is_lower_than_that_of_random_weights(draft, kind, cache, tiny_hybrid, tmp_path):
    losses = []
    for name, init in (("warm", f"train.init={draft}"), ("random", f"draft.kind={kind}")):
        settings = config(*SHAPE, "train.max_steps=1", init)
        train_run(str(tiny_hybrid), cache, tmp_path / name, settings)
        losses.append(read_metrics(tmp_path / name)[0]["loss"])
    assert losses[0] < losses[1]


def test_another_kind_than_asked_for_is_refused(draft, kind, cache, tiny_hybrid, tmp_path):
    other = "dspark" if kind != "dspark" else "eagle3"
    with pytest.raises(InputError, match=f"is of the kind {kind}, and draft.kind is {other}"):
        train_run(str(tiny_hybrid), cache, tmp_path / "run", config(f"train.init={draft}", f"draft.kind={other}"))


@pytest.mark.parametrize("kind", ["dspark"], indirect=True)
def test_a_draft_that_does_not_fit_is_refused_before_the_folder_is_taken(draft, tiny_hybrid, tmp_path):
    extra = {"target_model_name_or_path": str(tiny_hybrid)}
    write_cache(tmp_path / "others", samples(taps=(2, 5)), taps=(2, 5), hidden_size=64, extra=extra)
    with pytest.raises(InputError, match=r"asks for layers \[1, 4\], the cache holds \[2, 5\]"):
        train_run(str(tiny_hybrid), tmp_path / "others", tmp_path / "run", config(f"train.init={draft}"))
    with pytest.raises(InputError, match=r"is not a draft: it has no config\.json"):
        train_run(str(tiny_hybrid), tmp_path / "others", tmp_path / "run", config("train.init=nowhere"))
    values = read_draft_config(draft).to_json() | {"hidden_size": 32}
    (tmp_path / "narrow").mkdir()
    files.write_json(tmp_path / "narrow" / "config.json", values)
    with pytest.raises(InputError, match="its hidden size is 32"):
        train_run(str(tiny_hybrid), tmp_path / "others", tmp_path / "run", config(f"train.init={tmp_path / 'narrow'}"))
    assert not (tmp_path / "run").exists()
