"""What is kept of prompts and answers changes nothing but what is read."""

import dataclasses
import itertools
import random

import pytest
import torch

from nemotron_dspark.config import DraftSection
from nemotron_dspark.decoding.decoder import Decoder
from nemotron_dspark.decoding.prefixes import Prefixes
from nemotron_dspark.decoding.sampling import Sampling
from nemotron_dspark.drafts.config import build_draft_config
from nemotron_dspark.drafts.dspark import DSparkDraft
from nemotron_dspark.drafts.eagle3 import Eagle3Draft
from nemotron_dspark.recipe import tiny
from nemotron_dspark.targets import Target

SAMPLING = Sampling(temperature=0.0, max_new_tokens=12)
KINDS = {"dspark": DSparkDraft, "eagle3": Eagle3Draft}


@pytest.fixture(scope="module")
def targets(tmp_path_factory) -> dict[str, Target]:
    folder = tmp_path_factory.mktemp("prefixes")
    hybrid = tiny.random_target(folder / "hybrid", pattern="M*-M")
    return {
        "hybrid": Target.load(str(hybrid)),
        "llama": Target.load(str(tiny.random_target(folder / "llama", family="llama"))),
    }


def make_draft(target: Target, kind: str | None):
    if kind is None:
        return None
    values = {"num_layers": 1, "block_size": 4, "taps": [0, 1], "kind": kind}
    config, _ = build_draft_config(target.spec, DraftSection(**values), mask_token_id=5)
    draft = KINDS[kind](config, seed=0)
    draft.set_embeddings(target.model.get_input_embeddings().weight, target.model.lm_head.weight)
    return draft.eval()


def words(count: int, seed: int) -> list[int]:
    return torch.randint(32, 384, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def reused(decoder: Decoder, ids: list[int]) -> int:
    return decoder.reader.begin(ids).reused


@pytest.mark.parametrize("kind", [None, "dspark", "eagle3"])
@pytest.mark.parametrize("name", ["hybrid", "llama"])
def test_a_conversation_that_goes_on_reads_only_what_is_new(targets, name, kind):
    target = targets[name]
    draft = make_draft(target, kind)
    decoder, plain = Decoder(target, draft, prefixes=Prefixes(10**9)), Decoder(target, draft)
    said = words(30, 1)
    for turn in range(3):
        assert reused(decoder, said) == (len(said) - 8 if turn else 0)
        answer, expected = (each.generate(said, SAMPLING) for each in (decoder, plain))
        assert answer.tokens == expected.tokens
        assert answer.drafted == expected.drafted
        said = [*said, *answer.tokens, *words(7, turn)]


def test_all_answers_that_end_in_one_round_are_kept_and_one_that_is_dropped(targets):
    decoder = Decoder(targets["hybrid"], prefixes=Prefixes(10**9))
    running = [decoder.start(words(20, at), SAMPLING) for at in range(2)]
    running.append(decoder.start(words(20, 2), Sampling(temperature=0.0, max_new_tokens=50)))
    while any(each.finished is None for each in running[:2]):
        decoder.step(running)
    for each in running:
        decoder.drop(each)
    for each in running:
        known = [*each.prompt_ids, *each.tokens]
        assert reused(decoder, [*known, 40]) == len(known) - 1


class Foretelling(DSparkDraft):
    """Proposes what it is told."""

    plan: list[int]

    def base_logits(self, hidden):
        start = self.told + 1
        return torch.nn.functional.one_hot(torch.tensor(self.plan[start : start + 4]), 384).float()[None]

    def block_hidden(self, context, anchor_tokens):
        self.told = context.lengths[0]
        return super().block_hidden(context, anchor_tokens)


@pytest.mark.parametrize("by", ["stop", "length"])
def test_an_answer_that_ends_inside_a_block_is_kept_to_its_end(targets, by, monkeypatch):
    target, prompt = targets["hybrid"], words(20, 2)
    long = Decoder(target).generate(prompt, Sampling(temperature=0.0, max_new_tokens=20)).tokens
    end = next(at for at in (7, 8, 9) if long[at] not in long[:at])  # the second block's, not its last
    config, _ = build_draft_config(
        target.spec, DraftSection(num_layers=1, block_size=4, taps=[0], markov_rank=0), mask_token_id=5
    )
    draft = Foretelling(config, seed=0)
    draft.set_embeddings(target.model.get_input_embeddings().weight, target.model.lm_head.weight)
    draft.plan = prompt + long
    decoder = Decoder(target, draft, prefixes=Prefixes(10**9))
    limit, stops = (20, frozenset({long[end]})) if by == "stop" else (end + 1, frozenset())
    answer = decoder.generate(prompt, Sampling(temperature=0.0, max_new_tokens=limit), stops)
    assert answer.finished == by
    assert answer.tokens == long[: end + 1]
    following = [*prompt, *answer.tokens, 40, 41]
    assert reused(decoder, following) == len(prompt) + end
    found = decoder.read(following).logits
    torch.testing.assert_close(found, Decoder(target).read(following).logits, atol=1e-4, rtol=1e-4)


def test_a_shared_beginning_is_kept_once_two_prompts_had_it(targets):
    """A recurrent state cannot be taken back, so the second prompt leaves one where it parts from the first."""
    target, system = targets["hybrid"], words(40, 3)
    decoder = Decoder(target, make_draft(target, "dspark"), prefixes=Prefixes(10**9))
    prompts = [[*system, 50 + at, *words(6, 10 + at)] for at in range(3)]
    found = []
    for prompt in prompts:
        found.append(reused(decoder, prompt))
        answer = decoder.generate(prompt, SAMPLING)
        assert answer.tokens == Decoder(target).generate(prompt, SAMPLING).tokens
    assert found == [0, 0, 40]


def test_keys_serve_every_prompt_that_begins_alike(targets):
    decoder = Decoder(targets["llama"], prefixes=Prefixes(10**9))
    prompt = words(25, 4)
    decoder.generate(prompt, SAMPLING)
    assert reused(decoder, prompt) == 24  # its last token is read again: nothing else says what follows
    assert reused(decoder, [*prompt[:10], 50, 51]) == 10
    assert reused(decoder, words(25, 5)) == 0


def test_what_was_not_asked_for_longest_makes_room(targets):
    target = targets["hybrid"]
    measured = Decoder(target, prefixes=Prefixes(10**9))
    measured.read(words(20, 0))
    measured.start(words(20, 0), SAMPLING)
    one = measured.reader.prefixes.held
    decoder = Decoder(target, prefixes=Prefixes(int(2.5 * one)))
    for seed in (0, 1):
        decoder.start(words(20, seed), SAMPLING)
    assert reused(decoder, [*words(20, 0), 40]) == 20  # asked for again
    decoder.start(words(20, 2), SAMPLING)
    assert decoder.reader.prefixes.held <= 2.5 * one
    assert [reused(decoder, [*words(20, seed), 40]) for seed in range(3)] == [20, 0, 20]


def test_what_is_kept_does_not_change_with_the_answer_that_goes_on_from_it(targets):
    decoder = Decoder(targets["llama"], prefixes=Prefixes(10**9))
    prompt = words(25, 6)
    running = [decoder.start(prompt, Sampling(seed=seed, max_new_tokens=9)) for seed in (1, 2)]
    while any(each.finished is None for each in running):
        decoder.step(running)
    alone = [Decoder(targets["llama"]).generate(prompt, Sampling(seed=seed, max_new_tokens=9)) for seed in (1, 2)]
    assert [each.tokens for each in running] == [each.tokens for each in alone]


def test_choices_of_one_request_read_their_prompt_once(targets, monkeypatch):
    decoder, ids = Decoder(targets["hybrid"]), tuple(words(20, 7))
    read, rows = decoder.target.read, []
    monkeypatch.setattr(decoder.target, "read", lambda state, pieces: rows.append(len(pieces)) or read(state, pieces))
    choices = [decoder.reader.begin(ids) for _ in range(3)]
    decoder.reader.step(choices, 100)
    assert rows == [1]
    running = [decoder.start(each.prompt, SAMPLING) for each in choices]
    while any(each.finished is None for each in running):
        decoder.step(running)
    assert {tuple(each.tokens) for each in running} == {
        tuple(Decoder(targets["hybrid"]).generate(ids, SAMPLING).tokens)
    }


@dataclasses.dataclass
class Held:
    """A memory of nothing but its length."""

    length: int
    shortens: bool
    size: int = 1
    looks_ahead: bool = False

    def select(self, rows):
        return dataclasses.replace(self)

    def shorten(self, length):
        self.length = min(self.length, length)


def common(one: list[int], other: list[int]) -> int:
    return len([*itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))])


@pytest.mark.parametrize("shortens", [False, True])
def test_of_many_kept_the_longest_is_found(shortens):
    draw, prefixes, kept = random.Random(0), Prefixes(10**9), []
    monotone = [7] * 50  # beginnings of each other
    for number in range(300):
        ids = (
            monotone[: draw.randint(2, 50)] if number % 3 == 0 else draw.choices((1, 256, 70000), k=draw.randint(2, 60))
        )
        ids = ids + draw.choices((1, 256), k=draw.randint(0, 3))
        shared = [common(ids, one) for one in kept]
        usable = [min(count, len(ids) - 1) for count in shared]
        whole = [most for most, one in zip(usable, kept, strict=True) if shortens or most == len(one)]
        memory, place = prefixes.longest(ids)
        assert (memory.length if memory else 0) == max(whole, default=0)
        assert place == (max(usable) if max(usable, default=0) >= max(whole, default=0) + 32 else 0)
        prefixes.keep([*ids, 0], Held(len(ids), shortens))
        kept.append(ids)
    assert prefixes.held <= len(kept)
