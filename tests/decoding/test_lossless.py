"""Speculative decoding does not change what comes out: token for token when greedy, in distribution when sampled."""

import collections
import dataclasses
from collections.abc import Callable

import pytest
import torch
from scipy import stats

from nemotron_dspark.config import DraftSection
from nemotron_dspark.decoding.decoder import Decoder
from nemotron_dspark.decoding.sampling import Sampling, pick, probabilities
from nemotron_dspark.decoding.schedule import Cost, Schedule, Threshold
from nemotron_dspark.drafts.config import build_draft_config
from nemotron_dspark.drafts.costs import CostTable
from nemotron_dspark.drafts.dspark import DSparkDraft
from nemotron_dspark.errors import InputError
from nemotron_dspark.recipe import tiny
from nemotron_dspark.targets import Target, spec_from_config

GAMMA = 5
NEW_TOKENS = 16


def make_draft(target: Target, seed: int = 0, cls: type = DSparkDraft, **section) -> DSparkDraft:
    values = {"num_layers": 1, "block_size": GAMMA, "taps": [0, 3], "markov_rank": 8, **section}
    config, _ = build_draft_config(target.spec, DraftSection(**values), mask_token_id=5)
    draft = cls(config, seed=seed)
    if config.draft_vocab_size is not None:
        draft.set_vocabulary(torch.arange(1, target.spec.vocab_size, 2)[: config.draft_vocab_size])
    draft.set_embeddings(target.model.get_input_embeddings().weight, target.model.lm_head.weight)
    return draft.eval()


class ForetellingDraft(DSparkDraft):
    """Proposes what the target will say, with an error here and there, so that every acceptance length occurs.

    Contexts, blocks and state are the real ones; only the tokens are known in advance.
    """

    plans: list[list[int]]  # per row: the plain answer, prompt included
    errors: torch.Generator

    def base_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(*hidden.shape[:-1], self.config.vocab_size)
        for row, plan in enumerate(self.plans):
            start = self._lengths[row] + 1
            for slot in range(hidden.shape[1]):
                token = plan[start + slot] if start + slot < len(plan) else 40
                if torch.rand((), generator=self.errors) < 0.2:
                    token = (token + 1) % self.config.vocab_size
                logits[row, slot, token] = 1.0
        return logits

    def block_hidden(self, context, anchor_tokens):
        self._lengths = list(context.lengths)
        return super().block_hidden(context, anchor_tokens)


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> Target:
    return Target.load(str(tiny.random_target(tmp_path_factory.mktemp("hybrid"), pattern="ME*-M*-M")))


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 60, (100,), generator=generator).tolist()
    return [torch.randint(32, 384, (length,), generator=generator).tolist() for length in lengths]


GREEDY = Sampling(temperature=0.0, max_new_tokens=NEW_TOKENS)


@pytest.fixture(scope="module")
def plain(target, prompts) -> list[list[int]]:
    """Greedy answers without a draft."""
    decoder = Decoder(target)
    generations = [decoder.start(prompt, GREEDY) for prompt in prompts]
    while any(generation.finished is None for generation in generations):
        decoder.step(generations)
    return [generation.tokens for generation in generations]


def test_plain_decoding_equals_whole_forwards(target, prompts, plain):
    """Every token is what the model says, without state or cache, of all that comes before it."""
    sequences = [prompt + answer for prompt, answer in zip(prompts, plain, strict=True)]
    longest = max(map(len, sequences))
    ids = torch.tensor([sequence + [0] * (longest - len(sequence)) for sequence in sequences])
    mask = torch.tensor([[1] * len(s) + [0] * (longest - len(s)) for s in sequences])
    with torch.no_grad():
        best = target.model(input_ids=ids, attention_mask=mask, use_cache=False).logits.argmax(-1).tolist()
    for row, prompt, answer in zip(best, prompts, plain, strict=True):
        assert answer == row[len(prompt) - 1 : len(prompt) + len(answer) - 1]
        assert len(answer) == NEW_TOKENS or answer[-1] in target.stop_ids
        assert not set(answer[:-1]) & target.stop_ids


def test_greedy_speculative_output_equals_plain_output_for_100_prompts(target, prompts, plain):
    draft = make_draft(target, cls=ForetellingDraft, markov_rank=0, confidence_with_markov=False)
    draft.errors = torch.Generator().manual_seed(1)
    decoder = Decoder(target, draft)
    lengths = collections.Counter()
    for prompt, answer in zip(prompts, plain, strict=True):
        draft.plans = [prompt + answer]
        generation = decoder.generate(prompt, GREEDY)
        assert generation.tokens == answer
        lengths.update(generation.accepted)
    assert set(lengths) >= set(range(1, GAMMA + 2))  # every acceptance length occurred


def test_rows_decoded_together_equal_rows_decoded_alone(target, prompts, plain):
    """Rows accept different lengths in the same round, finish at different times, and join late."""
    draft = make_draft(target, cls=ForetellingDraft, markov_rank=0, confidence_with_markov=False)
    draft.errors = torch.Generator().manual_seed(2)
    decoder = Decoder(target, draft)
    waiting = list(zip(prompts[:30], plain[:30], strict=True))
    active, answers = [], []
    while waiting or active:
        while waiting and len(active) < 5:
            prompt, answer = waiting.pop(0)
            active.append((decoder.start(prompt, GREEDY), prompt + answer, answer))
        draft.plans = [plan for _, plan, _ in active]
        decoder.step([generation for generation, _, _ in active])
        answers += [(generation.tokens, answer) for generation, _, answer in active if generation.finished]
        active = [item for item in active if not item[0].finished]
    assert all(found == expected for found, expected in answers)
    assert len(answers) == 30


@pytest.mark.parametrize("head", ["vanilla", "gated", "rnn"])
def test_greedy_with_a_real_draft_of_every_head_is_lossless(target, prompts, plain, head):
    draft = make_draft(target, markov_head=head)
    decoder = Decoder(target, draft, schedule=Threshold(0.5))
    for prompt, answer in zip(prompts[:10], plain[:10], strict=True):
        assert decoder.generate(prompt, GREEDY).tokens == answer


def test_greedy_with_a_part_of_the_vocabulary_is_lossless_and_drafts_nothing_else(target, prompts, plain):
    draft = make_draft(target, vocabulary=100)
    decoder, drafted = Decoder(target, draft), set()
    for prompt, answer in zip(prompts[:3], plain[:3], strict=True):
        generation = decoder.generate(prompt, GREEDY)
        assert generation.tokens == answer
        drafted.update(token for block in generation.drafted for token in block)
    assert drafted <= set(range(1, 201, 2))
    assert len(drafted) > 5


def test_cutting_at_low_confidence_is_lossless_and_shortens_blocks(target, prompts, plain):
    draft = make_draft(target)
    with torch.no_grad():
        draft.confidence_head.proj.weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(3))
        draft.markov_head.markov_w1.weight.normal_(0, 5.0, generator=torch.Generator().manual_seed(4))
    decoder = Decoder(target, draft, schedule=Threshold(0.45))
    proposed = collections.Counter()
    for prompt, answer in zip(prompts[:20], plain[:20], strict=True):
        generation = decoder.generate(prompt, GREEDY)
        assert generation.tokens == answer
        proposed.update(generation.proposed)
    assert len(proposed) > 2


def table(gamma: int, step: float, draft: float = 0.0) -> CostTable:
    """A pass takes a second, and ``step`` for each further token of a request; drafting takes ``draft``."""
    verify = tuple(1 + step * k for k in range(gamma + 1))
    return CostTable((1,), (verify,), ((0.0, *[draft] * gamma),))


@pytest.mark.parametrize("signal", ["confidence head", "margin", None])
def test_greedy_output_of_a_hybrid_is_the_same_whatever_lengths_are_scheduled(target, prompts, plain, signal):
    draft = make_draft(target, cls=ForetellingDraft, markov_rank=0, confidence_with_markov=False)
    draft.errors = torch.Generator().manual_seed(2)
    draft.lines = {0.0: ((1.0,) * GAMMA, (0.3,) * GAMMA)}
    with torch.no_grad():
        draft.confidence_head.proj.weight.normal_(0, 0.5, generator=torch.Generator().manual_seed(3))
    decoder = Decoder(target, draft, schedule=Cost(table(GAMMA, step=0.2, draft=0.05), signal))
    waiting, active, lengths = list(zip(prompts[:8], plain[:8], strict=True)), [], collections.Counter()
    while waiting or active:
        while waiting and len(active) < 3:
            prompt, answer = waiting.pop(0)
            active.append((decoder.start(prompt, GREEDY), prompt + answer, answer))
        draft.plans = [plan for _, plan, _ in active]
        decoder.step([generation for generation, _, _ in active])
        for generation, _, answer in active:
            if generation.finished:
                assert generation.tokens == answer
                lengths.update(generation.proposed)
        active = [item for item in active if not item[0].finished]
    assert set(lengths) & set(range(1, GAMMA))  # parts of blocks


# --- sampling, on a vocabulary small enough to count ---

VOCAB = 6
DRAWS = 2500


@pytest.fixture(scope="module")
def small_target() -> Target:
    config = tiny.nemotron_h_config("M*-M", vocab_size=VOCAB, hidden_size=32, eos_token_id=None, pad_token_id=0)
    config.eos_token_id = None
    model = tiny.random_model(config, seed=4, spread=4.0)
    model.generation_config.eos_token_id = None
    return Target(model, None, spec_from_config(config, "small"), ".")


def exact_distribution(
    target: Target,
    prompt: list[int],
    sampling: Sampling,
    length: int,
    allowed: Callable[[tuple, int], bool] = lambda answer, token: True,
) -> dict[tuple, float]:
    """Probability of every answer of ``length`` tokens, from whole forwards of the model."""
    answers = {(): 1.0}
    for _ in range(length):
        longer = {}
        for answer, mass in answers.items():
            with torch.no_grad():
                logits = target.model(input_ids=torch.tensor([prompt + list(answer)]), use_cache=False).logits[0, -1]
            logits[[not allowed(answer, token) for token in range(len(logits))]] = -torch.inf
            for token, p in enumerate(probabilities(logits[None], [sampling])[0].tolist()):
                longer[(*answer, token)] = mass * p
        answers = longer
    return answers


def draw(
    decoder: Decoder, prompt: list[int], sampling: dict, draws: int, constraint: type | None = None
) -> collections.Counter:
    """Answers to one prompt under ``draws`` seeds. The prompt is prefilled once; every answer starts from a copy."""
    read = decoder.read(prompt)
    counts: collections.Counter = collections.Counter()
    for first in range(0, draws, 250):
        settings = [Sampling(seed=seed, **sampling) for seed in range(first, first + 250)]
        batch = [decoder.start(read, each, frozenset(), constraint and constraint()) for each in settings]
        while any(generation.finished is None for generation in batch):
            decoder.step(batch)
        counts.update(tuple(generation.tokens) for generation in batch)
    return counts


def p_value(counts: collections.Counter, expected: dict[tuple, float], draws: int) -> float:
    """Chi-square test with cells of fewer than five expected draws put together."""
    cells = [(counts[answer], mass * draws) for answer, mass in expected.items()]
    large = [cell for cell in cells if cell[1] >= 5]
    rest = [cell for cell in cells if cell[1] < 5]
    if rest:
        large.append((sum(c for c, _ in rest), max(sum(e for _, e in rest), 1e-9)))
    observed, mass = zip(*large, strict=True)
    scale = sum(observed) / sum(mass)
    return stats.chisquare(observed, [m * scale for m in mass]).pvalue


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_sampled_speculative_output_is_distributed_as_the_target(small_target, top_p):
    prompt, sampling = [1, 4, 2], {"temperature": 1.0, "top_p": top_p, "max_new_tokens": 3}
    expected = exact_distribution(small_target, prompt, Sampling(**sampling), 3)
    draft = make_draft(small_target, seed=6, block_size=2, num_taps=1, taps=[0], markov_rank=4)
    with torch.no_grad():
        draft.markov_head.markov_w2.weight.normal_(0, 3.0, generator=torch.Generator().manual_seed(7))
        draft.markov_head.markov_w1.weight.normal_(0, 0.5, generator=torch.Generator().manual_seed(8))
    speculative = draw(Decoder(small_target, draft), prompt, sampling, DRAWS)
    plain = draw(Decoder(small_target), prompt, sampling, DRAWS)
    assert set(speculative) <= {answer for answer, mass in expected.items() if mass > 0}
    assert p_value(plain, expected, DRAWS) > 1e-3
    assert p_value(speculative, expected, DRAWS) > 1e-3
    pairs = sorted(set(speculative) | set(plain))
    table = [[speculative[answer] for answer in pairs], [plain[answer] for answer in pairs]]
    frequent = [column for column in zip(*table, strict=True) if sum(column) >= 10]
    assert stats.chi2_contingency(list(zip(*frequent, strict=True))).pvalue > 1e-3


def test_sampled_output_of_a_draft_of_half_the_vocabulary_is_distributed_as_the_target(small_target):
    prompt, sampling = [1, 4, 2], {"temperature": 1.0, "max_new_tokens": 3}
    expected = exact_distribution(small_target, prompt, Sampling(**sampling), 3)
    draft = make_draft(small_target, seed=6, block_size=2, num_taps=1, taps=[0], markov_rank=4, vocabulary=3)
    with torch.no_grad():
        draft.markov_head.markov_w2.weight.normal_(0, 3.0, generator=torch.Generator().manual_seed(7))
    found = draw(Decoder(small_target, draft), prompt, sampling, 1000)
    assert {token for answer in found for token in answer} == set(range(VOCAB))
    assert p_value(found, expected, 1000) > 1e-3


class EachAlone(Schedule):
    """Every request of a batch under a schedule of its own, as if it were decoded alone."""

    def __init__(self, signal):
        self.signal = signal
        self.schedules = collections.defaultdict(lambda: Cost(table(2, step=0.1, draft=0.02), signal))
        self.lengths = collections.Counter()

    def begin(self, generations, gamma):
        plans = [self.schedules[generation].begin([generation], gamma) for generation in generations]
        joint = super().begin(generations, gamma)
        joint.lengths = [plan.lengths[0] for plan in plans]

        def look(slot, chances):
            for plan, chance in zip(plans, chances, strict=True):
                if plan.lengths[0] > slot:
                    plan.look(slot, [chance])
            joint.lengths = [plan.lengths[0] for plan in plans]

        joint.look, joint.signal = look, self.signal
        return joint

    def learn(self, generation):
        self.lengths[generation.proposed[-1]] += 1
        self.schedules[generation].learn(generation)


@pytest.mark.parametrize("signal", ["confidence head", "margin"])
def test_sampled_output_is_distributed_as_the_target_where_chances_end_blocks(small_target, signal, monkeypatch):
    monkeypatch.setattr("nemotron_dspark.decoding.schedule._WORTH_LOOKING", 1.0)
    prompt, sampling = [1, 4, 2], {"temperature": 1.0, "max_new_tokens": 3}
    expected = exact_distribution(small_target, prompt, Sampling(**sampling), 3)
    draft = make_draft(small_target, seed=6, block_size=2, num_taps=1, taps=[0], markov_rank=4)
    draft.lines = {1.0: ((2.0, 2.0), (-1.5, -1.5))}
    with torch.no_grad():
        draft.markov_head.markov_w2.weight.normal_(0, 1.0, generator=torch.Generator().manual_seed(7))
        draft.markov_head.markov_w1.weight.normal_(0, 0.5, generator=torch.Generator().manual_seed(8))
        draft.confidence_head.proj.weight.normal_(0, 0.5, generator=torch.Generator().manual_seed(9))
    schedule = EachAlone(signal)
    assert p_value(draw(Decoder(small_target, draft, schedule=schedule), prompt, sampling, 1000), expected, 1000) > 1e-3
    assert len(schedule.lengths) > 1


class NoTwice:
    """A token must not follow itself, and an answer does not begin with 0."""

    def __init__(self):
        self.answer = ()

    @staticmethod
    def allowed(answer, token):
        return token != answer[-1] if answer else token != 0

    def forbidden(self, drafted):
        rows = []
        for at in range(len(drafted) + 1):
            before = (*self.answer, *drafted[:at])
            rows.append(torch.tensor([not self.allowed(before, token) for token in range(VOCAB)]))
            if at < len(drafted) and rows[-1][drafted[at]]:
                break
        return torch.stack(rows)

    def advance(self, tokens):
        self.answer += tuple(tokens)


def test_a_constrained_answer_is_distributed_as_the_constrained_target(small_target):
    prompt, sampling = [1, 4, 2], {"temperature": 1.0, "max_new_tokens": 3}
    expected = exact_distribution(small_target, prompt, Sampling(**sampling), 3, NoTwice.allowed)
    draft = make_draft(small_target, seed=6, block_size=2, num_taps=1, taps=[0], markov_rank=4)
    speculative = draw(Decoder(small_target, draft), prompt, sampling, 1000, NoTwice)
    assert set(speculative) <= {answer for answer, mass in expected.items() if mass > 0}
    assert p_value(speculative, expected, 1000) > 1e-3


def test_logprobs_are_the_targets_own_whatever_the_draft_proposes(target, prompts):
    decoder = Decoder(target, make_draft(target))
    settings = [Sampling(temperature=t, seed=3, max_new_tokens=NEW_TOKENS, logprobs=3) for t in (0.0, 1.0)]
    generations = [decoder.start(prompts[0], each) for each in settings]
    while any(generation.finished is None for generation in generations):
        decoder.step(generations)
    for generation in generations:
        with torch.no_grad():
            ids = torch.tensor([prompts[0] + generation.tokens])
            logits = target.model(input_ids=ids, use_cache=False).logits[0, len(prompts[0]) - 1 : -1]
        expected = torch.log_softmax(logits, -1)
        assert len(generation.likelihoods) == len(generation.tokens)
        for row, token, found in zip(expected, generation.tokens, generation.likelihoods, strict=True):
            assert found.logprob == pytest.approx(float(row[token]), abs=1e-3)
            assert [value for _, value in found.top] == pytest.approx(row.topk(3).values.tolist(), abs=1e-3)
            assert generation.sampling.temperature or found.top[0][0] == token


def test_a_row_without_drafts_keeps_its_answer_beside_one_with_them(target, prompts, plain):
    decoder = Decoder(target, make_draft(target))
    settings = Sampling(temperature=1.0, seed=5, max_new_tokens=NEW_TOKENS, speculative=False)
    alone = decoder.generate(prompts[1], settings)
    assert set(alone.accepted) == {1}
    assert set(alone.proposed) == {0}
    greedy = decoder.generate(prompts[0], dataclasses.replace(settings, temperature=0.0))
    assert greedy.tokens == plain[0]
    batch = [decoder.start(prompts[0], GREEDY), decoder.start(prompts[1], settings)]
    while any(generation.finished is None for generation in batch):
        decoder.step(batch)
    assert [generation.tokens for generation in batch] == [plain[0], alone.tokens]


def test_the_test_would_notice_a_wrong_acceptance_rule(small_target, monkeypatch):
    """Accepting every draft, or drawing the replacement from p instead of the residual, moves the distribution."""
    from nemotron_dspark.decoding import decoder as module

    prompt, sampling = [1, 4, 2], {"temperature": 1.0, "max_new_tokens": 3}
    expected = exact_distribution(small_target, prompt, Sampling(**sampling), 3)
    draft = make_draft(small_target, seed=6, block_size=2, taps=[0], markov_rank=4)
    with torch.no_grad():
        draft.markov_head.markov_w2.weight.normal_(0, 3.0, generator=torch.Generator().manual_seed(7))
        draft.markov_head.markov_w1.weight.normal_(0, 0.5, generator=torch.Generator().manual_seed(8))
    right = module.accept_sampled

    def accept_all(p, q, tokens, counts, uniforms):
        return right(p, q * 0, tokens, counts, uniforms)

    def replace_from_p(p, q, tokens, counts, uniforms):
        kept, _ = right(p, q, tokens, counts, uniforms)
        return kept, pick(p[torch.arange(len(kept)), kept], uniforms[:, -1])

    for wrong in (accept_all, replace_from_p):
        monkeypatch.setattr(module, "accept_sampled", wrong)
        assert p_value(draw(Decoder(small_target, draft), prompt, sampling, 1000), expected, 1000) < 1e-6


def test_a_seed_gives_the_same_answer_alone_and_in_company(target, prompts):
    draft = make_draft(target)
    sampling = Sampling(temperature=1.0, seed=11, max_new_tokens=NEW_TOKENS)
    alone = Decoder(target, draft).generate(prompts[0], sampling).tokens
    decoder = Decoder(target, draft)
    batch = [decoder.start(prompts[0], sampling)]
    batch += [decoder.start(prompt, Sampling(temperature=0.7, seed=seed)) for seed, prompt in enumerate(prompts[1:4])]
    while batch[0].finished is None:
        decoder.step(batch)
    assert batch[0].tokens == alone
    other = Decoder(target, draft).generate(prompts[0], Sampling(temperature=1.0, seed=12, max_new_tokens=NEW_TOKENS))
    assert other.tokens != alone


def test_a_stop_token_ends_the_answer_inside_a_block(target, prompts, plain):
    draft = make_draft(target, cls=ForetellingDraft, markov_rank=0, confidence_with_markov=False)
    draft.errors = torch.Generator().manual_seed(5)
    prompt, answer = next((p, a) for p, a in zip(prompts, plain, strict=True) if len(set(a)) > 6)
    draft.plans = [prompt + answer]
    stop = next(token for at, token in enumerate(answer) if at >= 3 and token not in answer[:at])
    generation = Decoder(target, draft).generate(prompt, GREEDY, frozenset({stop}))
    assert generation.tokens == answer[: answer.index(stop) + 1]
    assert generation.finished == "stop"
    assert sum(generation.accepted) == len(generation.tokens) - 1  # the first token came from the prefill


@pytest.mark.parametrize(
    ("change", "named"), [({"hidden_size": 32}, "hidden size"), ({"vocab_size": 400}, "vocabulary")]
)
def test_a_draft_for_another_target_is_refused(target, change, named):
    other = tiny.nemotron_h_config(**{"pattern": "M*-M-*-M", "vocab_size": 384, "hidden_size": 64, **change})
    config, _ = build_draft_config(
        spec_from_config(other, "other"), DraftSection(num_layers=1, taps=[0]), mask_token_id=5
    )
    with pytest.raises(InputError, match=named):
        Decoder(target, DSparkDraft(config))


@pytest.mark.parametrize("budget", [13, 100])
def test_prompts_read_together_in_pieces_are_answered_as_if_read_alone(target, prompts, plain, budget):
    draft = make_draft(target)
    decoder = Decoder(target, draft)
    waiting, answers = list(range(10)), {}
    reading, active = {}, {}
    while waiting or reading or active:
        if waiting:  # two more come in every round
            reading |= {at: decoder.reader.begin(prompts[at]) for at in (waiting.pop(0), waiting.pop(0))}
        decoder.reader.step(list(reading.values()), budget)
        assert not any(each.error for each in reading.values())
        for at in [at for at, each in reading.items() if each.prompt is not None]:
            active[at] = decoder.start(reading.pop(at).prompt, GREEDY)
        decoder.step(list(active.values()))
        answers |= {at: each for at, each in active.items() if each.finished}
        active = {at: each for at, each in active.items() if not each.finished}
    assert [answers[at].tokens for at in range(10)] == plain[:10]
    alone = [Decoder(target, draft).generate(prompt, GREEDY) for prompt in prompts[:10]]
    assert [answers[at].drafted for at in range(10)] == [each.drafted for each in alone]  # the draft read them, too
