"""Measure how much of a draft the target accepts, how much faster that is, and whether the output is the same.

Accepted length is DeepSpec's: tokens gained per verification, the target's own included, averaged over all rounds. It
does not depend on the machine. Speed does, so plain and speculative decoding take turns prompt by prompt.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from nemotron_dspark.chat.format import render_prompt
from nemotron_dspark.config import EvalConfig
from nemotron_dspark.data.prompts import rendered_prompts
from nemotron_dspark.decoding.decoder import Decoder, Generation
from nemotron_dspark.decoding.sampling import Sampling
from nemotron_dspark.decoding.schedule import schedule_for
from nemotron_dspark.drafts.dspark import Draft
from nemotron_dspark.errors import InputError
from nemotron_dspark.targets import Target

Progress = Callable[[str, int, int], None]  # what is measured, prompts done, prompts in all


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Acceptance of one draft at one temperature."""

    temperature: float
    prompts: int
    tokens: int  # generated
    rounds: int  # verifications
    accepted_length: float  # tokens gained per round, the target's own included; 1 = the draft is useless
    standard_error: float | None  # of the accepted length, over prompts; None of a single one
    drafted: float  # slots verified per round: the block's, less what `eval.schedule` cuts
    per_position: tuple[float, ...]  # share of rounds in which the draft of slot k, and so all before it, was kept
    given_previous: tuple[float, ...]  # share kept of slot k where all slots before it were kept
    tokens_per_second: float | None  # one prompt at a time, prefill not counted; None when rows were batched


@dataclasses.dataclass(frozen=True)
class Lossless:
    """Greedy speculative output against plain greedy output, token for token."""

    prompts: int
    identical: int
    first_difference: str | None  # where, and how near the two tokens' logits were


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Everything `nds eval` reports."""

    measurements: tuple[Measurement, ...]
    lossless: Lossless
    plain_tokens_per_second: float
    speculative_tokens_per_second: float  # both greedy, on the same prompts, in turns

    @property
    def speedup(self) -> float:
        """Speculative over plain speed, both greedy; 0 where every answer was a single token and no round was timed."""
        plain = self.plain_tokens_per_second
        return self.speculative_tokens_per_second / plain if plain else 0.0

    def to_json(self) -> dict[str, Any]:
        """The contents of ``eval.json``."""
        return {
            "measurements": [dataclasses.asdict(measurement) for measurement in self.measurements],
            "lossless": dataclasses.asdict(self.lossless),
            "tokens_per_second": {
                "plain": self.plain_tokens_per_second,
                "speculative": self.speculative_tokens_per_second,
                "speedup": self.speedup,
            },
        }


def prompt_ids(
    target: Target, file: Path, *, limit: int | None = None, new_tokens: int = 0, thinking: bool | None = None
) -> list[list[int]]:
    """The turns of `conversation_ids`, one list of token ids each."""
    found = conversation_ids(target, file, limit=limit, new_tokens=new_tokens, thinking=thinking)
    return list(itertools.chain.from_iterable(found))


def conversation_ids(
    target: Target, file: Path, *, limit: int | None = None, new_tokens: int = 0, thinking: bool | None = None
) -> list[list[list[int]]]:
    """Render the prompts in ``file`` for ``target``, a list of turns each; what leaves no room is left out.

    In a prompt of several turns the target answers greedily, with ``new_tokens`` at most, what the next turn follows.

    Raises:
        InputError: the file cannot be read, or no prompt of it fits.
    """
    plain, greedy = Decoder(target), Sampling(temperature=0.0, max_new_tokens=max(new_tokens, 1))

    def answer(ids: list[int]) -> str:
        found = plain.generate(ids, greedy)
        tokens = found.tokens[:-1] if found.finished == "stop" else found.tokens
        return cast(str, target.tokenizer.decode(tokens, clean_up_tokenization_spaces=False))

    fitting = rendered_prompts(
        file,
        lambda messages, tools: render_prompt(target.tokenizer, messages, thinking, tools),
        answer,
        room=target.spec.max_position_embeddings - new_tokens,
        limit=limit,
    )
    if not fitting:
        raise InputError(
            f"No prompt of {file} leaves room for {new_tokens} new tokens in {target.spec.max_position_embeddings}.",
            "Use shorter prompts, or --set eval.max_new_tokens to a smaller number.",
        )
    return fitting


def measure(
    target: Target,
    draft: Draft,
    prompts: Sequence[Sequence[int]],
    temperature: float,
    config: EvalConfig,
    progress: Progress | None = None,
) -> Measurement:
    """Measure the acceptance of ``draft`` on ``prompts``; prompt i is sampled with seed ``config.seed + i``."""
    decoder = Decoder(target, draft, schedule=schedule_for(config.schedule, draft, config.profile))
    done = decode(decoder, prompts, temperature, config, progress)
    return summarise(done, temperature, draft.config.block_size, timed=config.batch_size == 1)


def decode(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    temperature: float,
    config: EvalConfig,
    progress: Progress | None = None,
    what: str = "",
) -> list[Generation]:
    """The finished answers to ``prompts``, ``config.batch_size`` at once, as they end; seeds as in `measure`.

    ``what`` is what ``progress`` is told of, if anything but the temperature.
    """
    waiting = [
        (ids, Sampling(temperature=temperature, seed=config.seed + at, max_new_tokens=config.max_new_tokens))
        for at, ids in enumerate(prompts)
    ]
    waiting.reverse()
    done: list[Generation] = []
    active: list[Generation] = []
    while waiting or active:
        while waiting and len(active) < config.batch_size:
            active.append(decoder.start(*waiting.pop()))
        decoder.step(active)
        done += [generation for generation in active if generation.finished]
        active = [generation for generation in active if not generation.finished]
        if progress:
            progress(what or f"temperature {temperature:g}", len(done), len(prompts))
    return done


def summarise(generations: Sequence[Generation], temperature: float, gamma: int, *, timed: bool) -> Measurement:
    """Sum up finished speculative generations."""
    survived = [count for generation in generations for count in generation.survived]
    reached = [sum(count >= slot for count in survived) for slot in range(gamma + 1)]  # reached[0] = all rounds
    rounds = max(len(survived), 1)
    return Measurement(
        temperature=temperature,
        prompts=len(generations),
        tokens=sum(len(generation.tokens) for generation in generations),
        rounds=len(survived),
        accepted_length=sum(sum(generation.accepted) for generation in generations) / rounds,
        standard_error=ratio_error([(sum(each.accepted), each.rounds) for each in generations]),
        drafted=sum(sum(generation.proposed) for generation in generations) / rounds,
        per_position=tuple(count / rounds for count in reached[1:]),
        given_previous=tuple(after / before if before else 0.0 for before, after in itertools.pairwise(reached)),
        tokens_per_second=speed_of(generations) if timed else None,
    )


def evaluate(
    target: Target,
    draft: Draft,
    prompts: Sequence[Sequence[int]],
    config: EvalConfig,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure acceptance, speed and equality on ``prompts``; greedy acceptance always, as the other two are greedy."""
    plain = Decoder(target)
    speculative = Decoder(target, draft, schedule=schedule_for(config.schedule, draft, config.profile))
    greedy = Sampling(temperature=0.0, max_new_tokens=config.max_new_tokens)
    warm = Sampling(temperature=0.0, max_new_tokens=min(16, config.max_new_tokens))
    for decoder in (plain, speculative):
        decoder.generate(prompts[0], warm)
    pairs = []
    # In turns, prompt by prompt: whatever else the machine does slows both alike.
    for at, ids in enumerate(prompts):
        pairs.append((plain.generate(ids, greedy), speculative.generate(ids, greedy)))
        if progress:
            progress("plain and speculative", at + 1, len(prompts))
    measurements = [summarise([fast for _, fast in pairs], 0.0, draft.config.block_size, timed=True)]
    measurements += [
        measure(target, draft, prompts, temperature, config, progress)
        for temperature in config.temperatures
        if temperature > 0
    ]
    return Evaluation(
        tuple(measurements),
        lossless_of(target, prompts, pairs),
        speed_of([slow for slow, _ in pairs]),
        speed_of([fast for _, fast in pairs]),
    )


def ratio_error(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Standard error of Σ gained / Σ rounds over prompts' (gained, rounds): of a ratio of two sums, by linearisation.

    Cochran, Sampling Techniques, 3rd ed., section 6.4. Rounds of one prompt are not independent, prompts are.
    """
    rounds = sum(count for _, count in pairs)
    if len(pairs) < 2 or not rounds:
        return None
    ratio = sum(gained for gained, _ in pairs) / rounds
    squares = sum((gained - ratio * count) ** 2 for gained, count in pairs)
    return math.sqrt(squares * len(pairs) / (len(pairs) - 1)) / rounds


def speed_of(generations: Sequence[Generation]) -> float:
    """Tokens per second of the rounds; the first token of an answer belongs to its prefill."""
    seconds = sum(generation.seconds for generation in generations)
    return sum(len(generation.tokens) - 1 for generation in generations) / seconds if seconds else 0.0


def lossless_of(
    target: Target, prompts: Sequence[Sequence[int]], pairs: Sequence[tuple[Generation, Generation]]
) -> Lossless:
    different = [at for at, (slow, fast) in enumerate(pairs) if slow.tokens != fast.tokens]
    if not different:
        return Lossless(len(pairs), len(pairs), None)
    at = different[0]
    slow, fast = (generation.tokens for generation in pairs[at])
    where = next((i for i, (a, b) in enumerate(zip(slow, fast, strict=False)) if a != b), min(len(slow), len(fast)))
    gap = ""
    if where < min(len(slow), len(fast)):
        captured = target.capture(torch.tensor([[*prompts[at], *slow[:where]]]), None, ())
        logits = target.logits(captured.last[0, -1])
        gap = f"; the two tokens' logits differ by {abs(float(logits[slow[where]] - logits[fast[where]])):.2g}"
    return Lossless(
        len(pairs), len(pairs) - len(different), f"prompt {at}, token {where} ({target.dtype} weights{gap})"
    )
