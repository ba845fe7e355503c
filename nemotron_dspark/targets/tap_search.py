"""Which layers to tap: those from whose outputs a ridge regression best predicts what the target computes later.

A draft sees the tapped outputs at position t, gets the token at t + 1, and has to guess the tokens at t + 2 to
t + γ + 1. So the regression goes from the outputs x of a set of layers at t to the last hidden states y at t + 2 to
t + γ + 1:

    W = (XᵀX + λnI)⁻¹ XᵀY        explained = 1 - Σ|y - Wᵀx|² / Σ|y|²        on conversations that W was not fitted to

with the columns of x standardised and y centred, both by the n fitted rows. XᵀX of all layers is computed once, in
float64; every set of layers is then an exact solve with a sub-block of it. Layers are added one by one, each time the
one that helps most. A linear map is not a draft: what it finds is a hint, and training decides.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from nemotron_dspark.targets.spec import TargetSpec
from nemotron_dspark.targets.taps import attention_taps, default_taps, even_taps

FIT, CHOOSE, REPORT = range(3)  # parts of the data: W comes from the first, λ and the layers from the second
PARTS = (FIT, FIT, FIT, CHOOSE, REPORT)  # of every five conversations
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # λ: 1 weighs a coefficient as much as a standardised column


@dataclasses.dataclass(frozen=True)
class TapData:
    """Rows to regress on."""

    features: Tensor  # [N, layers, w] output of each layer at t
    targets: Tensor  # [N, γ, v] last hidden states at t + 2 to t + γ + 1
    conversations: Tensor  # [N] int64, ascending from 0; conversation i lies in PARTS[i % 5] as a whole

    @property
    def parts(self) -> Tensor:  # [N]
        return torch.tensor(PARTS)[self.conversations % len(PARTS)]


@dataclasses.dataclass(frozen=True)
class Score:
    """How well one set of layers predicts."""

    strength: float  # the λ that is best on the choosing part
    choosing: float  # share of the variance explained on the choosing part
    explained: float  # the same on the reporting part
    by_ahead: tuple[float, ...]  # the same for each number of tokens ahead, 2 to γ + 1
    left: Tensor  # [C] Σ|y - Wᵀx|² of each conversation of the reporting part


class Ridge:
    """Regressions from any set of layers, all from the same Gram matrices."""

    def __init__(self, data: TapData):
        features, targets = data.features.double(), data.targets.double()
        fitted = data.parts == FIT
        mean, spread = features[fitted].mean(0), features[fitted].std(0, correction=0)
        features = (features - mean) / torch.where(spread > 1e-9 * (1 + mean.abs()), spread, torch.inf)  # constants: 0
        targets = (targets - targets[fitted].mean(0)).flatten(1)
        self.num_layers, self.width, self.ahead = data.features.shape[1], data.features.shape[2], data.targets.shape[1]
        parts = data.parts
        rows = [(features[parts == part].flatten(1), targets[parts == part]) for part in range(3)]
        x, y = rows[FIT]
        self._n = len(x)
        self._gram = x.T @ x  # [layers·w, layers·w]
        self._moments = x.T @ y  # [layers·w, γ·v]
        self._rows = rows
        _, self._reporting = data.conversations[parts == REPORT].unique(return_inverse=True)  # [rows]
        self.whole = self._by_conversation(rows[REPORT][1])  # [C] Σ|y|² of each conversation of the reporting part

    def coefficients(self, layers: Sequence[int], strength: float) -> Tensor:
        """W [len(layers)·w, γ·v] of the regression from ``layers``, in standardised columns."""
        columns = self._columns(layers)
        gram = self._gram[columns[:, None], columns]
        gram.diagonal().add_(strength * self._n)
        return torch.cholesky_solve(self._moments[columns], torch.linalg.cholesky(gram))

    def score(self, layers: Sequence[int]) -> Score:
        """Fit ``layers`` with each strength, keep the one that is best on the choosing part."""
        fits = [(strength, self.coefficients(layers, strength)) for strength in STRENGTHS]
        tried = [(self._explained(CHOOSE, self._left(CHOOSE, layers, one))[0], at, one) for at, one in fits]
        choosing, strength, weights = max(tried, key=lambda found: found[0])
        left = self._left(REPORT, layers, weights)
        return Score(strength, choosing, *self._explained(REPORT, left), self._by_conversation(left))

    def _left(self, part: int, layers: Sequence[int], weights: Tensor) -> Tensor:
        x, y = self._rows[part]
        return y - x[:, self._columns(layers)] @ weights  # [rows, γ·v]

    def _explained(self, part: int, left: Tensor) -> tuple[float, tuple[float, ...]]:
        rest, whole = (y.square().sum(0).view(self.ahead, -1).sum(1) for y in (left, self._rows[part][1]))  # [γ]
        return float(1 - rest.sum() / whole.sum()), tuple((1 - rest / whole).tolist())

    def _by_conversation(self, states: Tensor) -> Tensor:
        squares = states.square().sum(1)
        return torch.zeros(int(self._reporting.max()) + 1, dtype=squares.dtype).index_add_(0, self._reporting, squares)

    def _columns(self, layers: Sequence[int]) -> Tensor:
        return (torch.tensor(layers)[:, None] * self.width + torch.arange(self.width)).flatten()


@dataclasses.dataclass(frozen=True)
class LayerScore:
    layer: int
    kind: str  # name of its `LayerKind`
    alone: float  # variance explained by this layer only
    gain: float  # what it added when it was chosen; for the others, what it would add to the chosen ones
    order: int | None  # 1 = chosen first; None = not chosen


@dataclasses.dataclass(frozen=True)
class TapSet:
    name: str
    taps: tuple[int, ...]
    explained: float
    by_ahead: tuple[float, ...]
    strength: float
    behind: float  # how much less it explains than the searched set
    behind_error: float  # standard error of that, from the spread over conversations


@dataclasses.dataclass(frozen=True)
class TapSearch:
    """A finished search. All shares of variance are of the reporting part."""

    target: str
    layout: str
    taps: tuple[int, ...]  # the chosen ones, ascending
    layers: tuple[LayerScore, ...]  # best alone first
    sets: tuple[TapSet, ...]  # searched, default, even and, where there is one, attention
    ahead: tuple[int, ...]  # tokens ahead of the tapped position, 2 to γ + 1

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def search(
    spec: TargetSpec, data: TapData, count: int, *, progress: Callable[[int, int], None] = lambda done, total: None
) -> TapSearch:
    """Choose ``count`` of the layers that ``data`` has, 0 to ``data.features.shape[1] - 1``, by forward selection."""
    ridge = Ridge(data)
    everything = range(ridge.num_layers)
    others = list(_other_sets(spec, count))
    total = len(everything) + sum(len(everything) - at for at in range(1, count + 1)) + len(others)
    done = 0

    def score(layers: Sequence[int]) -> Score:
        nonlocal done
        found = ridge.score(layers)
        done += 1
        progress(done, total)
        return found

    alone = [score([layer]) for layer in everything]
    chosen = [max(everything, key=lambda layer: alone[layer].choosing)]
    current = alone[chosen[0]]
    gains = {chosen[0]: current.explained}
    while True:
        tried = {layer: score([*chosen, layer]) for layer in everything if layer not in chosen}
        if len(chosen) == count:
            break
        best = max(tried, key=lambda layer: tried[layer].choosing)
        gains[best] = tried[best].explained - current.explained
        chosen.append(best)
        current = tried[best]
    gains |= {layer: found.explained - current.explained for layer, found in tried.items()}
    scores = [
        LayerScore(
            layer,
            spec.layers[layer].name,
            alone[layer].explained,
            gains[layer],
            chosen.index(layer) + 1 if layer in chosen else None,
        )
        for layer in everything
    ]
    sets = [("searched", tuple(sorted(chosen)), current), *((name, taps, score(taps)) for name, taps in others)]
    return TapSearch(
        target=spec.name,
        layout=spec.layout,
        taps=tuple(sorted(chosen)),
        layers=tuple(sorted(scores, key=lambda found: (-found.alone, found.layer))),
        sets=tuple(
            TapSet(name, taps, one.explained, one.by_ahead, one.strength, *_behind(one, current, ridge.whole))
            for name, taps, one in sets
        ),
        ahead=tuple(range(2, ridge.ahead + 2)),
    )


def _other_sets(spec: TargetSpec, count: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "default", default_taps(spec, count)
    yield "even", even_taps(spec, count)
    if any(kind.attends for kind in spec.layers[:-1]):
        yield "attention", attention_taps(spec, count)


def _behind(one: Score, best: Score, whole: Tensor) -> tuple[float, float]:
    """How much less ``one`` explains than ``best``, and the standard error of this ratio of sums over conversations."""
    lost = one.left - best.left  # [C]
    share = lost.sum() / whole.sum()
    spread = (lost - share * whole).square().sum() * len(whole) / max(len(whole) - 1, 1)
    return float(share), float(spread.sqrt() / whole.sum())
