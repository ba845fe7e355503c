"""The tokenised data set of a build: conversations become samples once, and a resumed build reads them back.

`tokens.bin` holds int32 ids and the uint8 loss mask of one sample after the other, `lengths.bin` how long each is, as
int64. Both are appended to: what has been flushed can be read while the rest is still being tokenised.
"""

import dataclasses
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
from torch import Tensor

from nemotron_dspark.cache.compact import has_target
from nemotron_dspark.chat.mask import Tokenised
from nemotron_dspark.config.run import DataConfig
from nemotron_dspark.data import conversations as rows
from nemotron_dspark.data.conversations import SkipTally
from nemotron_dspark.data.pieces import tokenised_pieces
from nemotron_dspark.errors import InputError
from nemotron_dspark.files import disk_errors, read_json, write_json

TOKENS = "tokens.bin"
LENGTHS = "lengths.bin"


@dataclasses.dataclass
class Tally:
    """What came out of the conversations."""

    samples: int = 0
    tokens: int = 0
    loss_tokens: int = 0
    cut: int = 0  # samples that were longer than max_length
    skipped: SkipTally = dataclasses.field(default_factory=SkipTally)


@dataclasses.dataclass(frozen=True)
class Stored:
    """How far tokenising is."""

    lines: int
    samples: int
    read: float  # share of the file


class Tokens:
    """Tokenised samples; ``tokens[i]`` is a `Tokenised`. There may be more to come until it is `complete`."""

    lengths: np.ndarray  # int64 [samples], as far as they are known
    ids: np.ndarray  # int64 [samples], what a person knows them by
    complete = True
    read = 1.0  # share of the conversations that they come from
    _targets = np.zeros(0, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, sample_id: int) -> Tokenised:
        raise NotImplementedError

    def all_ids(self) -> Iterator[np.ndarray]:
        """int32 [S] of every sample that is known."""
        return (self[sample].input_ids for sample in range(len(self)))

    def targets(self, samples: int) -> np.ndarray:
        """How many last hidden states the loss looks at, int64 [samples], of the first so many; counted once each."""
        more = range(len(self._targets), samples)
        counted = [int(has_target(self[sample].loss_mask).sum()) for sample in more]
        self._targets = np.concatenate((self._targets, np.array(counted, dtype=np.int64)))
        return self._targets[:samples]

    def wait(self, samples: int) -> None:
        """Return when so many samples are known, or all of them, or `stop` was called."""

    def stop(self) -> None:
        """Let nobody wait any longer."""


class TokenStore(Tokens):
    """Samples on disk."""

    def __init__(self, folder: Path, samples: int | None = None):
        """The first ``samples`` of them; all by default."""
        self._folder = folder
        self._file = open(folder / TOKENS, "rb")  # noqa: SIM115, it is closed with the object
        self.grow(samples)

    def grow(self, samples: int | None = None) -> None:
        """Know the first ``samples``, which must have been flushed."""
        lengths = np.fromfile(self._folder / LENGTHS, "<i8", count=-1 if samples is None else samples)
        self._starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]) * 5
        self.ids = np.arange(len(lengths))
        self.lengths = lengths

    def __getitem__(self, sample_id: int) -> Tokenised:
        start, length = int(self._starts[sample_id]), int(self.lengths[sample_id])
        data = bytearray(os.pread(self._file.fileno(), 5 * length, start))
        return Tokenised(np.frombuffer(data, "<i4", count=length), np.frombuffer(data, np.uint8, offset=4 * length))


class Selected(Tokens):
    """Some of the samples of a store, numbered from 0."""

    def __init__(self, store: TokenStore, ids: np.ndarray):
        self.lengths = store.lengths[ids]
        self.ids = ids
        self._store = store

    def __getitem__(self, place: int) -> Tokenised:
        return self._store[int(self.ids[place])]


class GrowingTokens(TokenStore):
    """The samples of a folder that a thread fills; use as a context manager."""

    def __init__(self, folder: Path, fill: Callable[[Callable[[Stored], None]], None]):
        """``fill(progress)`` runs in the thread and tells ``progress`` what it has flushed."""
        for name in (TOKENS, LENGTHS):
            with disk_errors(folder), open(folder / name, "wb"):
                pass
        super().__init__(folder, 0)
        self.complete = False
        self._changed = threading.Condition()  # guards everything below
        self._stored = Stored(0, 0, 0.0)
        self._filled = self._stopped = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(fill,), name="tokenise")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._thread.join()

    def wait(self, samples: int) -> None:
        """Raises what the thread raised."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._stored.samples >= samples or self._filled or self._failure or self._stopped
            )
            if self._failure is not None:
                raise self._failure
            stored, complete = self._stored, self._filled
        self.grow(stored.samples)
        self.read, self.complete = stored.read, complete

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def _run(self, fill: Callable[[Callable[[Stored], None]], None]) -> None:
        try:
            fill(self._grown)
            with self._changed:
                self._filled = True
                self._changed.notify_all()
        except BaseException as error:  # is raised where somebody waits
            with self._changed:
                self._failure = error
                self._changed.notify_all()

    def _grown(self, stored: Stored) -> None:
        with self._changed:
            if self._stopped:
                raise _Stopped
            self._stored = stored
            self._changed.notify_all()


class _Stopped(Exception):
    """Nobody waits for more samples."""


def store_tokens(
    folder: Path,
    conversations: Path,
    tokenizer: Any,
    data: DataConfig,
    *,
    mask_token_id: int | None,
    processes: int = 0,
    progress: Callable[[Stored], None] = lambda stored: None,
) -> Tally:
    """Tokenise ``conversations`` into ``folder``; sample ids are dense in the order of the file.

    ``progress`` hears of samples when they can be read. ``processes`` is for files that are worth others
    (`data.pieces`).

    Raises:
        InputError: no sample is left, or the draft's mask token occurs in one (named with its line).
        EnvironmentFault: the disk is full, or a process died.
    """
    tally = Tally()
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with disk_errors(folder), open(folder / TOKENS, "wb") as tokens, open(folder / LENGTHS, "wb") as lengths:
        for piece in tokenised_pieces(conversations, tokenizer, data, processes=processes):
            for skipped in piece.skipped:
                tally.skipped.add(skipped)
            for line, sample in piece.samples:
                if mask_token_id is not None and (sample.input_ids == mask_token_id).any():
                    raise InputError(
                        f"{conversations}:{line} contains the draft's mask token {mask_token_id}.",
                        "Take that conversation out, or set draft.mask_token_id to a token the data never uses.",
                    )
                tally.samples += 1
                tally.tokens += len(sample.input_ids)
                tally.loss_tokens += sample.loss_tokens
                tally.cut += len(sample.input_ids) == data.max_length
                tokens.write(sample.input_ids.astype("<i4").tobytes() + sample.loss_mask.tobytes())
                lengths.write(len(sample.input_ids).to_bytes(8, "little"))
            for file in (tokens, lengths):
                file.flush()
            progress(Stored(piece.last_line, tally.samples, piece.read))
        for file in (tokens, lengths):
            os.fsync(file.fileno())
    if not tally.samples:
        for _ in rows.read(conversations):  # says it better where no conversation can be used
            pass
        raise InputError(
            f"{conversations} leaves no sample: {'; '.join(tally.skipped.sentences())}.",
            "`nds data check` shows what happens to each conversation.",
        )
    return tally


def tokenise(
    folder: Path,
    report: Path,
    conversations: Path,
    tokenizer: Any,
    data: DataConfig,
    *,
    max_positions: int,
    mask_token_id: int | None,
    inputs: dict[str, Any],
    processes: int = 0,
    progress: Callable[[Stored], None] = lambda stored: None,
) -> None:
    """`store_tokens` into ``folder``, no sample longer than ``max_positions``; the file ``report`` marks it as done.

    ``report`` holds ``inputs`` and what came out.
    """
    tally = store_tokens(
        folder,
        conversations,
        tokenizer,
        data.model_copy(update={"max_length": min(data.max_length, max_positions)}),
        mask_token_id=mask_token_id,
        processes=processes,
        progress=progress,
    )
    notes = []
    if data.max_length > max_positions:
        notes.append(f"Samples end at the target's {max_positions} positions, before max_length.")
    values = dataclasses.asdict(tally) | {"skipped": tally.skipped.to_json(), "notes": notes}
    write_json(report, {"inputs": inputs, "result": values})


def read_report(report: Path) -> tuple[Tally, tuple[str, ...]]:
    """What came out of the conversations, and what a person should know about it."""
    result = dict(read_json(report)["result"])
    notes = tuple(result.pop("notes"))
    return Tally(**(result | {"skipped": SkipTally.from_json(result["skipped"])})), notes


def check_no_mask_token(samples: Iterable[np.ndarray | Tensor], mask_token_id: int | None, folder: Path) -> None:
    """`InputError` naming the sample, of those whose ids are given, in which the draft's mask token occurs."""
    if mask_token_id is None:
        return
    for sample_id, input_ids in enumerate(samples):
        if (input_ids == mask_token_id).any():
            raise InputError(
                f"Sample {sample_id} of {folder} contains the draft's mask token {mask_token_id}.",
                "Set draft.mask_token_id to a token the data never uses.",
            )
