"""Speed to expect by block length, from what rounds cost and how often each slot is kept; and the best length.

A draft of which only the first k of γ tokens are verified keeps of them what it keeps of whole blocks: the chance of a
slot does not depend on what is verified behind it.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from nemotron_dspark.drafts.costs import CostTable


@dataclasses.dataclass(frozen=True)
class Expected:
    """Tokens a second of some requests together, by how many tokens a round drafts of each."""

    label: str  # how they are sampled, or what was assumed
    rows: int
    tokens_per_second: tuple[float, ...]  # of 0 drafted tokens, 1, and so on

    @property
    def best(self) -> int:
        """Drafted tokens with the most tokens a second; 0: none."""
        return max(range(len(self.tokens_per_second)), key=self.tokens_per_second.__getitem__)

    @property
    def gain(self) -> float:
        """Speed at the best length over that without drafts."""
        return self.tokens_per_second[self.best] / self.tokens_per_second[0]

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"best_num_speculative_tokens": self.best, "gain": self.gain}


def expected(costs: CostTable, survival: Mapping[str, Sequence[float]]) -> tuple[Expected, ...]:
    """For each of ``survival``, the share of rounds [γ] that keep each slot by label, and each number of requests."""
    return tuple(
        Expected(label, rows, tuple(costs.speeds(rows, kept)))
        for label, kept in survival.items()
        for rows in costs.rows
    )


def assumed_survival(tokens: float, gamma: int) -> tuple[float, ...]:
    """Shares [γ] that keep each slot where every slot is kept with one chance, at ``tokens`` a round on average."""
    low, high = 0.0, 1.0
    for _ in range(60):
        chance = (low + high) / 2
        low, high = (chance, high) if 1 + sum(chance**k for k in range(1, gamma + 1)) < tokens else (low, chance)
    return tuple(low**k for k in range(1, gamma + 1))


def table(found: Sequence[Expected]) -> Table:
    """A row for each, the best length in bold."""
    made = Table(title="Tokens/s to expect, by tokens drafted of each request", title_justify="left")
    made.caption = "all requests together, from measured rounds (nds profile) and acceptance by slot; bold: the best"
    made.caption_justify = "left"
    made.add_column("", no_wrap=True)
    made.add_column("requests", justify="right")
    for length in range(len(found[0].tokens_per_second)):
        made.add_column(str(length), justify="right")
    made.add_column("gain", justify="right")
    for each in found:
        speeds = [f"{speed:.1f}" for speed in each.tokens_per_second]
        speeds[each.best] = f"[bold]{speeds[each.best]}[/]"
        made.add_row(each.label, str(each.rows), *speeds, f"{each.gain:.2f}×")
    return made


def sentences(found: Sequence[Expected]) -> list[str]:
    """The best `num_speculative_tokens` by number of requests, a sentence for each label."""
    said = []
    for label in dict.fromkeys(each.label for each in found):
        parts = [f"{each.best or 'none'} at {each.rows}" for each in found if each.label == label]
        said.append(f"{label}: best num_speculative_tokens by requests: {', '.join(parts)}.")
    return said
