"""What a round costs on one machine, in a folder beside the draft: seconds by requests and by tokens of each.

`nds profile` measures it. A round of B requests in which k tokens of each are drafted takes what drafting them takes
and the target's pass over k + 1 tokens a request; for k = 0 only the latter. The pass is a rectangle: a request whose
block is shorter than the longest one costs as much as if it were not.
"""

import bisect
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemotron_dspark import files
from nemotron_dspark.errors import InputError

FOLDER = "profile"
FILE = "profile.json"


@dataclasses.dataclass(frozen=True)
class CostTable:
    """Measured seconds, a line for each number of requests in ``rows``."""

    rows: tuple[int, ...]  # ascending
    verify: tuple[tuple[float, ...], ...]  # [rows][γ + 1]: the target over 1 to γ + 1 tokens a request, and its commit
    draft: tuple[tuple[float, ...], ...]  # [rows][γ + 1]: drafting 0 to γ tokens, and reading what the target made

    @property
    def gamma(self) -> int:
        """Most tokens of a request that a round drafts."""
        return len(self.verify[0]) - 1

    def at(self, rows: int) -> tuple[list[float], list[float]]:
        """Seconds of drafting k tokens of ``rows`` requests and of verifying them, each for k from 0 to γ.

        Between measured numbers of requests, and beyond the largest, along the line through the two nearest.
        """
        return self._along(self.draft, rows), self._along(self.verify, rows)

    def rounds(self, rows: int) -> list[float]:
        """Seconds of a round of ``rows`` requests that drafts k tokens of each, for k from 0 to γ."""
        return [drafting + verifying for drafting, verifying in zip(*self.at(rows), strict=True)]

    def speeds(self, rows: int, survival: Sequence[float]) -> list[float]:
        """Tokens a second of ``rows`` requests together by k, where ``survival`` [γ] are the chances to keep a slot."""
        gained = [1.0 + sum(survival[:k]) for k in range(len(survival) + 1)]
        return [rows * tokens / seconds for tokens, seconds in zip(gained, self.rounds(rows), strict=False)]

    def _along(self, values: Sequence[Sequence[float]], rows: int) -> list[float]:
        if len(self.rows) == 1:
            return list(values[0])
        right = min(max(bisect.bisect_left(self.rows, rows), 1), len(self.rows) - 1)
        low, high = self.rows[right - 1], self.rows[right]
        share = (rows - low) / (high - low)
        return [max(a + share * (b - a), min(a, b)) for a, b in zip(values[right - 1], values[right], strict=True)]


def read_costs(place: Path, gamma: int | None = None) -> CostTable:
    """The table in ``place``, a file or a folder that `nds profile` wrote, for a draft of ``gamma`` tokens.

    Raises:
        InputError: there is none, it is none, or it was measured with other blocks.
    """
    path = Path(place) / FILE if Path(place).is_dir() else Path(place)
    again = f"Delete {path} and run `nds profile` again."
    found = files.read_json(path)
    try:
        rows = tuple(map(int, found["rows"]))
        table = CostTable(rows, *(_lines(found[name], len(rows)) for name in ("verify_seconds", "draft_seconds")))
        if list(rows) != sorted({*rows}) or not rows or rows[0] < 1 or len(table.draft[0]) != len(table.verify[0]):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{path} does not hold seconds by requests and tokens.", again) from None
    if gamma is not None and table.gamma != gamma:
        raise InputError(f"{path} was measured with blocks of {table.gamma} tokens, the draft's have {gamma}.", again)
    return table


def costs_beside(draft_folder: Path, gamma: int) -> CostTable | None:
    """The table in the draft's folder; None where it was not profiled."""
    place = Path(draft_folder) / FOLDER
    return read_costs(place, gamma) if (place / FILE).is_file() else None


def _lines(values: Any, count: int) -> tuple[tuple[float, ...], ...]:
    lines = tuple(tuple(map(float, line)) for line in values)
    if (
        len(lines) != count
        or len(set(map(len, lines))) != 1
        or not all(0 <= x < math.inf for line in lines for x in line)
    ):
        raise ValueError
    return lines
