"""The tokenised data set of a build: conversations become samples once, and a resumed build reads them back.

`tokens.bin` holds int32 ids and the uint8 loss mask of one sample after the other, `lengths.npy` how long each is.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from nemotron_dspark.chat.mask import Tokenised
from nemotron_dspark.config.run import DataConfig
from nemotron_dspark.data.conversations import Skipped, SkipTally
from nemotron_dspark.data.samples import read_samples
from nemotron_dspark.errors import InputError
from nemotron_dspark.files import read_json, write_json, write_whole


@dataclasses.dataclass
class Tally:
    """What came out of the conversations."""

    samples: int = 0
    tokens: int = 0
    loss_tokens: int = 0
    cut: int = 0  # samples that were longer than max_length
    skipped: SkipTally = dataclasses.field(default_factory=SkipTally)


class TokenStore:
    """Samples on disk; ``store[i]`` is a `Tokenised`."""

    def __init__(self, folder: Path):
        self.lengths: np.ndarray = np.load(folder / "lengths.npy", allow_pickle=False)  # int64 [samples]
        self.ids = np.arange(len(self.lengths))
        self._starts = np.concatenate([[0], np.cumsum(self.lengths)[:-1]]) * 5
        self._data = np.memmap(folder / "tokens.bin", dtype=np.uint8, mode="r")

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, sample_id: int) -> Tokenised:
        start, length = int(self._starts[sample_id]), int(self.lengths[sample_id])
        ids = np.frombuffer(self._data, "<i4", count=length, offset=start)
        return Tokenised(ids.copy(), self._data[start + 4 * length : start + 5 * length].copy())


class Selected:
    """Some of the samples of a store, numbered from 0."""

    def __init__(self, store: TokenStore, ids: np.ndarray):
        self.lengths = store.lengths[ids]
        self.ids = ids
        self._store = store

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, place: int) -> Tokenised:
        return self._store[int(self.ids[place])]


def store_tokens(
    folder: Path,
    conversations: Path,
    tokenizer: Any,
    data: DataConfig,
    *,
    mask_token_id: int | None,
    progress: Callable[[int], None] = lambda lines: None,
) -> Tally:
    """Tokenise ``conversations`` into ``folder``; sample ids are dense in the order of the file.

    Raises:
        InputError: no sample is left, or the draft's mask token occurs in one (named with its line).
    """
    tally = Tally()
    lengths: list[int] = []

    def write(file: BinaryIO) -> None:
        for item in read_samples(conversations, tokenizer, data):
            progress(item.line)
            if isinstance(item, Skipped):
                tally.skipped.add(item)
                continue
            sample = item.tokens
            if mask_token_id is not None and (sample.input_ids == mask_token_id).any():
                raise InputError(
                    f"{conversations}:{item.line} contains the draft's mask token {mask_token_id}.",
                    "Take that conversation out, or set draft.mask_token_id to a token the data never uses.",
                )
            file.write(sample.input_ids.astype("<i4").tobytes() + sample.loss_mask.tobytes())
            lengths.append(len(sample.input_ids))
            tally.tokens += len(sample.input_ids)
            tally.loss_tokens += sample.loss_tokens

    write_whole(folder / "tokens.bin", write)
    if not lengths:
        raise InputError(
            f"{conversations} leaves no sample: {'; '.join(tally.skipped.sentences())}.",
            "`nds data check` shows what happens to each conversation.",
        )
    tally.samples = len(lengths)
    tally.cut = int((np.asarray(lengths) == data.max_length).sum())
    write_whole(folder / "lengths.npy", lambda file: np.save(file, np.asarray(lengths, dtype=np.int64)))
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
    progress: Callable[[int], None] = lambda lines: None,
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


def check_no_mask_token(store: TokenStore, mask_token_id: int | None, folder: Path) -> None:
    """`InputError` naming the sample in which the draft's mask token occurs."""
    if mask_token_id is None:
        return
    for sample_id in range(len(store)):
        if (store[sample_id].input_ids == mask_token_id).any():
            raise InputError(
                f"Sample {sample_id} of {folder} contains the draft's mask token {mask_token_id}.",
                "Set draft.mask_token_id to a token the data never uses.",
            )
