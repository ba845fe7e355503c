"""One thread owns the decoder; requests wait in a bounded queue for a slot and are decoded together, round by round.

Other threads submit and cancel. What a request produces goes to its ``deliver`` function, called on the engine's
thread: it must only hand the event on.
"""

import dataclasses
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from nemotron_dspark.decoding.sampling import Sampling
from nemotron_dspark.errors import NdsError
from nemotron_dspark.serving.metrics import Metrics
from nemotron_dspark.serving.text import Spelling, TextStream

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Job:
    """What is to be generated."""

    prompt_ids: tuple[int, ...]
    sampling: Sampling
    stops: tuple[str, ...] = ()  # stop strings; the target's stop tokens always hold
    stream: bool = False  # deliver text as it comes


@dataclasses.dataclass(frozen=True)
class Usage:
    """What a request cost."""

    prompt_tokens: int
    completion_tokens: int  # the stop token included
    rounds: int
    accepted: int  # tokens gained in rounds, the target's own included
    proposed: int  # tokens drafted; 0 without a draft


@dataclasses.dataclass(frozen=True)
class Piece:
    """Further text of a streamed answer; never empty."""

    text: str


@dataclasses.dataclass(frozen=True)
class Finished:
    """The end of an answer: the rest of a streamed text, or the whole text of one that is not."""

    text: str
    reason: str  # "stop" or "length"
    usage: Usage


@dataclasses.dataclass(frozen=True)
class Failed:
    """The request came to nothing."""

    status: int  # HTTP: 400 the prompt, 500 the engine, 503 the server stops
    message: str


Event = Piece | Finished | Failed


class Busy(Exception):
    """The queue is full."""


class Stopped(Exception):
    """The engine takes no more requests."""


_STOPPING = "The server is stopping. Send the request again when it is back."


class Ticket:
    """A submitted request. Only the engine reads what is inside."""

    def __init__(self, job: Job, deliver: Callable[[Event], None]):
        self.job = job
        self.deliver = deliver
        self.cancelled = False
        self.arrived = time.perf_counter()
        self.generation: Any = None  # the decoder's handle once it has a slot
        self.text: TextStream | None = None
        self.pieces: list[str] = []  # of an answer that is not streamed
        self.tokens_read = 0
        self.rounds_read = 0


class Engine:
    """Queue, slots and the loop that steps the decoder."""

    def __init__(self, decoder: Any, tokenizer: Any, *, slots: int, max_queue: int, metrics: Metrics):
        """
        Args:
            decoder: a `decoding.decoder.Decoder`; from now on only the engine's thread may use it.
            tokenizer: likewise only used on the engine's thread.
            slots: requests decoded together.
            max_queue: requests that may wait for a slot.
        """
        self._decoder = decoder
        self._spelling = Spelling(tokenizer)
        self._slots = slots
        self._max_queue = max_queue
        self._metrics = metrics
        self._changed = threading.Condition()  # guards everything below
        self._waiting: deque[Ticket] = deque()
        self._active: list[Ticket] = []
        self._deadline: float | None = None  # set once stopping: what is active then has until this moment
        self._thread = threading.Thread(target=self._run, name="nds-engine", daemon=True)
        metrics.watch(lambda: self.waiting, lambda: self.active)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def active(self) -> int:
        return len(self._active)

    @property
    def healthy(self) -> bool:
        """The thread lives and takes requests."""
        return self._thread.is_alive() and self._deadline is None

    def start(self) -> None:
        self._thread.start()

    def stop(self, grace: float = 0.0) -> None:
        """Refuse new requests, fail the waiting ones, give active ones ``grace`` seconds, and end the thread."""
        with self._changed:
            if self._deadline is None:
                self._deadline = time.perf_counter() + grace
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    def submit(self, job: Job, deliver: Callable[[Event], None]) -> Ticket:
        """Queue ``job``. ``deliver`` gets `Piece`s if it streams, then one `Finished` or `Failed`.

        Raises:
            Busy: all slots are taken and the queue is full.
            Stopped: the engine is stopping or its thread has died.
        """
        ticket = Ticket(job, deliver)
        with self._changed:
            if not self.healthy:
                raise Stopped
            if len(self._waiting) >= self._max_queue + self._slots - len(self._active):
                raise Busy
            self._waiting.append(ticket)
            self._changed.notify_all()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Forget a request; its slot is free before the next round. Nothing happens when it is over already."""
        with self._changed:
            ticket.cancelled = True
            if ticket in self._waiting:
                self._waiting.remove(ticket)

    def _run(self) -> None:
        try:
            while self._wait():
                for _ in range(self._slots):  # bounded, so that many short answers do not hold up the long ones
                    if not self._admit():
                        break
                for ticket in list(self._active):
                    if ticket.cancelled:
                        self._release(ticket)
                if self._active:
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

    def _wait(self) -> bool:
        """Wait for something to do; false when it is time to end."""
        with self._changed:
            while not (self._waiting or self._active or self._deadline is not None):
                self._changed.wait()
            if self._deadline is None:
                return True
            refused = list(self._waiting)
            self._waiting.clear()
        for ticket in refused:
            ticket.deliver(Failed(503, _STOPPING))
        return bool(self._active) and time.perf_counter() < self._deadline

    def _admit(self) -> bool:
        """Give the next waiting request a slot; false when there is no slot or no request."""
        with self._changed:
            if self._deadline is not None or not self._waiting or len(self._active) >= self._slots:
                return False
            ticket = self._waiting.popleft()
            self._active.append(ticket)
        self._prefill(ticket)
        return True

    def _prefill(self, ticket: Ticket) -> None:
        if ticket.cancelled:
            self._release(ticket)
            return
        job = ticket.job
        try:
            ticket.generation = self._decoder.start(job.prompt_ids, job.sampling)
        except NdsError as error:  # such as a prompt the target cannot read: the sender's fault
            self._release(ticket, Failed(400, str(error)))
            return
        except Exception as error:
            log.exception("prefill failed")
            self._release(ticket, Failed(500, f"The prompt could not be read: {error}. See the server's log."))
            return
        ticket.text = TextStream(self._spelling, job.stops)
        self._metrics.prompt_tokens.inc(len(job.prompt_ids))
        self._metrics.first_token_seconds.observe(time.perf_counter() - ticket.arrived)
        self._advance(ticket)

    def _round(self) -> None:
        try:
            self._decoder.step([ticket.generation for ticket in self._active])
        except Exception as error:
            log.exception("a round failed")
            for ticket in list(self._active):
                self._release(ticket, Failed(500, f"Decoding failed: {error}. See the server's log."))
            return
        self._metrics.rounds.inc()
        self._metrics.round_requests.observe(len(self._active))
        for ticket in list(self._active):
            self._advance(ticket)

    def _advance(self, ticket: Ticket) -> None:
        try:
            self._collect(ticket)
        except Exception as error:  # one request's trouble is not the others'
            log.exception("an answer could not be read")
            self._release(ticket, Failed(500, f"The answer could not be read: {error}. See the server's log."))

    def _collect(self, ticket: Ticket) -> None:
        """Hand on what the last round brought; release the slot when the answer is complete."""
        generation, job, text = ticket.generation, ticket.job, ticket.text
        new = generation.tokens[ticket.tokens_read :]
        ticket.tokens_read += len(new)
        self._metrics.generated_tokens.inc(len(new))
        for gained in generation.accepted[ticket.rounds_read :]:
            self._metrics.accepted_length.observe(gained)
        ticket.rounds_read = len(generation.accepted)
        ended_by_token = generation.finished == "stop"
        if job.stream or job.stops:
            piece = text.push(new[:-1] if ended_by_token else new)  # a stop token is not part of the text
        elif generation.finished:  # nobody reads along: decode once
            piece = text.push(generation.tokens[:-1] if ended_by_token else generation.tokens)
        else:
            return
        if generation.finished and not text.stopped:
            piece += text.finish()
        if text.stopped or generation.finished:
            self._finish(ticket, piece, ended_by_token)
        elif not job.stream:
            ticket.pieces.append(piece)
        elif piece:
            ticket.deliver(Piece(piece))

    def _finish(self, ticket: Ticket, piece: str, ended_by_token: bool) -> None:
        generation, stopped = ticket.generation, ticket.text.stopped
        usage = Usage(
            prompt_tokens=len(ticket.job.prompt_ids),
            completion_tokens=ticket.text.used if stopped else len(generation.tokens),
            rounds=len(generation.accepted),
            accepted=sum(generation.accepted),
            proposed=sum(generation.proposed),
        )
        self._metrics.request_seconds.observe(time.perf_counter() - ticket.arrived)
        reason = "stop" if stopped or ended_by_token else "length"
        self._release(ticket, Finished("".join([*ticket.pieces, piece]), reason, usage))

    def _release(self, ticket: Ticket, event: Event | None = None) -> None:
        """Free the slot first, then say so: who hears of the end may rely on the slot."""
        if ticket.generation is not None:
            try:
                self._decoder.drop(ticket.generation)
            except Exception:  # after a failed round the decoder's state may be broken; the next start is a fresh one
                log.exception("a generation could not be dropped")
        with self._changed:
            self._active.remove(ticket)
        if event is not None:
            ticket.deliver(event)
