"""A part of the data that is held out of training, the same one whenever and wherever it is split.

A line goes by a hash of what is asked in it. So it stays on its side when the file grows, is sorted or is answered
again, and two answers to one prompt are never on both sides.
"""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from nemotron_dspark.data.conversations import RowError, parse_messages
from nemotron_dspark.data.sources import Given, named, one_file
from nemotron_dspark.errors import InputError
from nemotron_dspark.files import write_whole


@dataclasses.dataclass(frozen=True)
class SplitReport:
    train_file: Path
    held_out_file: Path
    train: int  # lines
    held_out: int


def split(given: Given, out: Path | str, share: float) -> SplitReport:
    """Write the prompts or conversations in ``given`` to `train.jsonl` and `held_out.jsonl` in the folder ``out``.

    About ``share`` of the lines is held out; they stay as they are, in their order.

    Raises:
        InputError: one of the files is there already, or would be empty.
    """
    train, held_out, source = Path(out) / "train.jsonl", Path(out) / "held_out.jsonl", one_file(given)
    for path in (train, held_out):
        if path.exists():
            raise InputError(f"{path} is there already.", "Delete it, or give another folder to --out.")
    held = [place_of(line) < share for line in _lines(source)]
    if len(set(held)) < 2:
        raise InputError(
            f"{named(given)} has {len(held)} lines, of which {sum(held)} would be held out.",
            "Change --held-out, or give more data.",
        )

    def write(file: BinaryIO, side: list[bool]) -> None:
        file.writelines(itertools.compress(_lines(source), side))

    write_whole(held_out, lambda file: write(file, held))
    write_whole(train, lambda file: write(file, [not side for side in held]))
    return SplitReport(train, held_out, len(held) - sum(held), sum(held))


def _lines(source: Path) -> Iterator[bytes]:
    with open(source, "rb") as file:
        yield from (line if line.endswith(b"\n") else line + b"\n" for line in file if line.strip())


def place_of(line: bytes) -> float:
    """Where on the line from 0 to 1 it lies, by what is asked in it: answers and other fields do not count."""
    asked: object = line.decode(errors="replace")
    try:
        row = json.loads(line)
        if "conversations" in row or "messages" in row:
            asked = [[message.role, message.content] for message in parse_messages(row) if message.role != "assistant"]
        elif "turns" in row or "prompt" in row:
            asked = [["user", text] for text in row.get("turns", [row.get("prompt")])]
    except (ValueError, TypeError, RowError):  # what cannot be used goes by its bytes, and is named where it is skipped
        pass
    return int.from_bytes(hashlib.sha256(json.dumps(asked).encode()).digest()[:8]) / 2**64
