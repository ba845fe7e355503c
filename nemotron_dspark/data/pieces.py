"""A data file tokenised piece by piece: the first pieces here, the rest by other processes, all in the file's order.

A thread beside the target would not do: rendering and masking are Python, and the target's forward waits for Python
between any two of its operations.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from nemotron_dspark.chat.mask import Tokenised
from nemotron_dspark.config.run import DataConfig
from nemotron_dspark.data.conversations import Skipped, conversations_of, rows_of
from nemotron_dspark.data.samples import samples_of
from nemotron_dspark.processes import Child

PIECE_BYTES = 1 << 18  # of text: some hundred conversations
OWN_BYTES = 1 << 22  # that this process tokenises itself, in about the time in which the others start


@dataclasses.dataclass(frozen=True)
class Piece:
    """Consecutive lines of the file."""

    last_line: int
    read: float  # share of the file, up to and with these lines
    samples: tuple[tuple[int, Tokenised], ...]  # line, sample
    skipped: tuple[Skipped, ...]


def tokenised_pieces(file: Path, tokenizer: Any, data: DataConfig, *, processes: int = 0) -> Iterator[Piece]:
    """The samples of ``file`` as `samples.read_samples` finds them; beyond `OWN_BYTES` by other ``processes``, if any.

    Raises:
        EnvironmentFault: one of them died.
    """
    size = file.stat().st_size
    with contextlib.ExitStack() as stack, open(file, "rb") as source:
        arguments = (tokenizer, data, file.name, size)
        others = [
            stack.enter_context(Child("that tokenises", _tokenise, *arguments))
            for _ in range(processes if size > OWN_BYTES else 0)
        ]
        first, given = 1, 0
        while lines := source.readlines(PIECE_BYTES):
            piece = (first, lines, source.tell())
            first += len(lines)
            if not others or source.tell() <= OWN_BYTES:
                yield _piece(*piece, *arguments)
                continue
            child = others[given % len(others)]  # each has one piece at most
            answer = child.receive() if given >= len(others) else None
            child.send(piece)
            given += 1
            if answer is not None:
                yield answer
        for turn in range(max(0, given - len(others)), given):
            yield others[turn % len(others)].receive()


def _tokenise(pipe: Connection, *arguments: Any) -> None:
    while True:
        pipe.send(_piece(*pipe.recv(), *arguments))


def _piece(first: int, lines: list[bytes], end: int, tokenizer: Any, data: DataConfig, name: str, size: int) -> Piece:
    found = list(samples_of(conversations_of(rows_of(lines, first), name), tokenizer, data))
    return Piece(
        first + len(lines) - 1,
        end / size,
        tuple((item.line, item.tokens) for item in found if not isinstance(item, Skipped)),
        tuple(item for item in found if isinstance(item, Skipped)),
    )
