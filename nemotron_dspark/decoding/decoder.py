"""Speculative decoding of several generations at once: draft, verify, accept, commit.

Per round and per generation the target sees its last token (the anchor) and γ drafted ones in one pass. What survives
is committed, the rest is forgotten exactly, and one token more comes from the target itself. Without a draft a round
is one plain step, through the same verify and commit.
"""

import dataclasses
import math
import secrets
import time
import weakref
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from nemotron_dspark.decoding.accept import accept_greedy, accept_sampled
from nemotron_dspark.decoding.constraint import Constraint, Likelihood, forbid, likelihoods
from nemotron_dspark.decoding.memory import Memory
from nemotron_dspark.decoding.prefixes import Prefixes
from nemotron_dspark.decoding.reading import Reader, ReadPrompt
from nemotron_dspark.decoding.sampling import Sampling, pick, probabilities
from nemotron_dspark.decoding.schedule import Schedule
from nemotron_dspark.drafts.dspark import Draft
from nemotron_dspark.drafts.layers import DraftContext
from nemotron_dspark.errors import InputError
from nemotron_dspark.targets import State, Target
from nemotron_dspark.targets.kv import take_out

_UNREAD = 64  # positions of plain rounds that the draft reads at once


@dataclasses.dataclass(eq=False)
class Generation:
    """One answer in the making. Read it freely; only the `Decoder` that started it writes it."""

    prompt_ids: tuple[int, ...]
    sampling: Sampling
    stop_ids: frozenset[int]
    constraint: Constraint | None = None  # what the answer must look like
    tokens: list[int] = dataclasses.field(default_factory=list)  # generated so far, a stop token included
    finished: str | None = None  # "stop", "length", or "dropped"
    accepted: list[int] = dataclasses.field(default_factory=list)  # tokens gained per round, the target's own included
    proposed: list[int] = dataclasses.field(default_factory=list)  # tokens drafted per round
    drafted: list[list[int]] = dataclasses.field(default_factory=list)  # these tokens, of each round that drafted
    survived: list[int] = dataclasses.field(default_factory=list)  # drafted tokens kept per round
    confidence: list[list[float]] = dataclasses.field(default_factory=list)  # logits per round, if they are recorded
    margins: list[list[float]] = dataclasses.field(default_factory=list)  # per round as well, if they are recorded
    likelihoods: list[Likelihood] = dataclasses.field(default_factory=list)  # per token, if they are asked for
    seconds: float = 0.0  # spent in rounds, prefill not counted; shared rounds count in full
    generator: torch.Generator = dataclasses.field(default_factory=torch.Generator, repr=False)

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt."""
        return len(self.prompt_ids)

    @property
    def rounds(self) -> int:
        """Passes of the target behind the prompt's."""
        return len(self.accepted)

    @property
    def greedy(self) -> bool:
        """Whether every token is the likeliest one."""
        return self.sampling.temperature == 0

    def uniforms(self, count: int) -> Tensor:
        """The next ``count`` numbers [count] in [0, 1) of the generation's own stream."""
        return torch.rand(count, generator=self.generator)

    def taken(self, new: list[int]) -> int:
        """How many of the tokens ``new`` the answer takes: those up to a stop token and the length limit."""
        stop = next((at + 1 for at, token in enumerate(new) if token in self.stop_ids), len(new))
        return min(stop, self.sampling.max_new_tokens - len(self.tokens))

    def receive(self, new: list[int]) -> None:
        """Append ``new`` up to the first stop token and the length limit; sets ``finished`` when one is reached."""
        before = len(self.tokens)
        self.tokens += new[: self.taken(new)]
        if self.tokens[-1] in self.stop_ids:
            self.finished = "stop"
        elif len(self.tokens) >= self.sampling.max_new_tokens:
            self.finished = "length"
        if self.constraint is not None:
            self.constraint.advance(self.tokens[before:])


@dataclasses.dataclass(frozen=True)
class _Proposal:
    """The drafted blocks of a round."""

    tokens: Tensor  # [B, γ]
    probs: Tensor | None  # [B, γ, V] what they were drawn from; None when every row is greedy
    counts: list[int]  # drafts proposed per row; the rest of a row is not to be accepted
    confidence: Tensor | None  # [B, at least max(counts)] logits of the confidence head, if they are recorded
    margins: Tensor | None  # [B, at least max(counts)] of the draft's first logit over its second, if they are recorded


class Decoder:
    """Decodes with one target and at most one draft. Not thread-safe: one thread owns it."""

    def __init__(
        self,
        target: Target,
        draft: Draft | None = None,
        *,
        schedule: Schedule | None = None,
        record_confidence: bool = False,
        record_margins: bool = False,
        prefixes: Prefixes | None = None,
    ):
        """
        Args:
            schedule: how much of a block is drafted and verified, whole ones if not given; no other decoder has it.
            record_confidence: keep the confidence head's logits of every round in `Generation.confidence`, as they are
                without temperatures.
            record_margins: keep in `Generation.margins` by how much the draft's largest logit exceeds its second.
            prefixes: where what is read is kept for prompts that begin alike; nothing is without.

        Raises:
            InputError: the draft was made for another target, or confidence is asked of one without a head.
        """
        self.target = target
        self.draft = draft
        self.schedule = schedule or Schedule()
        self.record_confidence = record_confidence
        self.record_margins = record_margins
        taps: tuple[int, ...] = ()
        if draft is not None:
            draft.config.check_target(target.spec)
            asked = record_confidence or self.schedule.signal == "confidence head"
            if asked and draft.confidence_head is None:
                raise InputError("The draft has no confidence head.", "Set schedule to off or cost.")
            taps = tuple(draft.config.target_layer_ids)
        self.reader = Reader(target, draft, taps, prefixes)
        self._rows: list[Generation] = []  # those of the last round, in the order of the rows of ``_memory``
        self._memory: Memory | None = None
        # Of one row each: generations that took no part in the last round, for as long as somebody holds them.
        self._waiting: weakref.WeakKeyDictionary[Generation, Memory] = weakref.WeakKeyDictionary()
        # Of rounds without drafts, which the draft has not read yet: taps [B, 1, T·H] and the token after each [B, 1].
        self._unread: list[tuple[Tensor, Tensor]] = []

    def read(self, prompt_ids: Sequence[int]) -> ReadPrompt:
        """Prefill ``prompt_ids``, for several answers to `start` from."""
        return self.reader.read(prompt_ids)

    def start(
        self,
        prompt: Sequence[int] | ReadPrompt,
        sampling: Sampling,
        stop_ids: frozenset[int] | None = None,
        constraint: Constraint | None = None,
    ) -> Generation:
        """Pick the first token after a prompt, which is prefilled first unless it was read before.

        ``stop_ids`` defaults to the target's.
        """
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        if isinstance(prompt, ReadPrompt):
            read, memory = prompt, prompt.memory.select([0])
        else:
            read = self.read(prompt)
            memory = read.memory
        generation = Generation(
            prompt_ids=read.ids,
            sampling=sampling,
            stop_ids=self.target.stop_ids if stop_ids is None else stop_ids,
            constraint=constraint,
        )
        generation.generator.manual_seed(seed)
        first = self._pick([generation], forbid(read.logits[None], [[]], [constraint])[:, 0])
        if self.draft is not None and memory.context is not None:
            count = read.taps.shape[1]
            following = torch.tensor([[*read.ids[len(read.ids) - count + 1 :], *first]], device=self.target.device)
            self.draft.extend(memory.context, read.taps, [count], following)
        if self.reader.prefixes is not None:
            self.reader.prefixes.keep([*read.ids, *first], memory)
        self._waiting[generation] = memory
        self._weigh(generation, read.logits, first)
        generation.receive(first)
        return generation

    @torch.no_grad()
    def step(self, generations: Sequence[Generation]) -> None:
        """One round for all of ``generations`` together; finished ones are left alone."""
        active = [generation for generation in generations if generation.finished is None]
        if not active:
            return
        began = time.perf_counter()
        active, memory = self._gather(active)
        anchors = torch.tensor([generation.tokens[-1] for generation in active], device=self.target.device)
        if self.draft is not None and memory.context is not None:
            self._speculate(active, anchors, self.draft, memory.state, memory.context)
        else:
            verified = self.target.verify(memory.state, anchors[:, None])
            self.target.commit(memory.state, [1] * len(active))
            logits = forbid(verified.logits, [[]] * len(active), [each.constraint for each in active])[:, 0]
            for row, (generation, token) in enumerate(zip(active, self._pick(active, logits), strict=True)):
                self._weigh(generation, verified.logits[row], [token])
                self._note(generation, 0, [token])
        seconds = time.perf_counter() - began
        for generation in active:
            generation.seconds += seconds
            if generation.finished:
                self._keep(generation)

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
        """Forget a generation, finished or not; it takes no part in later rounds."""
        try:
            if generation.finished is None:
                self._keep(generation)
        finally:
            generation.finished = generation.finished or "dropped"
            self._waiting.pop(generation, None)
            if all(row.finished is not None for row in self._rows):
                self._rows, self._memory, self._unread = [], None, []

    def _keep(self, generation: Generation) -> None:
        """Keep what is remembered of a generation, for a conversation that goes on."""
        prefixes, memory, known = self.reader.prefixes, self._memory, [*generation.prompt_ids, *generation.tokens]
        if prefixes is None or memory is None or generation not in self._rows:
            return
        self._catch_up()
        row = self._rows.index(generation)
        # After a failed round the lengths may be anything.
        lengths = {each.lengths[row] for each in (memory.state, memory.context) if each is not None}
        if memory.state.block is None and lengths == {len(known) - 1}:
            prefixes.keep(known, memory, row)

    def _pick(self, generations: Sequence[Generation], logits: Tensor) -> list[int]:
        """One token for each row of ``logits`` [B, V]."""
        if all(generation.greedy for generation in generations):
            return logits.argmax(-1).tolist()
        uniforms = torch.cat([generation.uniforms(1) for generation in generations])
        return pick(probabilities(logits, [generation.sampling for generation in generations]), uniforms).tolist()

    def _gather(self, active: list[Generation]) -> tuple[list[Generation], Memory]:
        """Make ``active`` the rows of the shared batch; returns them in row order, and the batch."""
        wanted, memory = set(active), self._memory
        if wanted != set(self._rows):
            self._catch_up()
        for row, generation in reversed([*enumerate(self._rows)]):  # the last one replaces one that leaves
            if memory is not None and generation not in wanted:
                if generation.finished is None:  # it may come back in a later round
                    self._waiting[generation] = memory.select([row])
                memory.leave(row)
                take_out(self._rows, row)
        for generation in active:
            joining = self._waiting.pop(generation, None)
            if joining is None:
                continue
            if memory is None or not self._rows:
                memory = joining
            else:
                memory.join(joining)
            self._rows.append(generation)
        self._memory = memory
        return self._rows, cast("Memory", memory)  # an active generation has a row

    def _speculate(
        self, active: list[Generation], anchors: Tensor, draft: Draft, state: State, context: DraftContext
    ) -> None:
        """One round: draft a block for every row, verify all of them in one pass, accept, commit."""
        proposal = self._propose(active, anchors, draft, context)
        longest = max(proposal.counts)
        drafted = proposal.tokens[:, :longest]
        verified = self.target.verify(state, torch.cat([anchors[:, None], drafted], dim=1))
        rows = drafted.tolist()
        blocks = [row[:count] for row, count in zip(rows, proposal.counts, strict=True)]
        logits = forbid(verified.logits, blocks, [each.constraint for each in active])
        if proposal.probs is None:
            target_tokens = logits.argmax(-1).tolist()
            outcomes = [accept_greedy(tokens, block) for tokens, block in zip(target_tokens, blocks, strict=True)]
        else:
            # As many as for a whole block: a row's stream must not depend on where the others' blocks are cut.
            uniforms = torch.stack([generation.uniforms(draft.config.block_size + 1) for generation in active])
            kept, following = accept_sampled(
                probabilities(logits, [generation.sampling for generation in active]),
                proposal.probs[:, :longest],
                drafted,
                torch.tensor(proposal.counts, device=drafted.device),
                torch.cat([uniforms[:, :longest], uniforms[:, -1:]], 1).to(drafted.device),
            )
            outcomes = list(zip(kept.tolist(), following.tolist(), strict=True))
        new = [[*tokens[:kept], last] for tokens, (kept, last) in zip(rows, outcomes, strict=True)]
        # The anchor and the surviving drafts are committed as far as the answer goes: its last token is not, being the
        # next anchor, or the place where what is remembered ends.
        committed = [generation.taken(tokens) for generation, tokens in zip(active, new, strict=True)]
        self.target.commit(state, committed)
        following = torch.tensor([row + [0] * (longest + 1 - len(row)) for row in new], device=anchors.device)
        if longest:
            draft.extend(context, verified.taps, committed, following)
        else:
            self._unread.append((verified.taps, following))
        for row, (generation, tokens) in enumerate(zip(active, new, strict=True)):
            if proposal.confidence is not None:
                generation.confidence.append(proposal.confidence[row, : proposal.counts[row]].tolist())
            if proposal.margins is not None:
                generation.margins.append(proposal.margins[row, : proposal.counts[row]].tolist())
            generation.drafted.append(blocks[row])
            self._weigh(generation, verified.logits[row], tokens)
            self._note(generation, proposal.counts[row], tokens)
            self.schedule.learn(generation)
        if len(self._unread) >= _UNREAD:
            self._catch_up()

    def _catch_up(self) -> None:
        """Let the draft read what the target verified in rounds without drafts."""
        if self._unread and self.draft is not None and self._memory is not None and self._memory.context is not None:
            taps, following = (torch.cat(parts, 1) for parts in zip(*self._unread, strict=True))
            self.draft.extend(self._memory.context, taps, [taps.shape[1]] * len(taps), following)
        self._unread = []

    def _propose(self, active: list[Generation], anchors: Tensor, draft: Draft, context: DraftContext) -> _Proposal:
        gamma = draft.config.block_size
        samplings = [generation.sampling for generation in active]
        all_greedy = all(generation.greedy for generation in active)
        # All of a block's at once, used or not: a row's stream must not depend on where the others' blocks are cut.
        uniforms = None if all_greedy else torch.stack([generation.uniforms(gamma) for generation in active])
        drafting = self.schedule.begin(active, gamma)
        tokens = anchors.new_zeros(len(active), max(drafting.lengths))
        probs = None if all_greedy else torch.zeros(*tokens.shape, draft.config.vocab_size, device=tokens.device)
        if not tokens.shape[1]:  # the schedule drafts nothing in this round
            return _Proposal(tokens, probs, drafting.lengths, None, None)
        self._catch_up()
        block = draft.begin(context, anchors)
        signal = drafting.signal
        lines = draft.calibrated([each.temperature for each in samplings]) if signal else []

        def ends(slot: int, values: Tensor) -> bool:
            """Whether all blocks end before ``slot``, given a logit or margin [B]. It sees no token of the slot."""
            logits = [w[slot] * value + b[slot] for (w, b), value in zip(lines, values.tolist(), strict=True)]
            drafting.look(slot, [1 / (1 + math.exp(-max(each, -500.0))) for each in logits])
            return max(drafting.lengths) <= slot

        previous, confidence, margins = anchors, [], []
        for slot in range(tokens.shape[1]):
            # The head looks before the slot's logits are made; a margin is read off them, before a token is drawn.
            if signal == "confidence head" or self.record_confidence:
                confidence.append(block.confidence(previous).float())
                if signal == "confidence head" and ends(slot, confidence[-1]):
                    break
            logits = block.next_logits(previous)
            if signal == "margin" or self.record_margins:
                first, second = logits.float().topk(2).values.unbind(-1)
                margins.append(first - second)
                if signal == "margin" and ends(slot, margins[-1]):
                    break
            if uniforms is None or probs is None:
                previous = logits.argmax(-1)
            else:
                probs[:, slot] = probabilities(logits, samplings)
                previous = pick(probs[:, slot], uniforms[:, slot])
            tokens[:, slot] = previous
        return _Proposal(
            tokens,
            probs,
            drafting.lengths,
            torch.stack(confidence, 1) if self.record_confidence else None,
            torch.stack(margins, 1) if self.record_margins else None,
        )

    @staticmethod
    def _weigh(generation: Generation, logits: Tensor, new: list[int]) -> None:
        """Record how likely the target held the tokens of a round, each drawn from a row of ``logits`` [n, V]."""
        if generation.sampling.logprobs is not None:
            generation.likelihoods += likelihoods(logits, new, generation.sampling.logprobs)

    @staticmethod
    def _note(generation: Generation, proposed: int, new: list[int]) -> None:
        """Record a round. As in DeepSpec, a stop token ends the count of its round, the length limit does not."""
        stop = next((at for at, token in enumerate(new) if token in generation.stop_ids), len(new) - 1)
        generation.accepted.append(stop + 1)
        generation.survived.append(min(len(new) - 1, stop + 1))
        generation.proposed.append(proposed)
        generation.receive(new)
