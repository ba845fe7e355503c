"""One target for several processes: who runs it for whom, and how its hidden states travel.

A process without a target asks another one for its micro-batches, some ahead of the draft. The hidden states come over
gloo, through main memory: NCCL would have its kernels wait on the GPUs that train. A micro-batch is one message, whose
size both sides know from its samples; while it travels the target computes the next. What arrives is what a target of
its own would have given, bit for bit.
"""

import contextlib
import dataclasses
import json
import queue
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nemotron_dspark import errors
from nemotron_dspark.cache.capture import States
from nemotron_dspark.cache.reader import Sample
from nemotron_dspark.distributed import DistContext
from nemotron_dspark.errors import InputError, NdsError
from nemotron_dspark.training.online import OnlineSource
from nemotron_dspark.training.source import Source

_ON_DEVICE = 2  # micro-batches of hidden states on the target's device at a time: one computed, one copied
_DONE, _OPEN, _ENDED = -1, -2, -3  # in place of a request's number; the last is a server's word to itself
_FINE, _SKIPPED = 0, -1  # in place of the length of an error
_HEADER, _TEXT = 16, 65536  # bytes: of an answer's header, and at least for the text of an error


@dataclasses.dataclass(frozen=True)
class Roles:
    """Which processes train, and whose target gives each of them its hidden states."""

    trainers: tuple[int, ...]  # ranks
    target_of: Mapping[int, int]  # by rank of a trainer: the rank that runs the target for it, or itself

    @staticmethod
    def of(machines: Sequence[Sequence[int]], inference: int = 0, *, shared: bool = False) -> "Roles":
        """The roles of the ranks of some ``machines``.

        The last ``inference`` ranks of each run the target and do not train. Where there are none every rank trains and
        holds the target; or, if it is ``shared``, the first of each machine alone does.

        Raises:
            InputError: nobody would train on one of the machines.
        """
        if any(len(ranks) <= inference for ranks in machines):
            fewest = min(map(len, machines))
            raise InputError(
                f"train.inference_gpus is {inference}, and a machine has {fewest} process{'es' * (fewest > 1)}.",
                "Start more processes with torchrun --nproc-per-node, of which at least one trains, or set it to 0.",
            )
        target_of = {}
        for ranks in machines:
            trainers = ranks[: len(ranks) - inference]
            for at, rank in enumerate(trainers):
                target_of[rank] = ranks[len(trainers) + at % inference] if inference else ranks[0] if shared else rank
        return Roles(tuple(sorted(target_of)), target_of)


@dataclasses.dataclass(frozen=True)
class Link:
    """The connection between a process that trains and the one that runs the target for it."""

    group: dist.ProcessGroup
    peer: int  # rank

    def send(self, message: Tensor, tag: int = 0) -> None:
        dist.send(message, self.peer, group=self.group, tag=tag)

    def receive(self, into: Tensor, tag: int = 0) -> Any:
        """Receive into a tensor; the ``wait()`` of what is returned ends when all of it is there."""
        return dist.irecv(into, self.peer, group=self.group, tag=tag)


def connect(roles: Roles, context: DistContext) -> list[Link]:
    """The links of this process; all ranks call it."""
    links = []
    for trainer, holder in sorted(roles.target_of.items()):
        if trainer != holder:
            group = context.pair([trainer, holder])
            if context.rank in (trainer, holder):
                links.append(Link(group, holder if context.rank == trainer else trainer))
    return links


class _Answer:
    """A message with the hidden states of a micro-batch, or with the error that came in their place."""

    def __init__(self, source: OnlineSource, ids: Sequence[int], *, pinned: bool = False):
        rows, length = len(ids), int(source.lengths[list(ids)].max())
        sizes = [rows * length * width for width in source.widths]  # in bf16
        self._ids = ids
        self.message = torch.empty(_HEADER + max(_TEXT, 2 * sum(sizes)), dtype=torch.uint8, pin_memory=pinned)
        self._header = self.message[:_HEADER].view(torch.int64)
        self._text = self.message[_HEADER:]
        states = self._text[: 2 * sum(sizes)].view(torch.bfloat16).split(sizes)
        self.taps, self.last = (
            part.view(rows, length, width) for part, width in zip(states, source.widths, strict=True)
        )

    def fill(self, states: States | NdsError | None, *, stopping: bool) -> None:
        """Put in ``states`` if they are finite, an error, or neither where nobody waits for it any more."""
        status = _SKIPPED
        if isinstance(states, States):
            try:
                states.check_finite(self._ids)
                self.taps.copy_(states.taps)
                self.last.copy_(states.last)
                status = _FINE
            except NdsError as error:
                states = error
        if isinstance(states, NdsError):
            said = json.dumps([type(states).__name__, states.what, states.do]).encode()
            status = len(said)
            self._text[:status] = torch.frombuffer(bytearray(said), dtype=torch.uint8)
        self._header.copy_(torch.tensor([status, stopping]))

    def read(self) -> bool:
        """Whether the other process was told to stop; raises its error."""
        status, stopping = self._header.tolist()
        if status > 0:
            kind, what, do = json.loads(self._text[:status].numpy().tobytes())
            raise getattr(errors, kind)(what, do)
        return bool(stopping)


def _request(number: int, ids: Sequence[int], most: int) -> Tensor:
    """A request for at most ``most`` samples: its number, their count, their ids."""
    return torch.tensor([number, len(ids), *ids, *[0] * (most - len(ids))])


class RemoteSource(Source):
    """Samples whose hidden states another process computes; ``own`` knows their tokens and opens no target."""

    def __init__(self, own: OnlineSource, link: Link, most: int):
        self.lengths, self.opening = own.lengths, own.opening
        self._own, self._link, self._most = own, link, most
        self._lock, self._receiving = threading.Lock(), threading.Lock()
        self._count = 0
        self._asked: list[_Asked] = []  # and not yet taken
        self._stopping = False

    @property
    def stopping(self) -> bool:
        return self._stopping

    def open(self, step: int) -> None:
        self._own.on_status("waiting for the target")
        self._link.send(_request(_OPEN, (), self._most))

    def prefetch(self, ids: Sequence[int], step: int) -> None:
        with self._lock:
            self._asked.append(self._ask(ids))

    def samples(self, ids: Sequence[int], step: int) -> list[Sample]:
        with self._lock:
            before = next((at for at, asked in enumerate(self._asked) if asked.ids == ids), None)
            asked = self._ask(ids) if before is None else self._asked.pop(before)
        with self._receiving:
            asked.coming.wait()
        self._own.on_status("")
        self._stopping |= asked.answer.read()
        return self._own.samples_with(ids, asked.answer.taps, asked.answer.last)

    def close(self) -> None:
        with contextlib.suppress(RuntimeError):  # the other process is gone, which is said elsewhere
            self._link.send(_request(_DONE, (), self._most))
            with self._receiving:  # a connection must not be left in the middle of a message
                for asked in self._asked:
                    asked.coming.wait()

    def _ask(self, ids: Sequence[int]) -> "_Asked":
        answer, number = _Answer(self._own, ids), self._count
        self._count += 1
        coming = self._link.receive(answer.message, tag=number)
        self._link.send(_request(number, ids, self._most))
        return _Asked(ids, answer, coming)


@dataclasses.dataclass(frozen=True)
class _Asked:
    """A request that is under way."""

    ids: Sequence[int]
    answer: _Answer
    coming: Any  # whose ``wait()`` ends when the answer is there


class StateServer:
    """Answers the processes that have no target, with that of ``source``, until each of them is done."""

    def __init__(self, source: OnlineSource, links: Sequence[Link], most: int):
        self._source, self._links, self._most = source, links, most
        self._inbox: queue.SimpleQueue[tuple[Link, int, Any]] = queue.SimpleQueue()
        self._done: set[int] = set()  # peers that wait for nothing any more
        self._room = threading.Semaphore(_ON_DEVICE)

    def open(self) -> None:
        """Wait for the first of them, and open the target if it wants to train and has not trained all before.

        Raises:
            NdsError: the target is not right, or cannot be loaded.
        """
        for link in self._links:
            threading.Thread(target=self._listen, args=(link,), daemon=True).start()
        first = self._inbox.get()
        if first[1] == _OPEN:
            self._source.open(0)
        self._inbox.put(first)

    def run(self, stopped: Sequence[object] = ()) -> None:
        """Answer in the order of the requests, with the opened target.

        Once ``stopped`` has an element the others are told to stop.

        Raises:
            RuntimeError: a connection has broken.
        """
        outboxes = {link.peer: queue.SimpleQueue[Any]() for link in self._links}
        for link in self._links:
            threading.Thread(target=self._answer, args=(link, outboxes[link.peer], stopped), daemon=True).start()
        left = len(self._links)
        while left:
            link, number, content = self._inbox.get()
            if isinstance(content, BaseException):
                raise content
            if number == _DONE:
                outboxes[link.peer].put(None)
            elif number == _ENDED:
                left -= 1
            elif number != _OPEN:
                outboxes[link.peer].put((number, content, self._states(link, content)))

    def _states(self, link: Link, ids: list[int]) -> States | NdsError | None:
        if link.peer in self._done:
            return None
        self._room.acquire()
        try:
            return self._source.states(ids)
        except NdsError as error:
            self._room.release()
            return error

    def _listen(self, link: Link) -> None:
        """Put what ``link`` asks for into the inbox."""
        try:
            while link.peer not in self._done:
                request = _request(0, (), self._most)
                link.receive(request).wait()
                number, count, *ids = request.tolist()
                if number == _DONE:
                    self._done.add(link.peer)  # at once: what it has asked for before need not be computed
                self._inbox.put((link, number, ids[:count]))
        except BaseException as error:  # is raised where the inbox is read
            self._inbox.put((link, 0, error))

    def _answer(self, link: Link, outbox: queue.SimpleQueue[Any], stopped: Sequence[object]) -> None:
        """Send what comes into ``outbox``: the copy from the device and the sending go on beside the next forward."""
        for number, ids, states in iter(outbox.get, None):
            try:
                answer = self._answer_of(ids, states, stopping=bool(stopped))
                del states  # the next are computed in their place
                link.send(answer.message, tag=number)
            except BaseException as error:  # is raised where the inbox is read; what else comes here is taken out still
                self._inbox.put((link, 0, error))
        self._inbox.put((link, _ENDED, None))

    def _answer_of(self, ids: list[int], states: States | NdsError | None, *, stopping: bool) -> _Answer:
        if not isinstance(states, States):
            answer = _Answer(self._source, ids)
            answer.fill(states, stopping=stopping)
            return answer
        try:
            with states.wait_stream():  # pinned memory, too, belongs to its device
                answer = _Answer(self._source, ids, pinned=states.taps.is_cuda)
                answer.fill(states, stopping=stopping)
            return answer
        finally:
            self._room.release()


class SharedSource(Source):
    """The samples of ``own``, whose target a thread runs for other processes, too."""

    def __init__(self, own: OnlineSource, links: Sequence[Link], most: int):
        self.lengths, self.opening, self.open, self.close = own.lengths, own.opening, own.open, own.close
        self._own = own
        self._failure: BaseException | None = None
        self._server = StateServer(own, links, most)
        self._device = torch.cuda.current_device() if torch.cuda.is_available() else None
        threading.Thread(target=self._serve, daemon=True, name="states").start()

    def samples(self, ids: Sequence[int], step: int) -> list[Sample]:
        if self._failure is not None:
            raise self._failure
        return self._own.samples(ids, step)

    def _serve(self) -> None:
        try:
            if self._device is not None:
                torch.cuda.set_device(self._device)  # a thread begins with the machine's first
            self._server.open()
            self._server.run()
        except BaseException as error:  # is raised where the next samples are asked for
            self._failure = error
