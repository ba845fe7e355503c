"""What a schedule decides is what trying everything would decide; test_lossless.py has what comes out."""

import dataclasses
import itertools
import random

import pytest

from nemotron_dspark.decoding.decoder import Decoder
from nemotron_dspark.decoding.sampling import Sampling
from nemotron_dspark.decoding.schedule import Acceptance, Cost, Schedule, Threshold, best_length, schedule_for, survival
from nemotron_dspark.drafts.costs import CostTable
from nemotron_dspark.errors import InputError
from tests.decoding.test_lossless import GAMMA, make_draft, prompts, table, target

__all__ = ["prompts", "target"]  # fixtures


@dataclasses.dataclass(eq=False)
class Answer:
    """A request of which a schedule is told what was kept."""

    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    proposed: list[int] = dataclasses.field(default_factory=list)
    survived: list[int] = dataclasses.field(default_factory=list)
    accepted: list[int] = dataclasses.field(default_factory=list)

    def gain(self, schedule: Cost, length: int, kept: int) -> None:
        self.proposed.append(length)
        self.survived.append(min(length, kept))
        self.accepted.append(min(length, kept) + 1)
        schedule.learn(self)


# --- pure functions ---


def test_one_length_for_all_is_the_best_of_all_prefixes():
    """Against every choice of a prefix of each request, on costs that rise in stairs."""
    draws = random.Random(0)
    for _ in range(200):
        rows, gamma = draws.randint(1, 3), draws.randint(1, 4)
        foretold = [survival([draws.random() for _ in range(gamma)]) for _ in range(rows)]
        seconds = list(itertools.accumulate(draws.choice((0.02, 0.1, 2.0)) for _ in range(gamma + 1)))

        def speed(prefixes, foretold=foretold, seconds=seconds):
            gained = sum(1 + sum(row[:length]) for row, length in zip(foretold, prefixes, strict=True))
            return gained / seconds[max(prefixes)]

        best = max(map(speed, itertools.product(range(gamma + 1), repeat=rows)))
        assert speed([best_length(foretold, seconds)] * rows) == pytest.approx(best)


def test_the_maximum_is_sought_behind_a_stair():
    foretold = [[0.9, 0.85, 0.8, 0.75]]
    assert best_length(foretold, [1.0, 2.0, 2.0, 2.0, 2.0]) == 4
    assert best_length(foretold, [1.0, 2.0, 4.0, 8.0, 16.0]) == 0


def test_shares_begin_with_the_prior_and_forget_what_is_old():
    found = Acceptance(2, memory=10)
    assert found.shares([0.7, 0.6]) == [0.7, 0.6]
    for _ in range(200):
        found.add(kept=0, judged=2)
    assert found.shares([0.7, 0.6])[0] < 0.15
    assert found.shares([0.7, 0.6])[1] == 0.6  # never tried
    for _ in range(40):
        found.add(kept=2, judged=2)
    assert min(found.shares([0.7, 0.6])) > 0.8


def test_behind_a_stop_token_nothing_was_tried():
    schedule, answer = Cost(table(3, 0.1)), Answer()
    schedule.begin([answer], 3)
    answer.proposed, answer.survived, answer.accepted = [3], [1], [1]  # the first draft was a stop token
    schedule.learn(answer)
    shares = schedule._own[answer].shares([0.0] * 3)
    assert shares[0] > 0
    assert shares[1:] == [0.0, 0.0]
    assert schedule._own[answer]._tried[1] == 0


# --- when it drafts ---


def test_a_request_whose_draft_never_pays_stops_and_tries_again():
    schedule, answer = Cost(table(4, step=0.3, draft=0.5)), Answer()
    lengths = []
    for _ in range(2000):
        (length,) = schedule.begin([answer], 4).lengths
        lengths.append(length)
        answer.gain(schedule, length, kept=0)
    seconds = sum(schedule._costs.rounds(1)[length] for length in lengths)
    assert lengths[0] > 0
    assert sum(length > 0 for length in lengths[1000:]) >= 3  # it goes on trying
    assert seconds < 1.02 * 2000  # of plain rounds, although it does
    before = len(lengths)
    while len(lengths) < before + 1000:  # the text has become easy
        (length,) = schedule.begin([answer], 4).lengths
        lengths.append(length)
        answer.gain(schedule, length, kept=4)
    assert lengths[-100:] == [4] * 100


def test_length_follows_the_number_of_requests():
    """Costs of a machine that reads weights at one request and computes at many."""
    few, many = (1.0, 1.05, 1.1, 1.15, 1.2), (2.0, 4.0, 6.0, 8.0, 10.0)
    costs = CostTable((1, 32), (few, many), ((0.0, *[0.2] * 4),) * 2)
    schedule = Cost(costs)
    answers = [Answer() for _ in range(32)]
    for _ in range(40):
        schedule.begin(answers[:1], 4)
        answers[0].gain(schedule, 4, kept=2)
    assert schedule.begin(answers[:1], 4).lengths[0] >= 2
    assert schedule.begin(answers, 4).lengths[0] < schedule.begin(answers[:1], 4).lengths[0]


def test_a_request_that_wants_no_drafts_gets_none():
    schedule = Cost(table(3, 0.01))
    wanting, other = Answer(), Answer(Sampling(speculative=False))
    assert schedule.begin([wanting, other], 3).lengths == [3, 0]
    assert schedule.begin([other], 3).lengths == [0]


def test_a_block_ends_where_the_rest_does_not_pay_and_not_before_a_stair_that_does():
    schedule = Cost(table(3, step=0.5), "confidence head")
    answers = [Answer(), Answer()]
    for answer in answers:
        answer.gain(schedule, 3, kept=3)
    plan = schedule.begin(answers, 3)
    assert plan.lengths == [3, 3]
    plan.look(0, [0.99, 0.95])
    assert plan.lengths == [3, 3]
    plan.look(1, [0.05, 0.02])
    assert plan.lengths == [1, 1]
    stairs = CostTable((1,), ((1.0, 1.5, 1.9, 1.9),), ((0.0,) * 4,))
    schedule = Cost(stairs, "confidence head")
    answer = Answer()
    for _ in range(50):
        schedule.begin([answer], 3)
        answer.gain(schedule, 3, kept=3)
    schedule._arms.clear()  # as if it had not compared yet
    plan = schedule.begin([answer], 3)
    plan.look(0, [0.85])  # alone it does not pay, with the last one, which is free, it does
    assert plan.lengths == [3]
    plan.look(1, [0.1])
    assert plan.lengths == [1]


@pytest.mark.parametrize("tells", [True, False])
def test_chances_are_followed_where_they_gain_more_than_lengths_that_do_not_look(tells):
    """Half of the rounds keep all, half nothing; the chances tell which, or they tell the contrary."""
    costs, answer = table(4, step=0.4, draft=0.05), Answer()
    schedule, draws, tokens, seconds, fixed = Cost(costs, "confidence head"), random.Random(0), 0, 0.0, [0.0] * 5
    begun = costs.rounds(1)
    for _ in range(3000):
        kept = draws.choice((0, 4))
        plan = schedule.begin([answer], 4)
        for slot in range(max(plan.lengths)):
            if plan.signal is not None and plan.lengths[0] > slot:
                plan.look(slot, [0.97 if (kept > 0) == tells else 0.03])
        (length,) = plan.lengths
        answer.gain(schedule, length, kept)
        tokens, seconds = tokens + 1 + min(kept, length), seconds + begun[length]
        fixed = [total + 1 + min(kept, at) for at, total in enumerate(fixed)]
    best = max(total / (3000 * each) for total, each in zip(fixed, begun, strict=True))
    gain = tokens / seconds / best
    assert gain > 1.3 if tells else 0.94 < gain <= 1.0


def test_what_looking_gained_of_greedy_requests_is_not_expected_of_sampled_ones():
    costs = table(4, step=0.4, draft=0.05)
    schedule, begun = Cost(costs, "confidence head"), costs.rounds(1)

    def decode(answer, rounds, kept):
        seconds = 0.0
        for _ in range(rounds):
            plan = schedule.begin([answer], 4)
            for slot in range(max(plan.lengths)):
                if plan.signal is not None and plan.lengths[0] > slot:
                    plan.look(slot, [0.97])  # of sampled ones that is wrong
            (length,) = plan.lengths
            answer.gain(schedule, length, kept)
            seconds += begun[length]
        return seconds

    decode(Answer(), 300, kept=4)
    assert decode(Answer(Sampling(temperature=1.0)), 100, kept=0) < 1.25 * 100 * begun[0]


def test_chances_are_not_looked_at_where_looking_costs_more_than_it_can_save():
    flat = CostTable((1,), ((1.0, 1.1, 1.15, 1.2),), ((0.0,) * 4,))
    assert Cost(flat, "confidence head").begin([Answer()], 3).signal is None
    assert Cost(table(3, step=0.5), "confidence head").begin([Answer()], 3).signal == "confidence head"


# --- in a decoder ---


def test_rounds_without_drafts_are_read_before_the_next_block(target, prompts, monkeypatch):
    """The draft sees the same context whether it read plain rounds one by one or later together."""

    class NowAndThen(Schedule):
        def begin(self, generations, gamma):
            plan = super().begin(generations, gamma)
            if len(generations[0].proposed) % 4:
                plan.lengths = [0] * len(generations)
            return plan

    drafted = []
    for at_once in (1, 64):
        monkeypatch.setattr("nemotron_dspark.decoding.decoder._UNREAD", at_once)
        decoder = Decoder(target, make_draft(target), schedule=NowAndThen())
        settings = Sampling(temperature=0.0, max_new_tokens=24)
        batch = [decoder.start(prompt, settings) for prompt in prompts[:3]]
        late = None
        while any(generation.finished is None for generation in batch):
            decoder.step(batch)
            if late is None and batch[0].rounds == 6:  # in the middle of plain rounds
                late = decoder.start(prompts[3], settings)
                batch.append(late)
        drafted.append([generation.drafted for generation in batch])
        assert any(block for blocks in drafted[-1] for block in blocks)
    assert drafted[0] == drafted[1]


# --- what a configuration says ---


def test_a_configuration_names_a_schedule(target, tmp_path):
    draft = make_draft(target)
    assert type(schedule_for("off", draft)) is Schedule
    assert type(schedule_for("cost", None)) is Schedule
    assert schedule_for("threshold", draft).least == 0.5
    assert isinstance(schedule_for("threshold:0.3", draft), Threshold)
    with pytest.raises(InputError, match="not profiled"):
        schedule_for("cost", draft)
    draft.costs = table(GAMMA, 0.1)
    assert schedule_for("cost", draft).signal == "confidence head"
    headless = make_draft(target, confidence_head=False)
    headless.costs = draft.costs
    assert schedule_for("cost", headless).signal is None
    headless.lines = {0.0: ((1.0,) * GAMMA, (0.0,) * GAMMA)}
    assert schedule_for("cost", headless).signal == "margin"
    with pytest.raises(InputError, match="no confidence head"):
        schedule_for("threshold:0.3", headless)
