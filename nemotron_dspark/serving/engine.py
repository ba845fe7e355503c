"""One thread owns the decoder; requests wait in a bounded queue for a place in its batch and are decoded together.

Between two rounds it reads some tokens of the prompts that came in, so that a long one does not hold up the answers.

Other threads submit and cancel. What a request produces goes to its ``deliver`` function, called on the engine's
thread: it must only hand the event on.
"""

import dataclasses
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from nemotron_dspark.decoding.constraint import Constraint
from nemotron_dspark.decoding.decoder import Decoder, Generation
from nemotron_dspark.decoding.reading import Reading, ReadPrompt
from nemotron_dspark.decoding.sampling import Sampling
from nemotron_dspark.errors import NdsError
from nemotron_dspark.memory import give_back
from nemotron_dspark.serving.metrics import Metrics
from nemotron_dspark.serving.text import Spelling, TextStream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

STUCK_SECONDS = 300  # without an end of a round while there is something to do
REST_SECONDS = 1.0  # without anything to do before memory is given back, which takes some milliseconds


@dataclasses.dataclass(frozen=True)
class GenerationRequest:
    """What is to be generated."""

    prompt_ids: tuple[int, ...]
    sampling: Sampling
    stops: tuple[str, ...] = ()  # stop strings; the target's stop tokens always hold
    stream: bool = False  # deliver text as it comes
    constraint: Constraint | None = None  # what the answer must look like
    rounds: bool = False  # deliver the tokens of every round, too

    @property
    def by_token(self) -> bool:
        """Whether more of each token is delivered than the text."""
        return self.rounds or self.sampling.logprobs is not None


@dataclasses.dataclass(frozen=True)
class Usage:
    """What a request cost."""

    prompt_tokens: int
    reused: int  # of these, what had been read before
    completion_tokens: int  # the stop token included
    rounds: int
    accepted: int  # tokens gained in rounds, the target's own included
    proposed: int  # tokens drafted; 0 without a draft


@dataclasses.dataclass(frozen=True)
class Token:
    """A token of an answer, spelled."""

    spelled: str  # by itself: a part of a character is no text
    text: str | None  # what it adds to the answer; None of a stop token, which is no part of it
    logprob: float | None = None  # natural logarithm, where it is asked for
    top: tuple[tuple[str, float], ...] = ()  # the likeliest tokens in its place


@dataclasses.dataclass(frozen=True)
class Round:
    """What one pass of the target brought a request; the first one is the prompt's."""

    tokens: tuple[Token, ...]
    kept: int  # of these, from the front, the draft's
    refused: tuple[str, ...]  # drafts that the target did not keep, spelled


@dataclasses.dataclass(frozen=True)
class TextDelta:
    """Further text of a streamed answer; empty only with a round."""

    text: str
    rounds: tuple[Round, ...] = ()


@dataclasses.dataclass(frozen=True)
class Finished:
    """The end of an answer: the rest of a streamed text, or the whole text of one that is not."""

    text: str
    token_ids: tuple[int, ...]  # the whole answer, a stop token included
    reason: str  # "stop" or "length"
    usage: Usage
    rounds: tuple[Round, ...] = ()  # those that were not delivered before


@dataclasses.dataclass(frozen=True)
class Failed:
    """The request came to nothing."""

    status: int  # HTTP: 400 the prompt, 500 the engine, 503 the server stops
    message: str


Event = TextDelta | Finished | Failed


class Busy(Exception):
    """The queue is full."""


class Stopped(Exception):
    """The engine takes no more requests."""


_STOPPING = "The server is stopping. Send the request again when it is back."


class Ticket:
    """A submitted request. Only the engine reads what is inside."""

    def __init__(self, request: GenerationRequest, deliver: Callable[[Event], None], text: TextStream):
        self.request = request
        self.deliver = deliver
        self.text = text
        self.cancelled = False
        self.arrived = time.perf_counter()
        self.reading: Reading | None = None  # while its prompt is read
        self.reused = 0  # tokens of it that had been read for others
        self.generation: Generation | None = None  # from its first token on
        self.collected: list[str] = []  # text of an answer that is not streamed
        self.rounds: list[Round] = []  # that were not delivered yet
        self.tokens_read = 0
        self.rounds_read = 0


class Engine:
    """The queue, the batch, and the loop that steps the decoder."""

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        max_batch_size: int,
        max_queue: int,
        prefill_tokens: int,
        metrics: Metrics,
    ):
        """
        Args:
            decoder: from now on only the engine's thread may use it.
            tokenizer: likewise only used on the engine's thread.
            max_batch_size: requests decoded together.
            max_queue: requests that may wait for a place in the batch.
            prefill_tokens: of prompts that are read between two rounds.
        """
        self._decoder = decoder
        self._spelling = Spelling(tokenizer)
        self._max_batch_size = max_batch_size
        self._max_queue = max_queue
        self._prefill_tokens = prefill_tokens
        self._metrics = metrics
        self._changed = threading.Condition()  # guards everything below
        self._waiting: deque[Ticket] = deque()
        self._active: list[Ticket] = []
        self._rested = True  # memory was given back since there was something to do
        self._moved = time.perf_counter()  # when the thread last began a round, or had nothing to do
        self._deadline: float | None = None  # set once stopping: what is active then has until this moment
        self._thread = threading.Thread(target=self._run, name="nds-engine", daemon=True)
        metrics.watch(lambda: self.waiting, lambda: self.active)

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    @property
    def active(self) -> int:
        """Requests in the batch."""
        return len(self._active)

    @property
    def healthy(self) -> bool:
        """Whether the thread lives and takes requests."""
        return self._thread.is_alive() and self._deadline is None

    @property
    def stuck(self) -> bool:
        """Whether a round has not come to an end for `STUCK_SECONDS`."""
        busy = bool(self._active or self._waiting)
        return busy and time.perf_counter() - self._moved > STUCK_SECONDS

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self, grace: float = 0.0) -> None:
        """Refuse new requests, fail the waiting ones, give active ones ``grace`` seconds, and end the thread."""
        with self._changed:
            if self._deadline is None:
                self._deadline = time.perf_counter() + grace
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    def end_grace(self) -> None:
        """Cut off active requests before the next round. It takes no lock: a signal's handler calls it."""
        self._deadline = time.perf_counter()

    def submit(self, request: GenerationRequest, deliver: Callable[[Event], None]) -> Ticket:
        """Queue ``request``. ``deliver`` gets `TextDelta`s if it streams, then one `Finished` or `Failed`.

        Raises:
            Busy: the batch and the queue are full.
            Stopped: the engine is stopping or its thread has died.
        """
        ticket = Ticket(request, deliver, TextStream(self._spelling, request.stops))
        with self._changed:
            if not self.healthy:
                raise Stopped
            if len(self._waiting) >= self._max_queue + self._max_batch_size - len(self._active):
                raise Busy
            if not (self._waiting or self._active):
                self._moved = time.perf_counter()
            self._waiting.append(ticket)
            self._changed.notify_all()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Forget a request; its place in the batch is free before the next round. One that is over is left alone."""
        with self._changed:
            ticket.cancelled = True
            if ticket in self._waiting:
                self._waiting.remove(ticket)

    def _run(self) -> None:
        try:
            while self._wait():
                while self._admit():
                    pass
                self._release_cancelled()
                self._read()
                self._round()
        except BaseException:
            log.exception("the engine's thread died")
        finally:
            with self._changed:
                self._deadline = self._deadline or time.perf_counter()
                left = [*self._active, *self._waiting]
                self._active.clear()
                self._waiting.clear()
            for ticket in left:
                ticket.deliver(Failed(503, _STOPPING))

    def _release_cancelled(self) -> None:
        for ticket in list(self._active):
            if ticket.cancelled:
                self._release(ticket)

    def _wait(self) -> bool:
        """Wait for something to do; false when it is time to end."""
        while True:
            with self._changed:
                self._moved = time.perf_counter()
                if self._changed.wait_for(self._called, None if self._rested else REST_SECONDS):
                    self._rested = False
                    if self._deadline is None:
                        return True
                    refused = list(self._waiting)
                    self._waiting.clear()
                    break
            give_back()
            self._rested = True
        for ticket in refused:
            ticket.deliver(Failed(503, _STOPPING))
        return bool(self._active) and time.perf_counter() < self._deadline

    def _called(self) -> bool:
        """Whether there is something to do, or it is time to end."""
        return bool(self._waiting or self._active) or self._deadline is not None

    def _admit(self) -> bool:
        """Take the next waiting request into the batch; false when there is no place or no request."""
        with self._changed:
            if self._deadline is not None or not self._waiting or len(self._active) >= self._max_batch_size:
                return False
            ticket = self._waiting.popleft()
            self._active.append(ticket)
        try:
            ticket.reading = self._decoder.reader.begin(ticket.request.prompt_ids)
        except NdsError as error:  # such as a prompt the target cannot read: the sender's fault
            self._release(ticket, Failed(400, str(error)))
        except Exception as error:
            self._release_unread(ticket, error)
        return True

    def _release_unread(self, ticket: Ticket, error: Exception) -> None:
        log.error("a prompt could not be read", exc_info=error)
        self._release(ticket, Failed(500, f"The prompt could not be read: {error}. See the server's log."))

    def _read(self) -> None:
        """Read prompts on; those that are read get their first token."""
        tickets = [(ticket, ticket.reading) for ticket in self._active if ticket.reading is not None]
        if not tickets:
            return
        self._decoder.reader.step([reading for _, reading in tickets], self._prefill_tokens)
        for ticket, reading in tickets:
            if reading.error is not None:
                self._release_unread(ticket, reading.error)
            elif reading.prompt is not None:
                self._begin(ticket, reading.prompt)

    def _begin(self, ticket: Ticket, prompt: ReadPrompt) -> None:
        """Start the answer to a prompt that was read."""
        request, ticket.reading, ticket.reused = ticket.request, None, prompt.reused
        try:
            generation = ticket.generation = self._decoder.start(
                prompt, request.sampling, constraint=request.constraint
            )
        except Exception as error:
            self._release_unread(ticket, error)
            return
        self._metrics.prompt_tokens.inc(len(request.prompt_ids))
        self._metrics.reused_tokens.inc(prompt.reused)
        self._metrics.first_token_seconds.observe(time.perf_counter() - ticket.arrived)
        self._advance(ticket, generation)

    def _round(self) -> None:
        batch = [(ticket, ticket.generation) for ticket in self._active if ticket.generation is not None]
        if not batch:
            return
        try:
            self._decoder.step([generation for _, generation in batch])
        except Exception as error:
            log.exception("a round failed")
            for ticket, _ in batch:
                self._release(ticket, Failed(500, f"Decoding failed: {error}. See the server's log."))
            return
        self._metrics.rounds.inc()
        self._metrics.round_requests.observe(len(batch))
        for ticket, generation in batch:
            self._advance(ticket, generation)

    def _advance(self, ticket: Ticket, generation: Generation) -> None:
        try:
            self._collect(ticket, generation)
        except Exception as error:  # one request's trouble is not the others'
            log.exception("an answer could not be read")
            self._release(ticket, Failed(500, f"The answer could not be read: {error}. See the server's log."))

    def _collect(self, ticket: Ticket, generation: Generation) -> None:
        """Hand on what the last round brought; release the request when the answer is complete."""
        request, text = ticket.request, ticket.text
        before, new = ticket.tokens_read, generation.tokens[ticket.tokens_read :]
        ticket.tokens_read += len(new)
        self._metrics.generated_tokens.inc(len(new))
        for gained in generation.accepted[ticket.rounds_read :]:
            self._metrics.accepted_length.observe(gained)
        ticket.rounds_read = len(generation.accepted)
        ended_by_token = generation.finished == "stop"
        said = new[:-1] if ended_by_token else new  # a stop token is not part of the text
        deltas: list[str] = []
        if request.by_token:
            deltas = text.deltas(said)
        elif request.stream or request.stops:
            deltas = [text.push(said)]
        elif generation.finished:  # nobody reads along: decode once
            deltas = [text.push(generation.tokens[:-1] if ended_by_token else generation.tokens)]
        else:
            return
        if generation.finished and not text.stopped:
            deltas = [*deltas[:-1], "".join([*deltas[-1:], text.finish()])]
        if request.by_token:
            ticket.rounds.append(self._told(generation, before, new, deltas, ended_by_token and not text.stopped))
        shown = "".join(deltas)
        if text.stopped or generation.finished:
            self._finish(ticket, generation, shown, ended_by_token)
        elif not request.stream:
            ticket.collected.append(shown)
        elif shown or ticket.rounds:
            ticket.deliver(TextDelta(shown, tuple(ticket.rounds)))
            ticket.rounds.clear()

    def _told(self, generation: Generation, before: int, new: list[int], deltas: list[str], ended: bool) -> Round:
        """The round that brought the tokens ``new``; ``deltas`` is what each adds to the text up to its end."""
        spell = self._spelling.token
        texts: list[str | None] = [*deltas, *[None] * (ended and len(deltas) < len(new))]
        tokens = [Token(spell(id_), text) for id_, text in zip(new, texts, strict=False)]
        for at, held in enumerate(generation.likelihoods[before : before + len(tokens)]):
            top = tuple((spell(id_), logprob) for id_, logprob in held.top)
            tokens[at] = dataclasses.replace(tokens[at], logprob=held.logprob, top=top)
        drafted = generation.drafted[-1] if before and generation.drafted else []
        kept = generation.survived[-1] if drafted else 0
        return Round(tuple(tokens), min(kept, len(tokens)), tuple(map(spell, drafted[kept:])))

    def _finish(self, ticket: Ticket, generation: Generation, shown: str, ended_by_token: bool) -> None:
        stopped = ticket.text.stopped
        tokens = tuple(generation.tokens[: ticket.text.used] if stopped else generation.tokens)
        usage = Usage(
            prompt_tokens=len(ticket.request.prompt_ids),
            reused=ticket.reused,
            completion_tokens=len(tokens),
            rounds=len(generation.accepted),
            accepted=sum(generation.accepted),
            proposed=sum(generation.proposed),
        )
        self._metrics.request_seconds.observe(time.perf_counter() - ticket.arrived)
        reason = "stop" if stopped or ended_by_token else "length"
        text = "".join([*ticket.collected, shown])
        self._release(ticket, Finished(text, tokens, reason, usage, tuple(ticket.rounds)))

    def _release(self, ticket: Ticket, event: Event | None = None) -> None:
        """Take a request out of the batch, then deliver ``event``: whoever hears of the end may count on the place."""
        if ticket.generation is not None:
            try:
                self._decoder.drop(ticket.generation)
            except Exception:  # after a failed round the decoder's state may be broken; the next start is a fresh one
                log.exception("a generation could not be dropped")
        with self._changed:
            self._active.remove(ticket)
        if event is not None:
            ticket.deliver(event)
