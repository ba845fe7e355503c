"""Speculative decoding of several generations at once: draft, verify, accept, commit.

Per round and per generation the target sees its last token (the anchor) and γ drafted ones in one pass. What survives
is committed, the rest is forgotten exactly, and one token more comes from the target itself. Without a draft a round
is one plain step, through the same verify and commit.
"""

import dataclasses
import secrets
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from nemotron_dspark.decoding.accept import accept_greedy, accept_sampled
from nemotron_dspark.decoding.sampling import Sampling, pick, probabilities
from nemotron_dspark.drafts.dspark import DraftContext, DSparkDraft
from nemotron_dspark.errors import InputError
from nemotron_dspark.targets import Target, TargetState


@dataclasses.dataclass(eq=False)
class Generation:
    """One answer in the making. Read it freely; only the `Decoder` that started it writes it."""

    prompt_length: int
    sampling: Sampling
    stop_ids: frozenset[int]
    tokens: list[int] = dataclasses.field(default_factory=list)  # generated so far, a stop token included
    finished: str | None = None  # "stop" or "length"
    accepted: list[int] = dataclasses.field(default_factory=list)  # tokens gained per round, the target's own included
    proposed: list[int] = dataclasses.field(default_factory=list)  # tokens drafted per round
    seconds: float = 0.0  # spent in rounds, prefill not counted; shared rounds count in full
    _generator: torch.Generator = dataclasses.field(default_factory=torch.Generator, repr=False)
    _state: TargetState | None = dataclasses.field(default=None, repr=False)
    _context: DraftContext | None = dataclasses.field(default=None, repr=False)

    @property
    def rounds(self) -> int:
        return len(self.accepted)

    @property
    def greedy(self) -> bool:
        return self.sampling.temperature == 0

    def uniforms(self, count: int) -> Tensor:
        return torch.rand(count, generator=self._generator)

    def receive(self, new: list[int]) -> None:
        """Append ``new`` up to the first stop token and the length limit; sets ``finished`` when one is reached."""
        for token in new:
            self.tokens.append(token)
            if token in self.stop_ids:
                self.finished = "stop"
            elif len(self.tokens) >= self.sampling.max_new_tokens:
                self.finished = "length"
            if self.finished:
                break


@dataclasses.dataclass
class _Proposal:
    tokens: Tensor  # [B, γ]
    probs: list[Tensor | None]  # per row [γ, V]; None for greedy rows
    counts: list[int]  # drafts proposed per row; the rest of a row is not to be accepted


class Decoder:
    """Decodes with one target and at most one draft. Not thread-safe: one thread owns it."""

    def __init__(self, target: Target, draft: DSparkDraft | None = None, *, confidence_threshold: float = 0.0):
        """
        Args:
            confidence_threshold: cut a block before the first slot whose predicted acceptance is below this.

        Raises:
            InputError: the draft was made for another target.
        """
        self.target = target
        self.draft = draft
        self.confidence_threshold = confidence_threshold
        self._taps: tuple[int, ...] = ()
        if draft is not None:
            check_fit(target, draft)
            self._taps = tuple(draft.config.target_layer_ids)
        self._rows: list[Generation] = []  # whose state is in the shared batch below, in row order
        self._state: TargetState | None = None
        self._context: DraftContext | None = None

    def start(
        self, prompt_ids: Sequence[int], sampling: Sampling, stop_ids: frozenset[int] | None = None
    ) -> Generation:
        """Prefill ``prompt_ids`` and pick the first token. ``stop_ids`` defaults to the target's."""
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        generation = Generation(
            prompt_length=len(prompt_ids),
            sampling=sampling,
            stop_ids=self.target.stop_ids if stop_ids is None else stop_ids,
        )
        generation._generator.manual_seed(seed)
        state, verified = self.target.prefill(prompt_ids, self._taps)
        generation._state = state
        if self.draft is not None:
            generation._context = self.draft.new_context()
            self.draft.extend(generation._context, verified.taps, [len(prompt_ids)])
        generation.receive([self._pick(generation, verified.logits[0, -1])])
        return generation

    @torch.no_grad()
    def step(self, generations: Sequence[Generation]) -> None:
        """One round for all of ``generations`` together; finished ones are left alone."""
        active = [generation for generation in generations if generation.finished is None]
        if not active:
            return
        began = time.perf_counter()
        self._gather(active)
        anchors = torch.tensor([generation.tokens[-1] for generation in active], device=self.target.device)
        if self.draft is None:
            verified = self.target.verify(self._state, anchors[:, None])
            self.target.commit(self._state, [1] * len(active))
            for row, generation in enumerate(active):
                self._note(generation, 0, [self._pick(generation, verified.logits[row, 0])])
        else:
            self._speculate(active, anchors)
        seconds = time.perf_counter() - began
        for generation in active:
            generation.seconds += seconds

    def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling, stop_ids: frozenset[int] | None = None
    ) -> Generation:
        """Start a generation and run it to its end."""
        generation = self.start(prompt_ids, sampling, stop_ids)
        while generation.finished is None:
            self.step([generation])
        self.drop(generation)
        return generation

    def drop(self, generation: Generation) -> None:
        """Forget a generation's state, finished or not."""
        generation._state = generation._context = None
        if generation in self._rows:
            rest = [row for row in range(len(self._rows)) if self._rows[row] is not generation]
            self._rows = [self._rows[row] for row in rest]
            self._state = self._state.select(rest) if rest else None
            if self._context is not None:
                self._context = self._context.select(rest) if rest else None

    def _pick(self, generation: Generation, logits: Tensor) -> int:
        if generation.greedy:
            return int(logits.argmax())
        return int(pick(probabilities(logits, generation.sampling), generation.uniforms(1)[0]))

    def _gather(self, active: list[Generation]) -> None:
        """Make ``active`` the rows of the shared batch, in that order."""
        if len(active) == len(self._rows) and all(a is b for a, b in zip(active, self._rows, strict=True)):
            return
        wanted = set(map(id, active))
        for row, generation in enumerate(self._rows):
            # What stays alive outside this round keeps its own state; so does what changes its row.
            if generation.finished is None or id(generation) in wanted:
                generation._state = self._state.select([row])
                generation._context = self._context.select([row]) if self._context is not None else None
        self._state = TargetState.cat([generation._state for generation in active])
        if self.draft is not None:
            self._context = DraftContext.cat([generation._context for generation in active])
        self._rows = list(active)
        for generation in active:
            generation._state = generation._context = None

    def _speculate(self, active: list[Generation], anchors: Tensor) -> None:
        gamma = self.draft.config.block_size
        uniforms = [None if generation.greedy else generation.uniforms(2 * gamma + 1) for generation in active]
        proposal = self._propose(active, anchors, uniforms)
        longest = max(proposal.counts)
        block = torch.cat([anchors[:, None], proposal.tokens[:, :longest]], dim=1)  # [B, 1 + longest]
        verified = self.target.verify(self._state, block)
        greedy_tokens = None
        if any(generation.greedy for generation in active):
            greedy_tokens = verified.logits.argmax(-1).tolist()
        drafted = proposal.tokens.tolist()
        kept_per_row, new_per_row = [], []
        for row, generation in enumerate(active):
            count = proposal.counts[row]
            if generation.greedy:
                kept, following = accept_greedy(greedy_tokens[row], drafted[row][:count])
            else:
                kept, following = accept_sampled(
                    probabilities(verified.logits[row, : count + 1], generation.sampling),
                    proposal.probs[row][:count],
                    proposal.tokens[row, :count],
                    torch.cat([uniforms[row][gamma : gamma + count], uniforms[row][-1:]]),
                )
            kept_per_row.append(kept + 1)  # the anchor and the surviving drafts; the following token is the next anchor
            new_per_row.append([*drafted[row][:kept], following])
        self.target.commit(self._state, kept_per_row)
        self.draft.extend(self._context, verified.taps, kept_per_row)
        for generation, count, new in zip(active, proposal.counts, new_per_row, strict=True):
            self._note(generation, count, new)

    def _propose(self, active: list[Generation], anchors: Tensor, uniforms: list[Tensor | None]) -> _Proposal:
        draft, gamma = self.draft, self.draft.config.block_size
        hidden = draft.block_hidden(self._context, anchors)  # [B, γ, H]
        base = draft.base_logits(hidden)  # [B, γ, V]
        state = draft.sequential.start(len(active)) if draft.sequential is not None else None
        all_greedy = all(generation.greedy for generation in active)
        counts = [gamma] * len(active)
        previous, tokens = anchors, []
        probs: list[list[Tensor]] = [[] for _ in active]
        for slot in range(gamma):
            if self.confidence_threshold > 0:
                self._cut(counts, draft.confidence(hidden[:, slot], previous), slot)
                if max(counts) <= slot:
                    break
            logits = base[:, slot]
            if state is not None:
                logits, state = draft.sequential.step(logits, hidden[:, slot], previous, state)
            chosen = logits.argmax(-1)
            if not all_greedy:
                for row, generation in enumerate(active):
                    if not generation.greedy:
                        q = probabilities(logits[row], generation.sampling)
                        probs[row].append(q)
                        chosen[row] = pick(q, uniforms[row][slot])
            tokens.append(chosen)
            previous = chosen
        drafted = torch.stack(tokens, 1) if tokens else anchors.new_zeros(len(active), 0)
        vocab = base.shape[-1]
        stacked = [
            None if generation.greedy else torch.stack(rows) if rows else base.new_zeros(0, vocab)
            for generation, rows in zip(active, probs, strict=True)
        ]
        return _Proposal(drafted, stacked, counts)

    def _cut(self, counts: list[int], confidence: Tensor, slot: int) -> None:
        """End the rows' blocks before ``slot`` where the confidence logit [B] falls below the threshold.

        The decision sees the tokens before the slot and never the slot's own, so the output stays the target's.
        """
        for row, value in enumerate(torch.sigmoid(confidence.float()).tolist()):
            if value < self.confidence_threshold and counts[row] > slot:
                counts[row] = slot

    @staticmethod
    def _note(generation: Generation, proposed: int, new: list[int]) -> None:
        """Record a round. As in DeepSpec, a stop token ends the count of its round, the length limit does not."""
        stop = next((at for at, token in enumerate(new) if token in generation.stop_ids), None)
        generation.accepted.append(len(new) if stop is None else stop + 1)
        generation.proposed.append(proposed)
        generation.receive(new)


def check_fit(target: Target, draft: DSparkDraft) -> None:
    """`InputError` when ``draft`` was made for another target: other hidden size, vocabulary, or number of layers."""
    config, spec = draft.config, target.spec
    for what, ours, theirs in (
        ("hidden size", config.hidden_size, spec.hidden_size),
        ("vocabulary", config.vocab_size, spec.vocab_size),
        ("number of target layers", config.num_target_layers, spec.num_layers),
    ):
        if ours != theirs:
            raise InputError(
                f"The draft was made for another target: its {what} is {ours}, {spec.name} has {theirs}.",
                "Give the draft that was trained for this target.",
            )
