"""Conversations tokenised into a folder, once; every later stage reads samples back by their number.

`tokens.bin` holds the int32 ids and the uint8 loss mask of one sample after the other, `samples.bin` a record of each.
Sample ids are dense, in the order of the file. Large files are tokenised in chunks of lines by a pool of processes
(rendering and masking are Python, so threads would not do), and no more than a few chunks are in memory at a time.
"""

import copy
import dataclasses
import functools
import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from torch import Tensor

from nemotron_dspark.chat.mask import Tokenised, predicts_loss_token
from nemotron_dspark.config.run import DataConfig
from nemotron_dspark.data.conversations import Skipped, SkipTally, conversations_of, read, rows_of
from nemotron_dspark.data.samples import samples_of
from nemotron_dspark.errors import InputError
from nemotron_dspark.files import disk_errors, read_json, write_json
from nemotron_dspark.processes import deaths_named, process_pool, share

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENS, SAMPLES = "tokens.bin", "samples.bin"
RECORD = np.dtype([("tokens", "<u4"), ("predicting", "<u4")])  # of a sample; `predicts_loss_token` counted
TOKEN_BYTES = 5  # an int32 id and a byte of the mask

CHUNK_BYTES = 1 << 18  # of text: some hundred conversations
ALONE_BYTES = 1 << 22  # of text that this process tokenises in the time in which others would start
_MOST_WORKERS = 16  # each takes some 300 MB


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tally:
    """What came out of the conversations."""

    samples: int
    tokens: int
    loss_tokens: int
    cut: int  # samples that were longer than max_length
    skipped: SkipTally


@dataclasses.dataclass(frozen=True)
class LineChunk:
    """Consecutive lines of a file, tokenised."""

    last_line: int
    tokens: bytes  # as they stand in `tokens.bin`
    records: np.ndarray  # RECORD [samples]
    loss_tokens: int
    skipped: tuple[Skipped, ...]


class TokenStore:
    """The samples of a folder; ``store[i]`` is a `Tokenised`."""

    def __init__(self, folder: Path):
        records = np.fromfile(folder / SAMPLES, RECORD)
        self.lengths = records["tokens"].astype(np.int64)  # [samples]
        self.predicting = records["predicting"].astype(np.int64)  # [samples]
        self.ids = np.arange(len(records))  # [samples], numbers of the samples in the folder
        self._starts = TOKEN_BYTES * (np.cumsum(self.lengths) - self.lengths)
        self._file = folder / TOKENS

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, sample: int) -> Tokenised:
        length = int(self.lengths[sample])
        with open(self._file, "rb", buffering=0) as file:
            data = bytearray(os.pread(file.fileno(), TOKEN_BYTES * length, int(self._starts[sample])))
        return Tokenised(np.frombuffer(data, "<i4", count=length), np.frombuffer(data, np.uint8, offset=4 * length))

    def opening(self, sample: int) -> np.ndarray:
        """Token ids of the sample before its first answer, int64."""
        found = self[sample]
        return found.input_ids[: int(np.argmax(found.loss_mask))].astype("int64")

    def select(self, ids: np.ndarray) -> Self:
        """The samples ``ids`` alone, numbered from 0."""
        selected = copy.copy(self)
        for name in ("lengths", "predicting", "ids", "_starts"):
            setattr(selected, name, getattr(self, name)[ids])
        return selected


def tokenise(
    folder: Path,
    report: Path,
    conversations: Path,
    tokenizer: "PreTrainedTokenizerBase",
    data: DataConfig,
    *,
    max_positions: int,
    mask_token_id: int | None,
    inputs: dict[str, Any],
    on_lines: Callable[[int], None] = lambda lines: None,
) -> TokenStore:
    """Tokenise ``conversations`` into ``folder``, or read back what an earlier call with these ``inputs`` has finished.

    No sample is longer than ``max_positions``. The file ``report`` vouches for the folder: it holds ``inputs``, and
    what came out (`read_report`) once everything is on the disk. ``on_lines`` hears how many lines were read.

    Raises:
        InputError: no sample is left, or the draft's mask token occurs in one (named with its line).
        EnvironmentFault: the disk is full, or a process died.
    """
    if _finished(folder, report, inputs):
        store = TokenStore(folder)
        check_no_mask_token((store[sample].input_ids for sample in range(len(store))), mask_token_id, conversations)
        return store
    write_json(report, {"inputs": inputs})
    notes = []
    if data.max_length > max_positions:
        notes.append(f"Samples end at the target's {max_positions} positions, before max_length.")
    limited = _limited(data, max_positions)
    tally = _write_tokens(folder, conversations, tokenizer, limited, mask_token_id, on_lines)
    result = dataclasses.asdict(tally) | {"skipped": tally.skipped.to_json(), "notes": notes}
    write_json(report, {"inputs": inputs, "result": result})
    return TokenStore(folder)


def samples_in(
    folder: Path,
    report: Path,
    conversations: Path,
    tokenizer: "PreTrainedTokenizerBase",
    data: DataConfig,
    max_positions: int,
    inputs: dict[str, Any],
) -> Iterator[np.ndarray]:
    """Ids [S] of each sample as `tokenise` finds them with these arguments; nothing is written."""
    if _finished(folder, report, inputs):
        store = TokenStore(folder)
        yield from (store[sample].input_ids for sample in range(len(store)))
        return
    for chunk in tokenised_chunks(conversations, tokenizer, _limited(data, max_positions)):
        at = 0
        for length in chunk.records["tokens"].tolist():
            yield np.frombuffer(chunk.tokens, "<i4", count=length, offset=TOKEN_BYTES * at)
            at += length


def _limited(data: DataConfig, max_positions: int) -> DataConfig:
    return data.model_copy(update={"max_length": min(data.max_length, max_positions)})


def read_report(report: Path) -> tuple[Tally, tuple[str, ...]]:
    """What came out of the conversations, and what a person should know about it."""
    result = dict(read_json(report)["result"])
    notes = tuple(result.pop("notes"))
    return Tally(**(result | {"skipped": SkipTally.from_json(result["skipped"])})), notes


def check_no_mask_token(samples: Iterable[np.ndarray | Tensor], mask_token_id: int | None, source: Path) -> None:
    """`InputError` naming the sample, of those whose ids are given, in which the draft's mask token occurs."""
    if mask_token_id is None:
        return
    for sample_id, input_ids in enumerate(samples):
        if (input_ids == mask_token_id).any():
            raise InputError(
                f"Sample {sample_id} of {source} contains the draft's mask token {mask_token_id}.",
                "Set draft.mask_token_id to a token the data never uses.",
            )


def tokenised_chunks(
    file: Path, tokenizer: "PreTrainedTokenizerBase", data: DataConfig, mask_token_id: int | None = None
) -> Iterator[LineChunk]:
    """The samples of ``file`` as `samples.read_samples` finds them, in its order; beyond `ALONE_BYTES` by a pool."""
    workers = min(_MOST_WORKERS, os.cpu_count() or 1)
    work = functools.partial(_tokenise_lines, tokenizer, data, mask_token_id, file)
    if workers == 1 or file.stat().st_size <= ALONE_BYTES:
        yield from itertools.starmap(work, _line_chunks(file))
        return
    pending: deque[Future[LineChunk]] = deque()
    with deaths_named("tokenises"), process_pool(workers, work) as pool:
        try:
            for first, lines in _line_chunks(file):
                pending.append(pool.submit(_tokenise_in_pool, first, lines))
                if len(pending) > 2 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _line_chunks(file: Path) -> Iterator[tuple[int, list[bytes]]]:
    """(number of the first line, lines) of every chunk."""
    first = 1
    with open(file, "rb") as source:
        while lines := source.readlines(CHUNK_BYTES):
            yield first, lines
            first += len(lines)


def _tokenise_in_pool(first: int, lines: list[bytes]) -> LineChunk:
    return share()(first, lines)


def _tokenise_lines(
    tokenizer: "PreTrainedTokenizerBase",
    data: DataConfig,
    mask_token_id: int | None,
    file: Path,
    first: int,
    lines: list[bytes],
) -> LineChunk:
    tokens, records, skipped, loss_tokens = [], [], [], 0
    for item in samples_of(conversations_of(rows_of(lines, first)), tokenizer, data):
        if isinstance(item, Skipped):
            skipped.append(item)
            continue
        ids, mask = item.tokens.input_ids, item.tokens.loss_mask
        if mask_token_id is not None and (ids == mask_token_id).any():
            if any(mask_token_id in message.token_ids for message in item.conversation.messages):
                skipped.append(Skipped(item.line, "an answer in which the target itself wrote the draft's mask token"))
                continue
            raise InputError(
                f"{file}:{item.line} contains the draft's mask token {mask_token_id}.",
                "Take that conversation out, or set draft.mask_token_id to a token the data never uses.",
            )
        tokens += [ids.astype("<i4").tobytes(), mask.tobytes()]
        records.append((len(ids), predicts_loss_token(mask).sum()))
        loss_tokens += item.tokens.loss_tokens
    return LineChunk(first + len(lines) - 1, b"".join(tokens), np.array(records, RECORD), loss_tokens, tuple(skipped))


def _write_tokens(
    folder: Path,
    conversations: Path,
    tokenizer: "PreTrainedTokenizerBase",
    data: DataConfig,
    mask_token_id: int | None,
    on_lines: Callable[[int], None],
) -> Tally:
    loss_tokens, skipped = 0, SkipTally()
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with disk_errors(folder), open(folder / TOKENS, "wb") as tokens, open(folder / SAMPLES, "wb") as samples:
        for chunk in tokenised_chunks(conversations, tokenizer, data, mask_token_id):
            for item in chunk.skipped:
                skipped.add(item)
            loss_tokens += chunk.loss_tokens
            tokens.write(chunk.tokens)
            samples.write(chunk.records.tobytes())
            on_lines(chunk.last_line)
        for file in (tokens, samples):
            file.flush()
            os.fsync(file.fileno())
    lengths = TokenStore(folder).lengths
    if not len(lengths):
        for _ in read(conversations):  # says it better where no conversation can be used
            pass
        raise InputError(
            f"{conversations} leaves no sample: {'; '.join(skipped.sentences())}.",
            "`nds data check` shows what happens to each conversation.",
        )
    return Tally(
        samples=len(lengths),
        tokens=int(lengths.sum()),
        loss_tokens=loss_tokens,
        cut=int((lengths == data.max_length).sum()),
        skipped=skipped,
    )


def _finished(folder: Path, report: Path, inputs: dict[str, Any]) -> bool:
    known = read_json(report) if report.is_file() else {}
    if known.get("inputs") != inputs or "result" not in known:
        return False
    sizes = {SAMPLES: RECORD.itemsize * known["result"]["samples"], TOKENS: TOKEN_BYTES * known["result"]["tokens"]}
    return all((folder / name).is_file() and (folder / name).stat().st_size == sizes[name] for name in sizes)
