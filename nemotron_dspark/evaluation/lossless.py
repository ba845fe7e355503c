"""Are answers that were sampled with a draft distributed as those without? A chi-square test that states its power.

N answers to each of a few prompts are sampled both ways, with other seeds, and their first tokens are compared
position by position: Pearson's test of homogeneity with a cell for every token that is seen often enough, sixteen for
the others, and the prompts' statistics added up. Distribution functions are sums of PyTorch's incomplete gamma.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from nemotron_dspark.decoding.decoder import Decoder, Generation
from nemotron_dspark.decoding.sampling import Sampling
from nemotron_dspark.errors import InputError

TOKENS = 4  # of each answer; the first one comes from the prompt's pass, with or without a draft
MOST_PROMPTS = 8
FALSE_ALARM = 0.001  # probability that equal distributions are called different
POWER = 0.9
_LEAST = 10  # tokens of both kinds in a cell, so that each kind's expected count is at least 5
_RARE_CELLS = 16  # in which tokens that are seen less often share a cell, by their id
_TOGETHER = 32  # answers decoded in one batch

Answer = tuple[int, ...]  # the first tokens of one answer
Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class Position:
    """The test at one position of the answers."""

    statistic: float  # Pearson's chi-square, over prompts
    degrees: int  # of freedom, over prompts
    p_value: float
    detectable: float  # see `SampledLossless`


@dataclasses.dataclass(frozen=True)
class SampledLossless:
    """Sampled answers with a draft against sampled answers without."""

    temperature: float
    prompts: int
    answers: int  # to each prompt, of each kind
    positions: tuple[Position, ...]
    p_value: float  # of the smallest over positions, times their number (Bonferroni)
    detectable: float  # a change of this much probability at every prompt would have been found, with `POWER`

    @property
    def equal(self) -> bool:
        """Whether nothing speaks for a difference."""
        return self.p_value >= FALSE_ALARM

    def sentence(self) -> str:
        """The result in words."""
        result = "no difference was found" if self.equal else "they differ"
        tokens = len(self.positions)
        return (
            f"{self.answers} sampled answers to each of {self.prompts} prompts at temperature {self.temperature:g}, "
            f"with the draft and without: {result} in their first {tokens} tokens (p = {self.p_value:.2g}). "
            f"Had the draft moved {self.detectable:.1%} of the probability at some position of every prompt, "
            f"{POWER:.0%} of such tests would have found it; {FALSE_ALARM:.1%} call equal distributions different."
        )

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"power": POWER, "false_alarm": FALSE_ALARM, "equal": self.equal}


def sampled_lossless(
    plain: Decoder,
    speculative: Decoder,
    prompts: Sequence[Sequence[int]],
    answers: int,
    *,
    temperature: float,
    seed: int,
    progress: Progress | None = None,
) -> SampledLossless:
    """Sample ``answers`` to each of the first `MOST_PROMPTS` prompts both ways and compare their first tokens."""
    prompts = prompts[:MOST_PROMPTS]
    groups = []
    for at, ids in enumerate(prompts):
        first = seed + 2 * answers * at
        groups.append(
            (
                list(_drawn(plain, ids, temperature, range(first, first + answers))),
                list(_drawn(speculative, ids, temperature, range(first + answers, first + 2 * answers))),
            )
        )
        if progress:
            progress("sampled answers", at + 1, len(prompts))
    return compare(groups, temperature)


def _drawn(decoder: Decoder, prompt: Sequence[int], temperature: float, seeds: range) -> Iterator[Answer]:
    """The first tokens of an answer under each seed; the prompt is read once."""
    read = decoder.read(prompt)
    for start in range(0, len(seeds), _TOGETHER):
        batch: list[Generation] = []
        for seed in seeds[start : start + _TOGETHER]:
            sampling = Sampling(temperature=temperature, seed=seed, max_new_tokens=TOKENS)
            batch.append(decoder.start(read, sampling))
        while any(generation.finished is None for generation in batch):
            decoder.step(batch)
        for generation in batch:
            decoder.drop(generation)
            yield tuple(generation.tokens)


def check_count(answers: int) -> None:
    """`InputError` when so few answers could show nothing."""
    if answers < 2 * _LEAST:
        raise InputError(f"{answers} answers show nothing.", f"Give --lossless {2 * _LEAST} or more; 500 is a start.")


def compare(groups: Sequence[tuple[Sequence[Answer], Sequence[Answer]]], temperature: float) -> SampledLossless:
    """Test answers without a draft against as many with one, a pair of groups for each prompt."""
    positions = []
    for place in range(TOKENS):
        statistic, degrees = 0.0, 0
        for plain, speculative in groups:
            value, freedom = _pearson(_counts(plain, place), _counts(speculative, place))
            statistic, degrees = statistic + value, degrees + freedom
        # Total variation δ of every prompt's cells adds 2 N δ² at least to the noncentrality: Σ (p−q)² / ((p+q)/2) ≥
        # (Σ |p−q|)² = (2δ)² by Cauchy and Schwarz, and N/2 of it is what two groups of N add.
        needed = _noncentrality(degrees, FALSE_ALARM / TOKENS, POWER)
        answers = sum(len(plain) for plain, _ in groups)
        detectable = min(1.0, math.sqrt(needed / (2 * answers))) if degrees else 1.0
        positions.append(Position(statistic, degrees, _survival(statistic, degrees), detectable))
    tested = [position for position in positions if position.degrees]
    return SampledLossless(
        temperature,
        len(groups),
        min(len(plain) for plain, _ in groups),
        tuple(positions),
        min([1.0, *(position.p_value * len(positions) for position in tested)]),
        max([position.detectable for position in tested], default=1.0),
    )


def _counts(answers: Sequence[Answer], place: int) -> collections.Counter[int | None]:
    """How often each token stands at ``place``; None where the answer had ended."""
    return collections.Counter(answer[place] if place < len(answer) else None for answer in answers)


def _pearson(one: collections.Counter[Any], other: collections.Counter[Any]) -> tuple[float, int]:
    """The statistic of homogeneity of two equally large groups, and its degrees of freedom."""
    cells: dict[Any, tuple[int, int]] = {}

    def add(cell: Any, pair: tuple[int, int]) -> None:
        before = cells.get(cell, (0, 0))
        cells[cell] = (before[0] + pair[0], before[1] + pair[1])

    for token in {*one, *other}:
        pair = (one[token], other[token])
        add(token if sum(pair) >= _LEAST or token is None else ("rare", token % _RARE_CELLS), pair)
    for cell in [cell for cell, pair in cells.items() if sum(pair) < _LEAST]:
        add("few", cells.pop(cell))
    if "few" in cells and sum(cells["few"]) < _LEAST and len(cells) > 1:
        few = cells.pop("few")
        add(min(cells, key=lambda cell: sum(cells[cell])), few)
    return sum((a - b) ** 2 / (a + b) for a, b in cells.values()), len(cells) - 1


def _survival(value: float, degrees: int, noncentrality: float = 0.0) -> float:
    """P(χ² ≥ value); noncentral as the Poisson mixture of central ones (Johnson, Kotz & Balakrishnan, ch. 29)."""
    if not degrees:
        return 1.0
    half = noncentrality / 2
    terms = torch.arange(int(half + 12 * math.sqrt(half) + 60), dtype=torch.float64)
    weights = torch.exp(torch.special.xlogy(terms, torch.tensor(half)) - half - torch.lgamma(terms + 1))
    tails = torch.special.gammaincc(degrees / 2 + terms, torch.full_like(terms, value / 2))
    return min(1.0, float((weights * tails).sum()))


def _noncentrality(degrees: int, alpha: float, power: float) -> float:
    """The noncentrality at which a test at level ``alpha`` finds the difference with probability ``power``."""
    if not degrees:
        return math.inf
    critical = _bisect(lambda value: alpha - _survival(value, degrees))
    return _bisect(lambda size: _survival(critical, degrees, size) - power)


def _bisect(rising: Callable[[float], float]) -> float:
    """Where an increasing function of a number from 0 is 0."""
    low, high = 0.0, 1.0
    while rising(high) < 0:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < 0 else (low, middle)
    return (low + high) / 2
