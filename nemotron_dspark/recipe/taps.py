"""The rows of a tap search: what every layer of the target computes on some of its own answers.

Conversations are drawn at random from the file, tokenised as for a cache, and run through the target one at a time.
"""

import dataclasses
import heapq
import itertools
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nemotron_dspark.chat.mask import Tokenised
from nemotron_dspark.config import DataConfig, RunConfig
from nemotron_dspark.data.conversations import Skipped, read
from nemotron_dspark.data.samples import LinedSample, samples_of
from nemotron_dspark.errors import CheckError, InputError
from nemotron_dspark.evaluation.tap_picture import draw_search
from nemotron_dspark.files import write_json
from nemotron_dspark.targets import Target
from nemotron_dspark.targets.proofs import prove
from nemotron_dspark.targets.tap_search import PARTS, TapData, TapSearch, search

_LEAST_CONVERSATIONS = 4 * len(PARTS)  # no conversation gives more than its share of the positions
_PIECE_BYTES = 256 * 1024**2  # hidden states that one forward may keep


@dataclasses.dataclass(frozen=True)
class TapReport:
    """A finished search and what it looked at."""

    search: TapSearch
    data: str
    conversations: int
    positions: int
    asked: int  # positions
    width: int  # numbers kept of a hidden state
    hidden: int
    seed: int
    picture: Path

    def to_json(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in ("data", "conversations", "positions", "width", "seed")}
        return self.search.to_json() | values | {"picture": str(self.picture)}


def search_taps(
    config: RunConfig,
    data: Path,
    out: Path,
    labels: dict[str, str],
    *,
    count: int | None = None,
    tokens: int = 4000,
    width: int = 128,
    seed: int = 0,
    on_progress: Callable[[str, float, float | None], None] = lambda what, done, total: None,
) -> TapReport:
    """Choose ``count`` taps by what they tell of the target's later states; write ``taps.json`` and ``taps.png``.

    ``labels`` are the names of layer kinds in the picture.

    Raises:
        InputError: unusable data, or more taps than layers.
        CheckError: a proof failed.
    """
    count = config.draft.num_taps if count is None else count
    target = Target.of(config.target)
    candidates = target.spec.num_layers - 1
    if count > candidates:
        raise InputError(
            f"{count} taps were asked for, and the target has {candidates} layers that may be one.",
            f"Give --count {candidates} or less.",
        )
    if config.target.proofs:
        prove(target, range(candidates))
    rows, conversations = collect(
        target,
        data,
        gamma=config.draft.block_size,
        tokens=tokens,
        width=width,
        seed=seed,
        data=config.data,
        progress=lambda done, total: on_progress("target's states", done, total),
    )
    found = search(target.spec, rows, count, progress=lambda done, total: on_progress("regressions", done, total))
    kept, hidden = rows.features.shape[2], target.spec.hidden_size
    picture = out / "taps.png"
    report = TapReport(found, str(data), conversations, len(rows.conversations), tokens, kept, hidden, seed, picture)
    values = report.to_json()
    del values["picture"]
    write_json(out / "taps.json", values)
    draw_search(picture, found, labels)
    return report


def collect(
    target: Target,
    file: Path,  # conversations
    *,
    gamma: int,
    tokens: int,
    width: int,
    seed: int,
    data: DataConfig,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[TapData, int]:
    """About ``tokens`` rows for `tap_search.search` with drafts of ``gamma`` tokens, and of how many conversations.

    A row is a position t whose tokens t + 1 to t + γ + 1 all belong to one answer. States wider than ``width`` are
    multiplied by one random orthonormal [H, width] matrix, the same for all layers, so that a layer that repeats
    another adds nothing; before, each dimension of a layer is divided by its root mean square in the first
    conversation, or a few huge ones would be all that is left.

    Raises:
        InputError: unusable data, or too few conversations in it.
        CheckError: hidden states that are not finite.
    """
    candidates = range(target.spec.num_layers - 1)
    project = _Projection(target.spec.hidden_size, width, seed)
    most = max(1, tokens // _LEAST_CONVERSATIONS)
    features, targets, numbers = [], [], []
    conversations, count = 0, 0
    for _, samples in itertools.groupby(_drawn(target, file, tokens, seed, data), lambda sample: sample.line):
        room = most
        for sample in samples:
            rows = _rows(sample.tokens, gamma, room, np.random.default_rng([seed, sample.line]))
            if not len(rows):
                continue
            states, last = _states(target, sample.tokens, candidates, project)
            if not bool(torch.isfinite(states).all() and torch.isfinite(last).all()):
                raise CheckError(
                    f"The target's hidden states of {sample.conversation.origin} are not finite.",
                    "Load the target in another type (--set target.dtype=bfloat16 or float32).",
                )
            features.append(states[rows])
            targets.append(last[rows[:, None] + torch.arange(2, gamma + 2)])
            numbers += [conversations] * len(rows)
            room -= len(rows)
        count += most - room
        conversations += room < most
        progress(min(count, tokens), tokens)
        if count >= tokens:
            break
    if conversations < len(PARTS):
        raise InputError(
            f"{file} gives {conversations} usable conversations, and a search needs {len(PARTS)}.",
            f"Give more, with answers of more than {gamma} tokens; `nds data check` shows what happens to each.",
        )
    return TapData(torch.cat(features), torch.cat(targets), torch.tensor(numbers)), conversations


def _drawn(target: Target, file: Path, most: int, seed: int, data: DataConfig) -> Iterator[LinedSample]:
    """Samples of ``most`` conversations of ``file``, drawn at random; no more of them are held in memory."""
    generator = random.Random(seed)
    usable = ((generator.random(), at, item) for at, item in enumerate(read(file)) if not isinstance(item, Skipped))
    drawn = [item for *_, item in heapq.nsmallest(most, usable)]
    data = data.model_copy(update={"max_length": min(data.max_length, target.spec.max_position_embeddings)})
    for sample in samples_of(drawn, target.tokenizer, data):
        if isinstance(sample, LinedSample):
            yield sample


def _rows(sample: Tokenised, gamma: int, most: int, generator: np.random.Generator) -> Tensor:
    """Positions t with t + 1 to t + γ + 1 in an answer, ascending; ``most`` of them at random where there are more."""
    inside = torch.from_numpy(sample.loss_mask != 0)
    if len(inside) < gamma + 2:
        return torch.empty(0, dtype=torch.long)
    rows = inside[1:].unfold(0, gamma + 1, 1).all(dim=1).nonzero()[:, 0]
    if len(rows) > most:
        rows = rows[torch.from_numpy(np.sort(generator.choice(len(rows), most, replace=False)))]
    return rows


def _states(
    target: Target, sample: Tokenised, layers: range, project: "_Projection"
) -> tuple[Tensor, Tensor]:  # fp32 [S, layers, w] and [S, w]
    """What ``layers`` and the final norm put out, projected; as many layers a forward as fit in memory."""
    ids = torch.from_numpy(sample.input_ids.astype(np.int64))[None]
    hidden = target.spec.hidden_size
    at_once = max(1, _PIECE_BYTES // (2 * ids.shape[1] * hidden * target.dtype.itemsize))  # a copy joins them
    pieces = []
    for first in range(0, len(layers), at_once):
        piece = layers[first : first + at_once]
        captured = target.capture(ids, None, tuple(piece))
        pieces.append(project.features(captured.taps[0].view(-1, len(piece), hidden), first))
    return torch.cat(pieces, dim=1), project.last(captured.last[0])


class _Projection:
    """Hidden states to at most ``width`` numbers each; states that are no wider are left as they are."""

    def __init__(self, hidden: int, width: int, seed: int):
        self._scales: dict[int, Tensor] = {}  # by layer, [H]
        self._matrix = None
        if hidden > width:
            drawn = torch.randn(hidden, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
            self._matrix = torch.linalg.qr(drawn).Q.float()  # [H, w]

    def features(self, states: Tensor, first: int) -> Tensor:
        """fp32 [S, layers, w] of ``states`` [S, layers, H], the outputs of a few layers from ``first`` on."""
        states = states.float()
        if self._matrix is None:
            return states.cpu()
        for at in range(states.shape[1]):
            if first + at not in self._scales:
                self._scales[first + at] = states[:, at].square().mean(0).sqrt().clamp_min(1e-6)
        scale = torch.stack([self._scales[first + at] for at in range(states.shape[1])])  # [layers, H]
        return ((states / scale) @ self._matrix.to(states.device)).cpu()

    def last(self, states: Tensor) -> Tensor:
        """fp32 [S, w] of the last hidden states [S, H]."""
        return (states.float() if self._matrix is None else states.float() @ self._matrix.to(states.device)).cpu()
