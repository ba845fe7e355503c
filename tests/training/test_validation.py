"""A held-out part: never trained on, measured alike every time, and the best draft is the one that is published."""

import json
import threading

import pytest
import torch

from nemotron_dspark.errors import InputError
from nemotron_dspark.training.batches import Loader
from nemotron_dspark.training.callbacks import Callback
from nemotron_dspark.training.checkpoints import list_checkpoints, step_folder
from nemotron_dspark.training.metrics import read_lines
from nemotron_dspark.training.source import CacheSource
from nemotron_dspark.training.trainer import Trainer
from nemotron_dspark.training.validation import FILE, split
from tests.drafts.conftest import block_logits
from tests.training.test_trainer import StopAt, assert_same, weights

HELD = {"validation": 0.25, "validate_every": 2, "max_steps": 8, "global_batch_size": 4}


def written(folder):
    return read_lines(folder / FILE)


def test_a_conversation_is_on_one_side_whatever_the_order(make_cache):
    cache = make_cache(40)
    source = CacheSource(cache)
    trained, held = split(source, 0.25)
    assert 0 < len(held) < 20
    assert len(trained.lengths) + len(held) == 40
    openings = [source.opening(at).tobytes() for at in range(40)]
    inside = {openings[at] for at in held}
    assert all((opening in inside) == (at in held) for at, opening in enumerate(openings))
    cache._samples.reverse()
    assert sorted(39 - split(CacheSource(cache), 0.25)[1]) == held.tolist()
    assert (split(CacheSource(make_cache(40)), 0.5)[1][:, None] == held).any(0).all()  # a larger share holds it too


def test_held_out_samples_are_never_trained_on(make_cache, make_draft, make_settings, tmp_path):
    cache = make_cache(24)
    held = set(split(CacheSource(cache), 0.25)[1].tolist())
    seen = set()

    class Watched(CacheSource):
        def samples(self, ids, step):
            if threading.current_thread() is not threading.main_thread():  # the one that reads ahead, for steps
                seen.update(ids)
            return super().samples(ids, step)

    trainer = Trainer(Watched(cache), make_draft(cache=cache), make_settings(**HELD), tmp_path)
    trainer.run()
    assert seen == set(range(24)) - held


def test_what_is_measured_is_the_objective_over_the_held_out_samples(make_cache, make_draft, make_settings, tmp_path):
    cache, draft = make_cache(24), make_draft(cache=make_cache(24))
    trainer = Trainer(cache, draft, make_settings(**HELD, lr=2e-2), tmp_path)
    trainer.run()
    line, held = written(tmp_path)[-1], trainer.validation.ids
    load = Loader(CacheSource(cache), trainer.schedule, 42, draft.config.num_anchors, draft.config.block_size, True)
    with torch.no_grad():
        batch = load(0, held)
        sums = trainer.objective(batch).sums
        at = batch.anchors[..., None] + torch.arange(draft.config.block_size)  # [B, A, γ]
        rows, last = torch.arange(len(at))[:, None, None], batch.input_ids.shape[1] - 1
        hidden = draft(batch.input_ids, batch.taps, batch.anchors, batch.block_mask)
        drafted = block_logits(draft, hidden, batch.input_ids[rows, at.clamp(max=last)]).argmax(-1)
        seen = batch.last[rows, at.clamp(max=last)].float()
        likeliest = draft.finish_target_logits(seen @ draft.target_head.mT).argmax(-1)
        same = (drafted == likeliest)[batch.slot_mask]
    assert line["loss"] == pytest.approx(float(sums.loss / sums.weight), rel=1e-6)
    assert line["tau"] == pytest.approx(float(sums.tau / sums.blocks), rel=1e-6)
    assert 0 < line["top1"] < 1
    assert line["top1"] == pytest.approx(float(same.float().mean()), rel=1e-6)
    assert line["accept_rate"] == pytest.approx((sums.accepted / sums.slots).tolist(), rel=1e-6)


def test_a_run_with_validation_trains_as_one_on_the_other_samples_alone(
    make_cache, make_draft, make_settings, tmp_path
):
    cache = make_cache(24)
    kept = split(CacheSource(cache), 0.25)[0]
    with_part, alone = make_draft(cache=cache), make_draft(cache=cache)
    Trainer(cache, with_part, make_settings(**HELD), tmp_path / "one").run()
    Trainer(kept, alone, make_settings(**HELD | {"validation": 0.0}), tmp_path / "two").run()
    assert_same(weights(with_part), weights(alone))


def test_the_best_checkpoint_is_kept_and_published(make_cache, make_draft, make_settings, tmp_path, monkeypatch):
    cache, heard = make_cache(24), []

    class Heard(Callback):
        def on_message(self, text):
            heard.append(text)

        def on_validation(self, metrics, best):
            heard.append((metrics.step, best))

    monkeypatch.setattr(
        "nemotron_dspark.training.validation.score",
        staticmethod(lambda line: {4: 2.0}.get(line["step"], 1)),
    )
    settings = make_settings(**HELD, keep_checkpoints=1)
    found = Trainer(cache, make_draft(cache=cache), settings, tmp_path, callbacks=[Heard()]).run()
    assert [line["step"] for line in written(tmp_path)] == [2, 4, 6, 8]
    assert heard[:4] == [(2, True), (4, True), (6, False), (8, False)]
    assert "were best at step 4" in heard[-1]
    assert "the draft of step 4 is the one that is published" in heard[-1]
    assert found.checkpoint == step_folder(tmp_path / "checkpoints", 4)
    assert list_checkpoints(tmp_path / "checkpoints") == [
        step_folder(tmp_path / "checkpoints", step) for step in (4, 8)
    ]
    again = Trainer(cache, make_draft(cache=cache), settings, tmp_path).run()
    assert (again.steps, again.checkpoint) == (8, found.checkpoint)


def test_patience_ends_a_run_that_gets_no_better_and_it_stays_ended(
    make_cache, make_draft, make_settings, tmp_path, monkeypatch
):
    monkeypatch.setattr("nemotron_dspark.training.validation.score", lambda line: -line["step"])
    cache, settings = make_cache(24), make_settings(**HELD, patience=2)
    found = Trainer(cache, make_draft(cache=cache), settings, tmp_path).run()
    assert (found.steps, found.checkpoint.name) == (6, "step-00000002")
    again = Trainer(cache, make_draft(cache=cache), settings, tmp_path).run()
    assert (again.steps, again.resumed_from, again.checkpoint) == (6, 6, found.checkpoint)


def test_a_stopped_run_measures_the_same(make_cache, make_draft, make_settings, tmp_path):
    cache, settings = make_cache(24), make_settings(**HELD, checkpoint_every=3)
    whole, stopped = make_draft(cache=cache), make_draft(cache=cache)
    Trainer(cache, whole, settings, tmp_path / "whole").run()
    with pytest.raises(KeyboardInterrupt):
        Trainer(cache, stopped, settings, tmp_path / "stopped", callbacks=[StopAt(4)]).run()
    with open(tmp_path / "stopped" / FILE, "a") as file:  # of steps after the checkpoint, as a kill would leave it
        file.write(json.dumps(written(tmp_path / "stopped")[0] | {"step": 6}) + '\n{"st')
    stopped = make_draft(cache=cache)
    Trainer(cache, stopped, settings, tmp_path / "stopped").run()
    assert_same(weights(stopped), weights(whole))
    assert written(tmp_path / "stopped") == written(tmp_path / "whole")


def test_a_part_that_would_be_empty_is_refused(make_cache):
    with pytest.raises(InputError, match=r"holds out (all|none) of 2 samples"):
        split(CacheSource(make_cache(2)), 1e-9)
    source = CacheSource(make_cache(4))
    assert split(source, 0.0)[0] is source
