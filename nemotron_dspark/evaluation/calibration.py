"""Make what a draft says of its acceptance a probability: fitted on rounds, measured on others.

A draft gives one number z_k a slot: the logit of its confidence head or, where it has none, the margin of its first
logit over its second. The chance that the slots up to k are all kept, their survival, is taken to be

    s_k = Π_{j≤k} σ(w_j · z_j + b_j)

- A head is scaled (w = 1/T, b = 0) by sequential temperature scaling (DSpark paper, section on confidence): slot after
  slot, T_k is the one of a grid at which s_k errs least, T_1 to T_{k-1} staying as they are.
- A margin gets both by logistic regression, a slot at a time (as vLLM's drafts without a head).
- The error is the expected calibration error of s_k against "the first k drafts were kept" over 15 bins of equal width.
"""

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from nemotron_dspark.decoding.decoder import Generation

BINS = 15
GRID = tuple(2.0 ** (step / 16) for step in sorted(range(-64, 65), key=abs))  # 1/16 to 16; of equals the nearest to 1
_PRIOR = 1.0  # weight of the prior of a slot's two coefficients, in rounds: slots that are rarely reached keep to it
_NEWTON_STEPS = 50


@dataclasses.dataclass(frozen=True)
class Rounds:
    """What the draft foretold and the target kept, a row for each verified block."""

    logits: Tensor  # [N, γ] float64, of the confidence head, or margins
    kept: Tensor  # [N] drafts kept
    judged: Tensor  # [N] drafts of which that is known: γ, or fewer where an accepted stop token ended the round

    @staticmethod
    def of(generations: Sequence[Generation], gamma: int) -> "Rounds":
        """Rounds of finished ``generations`` with whole blocks, whose decoder recorded confidence, or else margins."""
        rows = [
            (logits, survived, survived if survived == gained else gamma)
            for each in generations
            for logits, survived, gained in zip(
                each.confidence or each.margins, each.survived, each.accepted, strict=True
            )
        ]
        logits = torch.tensor([row[0] for row in rows], dtype=torch.float64).reshape(-1, gamma)
        return Rounds(logits, torch.tensor([row[1] for row in rows]), torch.tensor([row[2] for row in rows]))

    @staticmethod
    def cat(parts: Sequence["Rounds"]) -> "Rounds":
        """The rows of all ``parts``."""
        return Rounds(*(torch.cat([getattr(part, name) for part in parts]) for name in ("logits", "kept", "judged")))

    def __len__(self) -> int:
        return len(self.kept)

    def outcome(self, slot: int) -> tuple[Tensor, Tensor]:
        """Whether it is known of each round that it kept ``slot`` or not, [N] bool; and whether it did, [N] float64."""
        return self.judged > slot, (self.kept > slot).double()

    def trials(self, slot: int) -> Tensor:
        """[N] bool: the rounds that kept all before ``slot``, and so tried it."""
        return (self.kept >= slot) & (self.judged > slot)


@dataclasses.dataclass(frozen=True)
class Calibration:
    """The coefficients of every slot."""

    weights: tuple[float, ...]  # 1/T of a confidence head
    biases: tuple[float, ...]  # 0 of a confidence head

    @staticmethod
    def none(gamma: int) -> "Calibration":
        """The numbers as they are: of a margin, the probability of the first of two tokens."""
        return Calibration((1.0,) * gamma, (0.0,) * gamma)

    @property
    def temperatures(self) -> tuple[float, ...]:
        return tuple(1 / weight for weight in self.weights)

    def survival(self, logits: Tensor) -> Tensor:
        """s_k [N, γ] of ``logits`` [N, γ]."""
        calibrated = logits * logits.new_tensor(self.weights) + logits.new_tensor(self.biases)
        return torch.sigmoid(calibrated).cumprod(1)


@dataclasses.dataclass(frozen=True)
class ReliabilityBin:
    """Rounds whose survival is foretold alike."""

    foretold: float  # mean
    kept: float  # share that survived
    share: float  # of all rounds


def fit_temperatures(rounds: Rounds) -> Calibration:
    """Sequential temperature scaling of a confidence head, left to right; of ``GRID``, deterministic.

    A temperature that makes the likelihood of the slot's own outcomes worse than T = 1 does is passed over: the error
    alone is small, too, where all rounds are foretold alike.
    """
    before = torch.ones(len(rounds), dtype=torch.float64)
    temperatures = []
    for slot in range(rounds.logits.shape[1]):
        logits, trial = rounds.logits[:, slot], rounds.trials(slot)
        known, outcome = rounds.outcome(slot)
        worst = _loss(logits[trial], outcome[trial])
        chosen, least = 1.0, math.inf
        for temperature in GRID:
            if _loss(logits[trial] / temperature, outcome[trial]) > worst:
                continue
            error = calibration_error((before * torch.sigmoid(logits / temperature))[known], outcome[known])
            if error < least:
                chosen, least = temperature, error
        temperatures.append(chosen)
        before = before * torch.sigmoid(logits / chosen)
    return Calibration(tuple(1 / each for each in temperatures), (0.0,) * len(temperatures))


def fit_margins(rounds: Rounds) -> Calibration:
    """Logistic regression of each slot's outcome on its margin, over the rounds that tried it.

    Slots are drawn towards a fit of all of them together, and that towards w = 1, b = 0; the likelihood of ``rounds``
    is never less than that of these.
    """
    gamma = rounds.logits.shape[1]
    slots = []
    for slot in range(gamma):
        trial = rounds.trials(slot)
        slots.append((rounds.logits[trial, slot], rounds.outcome(slot)[1][trial]))
    start = torch.tensor([1.0, 0.0], dtype=torch.float64)
    together = _logistic(torch.cat([margins for margins, _ in slots]), torch.cat([kept for _, kept in slots]), start)
    fitted = [_logistic(margins, kept, together).tolist() for margins, kept in slots]
    return Calibration(tuple(weight for weight, _ in fitted), tuple(bias for _, bias in fitted))


def reliability(survival: Tensor, outcome: Tensor) -> list[ReliabilityBin]:
    """The bins that hold rounds, of ``survival`` and ``outcome`` [N]: 15 of equal width from 0 to 1."""
    if not len(survival):
        return []
    place = _bins(survival)
    count = torch.bincount(place, minlength=BINS).double()
    foretold = torch.bincount(place, survival, BINS) / count
    kept = torch.bincount(place, outcome, BINS) / count
    share = count / len(survival)
    return [
        ReliabilityBin(*row) for row in zip(foretold.tolist(), kept.tolist(), share.tolist(), strict=True) if row[2]
    ]


def calibration_error(survival: Tensor, outcome: Tensor) -> float:
    """Expected calibration error: the mean over rounds of how far their bin's share kept is from what was foretold.

    Naeini et al. 2015, "Obtaining well calibrated probabilities using Bayesian binning".
    """
    return sum(each.share * abs(each.kept - each.foretold) for each in reliability(survival, outcome))


def chance_error(survival: Tensor) -> float:
    """The calibration error to expect on as many rounds [N] if ``survival`` were right, and rounds independent.

    By the normal approximation: the mean size of a sum of outcomes about its mean is √(2/π) standard deviations.
    """
    if not len(survival):
        return 0.0
    variance = torch.bincount(_bins(survival), survival * (1 - survival), BINS)
    return float((variance * 2 / math.pi).sqrt().sum()) / len(survival)


def _bins(survival: Tensor) -> Tensor:
    """The bin [N] of each of ``survival`` [N]."""
    return (survival * BINS).long().clamp(max=BINS - 1)


def _loss(logits: Tensor, outcome: Tensor) -> float:
    return float(functional.binary_cross_entropy_with_logits(logits, outcome, reduction="sum"))


def _logistic(
    margins: Tensor,  # [n]
    kept: Tensor,  # [n] 0 or 1
    prior: Tensor,  # [2] weight and bias
) -> Tensor:
    """Weight and bias [2] of the largest posterior, by Newton's method with steps halved until they gain."""
    inputs = torch.stack([margins, torch.ones_like(margins)], 1)

    def objective(at: Tensor) -> float:
        return _loss(inputs @ at, kept) + _PRIOR / 2 * float((at - prior).square().sum())

    found, value = prior, objective(prior)
    for _ in range(_NEWTON_STEPS):
        chance = torch.sigmoid(inputs @ found)
        gradient = inputs.T @ (chance - kept) + _PRIOR * (found - prior)
        curvature = (inputs.T * (chance * (1 - chance))) @ inputs + _PRIOR * torch.eye(2, dtype=found.dtype)
        step = torch.linalg.solve(curvature, gradient)
        while (after := objective(found - step)) > value and float(step.abs().max()) > 1e-9:
            step = step / 2
        if after >= value:
            break
        found, value = found - step, after
    return found
