"""What target and draft remember of generations."""

import dataclasses
from collections.abc import Sequence

from nemotron_dspark.drafts.layers import DraftContext
from nemotron_dspark.targets import State


@dataclasses.dataclass(frozen=True)
class Memory:
    """What target and draft remember of some generations, a row each."""

    state: State
    context: DraftContext | None  # None without a draft

    def select(self, rows: Sequence[int]) -> "Memory":
        """A copy of ``rows`` in that order."""
        return Memory(self.state.select(rows), self.context.select(rows) if self.context is not None else None)

    def join(self, other: "Memory") -> None:
        """Put the rows of ``other`` behind these."""
        self.state.join(other.state)
        if self.context is not None and other.context is not None:
            self.context.join(other.context)

    def leave(self, row: int) -> None:
        """Take ``row`` out; the last row gets its place."""
        self.state.leave(row)
        if self.context is not None:
            self.context.leave(row)

    @property
    def length(self) -> int:
        """Tokens that the first row holds."""
        return self.state.lengths[0]

    @property
    def shortens(self) -> bool:
        """Whether the rows can be taken back to any length."""
        forgotten = self.context is not None and any(self.context.forgotten)
        return self.state.shortens and not (forgotten or self.looks_ahead)

    @property
    def looks_ahead(self) -> bool:
        """Whether the draft has read the token behind the last position, too."""
        return self.context is not None and self.context.looks_ahead

    def shorten(self, length: int) -> None:
        """Take the only row back to its first ``length`` tokens, if it is longer; for one that `shortens`."""
        if length < self.length:
            self.state.lengths = [length]
            if self.context is not None:
                self.context.lengths = [length]

    @property
    def size(self) -> int:
        """Bytes of a copy."""
        return self.state.size + (self.context.size if self.context is not None else 0)
