"""Measure the accepted length of a draft in a running engine, from the engine's own counters, beside plain decoding.

Prompts are asked one at a time. Accepted length is 1 + accepted drafts / rounds, the target's own token included. Only
`nds serve` leaves its draft out for a single request; plain answers of the other engines come from a second one.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nemotron_dspark import files
from nemotron_dspark.chat.format import Message, render_prompt
from nemotron_dspark.config import EvalConfig, RunConfig
from nemotron_dspark.data.prompts import rendered_turns
from nemotron_dspark.data.sources import Given, named, one_file
from nemotron_dspark.engines.clients import Counts, EngineAnswer, EngineClient, connect
from nemotron_dspark.errors import CheckError, InputError
from nemotron_dspark.evaluation.lossless import MOST_PROMPTS, TOKENS, SampledLossless, check_count
from nemotron_dspark.evaluation.lossless import compare as compare_sampled
from nemotron_dspark.evaluation.measure import ratio_error
from nemotron_dspark.targets import Checkpoint

_WARM_TOKENS = 8
Progress = Callable[[str, int, int], None]  # what is measured, prompts done, prompts in all


@dataclasses.dataclass(frozen=True)
class EngineMeasurement:
    """Acceptance of one draft in one engine at one temperature."""

    temperature: float
    prompts: int
    tokens: int  # written
    rounds: float
    accepted_length: float
    standard_error: float | None  # of the accepted length over prompts; None where requests are not counted apart
    per_position: tuple[float, ...]  # share of rounds that kept the draft at this slot; empty where it is not told
    tokens_per_second: float  # one request at a time, the prompt's pass and the way there included


@dataclasses.dataclass(frozen=True)
class PlainComparison:
    """Greedy answers with the draft against greedy answers of an engine without one."""

    engine: str
    url: str
    prompts: int
    identical: int
    first_difference: str | None
    tokens_per_second: float


@dataclasses.dataclass(frozen=True)
class EngineEvaluation:
    """Everything `nds eval --engine` reports."""

    engine: str
    url: str
    model: str
    prompts_file: str
    measurements: tuple[EngineMeasurement, ...]
    plain: PlainComparison | None
    sampled: SampledLossless | None = None  # where it was asked for

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"sampled": self.sampled and self.sampled.to_json()}

    def check_lossless(self) -> None:
        """`CheckError` when the draft was found to change the distribution of sampled answers."""
        if self.sampled is not None and not self.sampled.equal:
            raise CheckError(
                f"Sampled answers of {self.url} are not distributed as plain ones (p = {self.sampled.p_value:.2g}).",
                "See whether both engines sample alike and compute in float32; half precision rounds blocks otherwise.",
            )

    def save(self, folder: Path) -> Path:
        """Write ``eval.json`` there; returns its path."""
        files.write_json(folder / "eval.json", self.to_json())
        return folder / "eval.json"


def evaluate_engine(
    config: RunConfig,
    url: str,
    prompts: Given,
    *,
    plain_url: str | None = None,
    limit: int | None = None,
    lossless: int | None = None,
    progress: Progress = lambda what, done, total: None,
) -> EngineEvaluation:
    """Measure the draft of the engine at ``url`` on the (first ``limit``) prompts, rendered as ``config.target`` does.

    Without a target the engine renders them. Greedy always, then ``config.eval.temperatures``. With ``plain_url``, an
    engine that serves the same target without a draft, its greedy answers are compared token for token; with
    ``lossless`` also so many sampled ones to a few prompts, in distribution (`evaluation.lossless`).

    Raises:
        InputError: no prompt fits, no such engine, or it does not draft; or there is nothing to compare with.
        EnvironmentFault: it does not answer.
    """
    engine = connect(url)
    plain = connect(plain_url) if plain_url is not None else engine.plain()
    if lossless is not None:
        check_count(lossless)
        if plain is None:
            raise InputError(
                f"{engine.title} does not leave its draft out, so there is nothing to compare with.",
                "Give an engine that serves the same target without a draft as --plain-engine.",
            )
    ids = _rendered(config, engine, one_file(prompts), limit)
    greedy, measurements = measure_prompts(engine, ids, config.eval, progress)
    compared = None
    if plain is not None:
        _answers(plain, ids[:1], _WARM_TOKENS, 0.0, 0, "warming up", progress)
        slow = _answers(plain, ids, config.eval.max_new_tokens, 0.0, config.eval.seed, "plain", progress)
        compared = compare(plain, slow, greedy)
    sampled = _sampled(engine, plain, ids, lossless, config, progress) if plain and lossless else None
    return EngineEvaluation(engine.title, engine.url, engine.model, named(prompts), measurements, compared, sampled)


def measure_prompts(
    engine: EngineClient, prompts: Sequence[Sequence[int]], config: EvalConfig, progress: Progress
) -> tuple[list[EngineAnswer], tuple[EngineMeasurement, ...]]:
    """The engine's greedy answers to prompts given as token ids, and its draft's acceptance, greedy first.

    Raises:
        InputError: it does not draft.
        EnvironmentFault: it does not answer.
    """
    _answers(engine, prompts[:1], _WARM_TOKENS, 0.0, 0, "warming up", progress)
    answers: dict[float, list[EngineAnswer]] = {}
    measurements = []
    for temperature in (0.0, *(t for t in config.temperatures if t > 0)):
        before = engine.totals()
        what = f"temperature {temperature:g}"
        found = _answers(engine, prompts, config.max_new_tokens, temperature, config.seed, what, progress)
        after = engine.totals()
        total = after - before if before is not None and after is not None else None
        answers[temperature] = found
        measurements.append(summarise(found, temperature, total))
        if not measurements[-1].rounds:
            raise InputError(
                f"{engine.title} at {engine.url} counted no draft.",
                "Start it with one: `nds engine` prints the command; a plain one goes to --plain-engine.",
            )
    return answers[0.0], tuple(measurements)


def _sampled(
    engine: EngineClient,
    plain: EngineClient,
    prompts: Sequence[Sequence[int]],
    answers: int,
    config: RunConfig,
    progress: Progress,
) -> SampledLossless:
    """The first tokens of ``answers`` answers to each prompt, with seeds that differ between the two engines."""
    temperature, groups = config.eval.sampled_temperature, []
    for at, ids in enumerate(prompts[:MOST_PROMPTS]):
        pair = []
        for kind, asked in enumerate((plain, engine)):
            seed = config.eval.seed + (2 * at + kind) * answers
            what = f"sampled answers to prompt {at + 1}, {('plain', 'drafted')[kind]}"
            found = _answers(asked, [ids] * answers, TOKENS, temperature, seed, what, progress)
            if not all(answer.tokens for answer in found):
                raise InputError(f"{asked.title} tells no token ids to compare.", "Use a newer version of it.")
            pair.append([answer.tokens for answer in found])
        groups.append((pair[0], pair[1]))
    return compare_sampled(groups, temperature)


def summarise(answers: Sequence[EngineAnswer], temperature: float, total: Counts | None) -> EngineMeasurement:
    """Sum up answers; ``total`` are the engine's own counts of them where it keeps any."""
    apart = [answer.counts for answer in answers if answer.counts is not None]
    counts = total if total is not None and total.rounds else sum(apart, Counts())
    rounds = max(counts.rounds, 1.0)
    return EngineMeasurement(
        temperature=temperature,
        prompts=len(answers),
        tokens=sum(answer.length for answer in answers),
        rounds=counts.rounds,
        accepted_length=1 + counts.accepted / rounds,
        standard_error=ratio_error([(each.accepted + each.rounds, each.rounds) for each in apart]),
        per_position=tuple(count / rounds for count in counts.per_position),
        tokens_per_second=speed_of_answers(answers),
    )


def compare(plain: EngineClient, slow: Sequence[EngineAnswer], fast: Sequence[EngineAnswer]) -> PlainComparison:
    """Whether the answers without and with a draft are the same: by token ids, by text where an engine tells none."""
    differing = [at for at, (one, other) in enumerate(zip(slow, fast, strict=True)) if _said(one) != _said(other)]
    first = None
    if differing:
        one, other = slow[differing[0]], fast[differing[0]]
        pairs = enumerate(itertools.zip_longest(_said(one), _said(other)))
        where = next(at for at, (left, right) in pairs if left != right)
        first = f"prompt {differing[0]}, {'token' if one.tokens and other.tokens else 'character'} {where}"
    same = len(slow) - len(differing)
    return PlainComparison(plain.title, plain.url, len(slow), same, first, speed_of_answers(slow))


def _said(answer: EngineAnswer) -> Sequence[Any]:
    return answer.tokens or answer.text


def speed_of_answers(answers: Sequence[EngineAnswer]) -> float:
    """Tokens a second, the prompt's pass and the way there counted."""
    seconds = sum(answer.seconds for answer in answers)
    return sum(answer.length for answer in answers) / seconds if seconds else 0.0


def _answers(
    engine: EngineClient,
    ids: Sequence[Sequence[int]],
    max_tokens: int,
    temperature: float,
    seed: int,
    what: str,
    progress: Progress,
) -> list[EngineAnswer]:
    found = []
    for at, prompt in enumerate(ids):
        found.append(engine.answer(prompt, max_tokens=max_tokens, temperature=temperature, seed=seed + at))
        progress(what, at + 1, len(ids))
    return found


def _rendered(config: RunConfig, engine: EngineClient, file: Path, limit: int | None) -> list[list[int]]:
    """Token ids of the prompts that leave room for an answer, by the target's tokenizer or the engine's."""
    room, checkpoint = float("inf"), None
    if config.target.name is not None:
        checkpoint = Checkpoint.of(config.target)
        room = checkpoint.read_spec().max_position_embeddings - config.eval.max_new_tokens
    tokenizer = checkpoint.load_tokenizer() if checkpoint else None

    def render(messages: Sequence[Message], tools: Sequence[Any]) -> list[int]:
        if tokenizer is not None:
            return render_prompt(tokenizer, messages, config.data.thinking, tools)
        return engine.render([message.to_json() for message in messages])

    def answer(ids: list[int]) -> str:
        return engine.answer(ids, max_tokens=config.eval.max_new_tokens, temperature=0.0, seed=config.eval.seed).text

    fitting = rendered_turns(file, render, answer, room=room, limit=limit)
    if not fitting:
        raise InputError(
            f"No prompt of {file} leaves room for {config.eval.max_new_tokens} new tokens.",
            "Use shorter prompts, or --set eval.max_new_tokens to a smaller number.",
        )
    return fitting
