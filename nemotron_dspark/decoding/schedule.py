"""How many tokens of each request a round drafts and verifies.

- off: whole blocks.
- threshold: a request's block ends before the first slot whose chance to be kept is below a number.
- cost: what raises the expected tokens a second, by the chances and by what rounds were measured to cost here.

The target's pass is a rectangle: it costs what its longest block costs. So of all choices of a prefix of each
request's block the best is one length k for all of them, the k that maximises

    (B + Σ_r Σ_{j≤k} s_rj) / T(B, k)

for B requests, where s_rj is the chance that the first j drafts of request r are kept. The maximum is over all k: a
cost that rises in stairs has several local ones. That is foretold before a block is drafted. While it is drafted the
chances of its own slots become known, and it goes on while the tokens that it may still gain are worth their seconds
at the rate that was foretold, λ: the best rule for the long run is the k of most Σ_r Σ_{j≤k} s_rj - λ T(B, k)
(Dinkelbach 1967), and not of the most tokens a second in each round.

Whether a slot is verified is decided before its token is drawn, from tokens before it, so that the output stays the
target's (Leviathan et al. 2023 hold for every length that is a stopping time). Chances of slots that are not drafted
yet are what the request, or requests before it, had kept there.
"""

import itertools
import math
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, Protocol

from nemotron_dspark.decoding.sampling import Sampling
from nemotron_dspark.drafts.costs import CostTable, read_costs
from nemotron_dspark.drafts.dspark import Draft
from nemotron_dspark.errors import InputError

Signal = Literal["confidence head", "margin"]


class Request(Protocol):
    """What a schedule looks at of a `Generation`."""

    sampling: Sampling
    proposed: list[int]
    survived: list[int]
    accepted: list[int]


THRESHOLD = 0.5  # of a threshold that is not given
_UNSEEN = 0.7  # chance of a slot of which nothing is known yet: drafting begins with hope
_PRIOR = 2.0  # tries that the shares of all requests weigh among those of one
_OWN_MEMORY, _COMMON_MEMORY = 128, 1000  # tries after which one weighs 1/e, of a request and of all together
_RETRY_SHARE = 0.01  # of the time without drafting that may go into trying whether it pays again
_MOST_RETRIES = 3  # that are saved up for
_WORTH_LOOKING = 1.25  # times what a token costs that a whole block must cost, for its chances to be looked at
_ARM_MEMORY = 128  # rounds after which one weighs 1/e in the comparison of looking with not looking
_OTHER_ARM = 12  # every so many rounds the way is taken that has gained less


class BlockLengths:
    """The lengths of one round's blocks. While they are drafted they may only become shorter."""

    signal: Signal | None = None  # what the chances of a slot are made of, if it looks at them

    def __init__(self, lengths: list[int]):
        self.lengths = lengths

    def look(self, slot: int, chances: Sequence[float]) -> None:
        """End blocks before ``slot`` where it does not pay, given each request's chance that this slot is kept.

        It is called before the slot's tokens are drawn, if there is a signal.
        """


class Schedule:
    """Whole blocks: what `off` is, and what the others change."""

    signal: Signal | None = None  # what they may look at

    def begin(self, generations: Sequence[Request], gamma: int) -> BlockLengths:
        """Lengths of the blocks of a round of ``generations``, at most ``gamma`` tokens each."""
        return BlockLengths([gamma if each.sampling.speculative else 0 for each in generations])

    def learn(self, generation: Request) -> None:
        """Learn from the last round of ``generation``, which is over."""


class Threshold(Schedule):
    """A request's block ends before the first slot whose chance is below a number."""

    signal = "confidence head"

    def __init__(self, least: float):
        self.least = least

    def begin(self, generations: Sequence[Request], gamma: int) -> BlockLengths:
        return _ThresholdLengths(super().begin(generations, gamma).lengths, self.least)


class _ThresholdLengths(BlockLengths):
    signal = "confidence head"

    def __init__(self, lengths: list[int], least: float):
        super().__init__(lengths)
        self.least = least

    def look(self, slot: int, chances: Sequence[float]) -> None:
        for row, chance in enumerate(chances):
            if chance < self.least:
                self.lengths[row] = min(self.lengths[row], slot)


class Cost(Schedule):
    """The length for all requests of a round that promises most tokens a second; none, where drafting does not pay.

    Where it did not, a hundredth of the time is spent on trying again.
    """

    def __init__(self, costs: CostTable, signal: Signal | None = None):
        self.signal = signal
        self._costs = costs
        # Of all greedy requests, and of all others: of the two, other drafts are kept.
        self._common = {greedy: Acceptance(costs.gamma, _COMMON_MEMORY) for greedy in (True, False)}
        self._own: weakref.WeakKeyDictionary[Request, Acceptance] = weakref.WeakKeyDictionary()
        self._credit = math.inf  # seconds that trying again may cost
        self._worth = 0.0  # seconds that a draft saves which is kept in a round that tries
        # By the binary digits of the number of requests, and which of the two kinds of sampling they have.
        self._arms: dict[tuple[int, frozenset[bool]], Arms] = {}
        self._last: Callable[[int], None] | None = None  # tells of the last round's tokens to its arm
        self._gained = 0  # in the last round
        self._looks = False  # in the last round

    def begin(self, generations: Sequence[Request], gamma: int) -> BlockLengths:
        if self._last is not None:
            self._last(self._gained)
        self._last, self._gained = None, 0
        common = {greedy: each.shares([_UNSEEN] * gamma) for greedy, each in self._common.items()}
        shares = []
        for each in generations:
            own = self._of(each)[1]
            prior = common[each.sampling.temperature == 0]
            shares.append(own.shares(prior) if each.sampling.speculative else [0.0] * gamma)
        seconds = self._costs.rounds(len(generations))
        foretold = [survival(each) for each in shares]
        length, least, self._worth = best_length(foretold, seconds), 0, 0.0
        kinds = frozenset(each.sampling.temperature == 0 for each in generations)
        wanted, arms = any(map(any, shares)), self._arms.setdefault((len(generations).bit_length(), kinds), Arms())
        can_look = bool(self.signal) and seconds[gamma] > _WORTH_LOOKING * seconds[1]
        looks = can_look and wanted and (arms.choose() if length else arms.beats(len(generations) / seconds[0]))
        if not length and not looks and wanted and (length := self._try_again(generations, seconds)):
            looks = can_look and not arms.looked
            least = 1 if looks else length
        self._looks = looks
        if not length and not looks:
            return BlockLengths([0] * len(generations))
        lengths = [length if any(each) else 0 for each in shares]
        found = BlockLengths(lengths)
        begun = [seconds[0] + self._costs.at(len(generations))[0][1], *seconds[1:]]  # before anything is looked at
        if looks:
            lengths = [gamma if any(each) else 0 for each in shares]
            rate = (len(generations) + sum(map(sum, (each[:length] for each in foretold)))) / seconds[length]
            found = _CostLengths(lengths, self.signal, shares, begun, rate, least)
        self._last = lambda tokens: arms.add(looks, tokens, begun[max(found.lengths)])
        return found

    def learn(self, generation: Request) -> None:
        proposed, kept = generation.proposed[-1], generation.survived[-1]
        judged = kept if kept == generation.accepted[-1] else proposed  # behind a stop token nothing is known
        self._credit += self._worth * kept
        self._gained += kept + 1
        if not self._looks:  # what is looked at is chosen: no fair sample
            for acceptance in self._of(generation):
                acceptance.add(kept, judged)

    def _of(self, generation: Request) -> tuple["Acceptance", "Acceptance"]:
        """The acceptance of all requests like ``generation``, and its own."""
        own = self._own.setdefault(generation, Acceptance(self._costs.gamma, _OWN_MEMORY))
        return self._common[generation.sampling.temperature == 0], own

    def _try_again(self, generations: Sequence[Request], seconds: Sequence[float]) -> int:
        """The length to try although it promises less than none: the best if all were kept. 0 while it is too dear.

        What is kept pays for the next try, so that a text which has become easy is tried on at once.
        """
        length = best_length([[1.0] * (len(seconds) - 1)], seconds)
        loss = max(seconds[length] - seconds[0], 0.0)
        self._credit = min(self._credit + _RETRY_SHARE * seconds[0], _MOST_RETRIES * loss)
        new = any(each.sampling.speculative and not self._of(each)[1].seen for each in generations)
        if not length or self._credit < (loss if new else 2 * loss):  # one is kept for a request that comes new
            return 0
        self._credit -= loss
        self._worth = seconds[0] / len(generations)
        return length


class _CostLengths(BlockLengths):
    def __init__(
        self,
        lengths: list[int],
        signal: Signal | None,
        shares: Sequence[Sequence[float]],
        seconds: Sequence[float],
        rate: float,
        least: int,
    ):
        super().__init__(lengths)
        self.signal, self._least = signal, least
        self._shares = [list(each) for each in shares]
        self._alive = [float(any(each)) for each in shares]  # chance that all drafts so far are kept, by request
        self._worth = [rate * each for each in seconds]  # tokens that a round of a length must gain
        self._ended = False

    def look(self, slot: int, chances: Sequence[float]) -> None:
        if self._ended:
            return
        self._alive = [alive * chance for alive, chance in zip(self._alive, chances, strict=True)]
        alive, gain, longer = self._alive, 0.0, False
        for ahead in range(slot, len(self._worth) - 1):
            if ahead > slot:
                alive = [each * share[ahead] for each, share in zip(alive, self._shares, strict=True)]
            gain += sum(alive)
            longer = longer or gain > self._worth[ahead + 1] - self._worth[slot]
        if not longer and slot >= self._least:
            self._ended = True
            self.lengths = [min(length, slot) for length in self.lengths]


class Arms:
    """Whether looking at a block's chances gains more than not looking: both are done, and compared.

    Chances may mislead, where texts are other than those that they were calibrated on.
    """

    def __init__(self) -> None:
        self._tokens, self._seconds, self._rounds = [0.0, 0.0], [0.0, 0.0], 0

    def choose(self) -> bool:
        """Whether to look in this round."""
        self._rounds += 1
        if not all(self._seconds):
            return not self._seconds[True]
        rates = [tokens / seconds for tokens, seconds in zip(self._tokens, self._seconds, strict=True)]
        return (rates[True] > rates[False]) != (self._rounds % _OTHER_ARM == 0)

    @property
    def looked(self) -> bool:
        """Whether it is known what looking gains."""
        return self._seconds[True] > 0

    def beats(self, rate: float) -> bool:
        """Whether looking is known to gain more tokens a second than ``rate``."""
        return self.looked and self._tokens[True] / self._seconds[True] > rate

    def add(self, looked: bool, tokens: int, seconds: float) -> None:
        """A round gained ``tokens`` and took ``seconds``."""
        fade = 1 - 1 / _ARM_MEMORY
        self._tokens[looked] = fade * self._tokens[looked] + tokens
        self._seconds[looked] = fade * self._seconds[looked] + seconds


class Acceptance:
    """How many drafts were kept at each slot, of those that were tried there; the recent ones weigh most."""

    def __init__(self, gamma: int, memory: int):
        self._kept = [0.0] * gamma
        self._tried = [0.0] * gamma
        self._fade = 1 - 1 / memory

    @property
    def seen(self) -> bool:
        """Whether anything was tried."""
        return self._tried[0] > 0

    def add(self, kept: int, judged: int) -> None:
        """A round kept ``kept`` drafts of ``judged``."""
        for slot in range(min(kept + 1, judged)):
            self._tried[slot] = self._fade * self._tried[slot] + 1
            self._kept[slot] = self._fade * self._kept[slot] + (slot < kept)

    def shares(self, prior: Sequence[float]) -> list[float]:
        """Kept of tried by slot, where ``prior`` weighs as `_PRIOR` tries."""
        pairs = zip(self._kept, self._tried, prior, strict=True)
        return [(kept + _PRIOR * before) / (tried + _PRIOR) for kept, tried, before in pairs]


def survival(shares: Sequence[float]) -> list[float]:
    """The chance that all drafts up to a slot are kept, from each slot's if those before it are."""
    return list(itertools.accumulate(shares, lambda before, share: before * share))


def best_length(foretold: Sequence[Sequence[float]], seconds: Sequence[float]) -> int:
    """The length of all blocks with the most tokens a second, the first of equals.

    Args:
        foretold: [B][γ], the chance that the drafts of a request up to each slot are kept.
        seconds: [γ + 1], of a round that verifies no drafts, one of each request, and so on.
    """
    tokens = [float(len(foretold))]
    for column in zip(*foretold, strict=True):
        tokens.append(tokens[-1] + sum(column))
    return max(range(len(tokens)), key=lambda length: tokens[length] / seconds[length])


def schedule_for(name: str, draft: Draft | None, profile: Path | str | None = None) -> Schedule:
    """The schedule that a configuration calls ``name``: off, cost, threshold or threshold:NUMBER.

    It remembers what its requests kept: one decoder has it alone. ``profile`` None is the draft's own.

    Raises:
        InputError: what it needs is not there.
    """
    kind, _, number = name.partition(":")
    if draft is None or kind == "off":
        return Schedule()
    if kind == "threshold":
        if draft.confidence_head is None:
            raise InputError("The draft has no confidence head for a threshold.", "Set schedule to off or cost.")
        if draft.lines and not draft.temperatures:
            raise InputError("The draft was calibrated by its margins.", "Calibrate its confidence head, or take cost.")
        return Threshold(float(number or THRESHOLD))
    costs = read_costs(Path(profile), draft.config.block_size) if profile is not None else draft.costs
    if costs is None:
        raise InputError(
            "schedule=cost needs to know what a round costs on this machine, and the draft was not profiled.",
            "Run `nds profile` with this target and draft once, or give a table with --profile.",
        )
    if draft.lines and not draft.temperatures:
        return Cost(costs, "margin")
    return Cost(costs, "confidence head" if draft.confidence_head is not None else None)
