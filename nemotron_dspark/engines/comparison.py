"""A running engine as one more row of `nds compare`: its draft's acceptance, and its answers beside plain ones here."""

from collections.abc import Callable

from nemotron_dspark.config import EvalConfig
from nemotron_dspark.decoding.decoder import Generation
from nemotron_dspark.engines.clients import EngineAnswer, EngineClient
from nemotron_dspark.engines.measure import measure_prompts, speed_of_answers
from nemotron_dspark.evaluation.comparison import Compared, Group, plain_answers
from nemotron_dspark.evaluation.measure import Lossless, speed_of
from nemotron_dspark.targets import Target


def compare_engine(
    engine: EngineClient,
    target: Target,
    group: Group,
    config: EvalConfig,
    progress: Callable[[str, int, int], None] | None = None,
) -> Compared:
    """The draft of ``engine`` on ``group``, its greedy answers against those of ``target`` without a draft.

    Raises:
        InputError: it does not draft.
        EnvironmentFault: it does not answer.
    """

    def told(what: str, done: int, total: int) -> None:
        if progress:
            progress(f"{group.label}, {engine.title}, {what}", done, total)

    fast, measurements = measure_prompts(engine, group.prompts, config, told)
    plain = plain_answers(target, group, config)
    differing = [at for at, pair in enumerate(zip(plain, fast, strict=True)) if not _same(target, *pair)]
    return Compared(
        draft=engine.url,
        workload=group.workload,
        length=group.length,
        prompt_tokens=sum(map(len, group.prompts)) / len(group.prompts),
        measurements=measurements,
        lossless=Lossless(len(plain), len(plain) - len(differing), f"prompt {differing[0]}" if differing else None),
        plain_tokens_per_second=speed_of(plain),
        tokens_per_second=speed_of_answers(fast),
        round_seconds=None,
        cost=None,
    )


def _same(target: Target, plain: Generation, answer: EngineAnswer) -> bool:
    """By token ids without a stop token, which not every engine tells, or by text where it tells no ids."""
    if not answer.tokens:
        return target.tokenizer.decode(plain.tokens, skip_special_tokens=True) == answer.text
    own, other = (
        [token for token in tokens if token not in target.stop_ids] for tokens in (plain.tokens, answer.tokens)
    )
    return own == other
