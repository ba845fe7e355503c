"""A budget of time becomes a number of steps, and fewer anchors where it is short."""

import pytest
import torch

import nemotron_dspark as nds
from nemotron_dspark.cli.shell import duration
from nemotron_dspark.config import TrainConfig, load_config
from nemotron_dspark.distributed import SINGLE, DistContext
from nemotron_dspark.errors import InputError
from nemotron_dspark.training import budget
from nemotron_dspark.training.schedule import SampleSchedule
from tests.caches import write_cache
from tests.training.small_cache import samples

SAMPLES, SETUP = 400, 5.0


class Clock:
    """Seconds that only pass when somebody works."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(budget, "time", made)
    return made


def seconds_of(anchors, per_anchor=0.01):
    """Of a micro-batch."""
    return 0.2 + per_anchor * anchors


@pytest.fixture
def trial(clock):
    """A run whose micro-batches cost `seconds_of` their anchors; it remembers them."""

    def run(config, pace):
        run.anchors.append(config.num_anchors)
        clock.now += SETUP
        pace.on_begin(SampleSchedule.of(config, SAMPLES), 0)
        for step in range(config.max_steps):
            clock.now += 3.0 if step == 0 else seconds_of(config.num_anchors)  # the first warms up
            pace.on_micro_batch(step, 1)
        raise AssertionError("it was to end by itself")

    run.anchors = []
    return run


def settings(**changes):
    return TrainConfig(**({"global_batch_size": 4, "num_anchors": 128, "epochs": 10} | changes))


def test_a_long_budget_leaves_anchors_and_epochs_as_they_are(clock, trial):
    found = budget.fit(settings(), 1e6, trial, SINGLE)
    assert found.max_steps == 10 * 100
    assert found.num_anchors == 128
    assert trial.anchors == [128]


def test_measuring_and_training_together_keep_to_the_budget(clock, trial):
    found = budget.fit(settings(), 2500.0, trial, SINGLE)
    assert found.num_anchors == 128
    spent = clock.now + SETUP + found.max_steps * 4 * seconds_of(128)
    assert 0.93 * 2500 < spent <= 0.95 * 2500
    assert 3 * 100 <= found.max_steps < 10 * 100


def test_a_short_budget_draws_fewer_anchors_until_three_epochs_fit(clock, trial):
    found = budget.fit(settings(), 1200.0, trial, SINGLE)
    assert trial.anchors == [128, 16, found.num_anchors]
    assert found.num_anchors in (64, 32)
    assert found.max_steps >= 3 * 100
    before = clock.now - (SETUP + 3.0 + 42 * seconds_of(found.num_anchors))
    assert before + 2 * SETUP + (3 * 100 * 4 + 40) * seconds_of(2 * found.num_anchors) > 0.95 * 1200  # twice as many
    assert clock.now + SETUP + found.max_steps * 4 * seconds_of(found.num_anchors) <= 1200


def test_a_budget_that_ends_before_ten_steps_is_refused_with_what_would_do(clock, trial):
    with pytest.raises(InputError, match=r"ends after \d optimiser steps.*Give at least [\d.]+ minutes"):
        budget.fit(settings(num_anchors=16), 42.0, trial, SINGLE)


def test_held_out_samples_are_no_part_of_an_epoch(clock, trial):
    assert budget.fit(settings(validation=0.25), 1e6, trial, SINGLE).max_steps == 10 * 75


def test_all_processes_end_a_trial_at_the_same_micro_batch(clock):
    """Another one has not had enough when this one has: it goes on until both have."""

    class Pair(DistContext):
        world_size, votes = 2, []

        def all_reduce_sum(self, values):
            if values.dtype == torch.bool:
                self.votes.append(bool(values))
                return values.double() * (len(self.votes) > 2)
            return 2 * values.double()

    def trial(config, pace):
        pace.on_begin(SampleSchedule.of(config, SAMPLES, Pair()), 0)
        for step in range(config.max_steps):
            clock.now += 100.0
            pace.on_micro_batch(step, 1)

    found = budget.fit(settings(num_anchors=16, epochs=100), 1e6, trial, Pair())
    assert Pair.votes == [True, True, True]
    assert found.max_steps == int((0.95e6 - clock.now) / 200)


def test_a_run_keeps_the_steps_that_its_budget_held(tiny_hybrid, tmp_path, monkeypatch):
    extra = {"target_model_name_or_path": str(tiny_hybrid)}
    write_cache(tmp_path / "cache", samples(), taps=(1, 4), hidden_size=64, extra=extra)
    config = load_config(
        str(tiny_hybrid),
        draft={"num_layers": 1, "taps": [1, 4], "block_size": 3, "intermediate_size": 64},
        train={"global_batch_size": 2, "local_batch_size": 2, "num_anchors": 4, "epochs": 12, "precision": "fp32"},
    )
    first = nds.train(config, tmp_path / "run", cache=tmp_path / "cache", budget=600.0)
    assert first.steps >= 12
    assert not list(tmp_path.glob(".*pace"))
    monkeypatch.setattr(budget, "_Pace", None)  # it is not measured again
    again = nds.train(config, tmp_path / "run", cache=tmp_path / "cache", budget=1.0)
    assert (again.steps, again.resumed_from) == (first.steps, first.steps)
    both = config.model_copy(update={"train": config.train.model_copy(update={"max_steps": 3})})
    with pytest.raises(InputError, match=r"Both a budget and train\.max_steps"):
        nds.train(both, tmp_path / "other", cache=tmp_path / "cache", budget=60.0)


@pytest.mark.parametrize(
    ("text", "seconds"), [("8h", 28800), ("90m", 5400), ("1.5 min", 90), ("45s", 45), ("1d", 86400)]
)
def test_durations_are_read_as_people_write_them(text, seconds):
    assert duration("--budget", text) == seconds


@pytest.mark.parametrize("text", ["8", "h", "-1h", "0s", "tonight"])
def test_other_durations_are_refused(text):
    with pytest.raises(InputError, match="is no duration"):
        duration("--budget", text)
